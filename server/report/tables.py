"""Tables of text, and numbers as people say them."""

from __future__ import annotations

import math
from dataclasses import dataclass

NOTHING = "–"


@dataclass(frozen=True, slots=True)
class TextTable:
    """Cells are text; the first `words` columns are words, the others numbers. marked: rows to point out."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1
    marked: frozenset[int] = frozenset()


def number(value: float | None, form: str = ".3f") -> str:
    """Return a number as text."""
    if value is None:
        return NOTHING
    return (
        format(value, form) if math.isfinite(value) else ("infinite" if value > 0 else "no number")
    )


def size(size_bytes: float) -> str:
    """Return a number of bytes as people say it."""
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.1f} {unit}"
    return f"{size_bytes:.0f} B"


def duration(seconds: float) -> str:
    """Return a time as people say it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
