"""A scripted federation without Flower's processes: a clock that never waits, a Grid, and sites.

A script says, message by message, how a site or the Grid behaves; its last entry repeats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from flwr.app import Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from common.adapter import AdapterState, LoraPair, from_safetensors, lora_scaling
from common.chain import EMPTY, ChainHead, link
from common.records import (
    Envelope,
    PrivacyRow,
    Reply,
    SiteHeads,
    Task,
    envelope_of,
    open_task,
    reply_to,
    seal_reply,
    to_records,
)
from common.signing import SigningKey
from server.roster import RosterEntry
from tests.unit.adapters import adapter_shape

# What one message is answered with: an envelope, other records, an error code of Flower's, or nothing at all.
Answer = Envelope | RecordDict | int | None
Behaviour = Callable[["FakeSite", Task, Envelope], Answer]


class FakeClock:
    """Stands in for the `time` module: sleeping is all that passes time."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s

    def time(self) -> float:
        return 1_700_000_000.0 + self.now_s

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.now_s += seconds

    def install(self, patch: pytest.MonkeyPatch) -> FakeClock:
        """Make what talks to sites live by this clock."""
        for module in ("messenger", "gathering", "rounds", "open_round"):
            patch.setattr(f"server.{module}.time", self)
        return self


def scripted(script: Sequence[Any], index: int) -> Any:
    """Return entry `index` of a script whose last entry repeats."""
    return script[min(index, len(script) - 1)]


class FakeGrid:
    """Delivers messages to handlers by node; what a handler does not answer stays unanswered.

    handlers: node id -> message to reply, or None. failures: calls still to fail, each with its error.
    delay_s: node id -> how much later than it was sent a message is answered.
    """

    def __init__(
        self, handlers: dict[int, Callable[[Message], Message | None]], *, clock: FakeClock
    ) -> None:
        TaskIdentity.run_id = 1
        TaskIdentity.task_id = 1
        TaskIdentity.node_id = 1
        self.handlers = handlers
        self.clock = clock
        self.failures: list[Exception] = []
        self.delay_s: dict[int, float] = {}
        self.online: set[int] = set(handlers)
        self.pushed: list[Message] = []
        self.uninvited: list[Message] = []
        self._inbox: list[tuple[float, Message]] = []

    def _maybe_fail(self) -> None:
        if self.failures:
            raise self.failures.pop(0)

    def get_node_ids(self) -> Iterable[int]:
        self._maybe_fail()
        return set(self.online)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        self._maybe_fail()
        ids = []
        for message in messages:
            self.pushed.append(message)
            message.metadata.__dict__["_message_id"] = f"m{len(self.pushed)}"
            ids.append(message.metadata.message_id)
            node = message.metadata.dst_node_id
            reply = self.handlers[node](message)
            if reply is not None:
                due_s = self.clock.now_s + self.delay_s.get(node, 0.0)
                self._inbox.append((due_s, reply))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self._maybe_fail()
        wanted, now_s = set(message_ids), self.clock.now_s
        due = [
            item
            for item in self._inbox
            if item[0] <= now_s and item[1].metadata.reply_to_message_id in wanted
        ]
        self._inbox = [item for item in self._inbox if item not in due]
        uninvited, self.uninvited = self.uninvited, []
        return uninvited + [reply for _, reply in due]


def reply_message(answer: Envelope | RecordDict | int, *, to: Message) -> Message:
    """Return a Flower reply that carries an envelope, any other records, or an error code."""
    if isinstance(answer, int):
        return Message(Error(answer, "an exception's own text"), reply_to=to)
    records = to_records(answer) if isinstance(answer, Envelope) else answer
    return Message(records, reply_to=to)


@dataclass
class FakeSite:
    """A hospital as the coordinator sees it: it checks tasks and signs replies with a real key.

    script: what it does with its train tasks, in order. describes: the same for describe tasks.
    tasks: every train task it got; received: the adapter of each, at the rank that was asked.
    described: every describe task it got. heads: of its ledger and its log; whatever it is asked is a
    line of the log, and what it trains two entries of the ledger.
    """

    name: str
    coordinator_key: str
    declared_size: int = 100
    max_rank: int = 4
    script: Sequence[Behaviour] = field(default_factory=lambda: [honest])
    describes: Sequence[Behaviour] = field(default_factory=lambda: [describe])
    key: SigningKey = field(default_factory=SigningKey.generate)
    tasks: list[Task] = field(default_factory=list)
    received: list[AdapterState] = field(default_factory=list)
    sealed: list[Envelope] = field(default_factory=list)
    described: list[Task] = field(default_factory=list)
    heads: SiteHeads = field(default_factory=lambda: SiteHeads(EMPTY, EMPTY))

    @property
    def entry(self) -> RosterEntry:
        return RosterEntry(self.name, self.key.public_hex, self.declared_size)

    def __call__(self, message: Message) -> Message | None:
        envelope = envelope_of(message)
        task = open_task(envelope, public_keys=[self.coordinator_key], site=self.name)
        self.heads = SiteHeads(self.heads.ledger, link(self.heads.audit, task.canonical()))
        if task.kind == "describe":
            self.described.append(task)
            answer = scripted(self.describes, len(self.described) - 1)(self, task, envelope)
        else:
            self.tasks.append(task)
            self.received.append(incoming(task, envelope))
            answer = scripted(self.script, len(self.tasks) - 1)(self, task, envelope)
        return None if answer is None else reply_message(answer, to=message)


