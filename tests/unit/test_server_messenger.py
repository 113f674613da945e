"""The coordinator's line to its nodes: bounded, patient, and deaf to what it did not ask for."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import cast

import httpx
import pytest
from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from common.errors import EngineError
from common.records import Envelope, Task, envelope_of, seal_task
from common.signing import SigningKey
from server.messenger import Messenger
from tests.unit.fake_federation import FakeClock, FakeGrid, empty_reply

KEY = SigningKey.generate()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    return FakeClock().install(monkeypatch)


def _tasks(*nodes: int, kind: str = "train") -> dict[int, tuple[Task, Envelope]]:
    tasks = {}
    for node in nodes:
        task = Task(kind, "run-7", f"site-{node}", 3, 1, 0)  # type: ignore[arg-type]
        tasks[node] = (task, seal_task(task, KEY))
    return tasks


def _grid(clock: FakeClock, *nodes: int, silent: tuple[int, ...] = ()) -> FakeGrid:
    handlers: dict[int, Callable[[Message], Message | None]] = dict.fromkeys(nodes, empty_reply)
    handlers.update(dict.fromkeys(silent, lambda message: None))
    return FakeGrid(handlers, clock=clock)


def _messenger(grid: FakeGrid, *, patience_s: float = 90.0) -> Messenger:
    return Messenger(cast(Grid, grid), patience_s=patience_s)


def _exchange(
    messenger: Messenger,
    tasks: dict[int, tuple[Task, Envelope]],
    *,
    deadline_s: float,
    stop_at: Callable[[], float] = lambda: math.inf,
) -> Iterator[tuple[int, Message]]:
    """Send, and yield the replies by node as they come."""
    messenger.send(tasks, ttl_s=deadline_s + 60)
    for answer in messenger.answers(deadline_s=deadline_s, stop_at=stop_at):
        assert answer.message is not None
        yield answer.sent.node_id, answer.message


def test_every_node_gets_its_own_task_once_and_answers_once(clock: FakeClock) -> None:
    grid = _grid(clock, 2, 3, 4)
    tasks = _tasks(2, 3, 4)
    replies = list(_exchange(_messenger(grid), tasks, deadline_s=10))
    assert [node for node, _ in replies] == [2, 3, 4]
    assert [message.metadata.src_node_id for _, message in replies] == [2, 3, 4]
    assert {m.metadata.dst_node_id: envelope_of(m) for m in grid.pushed} == {
        node: envelope for node, (_, envelope) in tasks.items()
    }
    assert clock.now_s == 1000.0


def test_a_message_is_held_by_nobody_once_it_was_taken(clock: FakeClock) -> None:
    """Each holds an adapter, and those that come together are judged one after the other."""
    messenger = _messenger(_grid(clock, 2, 3, 4))
    messenger.send(_tasks(2, 3, 4), ttl_s=70)
    taken: list[weakref.ref[Message]] = []
    for answer in messenger.answers(deadline_s=10):
        assert [message() for message in taken] == [None] * len(taken)
        assert answer.message is not None
        taken.append(weakref.ref(answer.message))
        del answer
    assert len(taken) == 3


@pytest.mark.parametrize("pull_threads", [0, 2])
def test_an_answer_came_when_it_was_pulled_not_when_its_turn_came(
    clock: FakeClock, pull_threads: int
) -> None:
    messenger = Messenger(cast(Grid, _grid(clock, 2, 3)), pull_threads=pull_threads)
    messenger.send(_tasks(2, 3), ttl_s=70)
    came_s = []
    for answer in messenger.answers(deadline_s=100):
        came_s.append(answer.arrived_s)
        clock.sleep(5.0)
    assert came_s == [1000.0, 1000.0]


def test_what_takes_long_to_fetch_has_come_when_it_is_here(clock: FakeClock) -> None:
    grid = _grid(clock, 2)
    pull = grid.pull_messages

    def slow_pull(message_ids: Iterable[str]) -> Iterable[Message]:
        clock.sleep(30.0)
        return pull(message_ids)

    grid.pull_messages = slow_pull  # type: ignore[method-assign]
    messenger = _messenger(grid)
    messenger.send(_tasks(2), ttl_s=70)
    assert [answer.arrived_s for answer in messenger.answers(deadline_s=100)] == [1030.0]


@pytest.mark.parametrize(
    ("kind", "message_type"), [("train", MessageType.TRAIN), ("describe", MessageType.QUERY)]
)
def test_the_kind_of_a_task_chooses_flowers_message_type(
    clock: FakeClock, kind: str, message_type: str
) -> None:
    grid = _grid(clock, 2)
    list(_exchange(_messenger(grid), _tasks(2, kind=kind), deadline_s=10))
    assert grid.pushed[0].metadata.message_type == message_type
    assert grid.pushed[0].metadata.ttl > 10


def test_replies_are_yielded_as_they_come_not_when_all_are_there(clock: FakeClock) -> None:
    grid = _grid(clock, 2, 3)
    grid.delay_s[2] = 50.0
    exchange = _exchange(_messenger(grid), _tasks(2, 3), deadline_s=100)
    assert next(exchange)[0] == 3
    assert clock.now_s == 1000.0
    assert next(exchange)[0] == 2
    assert clock.now_s >= 1050.0
    assert list(exchange) == []


def test_stops_at_the_deadline_when_a_node_is_silent(clock: FakeClock) -> None:
    grid = _grid(clock, 2, silent=(3,))
    replies = list(_exchange(_messenger(grid), _tasks(2, 3), deadline_s=20))
    assert [node for node, _ in replies] == [2]
    assert clock.now_s == pytest.approx(1020.0)


def test_a_reply_in_the_last_moment_still_counts_and_a_later_one_does_not(
    clock: FakeClock,
) -> None:
    grid = _grid(clock, 2, 3)
    grid.delay_s = {2: 20.0, 3: 20.1}
    replies = list(_exchange(_messenger(grid), _tasks(2, 3), deadline_s=20))
    assert [node for node, _ in replies] == [2]


def test_may_be_told_to_stop_before_the_deadline(clock: FakeClock) -> None:
    grid = _grid(clock, 2, silent=(3,))
    stop_at = [float("inf")]
    seen = []
    messenger = _messenger(grid)
    for node, _ in _exchange(messenger, _tasks(2, 3), deadline_s=300, stop_at=lambda: stop_at[0]):
        seen.append(node)
        stop_at[0] = clock.now_s + 15
    assert seen == [2]
    assert clock.now_s == pytest.approx(1015.0)


def test_nobody_to_ask_sends_nothing_and_waits_for_nothing(clock: FakeClock) -> None:
    grid = _grid(clock)
    assert list(_exchange(_messenger(grid), {}, deadline_s=20)) == []
    assert clock.now_s == 1000.0


def test_ignores_replies_it_did_not_ask_for(clock: FakeClock) -> None:
    """A reply to an earlier exchange, and one to no message at all."""
    grid = _grid(clock, 2)
    messenger = _messenger(grid)
    late = next(_exchange(messenger, _tasks(2), deadline_s=10))[1]
    stray = empty_reply(grid.pushed[0])
    stray.metadata.__dict__["_reply_to_message_id"] = "no such message"
    grid.uninvited = [late, stray]
    replies = list(_exchange(messenger, _tasks(2), deadline_s=10))
    assert [node for node, _ in replies] == [2]
    assert replies[0][1].metadata.reply_to_message_id == "m2"


def test_a_reply_delivered_twice_is_yielded_once(clock: FakeClock) -> None:
    grid = _grid(clock, 2, silent=(3,))
    exchange = _exchange(_messenger(grid), _tasks(2, 3), deadline_s=20)
    _, first = next(exchange)
    grid.uninvited = [first, first]
    assert list(exchange) == []


def test_a_node_that_flower_cannot_reach_is_not_waited_for(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower returns "" as the id of a message that it could not take."""
    grid = _grid(clock, 2, 3)
    push = grid.push_messages
    monkeypatch.setattr(
        grid, "push_messages", lambda messages: ["", *list(push(list(messages)[1:]))]
    )
    replies = list(_exchange(_messenger(grid), _tasks(2, 3), deadline_s=20))
    assert [node for node, _ in replies] == [3]
    assert clock.now_s == 1000.0


