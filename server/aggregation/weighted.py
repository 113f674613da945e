"""Mean of the factors (FedAvg, McMahan et al. 1602.05629; for LoRA: FedIT 2305.05644, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from common.adapter import AdapterState, LoraPair
from server.aggregation.types import Merged, SiteUpdate, normalised_weights


def merge_weighted(current: AdapterState, updates: Sequence[SiteUpdate]) -> Merged:
    """Return A = A_g + sum w_k (A_k - A_k0) and the same for s B: with equal ranks, plain means.

    Biased: the product of means is not the mean of products; the difference is the weighted
    covariance of B and A. A site of lower rank moves the leading rows that it was sent.
    current: the global adapter. Raises ShapeError when there is nothing to merge.
    """
    weights = normalised_weights(updates)
    pairs = {}
    for name, pair in current.pairs.items():
        a = pair.A.astype(np.float64)
        b = pair.B.astype(np.float64) * current.scaling
        for weight, update in zip(weights, updates, strict=True):
            sent, returned = update.sent.pairs[name], update.returned.pairs[name]
            a[: sent.rank] += weight * (returned.A.astype(np.float64) - sent.A)
            b[:, : sent.rank] += (
                weight * update.returned.scaling * (returned.B.astype(np.float64) - sent.B)
            )
        pairs[name] = LoraPair(a.astype(np.float32), (b / current.scaling).astype(np.float32))
    return Merged(AdapterState(pairs, current.scaling))
