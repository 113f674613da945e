"""How much memory this process has held."""

from __future__ import annotations

import resource
import sys


def peak_memory_bytes() -> int:
    """Return the largest resident set of this process until now (getrusage(2), ru_maxrss)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return peak if sys.platform == "darwin" else peak * 1024
