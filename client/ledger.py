"""The site's privacy ledger: what has been spent on a data set, across runs and restarts.

One SQLite file. A row is one task's steps, keyed by task_id, and goes through two states:

    reserved   charged; written durably before any record is read
    released   its one reply is on disk, whole; only now may it be sent

A row is never deleted and never changes its numbers, so a crash at any point leaves the charge
standing. The same task asked again finds its row: no second charge, no second output.
"""

from __future__ import annotations

import math
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from common.errors import BudgetError
from common.privacy import Accountant, GaussianSteps, compose_epsilon

RowState = Literal["reserved", "released"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS rows (
    task_id TEXT PRIMARY KEY,
    run_uid TEXT NOT NULL,
    dataset TEXT NOT NULL,
    unit TEXT NOT NULL,
    server_round INTEGER NOT NULL,
    noise_multiplier REAL NOT NULL,
    sample_rate REAL NOT NULL,
    steps INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('reserved', 'released')),
    reserved_at INTEGER NOT NULL,
    released_at INTEGER
) STRICT;
CREATE TABLE IF NOT EXISTS calibrations (
    inputs TEXT PRIMARY KEY,
    noise_multiplier REAL NOT NULL
) STRICT;
"""


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """One task's charge. unit "none" has noise_multiplier 0 and counts as infinite epsilon."""

    task_id: str
    run_uid: str
    dataset: str
    unit: str
    server_round: int
    steps: GaussianSteps
    state: RowState = "reserved"

    @property
    def without_state(self) -> LedgerRow:
        """The charge alone, as it was when it was reserved."""
        return replace(self, state="reserved")


class Ledger:
    """The ledger in one file, safe for several processes."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._path = path
        with self._transaction() as database:
            database.executescript(_SCHEMA)
        path.chmod(0o600)

    def find(self, task_id: str) -> LedgerRow | None:
        """Return the row of a task, or None."""
        rows = self._select("WHERE task_id = ?", (task_id,))
        return rows[0] if rows else None

    def rows(self, dataset: str) -> list[LedgerRow]:
        """Return every row of a data set, oldest first."""
        return self._select("WHERE dataset = ? ORDER BY reserved_at, rowid", (dataset,))

    def reserve(
        self,
        row: LedgerRow,
        *,
        planned_steps: int,
        delta: float,
        max_epsilon: float,
        accountant: Accountant,
    ) -> LedgerRow:
        """Charge a row durably, or return the one that this task already has.

        planned_steps: of the whole run; at a run's first task the whole plan must fit, so that a run
        which cannot finish does not begin. delta: the data set's. max_epsilon: its lifetime cap.
        Raises BudgetError saying what is spent, what is asked and what is left.
        """
        with self._transaction() as database:
            database.execute("BEGIN IMMEDIATE")
            found = self._select("WHERE task_id = ?", (row.task_id,), database)
            if found:
                return found[0]
            earlier = self._select("WHERE dataset = ?", (row.dataset,), database)
            _check_cap(
                row,
                earlier,
                planned_steps=planned_steps,
                delta=delta,
                max_epsilon=max_epsilon,
                accountant=accountant,
            )
            database.execute(
                "INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?, ?, ?, 'reserved', ?, NULL)",
                (
                    row.task_id,
                    row.run_uid,
                    row.dataset,
                    row.unit,
                    row.server_round,
                    row.steps.noise_multiplier,
                    row.steps.sample_rate,
                    row.steps.steps,
                    int(time.time()),
                ),
            )
            database.execute("COMMIT")
        return row

    def release(self, task_id: str) -> None:
        """Mark a reserved row as released; a released one stays as it is."""
        with self._transaction() as database:
            database.execute(
                "UPDATE rows SET state = 'released', released_at = ? "
                "WHERE task_id = ? AND state = 'reserved'",
                (int(time.time()), task_id),
            )

    def spent(
        self, dataset: str, *, delta: float, accountant: Accountant = "prv", run_uid: str = ""
    ) -> float:
        """Return the composed epsilon of a data set, reserved rows included; of one run if named."""
        rows = self.rows(dataset)
        parts = [row.steps for row in rows if run_uid in ("", row.run_uid)]
        return compose_epsilon(parts, delta=delta, accountant=accountant)

    def calibration(self, inputs: str, compute: Callable[[], float]) -> float:
        """Return the noise multiplier calibrated for `inputs`, computed once and kept.

        A ClientApp may be a new process for every message, and calibrating takes seconds.
        """
        query = "SELECT noise_multiplier FROM calibrations WHERE inputs = ?"
        with self._transaction() as database:
            found = database.execute(query, (inputs,)).fetchone()
        if found is not None:
            return float(found[0])
        value = compute()
        with self._transaction() as database:
            database.execute("INSERT OR IGNORE INTO calibrations VALUES (?, ?)", (inputs, value))
        return value

    def _select(
        self, where: str, values: tuple[str, ...], database: sqlite3.Connection | None = None
    ) -> list[LedgerRow]:
        query = (
            "SELECT task_id, run_uid, dataset, unit, server_round, noise_multiplier, sample_rate, "
            f"steps, state FROM rows {where}"
        )
        if database is None:
            with self._transaction() as own:
                found = own.execute(query, values).fetchall()
        else:
            found = database.execute(query, values).fetchall()
        return [
            LedgerRow(task, run, data, unit, rnd, GaussianSteps(noise, rate, steps), state)
            for task, run, data, unit, rnd, noise, rate, steps, state in found
        ]

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """A connection whose commits reach the disk; what is not committed is rolled back."""
        database = sqlite3.connect(self._path, timeout=30, isolation_level=None)
        try:
            database.execute("PRAGMA journal_mode = DELETE")
            # EXTRA also syncs the folder: with FULL a power cut could bring a rolled-back charge's
            # journal to life again.
            database.execute("PRAGMA synchronous = EXTRA")
            yield database
        finally:
            database.close()


def _check_cap(
    row: LedgerRow,
    earlier: list[LedgerRow],
    *,
    planned_steps: int,
    delta: float,
    max_epsilon: float,
    accountant: Accountant,
) -> None:
    before = [item.steps for item in earlier]
    spent = compose_epsilon(before, delta=delta, accountant=accountant)
    if math.isinf(spent) and max_epsilon < math.inf:
        raise BudgetError(
            f"data set {row.dataset!r} was trained on without privacy before, so its epsilon is "
            "infinite; no further run can be within policy.max-epsilon"
        )
    if row.unit == "none" and max_epsilon < math.inf:
        raise BudgetError(
            f"training without privacy makes the epsilon of data set {row.dataset!r} infinite, and "
            f"policy.max-epsilon is {max_epsilon:.2f}; ask for privacy, or set max-epsilon = inf"
        )
    first = all(item.run_uid != row.run_uid for item in earlier)
    steps = planned_steps if first else row.steps.steps
    asked = GaussianSteps(row.steps.noise_multiplier, row.steps.sample_rate, steps)
    after = compose_epsilon([*before, asked], delta=delta, accountant=accountant)
    if after > max_epsilon:
        raise BudgetError(
            f"data set {row.dataset!r} has spent epsilon {spent:.2f} of {max_epsilon:.2f}, and with "
            f"the {steps} steps that this run asks for it would be {after:.2f}; lower "
            "privacy.target-epsilon, or raise policy.max-epsilon in site.toml"
        )
