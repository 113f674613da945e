"""The target of a merge, M = W_g + sum_k c_k D_k, of one module: as stacked factors, never formed.

What site k was sent are the leading r_k ranks of W_g = s B A. So its update is D_k = s_k B_k A_k - W_k0 with
W_k0 = s B[:, :r_k] A[:r_k], and

    M = s B diag(kept) A + sum_k c_k s_k B_k A_k,      kept_j = 1 - sum of c_k over the sites with r_k > j,

of rank sum_k r_k where everybody holds all ranks and the shares sum to 1, and at most r more. Only products
enter it: a site that rescales its factors, (B R, R^-1 A), changes nothing. (Differences of factors would be
exact for a small update, and huge for a rescaled one: sB_k - sB and A_k - A then drown all others.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.adapter import FactorSource, LoraPair
from common.errors import ShapeError
from server.aggregation.types import SiteUpdate
from server.products import inner_product

Matrix = npt.NDArray[np.float64]
Terms = tuple[tuple[Matrix, ...], tuple[Matrix, ...]]

# Of what is 1 less the shares: rounding.
_NOTHING = 1e-12


@dataclass(frozen=True, slots=True)
class Target:
    """M = sum_i lefts[i] @ rights[i] of one module, in float64.

    lefts: each (d_out, r_i); rights: each (r_i, d_in). current: the global factors. scaling: s, of the merged
    module. mean_a, mean_sb: means of A (r, d_in) and of s B (d_out, r) over the sites.
    change: M - W_g alike. a_is_common: whether every site sent the A that it was sent.
    rank: that of the merged adapter, or of its part that sites train where a method lets it grow.
    """

    name: str
    current: LoraPair
    scaling: float
    rank: int
    lefts: tuple[Matrix, ...]
    rights: tuple[Matrix, ...]
    change: Terms
    mean_a: Matrix
    mean_sb: Matrix
    a_is_common: bool

    @property
    def sides(self) -> tuple[int, int]:
        """d_out and d_in of the module."""
        return self.mean_sb.shape[0], self.mean_a.shape[1]

    def bias_energy(self, total_energy: float) -> float:
        """Return the squared Frobenius distance of (mean s B)(mean A) to M. total_energy: of M."""
        mean = ((self.mean_sb,), (self.mean_a,))
        crossed = inner_product(self.lefts, self.rights, *mean)
        energy = total_energy - 2 * crossed + inner_product(*mean, *mean)
        # Below this, differences are rounding.
        return energy if energy > 1e-14 * total_energy else 0.0


def target_of(
    name: str,
    current: FactorSource,
    updates: Sequence[SiteUpdate],
    shares: Sequence[float],
    *,
    rank: int,
) -> Target:
    """Return the target of one module.

    shares: c_k, in the order of the updates. rank: see Target.
    Raises ShapeError when a site's factors are not of the module's sides or its rank is above the global one.
    """
    pair, scaling = current.pair(name), current.scaling_of(name)
    a, sb = pair.A.astype(np.float64), pair.B * np.float64(scaling)
    returned = [_checked(update.returned.pair(name), name, update.site, pair) for update in updates]
    own_a = [not np.array_equal(one.A, pair.A[: one.rank]) for one in returned]
    width = sum(one.rank for one, own in zip(returned, own_a, strict=True) if own)
    # Of the sites with an A of their own, side by side; and of the others, whose A is everybody's.
    left, right = np.empty((len(sb), width)), np.empty((width, a.shape[1]))
    common, kept = np.zeros_like(sb), np.ones(pair.rank)
    # Which rank of the adapter a column of `left` is of, and the same times its site's share.
    ranks, weighed = np.zeros((width, pair.rank)), np.zeros((width, pair.rank))
    of_common_a = np.zeros(pair.rank)
    start = 0
    for one, own, share, update in zip(returned, own_a, shares, updates, strict=True):
        kept[: one.rank] -= share
        factor = np.float64(share * update.returned.scaling_of(name))
        if not own:
            common[:, : one.rank] += one.B * factor
            of_common_a[: one.rank] += share
            continue
        place, diagonal = slice(start, start + one.rank), np.arange(one.rank)
        np.multiply(one.B, factor, out=left[:, place])
        right[place] = one.A
        ranks[start + diagonal, diagonal] = 1.0
        weighed[start + diagonal, diagonal] = share
        start += one.rank
    kept[np.abs(kept) < _NOTHING] = 0.0
    mean_sb = left @ ranks + common + kept * sb
    mean_a = weighed.T @ right + (of_common_a + kept)[:, None] * a
    terms, change = (
        _with_first(common + (kept - less) * sb, a, left, right) for less in (0.0, 1.0)
    )
    return Target(
        name, pair, scaling, rank, *terms, change, mean_a, mean_sb, a_is_common=not any(own_a)
    )


def _checked(returned: LoraPair, name: str, site: str, current: LoraPair) -> LoraPair:
    sides = (returned.B.shape[0], returned.A.shape[1])
    wanted = (current.B.shape[0], current.A.shape[1])
    if returned.rank > current.rank or sides != wanted:
        raise ShapeError(
            f"{site}: {name} of {sides[0]} x {sides[1]} at rank {returned.rank}, where {wanted[0]} x "
            f"{wanted[1]} at rank {current.rank} or less is merged"
        )
    return returned


def _with_first(first: Matrix, its_right: Matrix, left: Matrix, right: Matrix) -> Terms:
    """The terms first @ its_right + left @ right, less components of the first that are zero."""
    used = first.any(axis=0)
    if left.shape[1] == 0:
        return (first,), (its_right,)
    if not used.any():
        return (left,), (right,)
    return (first[:, used], left), (its_right[used], right)
