"""The ledger: charged before, one output after, across restarts and processes."""

from __future__ import annotations

import math
import multiprocessing
import sqlite3
from pathlib import Path

import pytest

from client.ledger import Ledger, LedgerRow
from common.errors import BudgetError
from common.privacy import GaussianSteps, compose_epsilon

STEP = GaussianSteps(noise_multiplier=0.8, sample_rate=0.032, steps=30)


def _row(task_id: str = "t1", *, run: str = "run-1", unit: str = "record", round_: int = 1,
         steps: GaussianSteps = STEP) -> LedgerRow:  # fmt: skip
    return LedgerRow(task_id, run, "notes", unit, round_, steps)


def _reserve(ledger: Ledger, row: LedgerRow, *, planned: int = 300, cap: float = 10.0) -> LedgerRow:
    return ledger.reserve(row, planned_steps=planned, delta=1e-5, max_epsilon=cap, accountant="rdp")


def test_a_reservation_is_there_after_a_restart_and_charged(tmp_path: Path) -> None:
    _reserve(Ledger(tmp_path / "ledger.sqlite"), _row())

    reopened = Ledger(tmp_path / "ledger.sqlite")

    assert reopened.find("t1") == _row()
    assert reopened.spent("notes", delta=1e-5, accountant="rdp") == pytest.approx(
        compose_epsilon([STEP], delta=1e-5, accountant="rdp")
    )


def test_the_same_task_is_charged_once(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    _reserve(ledger, _row())
    ledger.release("t1")

    again = _reserve(ledger, _row())

    assert again.state == "released"
    assert len(ledger.rows("notes")) == 1


def test_epsilon_composes_over_rounds_and_runs(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    for number in range(10):
        run = "run-1" if number < 5 else "run-2"
        _reserve(ledger, _row(f"t{number}", run=run, round_=number % 5 + 1), planned=150)

    # DESIGN section 7: 10 rounds of 30 such steps are 6.80 by RDP, 5.96 by PRV; not ten times 2.74.
    assert ledger.spent("notes", delta=1e-5, accountant="rdp") == pytest.approx(6.80, abs=0.01)
    assert ledger.spent("notes", delta=1e-5, accountant="prv") == pytest.approx(5.96, abs=0.01)
    one_run = ledger.spent("notes", delta=1e-5, accountant="rdp", run_uid="run-1")
    assert one_run == pytest.approx(
        compose_epsilon([GaussianSteps(0.8, 0.032, 150)], delta=1e-5, accountant="rdp")
    )


def test_a_run_whose_plan_exceeds_the_cap_is_refused_at_its_first_task(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")

    with pytest.raises(BudgetError, match=r"spent epsilon 0\.00 of 6\.00.*300 steps.*6\.80"):
        _reserve(ledger, _row(), planned=300, cap=6.0)

    assert ledger.rows("notes") == []


def test_each_task_reserves_only_its_own_steps(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    _reserve(ledger, _row(), planned=300, cap=6.9)

    spent = ledger.spent("notes", delta=1e-5, accountant="rdp")

    assert spent < 3.5


def test_what_another_run_spent_counts(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    for number in range(5):
        _reserve(ledger, _row(f"t{number}"), planned=150, cap=6.0)

    with pytest.raises(BudgetError, match=r"raise policy\.max-epsilon"):
        _reserve(ledger, _row("other", run="run-2"), planned=150, cap=6.0)


def test_training_without_privacy_makes_a_data_set_infinite(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    free = GaussianSteps(0.0, 1.0, 5)
    with pytest.raises(BudgetError, match=r"infinite, and policy\.max-epsilon is 1\.00"):
        _reserve(ledger, _row("free", unit="none", steps=free), cap=1.0)
    _reserve(ledger, _row("free", unit="none", steps=free), cap=math.inf)

    assert math.isinf(ledger.spent("notes", delta=1e-5))
    with pytest.raises(BudgetError, match="without privacy before"):
        _reserve(ledger, _row("later", run="run-2"))


def test_another_data_set_has_its_own_budget(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    _reserve(ledger, _row())

    assert ledger.spent("other", delta=1e-5) == 0.0


def test_release_does_not_revive_or_invent_rows(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.release("nobody")
    assert ledger.find("nobody") is None

    _reserve(ledger, _row())
    ledger.release("t1")
    ledger.release("t1")
    found = ledger.find("t1")
    assert found is not None
    assert found.state == "released"


def test_a_calibration_is_computed_once(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    asked: list[int] = []

    def compute() -> float:
        asked.append(1)
        return 0.75

    assert ledger.calibration("key", compute) == 0.75
    assert Ledger(tmp_path / "ledger.sqlite").calibration("key", compute) == 0.75
    assert len(asked) == 1


def test_the_file_is_the_owners_alone_and_rejects_unknown_states(tmp_path: Path) -> None:
    path = tmp_path / "state" / "ledger.sqlite"
    _reserve(Ledger(path), _row())

    assert path.stat().st_mode & 0o077 == 0
    database = sqlite3.connect(path)
    with pytest.raises(sqlite3.IntegrityError, match="CHECK"):
        database.execute("UPDATE rows SET state = 'forgotten'")
    database.close()


def _reserve_many(path: Path, offset: int) -> None:
    ledger = Ledger(path)
    for number in range(10):
        _reserve(ledger, _row(f"t{(number + offset) % 10}", round_=number + 1))


def test_two_processes_charge_each_task_once(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    Ledger(path)
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_reserve_many, args=(path, offset)) for offset in (0, 5)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)

    assert [worker.exitcode for worker in workers] == [0, 0]
    assert sorted(row.task_id for row in Ledger(path).rows("notes")) == [f"t{i}" for i in range(10)]
