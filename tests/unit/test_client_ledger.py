"""The ledger: charged before, one output after, across restarts, processes, full disks and editors."""

from __future__ import annotations

import math
import multiprocessing
import re
import resource
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple
from hashlib import sha256
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from client import ledger as ledger_module
from client.budget import Unit
from client.ledger import Ledger, LedgerRow
from client.ledger_file import LedgerFile
from common.canonical import canonical_json, from_canonical
from common.chain import EMPTY, ChainHead, link
from common.errors import BudgetError
from common.privacy import Accountant, GaussianSteps, compose_epsilon

STEP = GaussianSteps(noise_multiplier=0.8, sample_rate=0.032, steps=30)


def _row(task_id: str = "t1", *, run: str = "run-1", unit: str = "record", round_: int = 1,
         steps: GaussianSteps = STEP) -> LedgerRow:  # fmt: skip
    return LedgerRow(task_id, run, "notes", unit, round_, steps)


def _reserve(
    ledger: Ledger,
    row: LedgerRow,
    *,
    planned: int = 300,
    cap: float = 10.0,
    unit: Unit = "record",
    accountant: Accountant = "rdp",
) -> LedgerRow:
    return ledger.reserve(
        row,
        planned_steps=planned,
        unit=unit,
        delta=1e-5,
        max_epsilon=cap,
        accountant=accountant,
    )


def _spent(ledger: Ledger, accountant: Accountant = "rdp", **choice: Any) -> float:
    return ledger.spent("notes", unit="record", delta=1e-5, accountant=accountant, **choice)


def test_a_reservation_is_there_after_a_restart_and_charged(tmp_path: Path) -> None:
    _reserve(Ledger(tmp_path / "ledger.sqlite"), _row())

    reopened = Ledger(tmp_path / "ledger.sqlite")

    assert reopened.find("t1") == _row()
    assert _spent(reopened) == compose_epsilon([STEP], delta=1e-5, accountant="rdp")


