"""Sites that the coordinator shuts out of a run, also while it goes: excluded.json in the run's folder."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from common.files import write_atomically

EXCLUSIONS_FILE = "excluded.json"


@dataclass(frozen=True, slots=True)
class Exclusion:
    """Since when (Unix seconds) a site is shut out, and why."""

    at: int
    why: str


class Exclusions:
    """The file, which a command writes and a going run reads."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def current(self) -> Mapping[str, Exclusion]:
        """Return who is shut out now, by site. Raises ConfigError when the file is malformed."""
        try:
            content = json.loads(self._path.read_bytes())
            return {
                site: Exclusion(int(one["at"]), str(one["why"])) for site, one in content.items()
            }
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ConfigError(
                f"{self._path} is not a list of excluded sites; remove it and exclude them again with "
                "`consilium server exclude`"
            ) from None

    def add(self, site: str, *, why: str) -> None:
        """Shut a site out; one that is already stays as it was."""
        current = dict(self.current())
        current.setdefault(site, Exclusion(int(time.time()), why))
        self._write(current)

    def remove(self, site: str) -> None:
        """Let a site in again. Raises ConfigError when it was not shut out."""
        current = dict(self.current())
        if site not in current:
            named = ", ".join(sorted(current)) or "nobody"
            raise ConfigError(f"site {site!r} is not excluded; excluded: {named}")
        del current[site]
        self._write(current)

    def _write(self, exclusions: Mapping[str, Exclusion]) -> None:
        content: dict[str, Any] = {
            site: {"at": one.at, "why": one.why} for site, one in sorted(exclusions.items())
        }
        write_atomically(self._path, (json.dumps(content, indent=2) + "\n").encode())
