"""An enrolled hospital's own side, which answers in another hospital's name wherever it can."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import grpc

from client.agent_pb2 import Piece
from client.agent_wire import in_pieces
from common.canonical import from_canonical
from common.chain import EMPTY
from common.records import (
    Envelope,
    PrivacyRow,
    Reply,
    SiteHeads,
    Task,
    open_task,
    reply_to,
    seal_reply,
)
from common.signing import SigningKey
from server.roster import RosterEntry
from tests.integration.wiretap import Wiretap, read_envelope


@dataclass(frozen=True)
class Spoofer(grpc.GenericRpcHandler):
    """Stands where its relay expects an agent.

    itself: as it is enrolled. key: that it signs with, its own. other: the name that it takes. overheard:
    what the other one was asked and replied so far. coordinator: public key. tried: what, in order.
    """

    itself: RosterEntry
    key: SigningKey
    other: str
    overheard: Wiretap
    coordinator: str
    tried: list[str] = field(default_factory=list)

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Piece, Piece]:
        return grpc.stream_stream_rpc_method_handler(
            self._answer,
            request_deserializer=Piece.FromString,
            response_serializer=Piece.SerializeToString,
        )

    def _answer(self, pieces: Iterator[Piece], context: grpc.ServicerContext) -> Iterator[Piece]:
        envelope = read_envelope(pieces)
        task = open_task(envelope, public_keys=[self.coordinator], site=self.itself.site)
        return in_pieces(self.reply(task))

    def reply(self, task: Task) -> Envelope:
        """Answer for the other one, twice for each kind of task; then as itself, so as to be let in."""
        signed, replayed = f"{task.kind}: in its name", f"{task.kind}: its own earlier reply"
        if signed not in self.tried:
            self.tried.append(signed)
            return self._sealed(task, self.other)
        if replayed not in self.tried:
            self.tried.append(replayed)
            return self.overheard.answered(task.kind)[-1][1]
        self.tried.append(f"{task.kind}: as itself")
        return self._sealed(task, self.itself.site)

    def _sealed(self, task: Task, site: str) -> Envelope:
        """A reply to this very task, in which nothing is wrong but whose it is."""
        heads, adapter = SiteHeads(EMPTY, EMPTY), b""
        if task.kind == "train":
            # Any adapter of the right form.
            _, overheard = self.overheard.answered("train")[-1]
            adapter = bytes(overheard.adapter)
            reply: Reply = reply_to(
                task,
                site=site,
                heads=heads,
                adapter_digest=from_canonical(overheard.payload)["adapter_digest"],
                privacy=PrivacyRow("none", math.inf, 1e-5, 0.0, 1.0, 2),
            )
        else:
            numbers = {"declared-size": self.itself.declared_size, "max-rank": 4}
            reply = reply_to(task, site=site, heads=heads, numbers=numbers)
        return seal_reply(reply, self.key, adapter=adapter)
