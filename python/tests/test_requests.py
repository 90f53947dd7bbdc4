"""What is said to the command, without it."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

import shaper
from shaper import Requests, Workload, exec_argv, workload_name


@pytest.fixture(autouse=True)
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A command that prints what the file `answer` beside it has, or complains."""
    path = tmp_path / "shaper"
    path.write_text('#!/bin/sh\ncd "$(dirname "$0")"\necho "$@" > asked\ncat answer 2>/dev/null && exit 0\necho "shaper: refused" >&2\nexit 2\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("SHAPER_CLI", str(path))
    return path


def test_the_command_line_says_all_that_is_wanted(command: Path) -> None:
    requests = Requests(cpu=0.5, cpu_weight=300, memory="2Gi", net="100mbit", net_in="1gbit", io=500, io_weight=50)
    workload = Workload("etl.load", "ml", "ray", {"team": "data"})
    argv = exec_argv(["python3", "a b.py"], requests, workload, task_id="w1", socket="/run/a.sock")
    assert argv == [
        str(command), "--socket", "/run/a.sock", "exec", "--id", "w1",
        "--name", "etl.load", "--namespace", "ml", "--label", "framework=ray", "--label", "team=data",
        "--cpu", "0.5", "--cpu-weight", "300", "--memory", "2Gi", "--net", "100mbit", "--net-in", "1gbit",
        "--io", "500", "--io-weight", "50", "--", "python3", "a b.py",
    ]  # fmt: skip
    assert exec_argv(["x"], Requests(cpu=2, memory=1 << 20)) == [
        str(command), "exec", "--cpu", "2", "--memory", "1048576", "--", "x",
    ]  # fmt: skip


def test_what_is_not_understood_is_refused() -> None:
    with pytest.raises(ValueError, match="'cpus'.*cpu"):
        Requests.of({"cpus": 1})
    with pytest.raises(ValueError, match="cpu is a number"):
        Requests(cpu=True).arguments()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("etl.load", "etl.load"),
        ("etl.<locals>.load", "etl._locals_.load"),
        ("__main__.f", "main__.f"),
        ("ü/\n", "task"),
        ("a" * 100, "a" * 63),
        ("a" * 62 + ".b", "a" * 62),
    ],
)
def test_any_text_has_a_name_that_is_taken(text: str, name: str) -> None:
    assert workload_name(text) == name


def test_answers_are_read_and_refusals_told(command: Path) -> None:
    with pytest.raises(shaper.ShaperError, match="^refused$") as refused:
        shaper.task("w1")
    assert refused.value.code == 2
    (command.parent / "answer").write_text('{"task_id": "w1"}')
    assert shaper.task("w1") == {"task_id": "w1"}
    assert (command.parent / "asked").read_text() == "describe w1 -o json\n"


def test_a_command_that_is_missing_is_said_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHAPER_CLI", "/nowhere/shaper")
    with pytest.raises(shaper.ShaperError, match="SHAPER_CLI"):
        exec_argv(["x"])
