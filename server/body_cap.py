"""How much of a request the SuperLink reads, and from whom.

Flower 1.41 holds a request's whole body in memory before it asks who sends it: 400 MB of anybody's are 400 MB
and more of the coordinator's. What a SuperNode sends is never that long. An adapter goes in chunks, one in
each request, and all else is a few kilobytes; so a longer body is refused by its headers alone, and one that
is more than a few kilobytes needs the signature of an enrolled node, which Flower sends in headers as well.
"""

from __future__ import annotations

import datetime
import logging
from base64 import b64decode
from http import HTTPStatus
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from flwr.common.constant import (
    FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE,
    SYSTEM_TIME_TOLERANCE,
    TIMESTAMP_HEADER,
    TIMESTAMP_TOLERANCE,
)
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Receive, Scope, Send

logger = logging.getLogger(__name__)

FLEET = "/v1/fleet/"
# One chunk of an array, and room for the names and digests around it. deploy/edge/nginx.conf says the same.
NODE_BYTES = FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE + 2**20
# Heartbeats and polls are below 1 KiB: Flower says by itself, in its own words, who may send them.
ANYBODY_BYTES = 64 * 2**10


class BodyCap:
    """ASGI middleware of the Fleet API: 411, 413 or 401 for a body that is not to be read, before it is."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it before any of it is read."""
        if scope["type"] != "http" or not scope["path"].startswith(FLEET):
            await self._app(scope, receive, send)
            return
        status = await self._refusal(scope)
        if status is None:
            await self._app(scope, receive, send)
            return
        who = (scope.get("client") or "?")[0]
        logger.warning("refused %s from %s: %d %s", scope["path"][:100], who, status, status.phrase)
        headers = [(b"content-length", b"0"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    async def _refusal(self, scope: Scope) -> HTTPStatus | None:
        headers = dict(scope["headers"])
        if b"transfer-encoding" in headers:
            # Its length is known when it is read; Flower says it beforehand.
            return HTTPStatus.LENGTH_REQUIRED
        size_bytes = int(headers.get(b"content-length", b"0"))
        if size_bytes > NODE_BYTES:
            return HTTPStatus.REQUEST_ENTITY_TOO_LARGE
        if size_bytes > ANYBODY_BYTES and not await run_in_threadpool(
            sent_by_node, headers, scope["app"].state.linkstate_factory
        ):
            return HTTPStatus.UNAUTHORIZED
        return None


def sent_by_node(headers: dict[bytes, bytes], linkstate_factory: Any) -> bool:
    """Whether a request's headers are signed, just now, by a node that is registered.

    The part of Flower's `authenticate_node` that needs no body; Flower does the whole of it afterwards.
    """
    try:
        public_key = b64decode(headers[FLEET_HTTP_PUBLIC_KEY_HEADER.encode()], validate=True)
        signature = b64decode(headers[FLEET_HTTP_SIGNATURE_HEADER.encode()], validate=True)
        timestamp = headers[TIMESTAMP_HEADER.encode()]
        signed_at = datetime.datetime.fromisoformat(timestamp.decode("ascii"))
        age_s = (now() - signed_at).total_seconds()
        if not -SYSTEM_TIME_TOLERANCE < age_s < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE:
            return False
        if not verify_signature(bytes_to_public_key(public_key), timestamp, signature):
            return False
    except (KeyError, ValueError, TypeError, AttributeError, UnsupportedAlgorithm):
        # A header that is missing or unreadable, a time without a zone, a key of another kind.
        return False
    return linkstate_factory.state().get_node_id_by_public_key(public_key) is not None
