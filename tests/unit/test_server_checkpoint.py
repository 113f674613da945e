"""Checkpoints: whole or not there, found again, and never taken when damaged."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path

import pytest

from common.errors import CheckpointError
from server.checkpoint import Checkpoint, load_latest, save_checkpoint
from tests.unit.adapters import adapter_shape, random_adapter

SHAPE = adapter_shape(2)
FILES = ["SHA256SUMS", "adapter.safetensors", "state.json"]


def _checkpoint(server_round: int) -> Checkpoint:
    return Checkpoint(server_round, random_adapter(server_round, rank=2), {"wall_s": 1.5})


def _save(folder: Path, *rounds: int, keep: int = 0) -> None:
    for server_round in rounds:
        save_checkpoint(folder, _checkpoint(server_round), keep=keep)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_checkpoint_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    _save(tmp_path, 1, 2, 10)
    found = load_latest(tmp_path, shape=SHAPE)
    assert found is not None
    assert found.server_round == 10
    assert found.progress == {"wall_s": 1.5}
    assert found.adapter.digest() == random_adapter(10, rank=2).digest()
    assert found.adapter.scaling == SHAPE.scaling


def test_nothing_saved_is_none(tmp_path: Path) -> None:
    assert load_latest(tmp_path, shape=SHAPE) is None
    assert load_latest(tmp_path / "missing", shape=SHAPE) is None


def test_saving_makes_the_folder_and_returns_where(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "run" / "checkpoints", _checkpoint(3), keep=1)
    assert path == tmp_path / "run" / "checkpoints" / "round-0003"
    assert _names(path) == FILES


def test_keep_prunes_the_oldest(tmp_path: Path) -> None:
    _save(tmp_path, 1, 2, 3, 4, keep=2)
    assert _names(tmp_path) == ["round-0003", "round-0004"]


def test_keep_zero_keeps_all(tmp_path: Path) -> None:
    _save(tmp_path, 1, 2, 3, keep=0)
    assert _names(tmp_path) == ["round-0001", "round-0002", "round-0003"]


def test_a_round_saved_again_replaces_itself(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    other = Checkpoint(1, random_adapter(99, rank=2), {})
    save_checkpoint(tmp_path, other, keep=0)
    found = load_latest(tmp_path, shape=SHAPE)
    assert found is not None
    assert found.adapter.digest() == other.adapter.digest()
    assert _names(tmp_path) == ["round-0001"]


@pytest.mark.parametrize("call", ["rename", "replace", "fsync", "mkdir"])
def test_a_full_disk_leaves_the_earlier_checkpoints_and_no_leftovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """rename: the last step; replace and fsync: a file inside; mkdir: before anything."""
    _save(tmp_path, 1, 2)

    def no_space(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, no_space)
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(tmp_path, _checkpoint(3), keep=1)
    assert _names(tmp_path) == ["round-0001", "round-0002"]
    found = load_latest(tmp_path, shape=SHAPE)
    assert found is not None
    assert found.server_round == 2


def test_a_failure_in_the_second_file_leaves_no_half_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _save(tmp_path, 1)
    whole = os.replace
    written: list[str] = []

    def second_fails(source: str, target: Path) -> None:
        if written:
            raise OSError(28, "No space left on device")
        written.append(str(target))
        whole(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", second_fails)
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(tmp_path, _checkpoint(2), keep=0)
    assert written[0].endswith("adapter.safetensors")
    assert _names(tmp_path) == ["round-0001"]


def test_a_checkpoint_appears_only_once_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the moment of the rename both files are there and durable; before it, no round-*."""
    rename = os.rename
    seen: list[tuple[list[str], list[str]]] = []

    def look_then_rename(source: Path, target: Path) -> None:
        rounds = [path.name for path in tmp_path.glob("round-*")]
        seen.append((_names(Path(source)), rounds))
        rename(source, target)

    monkeypatch.setattr(os, "rename", look_then_rename)
    _save(tmp_path, 1)
    assert seen == [(FILES, [])]