def incoming(task: Task, envelope: Envelope) -> AdapterState:
    """Return the adapter that travels with a train task."""
    config = task.config
    rank = int(config["lora.rank"])
    scaling = lora_scaling(
        alpha=float(config["lora.alpha"]), rank=rank, use_rslora=bool(config["lora.use-rslora"])
    )
    return from_safetensors(envelope.adapter, shape=adapter_shape(rank, scaling=scaling))


def trained(state: AdapterState) -> AdapterState:
    """Return what a site trained: every factor moved by 1."""
    return AdapterState(
        {name: LoraPair(pair.A + 1, pair.B + 1) for name, pair in state.pairs.items()},
        state.scaling,
    )


HEADS = SiteHeads(ChainHead(4, "1e" * 32), ChainHead(9, "a0" * 32))


def honest_reply(site: str, task: Task, state: AdapterState, *, heads: SiteHeads = HEADS) -> Reply:
    """Return the reply that an honest site signs for an adapter."""
    return reply_to(
        task,
        site=site,
        adapter_digest=state.digest(),
        numbers={"steps": 3},
        privacy=PrivacyRow("record", 1.5, 1e-5, 0.8, 0.16, 3),
        heads=heads,
    )


# Behaviours


def describe(site: FakeSite, task: Task, envelope: Envelope) -> Answer:
    """Introduce oneself."""
    numbers = {"declared-size": site.declared_size, "max-rank": site.max_rank}
    return seal_reply(reply_to(task, site=site.name, numbers=numbers, heads=site.heads), site.key)


def honest(site: FakeSite, task: Task, envelope: Envelope) -> Answer:
    """Train and reply."""
    state = trained(incoming(task, envelope))
    reserved = link(site.heads.ledger, task.canonical())
    site.heads = SiteHeads(link(reserved, b"released"), site.heads.audit)
    reply = honest_reply(site.name, task, state, heads=site.heads)
    sealed = seal_reply(reply, site.key, adapter=state.to_safetensors())
    site.sealed.append(sealed)
    return sealed


def silent(site: FakeSite, task: Task, envelope: Envelope) -> Answer:
    """Say nothing."""
    return None


def crashes(site: FakeSite, task: Task, envelope: Envelope) -> Answer:
    """Let Flower answer with an error of its own."""
    return 3


def refuses(site: FakeSite, task: Task, envelope: Envelope) -> Answer:
    """Answer that the site's policy forbids it."""
    return refuses_with("policy")(site, task, envelope)


def refuses_with(code: str) -> Behaviour:
    """Answer that the task was not done, by one code of common/errors.py."""

    def refuse(site: FakeSite, task: Task, envelope: Envelope) -> Answer:
        reply = reply_to(
            task, site=site.name, error_code=code, correlation_id="abc123", heads=site.heads
        )
        return seal_reply(reply, site.key)

    return refuse


def sends_nan(site: FakeSite, task: Task, envelope: Envelope) -> Answer:
    """Reply with an adapter that is honestly signed and useless."""
    state = trained(incoming(task, envelope))
    next(iter(state.pairs.values())).A[0, 0] = float("nan")
    return seal_reply(
        honest_reply(site.name, task, state), site.key, adapter=state.to_safetensors()
    )


def sends_garbage(site: FakeSite, task: Task, envelope: Envelope) -> Answer:
    """Reply with bytes that are nothing."""
    return Envelope(b"\x00\xff garbage", b"no signature", b"no adapter")


def replays_first(site: FakeSite, task: Task, envelope: Envelope) -> Answer:
    """Reply with what was signed for the first task."""
    return site.sealed[0]


def trains_but_is_late(site: FakeSite, task: Task, envelope: Envelope) -> Answer:
    """Train and sign, and keep the reply."""
    honest(site, task, envelope)
    return None


def empty_reply(to: Message) -> Message:
    """Return a reply without any record in it."""
    return Message(RecordDict(), reply_to=to)
