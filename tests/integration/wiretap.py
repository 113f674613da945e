"""A wire between a relay and its agent that writes down what passes."""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from client.agent_pb2 import Piece
from client.agent_wire import (
    CHANNEL_OPTIONS,
    socket_address,
    take_adapter,
    take_opening,
)
from common.canonical import from_canonical
from common.records import Envelope


@dataclass(frozen=True)
class Wiretap(grpc.GenericRpcHandler):
    """Hands every call on to an agent's socket as it is. passed: each task and its reply, in order."""

    agent: Path
    passed: list[tuple[Envelope, Envelope]] = field(default_factory=list)

    def answered(self, kind: str) -> list[tuple[Envelope, Envelope]]:
        """The tasks of a kind and their replies, in order."""
        return [both for both in self.passed if from_canonical(both[0].payload)["kind"] == kind]

    def service(
        self, details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        return grpc.stream_stream_rpc_method_handler(
            lambda pieces, context: self._hand_on(str(details.method), pieces, context)
        )

    def _hand_on(
        self, method: str, pieces: Iterator[bytes], context: grpc.ServicerContext
    ) -> Iterator[bytes]:
        sent: list[bytes] = []
        received: list[bytes] = []
        with (
            socket_address(self.agent) as address,
            grpc.insecure_channel(address, CHANNEL_OPTIONS) as channel,
        ):
            try:
                yield from _noted(channel.stream_stream(method)(_noted(pieces, sent)), received)
            except grpc.RpcError as error:
                context.abort(error.code(), error.details() or "")
        self.passed.append((_envelope(sent), _envelope(received)))


@contextmanager
def listening(handler: grpc.GenericRpcHandler, socket: Path) -> Iterator[None]:
    """Let something answer at a socket for as long as the block runs."""
    server = grpc.server(ThreadPoolExecutor(4), handlers=[handler], options=CHANNEL_OPTIONS)
    with socket_address(socket) as address:
        server.add_insecure_port(address)
        server.start()
        try:
            yield
        finally:
            server.stop(None).wait()


def _noted(pieces: Iterator[bytes], notes: list[bytes]) -> Iterator[bytes]:
    for piece in pieces:
        notes.append(piece)
        yield piece


def _envelope(pieces: list[bytes]) -> Envelope:
    return read_envelope(map(Piece.FromString, pieces))


def read_envelope(pieces: Iterator[Piece]) -> Envelope:
    """Return what came in pieces."""
    opening, adapter = take_opening(pieces), io.BytesIO()
    take_adapter(pieces, opening, write=adapter.write)
    return Envelope(opening.payload, opening.signature, adapter.getvalue())
