"""Sending tasks to nodes and collecting what comes back, on any Flower Grid.

Bounded in time, and patient with a SuperLink that answers HTTP 500 under load or is restarting.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import httpx
from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from common.errors import EngineError
from common.records import Envelope, Task, to_records

logger = logging.getLogger(__name__)

_MESSAGE_TYPES = {"describe": MessageType.QUERY, "train": MessageType.TRAIN}
_POLL_S = 0.25
_MAX_POLL_S = 2.0
_T = TypeVar("_T")


class Messenger:
    """One coordinator's line to its nodes."""

    def __init__(self, grid: Grid, *, patience_s: float = 90.0) -> None:
        self._grid = grid
        self._patience_s = patience_s

    def node_ids(self) -> list[int]:
        """Return the nodes that are connected now, sorted."""
        return self._patiently(lambda: sorted(self._grid.get_node_ids()))

    def exchange(
        self,
        tasks: Mapping[int, tuple[Task, Envelope]],
        *,
        deadline_s: float,
        stop_at: Callable[[], float] = lambda: math.inf,
    ) -> Iterator[tuple[int, Message]]:
        """Send one task to each node and yield (node, reply) as they come, until the deadline.

        tasks: node id -> the task and its sealed envelope. Each node yields at most once; a caller
        that stops early loses nothing but the replies it did not take.
        stop_at: an earlier end (time.monotonic) that the caller may set while it waits.
        """
        deadline = time.monotonic() + deadline_s
        messages = [
            Message(
                content=to_records(envelope),
                dst_node_id=node,
                message_type=_MESSAGE_TYPES[task.kind],
                group_id=str(task.server_round),
                ttl=deadline_s + 60,
            )
            for node, (task, envelope) in tasks.items()
        ]
        if not messages:
            return
        ids = self._patiently(lambda: list(self._grid.push_messages(messages)))
        waiting = dict(zip(ids, tasks, strict=True))
        waiting.pop("", None)
        pause_s = _POLL_S
        while waiting:
            arrived = self._pull(waiting)
            for message in arrived:
                node = waiting.pop(message.metadata.reply_to_message_id, None)
                if node is not None:
                    yield node, message
            left_s = min(deadline, stop_at()) - time.monotonic()
            if not waiting or left_s <= 0:
                return
            pause_s = _POLL_S if arrived else min(pause_s * 1.5, _MAX_POLL_S)
            if not arrived:
                time.sleep(min(pause_s, left_s))

    def _pull(self, waiting: Iterable[str]) -> list[Message]:
        ids = list(waiting)
        return self._patiently(lambda: list(self._grid.pull_messages(ids)))

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
