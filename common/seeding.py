"""Seeds for what may be repeatable: the initial adapter, site selection, the order of records
without DP. Nothing that privacy rests on is ever seeded (client/sampling.py, client/noise.py)."""

from __future__ import annotations

import hashlib


def derive_seed(*parts: int | str) -> int:
    """Return a 32-bit seed that depends on every part and on nothing else.

    Named parts (`derive_seed(seed, "selection", server_round)`) keep streams apart, and, unlike
    Python's hash(), the result is the same in every process.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
