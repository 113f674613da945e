"""Warnings are given where they are due, and nowhere else."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from server.report.reading import read_run
from server.report.signs import Sign, warning_signs
from tests.unit.fake_runs import SITES, attack, evaluation, write_run


def _signs(folder: Path, **run: Any) -> dict[str, Sign]:
    return {sign.title: sign for sign in warning_signs(read_run(write_run(folder, **run)))}


def test_a_good_run_has_none(tmp_path: Path) -> None:
    assert _signs(tmp_path / "run") == {}


def test_over_fitting_is_three_rises_while_training_falls(tmp_path: Path) -> None:
    rising = (2.0, 1.0, 1.1, 1.2, 1.3)
    found = _signs(tmp_path / "run", rounds=5, losses=rising)["Over-fitting"]
    assert not found.serious
    assert "from 1.000 after round 2 to 1.300" in found.text
    twice = (2.0, 1.5, 1.0, 1.1, 1.2)
    assert "Over-fitting" not in _signs(tmp_path / "twice", rounds=5, losses=twice)


@pytest.mark.parametrize(
    ("losses", "title"),
    [((2.0, math.nan), "The model diverged"), ((2.0, 3.7), "Worse than the base")],
)
def test_divergence_is_serious(tmp_path: Path, losses: tuple[float, ...], title: str) -> None:
    assert _signs(tmp_path / "run", rounds=2, losses=losses)[title].serious


def test_a_site_that_is_often_missing_is_named_and_one_that_misses_once_is_not(
    tmp_path: Path,
) -> None:
    often = {(number, "north"): "silent" for number in (1, 2, 4)}
    found = _signs(tmp_path / "run", missing={**often, (3, "harbour"): "silent"})
    assert found["A site that lags"].text.startswith("north is missing in 3 of 4 rounds")
    assert "A site that lags" not in _signs(tmp_path / "once", missing={(3, "north"): "silent"})


def test_who_is_not_drawn_does_not_lag(tmp_path: Path) -> None:
    absent = {(number, "north"): "absent" for number in (1, 2, 3)}
    assert _signs(tmp_path / "run", missing=absent) == {}


def test_refused_updates_are_told_with_reason_and_number_of_rounds(tmp_path: Path) -> None:
    missing = {(1, "north"): "norm", (2, "north"): "norm", (3, "harbour"): "signature"}
    text = _signs(tmp_path / "run", missing=missing)["Refused updates"].text
    assert "north: norm (2 rounds); harbour: signature (1 round)" in text


def test_a_site_that_trains_three_times_as_long_is_slow(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    history = folder / "history.jsonl"
    events = [json.loads(line) for line in history.read_text().splitlines()]
    for event in events:
        if event["event"] == "reply" and event["site"] == "north":
            event["numbers"]["train-seconds"] *= 4
    history.write_text("".join(json.dumps(event) + "\n" for event in events))
    (sign,) = warning_signs(read_run(folder))
    assert sign.title == "A slow site"
    assert sign.text.startswith("north trains for 4")


def test_no_protection_and_too_much_epsilon_are_said(tmp_path: Path) -> None:
    assert set(_signs(tmp_path / "bare", protected=False)) == {"No differential privacy"}
    found = _signs(tmp_path / "much", settings={"privacy.target-epsilon": 7.5})
    assert found["More epsilon than allowed"].serious
    fixed = {"privacy.target-epsilon": 7.5, "privacy.noise-multiplier": 0.67}
    # Epsilon follows from the noise then; the target is no cap.
    assert _signs(tmp_path / "fixed", settings=fixed) == {}


def test_much_discarded_energy_is_of_the_last_rounds(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", rounds=2)
    summary = json.loads((folder / "summary.json").read_text())
    for entry, share in zip(summary["rounds"], (0.2, 0.5), strict=True):
        entry["discarded_energy"] = share
    (folder / "summary.json").write_text(json.dumps(summary))
    # The mean of 0.2 and 0.5.
    (sign,) = warning_signs(read_run(folder))
    assert "left out 35% of its energy" in sign.text


def test_a_run_that_stopped_says_why_first(tmp_path: Path) -> None:
    first, *_ = _signs(tmp_path / "run", rounds=2, planned=4, end="stopped").values()
    assert first.serious
    assert "after round 2 of 4 (quorum): too few sites came" in first.text


def test_an_audit_that_saw_nothing_is_no_sign_of_protection(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    found = attack(epsilon_lower=0.0)
    for rehearsed, warned in ((1.5, True), (0.1, False), (None, False)):
        for audit in found["audits"]:
            audit["epsilon_rehearsed"] = rehearsed
        (folder / "attack.json").write_text(json.dumps(found))
        titles = [sign.title for sign in warning_signs(read_run(folder))]
        assert ("An audit saw nothing at all" in titles) is warned


@pytest.mark.parametrize(
    ("found", "title"),
    [
        (attack(epsilon_lower=8.1), "An audit contradicts the ledger"),
        (attack(reproduced=2), "Planted identifiers came out"),
    ],
)
def test_an_attack_that_succeeds_is_serious(
    tmp_path: Path, found: dict[str, Any], title: str
) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "attack.json").write_text(json.dumps(found))
    (sign,) = warning_signs(read_run(folder))
    assert (sign.title, sign.serious) == (title, True)


@pytest.mark.parametrize(("records", "serious"), [(20, True), (19, False)])
def test_a_group_that_fares_worse_than_with_the_base_is_named(
    tmp_path: Path, records: int, serious: bool
) -> None:
    """And it is serious where that is hardly chance."""
    folder = write_run(tmp_path / "run")
    content = evaluation()
    content["models"]["final"]["groups"][2] |= {"loss": 5.0, "records": records}
    (folder / "evaluation.json").write_text(json.dumps(content))
    (sign,) = warning_signs(read_run(folder))
    assert sign.text.startswith(f"{SITES[2]}: loss 5.000")
    assert sign.text.endswith(f"on {records} of the test records.")
    assert sign.serious == serious
