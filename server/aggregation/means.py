"""Methods that average factors: `weighted`, `rolora`, and `fedex`, which sends what that misses beside it."""

from __future__ import annotations

import numpy as np

from common.adapter import LoraPair
from server.aggregation.svd import balanced_split
from server.aggregation.target import Target
from server.aggregation.types import Cut
from server.lowrank import truncated_svd
from server.products import squared_norm


def cut_weighted(target: Target) -> Cut:
    """Return the means of A and of s B (FedAvg 1602.05629; for LoRA: FedIT 2305.05644).

    Biased: the product of means is not the mean of products; the difference is the weighted
    covariance of B and A. A site of lower rank moves the leading rows that it was sent.
    """
    pair = LoraPair(
        target.mean_a.astype(np.float32), (target.mean_sb / target.scaling).astype(np.float32)
    )
    rank = target.current.rank
    live = truncated_svd([target.mean_sb], [target.mean_a], rank=rank).live_rank
    return Cut(pair, squared_norm(target.lefts, target.rights), 0.0, live)


def cut_rolora(target: Target) -> Cut:
    """Return the mean of the factor that this round trained (RoLoRA 2502.01755, alternating rounds).

    Sites train B in one round and A in the next; the other factor is everybody's, so that the mean is exact.
    """
    return cut_weighted(target)


def cut_fedex(target: Target) -> Cut:
    """Return the means of the trained factors, and behind them what these miss of M, exactly
    (FedEx-LoRA 2410.09432, its residual).

    The residual M - s (mean B)(mean A) grows by sum_k r_k ranks a round at most. Sites are sent as much of it
    as they can hold and train on top of it, but not it: in the paper it is added to the frozen weights, here
    it is a frozen part of the adapter, since the quantised base must stay what its digest says.
    """
    trained = target.rank
    mean_sb, mean_a = target.mean_sb[:, :trained], target.mean_a[:trained]
    lefts, rights = (*target.lefts, -mean_sb), (*target.rights, mean_a)
    width = min(sum(left.shape[1] for left in lefts), *target.sides)
    residual = truncated_svd(lefts, rights, rank=width)
    rest = balanced_split(residual, scaling=target.scaling, name=target.name, fresh=False)
    total = squared_norm(target.lefts, target.rights)
    # Below this it is the rounding of float32 factors.
    if residual.total_energy <= 1e-13 * total:
        rest = LoraPair(np.zeros_like(rest.A), np.zeros_like(rest.B))
    b = np.concatenate([(mean_sb / target.scaling).astype(np.float32), rest.B], axis=1)
    a = np.concatenate([mean_a.astype(np.float32), rest.A])
    live = truncated_svd([b], [a], rank=min(trained + width, *target.sides)).live_rank
    return Cut(LoraPair(a, b), total, 0.0, live)
