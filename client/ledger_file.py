"""The ledger's SQLite file: opening, reading whole, appending, taking over what a former version wrote."""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from client.ledger_entries import (
    START,
    LedgerRow,
    LedgerState,
    StoredEntry,
    chained,
    release,
    replay,
    reservation,
)
from common.chain import ChainHead
from common.errors import BudgetError, DiskError
from common.files import is_disk_full
from common.privacy import GaussianSteps

# PRAGMA user_version. 0: empty, or the former kind, a table of rows without a chain. 2: chained, and with
# a table of epsilons that anybody could have edited.
_VERSION = 3
_CHAINED = 2
# SQLite's names for what a full disk looks like to it.
_DISK_IS_FULL = frozenset({"SQLITE_FULL"})
_SCHEMA = (
    """CREATE TABLE entries (
        number INTEGER PRIMARY KEY,
        content BLOB NOT NULL,
        digest TEXT NOT NULL
    ) STRICT""",
    """CREATE TABLE IF NOT EXISTS calibrations (
        inputs TEXT PRIMARY KEY,
        noise_multiplier REAL NOT NULL
    ) STRICT""",
)


class LedgerFile:
    """One file of chained entries and of a table of calibrated noise multipliers.

    Every method raises DiskError when the disk is full, and BudgetError, saying what to do, when the file
    cannot be read or written or is not what was written, as far as its chain and what this object has seen
    of it can tell.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._checked: tuple[list[StoredEntry], LedgerState] = ([], START)
        # The latest head read or written here: a chain that was cut is whole in itself.
        self._seen = START.head
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.touch(mode=0o600)
            path.chmod(0o600)
        except OSError as error:
            if is_disk_full(error):
                raise DiskError(_full(path, error)) from error
            raise BudgetError(_unusable(path, error)) from error
        self._prepare()

    def state(self) -> LedgerState:
        """Return what all entries say; each is checked against the chain."""
        with self.database() as database:
            return self._read(database)

    @contextmanager
    def database(self) -> Iterator[sqlite3.Connection]:
        """A connection whose commits reach the disk; what is not committed is rolled back."""
        database = None
        try:
            database = sqlite3.connect(self.path, timeout=30, isolation_level=None)
            database.execute("PRAGMA journal_mode = DELETE")
            # EXTRA also syncs the folder: with FULL a power cut could bring a rolled-back charge's
            # journal to life again.
            database.execute("PRAGMA synchronous = EXTRA")
            yield database
        except sqlite3.Error as error:
            if error.sqlite_errorname in _DISK_IS_FULL:
                raise DiskError(_full(self.path, error)) from error
            raise BudgetError(_unusable(self.path, error)) from error
        except BudgetError as error:
            raise BudgetError(f"{self.path}: {error}") from None
        finally:
            if database is not None:
                database.close()

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """One write transaction; an exception leaves the file as it was."""
        with self.database() as database:
            database.execute("BEGIN IMMEDIATE")
            transaction = Transaction(database, self._read(database))
            yield transaction
            database.execute("COMMIT")
            self._remember(transaction.state.head)

    def _read(self, database: sqlite3.Connection) -> LedgerState:
        # Taken first: what another thread commits meanwhile need not be in what is read here.
        seen = self._seen
        entries = database.execute(
            "SELECT number, content, digest FROM entries ORDER BY number"
        ).fetchall()
        before, state = self._checked
        # Entries that were checked once, and are the same to the byte, need no second check.
        known = len(before) if entries[: len(before)] == before else 0
        state = replay(entries[known:], after=state if known else START)
        if not state.stood_at(seen):
            raise BudgetError(
                f"this process has seen {seen.count} entries, and the ledger, of {state.head.count} now, no "
                "longer has them: they were cut off, or a backup was put in its place. Nothing is trained "
                "on it. Keep the file as evidence, put a backup in its place, settle that with the "
                "coordinator's receipt (consilium client ledger --settle RECEIPT) and restart this process"
            )
        self._checked = (entries, state)
        self._remember(state.head)
        return state

    def _remember(self, head: ChainHead) -> None:
        if head.count > self._seen.count:
            self._seen = head

    def _prepare(self) -> None:
        with self.database() as database:
            if _version(database) == _VERSION:
                return
            database.execute("BEGIN IMMEDIATE")
            # Asked again: another process may have done it meanwhile.
            version = _version(database)
            if version > _VERSION:
                raise BudgetError("a newer Consilium wrote this ledger; upgrade this one")
            if version < _CHAINED:
                for statement in _SCHEMA:
                    database.execute(statement)
                Transaction(database, START).append(_take_former_rows(database))
            database.execute("DROP TABLE IF EXISTS epsilons")
            database.execute(f"PRAGMA user_version = {_VERSION}")
            database.execute("COMMIT")


class Transaction:
    """A write transaction. state: what the entries say, those appended in it included."""

    def __init__(self, database: sqlite3.Connection, state: LedgerState) -> None:
        self._database = database
        self.state = state

    def append(self, contents: Sequence[Mapping[str, Any]]) -> LedgerState:
        """Add entries and return what they all say now."""
        head, entries = self.state.head, []
        for content in contents:
            # The head leaves the hospital: a data set's name must not be guessed until it fits.
            entries.append(chained(head, {**content, "salt": secrets.token_hex(16)}))
            number, _, digest = entries[-1]
            head = ChainHead(number, digest)
        self._database.executemany("INSERT INTO entries VALUES (?, ?, ?)", entries)
        self.state = replay(entries, after=self.state)
        return self.state


def _full(path: Path, error: Exception) -> str:
    return (
        f"the disk of {path} is full ({error}), so nothing is charged or trained; free some space, and the "
        "task goes on when it is asked again"
    )


def _unusable(path: Path, error: Exception) -> str:
    return (
        f"the ledger {path} cannot be used ({error}), so nothing is charged or trained; free its disk, "
        "correct its permissions, or put a backup in its place"
    )


def _version(database: sqlite3.Connection) -> int:
    return int(database.execute("PRAGMA user_version").fetchone()[0])


def _take_former_rows(database: sqlite3.Connection) -> list[dict[str, Any]]:
    """Return the rows of the former kind as entries, in the order of their times; drop their table."""
    if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'rows'").fetchone():
        return []
    entries: list[tuple[int, int, dict[str, Any]]] = []
    for former in database.execute(
        "SELECT task_id, run_uid, dataset, unit, server_round, noise_multiplier, sample_rate, steps, "
        "reserved_at, released_at FROM rows ORDER BY reserved_at, rowid"
    ):
        task_id, run_uid, dataset, unit, server_round, *numbers, reserved_at, released_at = former
        row = LedgerRow(task_id, run_uid, dataset, unit, server_round, GaussianSteps(*numbers))
        entries.append((reserved_at, 0, reservation(row, at=reserved_at)))
        if released_at is not None:
            # Never before its reservation, even if the clock went back.
            at = max(reserved_at, released_at)
            entries.append((at, 1, release(task_id, at=at)))
    database.execute("DROP TABLE rows")
    return [entry for *_, entry in sorted(entries, key=lambda item: item[:2])]
