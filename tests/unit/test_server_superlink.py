"""Who may ask what of the SuperLink: hospitals the Fleet API, its own user on this machine the rest."""

from __future__ import annotations

import asyncio
import inspect
import os
from typing import Any

import flwr.superlink.main
import pytest

from server import superlink
from server.superlink import LocalControl, may_pass

FLEET, CONTROL, RUNTIME = "/v1/fleet/pull-messages", "/v1/control/start-run", "/v1/runtime/get-run"


def _scope(path: str, client: str | None, *headers: tuple[bytes, bytes]) -> dict[str, Any]:
    return {
        "type": "http",
        "path": path,
        "headers": list(headers),
        "client": None if client is None else (client, 40000),
        "server": ("10.0.0.7", 8000),
    }


@pytest.fixture(autouse=True)
def caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks from this machine is this user; another test may say otherwise."""
    _set_caller(monkeypatch, os.geteuid())


def _set_caller(monkeypatch: pytest.MonkeyPatch, user: int | None) -> None:
    monkeypatch.setattr(superlink, "calling_user", lambda client, server: user)


@pytest.mark.parametrize("path", [FLEET, "/health"])
@pytest.mark.parametrize("client", ["10.0.0.9", "127.0.0.1", "2001:db8::7"])
def test_what_hospitals_need_is_for_everybody(path: str, client: str) -> None:
    assert may_pass(_scope(path, client))


@pytest.mark.parametrize(
    "path",
    [CONTROL, RUNTIME, "/docs", "/openapi.json", "/", "/v1/fleet", "/v1/fleetx", "/V1/FLEET/x"],
)
def test_all_else_is_for_this_machine_alone(path: str) -> None:
    assert not may_pass(_scope(path, "10.0.0.9"))
    assert not may_pass(_scope(path, "2001:db8::7"))
    assert not may_pass(_scope(path, None))
    assert not may_pass(_scope(path, "no address"))
    assert may_pass(_scope(path, "127.0.0.1"))
    assert may_pass(_scope(path, "::1"))
    # Its own address from outside, connected to from inside.
    assert may_pass(_scope(path, "10.0.0.7"))


@pytest.mark.parametrize(
    ("user", "expected"), [(4711, True), (0, True), (4712, False), (None, False)]
)
def test_on_this_machine_it_is_for_its_own_user_and_root(
    monkeypatch: pytest.MonkeyPatch, user: int | None, expected: bool
) -> None:
    monkeypatch.setattr(superlink.os, "geteuid", lambda: 4711)
    _set_caller(monkeypatch, user)
    assert may_pass(_scope(CONTROL, "127.0.0.1")) is expected
    assert may_pass(_scope(CONTROL, "10.0.0.7")) is expected
    assert may_pass(_scope(FLEET, "127.0.0.1"))


@pytest.mark.parametrize("header", [b"x-forwarded-for", b"forwarded"])
def test_what_a_proxy_hands_on_is_not_from_this_machine(header: bytes) -> None:
    """Neither from the proxy's own address, nor from one that the caller made up."""
    forwarded = (header, b"127.0.0.1")
    assert not may_pass(_scope(CONTROL, "127.0.0.1", forwarded))
    assert not may_pass(_scope(CONTROL, "10.0.0.7", forwarded))
    assert may_pass(_scope(FLEET, "127.0.0.1", forwarded))


@pytest.mark.parametrize(("client", "status"), [("10.0.0.9", 403), ("127.0.0.1", 200)])
def test_what_is_refused_never_reaches_flower(client: str, status: int) -> None:
    reached: list[str] = []
    sent: list[dict[str, Any]] = []

    async def flower(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> Any:
        raise AssertionError("the body of what is refused was read")

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(LocalControl(flower)(_scope(CONTROL, client), receive, send))
    assert sent[0]["status"] == status
    assert reached == ([CONTROL] if status == 200 else [])


def test_flower_asks_the_middleware_of_its_extensions() -> None:
    """The one seam that this leans on: Flower puts what it gets there outermost."""
    source = inspect.getsource(flwr.superlink.main._get_middleware)
    assert source.index("*extensions.get_middleware()") < source.index("Middleware(Control")
