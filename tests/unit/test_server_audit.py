"""The coordinator's audit log: all that was asked and answered, and where each site stood."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from common.audit_log import read_audit_log, verify_audit_log
from common.chain import ChainHead
from common.config import RunConfig
from common.records import Envelope, SiteHeads, Task, TaskKind, reply_to, seal_reply
from server.audit import CoordinatorAudit
from tests.unit.fake_federation import (
    Behaviour,
    FakeClock,
    FakeSite,
    honest,
    honest_reply,
    incoming,
    refuses_with,
    sends_nan,
    silent,
    trained,
)
from tests.unit.room import CURRENT, KEY, Room


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    return FakeClock().install(monkeypatch)


def _room(clock: FakeClock, folder: Path, *bern: Behaviour, **settings: Any) -> Room:
    """oslo, which is honest, and bern, which does what it is told to; one usable reply is enough."""
    scripts: dict[str, list[Behaviour]] = {"oslo": [honest], "bern": list(bern) or [honest]}
    return Room(clock, folder, scripts, **{"federation__quorum": 1, **settings})


def _trains(room: Room, server_round: int = 1) -> None:
    room.federation.run_round(CURRENT, server_round=server_round)


# What is written down


def test_every_task_is_written_down_with_its_digest_before_it_leaves(
    clock: FakeClock, tmp_path: Path
) -> None:
    known: list[bool] = []

    def watches(site: FakeSite, task: Task, envelope: Envelope) -> Any:
        known.append(task.sha256 in {line["task"] for line in room.lines("task")})
        return honest(site, task, envelope)

    room = _room(clock, tmp_path, watches)
    _trains(room)
    assert known == [True]
    (task,) = room.sites["bern"].tasks
    (line,) = [line for line in room.lines("task") if line["site"] == "bern"]
    assert line == {
        "run": "run-7",
        "round": 1,
        "attempt": 1,
        "kind": "train",
        "site": "bern",
        "task_id": task.task_id,
        "task": task.sha256,
        "adapter": CURRENT.digest(),
        "charge": {
            "unit": "record",
            "noise_multiplier": "auto",
            # batch-size 16 of declared-size 100; 20 local steps in each of 5 rounds.
            "sample_rate": 0.16,
            "steps": 20,
            "planned_steps": 100,
            "target_epsilon": 8.0,
            "target_delta": 1e-5,
            "accountant": "prv",
        },
    }


def test_a_task_carries_the_head_that_its_own_line_follows(
    clock: FakeClock, tmp_path: Path
) -> None:
    room = _room(clock, tmp_path, silent, silent, honest, federation__quorum=2)
    room.audit.note("run-started")
    _trains(room)
    before = {
        entry.fields["task"]: entry.head_before
        for entry in read_audit_log(room.audit.path)
        if entry.event == "task"
    }
    tasks = [task for site in room.sites.values() for task in [*site.described, *site.tasks]]
    assert len(tasks) == 6
    for task in tasks:
        assert task.audit_head == before[task.sha256]
    # What the sites keep of their tasks anchors the log.
    anchors = [task.audit_head for task in tasks]
    verified = verify_audit_log(room.audit.path, public_hex=KEY.public_hex, anchors=anchors)
    assert verified.anchors == len(set(anchors)) == 5


def test_a_reply_is_written_down_with_all_that_the_site_signed(
    clock: FakeClock, tmp_path: Path
) -> None:
    room = _room(clock, tmp_path)
    _trains(room)
    site = room.sites["bern"]
    (line,) = [x for x in room.lines("reply") if (x["site"], x["kind"]) == ("bern", "train")]
    reply = honest_reply("bern", site.tasks[0], trained(CURRENT), heads=site.heads)
    assert line == {
        "run": "run-7",
        "round": 1,
        "attempt": 1,
        "kind": "train",
        "site": "bern",
        "task_id": site.tasks[0].task_id,
        "task": site.tasks[0].sha256,
        "adapter": trained(CURRENT).digest(),
        "bytes": site.sealed[0].size_bytes,
        "error": "",
        "correlation_id": "",
        "heads": asdict(site.heads),
        "privacy": asdict(reply.privacy) if reply.privacy else None,
        "numbers": {"steps": 3},
    }


def test_what_was_refused_is_written_down_with_its_reason(clock: FakeClock, tmp_path: Path) -> None:
    """A site's own error and a bad adapter, both signed: the reply is there as well."""
    room = _room(clock, tmp_path, refuses_with("training"), sends_nan, silent)
    for server_round in (1, 2, 3):
        _trains(room, server_round)
    refused = [(line["round"], line["site"], line["reason"]) for line in room.lines("refused")]
    assert refused == [
        (1, "bern", "site-training"),
        (2, "bern", "not-finite"),
        (3, "bern", "silent"),
    ]
    replies = [line for line in room.lines("reply") if line["site"] == "bern"]
    assert [(line["round"], line["error"]) for line in replies[1:]] == [(1, "training"), (2, "")]
    assert replies[1]["correlation_id"] == "abc123"


