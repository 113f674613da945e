"""Methods in which sites train B alone: `ffa` and `fedsvd`.

With one A for all, M = s (sum_k c_k B_k) A: the mean of B is exact. Under DP noise falls on B only; where
both factors are trained, their noises multiply.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from common.adapter import AdapterState, LoraPair
from common.errors import ShapeError
from common.seeding import derive_seed
from server.aggregation.svd import fresh_rows
from server.aggregation.target import Target
from server.aggregation.types import Cut
from server.lowrank import TruncatedSvd, truncated_svd
from server.products import squared_norm, stacked

Matrix = npt.NDArray[np.float64]


def cut_ffa(target: Target) -> Cut:
    """Return the mean of B beside A as it has been from the start (FFA-LoRA 2403.12313).

    Raises ShapeError when a site trained A.
    """
    _check_a_was_frozen(target)
    a = target.current.A.astype(np.float64)
    # Every row on the right is one of A, or with momentum a mixture of them.
    sb = stacked(target.lefts, axis=1) @ (stacked(target.rights, axis=0) @ np.linalg.pinv(a))
    pair = LoraPair(target.current.A, (sb / target.scaling).astype(np.float32))
    live = truncated_svd([sb], [a], rank=len(a)).live_rank
    return Cut(pair, squared_norm([sb], [a]), 0.0, live)


def cut_fedsvd(target: Target) -> Cut:
    """Return A = V' and s B = U S of M = U S V' (FedSVD 2505.12805, reparameterisation).

    The rows of A are orthonormal, which bounds the gradient of B by that of the product and keeps it large
    beside DP noise. M stays in the span of the first A, so that nothing is cut off.
    Raises ShapeError when a site trained A.
    """
    _check_a_was_frozen(target)
    rank = target.current.rank
    svd = truncated_svd(target.lefts, target.rights, rank=rank)
    live = svd.live_rank
    a, sb = svd.Vt.copy(), svd.U * svd.S
    sb[:, live:] = 0.0
    if live < rank:
        a[live:] = _rest_of_span(svd, target)
    pair = LoraPair(a.astype(np.float32), (sb / target.scaling).astype(np.float32))
    return Cut(pair, svd.total_energy, svd.tail_energy, live)


def orthonormal_start(state: AdapterState) -> AdapterState:
    """Return an adapter whose A have orthonormal rows of the same span.

    For fedsvd's first round, where B = 0 and M says nothing of A.
    Raises ShapeError when B is not 0: the product would change.
    """
    pairs = {}
    for name, pair in state.pairs.items():
        if pair.B.any():
            raise ShapeError(f"{name}: B is not 0, so that A cannot be exchanged")
        q, _ = np.linalg.qr(pair.A.astype(np.float64).T)
        pairs[name] = LoraPair(q.T.astype(np.float32), pair.B)
    return AdapterState(pairs, state.scaling, state.own_scalings)


def _check_a_was_frozen(target: Target) -> None:
    if not target.a_is_common:
        raise ShapeError(
            f"{target.name}: a site sent another A than it was sent, and this method trains B alone"
        )


def _rest_of_span(svd: TruncatedSvd, target: Target) -> Matrix:
    """Orthonormal rows for dead components, from the span of A, so that they can learn again there."""
    live = svd.Vt[: svd.live_rank]
    beside = target.current.A - (target.current.A @ live.T) @ live
    # The directions of A that live components use least come first.
    _, sizes, rows = np.linalg.svd(beside, full_matrices=False)
    wanted = target.current.rank - svd.live_rank
    candidates = rows[:wanted].copy()
    thin = sizes[:wanted] <= 1e-6 * max(sizes[0], 1e-300)
    random = np.random.default_rng(derive_seed("fresh rows", target.name))
    candidates[thin] = random.standard_normal((int(thin.sum()), rows.shape[1]))
    return fresh_rows(candidates, besides=live)
