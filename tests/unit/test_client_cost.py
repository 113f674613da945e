"""What a run will cost: exact before anything is loaded, but for the hours."""

from __future__ import annotations

import json
import logging
import math
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

import client.cost
from client.cost import RunCost, Speeds, run_cost
from common.adapter import AdapterShape
from common.config import LoraSection, RunConfig
from common.planned_model import PlannedModel
from common.privacy import GaussianSteps, compose_epsilon

CPU = torch.device("cpu")
# A (2 x 4) and B (3 x 2): 8 + 6 floats.
SHAPE = AdapterShape({"layer": (3, 4)}, rank=2, scaling=1.0)
MODEL = PlannedModel("digest", SHAPE, num_parameters=1000)
SETTINGS: dict[str, Any] = {
    "train.rounds": 3,
    "train.local-steps": 5,
    "train.batch-size": 4,
    "data.max-length": 10,
    "privacy.accountant": "rdp",
}


def _run(**changes: Any) -> RunConfig:
    settings = {key.replace("__", ".").replace("_", "-"): v for key, v in changes.items()}
    return RunConfig.parse({**SETTINGS, **settings})


def _cost(run: RunConfig, speeds: Speeds, **changes: Any) -> RunCost:
    arguments: dict[str, Any] = {
        "model": MODEL,
        "steps": GaussianSteps(1.0, 0.1, run.total_steps),
        "speeds": speeds,
        "device": CPU,
        "lifetime_epsilon_after": 7.0,
        "max_rank": 2,
    }
    return run_cost(run, **{**arguments, **changes})


@pytest.fixture
def speeds(tmp_path: Path) -> Speeds:
    return Speeds(tmp_path / "speed.json")


def test_a_run_costs_all_its_rounds(speeds: Speeds) -> None:
    cost = _cost(_run(), speeds)

    assert (cost.rounds, cost.steps) == (3, 15)
    assert cost.bytes_down == cost.bytes_up == 3 * SHAPE.safetensors_size()
    expected = compose_epsilon([GaussianSteps(1.0, 0.1, 15)], delta=1e-5, accountant="rdp")
    assert (cost.unit, cost.epsilon, cost.delta) == ("record", expected, 1e-5)
    assert cost.lifetime_epsilon_after == 7.0


def test_ranks_that_are_not_trained_are_fetched_and_not_sent(speeds: Speeds) -> None:
    cost = _cost(_run(round__frozen_rank=5), speeds)

    # A (7 x 4) and B (3 x 7), float32, and the header of a file.
    wide = AdapterShape({"layer": (3, 4)}, rank=7, scaling=1.0)
    assert wide.size_bytes == 4 * 7 * (4 + 3)
    assert cost.bytes_up == 3 * SHAPE.safetensors_size()
    assert cost.bytes_down == 3 * wide.safetensors_size()


@pytest.mark.parametrize(
    ("frozen", "max_rank", "more"), [(0, 7, 5), (4, 7, 1), (5, 7, 0), (0, 2, 0)]
)
def test_the_most_that_may_be_fetched_is_known_beforehand(
    speeds: Speeds, frozen: int, max_rank: int, more: int
) -> None:
    """A run is described with no rank beside the trained ones; a later task may bring all that are left."""
    cost = _cost(_run(round__frozen_rank=frozen), speeds, max_rank=max_rank)

    widest = AdapterShape({"layer": (3, 4)}, rank=max_rank, scaling=1.0)
    assert cost.more_ranks == more
    assert cost.most_bytes_down == 3 * widest.safetensors_size()
    assert cost.bytes_up == 3 * SHAPE.safetensors_size()


def test_rounds_with_ranks_beside_them_have_a_speed_of_their_own(speeds: Speeds) -> None:
    speeds.add(MODEL, _run(), seconds=40.0)

    assert _cost(_run(), speeds).hours_measured
    assert not _cost(_run(round__frozen_rank=5), speeds).hours_measured


def test_a_run_without_protection_costs_infinite_epsilon(speeds: Speeds) -> None:
    cost = _cost(_run(privacy__unit="none"), speeds, steps=GaussianSteps(0.0, 1.0, 15))

    assert cost.unit == "none"
    assert math.isinf(cost.epsilon)


def test_hours_come_from_this_sites_own_earlier_rounds(speeds: Speeds) -> None:
    """Five steps of four records took 40 s: 2 s a record, 60 records in three rounds."""
    speeds.add(MODEL, _run(), seconds=40.0)

    cost = _cost(_run(), speeds)

    assert cost.hours_measured
    assert cost.hours == pytest.approx(60 * 2 / 3600)


def test_the_newest_rounds_count_most(speeds: Speeds) -> None:
    """20 records at 2 s, then at 4 s: (10 x 2 + 20 x 4) / 30."""
    for seconds in (40.0, 80.0):
        speeds.add(MODEL, _run(), seconds=seconds)

    assert speeds.seconds_per_record(MODEL, _run()) == pytest.approx(100 / 30)


