"""The site's privacy ledger: what has been spent on a data set, across runs and restarts.

One SQLite file of chained entries (client/ledger_entries.py). A row is one task's steps, keyed by
task_id, and goes through two states:

    reserved   charged; written durably before any record is read
    released   its one reply is on disk, whole; only now may it be sent

An entry is never deleted or changed, so a crash at any point leaves the charge standing. The same task
asked again finds its row: no second charge, no second output. Every reading checks the whole chain.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from client.budget import Unit, check_cap, counted_steps
from client.epsilon_cache import EpsilonCache
from client.ledger_entries import LedgerRow, LedgerState, release, reservation
from client.ledger_file import LedgerFile
from client.settlement import Settlement, plan_settlement
from common.chain import ChainHead
from common.privacy import Accountant, EpsilonBounds, GaussianSteps, rdp_epsilon
from common.receipts import Receipt

__all__ = ["Ledger", "LedgerRow", "Settlement"]


class Ledger:
    """The ledger in one file, safe for several processes.

    Every method raises BudgetError when the file cannot be read or written, was edited, or no longer has
    what this object has seen in it: what cannot be charged is not trained.
    """

    def __init__(self, path: Path) -> None:
        self._file = LedgerFile(path)
        self._cache = EpsilonCache()
        self.verify()

    def find(self, task_id: str) -> LedgerRow | None:
        """Return the row of a task, or None."""
        return self._file.state().rows.get(task_id)

    def rows(self, dataset: str) -> list[LedgerRow]:
        """Return every row of a data set, oldest first."""
        return _of_dataset(self._file.state(), dataset)

    def has_run(self, run_uid: str) -> bool:
        """Return whether anything was ever charged for a run, on whatever data set."""
        return any(row.run_uid == run_uid for row in self._file.state().rows.values())

    def datasets(self) -> list[str]:
        """Return the names of all data sets that were ever charged."""
        return sorted({row.dataset for row in self._file.state().rows.values()})

    def head(self) -> ChainHead:
        """Return where the chain of entries stands."""
        return self._file.state().head

    def covers(self, head: ChainHead) -> bool:
        """Whether `head` is one that this chain has had, or that a settled receipt named."""
        return self._file.state().covers(head)

    def stood_at(self, head: ChainHead) -> bool:
        """Whether `head` is one that this chain has had itself, without any settling."""
        return self._file.state().stood_at(head)

    def verify(self) -> None:
        """Check every entry against the chain. Raises BudgetError saying what to do."""
        self._file.state()

    def reserve(
        self,
        row: LedgerRow,
        *,
        planned_steps: int,
        unit: Unit,
        delta: float,
        max_epsilon: float,
        accountant: Accountant,
    ) -> LedgerRow:
        """Charge a row durably, or return the one that this task already has.

        planned_steps: of the whole run; at a run's first task the whole plan must fit, so that a run
        which cannot finish does not begin. unit, delta: the data set's. max_epsilon: its lifetime cap.
        Raises BudgetError saying what is spent, what is asked, what is left and what would fit.
        """
        while True:
            before = self._file.state()
            if row.task_id in before.rows:
                return before.rows[row.task_id]
            # Composing may take seconds, so nobody is locked out meanwhile.
            check_cap(
                row,
                _of_dataset(before, row.dataset),
                planned_steps=planned_steps,
                unit=unit,
                delta=delta,
                max_epsilon=max_epsilon,
                bounds=lambda parts: self._bounds(parts, delta, accountant),
            )
            with self._file.transaction() as transaction:
                if transaction.state.head == before.head:
                    transaction.append([reservation(row, at=int(time.time()))])
                    return row
            # Another process wrote since: what it spent must count.

    def release(self, task_id: str) -> None:
        """Mark a reserved row as released; a released one stays as it is."""
        with self._file.transaction() as transaction:
            row = transaction.state.rows.get(task_id)
            if row is not None and row.state == "reserved":
                transaction.append([release(task_id, at=int(time.time()))])

    def settle(self, receipt: Receipt, *, dataset: str, unit: Unit, delta: float) -> Settlement:
        """Charge what a restored ledger has forgotten, all of it or nothing, and say what that was.

        receipt: opened, so of a coordinator that this site believes. Afterwards its heads are covered. The
        same receipt again changes nothing. Raises BudgetError when no setting is known to charge.
        """
        with self._file.transaction() as transaction:
            before = transaction.state
            plan = plan_settlement(before, receipt, dataset=dataset, unit=unit, at=int(time.time()))
            after = transaction.append(plan.entries)
        epsilon_before, epsilon_after = (
            self._bounds(counted_steps(_of_dataset(state, dataset), unit=unit), delta, "prv").least
            for state in (before, after)
        )
        return Settlement(
            dataset, plan.named, plan.finished, plan.unknown, epsilon_before, epsilon_after
        )

    def spent(
        self,
        dataset: str,
        *,
        unit: Unit,
        delta: float,
        accountant: Accountant = "prv",
        more: Sequence[LedgerRow] = (),
    ) -> float:
        """Return the composed epsilon of a data set, reserved rows included.

        unit: the data set's. more: rows that are not charged, as if they were.
        """
        rows = [*self.rows(dataset), *more]
        return self._bounds(counted_steps(rows, unit=unit), delta, accountant).least

    def bounds(
        self, dataset: str, *, unit: Unit, delta: float, wait: bool = False
    ) -> EpsilonBounds:
        """Return both bounds on the epsilon of a data set's whole life.

        wait: compute PRV's however many settings there are (minutes for hundreds); without it, beyond
        twenty, it is None until a thread on the side has computed it.
        """
        return self._cache.bounds(
            counted_steps(self.rows(dataset), unit=unit), delta=delta, wait=wait
        )

    def calibration(self, inputs: str, compute: Callable[[], float]) -> float:
        """Return the noise multiplier calibrated for `inputs`, computed once and kept.

        A ClientApp may be a new process for every message, and calibrating takes seconds.
        """
        query = "SELECT noise_multiplier FROM calibrations WHERE inputs = ?"
        with self._file.database() as database:
            found = database.execute(query, (inputs,)).fetchone()
        if found is not None:
            return float(found[0])
        value = compute()
        with self._file.database() as database:
            database.execute("INSERT OR IGNORE INTO calibrations VALUES (?, ?)", (inputs, value))
        return value

    def _bounds(
        self, parts: Sequence[GaussianSteps], delta: float, accountant: Accountant
    ) -> EpsilonBounds:
        if accountant == "rdp":
            return EpsilonBounds(None, rdp_epsilon(parts, delta=delta))
        return self._cache.bounds(parts, delta=delta)


def _of_dataset(state: LedgerState, dataset: str) -> list[LedgerRow]:
    return [row for row in state.rows.values() if row.dataset == dataset]
