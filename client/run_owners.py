"""Whose a run is: the coordinator whose task was charged first; another one's tasks of that name are refused.

A site may believe several coordinators. Without this, one could overtake the rounds of another's run, or
spend its steps. One file a run, state/run-owners/<run_uid>, holds the public key. It is written once the
charge stands, and counts only while the ledger has a charge of that run: whoever was refused has no run.
A run that is charged and has no file (from before there were any, or lost in a crash or with a backup) is
whose task comes first.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from client.policy import check_run_uid
from common.errors import ConfigError, PolicyError
from common.files import fsync_folder, write_atomically

_HEX_DIGITS = frozenset("0123456789abcdef")


class RunOwners:
    """The folder. Clearing and binding are for one task at a time; checking is safe at any.

    is_begun: whether anything was ever charged for a run.
    """

    def __init__(self, folder: Path, *, is_begun: Callable[[str], bool]) -> None:
        self._folder = folder
        self._is_begun = is_begun

    def check(self, run_uid: str, coordinator: str) -> None:
        """Raise PolicyError when a run is another coordinator's. coordinator: its public key, 64 hex digits.

        Raises ConfigError when the file of a run that was begun is damaged.
        """
        owner = self._owner(run_uid)
        if owner not in (None, coordinator):
            raise PolicyError(
                f"run {run_uid} was begun here by coordinator {str(owner)[:16]}..., and this task is signed "
                f"by coordinator {coordinator[:16]}...; it must begin a run of its own"
            )

    def clear(self, run_uid: str) -> None:
        """Remove, durably, the file of a run that was never begun; call it before the run's first charge.

        Else the charge would bring back to life what a refused coordinator left.
        """
        path = self._path(run_uid)
        if path.exists() and not self._is_begun(run_uid):
            path.unlink()
            fsync_folder(self._folder)

    def bind(self, run_uid: str, coordinator: str) -> None:
        """Let a run that is charged be a coordinator's for good, durably. Raises as `check` does."""
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
        if not self._is_begun(run_uid):
            return None
        if len(owner) != 64 or not set(owner) <= _HEX_DIGITS:
            raise ConfigError(
                f"{path} is damaged; put its backup there, or write the public key of the coordinator that "
                "began this run into it"
            )
        return owner

    def _path(self, run_uid: str) -> Path:
        return self._folder / check_run_uid(run_uid)
