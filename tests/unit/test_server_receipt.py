"""The receipt for a restored site: every task that it may have trained, each once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.audit_log import read_audit_log
from common.config import RunConfig
from common.errors import ConfigError
from common.privacy import calibrate_noise
from common.receipts import Receipt, ReceiptCharge
from common.records import PrivacyRow, SiteHeads, Task, TaskKind, reply_to
from common.signing import SigningKey
from server.audit import CoordinatorAudit
from server.receipt import make_receipt
from tests.unit.fake_federation import HEADS

KEY = SigningKey.generate()
ROW = PrivacyRow("record", 1.5, 1e-5, 0.8, 0.16, 3)


class Book:
    """A coordinator's audit log, written task by task."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.audit = CoordinatorAudit(folder, KEY)
        changes = {key.replace("__", "."): value for key, value in settings.items()}
        self.config = RunConfig.parse({"privacy.accountant": "rdp", **changes}).for_sites()
        self.reply(Task("describe", "run-7", "", 0, 1, 0), kind="describe")

    def sent(self, server_round: int, *, attempt: int = 1, **changes: Any) -> Task:
        task = Task("train", "run-7", "bern", server_round, 1, 0, config=self.config)
        task = replace(task, **{**changes, "attempt": attempt, "expires_at": attempt})
        self.audit.task_sent(task, declared_size=100)
        return task

    def reply(
        self, task: Task, *, error: str = "", row: PrivacyRow | None = ROW, kind: TaskKind = "train",
        heads: SiteHeads = HEADS,
    ) -> None:  # fmt: skip
        reply = reply_to(
            task, site="bern", error_code=error, privacy=None if error else row, heads=heads
        )
        self.audit.replied(reply, task=replace(task, kind=kind), size_bytes=1, seen=None)

    def receipt(self, site: str = "bern") -> Receipt:
        return make_receipt(
            read_audit_log(self.audit.path), site=site, seen=self.audit.seen(), issued_at=7
        )

    def charges(self) -> list[tuple[int, float]]:
        """Round and noise of each charge in the receipt."""
        charges = self.receipt().charges
        return [(charge.server_round, charge.noise_multiplier) for charge in charges]


def test_a_finished_task_is_charged_as_the_site_said_for_its_own_steps(tmp_path: Path) -> None:
    book = Book(tmp_path)
    task = book.sent(3)
    book.reply(task)
    assert book.receipt() == Receipt(
        site="bern",
        heads=HEADS,
        # 20 steps are the task's; the 3 of the row are the run's so far.
        charges=(ReceiptCharge(task.task_id, "run-7", "record", 3, 0.8, 0.16, 20, True),),
        issued_at=7,
    )


def test_the_same_task_asked_again_is_one_charge(tmp_path: Path) -> None:
    book = Book(tmp_path)
    for attempt in (1, 2, 3):
        task = book.sent(1, attempt=attempt)
    book.reply(task)
    assert book.charges() == [(1, 0.8)]


def test_a_task_whose_reply_never_came_is_charged(tmp_path: Path) -> None:
    """It may have been trained, and its reply lost or late."""
    book = Book(tmp_path)
    book.reply(book.sent(1))
    book.sent(2)
    assert book.charges() == [(1, 0.8), (2, 0.8)]
    assert [charge.answered for charge in book.receipt().charges] == [True, False]


def test_only_a_task_that_the_site_never_did_by_its_own_word_is_left_out(tmp_path: Path) -> None:
    book = Book(tmp_path)
    book.reply(book.sent(1))
    for attempt in (1, 2):
        book.reply(book.sent(2, attempt=attempt), error="policy")
    # The first attempt of this one is open.
    book.sent(3, attempt=1)
    book.reply(book.sent(3, attempt=2), error="budget")
    # And this one was done in the end.
    book.reply(book.sent(4, attempt=1), error="training")
    book.reply(book.sent(4, attempt=2))
    # These may come after the charge.
    for server_round, code in ((5, "training"), (6, "config"), (7, "privacy"), (8, "internal")):
        book.reply(book.sent(server_round), error=code)
    # And this only before it.
    book.reply(book.sent(9), error="budget")
    assert [server_round for server_round, _ in book.charges()] == [1, 3, 4, 5, 6, 7, 8]


def test_a_finished_task_stays_charged_though_it_later_failed(tmp_path: Path) -> None:
    book = Book(tmp_path)
    task = book.sent(1)
    book.reply(task)
    book.reply(task, error="budget")
    assert book.charges() == [(1, 0.8)]


def test_an_unanswered_task_of_a_run_unheard_of_is_charged_by_calibration(tmp_path: Path) -> None:
    book = Book(tmp_path)
    book.reply(book.sent(1))
    book.sent(1, run_uid="run-8")
    # 20 steps in each of 5 rounds, batch-size 16 of declared-size 100, epsilon 8 at delta 1e-5.
    noise = calibrate_noise(
        target_epsilon=8.0, delta=1e-5, sample_rate=0.16, steps=100, accountant="rdp"
    )
    assert book.charges() == [(1, 0.8), (1, noise)]


def test_an_unanswered_task_with_the_runs_own_noise_is_charged_with_it(tmp_path: Path) -> None:
    book = Book(tmp_path, **{"privacy__noise-multiplier": 1.25})
    book.sent(1)
    assert book.charges() == [(1, 1.25)]


def test_an_unanswered_task_that_no_noise_could_protect_was_not_trained(tmp_path: Path) -> None:
    book = Book(tmp_path, **{"privacy__target-epsilon": 1e-4})
    book.sent(1)
    assert book.charges() == []


def test_without_protection_the_charge_is_without_noise(tmp_path: Path) -> None:
    book = Book(tmp_path, privacy__unit="none")
    book.sent(1)
    (charge,) = book.receipt().charges
    assert (charge.unit, charge.noise_multiplier, charge.sample_rate) == ("none", 0.0, 1.0)


def test_a_reply_that_hid_its_privacy_is_charged_as_it_was_asked(tmp_path: Path) -> None:
    book = Book(tmp_path, **{"privacy__noise-multiplier": 1.25})
    book.reply(book.sent(1), row=None)
    assert book.charges() == [(1, 1.25)]
    assert book.receipt().charges[0].answered


def test_other_sites_tasks_are_not_this_ones(tmp_path: Path) -> None:
    book = Book(tmp_path)
    book.sent(1, site="oslo")
    book.reply(book.sent(2))
    assert book.charges() == [(2, 0.8)]


def test_a_site_that_was_never_heard_of_has_no_receipt(tmp_path: Path) -> None:
    book = Book(tmp_path)
    book.sent(1, site="oslo")
    with pytest.raises(ConfigError, match="no site 'oslo' has ever answered.*heard from: bern"):
        book.receipt("oslo")
