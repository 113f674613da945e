"""Reports over HTTP, read-only, to this user's browser on this machine.

    python -m server.report.serving --run RUN_DIR --port PORT
    python -m server.report.serving --coordinator DIR --port PORT

Loopback alone, GET alone, the pages named here alone. A page of another origin cannot read one: the Host
header must be ours (DNS rebinding), requests that a browser marks as cross-site are refused, and so are
processes of other users where the system says whose they are.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from server.coordinator import load_coordinator
from server.local_caller import calling_user
from server.report.live import LiveReports
from server.report.markup import policy, render
from server.runs import AskedRuns

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
_ROOT = 0
_BIND_AGAIN_S = 10.0
# The system's own word on whose a connection is; where there is none, loopback has to do.
_TELLS_USERS = Path("/proc/self/net/tcp")
_HEADERS = {
    "content-security-policy": f"{policy(live=True)}; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


@dataclass(frozen=True, slots=True)
class ListedRun:
    """A run as the list of a coordinator's runs has it."""

    uid: str
    name: str
    state: str
    done: int
    rounds: int


class OwnUserOnly:
    """ASGI middleware: 405 for all but GET, 403 for whoever is not this user's browser on this machine."""

    def __init__(self, app: ASGIApp, *, port: int) -> None:
        self._app = app
        self._hosts = {f"{name}:{port}".encode() for name in (HOST, "localhost")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            return
        refused = self._refusal(scope)
        if refused is None:
            await self._app(scope, receive, send)
            return
        logger.warning("refused %s: %s", scope["path"][:100], refused.phrase)
        await PlainTextResponse(refused.phrase, refused, headers=_HEADERS)(scope, receive, send)

    def _refusal(self, scope: Scope) -> HTTPStatus | None:
        if scope["method"] != "GET":
            return HTTPStatus.METHOD_NOT_ALLOWED
        headers = dict(scope["headers"])
        if headers.get(b"host") not in self._hosts:
            return HTTPStatus.MISDIRECTED_REQUEST
        if headers.get(b"sec-fetch-site", b"none") not in (b"none", b"same-origin"):
            return HTTPStatus.FORBIDDEN
        client, server = scope.get("client"), scope.get("server")
        if client is None or server is None:
            return HTTPStatus.FORBIDDEN
        if _TELLS_USERS.exists():
            caller = calling_user(tuple(client), tuple(server))
            if caller not in (os.geteuid(), _ROOT):
                return HTTPStatus.FORBIDDEN
        return None


def report_app(
    *, port: int, run_dir: Path | None = None, runs: AskedRuns | None = None
) -> Starlette:
    """Return what serves one run's report at /, or a list of runs there and each one's at /run/UID.

    port: that it is reached at, which the Host header has to name.
    """
    reports = LiveReports()

    def answer(
        request: Request, *, page: Callable[[], str], version: Callable[[], str]
    ) -> Response:
        if "version" in request.query_params:
            return PlainTextResponse(version(), headers=_HEADERS)
        return HTMLResponse(page(), headers=_HEADERS)

    def of_run(request: Request, folder: Path) -> Response:
        return answer(
            request, page=lambda: reports.page(folder), version=lambda: reports.version(folder)
        )

    def start(request: Request) -> Response:
        if run_dir is not None:
            return of_run(request, run_dir)
        listed = _listed(runs)
        shown = "\n".join(map(str, listed.values()))
        version = hashlib.sha256(shown.encode()).hexdigest()[:16]
        return answer(
            request, page=lambda: _list_page(listed, version=version), version=lambda: version
        )

    def one(request: Request) -> Response:
        known = runs.find(request.path_params["uid"]) if runs is not None else None
        if known is None:
            return PlainTextResponse("no such run", HTTPStatus.NOT_FOUND, headers=_HEADERS)
        return of_run(request, known.folder.path)

    return Starlette(
        routes=[Route("/", start), Route("/run/{uid}", one)],
        middleware=[Middleware(OwnUserOnly, port=port)],
    )


def _listed(runs: AskedRuns | None) -> Mapping[str, ListedRun]:
    found = runs.all() if runs is not None else []
    return {
        run.uid: ListedRun(
            run.uid,
            run.folder.path.name,
            run.state.kind,
            run.state.rounds_done,
            run.state.rounds,
        )
        for run in reversed(found)
    }


def _list_page(listed: Mapping[str, ListedRun], *, version: str) -> str:
    goes = sum(run.state in ("running", "waiting") for run in listed.values())
    outcome = f"{len(listed)} runs, {goes} of which go." if listed else "No run was asked for yet."
    return render(
        "runs.html.j2",
        version=version,
        title="Runs",
        outcome=outcome,
        runs=tuple(listed.values()),
    )


def http_server(app: Starlette) -> uvicorn.Server:
    """Return what serves an app on a socket that is bound already."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
        )
    )


def serve(app: Starlette, *, port: int) -> None:
    """Serve until a signal. A port that is taken is waited for: what it shows is not worth an end."""
    with _bound(port) as listener:
        http_server(app).run(sockets=[listener])


def _bound(port: int) -> socket.socket:
    while True:
        listener = socket.socket()
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((HOST, port))
            return listener
        except OSError as error:
            listener.close()
            logger.warning("port %d: %s; trying again", port, error.strerror)
            time.sleep(_BIND_AGAIN_S)


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m server.report.serving")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", type=Path)
    what.add_argument("--coordinator", type=Path)
    parser.add_argument("--port", type=int, required=True)
    asked = parser.parse_args()
    runs = AskedRuns(load_coordinator(asked.coordinator).launches) if asked.coordinator else None
    serve(report_app(port=asked.port, run_dir=asked.run, runs=runs), port=asked.port)


if __name__ == "__main__":
    _main()
