"""Making a coordinator's folder, and its next certificate: `consilium server init`, `renew`."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path

import tomli_w

from common.address import parse_address
from common.errors import ConfigError
from common.files import write_atomically
from common.signing import SigningKey
from server.certificates import (
    Certified,
    certified_hosts,
    make_authority,
    make_server_certificate,
    save_certified,
)
from server.coordinator import COORDINATOR_FILE, Coordinator, load_coordinator
from server.release.key import make_release_key
from server.roster import Roster

_LOCAL = ("localhost", "127.0.0.1", "::1")


def init_coordinator(
    folder: Path,
    *,
    address: str,
    bind_host: str = "",
    bind_port: int = 0,
    more_hosts: Sequence[str] = (),
) -> Coordinator:
    """Write a new coordinator's folder: CA, certificate, keys, secret, an empty roster.

    address: HOST:PORT that hospitals connect to. bind_port: the SuperLink's behind an edge, which has that
    address; 0 is no edge. bind_host: what the SuperLink listens on; "" is loopback behind an edge or where
    that is the address, and every interface otherwise.
    more_hosts: other names and IP addresses that the certificate is to be good for.
    Raises ConfigError when the folder holds a coordinator already; nothing is overwritten.
    """
    try:
        outside = parse_address(address)
    except ValueError as error:
        raise ConfigError(f"--address: {error}") from None
    host = outside.host
    if (folder / COORDINATOR_FILE).exists() or (folder / "signing.pem").exists():
        raise ConfigError(
            f"{folder} holds a coordinator already, whose keys hospitals have pinned; choose another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    tls = folder / "tls"
    tls.mkdir(mode=0o700, exist_ok=True)
    authority = make_authority(f"Consilium coordinator {host}")
    hosts = list(dict.fromkeys([host, *more_hosts, *_LOCAL]))
    server = make_server_certificate(authority, hosts=hosts)
    save_certified(authority, tls, "ca")
    save_certified(server, tls, "server")
    write_atomically(folder / "superexec.secret", secrets.token_bytes(32), mode=0o600)
    make_release_key(folder)
    SigningKey.generate().save(folder / "signing.pem")
    Roster([]).save(folder / "roster.json")
    settings: dict[str, str | int] = {"address": address}
    if bind_port:
        # The edge is on this machine, and nobody else need reach what is behind it.
        settings |= {"bind-host": bind_host or "127.0.0.1", "bind-port": bind_port}
    elif bind_host or host not in _LOCAL:
        settings["bind-host"] = bind_host or "0.0.0.0"
    if bind_port or host not in _LOCAL:
        # This machine's own processes need not go out and in again.
        settings["local-address"] = f"127.0.0.1:{bind_port or outside.port}"
    content = tomli_w.dumps({"server": settings})
    # Last: a folder without it is none, and may be made again.
    write_atomically(folder / COORDINATOR_FILE, content.encode(), mode=0o600)
    return load_coordinator(folder)


def renew_certificate(
    coordinator: Coordinator, *, ca_key: Path | None = None, new_key: bool = False
) -> Sequence[str]:
    """Write the SuperLink's next certificate and return the hosts that it is good for: those it was good for.

    ca_key: where the CA's key is, if not in tls/. new_key: make a new key as well; without, one file changes
    in one step. With it the key is written first: cut off in between, the same command mends it.
    Raises ConfigError when the CA's key is missing or another's.
    """
    ca_key = ca_key or coordinator.ca.with_name("ca.key")
    try:
        authority = Certified(coordinator.ca.read_bytes(), ca_key.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"the CA's key cannot be read at {ca_key} ({error.strerror}); if it is kept elsewhere, name it: "
            "--ca-key FILE"
        ) from None
    address = parse_address(coordinator.config.server.address).host
    hosts = list(dict.fromkeys([*certified_hosts(coordinator.certificate.read_bytes()), address]))
    key = b"" if new_key else coordinator.certificate_key.read_bytes()
    made = make_server_certificate(authority, hosts=hosts, key=key)
    if new_key:
        save_certified(made, coordinator.certificate.parent, "server")
    else:
        write_atomically(coordinator.certificate, made.certificate)
    return hosts