@pytest.mark.parametrize(
    "error",
    [
        httpx.ConnectError("refused"),
        httpx.ReadTimeout("slow"),
        httpx.HTTPStatusError(
            "500", request=httpx.Request("POST", "https://x"), response=httpx.Response(500)
        ),
    ],
    ids=["connect", "timeout", "status 500"],
)
def test_a_superlink_that_stumbles_is_asked_again(clock: FakeClock, error: Exception) -> None:
    grid = _grid(clock, 2, 3)
    messenger = _messenger(grid)
    grid.failures = [error] * 3
    assert messenger.node_ids() == [2, 3]
    # One failure in push, then one in pull.
    grid.failures = [error]
    exchange = _exchange(messenger, _tasks(2, 3), deadline_s=10)
    assert next(exchange)[0] == 2
    assert next(exchange)[0] == 3
    grid.failures = []
    grid.delay_s[2] = 1.0
    exchange = _exchange(messenger, _tasks(2), deadline_s=10)
    grid.clock.sleep(0)
    assert [node for node, _ in exchange] == [2]


def test_a_failed_pull_loses_no_reply(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = _grid(clock, 2)
    push = grid.push_messages

    def push_then_break(messages: list[Message]) -> list[str]:
        ids = list(push(messages))
        grid.failures = [httpx.ReadTimeout("slow")] * 2
        return ids

    monkeypatch.setattr(grid, "push_messages", push_then_break)
    assert [n for n, _ in _exchange(_messenger(grid), _tasks(2), deadline_s=60)] == [2]
    assert len(grid.pushed) == 1


def test_gives_up_on_a_superlink_that_stays_away(clock: FakeClock) -> None:
    grid = _grid(clock, 2)
    grid.failures = [httpx.ConnectError("refused")] * 1000
    with pytest.raises(EngineError, match="not answered for 60 s"):
        _messenger(grid, patience_s=60).node_ids()
    assert 1060.0 < clock.now_s <= 1071.0


def test_other_errors_are_not_retried(clock: FakeClock) -> None:
    grid = _grid(clock, 2)
    grid.failures = [ValueError("a bug")]
    with pytest.raises(ValueError, match="a bug"):
        _messenger(grid).node_ids()
    assert clock.now_s == 1000.0


class _HalfSentGrid(FakeGrid):
    """A grid that holds whoever fetches the reply of node 3, as Flower does while it is incomplete."""

    def __init__(self, whole: threading.Event) -> None:
        handlers: dict[int, Callable[[Message], Message | None]] = {2: empty_reply, 3: empty_reply}
        super().__init__(handlers, clock=FakeClock())
        self._whole = whole

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        if "m2" in message_ids:
            assert self._whole.wait(30.0)
        return super().pull_messages(message_ids)


def test_a_reply_that_is_half_there_holds_up_no_other() -> None:
    whole = threading.Event()
    messenger = Messenger(cast(Grid, _HalfSentGrid(whole)), pull_threads=2)
    messenger.send(_tasks(2, 3), ttl_s=60)
    answers = messenger.answers(deadline_s=20)
    assert next(answers).sent.node_id == 2
    assert not whole.is_set()
    whole.set()
    assert [answer.sent.node_id for answer in answers] == [3]


def test_nor_does_it_hold_up_the_deadline() -> None:
    whole = threading.Event()
    late: list[int] = []
    messenger = Messenger(
        cast(Grid, _HalfSentGrid(whole)),
        pull_threads=2,
        on_late=lambda sent: late.append(sent.node_id),
    )
    messenger.send(_tasks(2, 3), ttl_s=60)
    assert [answer.sent.node_id for answer in messenger.answers(deadline_s=4)] == [2]
    whole.set()
    for _ in range(20):
        messenger.send(_tasks(2), ttl_s=60)
        assert [answer.sent.node_id for answer in messenger.answers(deadline_s=20)] == [2]
    # An empty reply has content: it came too late, and is named.
    assert late == [3]


def test_a_reply_that_flower_cannot_read_is_that_nodes_own_trouble() -> None:
    """Flower checks length and hash of what a node sends, not that it is a message."""
    grid = _grid(FakeClock(), 2, 3)
    messenger = Messenger(cast(Grid, grid), pull_threads=1)
    messenger.send(_tasks(2, 3), ttl_s=60)
    grid.failures = [ValueError("no JSON")]
    answers = list(messenger.answers(deadline_s=20))
    assert sorted((a.sent.node_id, a.unreadable, a.message is None) for a in answers) == [
        (2, True, True), (3, False, False),
    ]  # fmt: skip


def test_a_superlink_that_stays_away_is_the_callers_trouble_from_any_thread() -> None:
    grid = _grid(FakeClock(), 2)
    messenger = Messenger(cast(Grid, grid), pull_threads=2, patience_s=0.0)
    messenger.send(_tasks(2), ttl_s=60)
    grid.failures = [httpx.ConnectError("refused")] * 100
    with pytest.raises(EngineError, match="has not answered"):
        list(messenger.answers(deadline_s=20))
