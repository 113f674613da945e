"""Who takes part: introductions, approvals, refusals, and how long anybody is waited for."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from common.errors import QuorumError
from common.records import Envelope, reply_to, seal_reply
from common.signing import SigningKey
from server.roster import Roster, RosterEntry
from tests.unit.fake_federation import (
    Behaviour,
    FakeClock,
    FakeSite,
    crashes,
    describe,
    honest,
    refuses,
    refuses_with,
    sends_garbage,
    silent,
)
from tests.unit.room import CURRENT, Room


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    return FakeClock().install(monkeypatch)


def _names(room: Room) -> list[str]:
    return [member.site for member in room.federation.gather()]


def test_sites_introduce_themselves_once(clock: FakeClock, tmp_path: Path) -> None:
    room = Room(clock, tmp_path, {"oslo": [honest], "bern": [honest]})
    assert _names(room) == ["bern", "oslo"]
    assert _names(room) == ["bern", "oslo"]
    assert [len(site.described) for site in room.sites.values()] == [1, 1]


def _signs_as(name: str) -> Behaviour:
    def introduce(site: FakeSite, task: Any, envelope: Envelope) -> Any:
        genuine = site.name
        site.name = name
        try:
            return describe(site, task, envelope)
        finally:
            site.name = genuine

    return introduce


@pytest.mark.parametrize(
    "introduction",
    [
        pytest.param(describe, id="enrolled name, unknown key"),
        pytest.param(_signs_as("oslo"), id="another site's name"),
        pytest.param(_signs_as("nobody"), id="unknown name"),
        pytest.param(silent, id="silent"),
        pytest.param(crashes, id="crashes"),
        pytest.param(sends_garbage, id="garbage"),
    ],
)
def test_who_cannot_prove_to_be_on_the_roster_is_no_member(
    clock: FakeClock, tmp_path: Path, introduction: Behaviour
) -> None:
    room = Room(clock, tmp_path, {"evil": [honest], "oslo": [honest], "bern": [honest]})
    room.sites["evil"].describes = [introduction]
    entries = [room.sites[name].entry for name in ("oslo", "bern")]
    roster = Roster([*entries, RosterEntry("evil", SigningKey.generate().public_hex, 100)])
    room.federation = room.open(roster)
    assert _names(room) == ["bern", "oslo"]
    room.federation.run_round(CURRENT, server_round=1)
    assert room.sites["evil"].tasks == []


def test_an_unverified_introduction_cannot_crash_the_run(clock: FakeClock, tmp_path: Path) -> None:
    """Numbers beyond every float, in a reply whose signature nobody has looked at yet."""

    def overflows(site: FakeSite, task: Any, envelope: Envelope) -> Envelope:
        sealed = describe(site, task, envelope)
        assert isinstance(sealed, Envelope)
        payload = sealed.payload.replace(b'"max-rank":4', b'"max-rank":{"float":"0x1p99999"}')
        assert payload != sealed.payload
        return Envelope(payload, sealed.signature)

    room = Room(clock, tmp_path, {"oslo": [honest], "bern": [honest], "evil": [honest]})
    room.sites["evil"].describes = [overflows]
    assert _names(room) == ["bern", "oslo"]


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        ({"declared_size": 1_000_000}, "declares another size than the 100"),
        ({"max_rank": 0}, "can hold rank 0"),
    ],
)
def test_numbers_other_than_those_enrolled_with_are_refused(
    clock: FakeClock, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    says: dict[str, int], reason: str,
) -> None:  # fmt: skip
    """A site could otherwise give itself any weight."""
    room = Room(clock, tmp_path, {"oslo": [honest], "bern": [honest], "greedy": [honest]})
    for name, value in says.items():
        setattr(room.sites["greedy"], name, value)
    with caplog.at_level(logging.WARNING, logger="server.gathering"):
        assert _names(room) == ["bern", "oslo"]
    assert reason in caplog.text


def test_waiting_for_sites_is_bounded_and_said_once(clock: FakeClock, tmp_path: Path) -> None:
    room = Room(clock, tmp_path, {"oslo": [honest]})
    with pytest.raises(QuorumError, match=r"1 of 2 sites came within 100 s \(oslo\)"):
        room.federation.gather()
    assert 1100.0 <= clock.now_s <= 1103.0
    assert [(e["present"], e["needed"]) for e in room.events("waiting")] == [(1, 2)]


def test_a_site_that_comes_later_is_waited_for(clock: FakeClock, tmp_path: Path) -> None:
    room = Room(clock, tmp_path, {"oslo": [honest], "bern": [honest]})
    room.grid.online = {2}
    wait = clock.sleep

    def bern_starts(seconds: float) -> None:
        wait(seconds)
        room.grid.online = {2, 3}

    clock.sleep = bern_starts  # type: ignore[method-assign]
    assert _names(room) == ["bern", "oslo"]
    assert clock.now_s < 1010.0


def test_a_node_that_is_silent_costs_a_short_grace_once_enough_sites_are_there(
    clock: FakeClock, tmp_path: Path
) -> None:
    room = Room(clock, tmp_path, {"oslo": [honest], "bern": [honest], "hangs": [honest]},
                **{"federation__join-timeout-s": 600.0})  # fmt: skip
    room.sites["hangs"].describes = [silent]
    assert _names(room) == ["bern", "oslo"]
    assert clock.now_s <= 1016.0
    # Later rounds ask it again, and do not wait for minutes either.
    assert _names(room) == ["bern", "oslo"]
    assert clock.now_s <= 1032.0


def test_a_site_on_a_new_node_is_asked_there(clock: FakeClock, tmp_path: Path) -> None:
    """A hospital restarted its SuperNode: same site, other node."""
    room = Room(clock, tmp_path, {"oslo": [honest], "bern": [honest]})
    room.federation.run_round(CURRENT, server_round=1)
    room.grid.handlers[9] = room.grid.handlers.pop(3)
    room.grid.online = {2, 9}
    replies = room.federation.run_round(CURRENT, server_round=2)
    assert [update.site for update in replies.updates] == ["bern", "oslo"]
    assert [member.node_id for member in room.federation.gather()] == [9, 2]


def test_a_site_whose_old_node_is_still_listed_is_asked_once_on_the_new_one(
    clock: FakeClock, tmp_path: Path
) -> None:
    """Flower lists a dead SuperNode until its heartbeat lapses."""
    room = Room(clock, tmp_path, {"oslo": [honest], "bern": [honest]})
    room.federation.gather()
    bern = room.grid.handlers[3]
    room.grid.handlers.update({3: lambda message: None, 9: bern})
    room.grid.online = {2, 3, 9}
    replies = room.federation.run_round(CURRENT, server_round=1)
    assert [update.site for update in replies.updates] == ["bern", "oslo"]
    asked = [m.metadata.dst_node_id for m in room.grid.pushed if m.metadata.message_type == "train"]
    assert sorted(asked) == [2, 9]


def test_a_site_that_left_is_not_asked(clock: FakeClock, tmp_path: Path) -> None:
    room = Room(clock, tmp_path, {"oslo": [honest], "bern": [honest], "kiel": [honest]})
    room.federation.run_round(CURRENT, server_round=1)
    room.grid.online = {2, 3}
    replies = room.federation.run_round(CURRENT, server_round=2)
    assert [update.site for update in replies.updates] == ["bern", "oslo"]
    assert dict(replies.refused) == {}
    assert clock.now_s == 1000.0


# What the question carries


def test_sites_are_asked_with_the_runs_own_settings(clock: FakeClock, tmp_path: Path) -> None:
    """So that a site can refuse, or ask its people, before anything is trained for the run."""
    room = Room(clock, tmp_path, {"oslo": [honest], "bern": [honest]})
    room.sites["oslo"].max_rank = 1
    room.federation.gather()
    (asked,) = room.sites["oslo"].described
    assert (asked.kind, asked.site, asked.server_round) == ("describe", "", 0)
    assert (asked.run_uid, asked.base_digest) == ("run-7", "base")
    assert {key.split(".")[0] for key in asked.config} == {
        "model", "lora", "data", "train", "privacy", "round",
    }  # fmt: skip
    room.federation.run_round(CURRENT, server_round=1)
    trained, cut = (room.sites[name].tasks[0].config for name in ("bern", "oslo"))
    assert asked.config == trained
    assert {**asked.config, "lora.rank": 1} == cut


# Approval


def _awaits_approval(room: Room, site: str, *, times: int) -> None:
    room.sites[site].describes = [*[refuses_with("approval")] * times, describe]


def test_a_site_that_awaits_approval_is_asked_every_ten_seconds_and_then_takes_part(
    clock: FakeClock, tmp_path: Path
) -> None:
    room = Room(clock, tmp_path, {"oslo": [honest], "bern": [honest]})
    _awaits_approval(room, "bern", times=40)
    assert _names(room) == ["bern", "oslo"]
    # 40 times in vain, 10 s apart: past the join timeout of 100 s.
    assert clock.now_s == pytest.approx(1400.0)
    assert len(room.sites["bern"].described) == 41
    assert len(room.sites["oslo"].described) == 1
    # Said once, not with every question.
    assert [event["site"] for event in room.events("approval")] == ["bern"]
    assert [line["site"] for line in room.lines("approval")] == ["bern"]
    assert [event["sites"] for event in room.events("sites")] == [["oslo"], ["bern", "oslo"]]
    assert len(room.lines("task")) == 1
    assert [line["error"] for line in room.lines("reply")] == ["", "approval", ""]
    assert room.events("refused") == []


def test_approval_is_waited_for_as_long_as_was_agreed_and_no_longer(
    clock: FakeClock, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"federation__approval-timeout-s": 5000.0}
    room = Room(clock, tmp_path, {"oslo": [honest], "bern": [honest]}, **settings)
    _awaits_approval(room, "bern", times=10_000)
    with pytest.raises(QuorumError, match=r"1 of 2 sites came within 5000 s \(oslo\); bern await"):
        room.federation.gather()
    assert 6000.0 <= clock.now_s <= 6011.0


def test_a_short_approval_timeout_does_not_shorten_the_wait_for_the_others(
    clock: FakeClock, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"federation__approval-timeout-s": 1.0}
    room = Room(clock, tmp_path, {"oslo": [honest], "bern": [honest]}, **settings)
    _awaits_approval(room, "bern", times=5)
    assert _names(room) == ["bern", "oslo"]


def test_once_it_declined_a_site_is_no_longer_waited_for(clock: FakeClock, tmp_path: Path) -> None:
    room = Room(clock, tmp_path, {"oslo": [honest], "bern": [honest]})
    room.sites["bern"].describes = [*[refuses_with("approval")] * 3, refuses]
    with pytest.raises(QuorumError, match=r"1 of the 2 sites .* \(bern: site-policy\)"):
        room.federation.gather()
    assert clock.now_s == pytest.approx(1030.0)


def test_a_silent_node_does_not_keep_who_awaits_approval_from_being_asked(
    clock: FakeClock, tmp_path: Path
) -> None:
    room = Room(clock, tmp_path, {"oslo": [honest], "bern": [honest], "hangs": [honest]},
                **{"federation__join-timeout-s": 600.0})  # fmt: skip
    room.sites["hangs"].describes = [silent]
    _awaits_approval(room, "bern", times=1)
    assert _names(room) == ["bern", "oslo"]
    assert clock.now_s <= 1050.0


def test_a_run_with_enough_sites_goes_ahead_and_takes_in_the_approved_later(
    clock: FakeClock, tmp_path: Path
) -> None:
    room = Room(clock, tmp_path, {"oslo": [honest], "bern": [honest], "kiel": [honest]})
    _awaits_approval(room, "kiel", times=2)
    assert _names(room) == ["bern", "oslo"]
    assert clock.now_s == 1000.0
    # Nor is it asked before its time.
    assert _names(room) == ["bern", "oslo"]
    assert len(room.sites["kiel"].described) == 1
    clock.sleep(10.0)
    assert _names(room) == ["bern", "oslo"]
    clock.sleep(10.0)
    assert _names(room) == ["bern", "kiel", "oslo"]


def test_a_task_that_needs_a_new_approval_sends_the_site_back_to_wait_for_it(
    clock: FakeClock, tmp_path: Path
) -> None:
    room = Room(clock, tmp_path, {"oslo": [honest], "bern": [refuses_with("approval"), honest]})
    room.sites["bern"].describes = [describe, *[refuses_with("approval")] * 30, describe]
    replies = room.federation.run_round(CURRENT, server_round=1)
    assert [update.site for update in replies.updates] == ["bern", "oslo"]
    assert replies.attempts == 2
    assert clock.now_s == pytest.approx(1300.0)


# Refusals for good


@pytest.mark.parametrize(
    "code", ["policy", "budget", "config", "privacy", "model", "data", "egress", "restored"]
)
def test_a_site_that_refuses_the_run_is_named_once_and_not_asked_again(
    clock: FakeClock, tmp_path: Path, code: str
) -> None:
    room = Room(clock, tmp_path, {"oslo": [honest], "bern": [honest], "kiel": [honest]})
    room.sites["kiel"].describes = [refuses_with(code), describe]
    for server_round in (1, 2):
        room.federation.run_round(CURRENT, server_round=server_round)
    assert len(room.sites["kiel"].described) == 1
    expected = [(0, "kiel", f"site-{code}")]
    for told in (room.events("refused"), room.lines("refused")):
        assert [(event["round"], event["site"], event["reason"]) for event in told] == expected


def test_when_too_many_refuse_the_run_stops_at_once_and_says_why(
    clock: FakeClock, tmp_path: Path
) -> None:
    scripts: dict[str, list[Behaviour]] = {name: [honest] for name in ("a", "b", "c", "d")}
    room = Room(clock, tmp_path, scripts, **{"federation__min-sites": 3})
    room.sites["b"].describes = [refuses_with("budget")]
    room.sites["d"].describes = [refuses_with("model")]
    with pytest.raises(
        QuorumError,
        match=r"2 of the 4 sites on the roster refused this run \(b: site-budget, d: site-model\), and "
        "it needs 3",
    ):
        room.federation.gather()
    assert clock.now_s == 1000.0


def test_sites_that_are_still_to_come_are_hoped_for(clock: FakeClock, tmp_path: Path) -> None:
    """One refused, one is not there yet: two are left, and two are needed."""
    room = Room(clock, tmp_path, {"oslo": [honest], "bern": [honest], "kiel": [honest]})
    room.sites["kiel"].describes = [refuses]
    room.grid.online = {2, 4}
    with pytest.raises(QuorumError, match=r"1 of 2 sites came within 100 s \(oslo\)"):
        room.federation.gather()


def test_a_site_that_refused_is_heard_on_a_new_node(clock: FakeClock, tmp_path: Path) -> None:
    """The hospital mended its site.toml and started anew."""
    room = Room(clock, tmp_path, {"oslo": [honest], "bern": [honest], "kiel": [honest]})
    room.sites["kiel"].describes = [refuses, describe]
    assert _names(room) == ["bern", "oslo"]
    room.grid.handlers[9] = room.grid.handlers.pop(4)
    room.grid.online = {2, 3, 9}
    assert _names(room) == ["bern", "kiel", "oslo"]
    assert {member.site: member.node_id for member in room.federation.gather()}["kiel"] == 9


def test_a_passing_failure_is_said_once_and_asked_again(clock: FakeClock, tmp_path: Path) -> None:
    room = Room(clock, tmp_path, {"oslo": [honest], "bern": [honest]})
    room.sites["bern"].describes = [*[refuses_with("internal")] * 4, describe]
    assert _names(room) == ["bern", "oslo"]
    assert clock.now_s == pytest.approx(1008.0)
    told = [(event["site"], event["reason"]) for event in room.events("refused")]
    assert told == [("bern", "site-internal")]


@pytest.mark.parametrize(
    ("answers", "reason"), [(sends_garbage, "protocol"), (crashes, "unanswered")]
)
def test_a_stranger_is_in_the_audit_log_once_by_its_node(
    clock: FakeClock, tmp_path: Path, answers: Behaviour, reason: str
) -> None:
    room = Room(clock, tmp_path, {"oslo": [honest], "bern": [honest], "evil": [honest]})
    room.sites["evil"].describes = [answers]
    for _ in range(3):
        assert _names(room) == ["bern", "oslo"]
    (refused,) = room.lines("refused")
    assert (refused["node"], refused["reason"], refused["round"]) == (4, reason, 0)
    assert room.events("refused") == []


def test_an_introduction_without_heads_is_none(clock: FakeClock, tmp_path: Path) -> None:
    def headless(site: FakeSite, task: Any, envelope: Envelope) -> Envelope:
        numbers = {"declared-size": site.declared_size, "max-rank": site.max_rank}
        return seal_reply(reply_to(task, site=site.name, numbers=numbers), site.key)

    room = Room(clock, tmp_path, {"oslo": [honest], "bern": [honest], "old": [honest]})
    room.sites["old"].describes = [headless]
    assert _names(room) == ["bern", "oslo"]
    assert [event["reason"] for event in room.events("refused")] == ["heads"]
