"""Frobenius inner products and norms of sums of low-rank products, from their factors.

<sum_i L_i R_i, sum_j P_j Q_j> = sum of the entries of (L' P) * (R Q'), where L = [L_1 L_2 ...] and R, P, Q
are stacked alike: the trace of R' L' P Q, with neither product formed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]
Factors = Sequence[npt.NDArray[np.floating]]


def inner_product(
    lefts: Factors, rights: Factors, other_lefts: Factors, other_rights: Factors
) -> float:
    """Return the Frobenius inner product of sum_i lefts[i] @ rights[i] and the same of the others.

    lefts: each (d_out, r_i); rights: each (r_i, d_in). In float64.
    """
    other_left, other_right = stacked(other_lefts, axis=1), stacked(other_rights, axis=0)
    # Part by part: no stack of the many is made.
    return float(
        sum(
            np.vdot(left.T @ other_left, right @ other_right.T)
            for left, right in zip(lefts, rights, strict=True)
        )
    )


def squared_norm(lefts: Factors, rights: Factors) -> float:
    """Return the squared Frobenius norm of sum_i lefts[i] @ rights[i]; never below 0."""
    left, right = stacked(lefts, axis=1), stacked(rights, axis=0)
    return max(0.0, float(np.vdot(left.T @ left, right @ right.T)))


def stacked(parts: Factors, *, axis: int) -> Matrix:
    """Return the parts side by side (axis 1) or one below the other (axis 0), float64; one alone as it is."""
    if len(parts) == 1:
        return np.asarray(parts[0], dtype=np.float64)
    return np.concatenate(parts, axis=axis, dtype=np.float64)
