"""Best low-rank approximation of a sum of low-rank products, from the factors alone.

M = sum_i L_i R_i with L_i (d_out, r_i), R_i (r_i, d_in); stacked, M = L R with N = sum of r_i columns.
Each way below finds orthonormal directions Z that hold nearly all of M that `rank` directions can hold
(Eckart and Young, 1936). One step on the factors, V = orth(M' Z) and the SVD of M V, then makes U, S
and V: exact for what V holds, and it holds no less than Z did, since |M orth(M' Z)| >= |Z' M|.

Which way, by shape and by what would be lost. Seconds of one core for a layer at rank 16:

    layer          N      gram   qr     whole     layer         N      gram   qr     whole
    4096 x 4096    32     0.010  0.011  -         768 x 3072    384    0.04   0.06   0.12
    4096 x 4096    160    0.03   0.05   -         768 x 3072    576    0.08   0.12   0.14
    4096 x 4096    480    0.11   0.20   -         768 x 3072    768    0.15   0.19   0.16
    4096 x 4096    1600   1.1    1.6    8.9       768 x 3072    1152   0.38   0.40   0.20

- "gram": eigenvalues of the N x N matrix that L'L and R R' make. Squares lose half of the digits, and
  where the products cancel they lose more: `_gram_loss` bounds that, and "qr" is the way out.
- "qr": T from the QR of the taller factor leaves the core T R, as large as M and no larger: what cancels
  in M has cancelled in it. It also takes few columns, where it costs little and its SVD loses nothing.
- "whole": M itself, where N is no less than its shorter side.
A block Krylov SVD on the factors (Musco and Musco, 1504.05477) is no way here: at N = 1600 and unrelated
sites it took 0.8 s to come within 3e-5 |M| of the best and 1.2 s for 2e-7, and cannot tell when to stop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.linalg import eigh  # type: ignore[import-untyped]

from common.errors import ShapeError
from server.products import stacked

Matrix = npt.NDArray[np.float64]
Way = Literal["gram", "qr", "whole"]

# Singular values below this share of the largest are numerical dust, and so are their directions.
DEAD = 1e-7
_EPS = float(np.finfo(np.float64).eps)
# Of |M|^2, what "gram" may miss of the best one. Its root, 1e-5, is the error where rank is exact.
_GRAM_MAY_LOSE = 1e-10
# A core with so few rows has its SVD taken: hardly slower than its squares, and no digit is lost.
_FEW_ROWS = 48
# Directions beyond `rank`: a cut between near ties is then made on the factors, not on squares.
_SPARE = 8


@dataclass(frozen=True, slots=True)
class TruncatedSvd:
    """M ~= U diag(S) Vt. U (d_out, r), S (r,) falling, Vt (r, d_in), float64; signs as `_signed` has them.

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
    way: Way | None = None,
) -> TruncatedSvd:
    """Return the best rank-`rank` approximation of sum_i lefts[i] @ rights[i].

    lefts: each (d_out, r_i); rights: each (r_i, d_in). Computed in float64; the same bits each
    time for the same number of threads.
    way: the one to go; None chooses by shape, and by what the squares would lose.
    |M - U S Vt| is at most 1e-5 |M| above the best one (Frobenius), in practice 1e-9, while
    eps sum_j |L_j| |R_j| is far below |M|. Where the components cancel beyond that, nothing of M is known and
    a singular value that rounding alone could have made is 0.
    Raises ShapeError when factors do not fit or rank > min(d_out, d_in).
    """
    left, right = stacked(lefts, axis=1), stacked(rights, axis=0)
    if left.shape[1] != right.shape[0]:
        raise ShapeError(f"stacks {left.shape} and {right.shape} do not multiply")
    d_out, d_in = left.shape[0], right.shape[1]
    if rank > min(d_out, d_in):
        raise ShapeError(f"rank {rank} of a {d_out} x {d_in} matrix")
    way = way or choose_way(d_out=d_out, d_in=d_in, columns=left.shape[1])
    # The taller factor is the one worth a QR; of the whole, fewer rows than columns make less to square.
    if (d_out >= d_in) != (way == "whole"):
        return _signed(_upright(left, right, rank, way))
    svd = _upright(right.T, left.T, rank, way)
    return _signed(TruncatedSvd(svd.Vt.T, svd.S, svd.U.T, svd.tail_energy, svd.total_energy))


def _signed(svd: TruncatedSvd) -> TruncatedSvd:
    """The same product, with the largest entry of each column of U above 0.

    Which of two signs LAPACK gives hangs on the last bit, and that on where in memory the factors lie: a run
    that goes on from its checkpoint would have another adapter than one that was never cut off.
    """
    largest = np.take_along_axis(svd.U, np.abs(svd.U).argmax(axis=0)[None], axis=0)[0]
    signs = np.where(largest < 0, -1.0, 1.0)
    return replace(svd, U=svd.U * signs, Vt=signs[:, None] * svd.Vt)


