"""Merges of small random adapters, and the same computed densely."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from common.adapter import AdapterState, LoraPair
from server.aggregation import METHODS, Merged, MergeRules, SiteUpdate, leading_ranks, merge
from tests.unit.adapters import Products, products, random_adapter

# What a method is exact for, whatever the sites return that it lets them train.
EXACT = ("stack", "ffa", "fedsvd", "rolora", "fedex")
# Methods that look at products only: a rotated copy of an update is the same update.
PRODUCT_SPACE = ("svd", "stack")


def updates_of(returned: Sequence[AdapterState], weights: Sequence[float]) -> list[SiteUpdate]:
    return [
        SiteUpdate(f"site-{i}", weight, state)
        for i, (state, weight) in enumerate(zip(returned, weights, strict=True))
    ]


def merged_by(
    method: str,
    current: AdapterState,
    returned: Sequence[AdapterState],
    weights: Sequence[float] | None = None,
    *,
    velocity: AdapterState | None = None,
    **rules: object,
) -> Merged:
    updates = updates_of(returned, [1.0] * len(returned) if weights is None else weights)
    return merge(current, updates, rules=MergeRules(method, **rules), velocity=velocity)  # type: ignore[arg-type]


def trained(method: str, seed: int, current: AdapterState, *, rank: int = 0) -> AdapterState:
    """Return what a site of a rank may send back in round 1: random in the factors that it trains."""
    rank = rank or current.rank
    sent = sent_to(rank, current)
    fresh = random_adapter(seed, rank=rank, scaling=sent.scaling)
    if METHODS[method].trained(1) == "both":
        return fresh
    return AdapterState(
        {name: LoraPair(sent.pairs[name].A, pair.B) for name, pair in fresh.pairs.items()},
        sent.scaling,
    )


def sent_to(rank: int, current: AdapterState) -> AdapterState:
    """Return what a site of a rank is sent, scaled by alpha / rank as the global adapter is."""
    scaling = current.scaling * current.rank / rank
    return leading_ranks(current, rank=rank, scaling=scaling)


def dense_target(
    current: AdapterState, returned: Sequence[AdapterState], shares: Sequence[float]
) -> Products:
    """Return W_g + sum c_k (W_k - W_k0) of every module, as matrices."""
    target = products(current)
    for share, state in zip(shares, returned, strict=True):
        before, after = products(sent_to(state.rank, current)), products(state)
        target = {name: target[name] + share * (after[name] - before[name]) for name in target}
    return target


def rotated(state: AdapterState, seed: int) -> AdapterState:
    """Return the same product in other factors: (B R, R^-1 A)."""
    random = np.random.default_rng(seed)
    mix = np.linalg.qr(random.standard_normal((state.rank, state.rank)))[0]
    # Up to a billion times larger on the one side and smaller on the other: exact, since powers of two.
    mix = mix * np.exp2(random.integers(-30, 31, state.rank))
    return AdapterState(
        {
            name: LoraPair(
                (np.linalg.inv(mix) @ pair.A).astype(np.float32),
                (pair.B @ mix).astype(np.float32),
            )
            for name, pair in state.pairs.items()
        },
        state.scaling,
    )


def truncated(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def norm_of(matrices: Products) -> float:
    """Return the Frobenius norm over all modules together."""
    return float(np.sqrt(sum(np.linalg.norm(matrix) ** 2 for matrix in matrices.values())))
