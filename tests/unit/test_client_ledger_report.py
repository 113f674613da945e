"""What a hospital sees of its ledger."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from client import ledger as ledger_module
from client.ledger import Ledger, LedgerRow
from client.ledger_report import LedgerReport, ledger_table, report_ledger
from client.site_config import SiteConfig
from common.chain import ChainHead
from common.privacy import GaussianSteps, compose_epsilon, steps_that_fit
from common.receipts import Receipt
from common.records import SiteHeads

STEP = GaussianSteps(noise_multiplier=0.8, sample_rate=0.032, steps=30)
FIRST_DAY = datetime(2026, 3, 1, 12).timestamp()


def _config(*, max_epsilon: float = 8.0, unit: str = "record") -> SiteConfig:
    return SiteConfig.model_validate(
        {
            "site": {"name": "north"},
            "data": {
                "name": "notes",
                "path": "notes.jsonl",
                "declared-size": 1000,
                "unit": unit,
                "patient-id": "patient",
            },
            "policy": {"max-epsilon": max_epsilon, "allowed-models": ()},
            "coordinator": {"public-key": "ab" * 32},
        }
    )


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ledger:
    """Two runs: three rounds, the last without a reply; a day later one round of another setting."""
    ledger = Ledger(tmp_path / "ledger.sqlite")
    _charge(ledger, "run-1", [1, 2, 3], monkeypatch, at=FIRST_DAY)
    other = GaussianSteps(1.2, 0.05, 20)
    _charge(ledger, "run-2", [1], monkeypatch, at=FIRST_DAY + 86_400, steps=other)
    for task in ("run-1/1", "run-1/2", "run-2/1"):
        ledger.release(task)
    return ledger


def _charge(
    ledger: Ledger,
    run: str,
    rounds: list[int],
    monkeypatch: pytest.MonkeyPatch,
    *,
    at: float = FIRST_DAY,
    steps: GaussianSteps = STEP,
    unit: str = "record",
    dataset: str = "notes",
) -> None:
    monkeypatch.setattr(ledger_module.time, "time", lambda: at)
    for server_round in rounds:
        ledger.reserve(
            LedgerRow(f"{run}/{server_round}", run, dataset, unit, server_round, steps),
            planned_steps=30,
            unit="record",
            delta=1e-5,
            max_epsilon=math.inf,
            accountant="rdp",
        )
    monkeypatch.undo()


def _shown(report: LedgerReport) -> list[str]:
    written = io.StringIO()
    Console(width=200, file=written).print(ledger_table(report))
    return [line.strip() for line in written.getvalue().splitlines()]


def test_each_run_and_the_whole_life_are_counted(ledger: Ledger) -> None:
    report = report_ledger(ledger, _config())

    first, second = report.runs
    assert (first.run_uid, first.rounds, first.unanswered, first.steps) == ("run-1", 3, 1, 90)
    assert first.settings == (GaussianSteps(0.8, 0.032, 90),)
    assert first.epsilon == compose_epsilon([STEP] * 3, delta=1e-5)
    assert (second.run_uid, second.rounds, second.unanswered, second.steps) == ("run-2", 1, 0, 20)
    whole = compose_epsilon([*first.settings, *second.settings], delta=1e-5)
    assert report.epsilon == whole == report.bounds.prv
    assert first.epsilon < whole < first.epsilon + second.epsilon
    assert report.remaining == pytest.approx(8.0 - whole)
    assert report.bounds.rdp > whole


def test_it_says_how_many_more_steps_of_the_last_setting_fit(ledger: Ledger) -> None:
    report = report_ledger(ledger, _config())

    spent = [setting for run in report.runs for setting in run.settings]
    last = GaussianSteps(1.2, 0.05, 20)
    steps = steps_that_fit(spent, last, at_most=10_000, max_epsilon=8.0, delta=1e-5)
    assert steps > 100
    assert report.fits is not None
    assert (report.fits.setting, report.fits.steps) == (last, steps)
    assert report.fits.rounds == steps // 20
    assert (
        f"{steps} more steps at noise multiplier 1.2 and sample rate 0.05 still fit: "
        in "\n".join(report.sentences())
    )


def test_the_table_shows_runs_in_a_hundred_columns(ledger: Ledger) -> None:
    lines = _shown(report_ledger(ledger, _config()))

    assert max(map(len, lines)) <= 100
    rows = [line.split() for line in lines if line.startswith("run-")]
    assert rows == [
        ["run-1", "2026-03-01", "2026-03-01", "record", "3", "0.8", "0.032", "90", "3.75"],
        ["run-2", "2026-03-02", "2026-03-02", "record", "1", "1.2", "0.05", "20", "1.32"],
    ]


def test_square_brackets_in_a_name_are_no_markup(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    _charge(ledger, "[/b][red]run", [1], monkeypatch)
    report = replace(report_ledger(ledger, _config()), dataset="[/i]notes")

    lines = _shown(report)

    assert lines[0] == "Privacy ledger of north: [/i]notes"
    assert any(line.startswith("[/b][red]run ") for line in lines)


def test_the_words_below_give_both_bounds_the_cap_and_what_is_open(ledger: Ledger) -> None:
    words = report_ledger(ledger, _config()).sentences()

    assert words[0].startswith("notes, whole life: epsilon 3.86 by record at delta 1e-05")
    assert words[0].endswith("(PRV 3.86, RDP 4.59)")
    assert words[1] == "of policy.max-epsilon 8; 4.14 is left"
    assert "1 of the tasks charged have no reply on disk (yet)" in words
    assert words[-1] == f"Ledger head {ledger.head()}"


def test_where_no_grid_holds_the_settings_the_words_say_so(tmp_path: Path) -> None:
    """Then RDP's bound has to serve: the report waited, so nothing is still being computed."""
    ledger = Ledger(tmp_path / "ledger.sqlite")
    least = GaussianSteps(noise_multiplier=0.8, sample_rate=0.032, steps=10**12)
    ledger.reserve(
        LedgerRow("t1", "run-1", "notes", "record", 1, least),
        planned_steps=1, unit="record", delta=1e-5, max_epsilon=math.inf, accountant="rdp",
    )  # fmt: skip

    report = report_ledger(ledger, _config())

    assert report.bounds.prv is None
    assert "(PRV cannot be computed, RDP " in report.sentences()[0]


