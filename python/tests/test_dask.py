"""A real Dask, and a real agent."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

dask = pytest.importorskip("dask")
distributed = pytest.importorskip("distributed")

import shaper  # noqa: E402
import shaper.dask  # noqa: E402
from conftest import eventually, in_snapshot, own_cgroup  # noqa: E402
from distributed import Client, LocalCluster  # noqa: E402

pytestmark = pytest.mark.frameworks

TOLERANCE = 1.25
WORKER = {"cpu": 0.5, "memory": "1Gi", "name": "dask-tests"}


def where() -> tuple[int, str, str | None]:
    return os.getpid(), own_cgroup(), os.environ.get("SHAPER_TASK_ID")


def spin(seconds: float) -> float:
    """Cores that this process had while it wanted one."""
    began, used = time.monotonic(), time.process_time()
    while time.monotonic() < began + seconds:
        pass
    return (time.process_time() - used) / (time.monotonic() - began)


def inc(number: int) -> int:
    return number + 1


def local_cluster(**more: Any) -> LocalCluster:
    wanted = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "host": "127.0.0.1", "dashboard_address": None}
    return LocalCluster(**{**wanted, **more})


@pytest.fixture(scope="module")
def client(agent: str) -> Iterator[Client]:
    with shaper.dask.enable(WORKER), local_cluster(resources={"slots": 1}) as cluster, Client(cluster) as client:
        yield client
    eventually("its workers' tasks have ended", lambda: not in_snapshot("dask-tests"))


def test_each_worker_is_in_a_cgroup_of_its_own(client: Client) -> None:
    found = client.run(where)
    assert len(found) == 2
    assert len({cgroup for _, cgroup, _ in found.values()} | {own_cgroup()}) == 3, found
    nannies = {address: info["nanny"] for address, info in client.scheduler_info(n_workers=-1)["workers"].items()}
    assert all(nannies.values()), "they have nannies, which see their processes"
    for pid, cgroup, task_id in found.values():
        assert task_id is not None
        task = shaper.task(task_id)
        assert (task["pid"], task["phase"]) == (pid, "running")
        assert task["cgroup"].endswith(cgroup)
        assert task["workload"] == {"name": "dask-tests", "namespace": "default", "labels": {"framework": "dask"}}
    assert set(shaper.dask.task_ids(client).values()) == {task_id for _, _, task_id in found.values()}
    # Neither this process nor what it starts besides is in one.
    assert subprocess.run([sys.executable, "-c", "import os; print(os.environ.get('SHAPER_TASK_ID'))"],
                          capture_output=True, text=True, check=True).stdout == "None\n"  # fmt: skip


def test_the_limit_of_a_busy_worker_holds_and_its_use_is_its_own(client: Client) -> None:
    workers = client.run(where)
    address, (_, _, task_id) = next(iter(workers.items()))
    running = client.submit(spin, 6.0, workers=[address], pure=False)
    used = eventually(
        "the snapshot shows what it uses",
        lambda: [task for task in in_snapshot("dask-tests") if task["cpu"]["now"] > 200],
    )
    cores = running.result()
    print(f"dask: {cores:.3f} cores of 0.5")
    assert cores <= 0.5 * TOLERANCE
    assert [task["task_id"] for task in used] == [task_id]
    assert used[0]["cpu"]["now"] <= 500 * TOLERANCE


def test_a_worker_that_is_killed_has_another_in_a_task_of_its_own(client: Client) -> None:
    before = client.run(where)
    address, (pid, _, task_id) = next(iter(before.items()))
    assert task_id is not None
    os.kill(pid, 9)
    after = eventually(
        "its nanny has started another",
        lambda: (found := client.run(where, on_error="ignore")) and len(found) == 2 and address not in found and found,
    )
    ids = {found_id for _, _, found_id in after.values()}
    assert task_id not in ids and len(ids) == 2 and None not in ids
    eventually("its task has ended", lambda: shaper.task(task_id)["phase"] != "running")


def test_history_is_kept_by_prefix_with_what_it_is_worth(client: Client) -> None:
    client.gather(client.map(inc, range(20)))
    kept = shaper.dask.history(client)["inc"]
    assert kept["executions"] == 20 and kept["attribution"] == "cgroup"
    assert 0 <= kept["least_seconds"] <= kept["last_seconds"] <= kept["most_seconds"]
    assert kept["seconds"] >= kept["most_seconds"] and kept["most_bytes"] > 0


def test_what_no_worker_can_have_is_told_until_it_is_gone(client: Client) -> None:
    waiting = client.submit(inc, 1, resources={"slots": 9}, pure=False)
    found = eventually("it is told", lambda: shaper.dask.unplaceable(client))
    assert found == {waiting.key: {"slots": 9}}
    events = [event for _, event in client.get_events(shaper.dask.TOPIC)]
    assert {"action": "no-worker", "key": waiting.key, "resources": {"slots": 9}} in events
    waiting.cancel()
    eventually("it is not told any more", lambda: not shaper.dask.unplaceable(client))


def test_several_threads_in_a_worker_are_said_to_be_worth_less(agent: str) -> None:
    with shaper.dask.enable({"name": "threads"}), local_cluster(n_workers=1, threads_per_worker=2) as cluster:
        with Client(cluster) as client:
            client.gather(client.map(inc, range(4)))
            assert shaper.dask.history(client)["inc"]["attribution"] == "thread"


def test_a_request_that_is_not_understood_starts_no_worker(agent: str) -> None:
    with shaper.dask.enable({"cpus": 1}), pytest.raises(Exception, match="."):
        with local_cluster(n_workers=1) as cluster:
            cluster.close()


def test_a_worker_of_the_command_line_is_in_a_task_of_its_own(client: Client) -> None:
    environment = {**os.environ, "DASK_SHAPER__WORKER__NAME": "by-hand", "DASK_SHAPER__WORKER__CPU": "1"}
    address = client.scheduler.address
    command = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--preload-nanny", "shaper.dask",
               "--nthreads", "1", "--name", "by-hand", "--no-dashboard"]  # fmt: skip
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as worker:
        found = eventually("it is there", lambda: in_snapshot("by-hand"))
        assert found[0]["limits"]["cpu"] == {"at": 1000}
        worker.terminate()
    eventually("it is gone", lambda: not in_snapshot("by-hand"))
