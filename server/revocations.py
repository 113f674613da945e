"""Keys that hold no more: revoked.json beside the roster, so that nobody enrols with them again."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from common.enrolment import Enrolment
from common.errors import ConfigError
from common.files import write_atomically
from server.roster import RosterEntry


@dataclass(frozen=True, slots=True)
class Revocation:
    """The keys of one site that hold no more. public_key, node_key: as in the roster.

    at: Unix seconds. why: for whoever reads it later; "rotated" and "withdrawn" are the site's own doing.
    """

    site: str
    public_key: str
    node_key: str
    at: int
    why: str

    def sentence(self) -> str:
        """When and why, in words."""
        when = datetime.fromtimestamp(self.at).strftime("%Y-%m-%d")
        return f"{self.site} was revoked on {when}" + (f" ({self.why})" if self.why else "")


class Revocations:
    """The file; entries are added and never taken away."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def all(self) -> Sequence[Revocation]:
        """Return every entry, oldest first. Raises ConfigError when the file is malformed."""
        try:
            return [Revocation(**one) for one in json.loads(self._path.read_bytes())]
        except FileNotFoundError:
            return []
        except (ValueError, TypeError):
            raise ConfigError(
                f"{self._path} is not a list of revoked keys; restore it from a backup: without it they "
                "could be enrolled again"
            ) from None

    def add(self, entry: RosterEntry, *, why: str, keys_kept: Sequence[str] = ()) -> None:
        """Let an entry's keys hold no more. keys_kept: those of them that the site keeps."""
        listed = [*self.all(), Revocation(
            site=entry.site,
            public_key="" if entry.public_key in keys_kept else entry.public_key,
            node_key="" if entry.node_key in keys_kept else entry.node_key,
            at=int(time.time()),
            why=why,
        )]  # fmt: skip
        content = [asdict(one) for one in listed]
        write_atomically(self._path, (json.dumps(content, indent=2) + "\n").encode())

    def of_site(self, site: str) -> Revocation | None:
        """Return a site's newest entry, None when there is none."""
        return next((one for one in reversed(self.all()) if one.site == site), None)

    def check(self, enrolment: Enrolment) -> None:
        """Raise ConfigError when an enrolment brings a key that holds no more, whatever its name."""
        for one in self.all():
            if enrolment.signing_key == one.public_key or enrolment.node_key == one.node_key:
                raise ConfigError(
                    f"this enrolment has a key that holds no more: {one.sentence()}; to take part again, the "
                    "hospital makes new keys (consilium client rotate) and both compare fingerprints"
                )
