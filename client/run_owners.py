"""Whose a run is: the coordinator whose task was charged first; another one's tasks of that name are refused.

A site may believe several coordinators. Without this, one could overtake the rounds of another's run, or
spend its steps. One file a run, state/run-owners/<run_uid>, holds the public key; it is never changed.
"""

from __future__ import annotations

from pathlib import Path

from client.policy import check_run_uid
from common.errors import ConfigError, PolicyError
from common.files import write_atomically

_HEX_DIGITS = frozenset("0123456789abcdef")


class RunOwners:
    """The folder. Binding is for one task at a time; checking is safe at any."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def check(self, run_uid: str, coordinator: str) -> None:
        """Raise PolicyError when a run is another coordinator's. coordinator: its public key, 64 hex digits.

        Raises ConfigError when the run's file is damaged.
        """
        owner = self._owner(run_uid)
        if owner not in (None, coordinator):
            raise PolicyError(
                f"run {run_uid} was begun here by coordinator {str(owner)[:16]}..., and this task is signed "
                f"by coordinator {coordinator[:16]}...; it must begin a run of its own"
            )

    def bind(self, run_uid: str, coordinator: str) -> None:
        """Let a run be a coordinator's for good, durably. Raises as `check` does."""
        self.check(run_uid, coordinator)
        if self._owner(run_uid) is None:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            write_atomically(self._path(run_uid), coordinator.encode(), mode=0o600)

    def _owner(self, run_uid: str) -> str | None:
        path = self._path(run_uid)
        try:
            owner = path.read_bytes().decode("ascii", "replace")
        except FileNotFoundError:
            return None
        if len(owner) != 64 or not set(owner) <= _HEX_DIGITS:
            raise ConfigError(
                f"{path} is damaged; put its backup there, or write the public key of the coordinator that "
                "began this run into it"
            )
        return owner

    def _path(self, run_uid: str) -> Path:
        return self._folder / check_run_uid(run_uid)
