"""Whether the coordinator answers, and every way in which it does not, told apart."""

from __future__ import annotations

import datetime
import http.server
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import flwr.common.constant as flower
import httpx
import pytest
from flwr.proto.fleet_pb2 import RegisterNodeFleetRequest
from flwr.supernode.fleet_http_client import FleetHttpClient

from client import check_clock
from client.check_clock import clock_line, is_synchronised
from client.check_network import Reach, reach_coordinator
from client.provisioning import init_site, join
from client.site_config import SiteConfig
from common.enrolment import Bundle
from common.signing import SigningKey
from server import certificates
from server.certificates import Certified, make_authority, make_server_certificate
from tests.connect_proxy import connect_proxy
from tests.ports import free_port

AUTHORITY = make_authority("Coordinator CA")
STRANGER = make_authority("Web Gateway")
_PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture(autouse=True)
def _no_proxy_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*_PROXY_VARIABLES, "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def config(tmp_path: Path) -> SiteConfig:
    made = init_site(tmp_path / "north", name="north", declared_size=100, unit="record")
    bundle = Bundle(
        "north",
        "127.0.0.1:1",
        AUTHORITY.certificate.decode(),
        SigningKey.generate().public_hex,
        made.signing_key,
    )
    return join(tmp_path / "north", bundle)


class _Coordinator(http.server.BaseHTTPRequestHandler):
    status = 200
    date_offset_s = 0.0

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/health" else 404)
        self.end_headers()

    def date_time_string(self, timestamp: float | None = None) -> str:
        return super().date_time_string(time.time() + self.date_offset_s)

    def log_message(self, *arguments: object) -> None: ...


def _server_context(
    folder: Path, authority: Certified, hosts: Sequence[str] = ("127.0.0.1",)
) -> ssl.SSLContext:
    certified = make_server_certificate(authority, hosts=hosts)
    (folder / "server.pem").write_bytes(certified.certificate + certified.key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem")
    return context


@contextmanager
def _coordinator(
    context: ssl.SSLContext | None, *, status: int = 200, date_offset_s: float = 0.0
) -> Iterator[int]:
    """Serve /health on loopback; give the port. context: None speaks no TLS."""
    settings = {"status": status, "date_offset_s": date_offset_s}
    handler = type("Handler", (_Coordinator,), settings)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    if context is not None:
        server.socket = context.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _at(config: SiteConfig, port: int, host: str = "127.0.0.1") -> SiteConfig:
    section = config.coordinator.model_copy(update={"address": f"{host}:{port}"})
    return config.model_copy(update={"coordinator": section})


def _said(reach: Reach) -> str:
    """The one line that says why there is no connection."""
    assert [line.state for line in reach.lines] == ["fail"]
    assert reach.lines[0].name == "coordinator"
    assert reach.lines[0].remedy
    return f"{reach.lines[0].detail} -> {reach.lines[0].remedy}"


def test_a_coordinator_that_answers_passes_with_its_certificate_and_its_clock(
    config: SiteConfig, tmp_path: Path
) -> None:
    with _coordinator(_server_context(tmp_path, AUTHORITY)) as port:
        reach = reach_coordinator(_at(config, port))

    assert [line.state for line in reach.lines] == ["pass", "pass"]
    assert reach.lines[0].detail == f"127.0.0.1:{port} answers directly, TLSv1.3"
    assert "one root vouches for it" in reach.lines[1].detail
    assert reach.ahead_s is not None
    # The header's second, and half of what the answer took: a moment, unless the machine is busy.
    assert abs(reach.ahead_s) < 60


def test_another_ones_certificate_is_refused_and_its_issuer_named(
    config: SiteConfig, tmp_path: Path
) -> None:
    with _coordinator(_server_context(tmp_path, STRANGER)) as port:
        said = _said(reach_coordinator(_at(config, port)))
    assert "is vouched for by 'CN=Web Gateway', whom root-certificates does not name" in said


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("_SERVER_DAYS", -0.5, "has expired -> ask the coordinator to renew it"),
        ("_BACKDATED", -datetime.timedelta(days=1), "is not valid yet -> set this machine's clock"),
    ],
)
def test_a_certificate_out_of_its_time_is_told_from_a_strange_one(
    config: SiteConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
    value: object,
    words: str,
) -> None:
    monkeypatch.setattr(certificates, setting, value)
    with _coordinator(_server_context(tmp_path, AUTHORITY)) as port:
        assert words in _said(reach_coordinator(_at(config, port)))


def test_a_certificate_that_ends_soon_warns(
    config: SiteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificates, "_SERVER_DAYS", 10)
    with _coordinator(_server_context(tmp_path, AUTHORITY)) as port:
        alive, validity = reach_coordinator(_at(config, port)).lines
    assert (alive.state, validity.state) == ("pass", "warn")
    assert "9 days" in validity.detail


def test_a_certificate_for_another_host_names_that_host(config: SiteConfig, tmp_path: Path) -> None:
    context = _server_context(tmp_path, AUTHORITY, ["consilium.example.org", "10.0.0.7"])
    with _coordinator(context) as port:
        said = _said(reach_coordinator(_at(config, port)))
    assert f"127.0.0.1:{port} is for consilium.example.org, 10.0.0.7 -> correct address" in said


