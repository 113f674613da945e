"""Between a task and the records: approval, restored backups, steps beyond what was approved."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from client.ledger import Ledger
from common.audit_log import AuditLog, verify_audit_log
from common.chain import EMPTY, ChainHead
from common.errors import AuditError, ConfigError, SignatureError
from common.receipts import Receipt, ReceiptCharge, seal_receipt
from common.records import Reply, SiteHeads, Task, open_reply
from common.signing import SigningKey
from tests.unit.hospital import Hospital, make_hospital


def _ask(hospital: Hospital, task: Task) -> Reply:
    answer = hospital.open().answer(hospital.seal(task))
    key = SigningKey.load(hospital.folder / "keys" / "signing.pem")
    return open_reply(answer, task=task, site="north", public_hex=key.public_hex)


def _describe(hospital: Hospital, **changes: Any) -> Task:
    return replace(hospital.task(**changes), kind="describe", site="", server_round=0)


def _rows(hospital: Hospital) -> list[Any]:
    return Ledger(hospital.folder / "state" / "ledger.sqlite").rows("notes")


def _events(hospital: Hospital) -> list[str]:
    return [entry.event for entry in hospital.open().audit.entries()]


@pytest.fixture
def asking(tmp_path: Path, tiny_model_dir: Path) -> Hospital:
    return make_hospital(tmp_path / "north", tiny_model_dir, policy={"approval": "ask"})


@pytest.fixture
def hospital(tmp_path: Path, tiny_model_dir: Path) -> Hospital:
    return make_hospital(tmp_path / "north", tiny_model_dir)


def test_a_run_waits_until_the_hospital_approves_it(asking: Hospital) -> None:
    assert _ask(asking, _describe(asking)).error_code == "approval"
    assert _ask(asking, asking.task()).error_code == "approval"
    assert _rows(asking) == [], "waiting costs nothing"

    asking.open().approve("run-1")

    assert _ask(asking, _describe(asking)).error_code == ""
    assert _ask(asking, asking.task()).error_code == ""
    assert {"waiting", "approved", "sent"} <= set(_events(asking))


def test_asking_again_and_again_leaves_one_line(asking: Hospital) -> None:
    site = asking.open()
    for _ in range(5):
        site.answer(asking.seal(_describe(asking)))
    assert _events(asking).count("waiting") == 1
    assert "refused" not in _events(asking)


def test_a_declined_run_is_refused_for_good(asking: Hospital) -> None:
    _ask(asking, _describe(asking))
    asking.open().decline("run-1")
    assert _ask(asking, asking.task()).error_code == "policy"
    assert _rows(asking) == []


def test_an_approval_holds_for_these_settings_only(asking: Hospital) -> None:
    _ask(asking, _describe(asking))
    asking.open().approve("run-1")
    other = asking.task(settings={"train.learning-rate": 0.5})
    assert _ask(asking, other).error_code == "policy"
    assert _ask(asking, asking.task(settings={"lora.rank": 1})).error_code == "shape", (
        "a lower rank asks for less; only the adapter sent along does not fit it"
    )


def test_an_approval_covers_the_planned_steps_and_no_more(asking: Hospital) -> None:
    _ask(asking, _describe(asking))
    asking.open().approve("run-1")
    for server_round in (1, 2, 3):
        assert _ask(asking, asking.task(server_round)).error_code == ""
    again = asking.task(3, base_digest=asking.base_digest, settings={"lora.rank": 2})
    assert _ask(asking, again).error_code == "", "the same task is no new step"
    shifted = replace(asking.task(3), adapter_digest="ab" * 32)
    assert _ask(asking, shifted).error_code == "policy"


def test_what_approval_costs_is_what_the_run_then_costs(asking: Hospital) -> None:
    _ask(asking, _describe(asking))
    site = asking.open()
    (request,) = site.approvals.waiting()
    site.approve("run-1")
    sent = [_ask(asking, asking.task(r)) for r in (1, 2, 3)]
    assert sent[-1].privacy is not None
    assert request.cost.epsilon == pytest.approx(sent[-1].privacy.epsilon)
    assert request.cost.steps == sent[-1].privacy.steps == 6
    assert request.cost.bytes_up == 3 * len(asking.adapter.to_safetensors())
    # policy.max-rank 64, lora.rank 2.
    assert request.cost.more_ranks == 62


def test_replies_carry_the_heads_that_the_site_then_has(hospital: Hospital) -> None:
    reply = _ask(hospital, hospital.task())
    site = hospital.open()
    assert reply.heads == SiteHeads(site.ledger.head(), site.audit.head())
    assert reply.heads.ledger.count == 2, "reserved and released"


def test_a_site_that_is_where_it_was_last_seen_goes_on(hospital: Hospital) -> None:
    seen = _ask(hospital, hospital.task(1)).heads
    assert _ask(hospital, hospital.task(2, seen=seen)).error_code == ""
    assert hospital.open().last_seen() == seen


def _restored(hospital: Hospital) -> tuple[Reply, Hospital]:
    """A site whose state is the backup of before its second task; its reply to that task."""
    _ask(hospital, hospital.task(1))
    shutil.copytree(hospital.folder / "state", hospital.folder / "backup")
    last = _ask(hospital, hospital.task(2))
    shutil.rmtree(hospital.folder / "state")
    shutil.move(hospital.folder / "backup", hospital.folder / "state")
    return last, hospital


def test_a_site_restored_from_a_backup_refuses_until_it_is_settled(hospital: Hospital) -> None:
    last, _ = _restored(hospital)
    assert last.heads is not None
    assert last.privacy is not None
    spent = last.privacy.epsilon
    third = hospital.task(3, seen=last.heads)
    assert _ask(hospital, third).error_code == "restored"
    assert len(_rows(hospital)) == 1

    task = hospital.task(2)
    row = _rows(hospital)[0].steps
    charge = ReceiptCharge(
        task.task_id, "run-1", "record", 2, row.noise_multiplier, row.sample_rate, row.steps, True
    )
    receipt = seal_receipt(Receipt("north", last.heads, (charge,), 0), hospital.coordinator)
    settlement = hospital.open().settle(receipt)

    assert (settlement.named, settlement.unknown) == (1, 0)
    assert hospital.open().ledger.spent(
        "notes", unit="record", delta=1e-5, accountant="rdp"
    ) == pytest.approx(spent)
    assert _ask(hospital, third).error_code == ""
    assert _ask(hospital, task).error_code == "budget", "its one output left before the restore"
    key = SigningKey.load(hospital.folder / "keys" / "signing.pem")
    verified = verify_audit_log(
        hospital.folder / "state" / "audit.jsonl",
        public_hex=key.public_hex,
        anchors=[last.heads.audit],
    )
    assert verified.settled == 1


def test_a_log_that_was_cut_is_a_restored_site_too(hospital: Hospital) -> None:
    seen = _ask(hospital, hospital.task(1)).heads
    log = hospital.folder / "state" / "audit.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:-1]))
    assert _ask(hospital, hospital.task(2, seen=seen)).error_code == "restored"


def test_heads_that_this_site_never_had_are_refused(hospital: Hospital) -> None:
    heads = _ask(hospital, hospital.task(1)).heads
    assert heads is not None
    for forged in (
        SiteHeads(replace(heads.ledger, digest="ab" * 32), heads.audit),
        SiteHeads(heads.ledger, ChainHead(heads.audit.count, "ab" * 32)),
        SiteHeads(ChainHead(99, heads.ledger.digest), heads.audit),
    ):
        assert _ask(hospital, hospital.task(2, seen=forged)).error_code == "restored"
    assert len(_rows(hospital)) == 1


def test_a_receipt_of_another_coordinator_settles_nothing(hospital: Hospital) -> None:
    last, _ = _restored(hospital)
    assert last.heads is not None
    forged = seal_receipt(Receipt("north", last.heads, (), 0), SigningKey.generate())
    with pytest.raises(Exception, match="does not hold"):
        hospital.open().settle(forged)
    assert isinstance(hospital.open().audit, AuditLog)
    assert _ask(hospital, hospital.task(3, seen=last.heads)).error_code == "restored"


def test_an_old_head_hides_no_newer_one(hospital: Hospital) -> None:
    first = _ask(hospital, hospital.task(1)).heads
    second = _ask(hospital, hospital.task(2, seen=first)).heads
    assert second is not None
    assert _ask(hospital, hospital.task(3, seen=second)).error_code == ""
    for old in (first, SiteHeads(EMPTY, EMPTY)):
        hospital.open().answer(hospital.seal(hospital.task(3, seen=old)))
        assert hospital.open().last_seen() == second


def test_a_site_that_forgot_refuses_though_the_coordinator_does_not_say_what_it_saw(
    hospital: Hospital,
) -> None:
    seen = _ask(hospital, hospital.task(1)).heads
    _ask(hospital, hospital.task(2, seen=seen))
    (hospital.folder / "state" / "ledger.sqlite").unlink()
    assert _ask(hospital, hospital.task(3)).error_code == "restored"


_HEAD = '{"count":1,"digest":"' + 64 * "a" + '"}'


@pytest.mark.parametrize(
    "content",
    [
        "",
        "Mr Miller, born 1950",
        "[" * 100_000,
        "7",
        "[]",
        "{}",
        '{"ledger":7,"audit":7}',
        '{"ledger":' + _HEAD + "}",
        '{"ledger":' + _HEAD + ',"audit":{"count":1}}',
        '{"ledger":' + _HEAD + ',"audit":' + _HEAD.replace("1", '"1"', 1) + "}",
        '{"ledger":' + _HEAD + ',"audit":' + _HEAD.replace("a", "x") + "}",
        '{"ledger":' + _HEAD + ',"audit":' + _HEAD + ',"more":1}',
        None,
    ],
)
def test_where_it_was_last_seen_and_that_is_damaged_a_site_refuses_and_says_what_to_do(
    hospital: Hospital, content: str | None
) -> None:
    """None is a folder in its place."""
    site = hospital.open()
    path = hospital.folder / "state" / "seen.json"
    path.mkdir() if content is None else path.write_text(content)

    reply = _ask(hospital, hospital.task())

    assert reply.error_code == "config"
    assert _rows(hospital) == []
    wrong = r"cannot be read \(Is a directory\)" if content is None else "is damaged"
    with pytest.raises(
        ConfigError, match=rf"seen.json {wrong}; put its backup there, or remove it: the next task"
    ):
        site.last_seen()
    path.rmdir() if content is None else path.unlink()
    assert _ask(hospital, hospital.task()).error_code == ""
    assert len(_rows(hospital)) == 1


def test_there_is_no_permission_that_is_not_on_record(asking: Hospital) -> None:
    _ask(asking, _describe(asking))
    log = asking.folder / "state" / "audit.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole.replace(b"run-1", b"run-7", 1))

    with pytest.raises(AuditError, match="line 1: edited"):
        asking.open().approve("run-1")

    assert asking.open().approvals.find("run-1").state == "waiting"
    log.write_bytes(whole)
    assert _ask(asking, asking.task()).error_code == "approval"
    asking.open().approve("run-1")
    assert _events(asking)[-1] == "approved"
    assert _ask(asking, asking.task()).error_code == ""


def test_an_answer_to_wait_names_no_line_for_there_is_none(asking: Hospital) -> None:
    for task in (_describe(asking), asking.task()):
        reply = _ask(asking, task)
        assert (reply.error_code, reply.correlation_id) == ("approval", "")
    assert "refused" not in _events(asking)

    refused = _ask(asking, asking.task(settings={"lora.rank": 65}))
    (line,) = [e for e in asking.open().audit.entries() if e.event == "refused"]
    assert refused.correlation_id == line.fields["correlation_id"] != ""


def test_a_declined_run_is_on_record(asking: Hospital) -> None:
    _ask(asking, _describe(asking))
    asking.open().decline("run-1")

    (line,) = [e for e in asking.open().audit.entries() if e.event == "declined"]
    assert line.fields == {"run": "run-1"}


@pytest.mark.parametrize(
    "settings",
    [
        {"model.name": "other"},
        {"train.local-steps": 10_001},
        {"data.max-length": 10**9},
        {"privacy.unit": "none"},
        {"privacy.target-epsilon": 50.0},
        {"privacy.target-delta": 1e-3},
        {"privacy.max-grad-norm": 1e9},
    ],
)
def test_a_description_is_refused_for_what_a_task_would_be_refused_for(
    hospital: Hospital, settings: dict[str, Any]
) -> None:
    for task in (hospital.task(settings=settings), _describe(hospital, settings=settings)):
        reply = _ask(hospital, task)
        assert (reply.error_code, dict(reply.numbers)) == ("policy", {})


def test_a_description_without_settings_is_held_against_the_policy_too(hospital: Hospital) -> None:
    assert _ask(hospital, _describe(hospital, config={})).error_code == "policy"


def test_to_too_high_a_rank_a_description_answers_with_the_highest(hospital: Hospital) -> None:
    """A task of that rank is refused; the coordinator, told so, asks for no more."""
    asked = {"lora.rank": 65, "lora.target-modules": "gate_proj"}

    reply = _ask(hospital, _describe(hospital, settings={"lora.rank": 65}))

    assert (reply.error_code, reply.numbers["max-rank"]) == ("", 64)
    assert _ask(hospital, hospital.task(settings=asked)).error_code == "policy"


def test_a_refusal_says_where_the_site_stands(hospital: Hospital) -> None:
    _ask(hospital, hospital.task(1))

    reply = _ask(hospital, hospital.task(2, settings={"lora.rank": 65}))

    site = hospital.open()
    assert reply.error_code == "policy"
    assert reply.heads == SiteHeads(site.ledger.head(), site.audit.head())
    assert [entry.event for entry in site.audit.entries()][-1] == "refused", "counted in"


def test_what_a_receipt_saw_is_remembered_against_a_later_restore(hospital: Hospital) -> None:
    last, _ = _restored(hospital)
    assert last.heads is not None
    ledger = hospital.folder / "state" / "ledger.sqlite"
    backup = ledger.read_bytes()
    assert hospital.open().last_seen() is None
    receipt = seal_receipt(Receipt("north", last.heads, (), 0), hospital.coordinator)
    hospital.open().settle(receipt)
    assert hospital.open().last_seen() == last.heads

    ledger.write_bytes(backup)

    # The coordinator says nothing of what it saw.
    assert _ask(hospital, hospital.task(3)).error_code == "restored"


def test_how_far_a_receipt_is_ahead_is_known_before_it_is_settled(hospital: Hospital) -> None:
    last, _ = _restored(hospital)
    assert last.heads is not None
    site = hospital.open()
    here = SiteHeads(site.ledger.head(), site.audit.head())
    receipt = seal_receipt(Receipt("north", last.heads, (), 0), hospital.coordinator)

    lag = site.lag(receipt)

    assert (lag.here, lag.seen, lag.stands) == (here, last.heads, False)
    # A task is charged and released; its lines are task, training and sent.
    assert lag.sentence() == (
        "The receipt is ahead of this ledger by 2 entries (4 were seen, 2 are here), of its audit log by "
        "3 lines (6 were seen, 3 are here); what was seen is not here any more."
    )
    assert SiteHeads(site.ledger.head(), site.audit.head()) == here
    site.settle(receipt)
    assert (
        site.lag(receipt).sentence().endswith("; both hold what was seen, or were settled since.")
    )
    assert "ahead of this ledger by 0 entries" in site.lag(receipt).sentence()
    forged = seal_receipt(Receipt("north", last.heads, (), 0), SigningKey.generate())
    with pytest.raises(SignatureError, match="does not hold"):
        site.lag(forged)


def test_a_settlement_that_is_only_in_the_ledger_settles_nothing(hospital: Hospital) -> None:
    """Whoever can write the ledger's file, but has no key, could otherwise make it forget."""
    last, _ = _restored(hospital)
    assert last.heads is not None
    receipt = Receipt("north", last.heads, (), 0)
    ledger = Ledger(hospital.folder / "state" / "ledger.sqlite")
    ledger.settle(receipt, dataset="notes", unit="record", delta=1e-5)
    assert ledger.covers(last.heads.ledger)
    assert _ask(hospital, hospital.task(3, seen=last.heads)).error_code == "restored"


def test_waiting_is_logged_once_though_every_message_is_a_new_process(asking: Hospital) -> None:
    for _ in range(3):
        _ask(asking, _describe(asking))
    assert _events(asking).count("waiting") == 1


def test_an_approved_run_can_still_be_declined(asking: Hospital) -> None:
    _ask(asking, _describe(asking))
    asking.open().approve("run-1")
    assert _ask(asking, asking.task(1)).error_code == ""
    asking.open().decline("run-1")
    assert _ask(asking, asking.task(2)).error_code == "policy"
