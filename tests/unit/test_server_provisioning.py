"""A coordinator's folder from nothing: certificates that TLS takes, keys that nobody else reads."""

from __future__ import annotations

import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest

from common.errors import ConfigError
from common.signing import SigningKey
from server.coordinator import Coordinator
from server.provisioning import init_coordinator


@pytest.fixture
def coordinator(tmp_path: Path) -> Coordinator:
    return init_coordinator(
        tmp_path / "coordinator", address="consilium.example.org:8000", more_hosts=["10.0.0.7"]
    )


def test_only_its_owner_reads_what_is_secret(coordinator: Coordinator) -> None:
    folder = coordinator.folder
    modes = {
        str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode)
        for path in [folder, *folder.rglob("*")]
    }
    assert {name for name, mode in modes.items() if mode & 0o077} == {
        "tls/ca.crt", "tls/server.crt", "roster.json",
    }  # fmt: skip
    assert modes["."] == 0o700
    assert len((folder / "superexec.secret").read_bytes()) == 32


def test_tasks_and_releases_are_signed_by_keys_of_their_own(coordinator: Coordinator) -> None:
    keys = {SigningKey.load(coordinator.folder / f"{name}.pem").public_hex
            for name in ("signing", "release")}  # fmt: skip
    assert len(keys) == 2


def test_it_is_reached_from_outside_by_its_address_and_from_inside_by_loopback(
    coordinator: Coordinator,
) -> None:
    assert coordinator.config.server.address == "consilium.example.org:8000"
    assert coordinator.local_address == "127.0.0.1:8000"
    # Or loopback would reach nothing.
    assert coordinator.bind.host == "0.0.0.0"
    assert len(coordinator.roster()) == 0


@pytest.mark.parametrize("host", ["consilium.example.org", "10.0.0.7", "127.0.0.1", "localhost"])
def test_the_certificate_is_good_for_every_host_that_it_was_made_for(
    coordinator: Coordinator, host: str
) -> None:
    assert _handshake(coordinator, host) == ""


@pytest.mark.parametrize("host", ["example.org", "10.0.0.8"])
def test_and_for_no_other(coordinator: Coordinator, host: str) -> None:
    assert "doesn't match" in _handshake(coordinator, host) or "mismatch" in _handshake(
        coordinator, host
    )


def test_nor_for_those_who_trust_another_authority(
    coordinator: Coordinator, tmp_path: Path
) -> None:
    other = init_coordinator(tmp_path / "other", address="consilium.example.org:8000")
    said = _handshake(coordinator, "consilium.example.org", trusted=other.ca)
    assert "verify failed" in said


def test_nothing_is_ever_overwritten(coordinator: Coordinator) -> None:
    before = {path: path.read_bytes() for path in coordinator.folder.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="whose keys hospitals have pinned"):
        init_coordinator(coordinator.folder, address="other.example.org:8000")
    assert before == {path: path.read_bytes() for path in before}


def test_an_address_that_is_none_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--address: 'consilium' is not HOST:PORT"):
        init_coordinator(tmp_path / "coordinator", address="consilium")
    assert not (tmp_path / "coordinator").exists()


def _handshake(coordinator: Coordinator, host: str, *, trusted: Path | None = None) -> str:
    """Shake hands over TLS as a hospital would that looks for `host`; return what was wrong."""
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(coordinator.certificate, coordinator.certificate_key)
    client = ssl.create_default_context(cafile=str(trusted or coordinator.ca))
    here, there = socket.socketpair()

    def serve() -> None:
        try:
            with server.wrap_socket(there, server_side=True):
                pass
        except (ssl.SSLError, OSError):
            pass

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.wrap_socket(here, server_hostname=host):
            return ""
    except ssl.SSLError as error:
        return str(error)
    finally:
        here.close()
        thread.join(5.0)
