"""The relay's end of the agent's socket: hands over an envelope, brings back the reply.

Torch-free: a relay is a new process for every message.
"""

from __future__ import annotations

import io
import logging
import time
from pathlib import Path

import grpc

from client.agent_pb2 import Piece
from client.agent_wire import (
    AGENT_SERVICE,
    CHANNEL_OPTIONS,
    in_pieces,
    socket_address,
    take_adapter,
    take_opening,
)
from common.canonical import from_canonical
from common.errors import BusyError, DiskError, EngineError, ProtocolError
from common.records import Envelope

logger = logging.getLogger(__name__)

# An agent that is being started again imports torch first; one that is being upgraded takes longer.
_AWAY_S = 300.0
_BUSY_PAUSE_S = 3.0
_AWAY_PAUSE_S = 0.5


def ask_agent(socket: Path, envelope: Envelope, *, away_s: float = _AWAY_S) -> Envelope:
    """Return the agent's signed reply to a signed task.

    Waits for an agent that is away, `away_s` at most, and for one that trains another task, until this one
    expires. Raises EngineError when none is there in time, BusyError when its turn did not come,
    DiskError when its disk is full, ProtocolError when the two do not understand each other or the agent
    took the task for nobody's.
    """
    away_since: float | None = None
    expires_at = _expires_at(envelope)
    while True:
        try:
            return _ask(socket, envelope)
        except grpc.RpcError as error:
            code, details = error.code(), error.details() or ""
        except OSError as error:
            code, details = grpc.StatusCode.UNAVAILABLE, f"{socket.parent}: {error.strerror}"
        if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
            away_since = None
            if time.time() > expires_at:
                raise BusyError(f"the agent at {socket} was busy until the task expired")
            logger.info("the agent is busy; asking again")
            time.sleep(_BUSY_PAUSE_S)
        elif code == grpc.StatusCode.UNAVAILABLE:
            away_since = away_since or time.monotonic()
            if time.monotonic() - away_since > away_s:
                raise EngineError(
                    f"no agent answers at {socket} ({details}); start it with `consilium client up` or "
                    "`consilium client agent`"
                )
            time.sleep(_AWAY_PAUSE_S)
        elif code == grpc.StatusCode.ABORTED:
            raise DiskError(f"the disk of the agent at {socket} is full; see its log")
        else:
            raise ProtocolError(f"the agent did not answer: {code.name}, {details}")


def _ask(socket: Path, envelope: Envelope) -> Envelope:
    with (
        socket_address(socket) as address,
        grpc.insecure_channel(address, CHANNEL_OPTIONS) as channel,
    ):
        answer = channel.stream_stream(
            f"/{AGENT_SERVICE}/Answer",
            request_serializer=Piece.SerializeToString,
            response_deserializer=Piece.FromString,
        )
        pieces = answer(in_pieces(envelope))
        opening = take_opening(pieces)
        # Its value is the very bytes that were written: no second copy.
        adapter = io.BytesIO()
        take_adapter(pieces, opening, write=adapter.write)
        return Envelope(opening.payload, opening.signature, adapter.getvalue())


def _expires_at(envelope: Envelope) -> float:
    """When a task is over, as it says itself: it only bounds how long this waits."""
    try:
        return float(from_canonical(envelope.payload)["expires_at"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return 0.0
