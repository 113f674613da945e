"""Sending tasks to nodes and collecting what comes back, on any Flower Grid.

Bounded in time, and patient with a SuperLink that answers HTTP 500 under load or is restarting. What a
SuperNode has taken in is lost when it dies, and Flower tells nobody: a node that was gone and is there
again is reported, so that it can be asked once more.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TypeVar

import httpx
from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from common.errors import ConsiliumError, EngineError
from common.records import Envelope, Task, to_records

logger = logging.getLogger(__name__)

_MESSAGE_TYPES = {
    "describe": MessageType.QUERY,
    "train": MessageType.TRAIN,
    "evaluate": MessageType.EVALUATE,
}
# The pause between two looks: a share of the time waited so far, so that a short round is not made longer by
# it, nor the SuperLink kept busy in a long one.
_POLL_S, _MAX_POLL_S = 0.2, 2.0
_POLL_SHARE = 0.03
# So long the others wait for one that takes its time to arrive.
_FETCH_S = 1.0
# A SuperNode takes a few seconds from its start to its first question: shorter gaps are none.
_LOOK_AT_NODES_S = 3.0
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Sent:
    """A task that a node was sent. until_s: when Flower forgets it (time.monotonic)."""

    node_id: int
    task: Task
    until_s: float


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a task that was sent: a message, or None when its node was gone and came back.

    arrived_s: when the message was here whole, or that there is none was seen (time.monotonic).
    unreadable: a reply came, and Flower could not make a message of it.
    """

    sent: Sent
    message: Message | None
    arrived_s: float
    unreadable: bool = False


# A message, and when it was here whole (time.monotonic).
_Pulled = tuple[Message, float]


def _ignore(sent: Sent) -> None:
    pass


