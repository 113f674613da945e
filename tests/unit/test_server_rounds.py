"""Rounds with sites that behave and sites that do not: real keys, real tasks, a scripted Grid."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.adapter import LoraPair, lora_scaling
from common.errors import QuorumError
from common.records import Envelope, Task, seal_reply
from common.signing import SigningKey
from server import open_round
from server.aggregation.types import leading_ranks
from server.roster import Roster
from server.rounds import Federation
from server.update_norm import update_norm
from tests.unit.adapters import assert_same_products, in_memory, random_adapter
from tests.unit.fake_federation import (
    Answer,
    Behaviour,
    FakeClock,
    FakeSite,
    crashes,
    empty_reply,
    honest,
    honest_reply,
    incoming,
    refuses,
    refuses_with,
    replays_first,
    sends_garbage,
    sends_nan,
    silent,
    trained,
    trains_but_is_late,
)
from tests.unit.room import CURRENT, Room


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    return FakeClock().install(monkeypatch)


# One round


def test_an_honest_round_brings_every_sites_update_by_name(
    clock: FakeClock, tmp_path: Path
) -> None:
    room = Room(clock, tmp_path, {"oslo": [honest], "bern": [honest]})
    replies = room.federation.run_round(CURRENT, server_round=3)
    assert [update.site for update in replies.updates] == ["bern", "oslo"]
    assert (replies.attempts, dict(replies.refused)) == (1, {})
    for update in replies.updates:
        assert_same_products(in_memory(update.adapter), trained(CURRENT))
    # Two adapters each way, and what seals them.
    assert replies.bytes_down > 2 * CURRENT.size_bytes
    assert replies.bytes_up > 2 * CURRENT.size_bytes
    assert [event["site"] for event in room.events("reply")] == ["bern", "oslo"]
    assert room.events("round-started")[0]["sites"] == ["bern", "oslo"]


def test_a_task_holds_what_the_site_needs_and_nothing_of_the_coordinators(
    clock: FakeClock, tmp_path: Path
) -> None:
    room = Room(clock, tmp_path, {"oslo": [honest], "bern": [honest]})
    room.federation.run_round(CURRENT, server_round=3)
    task = room.sites["oslo"].tasks[0]
    assert (task.kind, task.run_uid, task.site) == ("train", "run-7", "oslo")
    assert (task.server_round, task.attempt, task.base_digest) == (3, 1, "base")
    assert task.adapter_digest == CURRENT.digest()
    assert task.expires_at >= clock.time() + 60
    sections = {key.split(".")[0] for key in task.config}
    assert sections == {"model", "lora", "data", "train", "privacy", "round"}


@pytest.mark.parametrize(
    ("bad", "reason", "times"),
    [
        (silent, "silent", 1),
        # Its process may have died: it is asked again at once, federation.max-retries times.
        (crashes, "unanswered", 3),
        (sends_garbage, "signature", 1),
        (sends_nan, "not-finite", 1),
        (refuses, "site-policy", 1),
    ],
    ids=["silent", "crashes", "garbage", "nan", "refuses"],
)
def test_a_bad_site_is_refused_and_named_and_the_round_goes_on(
    clock: FakeClock, tmp_path: Path, bad: Behaviour, reason: str, times: int
) -> None:
    room = Room(clock, tmp_path, {"oslo": [honest], "evil": [bad], "bern": [honest]})
    replies = room.federation.run_round(CURRENT, server_round=1)
    assert [update.site for update in replies.updates] == ["bern", "oslo"]
    assert dict(replies.refused) == {"evil": reason}
    assert replies.attempts == 1
    refused = [(event["site"], event["reason"]) for event in room.events("refused")]
    assert refused == [("evil", reason)] * times
    assert [task.attempt for task in room.sites["evil"].tasks] == [*range(1, times + 1)]


def test_a_reply_in_anothers_name_counts_for_nobody(clock: FakeClock, tmp_path: Path) -> None:
    """zurich replays to its own task what oslo signed for oslo's."""

    def steals(site: FakeSite, task: Any, envelope: Envelope) -> Envelope:
        return room.sites["oslo"].sealed[0]

    room = Room(clock, tmp_path, {"oslo": [honest], "bern": [honest], "zurich": [steals]})
    replies = room.federation.run_round(CURRENT, server_round=1)
    assert [update.site for update in replies.updates] == ["bern", "oslo"]
    assert dict(replies.refused) == {"zurich": "signature"}


def test_a_message_without_an_envelope_is_refused(clock: FakeClock, tmp_path: Path) -> None:
    room = Room(clock, tmp_path, {"oslo": [honest], "bern": [honest], "evil": [honest]})
    room.federation.gather()
    room.grid.handlers[4] = empty_reply
    replies = room.federation.run_round(CURRENT, server_round=1)
    assert dict(replies.refused) == {"evil": "unanswered"}


