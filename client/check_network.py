"""Does the coordinator answer from here, and is it the coordinator? In words that a network's people need."""

from __future__ import annotations

import datetime
import errno
import http
import os
import socket
import ssl
from dataclasses import dataclass

import httpcore
from cryptography import x509

from client.check_line import CheckLine, failed, passed, warned
from client.reach import Answer, Failure, ask, certificate_shown, trust_only
from client.site_config import SITE_FILE, SiteConfig
from common.address import Address, parse_address

_NAME = "coordinator"
_SOON_DAYS = 30
# OpenSSL's X509_V_ERR_...: what a certificate fails by.
_NOT_YET_VALID, _EXPIRED = 9, 10
_WRONG_HOST = frozenset({62, 64})


@dataclass(frozen=True, slots=True)
class Reach:
    """What is known of the coordinator from here. ahead_s: see `client.reach.Answer`."""

    lines: tuple[CheckLine, ...]
    ahead_s: float | None = None


def reach_coordinator(config: SiteConfig, *, timeout_s: float = 10.0) -> Reach:
    """Ask the coordinator for a sign of life, as Flower's SuperNode would ask it."""
    if config.coordinator.address is None:
        return _only(
            failed(
                _NAME,
                f"[coordinator] of {SITE_FILE} has no address",
                "consilium client join BUNDLE writes it, from the bundle that the coordinator sends",
            )
        )
    address = parse_address(config.coordinator.address)
    path = config.root_certificates_path
    try:
        text = path.read_text(encoding="ascii")
        roots = x509.load_pem_x509_certificates(text.encode())
        context = trust_only(text)
    except (OSError, ValueError) as error:
        return _only(
            failed(
                _NAME,
                f"{path} holds no certificate to know it by ({type(error).__name__})",
                "consilium client join BUNDLE writes it, or correct root-certificates in [coordinator]",
            )
        )
    try:
        answer = ask(address, context, timeout_s=timeout_s)
    except (ValueError, ImportError) as error:
        return _only(
            failed(
                _NAME,
                f"the proxy that HTTPS_PROXY or ALL_PROXY names cannot be used ({type(error).__name__})",
                "write it as http://HOST:PORT; SOCKS is not built in",
            )
        )
    if isinstance(answer, Failure):
        return _only(_explain(answer, address, timeout_s))
    return Reach((_alive(answer, address), _validity(answer.certificate, roots)), answer.ahead_s)


def _only(line: CheckLine) -> Reach:
    return Reach((line,))


def _alive(answer: Answer, address: Address) -> CheckLine:
    way = f"through the proxy {answer.proxy}" if answer.proxy else "directly"
    if answer.status == http.HTTPStatus.OK:
        return passed(_NAME, f"{address} answers {way}, {answer.tls_version}")
    return failed(
        _NAME,
        f"{address} is reached {way}, and answers /health with {answer.status} instead of 200",
        "ask the coordinator whether `consilium server up` runs, and what its edge proxy lets through",
    )


def _validity(shown: x509.Certificate, roots: list[x509.Certificate]) -> CheckLine:
    name = "certificate"
    ends = min(one.not_valid_after_utc for one in (shown, *roots))
    days = (ends - datetime.datetime.now(datetime.UTC)).days
    vouching = f"{len(roots)} root certificates vouch" if len(roots) > 1 else "one root vouches"
    detail = f"good until {ends:%Y-%m-%d}, {days} days; {vouching} for it"
    if days < _SOON_DAYS:
        return warned(name, detail, "ask the coordinator to renew it before that day")
    return passed(name, detail)


def _explain(failure: Failure, address: Address, timeout_s: float) -> CheckLine:
    """Say what went wrong where, and who can mend it."""
    hop, cause = failure.hop, failure.cause
    whom = f"the proxy {hop}" if failure.is_proxy else hop
    path = (
        "ask whoever runs the proxy, or correct HTTPS_PROXY"
        if failure.is_proxy
        else f"correct address in [coordinator] of {SITE_FILE}, let TCP out to {address}, or set HTTPS_PROXY "
        "if only a proxy gets out"
    )
    if isinstance(cause, httpcore.ProxyError):
        return _refused_by_proxy(str(cause), hop, address)
    if isinstance(cause, ssl.SSLCertVerificationError):
        if failure.at_proxy_tls:
            return failed(
                _NAME,
                f"{whom} shows a certificate that this machine does not trust",
                "name its CA's file in SSL_CERT_FILE (REQUESTS_CA_BUNDLE is not looked at), or reach it as "
                "http://HOST:PORT",
            )
        return _untrusted(cause, address, timeout_s)
    if isinstance(cause, ssl.SSLError):
        return failed(
            _NAME, f"{whom} does not speak TLS ({cause.reason or 'no reason given'})", path
        )
    if isinstance(cause, socket.gaierror):
        return failed(_NAME, f"the name of {whom} is not found", path)
    if isinstance(cause, TimeoutError | httpcore.TimeoutException):
        return failed(_NAME, f"{whom} gave no answer within {timeout_s:g} s", path)
    if isinstance(cause, OSError) and cause.errno == errno.ECONNREFUSED:
        return failed(_NAME, f"{whom} refused the connection: nothing listens there", path)
    if isinstance(cause, OSError) and cause.errno:
        return failed(_NAME, f"{whom} cannot be reached ({os.strerror(cause.errno)})", path)
    return failed(_NAME, f"{whom} gave no answer that HTTP knows ({type(cause).__name__})", path)


def _refused_by_proxy(said: str, hop: str, address: Address) -> CheckLine:
    remedy = f"ask whoever runs it to allow CONNECT to {address}"
    if said.startswith(str(http.HTTPStatus.PROXY_AUTHENTICATION_REQUIRED.value)):
        remedy = "put name and password into HTTPS_PROXY=http://NAME:PASSWORD@HOST:PORT"
    elif said.startswith("5"):
        remedy = (
            f"it could not reach {address}: correct that address, or ask whoever runs the proxy"
        )
    return failed(_NAME, f"the proxy {hop} refused: {said}", remedy)


def _untrusted(
    cause: ssl.SSLCertVerificationError, address: Address, timeout_s: float
) -> CheckLine:
    if cause.verify_code == _EXPIRED:
        return failed(
            _NAME,
            f"the certificate of {address} has expired",
            "ask the coordinator to renew it; if it says that it did, set this machine's clock",
        )
    if cause.verify_code == _NOT_YET_VALID:
        return failed(
            _NAME, f"the certificate of {address} is not valid yet", "set this machine's clock"
        )
    shown = certificate_shown(address, timeout_s=timeout_s)
    if cause.verify_code in _WRONG_HOST:
        names = ", ".join(_names(shown)) if shown is not None else "another host"
        return failed(
            _NAME,
            f"the certificate of {address} is for {names}",
            f"correct address in [coordinator] of {SITE_FILE}, or ask the coordinator to make its "
            "certificate good for this one",
        )
    issuer = f"{shown.issuer.rfc4514_string()!r}" if shown is not None else "somebody else"
    return failed(
        _NAME,
        f"the certificate of {address} is vouched for by {issuer}, whom root-certificates does not name",
        "if that is this hospital's own proxy, which opens TLS, exempt this address from it (or append its "
        "CA to root-certificates: it then reads what is sent); if it is nobody known, do not go on",
    )


def _names(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ["no host at all"]
    return [str(name.value) for name in names]
