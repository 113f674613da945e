"""Trackers are told a run's numbers in local files, and never stop a run."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
from pathlib import Path
from typing import Any

import pytest

from common.config import RunConfig
from common.errors import ConfigError
from server.history import Event
from server.tracking import told_numbers, tracked
from tests.unit.fake_runs import scores
from tests.unit.scenarios import run

UID = "0f" * 16
BASE: Event = {"event": "base", "loss": 3.5, "perplexity": 33.1, "token_accuracy": 0.25}

mlflow_warnings = [
    # sqlalchemy 2.1 deprecates what mlflow 3 asks of it.
    pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def _round(number: int, loss: float) -> Event:
    return {
        "event": "round",
        "round": number,
        "loss": loss,
        "metrics": scores(loss),
        "replies": 3,
        "refused": {"bern": "norm"},
        "discarded_energy": 0.1,
        "bytes_up": 300,
        "bytes_down": 400,
        "seconds": {"train": 2.0},
        "learning_rate": 0.01,
        "memory_bytes": 10**9,
        "privacy": {"bern": {"epsilon": None}, "oslo": {"epsilon": 1.5}, "wien": {"epsilon": 2.5}},
    }


def _config(**folders: Path) -> RunConfig:
    return RunConfig.parse({f"tracking.{name}": str(path) for name, path in folders.items()})


def _tell(config: RunConfig, *events: Event) -> None:
    with tracked(config, run_uid=UID) as tell:
        for event in events:
            tell(event)


def test_a_round_is_told_in_finite_numbers_and_other_events_not_at_all() -> None:
    told = told_numbers(_round(2, 1.5))
    assert told["central/loss"] == 1.5
    assert told["privacy/epsilon_max"] == 2.5
    assert (told["sites/merged"], told["sites/refused"]) == (3, 1)
    assert told["seconds/train"] == 2.0
    assert "central/loss" not in told_numbers(_round(2, math.nan))
    assert set(told_numbers(BASE)) == {
        "central/loss",
        "central/perplexity",
        "central/token_accuracy",
    }
    assert told_numbers({"event": "reply", "round": 1, "site": "bern"}) == {}


def test_tensorboard_gets_each_round_at_its_step(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _tell(
        _config(tensorboard=tmp_path), BASE, _round(1, 2.0), _round(2, 1.5), {"event": "finished"}
    )
    read = EventAccumulator(str(tmp_path / UID))
    read.Reload()
    told = [(point.step, point.value) for point in read.Scalars("central/loss")]
    assert told == [(0, 3.5), (1, 2.0), (2, 1.5)]
    assert [point.value for point in read.Scalars("privacy/epsilon_max")] == [2.5, 2.5]


class TestMLflow:
    pytestmark = mlflow_warnings

    def test_it_gets_each_round_and_a_resumed_run_is_the_same_one(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        from mlflow import MlflowClient

        config = _config(mlflow=tmp_path / "new")
        _tell(config, BASE, _round(1, 2.0))
        # A round's line is what people watch there.
        assert capfd.readouterr().err == ""
        client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}")

        def the_run() -> Any:
            experiment = client.get_experiment_by_name("consilium")
            assert experiment is not None
            (found,) = client.search_runs([experiment.experiment_id])
            return found

        assert the_run().info.status == "KILLED"
        # Else it tells its makers of each use.
        assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
        _tell(config, _round(2, 1.5), {"event": "finished"})
        found = the_run()
        assert found.info.status == "FINISHED"
        assert found.data.tags["consilium.run"] == UID
        assert found.data.params["lora.rank"] == "8"
        history = client.get_metric_history(found.info.run_id, "central/loss")
        assert [(point.step, point.value) for point in history] == [(0, 3.5), (1, 2.0), (2, 1.5)]


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_a_missing_package_is_said_with_its_extra_before_anything_starts(
    name: str, scenario: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda other, *more: None if other == name else find(other, *more),
    )
    with pytest.raises(ConfigError, match=r'install it with: pip install "consilium\[tracking\]"'):
        run(scenario, tmp_path / "run", **{f"tracking__{name}": "tracks"})
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_fails_is_left_out_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def fail(*words: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(SummaryWriter, "add_scalar", fail)
    with caplog.at_level(logging.WARNING):
        _tell(_config(tensorboard=tmp_path), BASE, _round(1, 2.0), _round(2, 1.5))
    assert [record.getMessage() for record in caplog.records] == [
        "tensorboard is told no more of this run, which goes on: OSError: no space left"
    ]


def test_an_event_that_no_tracker_can_be_told_stops_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _tell(_config(tensorboard=tmp_path), {**_round(1, 2.0), "privacy": {"north": {}}})
    assert "tensorboard is told no more of this run, which goes on: KeyError" in caplog.text


def test_a_tracker_that_cannot_be_opened_is_left_out_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    _tell(_config(tensorboard=tmp_path / "file"), BASE)
    assert "tensorboard is told no more" in caplog.text


def test_a_run_is_tracked_beside_its_settings_file_and_no_site_is_told_where(
    scenario: Path, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    summary = run(scenario, out, tracking__tensorboard=str(tmp_path / "tracks"))
    read = EventAccumulator(str(tmp_path / "tracks" / summary["run"]))
    read.Reload()
    told = [point.value for point in read.Scalars("central/loss")]
    rounds = [entry["loss"] for entry in summary["rounds"]]
    assert told == pytest.approx([summary["central"]["base"]["loss"], *rounds])
    for log in (out / "simulation" / "sites").glob("*/state/*.jsonl"):
        assert "tracks" not in log.read_text()
