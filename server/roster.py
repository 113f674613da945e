"""The roster: which sites the coordinator knows, and the keys and public size pinned for each."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from common.canonical import canonical_json
from common.enrolment import MAX_DECLARED_SIZE
from common.errors import ConfigError
from common.files import write_atomically


@dataclass(frozen=True, slots=True)
class RosterEntry:
    """One enrolled site: its name, Ed25519 public key (64 hex digits) and declared size.

    node_key: of its SuperNode, in OpenSSH form; "" in a simulation, which has none.
    Raises ConfigError for a declared size that is no weight: no integer in 1 to 10^12.
    """

    site: str
    public_key: str
    declared_size: int
    node_key: str = ""

    def __post_init__(self) -> None:
        size = self.declared_size
        if type(size) is not int or not 1 <= size <= MAX_DECLARED_SIZE:
            raise ConfigError(
                f"the roster has {self.site!r} with declared size {size!r}, which is no weight; let it be an "
                f"integer from 1 to {MAX_DECLARED_SIZE:,}, the one that the site enrolled with"
            )


class Roster(Mapping[str, RosterEntry]):
    """Site name -> entry, sorted by name."""

    def __init__(self, entries: Iterable[RosterEntry]) -> None:
        listed = sorted(entries, key=lambda entry: entry.site)
        self._entries = {entry.site: entry for entry in listed}
        if len(self._entries) != len(listed):
            raise ConfigError("the roster names a site twice; every site needs a name of its own")

    def __getitem__(self, site: str) -> RosterEntry:
        return self._entries[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def digest(self) -> str:
        """Return the SHA-256 (hex) of all entries."""
        content = [asdict(entry) for entry in self.values()]
        return hashlib.sha256(canonical_json(content)).hexdigest()

    def save(self, path: Path) -> None:
        """Write the roster as JSON."""
        content = [asdict(entry) for entry in self.values()]
        write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> Roster:
        """Return a saved roster. Raises ConfigError when it is missing, malformed or has a bad size."""
        try:
            return cls(RosterEntry(**entry) for entry in json.loads(path.read_text()))
        except FileNotFoundError:
            raise ConfigError(f"no roster at {path}; enrol a site first") from None
        except (ValueError, TypeError):
            raise ConfigError(f"{path} is not a roster; restore it from a backup") from None


class LiveRoster:
    """The roster of a run that goes: the sites that it began with, each as roster.json has it now.

    Who leaves the file is gone here at once, and new keys hold at once; who joins it takes part after a
    resume. path: of the file; without one nothing changes.
    """

    def __init__(self, began: Roster, path: Path | None = None) -> None:
        self.began = began
        self._path = path
        self._version: tuple[int, int, int] | None = None
        self._current = began

    def current(self) -> Roster:
        """Return who is enrolled now. Raises ConfigError when the file is missing or malformed."""
        if self._path is None:
            return self._current
        version = _version(self._path)
        if version is None or version != self._version:
            now = Roster.load(self._path)
            self._current = Roster(entry for entry in now.values() if entry.site in self.began)
            self._version = version
        return self._current

    def gone(self) -> list[str]:
        """Return who was on the roster when the run began and is not any more."""
        return sorted(self.began.keys() - self.current().keys())


def _version(path: Path) -> tuple[int, int, int] | None:
    """What a file differs by from every other that was put in its place."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
