"""The inline engine: a Grid that runs ClientApps in this very process.

No SuperLink, no Ray, no sockets; the ServerApp's and the ClientApp's code is the same. What it would
let pass and the wire would not is caught by a test that sends a task through Flower's serialisation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

_SERVER_NODE = 1
_FIRST_NODE = 2


class InlineGrid(Grid):
    """Runs one ClientApp for each site folder, one message at a time, when its reply is asked for."""

    def __init__(self, client_app: ClientApp, site_folders: Iterable[Path]) -> None:
        TaskIdentity.run_id = 1
        TaskIdentity.task_id = 1
        TaskIdentity.node_id = _SERVER_NODE
        self._client_app = client_app
        self._run = Run.create_empty(1)
        self._contexts = {
            node: Context(1, node, {"site-dir": str(folder)}, RecordDict(), {})
            for node, folder in enumerate(site_folders, start=_FIRST_NODE)
        }
        self._queue: deque[Message] = deque()
        self._sent = 0

    def set_run(self, run: Run) -> None:
        """Set the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """Return the run."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a new message."""
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> list[int]:
        """Return every site's node."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Queue messages and return their ids."""
        ids = []
        for message in messages:
            self._sent += 1
            message.metadata.__dict__["_message_id"] = f"inline-{self._sent}"
            self._queue.append(message)
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Run the first queued message among `message_ids` and return its reply; [] when none is."""
        wanted = set(message_ids)
        for message in self._queue:
            if message.metadata.message_id in wanted:
                self._queue.remove(message)
                return [self._deliver(message)]
        return []

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Run all messages and return their replies."""
        ids = self.push_messages(messages)
        return [reply for message_id in ids for reply in self.pull_messages([message_id])]

    def _deliver(self, message: Message) -> Message:
        context = self._contexts[message.metadata.dst_node_id]
        if message.has_content():
            message.content = _rebuilt(message.content)
        reply = self._client_app(message, context)
        if reply.has_content():
            reply.content = _rebuilt(reply.content)
        return reply


def _rebuilt(records: RecordDict) -> RecordDict:
    """Fresh containers around the same immutable bytes: no site can reach into another's."""
    copy = RecordDict()
    for name, record in records.items():
        if isinstance(record, ArrayRecord):
            copy[name] = ArrayRecord(dict(record))
        elif isinstance(record, ConfigRecord):
            copy[name] = ConfigRecord(dict(record))
        else:
            copy[name] = record
    return copy