def test_leftovers_of_a_killed_process_are_swept_and_never_loaded(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    shutil.copytree(tmp_path / "round-0001", tmp_path / ".writing-killed")
    found = load_latest(tmp_path, shape=SHAPE)
    assert found is not None
    assert found.server_round == 1
    _save(tmp_path, 2)
    assert _names(tmp_path) == ["round-0001", "round-0002"]


def _damage(path: Path, how: str) -> None:
    adapter, state = path / "adapter.safetensors", path / "state.json"
    if how == "flipped bit":
        data = bytearray(adapter.read_bytes())
        data[-1] ^= 1
        adapter.write_bytes(bytes(data))
    elif how == "cut adapter":
        adapter.write_bytes(adapter.read_bytes()[:-10])
    elif how == "empty adapter":
        adapter.write_bytes(b"")
    elif how == "no adapter":
        adapter.unlink()
    elif how == "cut state":
        state.write_text(state.read_text()[:20])
    elif how == "no state":
        state.unlink()
    elif how == "state of zeros":
        state.write_bytes(bytes(200))
    elif how == "state is a list":
        state.write_text("[]")
    elif how == "state without round":
        content = json.loads(state.read_text())
        del content["round"]
        state.write_text(json.dumps(content))
    elif how == "round is null":
        state.write_text(json.dumps({**json.loads(state.read_text()), "round": None}))
    elif how == "other rank":
        adapter.write_bytes(random_adapter(2, rank=3).to_safetensors())
    elif how == "other adapter":
        adapter.write_bytes(random_adapter(7, rank=2).to_safetensors())
    else:
        raise AssertionError(how)


DAMAGES = [
    "flipped bit", "cut adapter", "empty adapter", "no adapter", "cut state", "no state",
    "state of zeros", "state is a list", "state without round", "round is null", "other rank",
    "other adapter",
]  # fmt: skip


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_newest_is_passed_over_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    _save(tmp_path, 1, 2)
    _damage(tmp_path / "round-0002", how)
    with caplog.at_level(logging.WARNING, logger="server.checkpoint"):
        found = load_latest(tmp_path, shape=SHAPE)
    assert found is not None
    assert found.server_round == 1
    assert "round-0002 is damaged" in caplog.text


def test_when_all_are_damaged_the_run_does_not_start_over_silently(tmp_path: Path) -> None:
    _save(tmp_path, 1, 2)
    _damage(tmp_path / "round-0001", "flipped bit")
    _damage(tmp_path / "round-0002", "cut state")
    with pytest.raises(CheckpointError, match="every checkpoint in .* is damaged"):
        load_latest(tmp_path, shape=SHAPE)


def test_an_adapter_that_has_grown_comes_back_with_its_velocity(tmp_path: Path) -> None:
    grown, velocity = random_adapter(0, rank=5), random_adapter(1, rank=2)
    checkpoint = Checkpoint(1, grown, {}, velocity=velocity)
    path = save_checkpoint(tmp_path, checkpoint, keep=1)
    assert _names(path) == sorted([*FILES, "velocity.safetensors"])
    found = load_latest(tmp_path, shape=SHAPE)
    assert found is not None
    assert found.velocity is not None
    assert (found.adapter.digest(), found.velocity.digest()) == (grown.digest(), velocity.digest())


def test_a_damaged_velocity_is_a_damaged_checkpoint(tmp_path: Path) -> None:
    for server_round in (1, 2):
        adapter = random_adapter(server_round, rank=2)
        save_checkpoint(tmp_path, Checkpoint(server_round, adapter, {}, velocity=adapter), keep=0)
    path = tmp_path / "round-0002" / "velocity.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\x00\x00\x80\x3f")
    found = load_latest(tmp_path, shape=SHAPE)
    assert found is not None
    assert found.server_round == 1


def test_a_checkpoint_of_before_adapters_could_grow_is_gone_on_from(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, _checkpoint(4), keep=1)
    state = json.loads((path / "state.json").read_text())
    del state["rank"]
    (path / "state.json").write_text(json.dumps(state))
    sums = [
        f"{hashlib.sha256((path / name).read_bytes()).hexdigest()}  {name}\n"
        for name in ("adapter.safetensors", "state.json")
    ]
    (path / "SHA256SUMS").write_text("".join(sums))
    found = load_latest(tmp_path, shape=SHAPE)
    assert found is not None
    assert found.adapter.digest() == _checkpoint(4).adapter.digest()