def test_unprotected_training_is_shown_as_no_protection(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    _charge(ledger, "run-3", [1], monkeypatch, steps=GaussianSteps(0.0, 1.0, 5), unit="none")

    report = report_ledger(ledger, _config())

    assert report.fits is None
    assert report.remaining == 0.0
    assert report.sentences()[0] == "notes, whole life: no protection by record at delta 1e-05"
    row = next(line for line in _shown(report) if line.startswith("run-3"))
    assert row.split()[-2:] == ["no", "protection"]
    content = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert content["epsilon"] is content["epsilon_prv"] is content["epsilon_rdp"] is None
    assert content["remaining"] == 0.0
    assert [run["epsilon"] is None for run in content["runs"]] == [False, False, True]


def test_json_has_what_the_table_has(ledger: Ledger) -> None:
    report = report_ledger(ledger, _config())

    content: dict[str, Any] = json.loads(json.dumps(report.as_json(), allow_nan=False))

    assert content["epsilon"] == report.epsilon
    assert (content["epsilon_prv"], content["epsilon_rdp"]) == (
        report.bounds.prv,
        report.bounds.rdp,
    )
    assert (content["max_epsilon"], content["remaining"]) == (8.0, report.remaining)
    assert [run["run_uid"] for run in content["runs"]] == ["run-1", "run-2"]
    assert content["runs"][0]["steps"] == 90
    assert content["fits"]["steps"] == report.fits.steps if report.fits else False
    assert content["head"] == {"count": 7, "digest": ledger.head().digest}


def test_without_a_cap_nothing_is_left_to_count(ledger: Ledger) -> None:
    report = report_ledger(ledger, _config(max_epsilon=math.inf))

    assert report.fits is None
    assert "policy.max-epsilon is inf: no cap" in report.sentences()
    content = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert content["max_epsilon"] is None
    assert content["remaining"] is None


def test_an_empty_ledger_has_everything_left(tmp_path: Path) -> None:
    report = report_ledger(Ledger(tmp_path / "ledger.sqlite"), _config())

    assert (report.epsilon, report.remaining, report.runs, report.fits) == (0.0, 8.0, (), None)
    assert report.sentences()[0] == (
        "notes, whole life: epsilon 0.00 by record at delta 1e-05 (PRV 0.00, RDP 0.00)"
    )


def test_charges_under_another_name_are_pointed_out(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    _charge(ledger, "run-9", [1], monkeypatch, dataset="old-notes")

    report = report_ledger(ledger, _config())

    assert report.other_datasets == ("old-notes",)
    assert any("also holds charges of 'old-notes'" in line for line in report.sentences())
    assert len(report.runs) == 2


def test_what_a_settlement_could_not_name_is_a_run_of_its_own(ledger: Ledger) -> None:
    lost = SiteHeads(ChainHead(9, "cc" * 32), ChainHead(0, "00" * 32))
    ledger.settle(Receipt("north", lost, (), 0), dataset="notes", unit="record", delta=1e-5)

    report = report_ledger(ledger, _config())

    assert any(line.startswith("(settled)") for line in _shown(report))
    # What still fits is said of a setting that somebody really trained with.
    assert report.fits is not None
    assert report.fits.setting == GaussianSteps(1.2, 0.05, 20)


def test_by_patient_a_run_by_record_protects_nobody(ledger: Ledger) -> None:
    report = report_ledger(ledger, _config(unit="patient"))

    assert [math.isinf(run.epsilon) for run in report.runs] == [True, True]
    assert report.sentences()[0].startswith("notes, whole life: no protection by patient")
