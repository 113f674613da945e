"""A coordinator's folder from nothing: certificates that TLS takes, keys that nobody else reads."""

from __future__ import annotations

import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from common.errors import ConfigError
from common.signing import SigningKey
from server.certificates import certified_hosts, expires_at
from server.cli import app
from server.coordinator import Coordinator, load_coordinator
from server.provisioning import init_coordinator, renew_certificate
from server.release.key import load_release_key, public_pem


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
        "tls/ca.crt", "tls/server.crt", "roster.json", "release.pub",
    }  # fmt: skip
    assert modes["."] == 0o700
    assert len((folder / "superexec.secret").read_bytes()) == 32


def test_tasks_and_releases_are_signed_by_keys_of_their_own(coordinator: Coordinator) -> None:
    """Of another kind even: neither key can be mistaken for the other."""
    folder = coordinator.folder
    assert len(SigningKey.load(folder / "signing.pem").public_hex) == 64
    release = load_release_key(folder / "release.pem")
    assert release.curve.name == "secp384r1"
    assert public_pem(folder / "release.pub") == public_pem(folder / "release.pem")
    with pytest.raises(ConfigError, match="is not an Ed25519 key"):
        SigningKey.load(folder / "release.pem")


def test_it_is_reached_from_outside_by_its_address_and_from_inside_by_loopback(
    coordinator: Coordinator,
) -> None:
    assert coordinator.config.server.address == "consilium.example.org:8000"
    assert coordinator.local_address == "127.0.0.1:8000"
    # Or loopback would reach nothing.
    assert coordinator.bind.host == "0.0.0.0"
    assert len(coordinator.roster()) == 0


@pytest.mark.parametrize("outside", ["consilium.example.org:443", "127.0.0.1:8443"])
def test_behind_an_edge_it_listens_on_a_port_of_loopback(tmp_path: Path, outside: str) -> None:
    folder = str(tmp_path / "coordinator")
    done = CliRunner().invoke(app, ["init", folder, "--address", outside, "--bind-port", "8000"])
    assert done.exit_code == 0, done.output
    coordinator = load_coordinator(Path(folder))
    assert coordinator.config.server.address == outside
    assert str(coordinator.bind) == coordinator.local_address == "127.0.0.1:8000"


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


# The next certificate


def test_the_next_certificate_is_good_for_the_same_hosts_and_longer(
    coordinator: Coordinator,
) -> None:
    before, key = coordinator.certificate.read_bytes(), coordinator.certificate_key.read_bytes()
    hosts = renew_certificate(coordinator)
    assert hosts == certified_hosts(before)
    after = coordinator.certificate.read_bytes()
    assert after != before
    assert expires_at(after) >= expires_at(before)
    assert coordinator.certificate_key.read_bytes() == key
    for host in ("consilium.example.org", "10.0.0.7"):
        assert _handshake(coordinator, host) == ""


def test_a_new_key_comes_with_it_where_that_is_asked_for(coordinator: Coordinator) -> None:
    key = coordinator.certificate_key.read_bytes()
    renew_certificate(coordinator, new_key=True)
    assert coordinator.certificate_key.read_bytes() != key
    assert stat.S_IMODE(coordinator.certificate_key.stat().st_mode) == 0o600
    assert _handshake(coordinator, "consilium.example.org") == ""


def test_an_address_that_was_changed_since_is_covered_too(coordinator: Coordinator) -> None:
    path = coordinator.folder / "coordinator.toml"
    path.write_text(path.read_text().replace("consilium.example.org", "new.example.org"))
    moved = load_coordinator(coordinator.folder)
    assert "new.example.org" in renew_certificate(moved)
    assert _handshake(moved, "new.example.org") == ""


def test_the_authoritys_key_may_be_kept_elsewhere_but_no_other_takes_its_place(
    coordinator: Coordinator, tmp_path: Path
) -> None:
    before = coordinator.certificate.read_bytes()
    elsewhere = (coordinator.folder / "tls" / "ca.key").rename(tmp_path / "safe.key")
    with pytest.raises(ConfigError, match=r"cannot be read .* name it: --ca-key FILE"):
        renew_certificate(coordinator)
    other = init_coordinator(tmp_path / "other", address="consilium.example.org:8000")
    with pytest.raises(ConfigError, match="not that of tls/ca.crt"):
        renew_certificate(coordinator, ca_key=other.ca.with_name("ca.key"))
    with pytest.raises(ConfigError, match="no unencrypted ECDSA key"):
        renew_certificate(coordinator, ca_key=coordinator.signing_key)
    assert coordinator.certificate.read_bytes() == before
    done = CliRunner().invoke(app, ["renew", str(coordinator.folder), "--ca-key", str(elsewhere)])
    assert done.exit_code == 0, done.output
    assert "end that and start it again" in " ".join(done.output.split())
    assert _handshake(coordinator, "10.0.0.7") == ""


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
