"""A finished run, read back: only a finished one, only its own adapter, only its own base."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from common.errors import CheckpointError, ConfigError, ModelError, SignatureError
from server.finished_run import find_base, load_finished_run
from server.history import History, read_events
from server.run_folder import RunFolder
from tests.conftest import save_tiny_model
from tests.unit.finished import UID, finished_config, trained_adapter, write_finished_run


@pytest.fixture
def finished(tiny_model_dir: Path, tmp_path: Path) -> RunFolder:
    return write_finished_run(tmp_path / "run", tiny_model_dir, finished_config())


def test_the_product_of_a_run_is_read_back_unscaled(
    finished: RunFolder, tiny_model_dir: Path
) -> None:
    made = trained_adapter(tiny_model_dir, finished_config())
    found = load_finished_run(finished.path)
    assert found.folder.run_uid == UID
    assert found.adapter.scaling == 1.0
    assert found.adapter.digest() == made.unscaled().digest()
    assert found.adapter_digest == made.digest()
    assert found.exported_round == 1
    assert find_base(found) == tiny_model_dir.resolve()


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        load_finished_run(tmp_path)


@pytest.mark.parametrize(
    ("event", "details", "kind"),
    [
        ("requested", {"resume": True}, "waiting, round 1 of 1"),
        ("stopped", {"code": "quorum", "message": "too few"}, "stopped, round 1 of 1"),
    ],
)
def test_a_run_that_has_not_finished_is_refused(
    finished: RunFolder, event: str, details: dict[str, object], kind: str
) -> None:
    History(finished.history).record(event, **details)
    with pytest.raises(CheckpointError, match=rf"has not finished \({kind}\); .*--resume"):
        load_finished_run(finished.path)


def test_a_run_without_its_summary_is_refused(finished: RunFolder) -> None:
    finished.summary.write_text("{}")
    with pytest.raises(CheckpointError, match=r"summary\.json is missing or damaged"):
        load_finished_run(finished.path)


def _change(folder: RunFolder) -> None:
    path = folder.adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[min(tensors)] = tensors[min(tensors)] + np.float32(1e-3)
    save_file(tensors, path)


@pytest.mark.parametrize("kept", [True, False], ids=["checkpoint-kept", "checkpoint-gone"])
def test_an_adapter_that_was_changed_since_is_refused(finished: RunFolder, kept: bool) -> None:
    if not kept:
        (finished.checkpoints / "round-0001").rename(finished.path / "elsewhere")
    _change(finished)
    with pytest.raises(CheckpointError, match=r"not what this run finished with.*changed since"):
        load_finished_run(finished.path)


def test_a_history_that_does_not_say_what_it_finished_with_leaves_it_to_the_checkpoint(
    finished: RunFolder,
) -> None:
    lines = [{k: v for k, v in e.items() if k != "adapter"} for e in read_events(finished.history)]
    finished.history.write_text("".join(json.dumps(line) + "\n" for line in lines))
    load_finished_run(finished.path)
    _change(finished)
    with pytest.raises(CheckpointError, match="is not the adapter of round 1.*changed since"):
        load_finished_run(finished.path)


def test_without_its_checkpoint_the_adapter_stands_for_itself(finished: RunFolder) -> None:
    (finished.checkpoints / "round-0001").rename(finished.path / "elsewhere")
    found = load_finished_run(finished.path)
    assert found.adapter_digest == found.adapter.digest()


@pytest.mark.parametrize("what", ["missing", "no safetensors", "odd tensor", "half a pair", "nan"])
def test_an_adapter_that_is_none_is_refused(finished: RunFolder, what: str) -> None:
    """Also where no checkpoint is left to compare it with."""
    (finished.checkpoints / "round-0001").rename(finished.path / "elsewhere")
    path = finished.adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    first = min(tensors)
    if what == "missing":
        path.unlink()
    elif what == "no safetensors":
        path.write_bytes(b"not one")
    else:
        if what == "odd tensor":
            tensors["modules_to_save.weight"] = np.ones(2, np.float32)
        elif what == "half a pair":
            del tensors[first.replace("lora_A", "lora_B")]
        else:
            tensors[first] = tensors[first] * np.float32(np.nan)
        save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"restore it, or run again"):
        load_finished_run(finished.path)


def test_the_base_must_be_the_one_that_the_run_began_with(
    finished: RunFolder, tmp_path: Path
) -> None:
    found = load_finished_run(finished.path)
    other = save_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(SignatureError, match="expected"):
        find_base(found, given=other)


def test_a_base_that_moved_is_asked_for(
    finished: RunFolder, tiny_model_dir: Path, tmp_path: Path
) -> None:
    launch = finished.path / "simulation" / "coordinator" / f"{UID}.json"
    content = json.loads(launch.read_text())
    launch.write_text(json.dumps({**content, "models": {"tiny": str(tmp_path / "gone")}}))
    found = load_finished_run(finished.path)
    with pytest.raises(ModelError, match=r"base model 'tiny' is not at .*gone.*--model FOLDER"):
        find_base(found)
    assert find_base(found, given=tiny_model_dir) == tiny_model_dir.resolve()


def test_a_coordinators_launch_is_found_beside_its_runs(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    folder = write_finished_run(tmp_path / "runs" / "one", tiny_model_dir, finished_config())
    (folder.path / "simulation" / "coordinator").rename(tmp_path / "launches")
    assert find_base(load_finished_run(folder.path)) == tiny_model_dir.resolve()


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("embedded", "embedded"),
        ("org/model", "org/model"),
        ("/srv/models/llama", "llama"),
        ("../models/llama", "llama"),
        ("models/of/llama", "llama"),
    ],
)
def test_the_bases_name_tells_no_place(
    tiny_model_dir: Path, tmp_path: Path, name: str, plain: str
) -> None:
    config = finished_config(model__name=name)
    write_finished_run(tmp_path / "run", tiny_model_dir, config)
    assert load_finished_run(tmp_path / "run").base_name == plain


@pytest.mark.parametrize("event", [b"round", b"run-started"])
def test_a_damaged_history_is_said_in_words(finished: RunFolder, event: bytes) -> None:
    with finished.history.open("ab") as file:
        file.write(b'{"event": "%b", "time": 1.0}\n' % event)
    with pytest.raises(CheckpointError, match=r"history\.jsonl is damaged \(\w+\)"):
        load_finished_run(finished.path)


@pytest.mark.parametrize(
    "text", ['{"exported_round": Infinity}', "[" * 100_000], ids=["inf", "deep"]
)
def test_a_summary_that_no_run_writes_is_said_in_words(finished: RunFolder, text: str) -> None:
    finished.summary.write_text(text)
    with pytest.raises(CheckpointError, match=r"summary\.json is missing or damaged"):
        load_finished_run(finished.path)
