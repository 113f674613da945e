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
    a = pair.A.astype(np.float64)
    sb = pair.B * np.float64(scaling)
    kept, mean_a, mean_sb = np.ones(pair.rank), np.zeros_like(a), np.zeros_like(sb)
    # s_k B_k of the sites whose A is that of everybody.
    common = np.zeros_like(sb)
    lefts: list[Matrix] = []
    rights: list[Matrix] = []
    for share, update in zip(shares, updates, strict=True):
        returned = update.returned.pair(name)
        own = returned.rank
        sides = (returned.B.shape[0], returned.A.shape[1])
        if own > pair.rank or sides != (len(sb), a.shape[1]):
            raise ShapeError(
                f"{update.site}: {name} of {sides[0]} x {sides[1]} at rank {own}, where {len(sb)} x "
                f"{a.shape[1]} at rank {pair.rank} or less is merged"
            )
        kept[:own] -= share
        left = returned.B * np.float64(share * update.returned.scaling_of(name))
        mean_sb[:, :own] += left
        right = returned.A.astype(np.float64)
        mean_a[:own] += share * right
        if np.array_equal(returned.A, pair.A[:own]):
            common[:, :own] += left
        else:
            lefts.append(left)
            rights.append(right)
    kept[np.abs(kept) < _NOTHING] = 0.0
    mean_a += kept[:, None] * a
    mean_sb += kept * sb
    terms, change = (
        _with_first(common + (kept - less) * sb, a, lefts, rights) for less in (0.0, 1.0)
    )
    return Target(name, pair, scaling, rank, *terms, change, mean_a, mean_sb, a_is_common=not lefts)


def _with_first(left: Matrix, right: Matrix, lefts: list[Matrix], rights: list[Matrix]) -> Terms:
    """The terms of the sites after left @ right, of which components that are zero are left out."""
    used = left.any(axis=0)
    if lefts and not used.any():
        return tuple(lefts), tuple(rights)
    if not used.all() and used.any():
        left, right = left[:, used], right[used]
    return (left, *lefts), (right, *rights)
