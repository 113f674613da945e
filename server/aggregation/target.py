"""The target of a merge, M = W_g + sum_k c_k D_k, of one module: as stacked factors, never formed.

What site k was sent are the leading r_k ranks of W_g = s B A. So its update is
D_k = s_k B_k A_k - s B[:, :r_k] A[:r_k] = (s_k B_k - s B[:, :r_k]) A[:r_k] + s_k B_k (A_k - A[:r_k]),
where the first term has the rows of A in common with every other site and with W_g. Hence

    M = (s B + sum_k c_k [s_k B_k - s B[:, :r_k], 0]) A + sum_k c_k s_k B_k (A_k - A[:r_k]),

of rank r + sum_k r_k at most, in which nothing large cancels: all differences are of factors. The bracket
is s times the mean of the B, and the mean of the A is A + sum_k c_k [A_k - A[:r_k]; 0].
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


@dataclass(frozen=True, slots=True)
class Target:
    """M = sum_i lefts[i] @ rights[i] of one module, in float64.

    lefts: each (d_out, r_i); rights: each (r_i, d_in). The first is the bracket above beside A itself; those
    of sites that did not train A are left out. current: the global factors. scaling: s, of the merged module.
    mean_a, mean_sb: means of A (r, d_in) and of s B (d_out, r) over the sites.
    trained_rank: the most that a site trains; ranks of the global adapter beyond it are as they were.
    """

    name: str
    current: LoraPair
    scaling: float
    lefts: tuple[Matrix, ...]
    rights: tuple[Matrix, ...]
    mean_a: Matrix
    mean_sb: Matrix
    trained_rank: int

    @property
    def rank(self) -> int:
        """The global rank."""
        return self.current.rank

    def bias_energy(self, total_energy: float) -> float:
        """Return the squared Frobenius distance of (mean s B)(mean A) to M. total_energy: of M."""
        mean = ((self.mean_sb,), (self.mean_a,))
        crossed = inner_product(self.lefts, self.rights, *mean)
        # Below this, differences are rounding.
        dust = 1e-14 * total_energy
        energy = total_energy - 2 * crossed + inner_product(*mean, *mean)
        return energy if energy > dust else 0.0


def target_of(
    name: str, current: FactorSource, updates: Sequence[SiteUpdate], shares: Sequence[float]
) -> Target:
    """Return the target of one module.

    shares: c_k, in the order of the updates.
    Raises ShapeError when a site's factors are not of the module's sides or its rank is above the global one.
    """
    pair, scaling = current.pair(name), current.scaling_of(name)
    a = pair.A.astype(np.float64)
    sb = scaling * pair.B.astype(np.float64)
    mean_a, mean_sb = a.copy(), sb.copy()
    lefts, rights = [mean_sb], [a]
    for share, update in zip(shares, updates, strict=True):
        returned = update.returned.pair(name)
        rank = returned.rank
        sides = (returned.B.shape[0], returned.A.shape[1])
        if rank > pair.rank or sides != (len(sb), a.shape[1]):
            raise ShapeError(
                f"{update.site}: {name} of {sides[0]} x {sides[1]} at rank {rank}, where {len(sb)} x "
                f"{a.shape[1]} at rank {pair.rank} or less is merged"
            )
        # share * s_k B_k in one pass over it.
        left = returned.B * np.float64(share * update.returned.scaling_of(name))
        mean_sb[:, :rank] += left - share * sb[:, :rank]
        right = returned.A - a[:rank]
        if right.any():
            mean_a[:rank] += share * right
            lefts.append(left)
            rights.append(right)
    trained = max((update.returned.rank for update in updates), default=pair.rank)
    return Target(
        name, pair, scaling, tuple(lefts), tuple(rights), mean_a, mean_sb, trained_rank=trained
    )