def test_no_text_of_a_sites_own_reaches_the_history(clock: FakeClock, tmp_path: Path) -> None:
    room = Room(
        clock, tmp_path, {"oslo": [honest], "a": [refuses], "b": [crashes], "bern": [honest]}
    )
    room.federation.run_round(CURRENT, server_round=1)
    text = (tmp_path / "history.jsonl").read_text()
    assert "own words" not in text
    assert "own text" not in text


# Below quorum


def test_a_retry_asks_only_the_missing_the_very_same_task(clock: FakeClock, tmp_path: Path) -> None:
    room = Room(clock, tmp_path, {"oslo": [honest], "bern": [silent, crashes, honest]})
    replies = room.federation.run_round(CURRENT, server_round=1)
    assert [update.site for update in replies.updates] == ["bern", "oslo"]
    # Silent in the first; in the second it dies and is asked again at once.
    assert replies.attempts == 2
    # What was once refused and then made good is no longer refused.
    assert dict(replies.refused) == {}
    assert len(room.sites["oslo"].tasks) == 1
    asked = room.sites["bern"].tasks
    assert [task.attempt for task in asked] == [1, 2, 3]
    assert len({task.task_id for task in asked}) == 1
    assert asked[1].expires_at > asked[0].expires_at
    assert [event["attempt"] for event in room.events("retry")] == [1]
    again = [(event["site"], event["reason"]) for event in room.events("asked-again")]
    assert again == [("bern", "unanswered")]
    # Down: two adapters, then one and one more.
    assert replies.bytes_down > 4 * CURRENT.size_bytes


def test_below_quorum_after_all_retries_nothing_is_merged(clock: FakeClock, tmp_path: Path) -> None:
    room = Room(
        clock, tmp_path, {"oslo": [honest], "bern": [silent]}, **{"federation__max-retries": 2}
    )
    with pytest.raises(
        QuorumError,
        match=r"round 4 has 1 usable replies of the 2 it needs after 3 attempts \(bern: silent\)",
    ):
        room.federation.run_round(CURRENT, server_round=4)
    assert [task.attempt for task in room.sites["bern"].tasks] == [1, 2, 3]
    # Three deadlines and nothing more.
    assert clock.now_s == pytest.approx(1000.0 + 3 * 60.0)


def test_no_retries_means_one_attempt(clock: FakeClock, tmp_path: Path) -> None:
    room = Room(
        clock, tmp_path, {"oslo": [honest], "bern": [sends_nan]}, **{"federation__max-retries": 0}
    )
    with pytest.raises(QuorumError, match=r"after 1 attempts \(bern: not-finite\)"):
        room.federation.run_round(CURRENT, server_round=1)


def test_a_quorum_below_min_sites_is_enough(clock: FakeClock, tmp_path: Path) -> None:
    room = Room(clock, tmp_path, {"oslo": [honest], "bern": [silent]}, federation__quorum=1)
    replies = room.federation.run_round(CURRENT, server_round=1)
    assert [update.site for update in replies.updates] == ["oslo"]
    assert dict(replies.refused) == {"bern": "silent"}


@pytest.mark.parametrize(
    "code", ["policy", "budget", "config", "privacy", "model", "data", "egress", "restored"]
)
def test_a_site_whose_refusal_is_final_is_not_asked_again(
    clock: FakeClock, tmp_path: Path, code: str
) -> None:
    scripts: dict[str, list[Behaviour]] = {
        "oslo": [honest], "bern": [silent], "evil": [refuses_with(code)],
    }  # fmt: skip
    room = Room(clock, tmp_path, scripts, **{"federation__min-sites": 3})
    with pytest.raises(QuorumError, match=f"bern: silent, evil: site-{code}"):
        room.federation.run_round(CURRENT, server_round=1)
    assert len(room.sites["bern"].tasks) == 3
    assert len(room.sites["evil"].tasks) == 1


def test_a_refusal_is_final_for_its_round_only(clock: FakeClock, tmp_path: Path) -> None:
    room = Room(clock, tmp_path, {"oslo": [honest], "bern": [honest], "kiel": [refuses, honest]})
    room.federation.run_round(CURRENT, server_round=1)
    replies = room.federation.run_round(CURRENT, server_round=2)
    assert [update.site for update in replies.updates] == ["bern", "kiel", "oslo"]


