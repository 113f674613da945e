"""Replies on disk: whole or not at all, and the first one stands."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from client.outbox import Outbox, Outcome


def test_an_outcome_comes_back_as_it_was_after_a_restart(tmp_path: Path) -> None:
    outcome = Outcome(b"adapter bytes", {"steps": 3})
    Outbox(tmp_path).store("task", outcome)

    assert Outbox(tmp_path).find("task") == outcome
    assert Outbox(tmp_path).find("other") is None


def test_the_first_stored_outcome_stands(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    first = outbox.store("task", Outcome(b"first", {}))

    assert outbox.store("task", Outcome(b"second", {})) == first
    assert outbox.find("task") == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["task"]


def test_a_crash_while_writing_leaves_no_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox = Outbox(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        outbox.store("task", Outcome(b"adapter", {}))

    assert outbox.find("task") is None
    assert list(tmp_path.iterdir()) == []


def test_old_leftovers_of_a_kill_are_swept_when_the_outbox_opens(tmp_path: Path) -> None:
    for name, age_s in ((".writing-old", 2 * 86400), (".writing-now", 0)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age_s,) * 2)

    Outbox(tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == [".writing-now"]


def test_the_folder_is_the_owners_alone(tmp_path: Path) -> None:
    Outbox(tmp_path / "outbox").store("task", Outcome(b"x", {}))

    assert (tmp_path / "outbox").stat().st_mode & 0o077 == 0
    assert (tmp_path / "outbox" / "task" / "adapter.safetensors").stat().st_mode & 0o077 == 0


def test_a_forgotten_adapter_leaves_a_code_and_no_bytes(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox")
    found = outbox.store("task", Outcome(b"adapter", {"steps": 3}))
    outbox.forget("task", failure="overtaken")
    # Who still reads it is not disturbed.
    assert found.adapter == b"adapter"
    assert outbox.find("task") == Outcome(b"", {}, failure="overtaken")
    assert [path.name for path in (tmp_path / "outbox" / "task").iterdir()] == ["rest.json"]
    outbox.forget("task", failure="overtaken")
    outbox.forget("nobody", failure="overtaken")
    outbox.store("failed", Outcome(b"", {}, failure="training"))
    outbox.forget("failed", failure="overtaken")
    assert outbox.find("failed") == Outcome(b"", {}, failure="training")
    assert outbox.find("nobody") is None


def test_forgetting_that_was_cut_off_is_done_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox = Outbox(tmp_path / "outbox")
    outbox.store("task", Outcome(b"adapter", {}))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", _cut_off)
        with pytest.raises(KeyboardInterrupt):
            outbox.forget("task", failure="overtaken")
    assert outbox.find("task") == Outcome(b"", {}, failure="overtaken")
    outbox.forget("task", failure="overtaken")
    assert not (tmp_path / "outbox" / "task" / "adapter.safetensors").exists()


def _cut_off(path: Path, **kwargs: object) -> None:
    raise KeyboardInterrupt
