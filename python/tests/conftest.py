"""What the tests against real frameworks share."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import shaper

#: Long enough for what happens at all.
PATIENCE_SECONDS = 60.0


def eventually(what: str, happened: Callable[[], Any]) -> Any:
    """What `happened` returns once that is something; fails where it never is."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (found := happened()):
        assert time.monotonic() < deadline, f"not within {PATIENCE_SECONDS} s: {what}"
        time.sleep(0.05)
    return found


def own_cgroup() -> str:
    """That of this process, in cgroup v2."""
    places = Path("/proc/self/cgroup").read_text().splitlines()
    return next(place[3:] for place in places if place.startswith("0::"))


def in_snapshot(name: str) -> list[dict[str, Any]]:
    """The running tasks that are executions of `name`."""
    tasks = shaper.snapshot()["tasks"]
    return [task for task in tasks if task.get("workload") and task["workload"]["name"] == name]


@pytest.fixture(scope="session")
def agent() -> str:
    """The socket of a real agent, which `cargo xtask test --all` starts."""
    socket = os.environ.get("SHAPER_SOCKET")
    assert socket, "these tests need a real agent: SHAPER_SOCKET says where it listens"
    return socket