def test_a_reply_that_nobody_signed_is_no_reply(clock: FakeClock, tmp_path: Path) -> None:
    def forged(site: FakeSite, task: Task, envelope: Envelope) -> Envelope:
        return replace(seal_reply(reply_to(task, site=site.name), site.key), signature=b"x" * 64)

    room = _room(clock, tmp_path, forged)
    _trains(room)
    assert [line["kind"] for line in room.lines("reply") if line["site"] == "bern"] == ["describe"]
    assert [line["reason"] for line in room.lines("refused")] == ["signature"]


def test_without_protection_the_charge_says_so(clock: FakeClock, tmp_path: Path) -> None:
    room = _room(clock, tmp_path, **{"privacy__unit": "none"})
    room.federation.gather()
    room.audit.task_sent(
        Task("train", "run-7", "bern", 1, 1, 0, config=room.config.for_sites()),
        declared_size=100,
    )
    charge = room.lines("task")[-1]["charge"]
    assert (charge["unit"], charge["noise_multiplier"], charge["sample_rate"]) == ("none", 0.0, 1.0)


def test_noise_that_the_run_fixes_is_the_charges_own(tmp_path: Path) -> None:
    audit = CoordinatorAudit(tmp_path, KEY)
    config = RunConfig.parse({"privacy.noise-multiplier": 1.5, "train.batch-size": 64})
    task = Task("train", "run-7", "bern", 1, 1, 0, config=config.for_sites())
    audit.task_sent(task, declared_size=50)
    (entry,) = read_audit_log(audit.path)
    # A batch larger than the data set takes every record.
    assert entry.fields["charge"]["noise_multiplier"] == 1.5
    assert entry.fields["charge"]["sample_rate"] == 1.0


@pytest.mark.parametrize(
    ("event", "signed"),
    [("merged", True), ("stopped", True), ("finished", True), ("run-started", False)],
)
def test_what_settles_something_is_signed_at_once(tmp_path: Path, event: str, signed: bool) -> None:
    audit = CoordinatorAudit(tmp_path, KEY)
    audit.note(event, run="run-7")
    events = [entry.event for entry in read_audit_log(audit.path)]
    assert events == ([event, "checkpoint"] if signed else [event])


# Where a site was last seen


def test_a_task_tells_the_site_where_it_was_last_seen(clock: FakeClock, tmp_path: Path) -> None:
    room = _room(clock, tmp_path)
    site = room.sites["bern"]
    room.federation.gather()
    introduced = site.heads
    _trains(room, 1)
    after_first = site.heads
    _trains(room, 2)
    assert [task.seen for task in site.tasks] == [introduced, after_first]
    assert after_first.ledger.count == 2
    # Nobody knows yet whom a describe will reach.
    assert [task.seen for task in site.described] == [None]


def test_another_run_of_the_same_coordinator_remembers(clock: FakeClock, tmp_path: Path) -> None:
    room = _room(clock, tmp_path)
    _trains(room)
    site = room.sites["bern"]
    seen = site.heads
    room.audit = CoordinatorAudit(tmp_path / "coordinator", KEY)
    room.open().run_round(CURRENT, server_round=1)
    # It introduced itself anew meanwhile, and that is no finished task.
    assert len(site.described) == 2
    assert site.tasks[1].seen == seen


def test_two_coordinators_at_once_know_what_each_has_seen(tmp_path: Path) -> None:
    one, two = CoordinatorAudit(tmp_path, KEY), CoordinatorAudit(tmp_path, KEY)
    heads = _heads(4, 9)
    _reply(one, heads)
    assert two.seen() == {"bern": heads}


TASK = Task("train", "run-7", "bern", 1, 1, 2_000_000_000, config=RunConfig().for_sites())


def _heads(ledger: int, audit: int, *, fork: str = "") -> SiteHeads:
    """Heads of so many entries; a fork of a history has other digests."""
    digest = ("ab" if not fork else "cd") * 32
    return SiteHeads(ChainHead(ledger, digest), ChainHead(audit, digest))


def _reply(
    audit: CoordinatorAudit, heads: SiteHeads | None, *, kind: TaskKind = "train", error: str = "",
    seen: SiteHeads | None = None,
) -> None:  # fmt: skip
    task = replace(TASK, kind=kind, seen=seen)
    reply = reply_to(task, site="bern", heads=heads, error_code=error)
    audit.replied(reply, task=task, size_bytes=1, seen=seen)


