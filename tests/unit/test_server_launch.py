"""What the coordinator's command hands to the ServerApp, and no site ever sees."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from common.config import RunConfig
from common.errors import ConfigError
from server.launch import LAUNCH_VARIABLE, Launch, load_launch, split_settings

CONFIG = RunConfig.parse(
    {
        "run.uid": "run-7",
        "train.rounds": 3,
        "evaluation.central-data": "/secret/test.jsonl",
        "checkpoint.keep": 9,
    }
)


def _launch(**changes: object) -> Launch:
    _, private = split_settings(CONFIG)
    content = {
        "run_dir": "/runs/7",
        "key": "/keys/task.pem",
        "roster": "/roster.json",
        "models": {"llama": "/models/llama"},
        "central_files": ("/secret/test.jsonl",),
        "settings": private,
    }
    return Launch(**{**content, **changes})  # type: ignore[arg-type]


def test_what_only_the_coordinator_needs_stays_out_of_flowers_run_config() -> None:
    shared, private = split_settings(CONFIG)
    assert {key.split(".")[0] for key in private} == {
        "evaluation",
        "checkpoint",
        "export",
        "tracking",
    }
    assert not {key.split(".")[0] for key in shared} & {"evaluation", "checkpoint", "export"}
    assert "/secret/test.jsonl" not in shared.values()
    assert {**shared, **private} == CONFIG.flat()


def test_a_launch_and_the_run_config_give_the_whole_config_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LAUNCH_VARIABLE, str(tmp_path))
    saved = _launch(resume=True)
    saved.save(tmp_path, "run-7")
    shared, _ = split_settings(CONFIG)
    launch, config = load_launch(shared)
    assert launch == saved
    assert config == CONFIG


def test_only_the_coordinator_may_read_a_launch(tmp_path: Path) -> None:
    path = _launch().save(tmp_path, "run-7")
    assert path == tmp_path / "run-7.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_each_run_finds_its_own_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LAUNCH_VARIABLE, str(tmp_path))
    _launch(run_dir="/runs/7").save(tmp_path, "run-7")
    _launch(run_dir="/runs/8").save(tmp_path, "run-8")
    assert load_launch({"run.uid": "run-8"})[0].run_dir == "/runs/8"


@pytest.mark.parametrize("run_config", [{}, {"run.uid": ""}, {"run.uid": "run-8"}])
def test_no_launch_for_the_run_is_an_error_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_config: dict[str, str]
) -> None:
    monkeypatch.setenv(LAUNCH_VARIABLE, str(tmp_path))
    _launch().save(tmp_path, "run-7")
    (tmp_path / ".json").write_text("{}")
    with pytest.raises(ConfigError, match="no launch for run.uid"):
        load_launch(run_config)


def test_no_launch_folder_is_an_error_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LAUNCH_VARIABLE, raising=False)
    with pytest.raises(ConfigError, match=f"no launch .* in {LAUNCH_VARIABLE} = ''"):
        load_launch({"run.uid": "run-7"})


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"central_files": []}', '{"central_files": 1}', '{"run_dir": "/r"}']
)
def test_a_malformed_launch_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv(LAUNCH_VARIABLE, str(tmp_path))
    (tmp_path / "run-7.json").write_text(text)
    with pytest.raises(ConfigError, match="is not a launch; write it again"):
        load_launch({"run.uid": "run-7"})


def test_an_unknown_field_is_no_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LAUNCH_VARIABLE, str(tmp_path))
    path = _launch().save(tmp_path, "run-7")
    path.write_text(json.dumps({**json.loads(path.read_text()), "surprise": 1}))
    with pytest.raises(ConfigError, match="is not a launch"):
        load_launch({"run.uid": "run-7"})


def test_bad_settings_in_a_launch_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LAUNCH_VARIABLE, str(tmp_path))
    _launch(settings={"evaluation.evry": 2}).save(tmp_path, "run-7")
    with pytest.raises(ConfigError, match=r"evaluation.evry: no such key"):
        load_launch({"run.uid": "run-7"})


def test_a_launch_knows_whether_it_is_saved_already(tmp_path: Path) -> None:
    """A resumed run on a full disk must not need to write it again."""
    launch = _launch()
    assert not launch.is_saved(tmp_path, "run-7")
    launch.save(tmp_path, "run-7")
    assert launch.is_saved(tmp_path, "run-7")
    assert not _launch(run_dir="/runs/8").is_saved(tmp_path, "run-7")
    (tmp_path / "run-7.json").write_text("{")
    assert not launch.is_saved(tmp_path, "run-7")
