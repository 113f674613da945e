"""`svd` and `stack`: exact but for truncation, and what was cut off can be learned again."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.adapter import AdapterState, LoraPair
from common.errors import ShapeError
from server.aggregation.svd import balanced_split
from server.lowrank import truncated_svd
from tests.unit.adapters import SIDES, assert_same_products, products, random_adapter
from tests.unit.merging import dense_target, merged_by, sent_to, truncated

SEEDS = st.integers(0, 2**32 - 1)


def _one_live_component() -> AdapterState:
    """Rank 3, of which only the first component has any energy."""
    pairs = {}
    for name, pair in random_adapter(0, rank=3).pairs.items():
        b = pair.B.copy()
        b[:, 1:] = 0.0
        pairs[name] = LoraPair(pair.A, b)
    return AdapterState(pairs, 2.0)


@settings(deadline=None, max_examples=40)
@given(seed=SEEDS, count=st.integers(1, 5), rank=st.integers(1, 5))
def test_svd_is_the_best_approximation_of_the_mean_product(
    seed: int, count: int, rank: int
) -> None:
    current = random_adapter(seed, rank=rank)
    returned = [random_adapter(seed + 1 + i, rank=rank) for i in range(count)]
    merged = merged_by("svd", current, returned).state
    target = dense_target(current, returned, [1 / count] * count)
    for name, matrix in target.items():
        least = np.linalg.norm(matrix - truncated(matrix, rank))
        found = np.linalg.norm(matrix - products(merged)[name])
        assert found <= least + 1e-5 * np.linalg.norm(matrix)


def test_svd_at_full_rank_is_exact() -> None:
    # Rank 5 is all that a 6 x 5 and a 5 x 8 matrix have.
    current = random_adapter(0, rank=5)
    returned = [random_adapter(seed, rank=5) for seed in (1, 2, 3)]
    merged = merged_by("svd", current, returned, [1.0, 2.0, 5.0])
    assert_same_products(merged.state, dense_target(current, returned, [0.125, 0.25, 0.625]))
    assert merged.report.discarded_energy == pytest.approx(0.0, abs=1e-12)


def test_a_site_that_holds_less_does_not_erase_the_tail_of_the_others() -> None:
    """The small site pulls its own leading component to zero; all others stay."""
    current = merged_by("svd", random_adapter(0, rank=3), [random_adapter(1, rank=3)]).state
    sent = sent_to(1, current)
    zero = AdapterState({n: LoraPair(p.A, 0 * p.B) for n, p in sent.pairs.items()}, sent.scaling)
    tail = {n: products(current)[n] - products(sent)[n] for n in SIDES}
    for method in ("svd", "stack"):
        assert_same_products(merged_by(method, current, [zero]).state, tail)


def test_svd_splits_the_singular_values_evenly_between_the_factors() -> None:
    current = random_adapter(0, rank=3, scaling=2.0)
    state = merged_by("svd", current, [random_adapter(1, rank=3)]).state
    for name, pair in state.pairs.items():
        values = np.linalg.svd(products(state)[name], compute_uv=False)[:3]
        # A = sqrt(S) V', s B = U sqrt(S): both Gram matrices are diag(S), the largest first.
        np.testing.assert_allclose(pair.A @ pair.A.T, np.diag(values), atol=1e-4)
        scaled = 2.0 * pair.B.astype(np.float64)
        np.testing.assert_allclose(scaled.T @ scaled, np.diag(values), atol=1e-4)


def test_dead_components_get_orthonormal_rows_and_zero_b() -> None:
    returned = _one_live_component()
    current = random_adapter(5, rank=3)
    merged = merged_by("svd", current, [returned])
    assert merged.report.live_ranks == (1, 1, 1)
    assert_same_products(merged.state, returned)
    for pair in merged.state.pairs.values():
        assert np.all(pair.B[:, 1:] == 0.0)
        # 1/3 is the squared norm of PEFT's initial rows: d_in entries uniform in +-1/sqrt(d_in).
        np.testing.assert_allclose(pair.A[1:] @ pair.A[1:].T, np.eye(2) / 3, atol=1e-6)
        np.testing.assert_allclose(pair.A[1:] @ pair.A[0], 0.0, atol=1e-5)
    again = merged_by("svd", current, [returned]).state
    assert again.digest() == merged.state.digest()


def test_dead_ranks_learn_again_after_a_merge_where_a_balanced_split_never_does() -> None:
    """100 steps of plain SGD towards singular values 3, 2 and 1.5, of which the first has been learned."""
    targets, pairs = {}, {}
    for name, matrix in products(random_adapter(9, rank=3)).items():
        u, _, vt = np.linalg.svd(matrix)
        targets[name] = (u[:, :3] * [3.0, 2.0, 1.5]) @ vt[:3]
        learned = np.array([1.0, 0.0, 0.0], np.float32)
        pairs[name] = LoraPair(np.float32(vt[:3]), np.float32(3.0 * u[:, :3]) * learned)
    current = AdapterState(pairs, 1.0)
    merged = merged_by("svd", current, [current]).state
    for name, pair in merged.pairs.items():
        balanced = LoraPair(np.vstack([pair.A[:1], np.zeros_like(pair.A[1:])]), pair.B)
        # sqrt(2^2 + 1.5^2): where A and B are zero alike, neither has a gradient.
        assert _distance_after_sgd(balanced, targets[name], steps=100) == pytest.approx(
            2.5, rel=1e-3
        )
        assert _distance_after_sgd(pair, targets[name], steps=100) < 0.1, name


def _distance_after_sgd(start: LoraPair, target: np.ndarray, *, steps: int) -> float:
    """Of the loss |B A - target|^2 / 2."""
    a, b = start.A.astype(np.float64), start.B.astype(np.float64)
    for _ in range(steps):
        error = b @ a - target
        a, b = a - 0.1 * b.T @ error, b - 0.1 * error @ a.T
    return float(np.linalg.norm(b @ a - target))


def test_an_adapter_that_learned_nothing_stays_able_to_learn() -> None:
    nothing = AdapterState(
        {n: LoraPair(p.A, 0 * p.B) for n, p in random_adapter(0, rank=3).pairs.items()}, 2.0
    )
    merged = merged_by("svd", nothing, [nothing, nothing])
    assert merged.report.discarded_energy == 0.0
    assert_same_products(merged.state, nothing)
    for pair in merged.state.pairs.values():
        np.testing.assert_allclose(pair.A @ pair.A.T, np.eye(3) / 3, atol=1e-6)


def test_modules_get_different_fresh_rows() -> None:
    svd = truncated_svd([np.zeros((4, 2))], [np.zeros((2, 6))], rank=2)
    first = balanced_split(svd, scaling=1.0, name="layer.0")
    second = balanced_split(svd, scaling=1.0, name="layer.1")
    assert np.abs(first.A - second.A).max() > 0.01


def test_stack_holds_all_that_went_in_and_no_more() -> None:
    """Two sites of rank 1 on a global adapter of rank 1: rank 3 at most; what is equal is not held twice."""
    current = random_adapter(0, rank=1)
    returned = [random_adapter(seed, rank=1) for seed in (1, 2)]
    merged = merged_by("stack", current, returned)
    assert_same_products(merged.state, dense_target(current, returned, [0.5, 0.5]))
    # W_g itself goes: the mean of two updates W_k - W_g is (W_1 + W_2) / 2 - W_g.
    assert (merged.state.rank, merged.report.live_ranks) == (2, (2, 2, 2))
    assert merged_by("stack", current, [returned[0]] * 4).state.rank == 1


def test_stack_never_grows_beyond_the_sides_of_the_largest_module() -> None:
    current = random_adapter(0, rank=5)
    for seed in range(1, 4):
        current = merged_by(
            "stack", current, [sent_to(5, current), random_adapter(seed, rank=5)]
        ).state
    # 6 x 5 and 5 x 8: no more than 5 singular values.
    assert current.rank == 5


@pytest.mark.parametrize("method", ["stack", "fedex"])
def test_a_round_of_small_sites_alone_leaves_the_rank_that_large_ones_train(method: str) -> None:
    """With what is left below lora.rank, a larger site could not be sent its ranks ever again."""
    nothing = AdapterState(
        {n: LoraPair(p.A, 0 * p.B) for n, p in random_adapter(0, rank=4).pairs.items()}, 2.0
    )
    small = [random_adapter(seed, rank=1, scaling=8.0) for seed in (1, 2)]
    merged = merged_by(method, nothing, small, rank=4).state
    assert merged.rank >= 4
    assert_same_products(merged, dense_target(nothing, small, [0.5, 0.5]))
    for pair in sent_to(4, merged).pairs.values():
        assert np.linalg.matrix_rank(pair.A[:4]) == 4


def test_what_is_not_finite_is_no_adapter() -> None:
    current = random_adapter(0, rank=1, scaling=1.0)
    huge = AdapterState(
        {n: LoraPair(p.A * 0 + 1, p.B * 0 + np.float32(3e38)) for n, p in current.pairs.items()},
        8.0,
    )
    with pytest.raises(ShapeError, match="values that are not finite"), np.errstate(over="ignore"):
        merged_by("weighted", current, [huge])