def test_only_a_finished_task_moves_where_a_site_was_last_seen(tmp_path: Path) -> None:
    """A site restored to entry 30 that then wrote many lines is not past entry 40: it lost some."""
    audit = CoordinatorAudit(tmp_path, KEY)
    first, finished, regrown = _heads(0, 3), _heads(40, 100), _heads(45, 150, fork="restored")
    _reply(audit, first, kind="describe")
    assert audit.seen() == {"bern": first}
    _reply(audit, finished)
    assert audit.seen() == {"bern": finished}
    _reply(audit, regrown, kind="describe")
    _reply(audit, regrown, error="restored")
    _reply(audit, None, error="internal")
    assert audit.seen() == {"bern": finished}
    _reply(audit, _heads(46, 151))
    assert audit.seen() == {"bern": _heads(46, 151)}


def test_replies_that_two_runs_hear_out_of_order_do_not_set_a_site_back(tmp_path: Path) -> None:
    audit = CoordinatorAudit(tmp_path, KEY)
    _reply(audit, _heads(6, 20))
    _reply(audit, _heads(4, 15))
    assert audit.seen() == {"bern": _heads(6, 20)}


def test_an_error_before_anything_else_is_no_sight_of_a_site(tmp_path: Path) -> None:
    audit = CoordinatorAudit(tmp_path, KEY)
    _reply(audit, _heads(4, 9), error="policy")
    assert audit.seen() == {}


# Restored from a backup


@pytest.mark.parametrize(
    ("now", "behind"),
    [
        (_heads(40, 100), False),
        (_heads(41, 101), False),
        (_heads(39, 101), True),
        (_heads(41, 99), True),
        (_heads(40, 101, fork="of the ledger"), True),
        (_heads(41, 100, fork="of the log"), True),
    ],
)
def test_heads_behind_those_seen_are_said_in_words_and_written_down(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, now: SiteHeads, behind: bool
) -> None:
    audit = CoordinatorAudit(tmp_path, KEY)
    with caplog.at_level(logging.WARNING, logger="server.audit"):
        _reply(audit, now, seen=_heads(40, 100))
    assert ("bern was restored from a backup" in caplog.text) == behind
    assert (f"consilium server receipt bern {tmp_path}" in caplog.text) == behind
    lines = [entry.fields for entry in read_audit_log(audit.path) if entry.event == "behind"]
    assert len(lines) == behind
    for line in lines:
        assert (line["heads"], line["seen"]) == (asdict(now), asdict(_heads(40, 100)))


def test_a_restored_site_is_noticed_when_it_introduces_itself_and_when_it_refuses(
    clock: FakeClock, tmp_path: Path
) -> None:
    room = _room(clock, tmp_path)
    site = room.sites["bern"]
    _trains(room, 1)
    backup = site.heads
    _trains(room, 2)
    lost = site.heads
    site.heads = backup
    site.script = [refuses_with("restored")]
    room.open().run_round(CURRENT, server_round=3)
    assert site.tasks[-1].seen == lost
    lines = room.lines("behind")
    assert [(line["site"], line["round"]) for line in lines] == [("bern", 0), ("bern", 3)]
    assert all(line["seen"] == asdict(lost) for line in lines)
    assert room.lines("refused")[-1]["reason"] == "site-restored"


def test_after_a_receipt_a_shorter_log_is_expected_and_a_shorter_ledger_is_not(
    tmp_path: Path,
) -> None:
    seen = _heads(40, 100)
    for audit in (CoordinatorAudit(tmp_path, KEY), CoordinatorAudit(tmp_path, KEY)):
        audit.note("receipt", site="bern", heads=asdict(seen), charges=3)
        _reply(audit, _heads(44, 90), seen=seen)
        assert [e for e in read_audit_log(audit.path) if e.event == "behind"] == []
        # And the log that goes on from there is the one that counts now.
        assert audit.seen() == {"bern": _heads(44, 90)}
    _reply(audit, _heads(39, 91), seen=seen)
    assert len([e for e in read_audit_log(audit.path) if e.event == "behind"]) == 1


def test_an_update_without_heads_is_refused(clock: FakeClock, tmp_path: Path) -> None:
    def headless(site: FakeSite, task: Task, envelope: Envelope) -> Envelope:
        state = trained(incoming(task, envelope))
        reply = replace(honest_reply(site.name, task, state), heads=None)
        return seal_reply(reply, site.key, adapter=state.to_safetensors())

    room = _room(clock, tmp_path, headless)
    _trains(room)
    assert [line["reason"] for line in room.lines("refused")] == ["heads"]
