"""What both ends of the agent's socket share: names, limits, and an envelope in pieces.

The relay imports this: no torch, no data code.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from client.agent_pb2 import Opening, Piece
from common.errors import ProtocolError
from common.records import Envelope

# Raised whenever agent.proto's meaning changes: the relay comes from the coordinator, the agent may be older.
AGENT_PROTOCOL = 1

AGENT_SERVICE = "consilium.agent.Agent"
CONTROL_SERVICE = "consilium.agent.AgentControl"
# Small enough to be forgotten at once, large enough that 200 MB are 200 calls.
PIECE_BYTES = 1 << 20
# A payload is 1 MiB at most (common/records.py).
CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", 4 << 20),
    ("grpc.max_receive_message_length", 4 << 20),
    # Neither end goes through a proxy that the environment names.
    ("grpc.enable_http_proxy", 0),
)


@contextmanager
def socket_address(path: Path) -> Iterator[str]:
    """Give gRPC's address of a unix socket; it holds as long as the block runs.

    The system allows 107 characters for a socket's path, and a hospital's folder may lie deeper: the folder
    is opened, and named by its descriptor.
    """
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"unix:/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def in_pieces(envelope: Envelope) -> Iterator[Piece]:
    """Yield an envelope as it travels; no more than one piece of its adapter is ever copied."""
    adapter = memoryview(envelope.adapter)
    yield Piece(
        opening=Opening(
            protocol=AGENT_PROTOCOL,
            payload=envelope.payload,
            signature=envelope.signature,
            adapter_bytes=len(adapter),
        )
    )
    for start in range(0, len(adapter), PIECE_BYTES):
        yield Piece(adapter=bytes(adapter[start : start + PIECE_BYTES]))


def take_opening(pieces: Iterator[Piece]) -> Opening:
    """Return what every envelope begins with. Raises ProtocolError for another beginning or version."""
    first = next(pieces, None)
    if first is None or first.WhichOneof("part") != "opening":
        raise ProtocolError("the other end of the agent's socket did not begin with an opening")
    opening = first.opening
    if opening.protocol != AGENT_PROTOCOL:
        raise ProtocolError(
            f"the other end of the agent's socket speaks version {opening.protocol}, this one "
            f"{AGENT_PROTOCOL}; upgrade the older of the two: the relay is the coordinator's, the agent the "
            "hospital's"
        )
    return opening


def take_adapter(
    pieces: Iterator[Piece], opening: Opening, *, write: Callable[[bytes], object]
) -> None:
    """Hand the adapter's pieces to `write`, in order. Raises ProtocolError when they are not as announced."""
    received = 0
    for piece in pieces:
        received += len(piece.adapter)
        if piece.WhichOneof("part") != "adapter" or received > opening.adapter_bytes:
            raise ProtocolError("the agent's socket brought more than was announced")
        write(piece.adapter)
    if received != opening.adapter_bytes:
        raise ProtocolError(
            f"the agent's socket brought {received} of {opening.adapter_bytes} adapter bytes"
        )
