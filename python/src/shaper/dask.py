"""Dask: each worker process starts in a cgroup of its own, and the scheduler keeps what its tasks took.

    dask.config.set({"shaper.worker": {"cpu": 1, "memory": "2Gi"}})
    with shaper.dask.enable(), LocalCluster(n_workers=4, threads_per_worker=1) as cluster: ...

or on the command line: `dask worker --preload-nanny shaper.dask --nthreads 1 …` and `dask scheduler --preload shaper.dask`, with
the requests in Dask's configuration (`DASK_SHAPER__WORKER__CPU=1`). A worker without a nanny is started by
`shaper exec --cpu 1 -- dask worker --no-nanny …`.

With one thread a worker, what the cgroup uses while a task runs is the task's. With several, only the CPU time of the thread is
known of a task, and nothing is limited by task.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shlex
import shutil
import sys
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from multiprocessing import context, popen_spawn_posix, process, resource_tracker, spawn
from pathlib import Path
from typing import Any

import dask
import distributed.process
from distributed import Client, Nanny, Scheduler, SchedulerPlugin, Worker
from distributed.utils import key_split

from shaper._requests import Requests, Workload, exec_argv, workload_name

#: Where Dask's configuration says what a worker asks for.
WORKER = "shaper.worker"
#: What of that is no request.
_OTHERS = ("name", "namespace", "labels", "socket")
#: Prefixes of which the scheduler keeps something; the one that was used longest ago is forgotten first.
PREFIXES_MAX = 10_000
#: Tasks that wait for a worker of which it tells.
UNPLACEABLE_MAX = 10_000
#: The topic of the scheduler's events (`client.get_events`, `client.subscribe_topic`).
TOPIC = "shaper"
#: What `shaper exec` tells the command: its task.
TASK_ID = "SHAPER_TASK_ID"


# ---- workers


def _argv(wanted: Mapping[str, Any]) -> list[str]:
    others = {key: wanted[key] for key in _OTHERS if key in wanted}
    requests = Requests.of({key: value for key, value in wanted.items() if key not in _OTHERS})
    workload = Workload(others.get("name", "dask-worker"), others.get("namespace"), "dask", others.get("labels", {}))
    return exec_argv([sys.executable], requests, workload, socket=others.get("socket"))


@functools.cache
def _scripts() -> Path:
    """A directory of ours, for as long as this process lives."""
    directory = tempfile.mkdtemp(prefix="shaper-dask-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return Path(directory)


@functools.cache
def _python_in_a_task(*argv: str) -> str:
    """A program that is this Python, started in a task: `multiprocessing` takes one path, and no arguments."""
    script = _scripts() / f"python-{len(list(_scripts().iterdir()))}"
    script.write_text(f'#!/bin/sh\nexec {shlex.join(argv)} "$@"\n')
    script.chmod(0o700)
    return str(script)


_spawning = threading.Lock()


class _Popen(popen_spawn_posix.Popen):
    def _launch(self, process_obj: Any) -> None:
        program = _python_in_a_task(*_argv(dask.config.get(WORKER, {})))
        # It serves every process of this one, in no task; it would be started by what follows.
        resource_tracker.ensure_running()
        with _spawning:
            usual = spawn.get_executable()
            spawn.set_executable(program)
            try:
                super()._launch(process_obj)  # type: ignore[misc]
            finally:
                spawn.set_executable(usual)


class _Process(process.BaseProcess):
    _start_method = "spawn"

    @staticmethod
    def _Popen(process_obj: Any) -> _Popen:
        return _Popen(process_obj)


class _Context(context.SpawnContext):
    Process = _Process  # type: ignore[assignment]


def _workers_in_tasks() -> None:
    """Has the nannies of this process start workers in tasks. Nothing else that this process starts is concerned."""
    if dask.config.get("distributed.worker.multiprocessing-method") != "spawn":
        raise RuntimeError(
            "shaper starts Dask's workers anew, each in its cgroup: set distributed.worker.multiprocessing-method to spawn"
        )
    _argv(dask.config.get(WORKER, {}))
    ours = _Context()
    distributed.process.get_mp_context = lambda: ours


def _task_of_worker(_: Worker) -> str | None:
    return os.environ.get(TASK_ID)


def dask_setup(server: Scheduler | Nanny | Worker) -> None:
    """What Dask calls where this module is preloaded."""
    if isinstance(server, Scheduler):
        if ShaperScheduler.name not in server.plugins:
            server.add_plugin(ShaperScheduler(server))
    elif isinstance(server, Nanny):
        # What it starts loads this module, too, and says which task it is in.
        preload = [server.preload] if isinstance(server.preload, str) else list(server.preload or ())
        server.preload = preload if __name__ in preload else [*preload, __name__]
        _workers_in_tasks()
    else:
        server.startup_information["shaper_task"] = _task_of_worker


@contextlib.contextmanager
def enable(worker: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Has a cluster that is started inside, such as a `LocalCluster`, preload this module everywhere."""
    usual = distributed.process.get_mp_context
    preloads = {
        f"distributed.{part}.preload": [*dask.config.get(f"distributed.{part}.preload"), __name__]
        for part in ("scheduler", "nanny")
    }
    wanted = preloads if worker is None else {**preloads, WORKER: dict(worker)}
    try:
        with dask.config.set(wanted):
            yield
    finally:
        distributed.process.get_mp_context = usual


