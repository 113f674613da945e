"""Orders for a coordinator's runs: begin, go on, stop; one run at a time."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from common.config import RunConfig, flatten, read_toml
from common.errors import CheckpointError, ConfigError
from common.locks import hold_lock, lock_holder
from server.cli import app
from server.coordinator import Coordinator
from server.following import follow_run
from server.history import Event, History, read_events
from server.launch import LAUNCH_VARIABLE, load_launch
from server.orders import check_order, order_run, require_room, stop_run
from server.run_check import CheckedRun
from server.run_folder import RunFolder, run_lock, run_toml
from server.runs import AskedRuns
from tests.unit.coordinator import ask_for_run, write_coordinator

ROOT = Path(__file__).parents[2]
SMALL = {
    "model.quantization": "none",
    "lora.rank": 2,
    "data.prompt-template": "question",
    "data.max-length": 48,
    "train.rounds": 3,
    "train.batch-size": 4,
    "privacy.unit": "none",
    "federation.deadline-s": 60.0,
    "evaluation.every": 2,
}


@pytest.fixture
def coordinator(tmp_path: Path) -> Coordinator:
    return write_coordinator(tmp_path / "coordinator")


def _config(model: Path, **changes: object) -> RunConfig:
    named = {key.replace("__", ".").replace("_", "-"): value for key, value in changes.items()}
    return RunConfig.parse({**SMALL, "model.name": str(model), **named})


@pytest.fixture
def checked(coordinator: Coordinator, tiny_model_dir: Path, tmp_path: Path) -> CheckedRun:
    return check_order(coordinator, _config(tiny_model_dir), base_dir=tmp_path)


def test_an_order_makes_folder_launch_and_run_config_and_hides_what_no_site_may_see(
    coordinator: Coordinator,
    checked: CheckedRun,
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = order_run(coordinator, checked, run_dir=tmp_path / "run")
    [asked] = AskedRuns(coordinator.launches).open()
    assert asked.uid == folder.run_uid
    assert asked.state.kind == "waiting"
    overrides = flatten(read_toml(asked.overrides))
    assert overrides["run.uid"] == folder.run_uid
    assert overrides["model.name"] == tiny_model_dir.name
    assert not any(key.startswith(("evaluation.", "export.")) for key in overrides)
    assert asked.overrides.stat().st_mode & 0o777 == 0o600

    monkeypatch.setenv(LAUNCH_VARIABLE, str(coordinator.launches))
    launch, config = load_launch(overrides)
    assert launch.resume
    assert launch.run_dir == str(tmp_path / "run")
    assert launch.models == {tiny_model_dir.name: str(tiny_model_dir)}
    assert config.evaluation.every == 2
    assert config.train.rounds == 3


def test_everything_that_is_wrong_is_said_at_once_and_nothing_is_written(
    coordinator: Coordinator, tiny_model_dir: Path, tmp_path: Path
) -> None:
    config = _config(
        tiny_model_dir, federation__min_sites=3, evaluation__central_data="no-such.jsonl"
    )
    with pytest.raises(ConfigError, match="2 things are wrong") as caught:
        check_order(coordinator, config, base_dir=tmp_path)
    assert "min-sites = 3, but 2 sites are enrolled" in str(caught.value)
    assert "no-such.jsonl" in str(caught.value)
    assert list(coordinator.launches.iterdir()) == []


def test_the_simulations_model_is_refused(coordinator: Coordinator, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r'"embedded" is the model of simulations; name the folder'
    ):
        check_order(coordinator, RunConfig.parse({}), base_dir=tmp_path)


def test_a_model_is_found_beside_the_run_file(
    coordinator: Coordinator, tiny_model_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "models" / "tiny")
    found = check_order(coordinator, _config(Path("models/tiny")), base_dir=tmp_path)
    assert found.config.model.name == "tiny"
    assert found.model.path == tmp_path / "models" / "tiny"


def test_a_second_run_is_refused_while_one_goes(
    coordinator: Coordinator, checked: CheckedRun, tmp_path: Path
) -> None:
    first = order_run(coordinator, checked, run_dir=tmp_path / "run")
    with pytest.raises(CheckpointError, match=f"run {first.run_uid} .*one at a time; wait .*stop"):
        order_run(coordinator, checked, run_dir=tmp_path / "other")
    assert not (tmp_path / "other").exists()
    History(first.history).record("finished", folder="")
    order_run(coordinator, checked, run_dir=tmp_path / "other")


def test_a_run_that_was_replaced_is_not_asked_for_any_more(
    coordinator: Coordinator, checked: CheckedRun, tmp_path: Path
) -> None:
    """Else two runs share one folder, and the old one's settings are refused there for ever."""
    first = order_run(coordinator, checked, run_dir=tmp_path / "run")
    History(first.history).record("finished", folder="")
    second = order_run(coordinator, checked, run_dir=tmp_path / "run", force=True)
    assert [run.uid for run in AskedRuns(coordinator.launches).all()] == [second.run_uid]
    assert {path.stem for path in coordinator.launches.glob("*.*ml")} == {second.run_uid}


def test_two_orders_at_once_begin_one_run(
    coordinator: Coordinator, checked: CheckedRun, tmp_path: Path
) -> None:
    refused: list[str] = []

    def order(number: int) -> None:
        try:
            order_run(coordinator, checked, run_dir=tmp_path / f"run-{number}")
        except CheckpointError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=order, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 3
    assert len(AskedRuns(coordinator.launches).open()) == 1