def test_the_same_task_is_charged_once(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    _reserve(ledger, _row())
    ledger.release("t1")
    head = ledger.head()

    again = _reserve(ledger, _row())

    assert again.state == "released"
    assert again.without_state == _row()
    assert len(ledger.rows("notes")) == 1
    assert ledger.head() == head


def test_epsilon_composes_over_rounds_and_runs(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    for number in range(10):
        run = "run-1" if number < 5 else "run-2"
        _reserve(ledger, _row(f"t{number}", run=run, round_=number % 5 + 1), planned=150)

    # DESIGN section 7: 10 rounds of 30 such steps are 6.80 by RDP, 5.96 by PRV; not ten times 2.74.
    assert _spent(ledger) == pytest.approx(6.80, abs=0.01)
    assert _spent(ledger, "prv") == pytest.approx(5.96, abs=0.01)
    bounds = ledger.bounds("notes", unit="record", delta=1e-5)
    assert (bounds.prv, bounds.rdp) == (_spent(ledger, "prv"), _spent(ledger))


def test_what_would_be_spent_can_be_asked_without_charging(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    _reserve(ledger, _row())
    more = _row("t2", steps=GaussianSteps(0.8, 0.032, 270))

    assert _spent(ledger, more=[more]) == pytest.approx(6.80, abs=0.01)
    assert ledger.find("t2") is None


def test_a_run_whose_plan_exceeds_the_cap_is_refused_at_its_first_task(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")

    with pytest.raises(
        BudgetError,
        match=r"spent epsilon 0\.00 of 6\.00, 6\.00 is left, and with the 300 steps that this run "
        r"asks for \(noise multiplier 0\.8, sample rate 0\.032\) it would be 6\.80",
    ):
        _reserve(ledger, _row(), planned=300, cap=6.0)

    assert ledger.rows("notes") == []
    assert ledger.head() == EMPTY


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
def test_a_refusal_says_what_would_fit_and_that_fits(
    tmp_path: Path, accountant: Accountant
) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    _reserve(ledger, _row(), planned=30, accountant=accountant)
    with pytest.raises(BudgetError, match=r"(\d+) such steps still fit, (\d+) rounds of 30") as no:
        _reserve(ledger, _row("a", run="run-2"), planned=900, cap=6.0, accountant=accountant)

    words = str(no.value).split()
    steps = int(words[words.index("such") - 1])
    assert int(words[words.index("rounds") - 1]) == steps // 30

    with pytest.raises(BudgetError, match=f"{steps} such steps"):
        _reserve(ledger, _row("a", run="run-2"), planned=steps + 1, cap=6.0, accountant=accountant)
    _reserve(ledger, _row("a", run="run-2"), planned=steps, cap=6.0, accountant=accountant)


def test_where_nothing_fits_it_says_so(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    _reserve(ledger, _row())

    with pytest.raises(BudgetError, match=r"of 2\.00, 0\.00 is left.*none still fits"):
        _reserve(ledger, _row("t2", run="run-2"), cap=2.0)


def test_each_task_reserves_only_its_own_steps(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    _reserve(ledger, _row(), planned=300, cap=6.9)

    assert _spent(ledger) < 3.5


def test_a_later_task_is_checked_for_its_own_steps_alone(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    # 150 steps fit into 6 by RDP, 300 do not.
    _reserve(ledger, _row("t1"), planned=150, cap=6.0)

    _reserve(ledger, _row("t2"), planned=300, cap=6.0)
    with pytest.raises(BudgetError, match="the 300 steps that this task asks for"):
        _reserve(ledger, _row("t3", steps=GaussianSteps(0.8, 0.032, 300)), planned=300, cap=6.0)


def test_a_plan_shorter_than_the_task_itself_does_not_count(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="the 300 steps"):
        _reserve(
            Ledger(tmp_path / "ledger.sqlite"),
            _row(steps=GaussianSteps(0.8, 0.032, 300)),
            planned=1,
            cap=6.0,
        )


def test_what_another_run_spent_counts(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    for number in range(5):
        _reserve(ledger, _row(f"t{number}"), planned=150, cap=6.0)

    with pytest.raises(BudgetError, match=r"raise policy\.max-epsilon"):
        _reserve(ledger, _row("other", run="run-2"), planned=150, cap=6.0)


def test_what_the_exact_bound_allows_is_allowed_though_rdps_is_above_the_cap(
    tmp_path: Path,
) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")

    # 5.96 by PRV, 6.80 by RDP.
    with pytest.raises(BudgetError, match=r"6\.80"):
        _reserve(ledger, _row(), cap=6.0, accountant="rdp")
    _reserve(ledger, _row(), cap=6.0, accountant="prv")


def test_training_without_privacy_makes_a_data_set_infinite(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    free = GaussianSteps(0.0, 1.0, 5)
    with pytest.raises(BudgetError, match=r"infinite, and policy\.max-epsilon is 1\.00"):
        _reserve(ledger, _row("free", unit="none", steps=free), cap=1.0)
    _reserve(ledger, _row("free", unit="none", steps=free), cap=math.inf)

    assert math.isinf(_spent(ledger, "prv"))
    with pytest.raises(BudgetError, match="without privacy before"):
        _reserve(ledger, _row("later", run="run-2"))


def test_noise_that_is_no_number_does_not_pass_for_a_small_epsilon(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")

    with pytest.raises(BudgetError, match="it would be inf"):
        _reserve(ledger, _row(steps=GaussianSteps(math.nan, 0.032, 30)))


def test_another_data_set_has_its_own_budget(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    _reserve(ledger, _row())

    assert ledger.spent("other", unit="record", delta=1e-5) == 0.0
    assert ledger.datasets() == ["notes"]


def test_release_does_not_revive_or_invent_rows(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.release("nobody")
    assert ledger.find("nobody") is None
    assert ledger.head() == EMPTY

    _reserve(ledger, _row())
    ledger.release("t1")
    ledger.release("t1")
    found = ledger.find("t1")
    assert found is not None
    assert found.state == "released"
    assert ledger.head().count == 2


def test_a_calibration_is_computed_once(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    asked: list[int] = []

    def compute() -> float:
        asked.append(1)
        return 0.75

    assert ledger.calibration("key", compute) == 0.75
    assert Ledger(tmp_path / "ledger.sqlite").calibration("key", compute) == 0.75
    assert len(asked) == 1


def test_the_file_is_the_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "state" / "ledger.sqlite"
    _reserve(Ledger(path), _row())

    assert path.stat().st_mode & 0o077 == 0


# Heads


def test_every_head_that_the_ledger_had_is_covered_and_no_other(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    heads = [ledger.head()]
    for number in range(3):
        _reserve(ledger, _row(f"t{number}"))
        heads.append(ledger.head())
        ledger.release(f"t{number}")
        heads.append(ledger.head())

    assert [head.count for head in heads] == [0, 1, 2, 3, 4, 5, 6]
    assert len({head.digest for head in heads}) == 7
    assert all(ledger.covers(head) for head in heads)
    assert not ledger.covers(ChainHead(7, heads[6].digest))
    assert not ledger.covers(ChainHead(2, heads[3].digest))
    assert not ledger.covers(ChainHead(0, heads[1].digest))
    assert not ledger.covers(ChainHead(-1, heads[1].digest))


def test_a_ledger_restored_from_a_backup_does_not_cover_what_came_after(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    ledger = Ledger(path)
    _reserve(ledger, _row("t1"))
    backup, at_backup = path.read_bytes(), ledger.head()
    _reserve(ledger, _row("t2"))
    lost = ledger.head()

    path.write_bytes(backup)
    reopened = Ledger(path)
    assert not reopened.covers(lost)
    # Also where other work brings it to the same length.
    _reserve(reopened, _row("t3"))

    assert reopened.covers(at_backup)
    assert reopened.head().count == lost.count
    assert not reopened.covers(lost)


def test_nothing_in_an_entry_can_be_found_by_trying_it_against_the_head(tmp_path: Path) -> None:
    """The head leaves the site, and all of an entry but the data set's name is easy to guess."""
    path = tmp_path / "ledger.sqlite"
    ledger = Ledger(path)
    _reserve(ledger, _row())
    before = ledger.head()
    ledger.release("t1")
    with LedgerFile(path).database() as database:
        stored = database.execute("SELECT content FROM entries ORDER BY number").fetchall()
    entries = [from_canonical(content) for (content,) in stored]
    salts = [entry.pop("salt") for entry in entries]

    guesses = [entries[1], {**entries[1], "salt": ""}, {**entries[1], "salt": salts[0]}]

    assert all(re.fullmatch("[0-9a-f]{32}", salt) for salt in salts)
    assert salts[0] != salts[1]
    assert link(before, canonical_json({**entries[1], "salt": salts[1]})) == ledger.head()
    assert ledger.head() not in [link(before, canonical_json(guess)) for guess in guesses]


def test_two_ledgers_of_the_same_charges_have_different_heads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module.time, "time", lambda: 1_700_000_000)
    ledgers = [Ledger(tmp_path / name) for name in ("a.sqlite", "b.sqlite")]
    for ledger in ledgers:
        _reserve(ledger, _row())

    assert ledgers[0].rows("notes") == ledgers[1].rows("notes")
    assert len({ledger.head().digest for ledger in ledgers}) == 2


def test_a_commit_is_on_the_disk_with_its_folder(tmp_path: Path) -> None:
    """EXTRA (3) also syncs the folder, in which a rolled-back charge's journal lay."""
    with LedgerFile(tmp_path / "ledger.sqlite").database() as database:
        synchronous = database.execute("PRAGMA synchronous").fetchone()
        journal = database.execute("PRAGMA journal_mode").fetchone()

    assert (synchronous, journal) == ((3,), ("delete",))


# Editors


def _filled(path: Path) -> Ledger:
    ledger = Ledger(path)
    for number in range(3):
        _reserve(ledger, _row(f"t{number}"))
        ledger.release(f"t{number}")
    return ledger


def _edit(path: Path, *statements: str) -> None:
    database = sqlite3.connect(path)
    for statement in statements:
        database.execute(statement)
    database.commit()
    database.close()


_CONTENT = "UPDATE entries SET content = CAST({} AS BLOB) "


@pytest.mark.parametrize(
    "edit",
    [
        [_CONTENT.format("replace(CAST(content AS TEXT), 't1', 't9')") + "WHERE number = 3"],
        [_CONTENT.format("replace(CAST(content AS TEXT), '\"steps\":30', '\"steps\":3')")],
        [_CONTENT.format("content || ' '") + "WHERE number = 2"],
        [_CONTENT.format("'x'") + "WHERE number = 6"],
        ["UPDATE entries SET digest = replace(digest, 'a', 'b')"],
        ["UPDATE entries SET digest = upper(digest)"],
        ["DELETE FROM entries WHERE number = 1"],
        ["DELETE FROM entries WHERE number = 4"],
        ["DELETE FROM entries WHERE number < 6"],
        [
            "UPDATE entries SET number = 99 WHERE number = 3",
            "UPDATE entries SET number = 3 WHERE number = 4",
            "UPDATE entries SET number = 4 WHERE number = 99",
        ],
        ["UPDATE entries SET number = number + 1 WHERE number = 6"],
        ["INSERT INTO entries SELECT 7, content, digest FROM entries WHERE number = 6"],
    ],
)
def test_an_edited_ledger_is_found_at_every_use(tmp_path: Path, edit: list[str]) -> None:
    path = tmp_path / "ledger.sqlite"
    ledger = _filled(path)
    _edit(path, *edit)

    uses: list[Callable[[], Any]] = [
        ledger.verify,
        ledger.head,
        lambda: ledger.find("t1"),
        lambda: _spent(ledger),
        lambda: _reserve(ledger, _row("t9")),
        lambda: ledger.release("t1"),
        lambda: Ledger(path),
    ]
    for use in uses:
        with pytest.raises(BudgetError, match=r"ledger\.sqlite: entry \d+ .* was edited.*--settle"):
            use()


def test_entries_cut_off_the_end_are_found_by_whoever_saw_them(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    seen = _filled(path).head()
    _edit(path, "DELETE FROM entries WHERE number > 4")

    assert not Ledger(path).covers(seen)


@pytest.mark.parametrize("kept", [0, 1, 5])
def test_entries_cut_off_the_end_are_found_while_the_process_lives(
    tmp_path: Path, kept: int
) -> None:
    path = tmp_path / "ledger.sqlite"
    # Its latest entry is written, and nothing is read afterwards.
    ledger = _filled(path)
    _edit(path, f"DELETE FROM entries WHERE number > {kept}")

    uses: list[Callable[[], Any]] = [
        lambda: ledger.find("t1"),
        lambda: _spent(ledger),
        lambda: _reserve(ledger, _row("t9")),
        lambda: ledger.release("t1"),
        ledger.verify,
    ]
    for use in uses:
        with pytest.raises(
            BudgetError,
            match=rf"has seen 6 entries, and the ledger, of {kept} now.*Keep the file as evidence.*"
            r"--settle RECEIPT\) and restart this process",
        ):
            use()
    assert Ledger(path).head().count == kept, "untouched"


def test_a_cut_is_found_though_others_wrote_as_many_entries_since(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    ledger = _filled(path)
    _edit(path, "DELETE FROM entries WHERE number > 4")
    other = Ledger(path)
    for number in range(7, 10):
        _reserve(other, _row(f"t{number}"))

    with pytest.raises(BudgetError, match="has seen 6 entries, and the ledger, of 7 now"):
        ledger.head()


def test_what_was_rolled_back_was_never_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = _filled(tmp_path / "ledger.sqlite")
    with monkeypatch.context() as patch:
        patch.setattr("client.ledger_file.Transaction.append", _then(_broken))
        with pytest.raises(RuntimeError, match="broken"):
            _reserve(ledger, _row("t9"))

    assert ledger.head().count == 6


@pytest.mark.parametrize(
    "damage", [b"not a database" * 100, b"SQLite format 3\x00" + b"\xff" * 4096]
)
def test_a_file_that_is_no_ledger_is_refused_in_words(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(damage)

    with pytest.raises(BudgetError, match=r"cannot be used \(.*nothing is charged or trained"):
        Ledger(path)


def test_the_ledger_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    _filled(path)
    _edit(path, "PRAGMA user_version = 4")

    with pytest.raises(BudgetError, match="a newer Consilium wrote this ledger"):
        Ledger(path)


# The former kind


def _former_ledger(path: Path) -> None:
    _edit(
        path,
        """CREATE TABLE rows (task_id TEXT PRIMARY KEY, run_uid TEXT NOT NULL, dataset TEXT NOT NULL,
        unit TEXT NOT NULL, server_round INTEGER NOT NULL, noise_multiplier REAL NOT NULL,
        sample_rate REAL NOT NULL, steps INTEGER NOT NULL, state TEXT NOT NULL,
        reserved_at INTEGER NOT NULL, released_at INTEGER) STRICT""",
        "CREATE TABLE calibrations (inputs TEXT PRIMARY KEY, noise_multiplier REAL NOT NULL) STRICT",
        "INSERT INTO calibrations VALUES ('key', 0.75)",
        """INSERT INTO rows VALUES
        ('t1', 'run-1', 'notes', 'record', 1, 0.8, 0.032, 30, 'released', 100, 160),
        ('t2', 'run-1', 'notes', 'record', 2, 0.8, 0.032, 30, 'released', 200, 150),
        ('t3', 'run-1', 'notes', 'record', 3, 0.8, 0.032, 30, 'reserved', 300, NULL)""",
    )


def test_a_ledger_of_the_former_kind_is_taken_over_with_every_charge(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    _former_ledger(path)

    ledger = Ledger(path)

    assert [(row.task_id, row.state, row.reserved_at) for row in ledger.rows("notes")] == [
        ("t1", "released", 100),
        ("t2", "released", 200),
        ("t3", "reserved", 300),
    ]
    assert ledger.rows("notes")[2] == _row("t3", round_=3)
    assert ledger.calibration("key", lambda: 0.0) == 0.75
    assert ledger.head().count == 5
    # Once is enough.
    assert Ledger(path).head() == ledger.head()
    with pytest.raises(sqlite3.OperationalError, match="no such table"):
        _edit(path, "SELECT * FROM rows")


def test_a_takeover_that_breaks_off_leaves_the_former_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger.sqlite"
    _former_ledger(path)
    with monkeypatch.context() as patch:
        patch.setattr("client.ledger_file.replay", _broken)
        with pytest.raises(RuntimeError, match="broken"):
            Ledger(path)

    assert len(Ledger(path).rows("notes")) == 3


def _wait_for_exact_epsilons() -> None:
    for thread in threading.enumerate():
        if thread.name == "epsilon":
            thread.join(60)


def _broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("broken")


def test_a_table_of_epsilons_is_dropped_and_was_never_believed(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    parts = [GaussianSteps(4.0 + 0.1 * number, 0.02, 10) for number in range(21)]
    ledger = Ledger(path)
    for number, steps in enumerate(parts[:20]):
        _reserve(ledger, _row(f"t{number}", run=f"r{number}", steps=steps), planned=10)
    key = sha256(canonical_json([1e-5, [astuple(part) for part in parts]])).hexdigest()
    _edit(
        path,
        "CREATE TABLE epsilons (inputs TEXT PRIMARY KEY, epsilon REAL NOT NULL) STRICT",
        f"INSERT INTO epsilons VALUES ('{key}', 0.0)",
        "PRAGMA user_version = 2",
    )

    def refuse(ledger: Ledger) -> None:
        row = _row("t20", run="r20", steps=parts[20])
        with pytest.raises(BudgetError, match="by RDP's bound"):
            _reserve(ledger, row, planned=10, cap=0.1, accountant="prv")
        _wait_for_exact_epsilons()

    refuse(ledger)
    refuse(Ledger(path))
    assert len(Ledger(path).rows("notes")) == 20
    with pytest.raises(sqlite3.OperationalError, match="no such table"):
        _edit(path, "SELECT * FROM epsilons")


# Transactions


@contextmanager
def _files_no_larger_than(size_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_charges_nothing_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    ledger, charged = Ledger(path), []

    def charge_for_ever() -> None:
        for number in range(1000):
            _reserve(ledger, _row(f"t{number}"), cap=math.inf)
            charged.append(f"t{number}")

    with (
        _files_no_larger_than(path.stat().st_size),
        pytest.raises(BudgetError, match=r"cannot be used \(.*free its disk"),
    ):
        charge_for_ever()

    assert charged
    assert [row.task_id for row in ledger.rows("notes")] == charged
    # And with room again it goes on.
    _reserve(ledger, _row("last"), cap=math.inf)


def test_a_read_only_ledger_charges_nothing_and_can_still_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger.sqlite"
    ledger = _filled(path)
    connect = sqlite3.connect

    def read_only(path: Path, **options: Any) -> sqlite3.Connection:
        return connect(f"file:{path}?mode=ro", uri=True, **options)

    monkeypatch.setattr(sqlite3, "connect", read_only)

    with pytest.raises(BudgetError, match="readonly database"):
        _reserve(ledger, _row("t9"))
    assert len(ledger.rows("notes")) == 3


def test_a_folder_that_cannot_be_made_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file in the way")

    with pytest.raises(BudgetError, match="cannot be used"):
        Ledger(tmp_path / "state" / "ledger.sqlite")


@pytest.mark.parametrize("operation", ["reserve", "release"])
def test_an_interruption_before_the_commit_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    path = tmp_path / "ledger.sqlite"
    ledger = _filled(path)
    _reserve(ledger, _row("open"))
    head = ledger.head()

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        # Called after the entry was inserted.
        patch.setattr("client.ledger_file.Transaction.append", _then(interrupted))
        attempt = {
            "reserve": lambda: _reserve(ledger, _row("t9")),
            "release": lambda: ledger.release("open"),
        }
        with pytest.raises(KeyboardInterrupt):
            attempt[operation]()

    assert ledger.head() == head == Ledger(path).head()


def _then(after: Callable[..., Any]) -> Callable[..., Any]:
    from client.ledger_file import Transaction

    append = Transaction.append

    def both(*arguments: Any) -> Any:
        append(*arguments)
        return after()

    return both


# Processes


def _reserve_many(path: Path, offset: int) -> None:
    ledger = Ledger(path)
    for number in range(10):
        _reserve(ledger, _row(f"t{(number + offset) % 10}", round_=number + 1), cap=math.inf)


def test_two_processes_charge_each_task_once(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    _in_processes(_reserve_many, [(path, 0), (path, 5)])

    ledger = Ledger(path)
    assert sorted(row.task_id for row in ledger.rows("notes")) == [f"t{i}" for i in range(10)]
    assert ledger.head().count == 10


def _reserve_when_both_have_computed(path: Path, run: str, barrier: Barrier) -> None:
    check, waited = ledger_module.check_cap, []

    def check_and_wait(*arguments: Any, **options: Any) -> None:
        check(*arguments, **options)
        if not waited:
            waited.append(barrier.wait(60))

    ledger_module.check_cap = check_and_wait
    ledger = Ledger(path)
    try:
        _reserve(ledger, _row(run, run=run), planned=30, cap=3.9)
    except BudgetError as error:
        Path(f"{path}.{run}.refused").write_text(str(error))


def test_two_processes_never_both_fit_where_only_one_does(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    # 30 steps are 3.43 by RDP, 60 are 4.01: each process finds that its own run fits.
    barrier = multiprocessing.get_context("spawn").Barrier(2)
    runs = ["run-1", "run-2"]
    _in_processes(_reserve_when_both_have_computed, [(path, run, barrier) for run in runs])

    refused = list(tmp_path.glob("*.refused"))
    assert len(refused) == 1
    assert "has spent epsilon 3." in refused[0].read_text()
    assert len(Ledger(path).rows("notes")) == 1


def _in_processes(target: Callable[..., None], arguments: list[tuple[Any, ...]]) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=target, args=each) for each in arguments]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0] * len(workers)
