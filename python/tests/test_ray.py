"""A real Ray, and a real agent."""

from __future__ import annotations

import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ray = pytest.importorskip("ray")

import shaper  # noqa: E402
import shaper.ray  # noqa: E402
from conftest import eventually, in_snapshot, own_cgroup  # noqa: E402
from shaper import Requests, Workload  # noqa: E402

pytestmark = pytest.mark.frameworks

#: Of a CPU limit, the share by which use may exceed it, over the seconds that are measured: a limit is a mean over ten.
TOLERANCE = 1.25


@pytest.fixture(scope="module")
def cluster(agent: str) -> Iterator[None]:
    shaper.ray.enable()
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=100 << 20,
        _node_ip_address="127.0.0.1",
        logging_level=logging.ERROR,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": os.path.dirname(__file__)}},
    )
    yield
    ray.shutdown()
    eventually("its workers' tasks have ended", lambda: not any(task["phase"] == "running" for task in shaper.tasks()))


def where() -> tuple[int, str, str | None]:
    return os.getpid(), own_cgroup(), os.environ.get("SHAPER_TASK_ID")


def spin(seconds: float) -> tuple[float, float, str | None]:
    """Cores that this process had while it wanted one."""
    began, used = time.monotonic(), time.process_time()
    while time.monotonic() < began + seconds:
        pass
    took = time.monotonic() - began
    return (time.process_time() - used) / took, took, os.environ.get("SHAPER_TASK_ID")


def test_workers_that_want_it_are_in_cgroups_of_their_own(cluster: None) -> None:
    plain = ray.get(ray.remote(where).remote())
    assert plain[2] is None
    first = shaper.ray.profiled(name="etl.load", cpu=1, memory="512Mi")(where)
    second = shaper.ray.profiled(name="etl.store", namespace="ml", cpu=1)(where)
    found = ray.get([first.remote(), second.remote()])
    assert len({plain[1], found[0][1], found[1][1]}) == 3, (plain, found)
    for (pid, cgroup, task_id), (name, namespace) in zip(found, [("etl.load", "default"), ("etl.store", "ml")], strict=True):
        assert task_id is not None
        task = shaper.task(task_id)
        assert (task["pid"], task["phase"]) == (pid, "running")
        assert task["cgroup"].endswith(cgroup)
        workload = {"name": name, "namespace": namespace, "labels": {"framework": "ray"}}
        assert task["workload"] == workload
        assert [of["task_id"] for of in in_snapshot(name)] == [task_id]
    # The same function again has the same worker.
    assert ray.get(first.remote())[0] == found[0][0]


def test_the_limit_of_a_busy_worker_holds_and_its_use_is_its_own(cluster: None) -> None:
    busy = shaper.ray.profiled(name="busy", cpu=0.25, num_cpus=1)(spin)
    running = busy.remote(6.0)
    used = eventually(
        "the snapshot shows what it uses",
        lambda: [task for task in in_snapshot("busy") if task["cpu"]["now"] > 100],
    )
    cores, took, task_id = ray.get(running)
    assert used[0]["task_id"] == task_id
    print(f"ray: {cores:.3f} cores of 0.25 over {took:.1f} s")
    # What it may burst is bounded by the agent's option (--cpu-burst-pool off, here).
    assert cores <= 0.25 * TOLERANCE
    assert used[0]["cpu"]["now"] <= 250 * TOLERANCE


def say_and_stay(path: str) -> None:
    """Says which task it is in, whole or not at all, and stays."""
    with open(f"{path}.new", "w") as said:
        said.write(os.environ["SHAPER_TASK_ID"])
    os.rename(f"{path}.new", path)
    time.sleep(600)


def test_a_worker_that_is_cancelled_is_seen_by_ray(cluster: None, tmp_path: Path) -> None:
    said = tmp_path / "task"
    victim = shaper.ray.profiled(name="victim", max_retries=0)(say_and_stay)
    running = victim.remote(str(said))
    # One that is killed before it runs its task is started again, and that is no failure.
    eventually("it runs", said.exists)
    subprocess.run([os.environ["SHAPER_CLI"], "cancel", said.read_text(), "--grace", "0s"], check=True)
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(running)


def test_overhead_of_a_task_and_of_a_worker(cluster: None) -> None:
    """Prints what it costs, beside Ray alone; asserts nothing about it."""

    def nothing() -> None:
        pass

    def started(function: Any) -> float:
        began = time.monotonic()
        ray.get(function.remote())
        return time.monotonic() - began

    def per_task(function: Any, count: int) -> float:
        ray.get(function.remote())
        began = time.monotonic()
        for _ in range(count):
            ray.get(function.remote())
        return (time.monotonic() - began) / count

    def fresh(number: int, **more: Any) -> Any:
        return ray.remote(runtime_env={"env_vars": {"NUMBER": str(number)}, **more})(nothing)

    rounds = 3
    alone = [started(fresh(number)) for number in range(rounds)]
    ours = [started(fresh(number, shaper={"name": "overhead"})) for number in range(rounds)]
    plain, shaped = per_task(ray.remote(nothing), 300), per_task(shaper.ray.profiled(name="overhead")(nothing), 300)
    middle = rounds // 2
    print(
        f"ray: a worker's first task {sorted(alone)[middle] * 1e3:.0f} ms alone, {sorted(ours)[middle] * 1e3:.0f} ms in a task; "
        f"each next task {plain * 1e3:.2f} ms alone, {shaped * 1e3:.2f} ms in a task"
    )


def test_what_is_not_understood_is_told_before_anything_starts(cluster: None) -> None:
    wrong = ray.remote(runtime_env={"shaper": {"cpus": 1}})(where)
    with pytest.raises(Exception, match="knows no request 'cpus'"):
        ray.get(wrong.remote())


def test_a_ray_that_manages_cgroups_itself_is_refused() -> None:
    raylet = [sys.executable, "-c", "import sys; sys.stdin.read()", "--enable-resource-isolation"]
    with subprocess.Popen(raylet, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        eventually("it runs", lambda: b"isolation" in open(f"/proc/{process.pid}/cmdline", "rb").read())
        with pytest.raises(shaper.ray.DoubleManagement, match="leave `shaper` out"):
            shaper.ray.refuse_double_management(process.pid)
        process.stdin.close()
    shaper.ray.refuse_double_management(os.getpid())


def test_the_worker_is_started_by_the_command_in_place() -> None:
    context = SimpleNamespace(py_executable="/usr/bin/python3")
    wanted = {"shaper": {"cpu": 0.5, "memory": "2Gi", "name": "it's", "socket": "/run/a b.sock"}}
    shaper.ray.ShaperPlugin().modify_context([], wanted, context, logging.getLogger())
    argv = shlex.split(context.py_executable)
    assert argv[1:] == ["--socket", "/run/a b.sock", "exec", "--name", "it's", "--label", "framework=ray", "--cpu", "0.5",
                        "--memory", "2Gi", "--", "/usr/bin/python3"]  # fmt: skip
    options = shaper.ray.options(Requests(cpu="500m", memory="2Gi"), Workload("f", "ml"), max_retries=0)
    assert options == {
        "num_cpus": 0.5,
        "memory": 2 << 30,
        "max_retries": 0,
        "runtime_env": {"shaper": {"cpu": "500m", "memory": "2Gi", "name": "f", "namespace": "ml"}},
    }