def choose_way(*, d_out: int, d_in: int, columns: int) -> Way:
    """Return the cheapest way for a stack of so many columns: the crossings are where flops are equal."""
    if columns >= min(d_out, d_in):
        return "whole"
    return "qr" if columns <= _FEW_ROWS else "gram"


def _upright(left: Matrix, right: Matrix, rank: int, way: Way) -> TruncatedSvd:
    """The SVD of left @ right, whose left side is the one that this way should work on."""
    # |L_j| |R_j| for each component: unlike either norm, it means something by itself.
    # By einsum: np.linalg.norm would write all squares down first.
    sizes = np.sqrt(np.einsum("ij,ij->j", left, left))
    sizes *= np.sqrt(np.einsum("ij,ij->i", right, right))
    found = _by_gram(left, right, sizes, rank=rank) if way == "gram" else None
    if found is None:
        # L R = Q (T R), and Q changes neither the singular values nor V.
        upper = left if way == "whole" else np.linalg.qr(left, mode="r")
        found = _by_core(upper @ right, rank + _SPARE)
    basis, total = found
    return _on_factors(left, right, basis, rank=rank, total=total, dust=_EPS * sizes.sum())


def _by_gram(
    left: Matrix, right: Matrix, sizes: Matrix, *, rank: int
) -> tuple[Matrix, float] | None:
    """Directions (d_in, p) for V and |M|^2; None where too much would be lost.

    With R's rows at norm 1 (their norms put into L), (L'L) (R R') Y = Y E says that M M' (L R R' Y) =
    (L R R' Y) E: the eigenvectors of two Gram matrices give M's left ones.
    """
    gram_left, gram_right = left.T @ left, right @ right.T
    norms = np.sqrt(np.diag(gram_right))
    inverse = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    gram_left *= np.outer(norms, norms)
    gram_right *= np.outer(inverse, inverse)
    total = float((gram_left * gram_right).sum())
    if not _gram_loss(sizes, rank) <= _GRAM_MAY_LOSE * total:
        return None
    columns = len(sizes)
    # Parallel rows leave R R' singular, and rounding makes it a little less than that.
    gram_right[np.diag_indices(columns)] += _EPS * columns
    first = max(columns - rank - _SPARE, 0)
    try:
        _, top = eigh(gram_left, gram_right, type=2, subset_by_index=[first, columns - 1])
    except np.linalg.LinAlgError:
        return None
    basis, _ = np.linalg.qr(left @ (norms[:, None] * (gram_right @ top)))
    basis, _ = np.linalg.qr(right.T @ (left.T @ basis))
    return basis, total


def _gram_loss(sizes: Matrix, rank: int) -> float:
    """How much of |M|^2 the best `rank` directions of rounded Gram matrices may miss, at most.

    Perturbed by E, they miss at most 2 sqrt(rank) |E| of what the best ones hold (Ky Fan, 1949).
    A dot product is off by about 2 eps times both norms: |E| <= 2 eps (sum of sizes)^2. The shift of
    the diagonal adds no more than its own trace, eps N sum sizes^2. sizes: |L_j| |R_j|, (N,).
    """
    rounding = 4 * math.sqrt(rank) * float(sizes.sum()) ** 2
    return _EPS * (rounding + len(sizes) * float((sizes**2).sum()))


def _by_core(core: Matrix, wanted: int) -> tuple[Matrix, float]:
    """Directions (d_in, p) for V, and |core|^2."""
    total = float((core**2).sum())
    if len(core) <= _FEW_ROWS:
        _, _, vt = np.linalg.svd(core, full_matrices=False)
        return vt[:wanted].T, total
    # Squares of M, not of its factors: they lose half the digits of M and no more, whatever cancels.
    top = _top_eigenvectors(core @ core.T, wanted)
    basis, _ = np.linalg.qr(core.T @ top)
    return basis, total


def _top_eigenvectors(symmetric: Matrix, wanted: int) -> Matrix:
    """Eigenvectors (n, min(wanted, n)) of the largest eigenvalues."""
    size = len(symmetric)
    first = max(size - wanted, 0)
    _, vectors = eigh(symmetric, subset_by_index=[first, size - 1])
    return np.asarray(vectors)


def _on_factors(
    left: Matrix, right: Matrix, basis: Matrix, *, rank: int, total: float, dust: float
) -> TruncatedSvd:
    """M cut to the best `rank` directions within basis (d_in, p), which it need not fill.

    total: |M|^2. dust: the most that rounding alone makes of a product of these factors.
    """
    u, s, wt = np.linalg.svd(left @ (right @ basis), full_matrices=False)
    u, s, vt = u[:, :rank], s[:rank], wt[:rank] @ basis.T
    everything = basis.shape[1] <= rank
    tail = 0.0 if everything else max(total - float((s**2).sum()), 0.0)
    if total <= dust**2:
        tail = total = 0.0
    missing = rank - len(s)
    return TruncatedSvd(
        np.pad(u, ((0, 0), (0, missing))),
        np.pad(np.where(s > dust, s, 0.0), (0, missing)),
        np.pad(vt, ((0, missing), (0, 0))),
        tail,
        total,
    )
