"""Throw-away keys for a deployment on loopback, made as the product makes them."""

from __future__ import annotations

from pathlib import Path

from client.provisioning import make_node_key
from server.certificates import make_authority, make_server_certificate, save_certified


def write_server_certificates(folder: Path, *, host: str = "127.0.0.1") -> tuple[Path, Path, Path]:
    """Make a CA and a server certificate for localhost and an IP address `host`.

    Returns (ca.crt, server.crt, server.key).
    """
    authority = make_authority("Consilium test CA")
    hosts = sorted({"localhost", "127.0.0.1", host})
    save_certified(authority, folder, "ca")
    save_certified(make_server_certificate(authority, hosts=hosts), folder, "server")
    return folder / "ca.crt", folder / "server.crt", folder / "server.key"


def write_node_key(folder: Path, name: str) -> tuple[Path, Path]:
    """Make an ECDSA P-384 key as Flower wants it; return (private, public) in OpenSSH form."""
    make_node_key(folder / name)
    return folder / name, folder / f"{name}.pub"
