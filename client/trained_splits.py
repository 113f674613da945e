"""Which splits of the records each run was trained on here, as this site saw it.

One file a run, state/trained-splits/<run_uid>, written before any record is read: what a task says of the
tasks before it is only its coordinator's word.
"""

from __future__ import annotations

from pathlib import Path

from client.policy import check_run_uid
from common.canonical import canonical_json, from_canonical
from common.errors import ConfigError
from common.files import write_atomically


class TrainedSplits:
    """The folder. Noting is for one task at a time; asking is safe at any. A split "" is all of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def note(self, run_uid: str, split: str) -> None:
        """Write down durably that a run trains on a split. Raises ConfigError as `of` does."""
        known = self.of(run_uid)
        if split not in known:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            content = canonical_json(sorted({*known, split}))
            write_atomically(self._folder / check_run_uid(run_uid), content, mode=0o600)

    def of(self, run_uid: str) -> frozenset[str]:
        """Return the splits that a run trained on; none of a run from before they were noted.

        Raises ConfigError when the file is damaged.
        """
        path = self._folder / check_run_uid(run_uid)
        try:
            content = from_canonical(path.read_bytes())
        except FileNotFoundError:
            return frozenset()
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, list) or not all(isinstance(one, str) for one in content):
            raise ConfigError(
                f"{path} is damaged; put its backup there. Its run goes no further here"
            )
        return frozenset(content)
