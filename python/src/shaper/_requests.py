"""What a worker asks for, and the command line that says so."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from shaper._cli import command as cli

#: Most characters of a name, and what else may be in it (as of a task id).
NAME_MAX = 63
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Requests:
    """Limits of a task, as `shaper exec` takes them: quantities as numbers in base units, or as text with a unit."""

    #: Cores: 0.5, "500m".
    cpu: float | str | None = None
    #: Share of contended CPUs, 1 to 10000; usual is 100.
    cpu_weight: int | None = None
    #: Bytes: 2 << 30, "2Gi".
    memory: int | str | None = None
    #: Sent, with a unit: "100mbit".
    net: str | None = None
    #: Received, with a unit.
    net_in: str | None = None
    #: Reads and writes a second.
    io: int | None = None
    #: Share of contended block devices, 1 to 10000.
    io_weight: int | None = None

    @classmethod
    def of(cls, wanted: Mapping[str, Any]) -> Requests:
        """From a mapping, such as one out of a configuration; what it does not know is refused."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(wanted) - known)
        if unknown:
            raise ValueError(f"shaper knows no request {', '.join(map(repr, unknown))}; it knows {', '.join(sorted(known))}")
        return cls(**wanted)

    def arguments(self) -> list[str]:
        """As options of `shaper exec`."""
        options: list[str] = []
        for wanted in fields(self):
            value = getattr(self, wanted.name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float, str)):
                raise ValueError(f"{wanted.name} is a number or a text with a unit, not {value!r}")
            text = f"{value:.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
            options += ["--" + wanted.name.replace("_", "-"), text]
        return options


@dataclass(frozen=True)
class Workload:
    """What a task is an execution of: history is kept by (framework, namespace, name)."""

    name: str
    namespace: str | None = None
    #: "ray", "dask" or another's name.
    framework: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    def arguments(self) -> list[str]:
        """As options of `shaper exec`."""
        options = ["--name", self.name]
        if self.namespace is not None:
            options += ["--namespace", self.namespace]
        labels = dict(self.labels)
        if self.framework is not None:
            labels["framework"] = self.framework
        for name, value in sorted(labels.items()):
            options += ["--label", f"{name}={value}"]
        return options


def workload_name(text: str) -> str:
    """The nearest name that shaper takes: of `etl.<locals>.load` it is `etl._locals_.load`."""
    name = _NOT_IN_A_NAME.sub("_", text)[:NAME_MAX]
    return name.strip("._-") or "task"


def exec_argv(
    command: Sequence[str] | None = None,
    requests: Requests | None = None,
    workload: Workload | None = None,
    *,
    task_id: str | None = None,
    socket: str | None = None,
) -> list[str]:
    """The command line with which `command` starts in a cgroup of its own, as the same process.

    Without a command it is to be followed by one; without a workload its name is that of the program. `socket` is that of
    the agent (else `SHAPER_SOCKET`, else the usual one).
    """
    argv = [cli()]
    if socket is not None:
        argv += ["--socket", socket]
    argv.append("exec")
    if task_id is not None:
        argv += ["--id", task_id]
    if workload is not None:
        argv += workload.arguments()
    if requests is not None:
        argv += requests.arguments()
    return [*argv, "--", *([sys.executable] if command is None else command)]
