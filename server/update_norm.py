"""The size of one site's update, from its factors alone: no product is ever formed."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from common.adapter import FactorSource, LoraPair
from common.errors import ShapeError

_Float64 = npt.NDArray[np.float64]

# Of the square that nothing cancelled: float64's 2e-16 is then less than a millionth of what is left.
_TRUSTED = 1e-9
# Above what QR and a product of this width lose, some hundred times 2e-16.
_ROUNDING = 1e-13


def update_norm(returned: FactorSource, *, sent: FactorSource) -> float:
    """Return |D|, D = s B A - s0 B0 A0, the Frobenius norm over all modules together.

    returned: B, A and s of each module. sent: B0, A0 and s0, of the same rank; ranks that it holds beyond
    it were sent along frozen, do not come back and count for nothing. Float64 throughout.
    It is a norm of products: a rotated copy (B R, R^-1 A) has the same.
    Raises ShapeError when their modules differ, or when less was sent than came back.
    """
    if returned.modules != sent.modules or sent.rank < returned.rank:
        raise ShapeError(
            f"an adapter of rank {returned.rank} on {len(returned.modules)} modules is no update of one "
            f"of rank {sent.rank} on {len(sent.modules)}"
        )
    squares = []
    for module in returned.modules:
        left, right = _difference(
            returned.pair(module),
            sent.pair(module),
            scaling=returned.scaling_of(module),
            sent_scaling=sent.scaling_of(module),
        )
        squares.append(_product_norm_squared(left, right))
    return math.sqrt(math.fsum(squares))


def parts_norm(adapter: FactorSource) -> float:
    """Return sum_i s |b_i| |a_i| of each module, as one Frobenius norm over all modules together.

    b_i, a_i: columns of B and rows of A. It is what |s B A| would be if all its rank-one parts were parallel;
    for random factors of rank r it is sqrt(r) times |s B A|.
    """
    squares = []
    for module in adapter.modules:
        pair = adapter.pair(module)
        columns = np.linalg.norm(pair.B.astype(np.float64), axis=0)
        rows = np.linalg.norm(pair.A.astype(np.float64), axis=1)
        squares.append((adapter.scaling_of(module) * float(columns @ rows)) ** 2)
    return math.sqrt(math.fsum(squares))


def displacement(returned: FactorSource, *, sent: FactorSource) -> float:
    """Return how far an update can carry a mean of factors, as a product, at most.

    |(s0 B0 + u dB)(A0 + v dA) - s0 B0 A0| <= |dB| (|A0| + |dA|) + |s0 B0| |dA| for all u, v in [0, 1], with
    dB = s B - s0 B0, dA = A - A0 and Frobenius norms; over all modules together. Unlike `update_norm` it
    grows where factors are rescaled or rotated while their product stays. sent: see there.
    """
    squares = []
    for module in returned.modules:
        pair, before = returned.pair(module), sent.pair(module)
        a0 = before.A[: pair.rank].astype(np.float64)
        b0 = sent.scaling_of(module) * before.B[:, : pair.rank].astype(np.float64)
        moved_a = float(np.linalg.norm(pair.A - a0))
        moved_b = float(
            np.linalg.norm(returned.scaling_of(module) * pair.B.astype(np.float64) - b0)
        )
        of_b = moved_b * (float(np.linalg.norm(a0)) + moved_a)
        squares.append((of_b + float(np.linalg.norm(b0)) * moved_a) ** 2)
    return math.sqrt(math.fsum(squares))


def product_norm(adapter: FactorSource) -> float:
    """Return |s B A|, the Frobenius norm over all modules together."""
    squares = []
    for module in adapter.modules:
        pair = adapter.pair(module)
        b = adapter.scaling_of(module) * pair.B.astype(np.float64)
        squares.append(_product_norm_squared(b, pair.A.astype(np.float64)))
    return math.sqrt(math.fsum(squares))


def _difference(
    returned: LoraPair, sent: LoraPair, *, scaling: float, sent_scaling: float
) -> tuple[_Float64, _Float64]:
    """Return L (d_out, 2r) and R (2r, d_in) with L R = s B A - s0 B0 A0."""
    a, a0 = (pair.A[: returned.rank].astype(np.float64) for pair in (returned, sent))
    b = scaling * returned.B.astype(np.float64)
    b0 = sent_scaling * sent.B[:, : returned.rank].astype(np.float64)
    # Not [s B, -s0 B0] [A; A0]: a small update would be lost in the cancelling of two large products.
    return np.hstack([b - b0, b0]), np.vstack([a, a - a0])


def _product_norm_squared(left: _Float64, right: _Float64) -> float:
    """Return |L R|_F^2 = sum((L' L) * (R R')), from two Gram matrices of the inner width.

    Where the rank-one parts cancel so far that this would be rounding, |R_L R_R'|_F^2 of the triangles of
    QR of L and R', rounded up: parts that cancel must not hide a large update.
    """
    gram_left, gram_right = left.T @ left, right @ right.T
    # (sum |l_i| |r_i|)^2: what it would be if nothing cancelled.
    parts = float(np.sum(np.sqrt(np.diag(gram_left) * np.diag(gram_right)))) ** 2
    squared = float(np.sum(gram_left * gram_right))
    if squared >= _TRUSTED * parts:
        return squared
    left_triangle: _Float64 = np.asarray(np.linalg.qr(left, mode="r"))
    right_triangle: _Float64 = np.asarray(np.linalg.qr(right.T, mode="r"))
    norm = float(np.linalg.norm(left_triangle @ right_triangle.T))
    return (norm + _ROUNDING * math.sqrt(parts)) ** 2
