"""Methods that cut the exact mean of the products by singular value decomposition: `svd` and `stack`."""

from __future__ import annotations

import numpy as np

from common.adapter import LoraPair
from common.seeding import derive_seed
from server.aggregation.target import Target
from server.aggregation.types import Cut
from server.lowrank import TruncatedSvd, truncated_svd

# Norm of a fresh row of A: that of PEFT's initial one (uniform in +-1/sqrt(d_in)).
_FRESH_ROW_NORM = 3**-0.5


def cut_svd(target: Target) -> Cut:
    """Return the best approximation of M at the global rank, balanced (FlexLoRA 2402.11505).

    Exact when M has no more than that rank; else what is left out are the smallest singular values (Eckart
    and Young, 1936). Sites may hold different ranks.
    """
    return _cut(target, rank=target.current.rank)


def cut_stack(target: Target) -> Cut:
    """Return M itself, as concatenated factors (FLoRA 2409.05976, stacking) in the order of its
    singular values.

    The rank is the sum of the ranks that went in, at most the module's smaller side; the leading ranks, which
    sites are sent, are the best ones there are.
    """
    width = sum(left.shape[1] for left in target.lefts)
    # Never below what the largest site trains, whoever took part in this round.
    return _cut(target, rank=min(max(width, target.rank), *target.sides))


def _cut(target: Target, *, rank: int) -> Cut:
    svd = truncated_svd(target.lefts, target.rights, rank=rank)
    pair = balanced_split(svd, scaling=target.scaling, name=target.name)
    return Cut(pair, svd.total_energy, svd.tail_energy, svd.live_rank)


def balanced_split(svd: TruncatedSvd, *, scaling: float, name: str, fresh: bool = True) -> LoraPair:
    """Return (B, A) with scaling * B @ A = U S Vt: A = sqrt(S) V', B = U sqrt(S) / scaling.

    fresh: a component with no energy gets a new orthonormal row in A and zeros in B, as PEFT begins: with
    zeros in both, where a balanced split puts it, neither factor has a gradient, and it never learns again.
    name: of the module; it seeds the fresh rows, so that a merge is repeatable.
    """
    live = svd.live_rank
    root = np.sqrt(svd.S)
    root[live:] = 0.0
    a = root[:, None] * svd.Vt
    b = svd.U * (root / scaling)
    # More rows than columns have no orthonormal ones left; they stay zero.
    wanted = min(len(svd.S), svd.Vt.shape[1]) - live
    if fresh and wanted > 0:
        random = np.random.default_rng(derive_seed("fresh rows", name))
        rows = fresh_rows(random.standard_normal((wanted, svd.Vt.shape[1])), besides=svd.Vt[:live])
        a[live : live + wanted] = _FRESH_ROW_NORM * rows
    return LoraPair(a.astype(np.float32), b.astype(np.float32))


def fresh_rows(
    candidates: np.typing.NDArray[np.float64], *, besides: np.typing.NDArray[np.float64]
) -> np.typing.NDArray[np.float64]:
    """Return orthonormal rows that span what `candidates` (n, d_in) have beside some orthonormal rows."""
    candidates = candidates - (candidates @ besides.T) @ besides
    # Twice: what rounding left of them would weigh as much as a small remainder.
    candidates = candidates - (candidates @ besides.T) @ besides
    orthonormal, _ = np.linalg.qr(candidates.T)
    rows: np.typing.NDArray[np.float64] = orthonormal.T
    return rows
