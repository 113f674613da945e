"""Flower's SuperLink, whose Control and Runtime APIs answer its own user on this machine alone.

    python -m server.superlink ARGS

Flower 1.41 serves them on the very port that hospitals connect to, and asks nobody who he is: whoever
reached that port could register a node, or submit a bundle of his own, which would run at the hospitals, and
here as this user, who may read the signing key. So only this user's processes, and root's, may ask, and no
other service of this machine, such as the edge. Everybody is answered what a SuperNode needs (/v1/fleet/,
where Flower authenticates nodes by their keys) and /health; how much of it is read is server/body_cap.py's.
"""

from __future__ import annotations

import ipaddress
import logging
import os
from typing import Any

from flwr.superlink import extensions
from flwr.superlink.cli import flower_superlink
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from server.body_cap import FLEET, BodyCap
from server.local_caller import calling_user

logger = logging.getLogger(__name__)

_HEALTH = "/health"
_ROOT = 0
# What a proxy adds, and none of this machine's own commands.
_FORWARDED = (b"x-forwarded-for", b"forwarded")


class LocalControl:
    """ASGI middleware: 403 for whatever is not for everybody, unless this user asks on this machine."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it before any of it is read."""
        if scope["type"] != "http" or may_pass(scope):
            await self._app(scope, receive, send)
            return
        logger.warning("refused %s from %s", scope["path"][:100], (scope.get("client") or "?")[0])
        headers = [(b"content-length", b"0"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 403, "headers": headers})
        await send({"type": "http.response.body", "body": b""})


def may_pass(scope: Scope) -> bool:
    """Whether a request is for everybody, or from a process of this user, or root's, on this machine.

    A connection to one's own address comes from that same address. What a proxy on this machine hands on is
    not from this machine, whatever address it names: uvicorn would believe it, and anybody can write one.
    """
    path = scope["path"]
    if path == _HEALTH or path.startswith(FLEET):
        return True
    if any(name in _FORWARDED for name, _ in scope["headers"]):
        return False
    client: Any = scope.get("client")
    server: Any = scope.get("server")
    if client is None:
        return False
    try:
        is_loopback = ipaddress.ip_address(client[0]).is_loopback
    except ValueError:
        return False
    if server is None or not (is_loopback or client[0] == server[0]):
        return False
    return calling_user(tuple(client), tuple(server)) in (os.geteuid(), _ROOT)


def main() -> None:
    """Run Flower's SuperLink with this process's arguments."""
    others = extensions.get_middleware
    # Outermost: what is refused is not even read.
    extensions.get_middleware = lambda: (
        Middleware(LocalControl),
        Middleware(BodyCap),
        *others(),
    )
    flower_superlink()


if __name__ == "__main__":
    main()
