"""Are this hospital's keys there, of the right kind, and readable by nobody else?"""

from __future__ import annotations

import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from client.check_line import CheckLine, failed, passed
from client.site_config import SITE_FILE, SiteConfig
from common.errors import ConfigError
from common.signing import SigningKey

_ROOT = 0
# Whoever may only pass through a folder reads nothing of it: an agent's socket may lie in it.
_FOLDER_BITS = stat.S_IRGRP | stat.S_IWGRP | stat.S_IRWXO
_FILE_BITS = stat.S_IRWXG | stat.S_IRWXO


def check_keys(config: SiteConfig) -> Iterator[CheckLine]:
    """Load both private keys, and look at who may read what should be this user's alone."""
    yield _signing_key(config)
    yield _node_key(config)
    yield _modes(config)
    yield _owner(config)


def _signing_key(config: SiteConfig) -> CheckLine:
    name, path = "signing key", config.signing_key_path
    try:
        public = SigningKey.load(path).public_hex
    except ConfigError as error:
        return failed(name, str(error), "restore it from backup; a new one has to be enrolled")
    except OSError as error:
        return _unreadable(name, path, error)
    return passed(name, f"Ed25519, public {public[:16]}...")


def _node_key(config: SiteConfig) -> CheckLine:
    name, path = "node key", config.node_key_path
    again = "restore it from backup; a new one (ssh-keygen -t ecdsa -b 384) has to be enrolled"
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), password=None)
    except FileNotFoundError:
        return failed(name, f"no node key at {path}", again)
    except OSError as error:
        return _unreadable(name, path, error)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return failed(name, f"{path} is no unencrypted private key in OpenSSH form", again)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != "secp384r1":
        return failed(name, f"{path} is not ECDSA P-384, which Flower needs", again)
    public = path.with_suffix(".pub")
    openssh = (serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    own = key.public_key().public_bytes(*openssh).split()
    if public.is_file() and public.read_bytes().split()[:2] != own:
        return failed(
            name,
            f"{public} is not the public half of {path}",
            f"ssh-keygen -y -f {path} > {public}; if the wrong one was enrolled, enrol again",
        )
    return passed(name, "ECDSA P-384")


def _modes(config: SiteConfig) -> CheckLine:
    folders = [config.folder, config.signing_key_path.parent, config.folder / "state"]
    files = [config.signing_key_path, config.node_key_path, config.folder / SITE_FILE]
    wide = [path for path in dict.fromkeys(folders) if _mode(path) & _FOLDER_BITS]
    open_files = [path for path in files if _mode(path) & _FILE_BITS]
    if not wide and not open_files:
        return passed("modes", f"{config.folder}, its keys and {SITE_FILE} are this user's alone")
    remedies = [
        f"chmod {mode} {' '.join(map(str, paths))}"
        for mode, paths in (("700", wide), ("600", open_files))
        if paths
    ]
    listed = ", ".join(f"{path} ({_mode(path):o})" for path in (*wide, *open_files))
    return failed("modes", f"other users may read {listed}", "; ".join(remedies))


def _owner(config: SiteConfig) -> CheckLine:
    owner, user = config.folder.stat().st_uid, os.geteuid()
    state = config.folder / "state"
    paths = [config.signing_key_path, config.node_key_path, config.folder / SITE_FILE, state]
    strangers = [path for path in paths if path.exists() and path.stat().st_uid != owner]
    if strangers:
        return failed(
            "owner",
            f"{config.folder} is {_user(owner)}'s, and not {', '.join(map(str, strangers))}",
            f"chown -R {_user(owner)} {config.folder}",
        )
    if user not in (owner, _ROOT):
        return failed(
            "owner",
            f"{config.folder} is {_user(owner)}'s, and this is {_user(user)}",
            f"run consilium client as {_user(owner)}",
        )
    return passed("owner", _user(owner))


def _unreadable(name: str, path: Path, error: OSError) -> CheckLine:
    return failed(
        name, f"{path} cannot be read ({error.strerror})", "run this as the user that owns it"
    )


def _mode(path: Path) -> int:
    """Permission bits, 0 where there is nothing or it may not be asked."""
    try:
        return stat.S_IMODE(path.stat().st_mode)
    except OSError:
        return 0


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)
