"""The SVD of a sum of products, against the dense one in float64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ShapeError
from server.lowrank import truncated_svd

Matrix = npt.NDArray[np.float64]
SEEDS = st.integers(0, 2**32 - 1)


def _stacks(
    seed: int, *, d_out: int, d_in: int, ranks: list[int], decades: float = 0.0
) -> tuple[list[Matrix], list[Matrix]]:
    """Random factors whose columns fall by `decades` powers of ten from first to last."""
    random = np.random.default_rng(seed)
    lefts, rights = [], []
    for rank in ranks:
        sizes = np.logspace(0, -decades, rank)
        lefts.append(random.standard_normal((d_out, rank)) * sizes)
        rights.append(random.standard_normal((rank, d_in)))
    return lefts, rights


def _dense(lefts: list[Matrix], rights: list[Matrix]) -> Matrix:
    return np.sum([b @ a for b, a in zip(lefts, rights, strict=True)], axis=0)


def _truncated(matrix: Matrix, rank: int) -> Matrix:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def test_a_diagonal_sum_is_cut_to_its_largest_entries() -> None:
    # diag(3, 2, 1) as a sum of diag(3, 0, 1) and diag(0, 2, 0); of 9 + 4 + 1, rank 2 leaves out 1.
    first, second = np.diag([3.0, 0.0, 1.0]), np.diag([0.0, 2.0, 0.0])
    svd = truncated_svd([first, second], [np.eye(3), np.eye(3)], rank=2)
    np.testing.assert_allclose(svd.S, [3.0, 2.0])
    np.testing.assert_allclose((svd.U * svd.S) @ svd.Vt, np.diag([3.0, 2.0, 0.0]), atol=1e-12)
    assert svd.tail_energy == pytest.approx(1.0)
    assert svd.total_energy == pytest.approx(14.0)
    assert svd.live_rank == 2


@settings(deadline=None)
@given(
    seed=SEEDS,
    d_out=st.integers(1, 12),
    d_in=st.integers(1, 12),
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    decades=st.floats(0, 12),
    data=st.data(),
)
def test_equals_the_dense_svd_whatever_the_stack(
    seed: int, d_out: int, d_in: int, ranks: list[int], decades: float, data: st.DataObject
) -> None:
    """Wide, tall, badly conditioned, and with more columns in the stack than the matrix has."""
    rank = data.draw(st.integers(1, min(d_out, d_in)), label="rank")
    lefts, rights = _stacks(seed, d_out=d_out, d_in=d_in, ranks=ranks, decades=decades)
    dense = _dense(lefts, rights)
    svd = truncated_svd(lefts, rights, rank=rank)

    assert svd.U.shape == (d_out, rank)
    assert svd.S.shape == (rank,)
    assert svd.Vt.shape == (rank, d_in)
    assert np.all(np.diff(svd.S) <= 0)
    largest = np.linalg.norm(dense, 2)
    dense_s = np.linalg.svd(dense, compute_uv=False)[:rank]
    np.testing.assert_allclose(svd.S, dense_s, rtol=0, atol=1e-11 * largest)
    # As good as the best one: two directions of one singular value may be cut either way.
    approximation = (svd.U * svd.S) @ svd.Vt
    best = np.linalg.norm(dense - _truncated(dense, rank))
    assert np.linalg.norm(dense - approximation) <= best + 1e-11 * largest
    # Energies are what was left out and what there was, as measured on the dense matrix.
    assert svd.tail_energy == pytest.approx(best**2, rel=1e-6, abs=1e-11 * largest**2)
    assert svd.total_energy == pytest.approx(np.linalg.norm(dense) ** 2, rel=1e-9)


def test_small_singular_values_survive_a_badly_conditioned_stack() -> None:
    # 1, 1e-3 and 1e-6 hidden behind random orthogonal bases; a float32 path would lose the last.
    random = np.random.default_rng(0)
    u, _ = np.linalg.qr(random.standard_normal((20, 3)))
    v, _ = np.linalg.qr(random.standard_normal((30, 3)))
    values = np.array([1.0, 1e-3, 1e-6])
    svd = truncated_svd([u * values], [v.T], rank=3)
    np.testing.assert_allclose(svd.S, values, rtol=1e-9)
    assert svd.live_rank == 3


def test_more_columns_than_the_matrix_has_are_no_obstacle() -> None:
    # R = 4 * 5 = 20 columns for a 3 x 4 matrix.
    lefts, rights = _stacks(7, d_out=3, d_in=4, ranks=[5, 5, 5, 5])
    svd = truncated_svd(lefts, rights, rank=3)
    np.testing.assert_allclose((svd.U * svd.S) @ svd.Vt, _dense(lefts, rights), atol=1e-12)
    assert svd.tail_energy == 0.0


def test_rank_deficient_sum_is_padded_with_dead_components() -> None:
    # One column only, asked for three: the other two are zero and not live.
    left, right = np.array([[3.0], [4.0], [0.0]]), np.array([[0.0, 2.0, 0.0]])
    svd = truncated_svd([left], [right], rank=3)
    np.testing.assert_allclose(svd.S, [10.0, 0.0, 0.0], atol=1e-12)
    np.testing.assert_allclose((svd.U * svd.S) @ svd.Vt, left @ right, atol=1e-12)
    assert svd.live_rank == 1
    assert svd.tail_energy == 0.0


def test_the_same_product_in_two_terms_counts_as_one_direction() -> None:
    left, right = np.ones((4, 1)), np.ones((1, 3))
    svd = truncated_svd([left, left], [right, right], rank=2)
    # 2 * ones(4, 3) has the singular value 2 sqrt(12).
    assert svd.S[0] == pytest.approx(2 * 12**0.5)
    assert svd.live_rank == 1


def test_terms_that_cancel_leave_nothing() -> None:
    left, right = np.ones((4, 1)), np.ones((1, 3))
    svd = truncated_svd([left, -left], [right, right], rank=2)
    np.testing.assert_allclose((svd.U * svd.S) @ svd.Vt, np.zeros((4, 3)), atol=1e-14)


def test_a_sum_of_zeros_has_no_live_component() -> None:
    svd = truncated_svd([np.zeros((4, 2))], [np.ones((2, 3))], rank=2)
    assert svd.live_rank == 0
    assert (svd.tail_energy, svd.total_energy) == (0.0, 0.0)


def test_float32_factors_are_multiplied_in_float64() -> None:
    # 1e8 + 1 - 1e8: float32 would add up to 0.
    parts = [np.array([[value]], dtype=np.float32) for value in (1e8, 1.0, -1e8)]
    one = np.ones((1, 1), dtype=np.float32)
    assert truncated_svd(parts, [one, one, one], rank=1).S[0] == pytest.approx(1.0)


def test_refuses_a_rank_above_the_smaller_side() -> None:
    with pytest.raises(ShapeError, match="rank 4 of a 3 x 5 matrix"):
        truncated_svd([np.ones((3, 2))], [np.ones((2, 5))], rank=4)


def test_refuses_stacks_that_do_not_multiply() -> None:
    with pytest.raises(ShapeError, match="do not multiply"):
        truncated_svd([np.ones((3, 2))], [np.ones((1, 5))], rank=1)
