"""How much the SuperLink reads, and from whom."""

from __future__ import annotations

import asyncio
import datetime
import inspect
import re
from base64 import b64encode
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flwr.superlink.routers.fleet.node_auth
import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from flwr.app import Array
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.primitives.asymmetric import (
    generate_key_pairs,
    public_key_to_bytes,
    sign_message,
)

from server.body_cap import ANYBODY_BYTES, NODE_BYTES, BodyCap, sent_by_node

PUSH = "/v1/fleet/push-object"
NGINX = Path(__file__).parents[2] / "deploy" / "edge" / "nginx.conf"


def _linkstate(*registered: bytes) -> Any:
    """A SuperLink's state that knows the nodes of these public keys."""
    nodes = {key: number for number, key in enumerate(registered, start=1)}
    return SimpleNamespace(state=lambda: SimpleNamespace(get_node_id_by_public_key=nodes.get))


def _signed(key: ec.EllipticCurvePrivateKey, *, age_s: float = 0.0) -> dict[bytes, bytes]:
    """The headers that a SuperNode with this key sends."""
    signed_at = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=age_s)
    timestamp = signed_at.isoformat().encode()
    return {
        b"flwr-public-key": b64encode(public_key_to_bytes(key.public_key())),
        b"flwr-timestamp": timestamp,
        b"flwr-signature": b64encode(sign_message(key, timestamp)),
    }


def _status(
    headers: dict[bytes, bytes], *, path: str = PUSH, registered: tuple[bytes, ...] = ()
) -> int:
    """What a request with these headers gets; 200 is what Flower itself would say."""
    sent: list[dict[str, Any]] = []

    async def flower(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> Any:
        raise AssertionError("the body of what is refused was read")

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "path": path,
        "client": ("10.0.0.9", 40000),
        "headers": list(headers.items()),
        "app": SimpleNamespace(state=SimpleNamespace(linkstate_factory=_linkstate(*registered))),
    }
    asyncio.run(BodyCap(flower)(scope, receive, send))
    return int(sent[0]["status"])


@pytest.mark.parametrize(
    ("size", "status"),
    [(0, 200), (ANYBODY_BYTES, 200), (ANYBODY_BYTES + 1, 401), (NODE_BYTES, 401), (4 * 10**8, 413)],
)
def test_anybody_may_send_what_a_poll_takes(size: int, status: int) -> None:
    assert _status({b"content-length": str(size).encode()}) == status


def test_a_node_may_send_what_a_chunk_takes() -> None:
    key, public = generate_key_pairs()
    registered = (public_key_to_bytes(public),)
    signed = _signed(key)
    largest = {**signed, b"content-length": str(NODE_BYTES).encode()}
    assert _status(largest, registered=registered) == 200
    assert _status(largest) == 401
    more = {**signed, b"content-length": str(NODE_BYTES + 1).encode()}
    assert _status(more, registered=registered) == 413


def test_a_body_of_unknown_length_is_not_begun() -> None:
    assert _status({b"transfer-encoding": b"chunked"}) == 411


def test_other_apis_are_not_touched() -> None:
    """They are for this machine alone, and a bundle comes in one piece there."""
    headers = {b"content-length": b"100000000"}
    assert _status(headers, path="/v1/control/start-run") == 200


def test_a_signature_is_of_a_registered_key_and_of_now() -> None:
    (key, public), (_, other) = generate_key_pairs(), generate_key_pairs()
    state = _linkstate(public_key_to_bytes(public))
    headers = _signed(key)
    assert sent_by_node(headers, state)
    assert not sent_by_node(headers, _linkstate())
    # Flower's tolerance is 300 s, and 5 s for clocks.
    assert sent_by_node(_signed(key, age_s=290), state)
    assert not sent_by_node(_signed(key, age_s=320), state)
    assert not sent_by_node(_signed(key, age_s=-20), state)
    assert not sent_by_node(
        {**headers, b"flwr-timestamp": _signed(key, age_s=1)[b"flwr-timestamp"]}, state
    )
    stolen = {**headers, b"flwr-public-key": b64encode(public_key_to_bytes(other))}
    assert not sent_by_node(stolen, _linkstate(public_key_to_bytes(other)))


@pytest.mark.parametrize("name", [b"flwr-public-key", b"flwr-timestamp", b"flwr-signature"])
@pytest.mark.parametrize("value", [None, b"", b"\xff", b"2026-01-01T00:00:00", b"!"])
def test_a_header_that_says_nothing_is_no_signature(name: bytes, value: bytes | None) -> None:
    key, public = generate_key_pairs()
    headers = _signed(key)
    if value is None:
        del headers[name]
    else:
        headers[name] = value
    assert not sent_by_node(headers, _linkstate(public_key_to_bytes(public)))


def test_a_key_of_another_kind_is_no_signature() -> None:
    pem, info = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    public = ed25519.Ed25519PrivateKey.generate().public_key().public_bytes(pem, info)
    headers = _signed(generate_key_pairs()[0]) | {b"flwr-public-key": b64encode(public)}
    assert not sent_by_node(headers, _linkstate(public))


def test_the_largest_piece_of_an_adapter_fits() -> None:
    """Whatever an array's size, Flower sends it in chunks; the request around one is what must fit."""
    content = np.zeros(12 * 2**20, dtype=np.uint8).tobytes()
    array = Array("uint8", (len(content),), "safetensors", content)
    chunks = array.children
    assert chunks is not None
    assert len(chunks) > 1
    sizes = [
        PushObjectRequest(
            node=Node(node_id=2**63),
            run_id=2**63,
            object_id=name,
            object_content=chunk.deflate(),
            session_id="s" * 64,
        ).ByteSize()
        for name, chunk in chunks.items()
    ]
    assert NODE_BYTES - 2**20 < max(sizes) < NODE_BYTES - 2**19


def test_the_edge_has_the_same_cap() -> None:
    megabytes = re.search(r"^    client_max_body_size (\d+)m;", NGINX.read_text(), re.MULTILINE)
    assert megabytes is not None
    assert int(megabytes[1]) * 2**20 == NODE_BYTES


def test_flower_reads_identity_from_the_same_headers() -> None:
    """What is checked beforehand is a part of what Flower checks: if it changes, this is to be read again."""
    source = inspect.getsource(flwr.superlink.routers.fleet.node_auth.authenticate_node)
    for part in ("FLEET_HTTP_PUBLIC_KEY_HEADER", "FLEET_HTTP_SIGNATURE_HEADER", "TIMESTAMP_HEADER",
                 "get_node_id_by_public_key"):  # fmt: skip
        assert part in source
