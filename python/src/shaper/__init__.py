"""Tasks in cgroups of their own, with limits, by the agent of this node.

    from shaper import Requests, Workload, exec_argv
    subprocess.Popen(exec_argv(["python3", "worker.py"], Requests(cpu=1, memory="2Gi"), Workload("worker")))

`shaper.ray` and `shaper.dask` do this for the workers of these frameworks.
"""

from shaper._cli import ShaperError, profile, snapshot, task, tasks
from shaper._requests import Requests, Workload, exec_argv, workload_name

__all__ = [
    "Requests",
    "ShaperError",
    "Workload",
    "exec_argv",
    "profile",
    "snapshot",
    "task",
    "tasks",
    "workload_name",
]
