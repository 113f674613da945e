"""Merging site updates into the next global adapter: one file per family, one table of methods.

Notation (DESIGN section 6): W_g = s B A is the global update, W_k0 what site k was sent, its update
D_k = s_k B_k A_k - W_k0, w_k weights that sum to 1, and the target M = W_g + sum_k w_k D_k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from common.adapter import AdapterState
from server.aggregation.svd import merge_svd
from server.aggregation.types import Merged, SiteUpdate
from server.aggregation.weighted import merge_weighted

Merge: TypeAlias = Callable[[AdapterState, Sequence[SiteUpdate]], Merged]

METHODS: dict[str, Merge] = {
    "svd": merge_svd,
    "weighted": merge_weighted,
}

__all__ = ["METHODS", "Merge", "Merged", "SiteUpdate", "merge_svd", "merge_weighted"]
