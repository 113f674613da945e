"""New keys for a hospital that is enrolled: `consilium client rotate`, and `--finish` once they are taken.

keys/next/     the new keys, until the coordinator has taken them; the old ones answer until then
rotation.json  what is sent: public parts only, signed by the old key and the new one
"""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path

from client.provisioning import ENROLMENT_FILE, make_node_key
from client.site_config import SiteConfig
from client.withdrawals import Withdrawals
from common.audit_keys import KEY_CHANGED
from common.audit_log import AuditLog, read_audit_log
from common.enrolment import Bundle, Enrolment, seal_enrolment
from common.errors import ConfigError, SignatureError
from common.files import write_atomically
from common.locks import lock_holder
from common.membership import seal_rotation
from common.signing import SigningKey, load_or_generate

ROTATION_FILE = "rotation.json"
# What answers tasks, by command, and the lock in state/ that it holds meanwhile.
RUNNING_LOCKS = {"up": "up.lock", "agent": "agent.lock"}


def rotate(config: SiteConfig) -> Path:
    """Make new keys and return the file to send; the old ones stay in use. The same again makes no others.

    Raises ConfigError when the key in use is missing.
    """
    former = SigningKey.load(config.signing_key_path)
    new = load_or_generate(_next(config) / "signing.pem")
    enrolment = _enrolment(config, new)
    path = config.folder / ROTATION_FILE
    write_atomically(path, seal_rotation(enrolment, former=former, new=new))
    return path


def finish_rotation(config: SiteConfig, bundle: Bundle) -> None:
    """Put the new keys in the place of the old ones, which the coordinator has said hold no more.

    bundle: its answer; a coordinator that was left is taken back. Cut off, it may be given again.
    Raises ConfigError when there are no new keys, when the bundle is for others, or while the site runs,
    SignatureError when it is no coordinator's of this site.
    """
    new_key = _next(config) / "signing.pem"
    if bundle.public_key not in config.coordinator.public_keys:
        raise SignatureError(
            f"this bundle is signed by coordinator {bundle.public_key[:16]}..., which site.toml does not "
            "name; do not use it"
        )
    if not new_key.is_file():
        if SigningKey.load(config.signing_key_path).public_hex == bundle.signing_key:
            return
        raise ConfigError(
            f"{config.folder} has no new keys that wait; make them: consilium client rotate"
        )
    new = SigningKey.load(new_key)
    if (bundle.site, bundle.signing_key) != (config.site.name, new.public_hex):
        raise ConfigError(
            f"this bundle answers key {bundle.signing_key[:16]}... of {bundle.site!r}, and the new key of "
            f"{config.site.name!r} is {new.public_hex[:16]}...; ask for the bundle that answers rotation.json"
        )
    for command, lock in RUNNING_LOCKS.items():
        holder = lock_holder(config.folder / "state" / lock)
        if holder is not None:
            raise ConfigError(
                f"process {holder} is `consilium client {command}` with the old keys; end it first: kill "
                f"{holder}"
            )
    _change_log_key(config, new)
    node, node_public = config.node_key_path, config.node_key_path.with_suffix(".pub")
    enrolment = _enrolment(config, new)
    write_atomically(node_public, (enrolment.node_key + "\n").encode())
    write_atomically(node, (_next(config) / "node").read_bytes(), mode=0o600)
    write_atomically(config.folder / ENROLMENT_FILE, seal_enrolment(enrolment, new))
    write_atomically(config.signing_key_path, new_key.read_bytes(), mode=0o600)
    Withdrawals(config.folder).lift(bundle.public_key)
    # Last, and at once: while it is there, this may be given again.
    done = _next(config).with_name(f".taken-{uuid.uuid4().hex}")
    os.replace(_next(config), done)
    shutil.rmtree(done)
    (config.folder / ROTATION_FILE).unlink(missing_ok=True)


def _change_log_key(config: SiteConfig, new: SigningKey) -> None:
    """Let the new key sign the audit log from here on, unless a command that was cut off did it already."""
    path = config.folder / "state" / "audit.jsonl"
    changes = (
        line
        for line in (read_audit_log(path) if path.exists() else ())
        if line.event == KEY_CHANGED
    )
    if not any(line.fields.get("to") == new.public_hex for line in changes):
        AuditLog(path, SigningKey.load(config.signing_key_path)).change_key(new)


def _enrolment(config: SiteConfig, new: SigningKey) -> Enrolment:
    node_key = make_node_key(_next(config) / "node")
    return Enrolment(config.site.name, config.data.declared_size, new.public_hex, node_key)


def _next(config: SiteConfig) -> Path:
    return config.folder / "keys" / "next"