def test_nobody_there_no_such_name_and_no_answer_are_told_apart(config: SiteConfig) -> None:
    assert "refused the connection: nothing listens there" in _said(
        reach_coordinator(_at(config, free_port()))
    )
    assert "the name of nobody.invalid:8000 is not found" in _said(
        reach_coordinator(_at(config, 8000, host="nobody.invalid"))
    )
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        said = _said(reach_coordinator(_at(config, port), timeout_s=0.3))
    assert f"127.0.0.1:{port} gave no answer within 0.3 s" in said
    assert "or set HTTPS_PROXY" in said


def test_something_else_on_that_port_is_seen(config: SiteConfig, tmp_path: Path) -> None:
    with _coordinator(None) as port:
        assert "does not speak TLS" in _said(reach_coordinator(_at(config, port)))
    with _coordinator(_server_context(tmp_path, AUTHORITY), status=502) as port:
        alive, _ = reach_coordinator(_at(config, port)).lines
    assert alive.state == "fail"
    assert "answers /health with 502 instead of 200" in alive.detail


def test_what_join_writes_is_asked_for(config: SiteConfig) -> None:
    nowhere = config.coordinator.model_copy(update={"address": None})
    assert "has no address -> consilium client join BUNDLE" in _said(
        reach_coordinator(config.model_copy(update={"coordinator": nowhere}))
    )
    for content in (b"not a certificate", b"\xff", None):
        config.root_certificates_path.unlink()
        if content is not None:
            config.root_certificates_path.write_bytes(content)
        assert "holds no certificate to know it by" in _said(reach_coordinator(config))
        config.root_certificates_path.touch()


# Proxies


def test_a_proxy_is_taken_and_named_without_its_password(
    config: SiteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _coordinator(_server_context(tmp_path, AUTHORITY)) as port, connect_proxy() as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://user:secret@127.0.0.1:{proxy.port}")
        reach = reach_coordinator(_at(config, port))
    assert proxy.asked == [f"CONNECT 127.0.0.1:{port} HTTP/1.1"]
    assert reach.lines[0].state == "pass"
    assert f"answers through the proxy 127.0.0.1:{proxy.port}, TLSv1.3" in reach.lines[0].detail
    assert "secret" not in str(reach)


def test_an_exception_in_no_proxy_is_honoured(
    config: SiteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _coordinator(_server_context(tmp_path, AUTHORITY)) as port, connect_proxy() as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.setenv("NO_PROXY", "localhost,127.0.0.1")
        reach = reach_coordinator(_at(config, port))
    assert proxy.asked == []
    assert "answers directly" in reach.lines[0].detail


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ("407 Proxy Authentication Required", "put name and password into HTTPS_PROXY"),
        ("403 Forbidden", "to allow CONNECT to 127.0.0.1:"),
        ("504 Gateway Timeout", "it could not reach 127.0.0.1:"),
    ],
)
def test_a_proxy_that_refuses_is_quoted(
    config: SiteConfig, monkeypatch: pytest.MonkeyPatch, status: str, words: str
) -> None:
    with connect_proxy(refuse=status) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.port}")
        said = _said(reach_coordinator(config))
    assert f"the proxy 127.0.0.1:{proxy.port} refused: {status} -> " in said
    assert words in said


