"""A real Dask beside one whose workers are in tasks; here no cluster has the package preloaded unless it says so."""

from __future__ import annotations

import time

import pytest

pytest.importorskip("distributed")

import shaper.dask  # noqa: E402
from distributed import Client  # noqa: E402
from test_dask import inc, local_cluster  # noqa: E402

pytestmark = pytest.mark.frameworks


def test_without_the_preload_nothing_is_changed(agent: str) -> None:
    with local_cluster(n_workers=1) as cluster, Client(cluster) as client:
        assert set(shaper.dask.task_ids(client).values()) == {None}


def test_overhead_of_a_task_and_of_a_worker(agent: str) -> None:
    """Prints what it costs, beside Dask alone; asserts nothing about it."""

    def measured(enabled: bool) -> tuple[float, float]:
        began = time.monotonic()
        with local_cluster(n_workers=1) as cluster, Client(cluster) as client:
            assert (None in shaper.dask.task_ids(client).values()) is not enabled
            started = time.monotonic() - began
            client.submit(inc, 0, pure=False).result()
            count = 300
            began = time.monotonic()
            for number in range(count):
                client.submit(inc, number, pure=False).result()
            return started, (time.monotonic() - began) / count

    alone = measured(enabled=False)
    with shaper.dask.enable({"name": "overhead"}):
        ours = measured(enabled=True)
    print(
        f"dask: a cluster of one worker {alone[0] * 1e3:.0f} ms alone, {ours[0] * 1e3:.0f} ms in a task; "
        f"each task {alone[1] * 1e3:.2f} ms alone, {ours[1] * 1e3:.2f} ms in a task"
    )