def test_when_all_that_is_missing_refused_for_good_the_run_stops_at_once(
    clock: FakeClock, tmp_path: Path
) -> None:
    room = Room(clock, tmp_path, {"oslo": [honest], "bern": [refuses]})
    with pytest.raises(QuorumError, match=r"after 1 attempts \(bern: site-policy\)"):
        room.federation.run_round(CURRENT, server_round=1)
    assert clock.now_s == 1000.0


def test_a_site_that_failed_in_training_is_asked_again(clock: FakeClock, tmp_path: Path) -> None:
    room = Room(clock, tmp_path, {"oslo": [honest], "bern": [refuses_with("internal"), honest]})
    assert room.federation.run_round(CURRENT, server_round=1).attempts == 2


def test_a_reply_to_the_first_attempt_is_not_taken_in_the_second(
    clock: FakeClock, tmp_path: Path
) -> None:
    """Whether Flower delivers it late, or the site sends it again under the new message."""
    room = Room(clock, tmp_path, {"oslo": [honest], "bern": [trains_but_is_late, replays_first]})
    with pytest.raises(QuorumError, match=r"bern: signature"):
        room.federation.run_round(CURRENT, server_round=1)

    late = Room(clock, tmp_path, {"oslo": [honest], "bern": [honest, silent]})
    late.grid.delay_s = {3: 61.0}
    with pytest.raises(QuorumError, match=r"bern: silent"):
        late.federation.run_round(CURRENT, server_round=1)
    assert len(late.sites["bern"].sealed) == 1


def test_a_replay_of_an_earlier_round_is_refused(clock: FakeClock, tmp_path: Path) -> None:
    room = Room(clock, tmp_path, {"oslo": [honest], "bern": [honest, replays_first]})
    room.federation.run_round(CURRENT, server_round=1)
    with pytest.raises(QuorumError, match=r"bern: signature"):
        room.federation.run_round(CURRENT, server_round=2)


def test_a_resumed_run_asks_for_the_very_same_task(clock: FakeClock, tmp_path: Path) -> None:
    room = Room(clock, tmp_path, {"oslo": [honest], "bern": [honest]})
    room.federation.run_round(CURRENT, server_round=1)
    clock.sleep(3600)
    room.open().run_round(CURRENT, server_round=1)
    first, second = room.sites["oslo"].tasks
    assert first.task_id == second.task_id


# Who is asked


def test_selection_by_fraction_is_repeatable_and_differs_by_round(
    clock: FakeClock, tmp_path: Path
) -> None:
    scripts: dict[str, list[Behaviour]] = {f"site-{i}": [honest] for i in range(8)}
    room = Room(clock, tmp_path, scripts, federation__fraction=0.5)
    members = room.federation.gather()

    def draw(federation: Federation, server_round: int) -> list[str]:
        return [m.site for m in federation.select(members, server_round=server_round)]

    drawn = [draw(room.federation, server_round) for server_round in range(1, 30)]
    assert all(len(names) == 4 and names == sorted(names) for names in drawn)
    assert len({tuple(names) for names in drawn}) > 10
    assert {name for names in drawn for name in names} == set(scripts)
    again = room.open()
    assert [draw(again, server_round) for server_round in range(1, 30)] == drawn
    room.config = room.config.replace({"train.seed": 1})
    assert [draw(room.open(), server_round) for server_round in range(1, 30)] != drawn


def test_only_the_selected_are_asked(clock: FakeClock, tmp_path: Path) -> None:
    scripts: dict[str, list[Behaviour]] = {f"site-{i}": [honest] for i in range(6)}
    room = Room(clock, tmp_path, scripts, federation__fraction=0.5)
    replies = room.federation.run_round(CURRENT, server_round=1)
    asked = {name for name, site in room.sites.items() if site.tasks}
    assert len(asked) == 3
    assert {update.site for update in replies.updates} == asked


@pytest.mark.parametrize(("fraction", "count"), [(0.01, 2), (0.4, 2), (0.41, 3), (1.0, 5)])
def test_a_fraction_is_rounded_up_and_never_below_min_sites(
    clock: FakeClock, tmp_path: Path, fraction: float, count: int
) -> None:
    scripts: dict[str, list[Behaviour]] = {f"site-{i}": [honest] for i in range(5)}
    room = Room(clock, tmp_path, scripts, federation__fraction=fraction)
    assert len(room.federation.select(room.federation.gather(), server_round=1)) == count


# Mixed ranks