class Messenger:
    """One coordinator's line to its nodes.

    patience_s: how long the SuperLink may be away. on_late: is told of every reply that came when nobody
    waited for it any more. pull_threads: replies that are fetched at a time. With 0 the caller's own thread
    does it, which then waits three minutes for the rest of a reply whose SuperNode died while sending it:
    so long Flower holds the door open.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        patience_s: float = 90.0,
        on_late: Callable[[Sent], None] = _ignore,
        pull_threads: int = 0,
    ) -> None:
        self._grid = grid
        self._patience_s = patience_s
        self._on_late = on_late
        # By Flower's message id.
        self._waiting: dict[str, Sent] = {}
        self._given_up: dict[str, Sent] = {}
        # By node: who is gone and has nothing to answer any more, but may come back.
        self._awaited: dict[int, Sent] = {}
        self._pool = ThreadPoolExecutor(pull_threads, "pull") if pull_threads else None
        self._unreadable: set[str] = set()
        # By message id: what is being fetched.
        self._fetching: dict[str, Future[list[_Pulled]]] = {}

    def node_ids(self) -> list[int]:
        """Return the nodes that are connected now, sorted."""
        return self._patiently(lambda: sorted(self._grid.get_node_ids()))

    def send(self, tasks: Mapping[int, tuple[Task, Envelope]], *, ttl_s: float) -> list[Sent]:
        """Send one task to each node; `answers` then brings what becomes of them.

        tasks: node id -> the task and its sealed envelope. ttl_s: how long Flower keeps a message.
        Returns those that Flower took; a node that it cannot reach is left out.
        """
        messages = [
            Message(
                content=to_records(envelope),
                dst_node_id=node,
                message_type=_MESSAGE_TYPES[task.kind],
                group_id=str(task.server_round),
                ttl=ttl_s,
            )
            for node, (task, envelope) in tasks.items()
        ]
        if not messages:
            return []
        ids = self._patiently(lambda: list(self._grid.push_messages(messages)))
        until_s = time.monotonic() + ttl_s
        taken = {
            message_id: Sent(node, task, until_s)
            for message_id, (node, (task, _)) in zip(ids, tasks.items(), strict=True)
            if message_id
        }
        self._waiting.update(taken)
        return list(taken.values())

    def answers(
        self, *, deadline_s: float, stop_at: Callable[[], float] = lambda: math.inf
    ) -> Iterator[Answer]:
        """Yield what becomes of the tasks that were sent, until none is left or the deadline.

        The caller may send more meanwhile, and `forget` some. A message is yielded once; that a node was
        gone is yielded each time, and its message still counts if it comes after all.
        deadline_s: from now. stop_at: an earlier end (time.monotonic) that the caller may set while it
        waits. What is not answered then is given up: should it come later, `on_late` hears of it.
        """
        began = time.monotonic()
        deadline = began + deadline_s
        gone: set[int] = set()
        look_at_s = began + _LOOK_AT_NODES_S
        try:
            while self._waiting or self._awaited:
                arrived = self._pull()
                anything_came = bool(arrived)
                yield from self._take(arrived)
                yield from self._take_unreadable()
                left_s = min(deadline, stop_at()) - time.monotonic()
                if not (self._waiting or self._awaited) or left_s <= 0:
                    return
                if time.monotonic() >= look_at_s:
                    yield from self._returned(gone)
                    look_at_s = time.monotonic() + _LOOK_AT_NODES_S
                if not anything_came:
                    pause_s = max(_POLL_S, _POLL_SHARE * (time.monotonic() - began))
                    time.sleep(max(0.0, min(pause_s, _MAX_POLL_S, left_s)))
        finally:
            self._given_up.update(self._waiting)
            self._waiting.clear()
            self._awaited.clear()

    def await_return(self, sent: Sent) -> bool:
        """Let `answers` go on until a node that is gone comes back; False if it is there.

        For a task of which Flower has said that its node could not answer it.
        """
        if sent.node_id in self.node_ids():
            return False
        self._awaited[sent.node_id] = sent
        return True

    def forget(self, node_id: int) -> None:
        """Wait no longer for what a node was sent."""
        self._awaited.pop(node_id, None)
        for message_id, sent in list(self._waiting.items()):
            if sent.node_id == node_id:
                self._given_up[message_id] = self._waiting.pop(message_id)

    def _take(self, arrived: list[_Pulled]) -> Iterator[Answer]:
        """Empty `arrived`: a message holds a whole adapter, which nobody may hold once it was taken."""
        arrived.reverse()
        while arrived:
            message, arrived_s = arrived.pop()
            message_id = message.metadata.reply_to_message_id
            sent = self._waiting.pop(message_id, None)
            if sent is not None:
                yield Answer(sent, message, arrived_s)
                continue
            late = self._given_up.pop(message_id, None)
            # Flower's own word that nothing came is no reply.
            if late is not None and message.has_content():
                self._on_late(late)

    def _take_unreadable(self) -> Iterator[Answer]:
        while self._unreadable:
            message_id = self._unreadable.pop()
            self._given_up.pop(message_id, None)
            sent = self._waiting.pop(message_id, None)
            if sent is not None:
                yield Answer(sent, None, time.monotonic(), unreadable=True)

    def _returned(self, gone: set[int]) -> Iterator[Answer]:
        """Yield what was sent to nodes that are there again; note in `gone` those that are not."""
        online = set(self.node_ids())
        # Of several that a node was sent, the last.
        expected = {sent.node_id: sent for sent in self._waiting.values()} | self._awaited
        for node in sorted(expected.keys() - online - gone):
            logger.warning("%s is not connected", expected[node].task.site or f"node {node}")
        gone |= (expected.keys() - online) | self._awaited.keys()
        for node in sorted(gone & online & expected.keys()):
            gone.discard(node)
            self._awaited.pop(node, None)
            yield Answer(expected[node], None, time.monotonic())

    def _pull(self) -> list[_Pulled]:
        """Return what has come, also of what was given up: the SuperLink keeps it until it is pulled."""
        now_s = time.monotonic()
        for message_id, sent in list(self._given_up.items()):
            if now_s > sent.until_s:
                del self._given_up[message_id]
        ids = [*self._waiting, *self._given_up]
        if self._pool is None:
            return self._fetch(ids)
        for message_id in ids:
            if message_id not in self._fetching:
                self._fetching[message_id] = self._pool.submit(self._fetch_one, message_id)
        wait(self._fetching.values(), timeout=_FETCH_S)
        arrived: list[_Pulled] = []
        for message_id, fetched in list(self._fetching.items()):
            if fetched.done():
                del self._fetching[message_id]
                arrived += fetched.result()
        return arrived

    def _fetch_one(self, message_id: str) -> list[_Pulled]:
        try:
            return self._fetch([message_id])
        except ConsiliumError:
            raise
        except Exception as error:
            # Flower checks length and hash of what a node sends, not that it is a message: one site must
            # not end the run for all.
            logger.warning("a reply cannot be read (%s)", type(error).__name__)
            self._unreadable.add(message_id)
            return []

    def _fetch(self, message_ids: list[str]) -> list[_Pulled]:
        messages = self._patiently(lambda: list(self._grid.pull_messages(message_ids)))
        arrived_s = time.monotonic()
        return [(message, arrived_s) for message in messages]

    def _patiently(self, call: Callable[[], _T]) -> _T:
        """Repeat a call that the SuperLink could not answer, for at most `patience_s`."""
        started, pause_s = time.monotonic(), 0.5
        while True:
            try:
                return call()
            except httpx.HTTPError as error:
                if time.monotonic() - started > self._patience_s:
                    raise EngineError(
                        f"the SuperLink has not answered for {self._patience_s:.0f} s "
                        f"({type(error).__name__}); see that it runs, then continue with --resume"
                    ) from error
                logger.warning("the SuperLink did not answer (%s); again", type(error).__name__)
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, 10.0)
