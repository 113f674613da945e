"""The hospital's own end of its agent: whether it answers, what it does now, and stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from client.agent_pb2 import AgentStatus, CancelReply, CancelRequest, StatusRequest
from client.agent_wire import AGENT_SERVICE, CHANNEL_OPTIONS, CONTROL_SERVICE, socket_address
from common.errors import EngineError

_TIMEOUT_S = 5.0


def agent_answers(socket: Path) -> bool:
    """Whether an agent answers on its socket, by gRPC's health protocol."""
    try:
        with (
            socket_address(socket) as address,
            grpc.insecure_channel(address, CHANNEL_OPTIONS) as channel,
        ):
            request = health_pb2.HealthCheckRequest(service=AGENT_SERVICE)
            stub: Any = health_pb2_grpc.HealthStub(channel)
            answer = stub.Check(request, timeout=_TIMEOUT_S)
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
    except (grpc.RpcError, OSError):
        return False


def agent_status(socket: Path) -> AgentStatus | None:
    """Return what an agent does now, None when none runs. socket: its control socket."""
    try:
        status: AgentStatus = _call(socket, "Status", StatusRequest(), AgentStatus)
    except (grpc.RpcError, OSError):
        return None
    return status


def cancel_task(socket: Path) -> bool:
    """Let the agent stop what it trains, at its next step; False when it trains nothing.

    socket: its control socket. Raises EngineError when no agent runs.
    """
    try:
        reply: CancelReply = _call(socket, "Cancel", CancelRequest(), CancelReply)
    except (grpc.RpcError, OSError):
        raise EngineError(f"no agent answers at {socket}; there is nothing to cancel") from None
    return reply.stopped


def _call(socket: Path, method: str, request: Any, reply: Any) -> Any:
    with (
        socket_address(socket) as address,
        grpc.insecure_channel(address, CHANNEL_OPTIONS) as channel,
    ):
        call = channel.unary_unary(
            f"/{CONTROL_SERVICE}/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=reply.FromString,
        )
        return call(request, timeout=_TIMEOUT_S)