@pytest.mark.parametrize("use_rslora", [False, True])
def test_each_site_is_sent_the_rank_that_it_holds(
    clock: FakeClock, tmp_path: Path, use_rslora: bool
) -> None:
    room = Room(clock, tmp_path, {"small": [honest], "large": [honest]},
                **{"lora__use-rslora": use_rslora})  # fmt: skip
    room.sites["small"].max_rank = 1
    room.sites["large"].max_rank = 64
    scaling = lora_scaling(alpha=8.0, rank=4, use_rslora=use_rslora)
    current = random_adapter(0, rank=4, scaling=scaling)
    replies = room.federation.run_round(current, server_round=1)

    small_scaling = lora_scaling(alpha=8.0, rank=1, use_rslora=use_rslora)
    cut = leading_ranks(current, rank=1, scaling=small_scaling)
    (received,) = room.sites["small"].received
    assert received.digest() == cut.digest()
    assert room.sites["small"].tasks[0].config["lora.rank"] == 1
    assert room.sites["small"].tasks[0].adapter_digest == cut.digest()
    assert room.sites["large"].tasks[0].config["lora.rank"] == 4
    ranks = {
        u.site: (u.adapter.rank, u.adapter.scaling_of("model.q_proj")) for u in replies.updates
    }
    assert ranks == {"small": (1, small_scaling), "large": (4, scaling)}


def test_a_site_that_returns_another_rank_than_it_was_sent_is_refused(
    clock: FakeClock, tmp_path: Path
) -> None:
    def returns_more(site: FakeSite, task: Any, envelope: Envelope) -> Envelope:
        state = random_adapter(1, rank=4)
        return seal_reply(
            honest_reply(site.name, task, state), site.key, adapter=state.to_safetensors()
        )

    room = Room(clock, tmp_path, {"a": [honest], "b": [honest], "small": [returns_more]})
    room.sites["small"].max_rank = 1
    replies = room.federation.run_round(CURRENT, server_round=1)
    assert dict(replies.refused) == {"small": "adapter"}


# What is late, lost or shut out


def test_a_reply_after_the_deadline_is_named_and_counts_in_no_round(
    clock: FakeClock, tmp_path: Path
) -> None:
    scripts: dict[str, list[Behaviour]] = {"oslo": [honest], "bern": [honest], "kiel": [honest]}
    room = Room(clock, tmp_path, scripts)
    room.federation.gather()
    room.grid.delay_s = {4: 70.0}
    first = room.federation.run_round(CURRENT, server_round=1)
    room.grid.delay_s = {}
    clock.sleep(20.0)
    second = room.federation.run_round(CURRENT, server_round=2)

    assert dict(first.refused) == {"kiel": "silent"}
    assert [update.site for update in second.updates] == ["bern", "kiel", "oslo"]
    assert len(room.sites["kiel"].sealed) == 2
    (late,) = room.events("late")
    assert (late["round"], late["site"], late["attempt"]) == (1, "kiel", 1)
    assert [line["site"] for line in room.lines("late")] == ["kiel"]


@pytest.mark.parametrize(
    ("slow_s", "reason"), [(59.0, ""), (60.0, ""), (61.5, "expired"), (3600.0, "expired")]
)
def test_a_reply_that_is_taken_after_its_task_expired_is_refused(
    clock: FakeClock, tmp_path: Path, slow_s: float, reason: str
) -> None:
    """The SuperLink was away as the deadline passed: fetching the replies took that long."""
    room = Room(clock, tmp_path, {"oslo": [honest], "bern": [honest]}, federation__quorum=1,
                **{"federation__max-retries": 0})  # fmt: skip
    room.federation.gather()
    pull = room.grid.pull_messages

    def slow_pull(message_ids: Any) -> Any:
        arrived = list(pull(message_ids))
        clock.sleep(slow_s if arrived else 0.0)
        return arrived

    room.grid.pull_messages = slow_pull  # type: ignore[method-assign]
    if reason:
        with pytest.raises(QuorumError, match=r"\(bern: expired, oslo: expired\)"):
            room.federation.run_round(CURRENT, server_round=1)
        assert [line["reason"] for line in room.lines("refused")] == ["expired"] * 2
        assert room.events("reply") == []
    else:
        replies = room.federation.run_round(CURRENT, server_round=1)
        assert [update.site for update in replies.updates] == ["bern", "oslo"]


