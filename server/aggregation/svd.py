"""Best rank-r approximation of the mean update (FlexLoRA 2402.11505, section 3.2).

The mean is taken of products, where it is right, and the factors are cut from it by truncated SVD.
Sites may hold different ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from common.adapter import AdapterState, LoraPair
from common.seeding import derive_seed
from server.aggregation.types import Merged, SiteUpdate, normalised_weights
from server.lowrank import TruncatedSvd, truncated_svd

# Norm of a fresh row of A: that of PEFT's initial one (uniform in +-1/sqrt(d_in)).
_FRESH_ROW_NORM = 3**-0.5


def merge_svd(current: AdapterState, updates: Sequence[SiteUpdate]) -> Merged:
    """Return the best approximation, at the global rank, of M = W_g + sum w_k (s_k B_k A_k - W_k0).

    current: the global adapter. Exact when M has no more than its rank.
    Split balanced (U sqrt S, sqrt S V') with B divided by the global scaling; a component with no
    energy gets a fresh orthonormal row in A and zeros in B, else it could never learn again.
    Raises ShapeError when there is nothing to merge.
    """
    weights = normalised_weights(updates)
    everyone_has_all = all(update.sent.rank == current.rank for update in updates)
    pairs, discarded = {}, {}
    tail = total = 0.0
    for name, pair in current.pairs.items():
        terms: list[tuple[float, LoraPair]] = []
        if not everyone_has_all:
            # With equal ranks W_g and the W_k0 cancel exactly.
            terms.append((current.scaling, pair))
        for weight, update in zip(weights, updates, strict=True):
            terms.append((weight * update.returned.scaling, update.returned.pairs[name]))
            if not everyone_has_all:
                terms.append((-weight * update.sent.scaling, update.sent.pairs[name]))
        svd = truncated_svd(
            [factor * term.B.astype(np.float64) for factor, term in terms],
            [term.A for _, term in terms],
            rank=current.rank,
        )
        pairs[name] = balanced_split(svd, scaling=current.scaling, name=name)
        discarded[name] = svd.tail_energy / svd.total_energy if svd.total_energy > 0 else 0.0
        tail += svd.tail_energy
        total += svd.total_energy
    return Merged(
        AdapterState(pairs, current.scaling), discarded, tail / total if total > 0 else 0.0
    )


def balanced_split(svd: TruncatedSvd, *, scaling: float, name: str) -> LoraPair:
    """Return (B, A) with scaling * B @ A = U S Vt, dead components made able to learn.

    name: of the module; it seeds the fresh rows, so that a merge is repeatable.
    """
    live = svd.live_rank
    root = np.sqrt(svd.S)
    a = root[:, None] * svd.Vt
    b = svd.U * root / scaling
    if live < len(svd.S):
        random = np.random.default_rng(derive_seed("fresh rows", name))
        fresh = random.standard_normal((len(svd.S) - live, svd.Vt.shape[1]))
        fresh -= (fresh @ svd.Vt[:live].T) @ svd.Vt[:live]
        orthonormal, _ = np.linalg.qr(fresh.T)
        a[live:] = _FRESH_ROW_NORM * orthonormal.T
        b[:, live:] = 0.0
    return LoraPair(a.astype(np.float32), b.astype(np.float32))
