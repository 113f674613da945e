"""The ledger's entries: what is written, chained, and read back as rows.

An entry is never changed or removed. Three kinds:

    reserve   a task's charge, before any record is read
    release   its one reply is on disk, whole
    settle    a coordinator's receipt was settled here, after a restore from a backup

Each entry's digest covers the one before (common/chain.py), so that an edited, dropped or swapped one is
found by reading; one cut off the end is found by whoever saw a later head.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from common.canonical import canonical_json, from_canonical
from common.chain import EMPTY, ChainHead, link
from common.errors import BudgetError, ProtocolError
from common.privacy import GaussianSteps
from common.records import SiteHeads

RowState = Literal["reserved", "released"]
# number, canonical JSON, SHA-256 hex.
StoredEntry = tuple[int, bytes, str]


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """One task's charge. unit "none" has noise_multiplier 0 and counts as infinite epsilon.

    reserved_at: Unix seconds; no part of what makes two charges equal.
    """

    task_id: str
    run_uid: str
    dataset: str
    unit: str
    server_round: int
    steps: GaussianSteps
    state: RowState = "reserved"
    reserved_at: int = field(default=0, compare=False, repr=False)

    @property
    def without_state(self) -> LedgerRow:
        """The charge alone, as it was when it was reserved."""
        return replace(self, state="reserved")


@dataclass(frozen=True, slots=True)
class LedgerState:
    """What all entries together say. rows: by task_id, oldest first. digests: by number of entries."""

    head: ChainHead
    rows: Mapping[str, LedgerRow]
    digests: Mapping[int, str]
    settled: frozenset[ChainHead]

    def covers(self, head: ChainHead) -> bool:
        """Whether `head` is one that this chain has had, or that a settled receipt named."""
        return head in self.settled or self.stood_at(head)

    def stood_at(self, head: ChainHead) -> bool:
        """Whether `head` is one that this chain has had."""
        return head == EMPTY if head.count == 0 else self.digests.get(head.count) == head.digest


# What a ledger without entries says.
START = LedgerState(EMPTY, {}, {}, frozenset())


def reservation(row: LedgerRow, *, at: int) -> dict[str, Any]:
    """Return the entry that charges a row. at: Unix seconds."""
    return {
        "event": "reserve",
        "at": at,
        "task_id": row.task_id,
        "run_uid": row.run_uid,
        "dataset": row.dataset,
        "unit": row.unit,
        "server_round": row.server_round,
        "noise_multiplier": float(row.steps.noise_multiplier),
        "sample_rate": float(row.steps.sample_rate),
        "steps": row.steps.steps,
    }


def release(task_id: str, *, at: int) -> dict[str, Any]:
    """Return the entry that lets a charged task's one reply go. at: Unix seconds."""
    return {"event": "release", "at": at, "task_id": task_id}


def settlement_mark(heads: SiteHeads, *, at: int) -> dict[str, Any]:
    """Return the entry after which the heads of a settled receipt are covered. at: Unix seconds."""
    return {"event": "settle", "at": at, "heads": asdict(heads)}


def chained(head: ChainHead, content: Mapping[str, Any]) -> StoredEntry:
    """Return an entry as it is stored, the next one after `head`.

    A settlement's number lies past that of the head it settles: the count never falls behind what a
    coordinator has seen.
    """
    if content["event"] == "settle":
        head = ChainHead(max(head.count, content["heads"]["ledger"]["count"]), head.digest)
    encoded = canonical_json(content)
    after = link(head, encoded)
    return after.count, encoded, after.digest


def replay(entries: Iterable[StoredEntry], *, after: LedgerState = START) -> LedgerState:
    """Return what stored entries, in order, add up to. after: what those before them say.

    Raises BudgetError naming the first one that is not what its chain says.
    """
    head, digests = after.head, dict(after.digests)
    rows, settled = dict(after.rows), set(after.settled)
    for entry in entries:
        number, encoded, digest = entry
        try:
            content = from_canonical(encoded)
            if chained(head, content) != entry:
                raise ValueError("digest")
            _apply(content, rows, settled)
        except (
            ValueError, TypeError, KeyError, AttributeError, RecursionError, ProtocolError,
        ):  # fmt: skip
            raise BudgetError(
                f"entry {number} is not the one that was written there: the ledger was edited, or is "
                "damaged. Nothing is trained on it. Keep it as evidence, put a backup in its place and "
                "settle that with the coordinator's receipt: consilium client ledger --settle RECEIPT"
            ) from None
        head = ChainHead(number, digest)
        digests[number] = digest
    return LedgerState(head, rows, digests, frozenset(settled))


def _apply(content: Any, rows: dict[str, LedgerRow], settled: set[ChainHead]) -> None:
    """Take one entry into account. Raises KeyError, TypeError or ValueError when it cannot be one."""
    fields = dict(content)
    event, at = fields.pop("event"), fields.pop("at")
    fields.pop("salt", None)
    if event == "reserve":
        steps = GaussianSteps(
            *(fields.pop(name) for name in ("noise_multiplier", "sample_rate", "steps"))
        )
        row = LedgerRow(**fields, steps=steps, reserved_at=at)
        if rows.setdefault(row.task_id, row) is not row:
            raise ValueError("charged twice")
    elif event == "release":
        rows[fields["task_id"]] = replace(rows[fields["task_id"]], state="released")
    elif event == "settle":
        settled.add(ChainHead(**fields["heads"]["ledger"]))
    else:
        raise ValueError("event")
