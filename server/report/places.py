"""Where a file lies on the coordinator's machine is nobody else's business: a report may be handed on."""

from __future__ import annotations

import re
from pathlib import PurePath

# A name of the hub or an address has a word, a colon or a slash before its slashes.
_PLACE = re.compile(r"(?<![\w.:/])[~/][^\s'\"`;,()]*/(?=[^\s'\"`;,()/])")


def without_places(text: str) -> str:
    """Return a text with each absolute path in it, or path from a home folder, cut to its last part."""
    return _PLACE.sub("", text)


def place_name(setting: str) -> str:
    """Return a setting that is such a path as its last part, and any other as it is."""
    return PurePath(setting).name if setting.startswith(("/", "~")) else setting
