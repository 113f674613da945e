"""Merging site updates into the next global adapter: one file per family, one table of methods.

Notation (DESIGN section 6): s = alpha/r; W_g = s B A is the global adapter as a product (m x n, never
formed), W_k0 its leading r_k ranks, which site k was sent, D_k = s_k B_k A_k - W_k0 its update, w_k weights
that sum to 1, c_k what the update is multiplied by (w_k, unless a robust rule says otherwise), and the target
M = W_g + sum_k c_k D_k.

    svd       best rank-r approximation of M                       svd.py
    stack     M itself; the adapter grows                          svd.py
    weighted  mean of A, mean of B                                 means.py
    rolora    the same, with one factor trained at a time          means.py
    fedex     the same, with what it misses of M beside it         means.py
    ffa       A stays as it began, mean of B                       frozen.py
    fedsvd    the same, with A = V' of M = U S V' in each round    frozen.py
"""

from __future__ import annotations

from server.aggregation.merging import merge, merge_modules, merge_report
from server.aggregation.methods import METHODS, Factors, Method
from server.aggregation.robust import update_shares
from server.aggregation.types import (
    Merged,
    MergedModule,
    MergeReport,
    MergeRules,
    SiteUpdate,
    leading_ranks,
)

__all__ = [
    "METHODS",
    "Factors",
    "MergeReport",
    "MergeRules",
    "Merged",
    "MergedModule",
    "Method",
    "SiteUpdate",
    "leading_ranks",
    "merge",
    "merge_modules",
    "merge_report",
    "update_shares",
]