def test_a_reply_that_came_in_time_may_wait_for_its_turn(
    clock: FakeClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All three come in one pull, at once; the third is looked at 80 s later, 20 s after the deadline."""
    room = Room(clock, tmp_path, {"oslo": [honest], "bern": [honest], "kiel": [honest]},
                **{"federation__max-retries": 0})  # fmt: skip
    screen = open_round.screen_update

    def slow_screen(*arguments: Any, **named: Any) -> Any:
        clock.sleep(40.0)
        return screen(*arguments, **named)

    monkeypatch.setattr(open_round, "screen_update", slow_screen)
    replies = room.federation.run_round(CURRENT, server_round=1)

    assert [update.site for update in replies.updates] == ["bern", "kiel", "oslo"]
    assert dict(replies.refused) == {}


def test_a_second_reply_to_the_same_task_counts_for_nothing(
    clock: FakeClock, tmp_path: Path
) -> None:
    """Be it delivered twice, or made anew by a site that would like to count twice."""
    room = Room(clock, tmp_path, {"oslo": [honest], "bern": [honest], "kiel": [silent]})
    room.federation.gather()
    bern = room.grid.handlers[3]

    def twice(message: Any) -> Any:
        room.grid.uninvited.append(bern(message))
        return bern(message)

    room.grid.handlers[3] = twice
    replies = room.federation.run_round(CURRENT, server_round=1)
    assert [update.site for update in replies.updates] == ["bern", "oslo"]
    assert [event["site"] for event in room.events("reply")] == ["bern", "oslo"]
    trained = [line["site"] for line in room.lines("reply") if line["kind"] == "train"]
    assert trained == ["bern", "oslo"]
    assert len(list(room.incoming.iterdir())) == 2


def test_the_size_of_each_accepted_update_is_on_record(clock: FakeClock, tmp_path: Path) -> None:
    room = Room(clock, tmp_path, {"oslo": [honest], "bern": [honest]})
    replies = room.federation.run_round(CURRENT, server_round=1)
    norm = update_norm(trained(CURRENT), sent=CURRENT)
    assert [update.norm for update in replies.updates] == [norm, norm]
    assert [event["update_norm"] for event in room.events("reply")] == [float(f"{norm:.6g}")] * 2


def test_an_update_above_the_runs_limit_costs_its_site_the_round(
    clock: FakeClock, tmp_path: Path
) -> None:
    norm = update_norm(trained(CURRENT), sent=CURRENT)

    def far(site: FakeSite, task: Any, envelope: Envelope) -> Envelope:
        state = trained(trained(CURRENT))
        reply = honest_reply(site.name, task, state)
        return seal_reply(reply, site.key, adapter=state.to_safetensors())

    scripts: dict[str, list[Behaviour]] = {"oslo": [honest], "bern": [honest], "evil": [far]}
    room = Room(clock, tmp_path, scripts, **{"aggregation__max-update-norm": 1.01 * norm})
    replies = room.federation.run_round(CURRENT, server_round=1)
    assert [update.site for update in replies.updates] == ["bern", "oslo"]
    assert dict(replies.refused) == {"evil": "update-norm"}


@pytest.mark.parametrize("rank", [1, 4])
def test_the_frozen_factor_is_compared_with_what_that_site_was_sent(
    clock: FakeClock, tmp_path: Path, rank: int
) -> None:
    """A site of rank 1 was sent a cut, whose B is scaled anew, and not the global adapter."""

    def trains_b(site: FakeSite, task: Any, envelope: Envelope) -> Envelope:
        sent = incoming(task, envelope)
        pairs = {name: LoraPair(pair.A, pair.B + 1) for name, pair in sent.pairs.items()}
        state = replace(sent, pairs=pairs)
        reply = honest_reply(site.name, task, state)
        return seal_reply(reply, site.key, adapter=state.to_safetensors())

    scripts: dict[str, list[Behaviour]] = {"oslo": [trains_b], "bern": [trains_b], "evil": [honest]}
    room = Room(clock, tmp_path, scripts, **{"aggregation__method": "ffa"})
    for site in room.sites.values():
        site.max_rank = rank
    replies = room.federation.run_round(CURRENT, server_round=1)
    assert [update.site for update in replies.updates] == ["bern", "oslo"]
    assert dict(replies.refused) == {"evil": "frozen"}


def test_flowers_word_that_nothing_came_is_no_late_reply(clock: FakeClock, tmp_path: Path) -> None:
    room = Room(clock, tmp_path, {"oslo": [honest], "bern": [honest], "kiel": [crashes]})
    room.federation.gather()
    room.grid.delay_s = {4: 70.0}
    room.federation.run_round(CURRENT, server_round=1)
    clock.sleep(20.0)
    room.federation.run_round(CURRENT, server_round=2)
    assert room.events("late") == []


class _Restarts:
    """A node that is away for a while; with it went the message that it had taken in."""

    def __init__(self, room: Room, node: int, *, away_s: tuple[float, float]) -> None:
        self._grid, self._node, self._away_s = room.grid, node, away_s
        self._started_s = room.clock.now_s
        self._sleep = room.clock.sleep

    def sleep(self, seconds: float) -> None:
        self._sleep(seconds)
        since_s = self._grid.clock.now_s - self._started_s
        away = self._away_s[0] <= since_s < self._away_s[1]
        (self._grid.online.discard if away else self._grid.online.add)(self._node)


def test_a_site_whose_node_was_gone_is_asked_again_within_the_same_attempt(
    clock: FakeClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = Room(clock, tmp_path, {"oslo": [honest], "bern": [silent, honest]})
    room.federation.gather()
    monkeypatch.setattr(clock, "sleep", _Restarts(room, 3, away_s=(5.0, 20.0)).sleep)
    replies = room.federation.run_round(CURRENT, server_round=1)

    assert [update.site for update in replies.updates] == ["bern", "oslo"]
    assert replies.attempts == 1
    first, second = room.sites["bern"].tasks
    assert (first.task_id, first.attempt, second.attempt) == (second.task_id, 1, 2)
    # Nobody waits for it beyond the attempt's own end.
    assert abs(second.expires_at - first.expires_at) <= 1
    assert [event["reason"] for event in room.events("asked-again")] == ["lost"]
    assert room.events("refused") == []
    # Nobody waits for the first message any more.
    assert clock.now_s < 1030.0


def test_a_node_that_was_only_cut_off_is_believed_whichever_answer_comes_first(
    clock: FakeClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers the first message after all, and the second one too: one update, nothing late."""
    room = Room(clock, tmp_path, {"oslo": [honest], "bern": [honest]})
    room.federation.gather()
    room.grid.delay_s = {3: 30.0}
    monkeypatch.setattr(clock, "sleep", _Restarts(room, 3, away_s=(5.0, 20.0)).sleep)
    replies = room.federation.run_round(CURRENT, server_round=1)
    clock.sleep(40.0)
    room.grid.delay_s = {}
    room.federation.run_round(CURRENT, server_round=2)

    assert [update.site for update in replies.updates] == ["bern", "oslo"]
    assert len(room.sites["bern"].tasks) == 3
    assert [event["round"] for event in room.events("reply") if event["site"] == "bern"] == [1, 2]
    assert room.events("late") == []


def test_a_node_of_which_flower_says_that_it_is_gone_is_asked_when_it_is_back(
    clock: FakeClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower answers for a node that is not connected, at once and every time."""
    room = Room(clock, tmp_path, {"oslo": [honest], "bern": [crashes, honest]})
    room.federation.gather()
    room.grid.delay_s = {3: 8.0}
    monkeypatch.setattr(clock, "sleep", _Restarts(room, 3, away_s=(5.0, 20.0)).sleep)
    replies = room.federation.run_round(CURRENT, server_round=1)

    assert [update.site for update in replies.updates] == ["bern", "oslo"]
    assert replies.attempts == 1
    assert len(room.sites["bern"].tasks) == 2
    assert [event["reason"] for event in room.events("asked-again")] == ["lost"]
    assert room.events("refused") == []
    assert 1028.0 <= clock.now_s < 1035.0


def test_a_node_that_is_gone_for_good_costs_its_place_at_the_deadline(
    clock: FakeClock, tmp_path: Path
) -> None:
    scripts: dict[str, list[Behaviour]] = {"oslo": [honest], "bern": [honest], "kiel": [crashes]}
    room = Room(clock, tmp_path, scripts)
    room.federation.gather()

    def leave(message: Any) -> Any:
        room.grid.online.discard(4)
        return room.sites["kiel"](message)

    room.grid.handlers[4] = leave
    replies = room.federation.run_round(CURRENT, server_round=1)
    assert dict(replies.refused) == {"kiel": "silent"}
    assert len(room.sites["kiel"].tasks) == 1
    assert clock.now_s == pytest.approx(1060.0)


def test_a_node_that_keeps_dying_is_not_asked_for_ever(
    clock: FakeClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = Room(clock, tmp_path, {"oslo": [honest], "bern": [silent]}, federation__quorum=1)
    room.federation.gather()
    sleep = clock.sleep

    def blink(seconds: float) -> None:
        sleep(seconds)
        away = int(clock.now_s) % 10 < 5
        (room.grid.online.discard if away else room.grid.online.add)(3)

    monkeypatch.setattr(clock, "sleep", blink)
    replies = room.federation.run_round(CURRENT, server_round=1)
    assert dict(replies.refused) == {"bern": "silent"}
    assert len(room.sites["bern"].tasks) == 3
    assert clock.now_s <= 1061.0


def test_an_excluded_site_is_not_asked(clock: FakeClock, tmp_path: Path) -> None:
    room = Room(clock, tmp_path, {"oslo": [honest], "bern": [honest], "kiel": [honest]})
    room.exclusions.add("kiel", why="its data set is being corrected")
    replies = room.federation.run_round(CURRENT, server_round=1)
    assert [update.site for update in replies.updates] == ["bern", "oslo"]
    assert room.sites["kiel"].tasks == []
    room.exclusions.remove("kiel")
    replies = room.federation.run_round(CURRENT, server_round=2)
    assert [update.site for update in replies.updates] == ["bern", "kiel", "oslo"]
    assert [event["sites"] for event in room.events("excluded")] == [["kiel"], []]


def test_a_site_excluded_while_a_round_goes_is_neither_waited_for_nor_counted(
    clock: FakeClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kiel has answered before, lyon has yet to."""
    scripts: dict[str, list[Behaviour]] = {
        "oslo": [honest], "bern": [honest], "kiel": [honest], "lyon": [silent],
    }  # fmt: skip
    room = Room(clock, tmp_path, scripts)
    room.federation.gather()
    sleep = clock.sleep

    def then_exclude(seconds: float) -> None:
        sleep(seconds)
        if clock.now_s >= 1010.0:
            room.exclusions.add("kiel", why="withdrawn")
            room.exclusions.add("lyon", why="broken")

    monkeypatch.setattr(clock, "sleep", then_exclude)
    replies = room.federation.run_round(CURRENT, server_round=1)
    assert [update.site for update in replies.updates] == ["bern", "oslo"]
    assert dict(replies.refused) == {"kiel": "excluded", "lyon": "excluded"}
    assert clock.now_s < 1015.0


def test_a_site_revoked_while_a_round_goes_is_neither_waited_for_nor_counted(
    clock: FakeClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kiel has answered before, lyon has yet to; neither may come back in a later round."""
    scripts: dict[str, list[Behaviour]] = {
        "oslo": [honest], "bern": [honest], "kiel": [honest], "lyon": [silent, honest],
    }  # fmt: skip
    room = Room(clock, tmp_path, scripts)
    room.federation.gather()
    sleep = clock.sleep

    def then_revoke(seconds: float) -> None:
        sleep(seconds)
        if clock.now_s >= 1010.0:
            _leave_on_roster(room, "bern", "oslo")

    monkeypatch.setattr(clock, "sleep", then_revoke)
    replies = room.federation.run_round(CURRENT, server_round=1)
    assert [update.site for update in replies.updates] == ["bern", "oslo"]
    assert dict(replies.refused) == {"kiel": "revoked", "lyon": "revoked"}
    assert clock.now_s < 1015.0
    replies = room.federation.run_round(CURRENT, server_round=2)
    assert [update.site for update in replies.updates] == ["bern", "oslo"]
    assert len(room.sites["kiel"].tasks) == 1
    assert [event["sites"] for event in room.events("revoked")] == [["kiel", "lyon"]]


def test_a_signed_reply_of_a_revoked_key_is_not_accepted(clock: FakeClock, tmp_path: Path) -> None:
    """It is revoked in the very moment of its answer, before anybody looks at who was shut out."""

    def revoked_as_it_answers(site: FakeSite, task: Task, envelope: Envelope) -> Answer:
        _leave_on_roster(room, "bern", "oslo")
        return honest(site, task, envelope)

    scripts: dict[str, list[Behaviour]] = {
        "oslo": [honest], "bern": [honest], "kiel": [revoked_as_it_answers],
    }  # fmt: skip
    room = Room(clock, tmp_path, scripts)
    replies = room.federation.run_round(CURRENT, server_round=1)
    assert [update.site for update in replies.updates] == ["bern", "oslo"]
    assert replies.refused["kiel"] in ("unknown-site", "revoked")
    assert "kiel" not in [line["site"] for line in room.lines("reply") if line["kind"] == "train"]


def test_what_a_site_answered_with_its_old_keys_does_not_count_once_it_has_new_ones(
    clock: FakeClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below quorum the round is tried again, and meanwhile the keys were changed: they may be stolen."""
    scripts: dict[str, list[Behaviour]] = {
        "oslo": [honest], "bern": [silent, honest], "kiel": [honest, silent],
    }  # fmt: skip
    room = Room(clock, tmp_path, scripts, **{"federation__min-sites": 3, "federation__quorum": 3})
    room.federation.gather()
    _rotate_while_waiting(room, clock, monkeypatch)
    with pytest.raises(QuorumError, match="kiel: rotated"):
        room.federation.run_round(CURRENT, server_round=1)


def _rotate_while_waiting(room: Room, clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever the coordinator waits, kiel gets new keys."""
    sleep = clock.sleep

    def then_rotate(seconds: float) -> None:
        sleep(seconds)
        entries = [site.entry for site in room.sites.values() if site.name != "kiel"]
        new = replace(room.sites["kiel"].entry, public_key=SigningKey.generate().public_hex)
        Roster([*entries, new]).save(room.roster_file)

    monkeypatch.setattr(clock, "sleep", then_rotate)


def test_a_site_with_new_keys_is_not_waited_for_on_its_old_node(
    clock: FakeClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripts: dict[str, list[Behaviour]] = {"oslo": [honest], "bern": [honest], "kiel": [silent]}
    room = Room(clock, tmp_path, scripts)
    room.federation.gather()
    _rotate_while_waiting(room, clock, monkeypatch)
    replies = room.federation.run_round(CURRENT, server_round=1)
    assert dict(replies.refused) == {"kiel": "rotated"}
    assert clock.now_s < 1010.0


def _leave_on_roster(room: Room, *sites: str) -> None:
    Roster(room.sites[name].entry for name in sites).save(room.roster_file)


def test_when_too_few_are_left_after_an_exclusion_the_run_stops_at_once(
    clock: FakeClock, tmp_path: Path
) -> None:
    room = Room(clock, tmp_path, {"oslo": [honest], "bern": [honest]})
    room.exclusions.add("bern", why="withdrawn")
    with pytest.raises(
        QuorumError, match=r"1 of the 2 sites .* \(bern: excluded\), and it needs 2"
    ):
        room.federation.run_round(CURRENT, server_round=1)
    assert clock.now_s == 1000.0


def test_what_was_refused_at_once_is_tried_again_after_a_pause_that_grows(
    clock: FakeClock, tmp_path: Path
) -> None:
    """A full disk, say: three requests within a second would find it as full."""
    room = Room(clock, tmp_path, {"oslo": [honest], "bern": [refuses_with("disk")]})
    with pytest.raises(QuorumError, match=r"after 3 attempts \(bern: site-disk\)"):
        room.federation.run_round(CURRENT, server_round=1)
    assert clock.now_s == pytest.approx(1000.0 + 5.0 + 10.0)


def test_sites_join_and_leave_between_rounds(clock: FakeClock, tmp_path: Path) -> None:
    room = Room(clock, tmp_path, {"oslo": [honest], "bern": [honest], "kiel": [honest]})
    room.grid.online = {2, 3}
    asked = []
    for server_round, online in ((1, {2, 3}), (2, {2, 3, 4}), (3, {3, 4})):
        room.grid.online = online
        replies = room.federation.run_round(CURRENT, server_round=server_round)
        asked.append([update.site for update in replies.updates])
    assert asked == [["bern", "oslo"], ["bern", "kiel", "oslo"], ["bern", "kiel"]]
    assert [event["sites"] for event in room.events("round-started")] == asked


@pytest.mark.parametrize("hours", [-3, 3])
def test_a_clock_that_jumps_in_the_middle_of_a_round_moves_no_deadline(
    clock: FakeClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    room = Room(clock, tmp_path, {"oslo": [honest], "bern": [silent]}, federation__quorum=1)
    room.federation.gather()
    clock_time = clock.time

    def jumped() -> float:
        return clock_time() + (3600 * hours if clock.now_s > 1010.0 else 0)

    monkeypatch.setattr(clock, "time", jumped)
    replies = room.federation.run_round(CURRENT, server_round=1)
    assert [update.site for update in replies.updates] == ["oslo"]
    assert clock.now_s == pytest.approx(1060.0)


def test_a_site_whose_clock_is_ahead_is_named_with_the_remedy(
    clock: FakeClock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scripts: dict[str, list[Behaviour]] = {
        "oslo": [honest], "bern": [honest], "kiel": [refuses_with("expired")],
    }  # fmt: skip
    replies = Room(clock, tmp_path, scripts).federation.run_round(CURRENT, server_round=1)
    assert dict(replies.refused) == {"kiel": "site-expired"}
    assert "set both clocks, or raise federation.deadline-s" in caplog.text


def test_who_refuses_for_good_leaves_its_place_to_another(clock: FakeClock, tmp_path: Path) -> None:
    scripts: dict[str, list[Behaviour]] = {f"site-{i}": [honest] for i in range(5)}
    room = Room(clock, tmp_path, scripts, federation__fraction=0.4)
    drawn = room.federation.select(room.federation.gather(), server_round=1)
    unwilling = drawn[0].site
    room.sites[unwilling].script = [refuses_with("budget")]
    replies = room.federation.run_round(CURRENT, server_round=1)
    assert len(replies.updates) == 2
    assert dict(replies.refused) == {unwilling: "site-budget"}
    assert len(room.sites[unwilling].tasks) == 1