# ---- the scheduler


class ShaperScheduler(SchedulerPlugin):
    """Keeps what tasks took by the prefix of their keys, and which tasks no worker can have."""

    name = "shaper"

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._prefixes: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._unplaceable: OrderedDict[str, dict[str, float]] = OrderedDict()
        scheduler.handlers["shaper_history"] = self.history
        scheduler.handlers["shaper_unplaceable"] = self.unplaceable

    async def history(self) -> dict[str, dict[str, Any]]:
        """By prefix: how many executions, their seconds (in all, least and most, the last), bytes of their results, and how
        far what is used can be attributed to one of them: `cgroup` or `thread`."""
        return {prefix: dict(kept) for prefix, kept in self._prefixes.items()}

    async def unplaceable(self) -> dict[str, dict[str, float]]:
        """The tasks that no worker of this cluster can have, with the resources that each asks for: a reason to scale out."""
        return {key: dict(resources) for key, resources in self._unplaceable.items()}

    def transition(self, key: Any, start: str, finish: str, *args: Any, **details: Any) -> None:
        """What the scheduler calls at each change of a task."""
        if finish == "no-worker":
            self._cannot_place(str(key), key)
        elif start == "no-worker":
            self._unplaceable.pop(str(key), None)
            self._scheduler.log_event(TOPIC, {"action": "placeable", "key": str(key)})
        if start == "processing" and finish == "memory":
            self._has_run(key, details)

    def _cannot_place(self, text: str, key: Any) -> None:
        resources = dict(self._scheduler.tasks[key].resource_restrictions or {})
        self._unplaceable[text] = resources
        if len(self._unplaceable) > UNPLACEABLE_MAX:
            self._unplaceable.popitem(last=False)
        self._scheduler.log_event(TOPIC, {"action": "no-worker", "key": text, "resources": resources})

    def _has_run(self, key: Any, details: Mapping[str, Any]) -> None:
        spans = [span for span in details.get("startstops") or () if span["action"] == "compute"]
        if not spans:
            return
        seconds = sum(span["stop"] - span["start"] for span in spans)
        prefix = workload_name(key_split(key))
        kept = self._prefixes.setdefault(
            prefix,
            {"executions": 0, "seconds": 0.0, "least_seconds": seconds, "most_seconds": seconds, "most_bytes": 0},
        )
        kept["executions"] += 1
        kept["seconds"] += seconds
        kept["last_seconds"] = seconds
        kept["least_seconds"] = min(kept["least_seconds"], seconds)
        kept["most_seconds"] = max(kept["most_seconds"], seconds)
        kept["most_bytes"] = max(kept["most_bytes"], details.get("nbytes") or 0)
        worker = self._scheduler.workers.get(details.get("worker"))
        kept["attribution"] = self._attribution(worker)
        self._prefixes.move_to_end(prefix)
        if len(self._prefixes) > PREFIXES_MAX:
            self._prefixes.popitem(last=False)

    def _attribution(self, worker: Any) -> str:
        """A cgroup has all that one task uses only where it has one task at a time."""
        in_task = worker is not None and worker.extra.get("shaper_task") is not None
        return "cgroup" if in_task and worker.nthreads == 1 else "thread"


def history(client: Client) -> dict[str, dict[str, Any]]:
    """What the scheduler has kept by prefix of keys (`ShaperScheduler.history`)."""
    found: dict[str, dict[str, Any]] = client.sync(client.scheduler.shaper_history)
    return found


def unplaceable(client: Client) -> dict[str, dict[str, float]]:
    """The tasks that no worker can have, with what each asks for (`ShaperScheduler.unplaceable`)."""
    found: dict[str, dict[str, float]] = client.sync(client.scheduler.shaper_unplaceable)
    return found


def task_ids(client: Client) -> dict[str, str | None]:
    """The task of each worker, by its address; `None`: it is in none."""
    found: dict[str, str | None] = client.run(lambda: os.environ.get("SHAPER_TASK_ID"))
    return found
