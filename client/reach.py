"""One question to the coordinator, sent the way Flower's SuperNode sends: same library, proxy and trust.

Flower 1.41 asks with httpx, which goes by HTTPS_PROXY (or ALL_PROXY) and NO_PROXY, and believes for the
coordinator's host the root certificates that it was given and no other: SSL_CERT_FILE and
REQUESTS_CA_BUNDLE vouch for nothing there. So a proxy that opens TLS is refused unless its CA stands in that
file. SSL_CERT_FILE counts for the connection to a proxy whose own address begins with https://.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
from cryptography import x509

from common.address import Address


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back. proxy: HOST:PORT of the one it came through, "" if none; never its password.

    ahead_s: this machine's clock minus the coordinator's, within about 1 s; None if it told no time.
    """

    status: int
    tls_version: str
    certificate: x509.Certificate
    proxy: str
    ahead_s: float | None


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong. hop: HOST:PORT that was spoken to then; is_proxy: it is no coordinator.

    at_proxy_tls: in the TLS handshake with the proxy itself. cause: the innermost error.
    """

    hop: str
    is_proxy: bool
    at_proxy_tls: bool
    cause: BaseException


def trust_only(certificates: str) -> ssl.SSLContext:
    """Return what believes these root certificates (PEM) and no other. Raises ssl.SSLError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=certificates)
    return context


def ask(address: Address, context: ssl.SSLContext, *, timeout_s: float = 10.0) -> Answer | Failure:
    """Send GET /health to the coordinator and return what came of it.

    timeout_s: of each step; name, connection, handshake and answer are steps. Raises ValueError when the
    proxy that the environment names is none that httpx can use.
    """
    way = _Way(address)
    with httpx.Client(verify=context, timeout=timeout_s) as client:
        sent_at = time.time()
        try:
            with client.stream(
                "GET", f"https://{address}/health", extensions={"trace": way.note}
            ) as response:
                received_at = time.time()
                tls: ssl.SSLObject = response.extensions["network_stream"].get_extra_info(
                    "ssl_object"
                )
                return Answer(
                    status=response.status_code,
                    tls_version=tls.version() or "",
                    certificate=x509.load_der_x509_certificate(tls.getpeercert(True) or b""),
                    proxy=way.hop if way.is_proxy else "",
                    ahead_s=_ahead_s(response.headers.get("date"), (sent_at + received_at) / 2),
                )
        except httpx.TransportError as error:
            return Failure(way.hop, way.is_proxy, way.at_proxy_tls, _innermost(error))


def certificate_shown(address: Address, *, timeout_s: float = 10.0) -> x509.Certificate | None:
    """Return the certificate that is shown at an address, whoever vouches for it; None if there is none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    answer = ask(address, context, timeout_s=timeout_s)
    return answer.certificate if isinstance(answer, Answer) else None


class _Way:
    """Where a request is, as httpcore traces it: httpx does not tell which proxy it takes."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self.hop = str(address)
        self.at_proxy_tls = False

    @property
    def is_proxy(self) -> bool:
        return self.hop != str(self._address)

    def note(self, event: str, info: Mapping[str, Any]) -> None:
        if event.endswith("connect_tcp.started"):
            self.hop = str(Address(str(info["host"]), int(info["port"])))
        # Inside a tunnel the handshake is traced under another name.
        elif event == "connection.start_tls.started":
            self.at_proxy_tls = self.is_proxy
        elif event == "connection.start_tls.complete":
            self.at_proxy_tls = False


def _ahead_s(date: str | None, now: float) -> float | None:
    try:
        # The header is cut to the second.
        return now - (parsedate_to_datetime(date or "").timestamp() + 0.5)
    except ValueError:
        return None


def _innermost(error: BaseException) -> BaseException:
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return error
