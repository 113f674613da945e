"""The run folder: who may write into it, and what a resumption may change."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path

import pytest

from common.config import RunConfig, load_run_config
from common.errors import CheckpointError
from server.run_folder import holds_run, open_run_folder, run_toml

CONFIG = RunConfig.parse({"train.rounds": 3, "lora.rank": 4, "model.name": 'a "quoted" name'})


def _finished_run(path: Path) -> str:
    """Write everything that a run writes; return its run_uid."""
    folder = open_run_folder(path, CONFIG)
    folder.history.write_text('{"event": "finished"}\n')
    (folder.checkpoints / "round-0001").mkdir(parents=True)
    folder.adapter.mkdir()
    # Of a killed process.
    folder.incoming.mkdir()
    (folder.adapter / "adapter_config.json").write_text("{}")
    folder.write_summary({"run": folder.run_uid})
    return folder.run_uid


def test_a_new_run_writes_its_settings_down(tmp_path: Path) -> None:
    folder = open_run_folder(tmp_path / "runs" / "first", CONFIG)
    saved = load_run_config(folder.path / "run.toml")
    assert saved.run.uid == folder.run_uid
    assert saved.replace({"run.uid": ""}) == CONFIG
    assert len(folder.run_uid) == 32


def test_every_run_gets_a_uid_of_its_own_unless_one_is_given(tmp_path: Path) -> None:
    first, second = (open_run_folder(tmp_path / name, CONFIG).run_uid for name in "ab")
    assert first != second
    given = CONFIG.replace({"run.uid": "given-before"})
    assert open_run_folder(tmp_path / "c", given).run_uid == "given-before"


def test_an_empty_folder_and_one_with_strangers_files_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    open_run_folder(tmp_path, CONFIG)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "left",
    [
        "run.toml",
        "history.jsonl",
        "checkpoints",
        "incoming",
        "adapter",
        "summary.json",
        "report.html",
        "evaluation.json",
        "attack.json",
    ],
)
def test_a_folder_that_holds_any_part_of_a_run_is_refused(tmp_path: Path, left: str) -> None:
    (tmp_path / left).write_text("left")
    with pytest.raises(CheckpointError, match="already holds a run; continue it with --resume"):
        open_run_folder(tmp_path, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == [left]


@pytest.mark.parametrize("force", [False, True])
def test_a_scenarios_own_settings_are_not_replaced_by_a_run(tmp_path: Path, force: bool) -> None:
    (tmp_path / "run.toml").write_text(run_toml(CONFIG.replace({"run.uid": ""}).flat()))
    before = (tmp_path / "run.toml").read_text()
    assert not holds_run(tmp_path)
    with pytest.raises(
        CheckpointError, match="a run.toml that no run wrote.* choose another folder"
    ):
        open_run_folder(tmp_path, CONFIG, force=force)
    assert (tmp_path / "run.toml").read_text() == before


def test_a_run_that_has_just_begun_is_one(tmp_path: Path) -> None:
    assert not holds_run(tmp_path)
    open_run_folder(tmp_path, CONFIG)
    assert holds_run(tmp_path)


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path, below: str) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(
        CheckpointError, match="notes.* cannot be made a folder .*; choose another one"
    ):
        open_run_folder(tmp_path / "notes" / below, CONFIG)


def test_force_does_not_throw_a_release_away(tmp_path: Path) -> None:
    _finished_run(tmp_path)
    (tmp_path / "release").mkdir()
    with pytest.raises(CheckpointError, match="holds a release of the run"):
        open_run_folder(tmp_path, CONFIG, force=True)
    assert (tmp_path / "summary.json").exists()


def test_force_removes_the_earlier_run_and_nothing_else(tmp_path: Path) -> None:
    before = _finished_run(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "loss.png").write_bytes(b"png")
    folder = open_run_folder(tmp_path, CONFIG, force=True)
    assert folder.run_uid != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures", "notes.txt", "run.toml"]
    assert (tmp_path / "figures" / "loss.png").read_bytes() == b"png"


def test_resume_keeps_the_run_and_its_uid(tmp_path: Path) -> None:
    uid = _finished_run(tmp_path)
    folder = open_run_folder(tmp_path, CONFIG, resume=True)
    assert folder.run_uid == uid
    assert (folder.checkpoints / "round-0001").is_dir()
    # A uid made anew by the submitting command changes nothing.
    other = CONFIG.replace({"run.uid": "made-anew"})
    assert open_run_folder(tmp_path, other, resume=True).run_uid == uid


def test_resume_with_changed_settings_names_every_changed_key(tmp_path: Path) -> None:
    _finished_run(tmp_path)
    changed = CONFIG.replace({"lora.rank": 8, "privacy.target-epsilon": 9.0, "train.rounds": 5})
    with pytest.raises(CheckpointError, match="other settings: lora.rank, train.rounds, privacy.t"):
        open_run_folder(tmp_path, changed, resume=True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("federation.deadline-s", 5.0),
        ("evaluation.every", 2),
        ("checkpoint.keep", 9),
    ],
)
def test_resume_may_change_what_does_not_change_the_result(
    tmp_path: Path, key: str, value: float
) -> None:
    uid = _finished_run(tmp_path)
    folder = open_run_folder(tmp_path, CONFIG.replace({key: value}), resume=True)
    assert folder.run_uid == uid


def test_there_must_be_something_to_resume(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no run to resume"):
        open_run_folder(tmp_path / "nothing", CONFIG, resume=True)
    assert not (tmp_path / "nothing").exists()


def test_the_summary_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = open_run_folder(tmp_path, CONFIG)
    folder.write_summary({"wall_s": 1})

    def no_space(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(OSError, match="No space left"):
            folder.write_summary({"wall_s": 2})
    assert json.loads(folder.summary.read_text()) == {"wall_s": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.toml", "summary.json"]


def test_run_toml_is_what_flower_flattens_again() -> None:
    text = run_toml({"train.rounds": 3, "train.learning-rate": 1e-5, "lora.use-dora": False})
    assert tomllib.loads(text) == {
        "train": {"rounds": 3, "learning-rate": 1e-5},
        "lora": {"use-dora": False},
    }
