"""Best low-rank approximation of a sum of low-rank products, from the factors alone.

M = sum_i L_i R_i with L_i (d_out, r_i), R_i (r_i, d_in). With L = [L_1 L_2 ...] and R stacked alike,
QR of L and of R' leaves a small core whose SVD is that of M (Golub and Van Loan, Matrix Computations,
section 5.4; Eckart and Young, 1936). The core is (R, R) for R = sum of ranks, at most the layer's sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.errors import ShapeError

Matrix = npt.NDArray[np.float64]

# Singular values below this share of the largest are numerical dust, and so are their directions.
DEAD = 1e-7


@dataclass(frozen=True, slots=True)
class TruncatedSvd:
    """M ~= U diag(S) Vt. U (d_out, r), S (r,) falling, Vt (r, d_in), float64.

    tail_energy: sum of the squared singular values left out; total_energy: of all of them.
    """

    U: Matrix
    S: Matrix
    Vt: Matrix
    tail_energy: float
    total_energy: float

    @property
    def live_rank(self) -> int:
        """How many singular values are more than numerical dust."""
        if len(self.S) == 0 or self.S[0] == 0:
            return 0
        return int((DEAD * self.S[0] < self.S).sum())


def truncated_svd(
    lefts: Sequence[npt.NDArray[np.floating]],
    rights: Sequence[npt.NDArray[np.floating]],
    *,
    rank: int,
) -> TruncatedSvd:
    """Return the best rank-`rank` approximation of sum_i lefts[i] @ rights[i].

    lefts: each (d_out, r_i); rights: each (r_i, d_in). Computed in float64.
    Raises ShapeError when factors do not fit or rank > min(d_out, d_in).
    """
    left = np.concatenate([np.asarray(part, dtype=np.float64) for part in lefts], axis=1)
    right = np.concatenate([np.asarray(part, dtype=np.float64) for part in rights], axis=0)
    if left.shape[1] != right.shape[0]:
        raise ShapeError(f"stacks {left.shape} and {right.shape} do not multiply")
    if rank > min(left.shape[0], right.shape[1]):
        raise ShapeError(f"rank {rank} of a {left.shape[0]} x {right.shape[1]} matrix")
    q_left, r_left = np.linalg.qr(left)
    q_right, r_right = np.linalg.qr(right.T)
    u, s, vt = np.linalg.svd(r_left @ r_right.T, full_matrices=False)
    kept = min(rank, len(s))
    energy = s**2
    result = TruncatedSvd(
        q_left @ u[:, :kept],
        s[:kept],
        vt[:kept] @ q_right.T,
        float(energy[kept:].sum()),
        float(energy.sum()),
    )
    return result if kept == rank else _padded(result, rank)


def _padded(svd: TruncatedSvd, rank: int) -> TruncatedSvd:
    """Fill up to `rank` with zero singular values where the sum itself has fewer."""
    extra = rank - len(svd.S)
    return TruncatedSvd(
        np.pad(svd.U, ((0, 0), (0, extra))),
        np.pad(svd.S, (0, extra)),
        np.pad(svd.Vt, ((0, extra), (0, 0))),
        svd.tail_energy,
        svd.total_energy,
    )
