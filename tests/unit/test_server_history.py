"""history.jsonl: a line for every event, readable after a crash."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from server.history import History, read_events


def _kinds(path: Path) -> list[Any]:
    return [event["event"] for event in read_events(path)]


def test_every_event_is_one_line_and_the_listener_is_told(tmp_path: Path) -> None:
    path, told = tmp_path / "history.jsonl", []
    history = History(path, listener=told.append)
    history.record("reply", site="berlin", numbers={"steps": 3})
    history.record("round", round=1)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == told == history.events()
    assert [line["event"] for line in lines] == ["reply", "round"]
    assert lines[0]["site"] == "berlin"
    assert lines[0]["numbers"] == {"steps": 3}
    assert lines[0]["time"] <= lines[1]["time"]


def test_a_resumed_run_appends(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    History(path).record("run-started")
    History(path).record("resumed")
    assert _kinds(path) == ["run-started", "resumed"]


def test_no_file_is_no_events(tmp_path: Path) -> None:
    assert read_events(tmp_path / "history.jsonl") == []


def test_a_line_cut_by_a_crash_costs_neither_the_events_before_nor_after(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    History(path).record("run-started")
    with path.open("a") as file:
        file.write('{"event": "round", "rou')
    assert _kinds(path) == ["run-started"]
    resumed = History(path)
    resumed.record("resumed")
    resumed.record("round", round=1)
    assert _kinds(path) == ["run-started", "resumed", "round"]


@pytest.mark.parametrize(
    "line", ["5", "[]", "null", '{"event": 5, "time": 1}', '{"event": "round"}', '{"time": 1.0}']
)
def test_a_line_that_is_no_event_costs_no_other(tmp_path: Path, line: str) -> None:
    path = tmp_path / "history.jsonl"
    History(path).record("run-started")
    with path.open("ab") as file:
        file.write(f"{line}\n".encode() + b"\xff\n")
    History(path).record("resumed")
    assert _kinds(path) == ["run-started", "resumed"]


def test_a_round_is_on_disk_before_the_listener_hears_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: order.append("fsync"))
    history = History(tmp_path / "history.jsonl", listener=lambda event: order.append("told"))
    history.record("reply")
    history.record("round")
    assert order == ["told", "fsync", "told"]


def test_an_event_that_cannot_be_written_is_not_announced(tmp_path: Path) -> None:
    told: list[Any] = []
    history = History(tmp_path / "missing" / "history.jsonl", listener=told.append)
    with pytest.raises(FileNotFoundError, match=r"history\.jsonl"):
        history.record("round")
    assert told == []
