"""Coordinators that this hospital has left: nothing that they ask is done any more.

state/withdrawn.json is read anew for every task, so that a process which runs heeds it at once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from client.site_config import SiteConfig
from common.audit_log import AuditLog
from common.errors import ConfigError, PolicyError
from common.files import write_atomically
from common.locks import hold_lock
from common.membership import Withdrawal, seal_withdrawal
from common.signing import SigningKey

WITHDRAWAL_FILE = "withdrawal.json"
# So long another command may take.
_OTHERS_S = 30.0


class Withdrawals:
    """The file: the public key of each coordinator that was left -> when (Unix seconds)."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "state" / "withdrawn.json"

    def all(self) -> dict[str, int]:
        """Return whom this site has left. Raises ConfigError when the file is malformed."""
        try:
            content = json.loads(self._path.read_bytes())
            return {str(key): int(at) for key, at in content.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError):
            raise ConfigError(
                f"{self._path} is not a list of coordinators that were left; restore it from a backup, or "
                "remove it and withdraw again: consilium client withdraw"
            ) from None

    def check(self, coordinator: str) -> None:
        """Raise PolicyError for a coordinator that was left. coordinator: its public key."""
        at = self.all().get(coordinator)
        if at is not None:
            when = datetime.fromtimestamp(at).strftime("%Y-%m-%d")
            raise PolicyError(
                f"this site withdrew from coordinator {coordinator[:16]}... on {when}; to come back, join it "
                "again: consilium client join BUNDLE"
            )

    def add(self, coordinator: str) -> int:
        """Leave a coordinator, and return when it was left first."""
        with self._alone():
            known = self.all()
            known.setdefault(coordinator, int(time.time()))
            self._write(known)
            return known[coordinator]

    def lift(self, coordinator: str) -> None:
        """Take a coordinator back."""
        with self._alone():
            known = self.all()
            if known.pop(coordinator, None) is not None:
                self._write(known)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        self._path.parent.mkdir(mode=0o700, exist_ok=True)
        with hold_lock(self._path.with_suffix(".lock"), wait_s=_OTHERS_S):
            yield

    def _write(self, known: dict[str, int]) -> None:
        content = (json.dumps(known, indent=2) + "\n").encode()
        write_atomically(self._path, content, mode=0o600)


def withdraw(config: SiteConfig, *, coordinator: str = "") -> Path:
    """Leave a coordinator from this moment on; return the signed statement for it, a file.

    coordinator: its public key; "" where the site believes only one. Raises ConfigError when it is not one
    of those in site.toml.
    """
    pinned = config.coordinator.public_keys
    if not coordinator and len(pinned) > 1:
        raise ConfigError(
            f"this site believes {len(pinned)} coordinators; name the one to leave: --coordinator KEY, one "
            f"of {', '.join(pinned)}"
        )
    coordinator = coordinator or pinned[0]
    if coordinator not in pinned:
        raise ConfigError(
            f"coordinator {coordinator[:16]}... is none that site.toml names; it names {', '.join(pinned)}"
        )
    key = SigningKey.load(config.signing_key_path)
    # Before anything that could fail: from here on no task of it is done.
    at = Withdrawals(config.folder).add(coordinator)
    audit = AuditLog(config.folder / "state" / "audit.jsonl", key)
    audit.append("withdrawn", coordinator=coordinator)
    audit.checkpoint()
    statement = Withdrawal(config.site.name, key.public_hex, coordinator, at)
    path = config.folder / WITHDRAWAL_FILE
    write_atomically(path, seal_withdrawal(statement, key))
    return path
