"""The `shaper` command, asked for JSON.

The command rather than gRPC: `shaper exec` has to be a process that becomes the worker, so the command is there in any case; and
it knows certificates, brokers of which one leads, outages and versions of the API, once for everybody.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from typing import Any

#: What the `shaper` command exits with when the request was refused: nothing was changed.
REFUSED = 2


class ShaperError(Exception):
    """The command failed, with what it said; `code` is its exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def command() -> str:
    """The path of the `shaper` command: `SHAPER_CLI`, or what PATH has."""
    named = os.environ.get("SHAPER_CLI")
    found = shutil.which(named or "shaper")
    if found is None:
        where = f"SHAPER_CLI names `{named}`, which" if named else "`shaper`, which is not on PATH and"
        raise ShaperError(f"{where} cannot be executed: install it, or say in SHAPER_CLI where it is", 127)
    return os.path.abspath(found)


def ask(*arguments: str) -> Any:
    """Runs the command with these arguments, which have it print JSON, and returns that."""
    done = subprocess.run([command(), *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = done.stderr.strip() or f"exit code {done.returncode}"
        raise ShaperError(said.removeprefix("shaper: "), done.returncode)
    try:
        return json.loads(done.stdout)
    except ValueError as error:
        raise ShaperError(f"`shaper {' '.join(arguments)}` printed no JSON: {error}", 0) from error


def snapshot() -> dict[str, Any]:
    """What this node and the caller's tasks use, over the last second."""
    found = ask("top", "--once", "-o", "json")
    assert isinstance(found, dict)
    return found


def tasks() -> list[dict[str, Any]]:
    """The caller's tasks on this node or, where there is a broker, in the cluster."""
    found = ask("get", "tasks", "-o", "json")
    assert isinstance(found, list)
    return found


def task(task_id: str) -> dict[str, Any]:
    """One task; `ShaperError` if there is none."""
    found = ask("describe", task_id, "-o", "json")
    assert isinstance(found, dict)
    return found


def profile(name: str) -> dict[str, Any] | None:
    """What tasks of that name have used, as a profile, where a broker knows it; `None` where nobody has run it yet."""
    try:
        found = ask("profile", "get", name)
    except ShaperError as error:
        if error.code == REFUSED and "has finished yet" in str(error):
            return None
        raise
    assert isinstance(found, dict)
    return found
