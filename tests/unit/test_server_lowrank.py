"""The SVD of a sum of products, each way of taking it, against the dense one in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import eigh  # type: ignore[import-untyped]

from common.errors import ShapeError
from server.lowrank import TruncatedSvd, Way, choose_way, truncated_svd

Matrix = npt.NDArray[np.float64]
Stack = tuple[Matrix, Matrix]
SEEDS = st.integers(0, 2**32 - 1)
WAYS: list[Way] = ["gram", "qr", "whole"]
every_way = pytest.mark.parametrize("way", WAYS)


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
    way=st.sampled_from([None, *WAYS]),
    data=st.data(),
)
def test_equals_the_dense_svd_whatever_the_stack(
    seed: int,
    d_out: int,
    d_in: int,
    ranks: list[int],
    decades: float,
    way: Way | None,
    data: st.DataObject,
) -> None:
    """Wide, tall, badly conditioned, and with more columns in the stack than the matrix has."""
    rank = data.draw(st.integers(1, min(d_out, d_in)), label="rank")
    lefts, rights = _stacks(seed, d_out=d_out, d_in=d_in, ranks=ranks, decades=decades)
    dense = _dense(lefts, rights)
    svd = truncated_svd(lefts, rights, rank=rank, way=way)

    assert svd.U.shape == (d_out, rank)
    assert svd.S.shape == (rank,)
    assert svd.Vt.shape == (rank, d_in)
    assert np.all(np.diff(svd.S) <= 0)
    largest = np.linalg.norm(dense, 2)
    # Rounding alone, where many components cancel: the dense sum has as much of it.
    rounding = 1e-15 * sum(
        np.linalg.norm(left, axis=0) @ np.linalg.norm(right, axis=1)
        for left, right in zip(lefts, rights, strict=True)
    )
    near = 1e-11 * largest + rounding
    dense_s = np.linalg.svd(dense, compute_uv=False)[:rank]
    np.testing.assert_allclose(svd.S, dense_s, rtol=0, atol=near)
    # As good as the best one: two directions of one singular value may be cut either way.
    approximation = (svd.U * svd.S) @ svd.Vt
    best = np.linalg.norm(dense - _truncated(dense, rank))
    assert np.linalg.norm(dense - approximation) <= best + near
    # Energies are what was left out and what there was, as measured on the dense matrix.
    assert svd.tail_energy == pytest.approx(best**2, rel=1e-6, abs=near * largest)
    norm = np.linalg.norm(dense)
    assert svd.total_energy == pytest.approx(norm**2, rel=1e-9, abs=2 * near * norm)


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


# What follows has more than 48 columns in the stack: fewer have their SVD taken, proven above.
TALL, WIDE, COLUMNS = 120, 90, 80


def _orthonormal(random: np.random.Generator, size: int, columns: int) -> Matrix:
    return np.linalg.qr(random.standard_normal((size, columns)))[0]


def _spectrum(random: np.random.Generator, values: npt.ArrayLike) -> Stack:
    """A stack of COLUMNS columns with these singular values and no more, in no column alone."""
    values = np.asarray(values, dtype=np.float64)
    inner = _orthonormal(random, COLUMNS, len(values))
    left = (_orthonormal(random, TALL, len(values)) * values) @ inner.T
    return left, inner @ _orthonormal(random, WIDE, len(values)).T


def _random(random: np.random.Generator, *, left: npt.ArrayLike, right: npt.ArrayLike) -> Stack:
    """Random factors, the columns of L and the rows of R scaled."""
    scale = np.asarray(right, dtype=np.float64)[:, None]
    return (
        random.standard_normal((TALL, COLUMNS)) * np.asarray(left),
        random.standard_normal((COLUMNS, WIDE)) * scale,
    )


def _cancelling(random: np.random.Generator, share: float) -> Stack:
    """B A - B (A + share * other): what is left is `share` of either."""
    b = random.standard_normal((TALL, COLUMNS // 2))
    a = random.standard_normal((COLUMNS // 2, WIDE))
    other = random.standard_normal(a.shape)
    return np.hstack([b, -b]), np.vstack([a, a + share * other])


def _nearly_parallel(random: np.random.Generator, angle: float) -> Stack:
    left, right = _random(random, left=angle * np.ones(COLUMNS), right=angle * np.ones(COLUMNS))
    return left + random.standard_normal((TALL, 1)), right + random.standard_normal((1, WIDE))


FALLING = np.logspace(0, -12, COLUMNS)
MILLION = np.where(np.arange(COLUMNS) % 32 < 16, 1e6, 1e-6)
HARD: dict[str, Callable[[np.random.Generator], Stack]] = {
    "plain": lambda random: _random(random, left=np.ones(COLUMNS), right=np.ones(COLUMNS)),
    "falls by 12 decades": lambda random: _random(random, left=FALLING, right=np.ones(COLUMNS)),
    "both fall": lambda random: _random(random, left=FALLING, right=FALLING),
    "one falls, one rises": lambda random: _random(random, left=FALLING, right=FALLING[::-1]),
    "a million by a millionth": lambda random: _random(random, left=MILLION, right=1 / MILLION),
    "nearly parallel": lambda random: _nearly_parallel(random, 1e-7),
    "a tenth is left": lambda random: _cancelling(random, 1e-1),
    "a thousandth is left": lambda random: _cancelling(random, 1e-3),
    "a millionth is left": lambda random: _cancelling(random, 1e-6),
    "slow decay": lambda random: _spectrum(random, np.arange(1, 71) ** -0.5),
    "fast decay": lambda random: _spectrum(random, 10.0 ** -np.arange(16)),
    "a tie at the cut": lambda random: _spectrum(random, [3.0] * 4 + [2.0] * 60),
    "all equal": lambda random: _spectrum(random, np.ones(70)),
    "exactly of rank 4": lambda random: _spectrum(random, [4.0, 3.0, 2.0, 1.0]),
    "of rank 6, over 5 decades": lambda random: _spectrum(random, 10.0 ** -np.arange(6)),
}


@every_way
@pytest.mark.parametrize("upright", [True, False], ids=["tall", "wide"])
@pytest.mark.parametrize("case", HARD)
def test_no_other_rank_6_matrix_is_nearer_however_hard_the_stack(
    case: str, upright: bool, way: Way
) -> None:
    left, right = HARD[case](np.random.default_rng(3))
    if not upright:
        left, right = right.T, left.T
    dense = left @ right
    size = np.linalg.norm(dense)
    values = np.linalg.svd(dense, compute_uv=False)
    svd = truncated_svd([left], [right], rank=6, way=way)
    product = (svd.U * svd.S) @ svd.Vt

    # 1e-5 is promised; the rounding of factors a million times as large as M takes 1e-10 of it.
    best = np.linalg.norm(values[6:])
    missed = np.linalg.norm(dense - product)
    assert missed - best <= 1e-9 * size
    np.testing.assert_allclose(svd.S, values[:6], rtol=0, atol=1e-9 * values[0])
    assert svd.tail_energy == pytest.approx(missed**2, rel=1e-9, abs=1e-10 * size**2)
    assert svd.total_energy == pytest.approx(size**2, rel=1e-9)
    assert svd.live_rank == (values[:6] > 1e-7 * values[0]).sum()
    live = svd.live_rank
    np.testing.assert_allclose(svd.U[:, :live].T @ svd.U[:, :live], np.eye(live), atol=1e-12)
    np.testing.assert_allclose(svd.Vt[:live] @ svd.Vt[:live].T, np.eye(live), atol=1e-12)
    if values[5] > 1.01 * values[6] and live == 6:
        # With a gap there is one best matrix only, and this is it.
        assert np.linalg.norm(product - _truncated(dense, 6)) <= 1e-7 * size


@every_way
def test_a_millionth_of_the_largest_is_found_in_a_wide_stack_and_dust_is_not(way: Way) -> None:
    # Squared it is 1e-12; what rounding adds to squares is 1e-14, to the factors' own product 1e-16.
    left, right = _spectrum(np.random.default_rng(0), [1.0, 1e-3, 1e-6])
    svd = truncated_svd([left], [right], rank=16, way=way)
    np.testing.assert_allclose(svd.S[:3], [1.0, 1e-3, 1e-6], rtol=1e-8)
    assert svd.live_rank == 3
    assert np.all(svd.S[3:] < 1e-13)


@every_way
def test_a_wide_stack_that_cancels_wholly_has_no_live_component_and_no_energy(way: Way) -> None:
    # Rounding leaves 1e-16 of each block, in directions that mean nothing.
    left, right = _cancelling(np.random.default_rng(5), 0.0)
    svd = truncated_svd([left], [right], rank=6, way=way)
    assert svd.live_rank == 0
    assert np.all(svd.S == 0)
    assert (svd.tail_energy, svd.total_energy) == (0.0, 0.0)


@every_way
def test_a_wide_stack_of_zeros_is_zero(way: Way) -> None:
    svd = truncated_svd([np.zeros((TALL, 80))], [np.ones((80, WIDE))], rank=6, way=way)
    assert svd.live_rank == 0
    np.testing.assert_array_equal((svd.U * svd.S) @ svd.Vt, np.zeros((TALL, WIDE)))
    assert (svd.tail_energy, svd.total_energy) == (0.0, 0.0)


def _product(svd: TruncatedSvd) -> Matrix:
    return (svd.U * svd.S) @ svd.Vt


@every_way
@settings(deadline=None, max_examples=15)
@given(seed=SEEDS, data=st.data())
def test_neither_order_nor_empty_sites_nor_whose_factor_is_large_changes_the_merge(
    way: Way, seed: int, data: st.DataObject
) -> None:
    lefts, rights = _stacks(seed, d_out=30, d_in=40, ranks=[8] * 9, decades=3)
    merged = truncated_svd(lefts, rights, rank=5, way=way)
    order = data.draw(st.permutations(range(9)), label="order")
    size = data.draw(st.floats(1e-6, 1e6), label="size")
    shuffled = truncated_svd(
        [*(lefts[i] * size for i in order), np.zeros((30, 4))],
        [*(rights[i] / size for i in order), np.ones((4, 40))],
        rank=5,
        way=way,
    )
    scale = merged.S[0]
    np.testing.assert_allclose(shuffled.S, merged.S, rtol=1e-10)
    np.testing.assert_allclose(shuffled.tail_energy, merged.tail_energy, rtol=1e-9)
    gap = np.linalg.svd(_dense(lefts, rights), compute_uv=False)[4:6]
    if gap[0] > 1.001 * gap[1]:
        np.testing.assert_allclose(_product(shuffled), _product(merged), atol=1e-9 * scale)


@every_way
@settings(deadline=None, max_examples=15)
@given(seed=SEEDS)
def test_at_full_rank_nothing_is_left_out(way: Way, seed: int) -> None:
    lefts, rights = _stacks(seed, d_out=70, d_in=75, ranks=[16] * 5)
    svd = truncated_svd(lefts, rights, rank=70, way=way)
    dense = _dense(lefts, rights)
    np.testing.assert_allclose(_product(svd), dense, atol=1e-11 * svd.S[0])
    assert svd.tail_energy == 0.0


@every_way
def test_the_same_factors_give_the_same_bits(way: Way) -> None:
    lefts, rights = _stacks(2, d_out=TALL, d_in=WIDE, ranks=[16] * 5)
    first, second = (truncated_svd(lefts, rights, rank=16, way=way) for _ in range(2))
    np.testing.assert_array_equal(first.U, second.U)
    np.testing.assert_array_equal(first.S, second.S)
    np.testing.assert_array_equal(first.Vt, second.Vt)
    assert (first.tail_energy, first.total_energy) == (second.tail_energy, second.total_energy)


@every_way
def test_a_component_has_the_same_sign_whatever_the_last_bits_of_the_factors(way: Way) -> None:
    """Of two that are both right, LAPACK's choice would hang on them."""
    for seed in range(8):
        lefts, rights = _stacks(seed, d_out=70, d_in=75, ranks=[16] * 5)
        first = truncated_svd(lefts, rights, rank=6, way=way)
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], (5, 16))
        turned = truncated_svd(
            [left * sign for left, sign in zip(lefts, signs, strict=True)],
            [sign[:, None] * right for right, sign in zip(rights, signs, strict=True)],
            rank=6,
            way=way,
        )
        np.testing.assert_allclose(turned.U, first.U, atol=1e-6)
        np.testing.assert_allclose(turned.Vt, first.Vt, atol=1e-6)
        assert (first.U[np.abs(first.U).argmax(axis=0), range(6)] > 0).all()


