"""Ray: each worker that wants it starts in a cgroup of its own.

    import shaper.ray
    shaper.ray.enable()                     # before ray.init() or `ray start`, on each node

    @shaper.ray.profiled(cpu=1, memory="2Gi")
    def load(path): ...

or, in any `runtime_env`: {"shaper": {"cpu": 1, "memory": "2Gi", "name": "etl.load"}}. Ray starts workers by runtime
environment, so each (name, requests) has workers of its own, and runs one task at a time in each.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ray._private.runtime_env.plugin import RuntimeEnvPlugin

from shaper._requests import Requests, Workload, exec_argv, workload_name

#: What Ray reads, on each node, when it starts.
PLUGINS = "RAY_RUNTIME_ENV_PLUGINS"
#: What of a worker's `runtime_env["shaper"]` is no request.
_OTHERS = ("name", "namespace", "labels", "socket")
_UNITS = {"": 1, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


class DoubleManagement(RuntimeError):
    """Ray manages cgroups itself, and would undo or escape what is set here."""


def enable() -> None:
    """Has the Ray that is started from this process, or its children, know `runtime_env["shaper"]`."""
    plugins = json.loads(os.environ.get(PLUGINS) or "[]")
    ours = {"class": f"{ShaperPlugin.__module__}.{ShaperPlugin.__qualname__}"}
    if ours not in plugins:
        os.environ[PLUGINS] = json.dumps([*plugins, ours])


def options(requests: Requests, workload: Workload, **ray_options: Any) -> dict[str, Any]:
    """Options of `ray.remote` for such a worker: what Ray reserves is what is limited, unless `ray_options` says otherwise."""
    wanted = {name: value for name, value in vars(requests).items() if value is not None}
    wanted["name"] = workload.name
    if workload.namespace is not None:
        wanted["namespace"] = workload.namespace
    if workload.labels:
        wanted["labels"] = dict(workload.labels)
    found: dict[str, Any] = {}
    if requests.cpu is not None:
        found["num_cpus"] = _cores(requests.cpu)
    if requests.memory is not None:
        found["memory"] = _bytes(requests.memory)
    found.update(ray_options)
    found["runtime_env"] = {**ray_options.get("runtime_env", {}), "shaper": wanted}
    return found


def profiled(*, name: str | None = None, namespace: str | None = None, **wanted: Any) -> Callable[[Any], Any]:
    """As `ray.remote`, with requests by which its workers are limited, and a name under which their use is kept.

    What is no request goes to `ray.remote` as it is. The name is that of the function or class, unless another is given.
    """
    asked = {key: wanted.pop(key) for key in list(wanted) if key in Requests.__dataclass_fields__}
    requests = Requests.of(asked)
    requests.arguments()

    def decorate(function: Any) -> Any:
        import ray

        of_function = name or workload_name(f"{function.__module__}.{function.__qualname__}")
        return ray.remote(**options(requests, Workload(of_function, namespace), **wanted))(function)

    return decorate


class ShaperPlugin(RuntimeEnvPlugin):
    """What Ray's agent of a node asks before it starts a worker."""

    name = "shaper"

    @staticmethod
    def validate(runtime_env_dict: Mapping[str, Any]) -> None:
        """Refuses what is not understood, where Ray asks for that."""
        _split(runtime_env_dict["shaper"])

    def modify_context(self, uris: list[str], runtime_env: Mapping[str, Any], context: Any, logger: logging.Logger) -> None:
        """Puts `shaper exec` before the worker's Python: Ray executes both in place, so that the worker's pid is the one
        that it started."""
        wanted = runtime_env.get("shaper")
        if wanted is None:
            return
        refuse_double_management(os.getpid())
        requests, workload, socket = _split(wanted)
        argv = exec_argv([], requests, workload, socket=socket)
        context.py_executable = f"{shlex.join(argv)} {context.py_executable}"


def _split(wanted: Any) -> tuple[Requests, Workload, str | None]:
    if not isinstance(wanted, Mapping):
        raise ValueError(f'runtime_env["shaper"] is a mapping, such as {{"cpu": 1}}, not {wanted!r}')
    others = {key: wanted[key] for key in _OTHERS if key in wanted}
    requests = Requests.of({key: value for key, value in wanted.items() if key not in _OTHERS})
    requests.arguments()
    workload = Workload(others.get("name", "ray-worker"), others.get("namespace"), "ray", others.get("labels", {}))
    return requests, workload, others.get("socket")


def refuse_double_management(pid: int) -> None:
    """Raises `DoubleManagement` where a process above `pid` is a raylet with `--enable-resource-isolation`."""
    while pid > 1:
        try:
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return
        for argument in arguments:
            name, _, value = argument.decode(errors="replace").partition("=")
            if name.replace("_", "-") == "--enable-resource-isolation" and value.lower() != "false":
                raise DoubleManagement(
                    "this Ray manages cgroups itself (--enable-resource-isolation), and moves workers out of shaper's: "
                    "start it without, or leave `shaper` out of runtime_env"
                )
        # The second field may contain anything; the parent is the second after it.
        pid = int(stat.rpartition(")")[2].split()[1])


def _cores(cpu: float | str) -> float:
    text = str(cpu)
    return float(text[:-1]) / 1000 if text.endswith("m") else float(text)


def _bytes(memory: int | str) -> int:
    text = str(memory)
    number = text.rstrip("KMGTikB")
    unit = text[len(number) :].removesuffix("B")
    if unit not in _UNITS:
        raise ValueError(f"{memory!r} is not a size, such as 512Mi or 2Gi")
    return int(float(number) * _UNITS[unit])
