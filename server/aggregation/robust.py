"""How much each site's update counts: as it is weighed, clipped, or in a geometric median.

In product space: updates are compared as D_k = s_k B_k A_k - W_k0, all modules together as one long vector,
and never as factors. A rotated copy (B R, R^-1 A) is the same update here and far away there. All that is
needed are the inner products <D_i, D_j>.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from common.adapter import FactorSource
from common.errors import ShapeError
from server.aggregation.by_module import map_modules
from server.aggregation.types import MergeRules, SiteUpdate, normalised_weights
from server.products import stacked

Matrix = npt.NDArray[np.float64]

_MAX_STEPS = 5000
# Of an update's norm: nearer than this to an update, its pull grows no more.
_SMOOTHING = 1e-6


def update_shares(
    current: FactorSource, updates: Sequence[SiteUpdate], *, rules: MergeRules
) -> list[float]:
    """Return c_k of every site: the merged update is sum_k c_k D_k.

    current: the global adapter. They sum to 1 but for clipped ones.
    Raises ShapeError when there is nothing to weigh, or a product overflows.
    """
    weights = normalised_weights(updates)
    if rules.robust == "none":
        return weights
    gram = update_gram(current, updates)
    if not np.isfinite(gram).all():
        raise ShapeError("the updates' inner products are not finite; nothing is merged")
    if rules.robust == "norm-clip":
        norms = np.sqrt(np.maximum(np.diag(gram), 0.0))
        factors = clip_factors(norms, max_norm=rules.clip_norm)
        return [weight * factor for weight, factor in zip(weights, factors, strict=True)]
    return list(map(float, geometric_median(gram, np.array(weights))))


def clip_factors(norms: Matrix, *, max_norm: float) -> list[float]:
    """Return min(1, max_norm / norm) of every update (norm thresholding, Sun et al. 1911.07963).

    norms: (K,). max_norm: 0 takes their median, so that less than half of the sites cannot raise it.
    """
    limit = max_norm or float(np.median(norms))
    return [min(1.0, limit / norm) if norm > 0 else 1.0 for norm in map(float, norms)]


def geometric_median(gram: Matrix, weights: Matrix) -> Matrix:
    """Return c, summing to 1, such that sum_k c_k D_k is the weighted geometric median of the D_k.

    gram: (K, K), <D_i, D_j>. weights: (K,), summing to 1. The point of least sum_k w_k |D_k - v|, which less
    than half of the weight cannot carry far; found by smoothed Weiszfeld steps (RFA 1912.13445).
    """
    norms = np.sqrt(np.maximum(np.diag(gram), 0.0))
    # Of the median: a huge update must not make the others look like one point.
    smoothing = _SMOOTHING * float(np.median(norms) or norms.max())
    if smoothing == 0.0:
        return weights
    shares = weights
    for _ in range(_MAX_STEPS):
        pulls = weights / np.maximum(_distances(gram, shares), smoothing)
        following = pulls / pulls.sum()
        moved = float(np.abs(following - shares).max())
        shares = following
        if moved < 1e-12:
            break
    return shares


def _distances(gram: Matrix, shares: Matrix) -> Matrix:
    """|D_k - sum_j c_j D_j| of every k; the differences are combined first, so that near ones stay exact."""
    differences = np.eye(len(shares)) - shares
    squares: Matrix = np.sum((differences @ gram) * differences, axis=1)
    return np.sqrt(np.maximum(squares, 0.0))


def update_gram(current: FactorSource, updates: Sequence[SiteUpdate]) -> Matrix:
    """Return <D_i, D_j>, (K, K), over all modules together."""
    gram = np.zeros((len(updates), len(updates)))
    for part in map_modules(lambda name: _module_gram(name, current, updates), current.modules):
        gram += part
    return gram


def _module_gram(name: str, current: FactorSource, updates: Sequence[SiteUpdate]) -> Matrix:
    pair = current.pair(name)
    # Products only: see server/aggregation/target.py.
    lefts: list[npt.NDArray[np.floating]] = [pair.B * np.float64(current.scaling_of(name))]
    rights: list[npt.NDArray[np.floating]] = [pair.A]
    for update in updates:
        returned = update.returned.pair(name)
        lefts.append(returned.B * np.float64(update.returned.scaling_of(name)))
        rights.append(returned.A)
    left, right = stacked(lefts, axis=1), stacked(rights, axis=0)
    # D_k = s_k B_k A_k - W_k0 as a sum of components: 1 for its own, -1 for those that it was sent.
    signs = np.zeros((left.shape[1], len(updates)))
    start = pair.rank
    for column, update in enumerate(updates):
        own = update.returned.rank
        signs[:own, column] = -1.0
        signs[start : start + own, column] = 1.0
        start += own
    summed: Matrix = signs.T @ ((left.T @ left) * (right @ right.T)) @ signs
    return summed
