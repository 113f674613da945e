"""Settling a coordinator's receipt in a ledger that was restored from a backup.

What was spent after the backup is lost here, and nothing that was spent may be forgotten. Three sources,
from sure to careful:

    named     every task in the receipt that the ledger does not know is charged
    finished  every row still reserved counts as answered: its reply may have left after the backup, and a
              second one would leave under the same charge
    unknown   entries that the coordinator saw and nothing explains may each be a charge (another
              coordinator's, or one whose reply was lost): as many rows of the costliest setting known

Nothing is ever taken back. Settle before anything else is trained: entries that another coordinator's
tasks add in between cannot be told from those that were there before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from client.budget import Unit, counted_steps
from client.ledger_entries import LedgerRow, LedgerState, release, reservation, settlement_mark
from common.errors import BudgetError
from common.privacy import GaussianSteps
from common.receipts import Receipt, ReceiptCharge
from common.records import SiteHeads

# What a row is called whose run nobody remembers.
UNKNOWN_RUN = "unknown"
# More entries than a site writes in its life: a backup is never that far behind, a slip of the pen is.
_MAX_LOST = 1_000_000


@dataclass(frozen=True, slots=True)
class Lag:
    """How far a site stands behind a receipt. here: its own heads. seen: the receipt's.

    stands: ledger and log have both been where they were seen, or were settled since.
    """

    here: SiteHeads
    seen: SiteHeads
    stands: bool

    def sentence(self) -> str:
        """Return it in words."""
        entries, lines = (
            f"{max(0, seen.count - here.count)} {unit} ({seen.count} were seen, {here.count} are here)"
            for unit, seen, here in (
                ("entries", self.seen.ledger, self.here.ledger),
                ("lines", self.seen.audit, self.here.audit),
            )
        )
        ahead = f"The receipt is ahead of this ledger by {entries}, of its audit log by {lines}"
        if self.stands:
            return f"{ahead}; both hold what was seen, or were settled since."
        return f"{ahead}; what was seen is not here any more."


@dataclass(frozen=True, slots=True)
class SettlementPlan:
    """What to write. entries: in order. named, finished, unknown: rows, as in the module's words."""

    entries: tuple[dict[str, Any], ...]
    named: int
    finished: int
    unknown: int


@dataclass(frozen=True, slots=True)
class Settlement:
    """What settling a receipt changed. epsilon: of the data set's whole life; infinite: no protection."""

    dataset: str
    named: int
    finished: int
    unknown: int
    epsilon_before: float
    epsilon_after: float

    def sentence(self) -> str:
        """Return it in words."""
        if not self.named + self.finished + self.unknown:
            return (
                f"The ledger of {self.dataset!r} is in line with the receipt; no charge was added."
            )
        before, after = (
            "no protection" if math.isinf(epsilon) else f"{epsilon:.2f}"
            for epsilon in (self.epsilon_before, self.epsilon_after)
        )
        return (
            f"Charged {self.dataset!r} with {self.named} tasks that the receipt names and {self.unknown} "
            "that nobody can name, at the costliest setting known; closed "
            f"{self.finished} that may have been answered. Lifetime epsilon {before} before, {after} now."
        )


def plan_settlement(
    state: LedgerState, receipt: Receipt, *, dataset: str, unit: Unit, at: int
) -> SettlementPlan:
    """Return the entries that bring a ledger in line with a receipt; none when it is already.

    dataset, unit: what new charges count against. at: Unix seconds.
    Raises BudgetError when something was spent and no setting is known to charge it at, or when more
    entries would be lost than any backup can lack.
    """
    _check_lost(state, receipt)
    named = [charge for charge in receipt.charges if charge.task_id not in state.rows]
    new_rows = [_row_of(charge, dataset, at) for charge in named]
    behind = not state.covers(receipt.heads.ledger)
    finished = [
        row.task_id
        for row in state.rows.values()
        if row.state == "reserved"
        and (behind or any(charge.task_id == row.task_id for charge in receipt.charges))
    ]
    unknown = _unexplained(state, receipt) if behind else 0
    if unknown:
        of_dataset = [row for row in state.rows.values() if row.dataset == dataset]
        costliest = _costliest([*of_dataset, *new_rows], unit=unit, dataset=dataset)
        new_rows.append(_unknown_row(costliest, unknown, receipt, dataset, unit, at))
    entries = [
        entry
        for row in new_rows
        for entry in (reservation(row, at=at), release(row.task_id, at=at))
    ]
    entries += [release(task_id, at=at) for task_id in finished]
    if behind:
        entries.append(settlement_mark(receipt.heads, at=at))
    return SettlementPlan(tuple(entries), len(named), len(finished), unknown)


def _check_lost(state: LedgerState, receipt: Receipt) -> None:
    seen, own = receipt.heads.ledger.count, state.head.count
    if seen - own > _MAX_LOST:
        raise BudgetError(
            f"the receipt says that the coordinator saw {seen} entries of this ledger, which has {own}; "
            f"no backup lacks more than {_MAX_LOST}, so nothing is charged. Make sure that this is the "
            "right ledger, and ask the coordinator for a new receipt (consilium server receipt)"
        )


def _unexplained(state: LedgerState, receipt: Receipt) -> int:
    """Entries that the coordinator saw, less those that are here or belong to replies that it has."""
    explained = state.head.count
    for charge in receipt.charges:
        row = state.rows.get(charge.task_id)
        if charge.answered and (row is None or row.state == "reserved"):
            explained += 2 if row is None else 1
    return max(0, receipt.heads.ledger.count - explained)


def _row_of(charge: ReceiptCharge, dataset: str, at: int) -> LedgerRow:
    return LedgerRow(
        task_id=charge.task_id,
        run_uid=charge.run_uid,
        dataset=dataset,
        unit=charge.unit,
        server_round=charge.server_round,
        steps=GaussianSteps(charge.noise_multiplier, charge.sample_rate, charge.steps),
        reserved_at=at,
    )


def _costliest(rows: Sequence[LedgerRow], *, unit: Unit, dataset: str) -> GaussianSteps:
    """A setting at least as costly as each of the rows: least noise, highest rate, most steps."""
    settings = counted_steps(rows, unit=unit)
    if not settings:
        raise BudgetError(
            f"entries of the ledger are lost, and neither it nor the receipt names one task of data set "
            f"{dataset!r} to charge them like; settle the receipt of the coordinator that trained on it "
            "first, or put a newer backup in place"
        )
    return GaussianSteps(
        min(setting.noise_multiplier for setting in settings),
        max(setting.sample_rate for setting in settings),
        max(setting.steps for setting in settings),
    )


def _unknown_row(
    costliest: GaussianSteps, count: int, receipt: Receipt, dataset: str, unit: Unit, at: int
) -> LedgerRow:
    """One row that costs as much as `count` tasks of the costliest setting."""
    return LedgerRow(
        task_id=f"{UNKNOWN_RUN}-{receipt.heads.ledger.digest}",
        run_uid=UNKNOWN_RUN,
        dataset=dataset,
        unit=unit if costliest.noise_multiplier > 0 else "none",
        server_round=0,
        steps=replace(costliest, steps=costliest.steps * count),
        reserved_at=at,
    )