def test_a_proxy_that_is_not_there_is_not_mistaken_for_the_coordinator(
    config: SiteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{port}")
    said = _said(reach_coordinator(config))
    assert said.startswith(f"the proxy 127.0.0.1:{port} refused the connection")
    assert "or correct HTTPS_PROXY" in said
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.invalid:3128")
    assert "the name of the proxy proxy.invalid:3128 is not found" in _said(
        reach_coordinator(config)
    )


@pytest.mark.parametrize(
    "proxy", ["ftp://user:secret@127.0.0.1:1", "socks5://user:secret@127.0.0.1:1"]
)
def test_a_proxy_of_another_kind_is_said_in_words(
    config: SiteConfig, monkeypatch: pytest.MonkeyPatch, proxy: str
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    said = _said(reach_coordinator(config))
    assert "cannot be used" in said
    assert "secret" not in said


def test_a_proxy_that_opens_tls_is_refused_until_the_hospital_adds_its_ca(
    config: SiteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its CA in SSL_CERT_FILE does not do: Flower looks at the root certificates alone."""
    ca = tmp_path / "gateway.crt"
    ca.write_bytes(STRANGER.certificate)
    monkeypatch.setenv("SSL_CERT_FILE", str(ca))
    with (
        _coordinator(_server_context(tmp_path, STRANGER)) as opener,
        connect_proxy(divert=("127.0.0.1", opener)) as proxy,
    ):
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.port}")
        said = _said(reach_coordinator(config))
        with config.root_certificates_path.open("ab") as roots:
            roots.write(STRANGER.certificate)
        reach = reach_coordinator(config)
    assert "'CN=Web Gateway'" in said
    assert "append its CA to root-certificates: it then reads what is sent" in said
    assert [line.state for line in reach.lines] == ["pass", "pass"]
    assert "2 root certificates vouch for it" in reach.lines[1].detail


def test_a_proxy_that_speaks_tls_itself_is_believed_by_ssl_cert_file(
    config: SiteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ca = tmp_path / "gateway.crt"
    ca.write_bytes(STRANGER.certificate)
    with (
        _coordinator(_server_context(tmp_path, AUTHORITY)) as port,
        connect_proxy(tls=_server_context(tmp_path, STRANGER)) as proxy,
    ):
        monkeypatch.setenv("HTTPS_PROXY", f"https://127.0.0.1:{proxy.port}")
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(ca))
        said = _said(reach_coordinator(_at(config, port)))
        monkeypatch.setenv("SSL_CERT_FILE", str(ca))
        reach = reach_coordinator(_at(config, port))
    assert f"the proxy 127.0.0.1:{proxy.port} shows a certificate that this machine" in said
    assert "name its CA's file in SSL_CERT_FILE (REQUESTS_CA_BUNDLE is not looked at)" in said
    assert reach.lines[0].state == "pass", reach


def _flower_reaches(config: SiteConfig) -> bool:
    """Whether the client that Flower's SuperNode talks with gets an answer, be it a refusal."""
    client = FleetHttpClient.from_server_address(
        str(config.coordinator.address),
        insecure=False,
        root_certificates=config.root_certificates_path.read_bytes(),
        interceptors=[],
    )
    with client:
        try:
            client.RegisterNode(RegisterNodeFleetRequest())
        except httpx.HTTPStatusError:
            return True
        except httpx.TransportError:
            return False
    raise AssertionError("nobody here registers a node")


@pytest.mark.parametrize("scheme", ["", "http", "https"])
@pytest.mark.parametrize("no_proxy", ["", "127.0.0.1"])
@pytest.mark.parametrize("ssl_cert_file", [False, True])
@pytest.mark.parametrize("opened", [False, True])
def test_what_the_check_says_is_what_flowers_own_client_finds(
    config: SiteConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scheme: str,
    no_proxy: str,
    ssl_cert_file: bool,
    opened: bool,
) -> None:
    """opened: by a proxy that shows its own certificate for the coordinator's."""
    ca = tmp_path / "gateway.crt"
    ca.write_bytes(STRANGER.certificate)
    if ssl_cert_file:
        monkeypatch.setenv("SSL_CERT_FILE", str(ca))
    monkeypatch.setenv("NO_PROXY", no_proxy)
    with (
        _coordinator(_server_context(tmp_path, AUTHORITY)) as port,
        _coordinator(_server_context(tmp_path, STRANGER)) as opener,
        connect_proxy(
            divert=("127.0.0.1", opener) if opened else None,
            tls=_server_context(tmp_path, STRANGER) if scheme == "https" else None,
        ) as proxy,
    ):
        if scheme:
            monkeypatch.setenv("HTTPS_PROXY", f"{scheme}://127.0.0.1:{proxy.port}")
        site = _at(config, port)
        said = reach_coordinator(site).lines[0].state == "pass"
        asked = bool(proxy.asked)
        assert said == _flower_reaches(site)
    by_proxy = scheme and not no_proxy
    assert said == (not by_proxy or (not opened and (scheme == "http" or ssl_cert_file)))
    assert asked == bool(by_proxy and (scheme == "http" or ssl_cert_file))


# The clock


def test_the_coordinators_clock_is_read_from_its_answer(config: SiteConfig, tmp_path: Path) -> None:
    context = _server_context(tmp_path, AUTHORITY)
    with _coordinator(context, date_offset_s=-60) as port:
        reach = reach_coordinator(_at(config, port))
    assert reach.ahead_s is not None
    assert reach.ahead_s == pytest.approx(60, abs=30)


@pytest.mark.parametrize(
    ("ahead_s", "state"),
    [(0.4, "pass"), (-2, "pass"), (3, "warn"), (-200, "warn"), (6, "fail"), (-306, "fail")],
)
def test_a_clock_fails_where_flower_would_refuse_the_node(ahead_s: float, state: str) -> None:
    line = clock_line(ahead_s, synchronised=lambda: True)
    assert line.state == state
    assert bool(line.remedy) == (state != "pass")
    assert check_clock.AHEAD_S == flower.SYSTEM_TIME_TOLERANCE
    assert check_clock.BEHIND_S == flower.SYSTEM_TIME_TOLERANCE + flower.TIMESTAMP_TOLERANCE


@pytest.mark.parametrize(("kept", "state"), [(True, "pass"), (False, "warn"), (None, "warn")])
def test_without_the_coordinator_ntp_is_asked(kept: bool | None, state: str) -> None:
    line = clock_line(None, synchronised=lambda: kept)
    assert line.state == state
    assert "the coordinator was not heard" in line.detail


def test_a_machine_without_timedatectl_knows_nothing_of_ntp(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "")
    assert is_synchronised() is None
