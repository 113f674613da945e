"""Making a coordinator's folder, and taking hospitals in: `consilium server init`, `enroll`."""

from __future__ import annotations

import logging
import secrets
import tempfile
from collections.abc import Sequence
from pathlib import Path

import tomli_w
from flwr.common.constant import PUBLIC_KEY_ALREADY_IN_USE_MESSAGE

from common.address import parse_address
from common.enrolment import Bundle, Enrolment, seal_bundle
from common.errors import ConfigError
from common.files import write_atomically
from common.locks import hold_lock
from common.signing import SigningKey
from server.certificates import make_authority, make_server_certificate, save_certified
from server.coordinator import COORDINATOR_FILE, Coordinator, load_coordinator
from server.flower_control import ControlError
from server.roster import Roster, RosterEntry

logger = logging.getLogger(__name__)

# So long another enrolment may take.
_OTHERS_S = 60.0
_LOCAL = ("localhost", "127.0.0.1", "::1")


def init_coordinator(
    folder: Path, *, address: str, bind_host: str = "", more_hosts: Sequence[str] = ()
) -> Coordinator:
    """Write a new coordinator's folder: CA, certificate, keys, secret, an empty roster.

    address: HOST:PORT that hospitals connect to. bind_host: what the SuperLink listens on; "" is every
    interface, or loopback alone where that is the address.
    more_hosts: other names and IP addresses that the certificate is to be good for.
    Raises ConfigError when the folder holds a coordinator already; nothing is overwritten.
    """
    try:
        host = parse_address(address).host
    except ValueError as error:
        raise ConfigError(f"--address: {error}") from None
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
    SigningKey.generate().save(folder / "release.pem")
    SigningKey.generate().save(folder / "signing.pem")
    Roster([]).save(folder / "roster.json")
    settings = {"address": address}
    if bind_host or host not in _LOCAL:
        settings["bind-host"] = bind_host or "0.0.0.0"
    if host not in _LOCAL:
        # This machine's own processes need not go out and in again.
        settings["local-address"] = f"127.0.0.1:{parse_address(address).port}"
    content = tomli_w.dumps({"server": settings})
    # Last: a folder without it is none, and may be made again.
    write_atomically(folder / COORDINATOR_FILE, content.encode(), mode=0o600)
    return load_coordinator(folder)


def enrol(coordinator: Coordinator, enrolment: Enrolment) -> bytes:
    """Take a hospital in: register its SuperNode, pin its key; return the bundle that it is sent.

    The same enrolment again gives the same bundle. Raises ConfigError when a site of that name has another
    signing key, or `consilium server up` does not run, which its SuperNode must be registered with.
    """
    with hold_lock(coordinator.folder / ".enrolling", wait_s=_OTHERS_S):
        return _enrol(coordinator, enrolment)


def _enrol(coordinator: Coordinator, enrolment: Enrolment) -> bytes:
    roster = coordinator.roster()
    entry = RosterEntry(enrolment.site, enrolment.signing_key, enrolment.declared_size)
    known = roster.get(enrolment.site)
    if known is not None and known.public_key != entry.public_key:
        raise ConfigError(
            f"a site {enrolment.site!r} is enrolled with another key; if the hospital made new keys, "
            "compare fingerprints with it, and remove it from roster.json first"
        )
    if coordinator.up_pid() is None:
        raise ConfigError(
            f"`consilium server up {coordinator.folder}` does not run, and a hospital's node is registered "
            "with its SuperLink; start it, then enrol again"
        )
    with tempfile.NamedTemporaryFile("w", suffix=".pub") as public_key:
        public_key.write(enrolment.node_key.rstrip() + "\n")
        public_key.flush()
        try:
            coordinator.control().register_node(Path(public_key.name))
        except ControlError as error:
            # As it should be, if this enrolment was cut off once, or is made again.
            if PUBLIC_KEY_ALREADY_IN_USE_MESSAGE not in str(error):
                raise
    # After the node is registered: a site on the roster can connect.
    others = [one for one in roster.values() if one.site != enrolment.site]
    Roster([*others, entry]).save(coordinator.roster_file)
    bundle = Bundle(
        enrolment.site,
        coordinator.config.server.address,
        coordinator.ca.read_text(encoding="ascii"),
        SigningKey.load(coordinator.signing_key).public_hex,
    )
    return seal_bundle(bundle, SigningKey.load(coordinator.signing_key))