def test_a_run_that_a_process_runs_is_neither_replaced_nor_resumed(
    coordinator: Coordinator, checked: CheckedRun, tmp_path: Path
) -> None:
    folder = order_run(coordinator, checked, run_dir=tmp_path / "run")
    with hold_lock(run_lock(folder.path)):
        for how in ({"force": True}, {"resume": True}):
            with pytest.raises(CheckpointError, match=f"process {os.getpid()} runs the run in"):
                order_run(coordinator, checked, run_dir=folder.path, **how)
    assert folder.history.exists()


def test_a_stopped_run_goes_on_under_its_name_with_settings_that_may_change(
    coordinator: Coordinator, checked: CheckedRun, tmp_path: Path
) -> None:
    folder = order_run(coordinator, checked, run_dir=tmp_path / "run")
    History(folder.history).record("stopped", code="quorum", message="too few")
    changed = checked.config.replace({"federation.deadline-s": 99.0, "evaluation.every": 3})
    again = order_run(
        coordinator, replace(checked, config=changed), run_dir=tmp_path / "run", resume=True
    )
    assert again.run_uid == folder.run_uid
    [asked] = AskedRuns(coordinator.launches).open()
    assert asked.state.kind == "waiting"
    assert flatten(read_toml(asked.overrides))["federation.deadline-s"] == 99.0


def test_stopping_ends_the_server_app_and_keeps_the_run_for_later(
    coordinator: Coordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.orders._STOP_S", 0.3)
    run = ask_for_run(coordinator, tmp_path / "run")
    History(run.history).record("run-started", rounds=3)
    with _server_app(run) as process:
        stopped = stop_run(coordinator)
        assert process.wait(timeout=60) == -signal.SIGTERM
    assert lock_holder(run_lock(run.path)) is None
    assert stopped.uid == run.run_uid
    assert stopped.state.is_over
    assert read_events(run.history)[-1]["code"] == "stopped"
    with pytest.raises(ConfigError, match="nothing to stop"):
        stop_run(coordinator)


def _server_app(run: RunFolder) -> subprocess.Popen[bytes]:
    code = (
        "import sys, time; from pathlib import Path; from common.locks import hold_lock\n"
        "with hold_lock(Path(sys.argv[1])): print(1, flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(run_lock(run.path))],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_following_tells_every_event_since_the_order_and_how_it_ended(
    coordinator: Coordinator, tmp_path: Path
) -> None:
    run = ask_for_run(coordinator, tmp_path / "run")
    history = History(run.history)
    history.record("run-started", rounds=3)
    history.record("stopped", code="quorum", message="too few")
    history.record("requested", resume=True)
    told: list[Event] = []
    said: list[str] = []

    def go_on() -> None:
        history.record("resumed", round=0, rounds=3)
        history.record("round", round=1)
        history.record("stopped", code="quorum", message="fewer")

    threading.Timer(1.2, go_on).start()
    state = follow_run(coordinator, run.run_uid, listener=told.append, say=said.append)
    assert [event["event"] for event in told] == ["requested", "resumed", "round", "stopped"]
    assert (state.kind, state.message) == ("stopped", "fewer")
    assert len(said) == 1
    assert "no `consilium server up` runs" in said[0]


def test_a_run_that_is_taken_away_ends_its_following(
    coordinator: Coordinator, tmp_path: Path
) -> None:
    run = ask_for_run(coordinator, tmp_path / "run")
    threading.Timer(0.3, (run.path / "run.toml").unlink).start()
    with pytest.raises(CheckpointError, match="is gone: its folder or its launch"):
        follow_run(coordinator, run.run_uid, listener=lambda _: None, say=lambda _: None)


def test_room_is_needed_only_where_something_goes(coordinator: Coordinator, tmp_path: Path) -> None:
    require_room(coordinator, tmp_path / "run", resume=False)
    ask_for_run(coordinator, tmp_path / "run")
    require_room(coordinator, tmp_path / "run", resume=True)
    with pytest.raises(CheckpointError, match="one at a time"):
        require_room(coordinator, tmp_path / "run", resume=False)


def test_a_detached_order_says_where_it_writes_and_that_nothing_begins_it(
    coordinator: Coordinator, tiny_model_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "study.toml").write_text(run_toml(_config(tiny_model_dir).flat()))
    order = ["run", str(tmp_path / "study.toml"), str(coordinator.folder), "--detach"]
    done = CliRunner().invoke(app, [*order, "--set", "train.rounds=2"])
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    run_dir = coordinator.folder / "runs" / "study"
    assert f"it writes {run_dir}" in said
    assert "It begins when `consilium server up" in said
    assert "consilium server status" in said
    [asked] = AskedRuns(coordinator.launches).open()
    assert asked.folder.path == run_dir
    assert flatten(read_toml(asked.overrides))["train.rounds"] == 2


@pytest.mark.parametrize(("code", "exit_code"), [("quorum", 3), ("checkpoint", 4), ("stopped", 1)])
def test_a_followed_run_that_stops_ends_with_the_exit_code_of_why(
    coordinator: Coordinator, tiny_model_dir: Path, tmp_path: Path, code: str, exit_code: int
) -> None:
    (tmp_path / "study.toml").write_text(run_toml(_config(tiny_model_dir).flat()))
    history = coordinator.folder / "runs" / "study" / "history.jsonl"

    def stop() -> None:
        for _ in range(1200):
            if list(coordinator.launches.glob("*.json")):
                break
            time.sleep(0.05)
        History(history).record("stopped", code=code, message="of [this]")

    thread = threading.Thread(target=stop)
    thread.start()
    order = ["run", str(tmp_path / "study.toml"), str(coordinator.folder)]
    done = CliRunner().invoke(app, order)
    thread.join()
    assert done.exit_code == exit_code, done.output
    assert f"stopped ({code}): of [this]" in done.output