@pytest.mark.parametrize(
    ("d_out", "d_in", "columns", "way"),
    [
        (4096, 4096, 48, "qr"),
        (4096, 4096, 64, "gram"),
        (4096, 11008, 160, "gram"),
        (11008, 4096, 1616, "gram"),
        (768, 3072, 752, "gram"),
        (768, 3072, 768, "whole"),
        (64, 64, 176, "whole"),
        (64, 64, 32, "qr"),
    ],
)
def test_the_way_follows_from_the_shape(d_out: int, d_in: int, columns: int, way: Way) -> None:
    assert choose_way(d_out=d_out, d_in=d_in, columns=columns) == way


def test_products_that_cancel_go_by_qr_and_sites_that_agree_by_gram() -> None:
    """Which way was gone shows in the last bits."""
    random = np.random.default_rng(1)
    plain, cancelling = HARD["plain"](random), HARD["a millionth is left"](random)
    # Five sites with one and the same adapter: R R' is singular, and no digit is in danger.
    agreeing = np.hstack([plain[0][:, :16]] * 5), np.vstack([plain[1][:16]] * 5)
    for (left, right), gone, other in (
        (plain, "gram", "qr"),
        (agreeing, "gram", "qr"),
        (cancelling, "qr", "whole"),
    ):
        chosen = truncated_svd([left], [right], rank=6)
        same = truncated_svd([left], [right], rank=6, way=gone)  # type: ignore[arg-type]
        different = truncated_svd([left], [right], rank=6, way=other)  # type: ignore[arg-type]
        np.testing.assert_array_equal(chosen.U, same.U)
        assert not np.array_equal(chosen.U, different.U)


@pytest.mark.parametrize(("d_out", "d_in"), [(70, 200), (200, 70)])
@pytest.mark.parametrize(("columns", "decomposed"), [(66, 66), (150, 70)])
def test_what_is_decomposed_is_the_smallest_there_is(
    d_out: int, d_in: int, columns: int, decomposed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def counted(symmetric: Matrix, *others: Matrix, **options: Any) -> Any:
        sizes.append(len(symmetric))
        return eigh(symmetric, *others, **options)

    monkeypatch.setattr("server.lowrank.eigh", counted)
    lefts, rights = _stacks(0, d_out=d_out, d_in=d_in, ranks=[columns])
    truncated_svd(lefts, rights, rank=4)
    assert sizes == [decomposed]