@pytest.mark.parametrize(
    "other",
    [
        {"data__max_length": 11},
        {"model__quantization": "none"},
        {"train__gradient_checkpointing": True},
        {"privacy__unit": "patient", "privacy__max_records_per_patient": 2},
    ],
)
def test_another_kind_of_training_has_its_own_speed(speeds: Speeds, other: dict[str, Any]) -> None:
    speeds.add(MODEL, _run(), seconds=40.0)

    assert speeds.seconds_per_record(MODEL, _run(**other)) is None
    assert speeds.seconds_per_record(MODEL, _run(train__rounds=9, train__batch_size=2)) == 2.0


def test_another_model_or_rank_has_its_own_speed(speeds: Speeds) -> None:
    speeds.add(MODEL, _run(), seconds=40.0)

    other = PlannedModel("other", SHAPE, 1000)
    higher = PlannedModel("digest", SHAPE.at_rank(3, lora=LoraSection()), 1000)
    assert speeds.seconds_per_record(other, _run()) is None
    assert speeds.seconds_per_record(higher, _run()) is None


def test_a_patients_run_is_planned_at_all_its_records(speeds: Speeds) -> None:
    """Five steps of four patients with up to two records each: 40 records in 40 s."""
    patients = _run(privacy__unit="patient", privacy__max_records_per_patient=2)
    speeds.add(MODEL, patients, seconds=40.0)

    assert speeds.seconds_per_record(MODEL, patients) == 1.0
    assert _cost(patients, speeds).hours == pytest.approx(3 * 40 / 3600)


def test_without_earlier_rounds_the_device_is_asked(
    speeds: Speeds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """6 x 1000 parameters x 10 tokens x 60 records at half of a million a second: 7.2 s."""
    monkeypatch.setattr(client.cost, "_flops_per_second", lambda device, dtype: 1e6)

    plain = _cost(_run(), speeds)
    recomputed = _cost(_run(train__gradient_checkpointing=True), speeds)

    assert not plain.hours_measured
    assert plain.hours == pytest.approx(7.2 / 3600)
    assert recomputed.hours == pytest.approx(plain.hours * 8 / 6)


def test_the_device_multiplies_in_the_runs_own_dtype(
    speeds: Speeds, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []

    def speed(device: str, dtype: str) -> float:
        asked.append((device, dtype))
        return 1e6

    monkeypatch.setattr(client.cost, "_flops_per_second", speed)
    _cost(_run(), speeds)
    _cost(_run(), speeds, device=torch.device("cuda"))
    _cost(_run(model__compute_dtype="float16"), speeds, device=torch.device("cuda"))

    assert asked == [("cpu", "float32"), ("cuda", "bfloat16"), ("cuda", "float16")]


def test_a_real_probe_gives_a_finite_time(speeds: Speeds) -> None:
    assert 0 < _cost(_run(), speeds).hours < 1


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", '{"a": 1}', '{"a": [0, 1]}', '{"a": ["x", 1]}', "[" * 100_000,
     '{"a": [1, ' + "9" * 400 + "]}"],
)  # fmt: skip
def test_a_damaged_speed_file_costs_nothing_but_a_guess(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "speed.json"
    path.write_text(content)
    with caplog.at_level(logging.WARNING):
        assert Speeds(path).seconds_per_record(MODEL, _run()) is None

    Speeds(path).add(MODEL, _run(), seconds=40.0)
    assert Speeds(path).seconds_per_record(MODEL, _run()) == 2.0


def test_a_speed_file_that_can_be_neither_read_nor_written_only_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "speed.json"
    path.mkdir()
    with caplog.at_level(logging.WARNING):
        Speeds(path).add(MODEL, _run(), seconds=40.0)
        assert Speeds(path).seconds_per_record(MODEL, _run()) is None

    said = [record.getMessage() for record in caplog.records]
    assert f"{path} cannot be written (Is a directory)" in said
    assert f"{path} cannot be read; hours are estimated afresh" in said
    assert [found.name for found in tmp_path.iterdir()] == ["speed.json"], (
        "and nothing is left over"
    )


def test_a_speed_over_no_records_is_none(tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    Speeds(path).add(MODEL, _run(), seconds=40.0)
    path.write_text(json.dumps({key: [0, 40.0] for key in json.loads(path.read_text())}))

    assert Speeds(path).seconds_per_record(MODEL, _run()) is None


def test_the_speed_file_stays_small_and_private(tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    for number in range(70):
        Speeds(path).add(PlannedModel(f"{number}", SHAPE, 1), _run(), seconds=1.0)

    kept = json.loads(path.read_text())

    assert len(kept) == 64
    assert Speeds(path).seconds_per_record(PlannedModel("0", SHAPE, 1), _run()) is None
    assert Speeds(path).seconds_per_record(PlannedModel("69", SHAPE, 1), _run()) == 0.05
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
