"""Laws of merging: what must hold for any sites, and what each method is exact for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.adapter import AdapterState, LoraPair, lora_scaling
from common.errors import ShapeError
from server.aggregation import METHODS, Merge, SiteUpdate, merge_svd, merge_weighted
from server.aggregation.svd import balanced_split
from server.aggregation.types import leading_ranks
from server.lowrank import truncated_svd
from tests.unit.adapters import SIDES, assert_same_products, products, random_adapter

SEEDS = st.integers(0, 2**32 - 1)
WEIGHTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=5)
BOTH = pytest.mark.parametrize("merge", METHODS.values(), ids=METHODS.keys())


def _updates(current: AdapterState, returned: list[AdapterState], weights: list[float]):
    return [
        SiteUpdate(f"site-{i}", weight, sent=current, returned=state)
        for i, (state, weight) in enumerate(zip(returned, weights, strict=True))
    ]


def _mean_product(returned: list[AdapterState], weights: list[float]):
    shares = np.array(weights) / sum(weights)
    each = [products(state) for state in returned]
    return {
        name: np.sum([share * p[name] for share, p in zip(shares, each, strict=True)], axis=0)
        for name in SIDES
    }


def _truncated(matrix, rank: int):
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def _rotated(state: AdapterState, seed: int) -> AdapterState:
    """The same product in other factors: (B R, R^-1 A)."""
    random = np.random.default_rng(seed)
    mix = np.linalg.qr(random.standard_normal((state.rank, state.rank)))[0]
    mix = mix * random.uniform(0.5, 2.0, state.rank)
    return AdapterState(
        {
            name: LoraPair(
                (np.linalg.inv(mix) @ pair.A).astype(np.float32),
                (pair.B @ mix).astype(np.float32),
            )
            for name, pair in state.pairs.items()
        },
        state.scaling,
    )


# Laws of every method


@BOTH
@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, weights=WEIGHTS, order=st.randoms(use_true_random=False))
def test_the_order_of_sites_does_not_matter(merge: Merge, seed: int, weights, order) -> None:
    current = random_adapter(seed, rank=2)
    returned = [random_adapter(seed + 1 + i, rank=2) for i in range(len(weights))]
    updates = _updates(current, returned, weights)
    shuffled = list(updates)
    order.shuffle(shuffled)
    assert_same_products(merge(current, shuffled).state, merge(current, updates).state)


@BOTH
@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, weights=WEIGHTS)
def test_sites_that_agree_get_what_they_agree_on_however_many_they_are(
    merge: Merge, seed: int, weights
) -> None:
    """PEFT's own `linear` combination would return K times the update here."""
    current, agreed = random_adapter(seed, rank=3), random_adapter(seed + 1, rank=3)
    merged = merge(current, _updates(current, [agreed] * len(weights), weights))
    assert_same_products(merged.state, agreed)
    assert merged.state.scaling == current.scaling
    assert merged.total_discarded == pytest.approx(0.0, abs=1e-12)


@BOTH
@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, weights=WEIGHTS, factor=st.floats(0.001, 1000))
def test_only_the_ratio_of_weights_counts(merge: Merge, seed: int, weights, factor: float) -> None:
    current = random_adapter(seed, rank=2)
    returned = [random_adapter(seed + 1 + i, rank=2) for i in range(len(weights))]
    plain = merge(current, _updates(current, returned, weights))
    scaled = merge(current, _updates(current, returned, [factor * w for w in weights]))
    assert_same_products(scaled.state, plain.state)


@BOTH
def test_a_site_of_weight_zero_moves_nothing(merge: Merge) -> None:
    current, first, second = (random_adapter(seed, rank=2) for seed in range(3))
    merged = merge(current, _updates(current, [first, second], [1.0, 0.0]))
    assert_same_products(merged.state, first)


@BOTH
def test_ten_rounds_of_mixed_ranks_without_training_change_nothing(merge: Merge) -> None:
    """Averaging states instead of updates erased 97 % of the tail in five such rounds (DESIGN 6)."""
    start = merge_svd(
        random_adapter(0, rank=4),
        _updates(random_adapter(0, rank=4), [random_adapter(1, rank=4)], [1]),
    ).state
    current = start
    for _ in range(10):
        updates = []
        for site, rank in (("small", 1), ("middle", 2), ("large", 4)):
            scaling = lora_scaling(alpha=8, rank=rank, use_rslora=True)
            sent = leading_ranks(current, rank=rank, scaling=scaling)
            updates.append(SiteUpdate(site, float(rank), sent=sent, returned=sent))
        current = merge(current, updates).state
    assert_same_products(current, start, tolerance=1e-5)


@BOTH
def test_nothing_to_merge_is_an_error(merge: Merge) -> None:
    current = random_adapter(0, rank=2)
    with pytest.raises(ShapeError, match="0 updates .* nothing to merge"):
        merge(current, [])
    with pytest.raises(ShapeError, match="nothing to merge"):
        merge(current, _updates(current, [current], [0.0]))
    with pytest.raises(ShapeError, match="nothing to merge"):
        merge(current, _updates(current, [current, current], [2.0, -1.0]))


@BOTH
def test_a_merge_gives_float32_factors_of_the_global_rank(merge: Merge) -> None:
    current = random_adapter(0, rank=3)
    state = merge(current, _updates(current, [random_adapter(1, rank=3)], [1.0])).state
    assert state.rank == 3
    assert {array.dtype for array in state.tensors().values()} == {np.dtype(np.float32)}


# weighted


def test_weighted_is_the_mean_of_a_and_of_b() -> None:
    def one_by_one(a: float, b: float) -> AdapterState:
        pair = LoraPair(np.array([[a]], np.float32), np.array([[b]], np.float32))
        return AdapterState({"layer": pair}, 2.0)

    # Weights 1 : 3. A: (4 + 3 * 8) / 4 = 7; B: (2 + 3 * 6) / 4 = 5, whatever the sites were sent.
    merged = merge_weighted(
        one_by_one(100.0, -100.0),
        _updates(one_by_one(100.0, -100.0), [one_by_one(4, 2), one_by_one(8, 6)], [1.0, 3.0]),
    )
    assert merged.state.pairs["layer"].A.item() == 7.0
    assert merged.state.pairs["layer"].B.item() == 5.0
    assert merged.discarded_energy == {}


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, weights=WEIGHTS)
def test_weighted_with_equal_ranks_is_the_plain_weighted_mean(seed: int, weights) -> None:
    current = random_adapter(seed, rank=2)
    returned = [random_adapter(seed + 1 + i, rank=2) for i in range(len(weights))]
    merged = merge_weighted(current, _updates(current, returned, weights)).state
    for name, pair in merged.pairs.items():
        a = np.average([s.pairs[name].A for s in returned], axis=0, weights=weights)
        b = np.average([s.pairs[name].B for s in returned], axis=0, weights=weights)
        np.testing.assert_allclose(pair.A, a, atol=1e-5)
        np.testing.assert_allclose(pair.B, b, atol=1e-5)


def test_weighted_moves_only_the_rows_that_a_small_site_was_sent() -> None:
    current = random_adapter(0, rank=3, scaling=2.0)
    sent = leading_ranks(current, rank=1, scaling=4.0)
    pair = sent.pairs["model.q_proj"]
    moved = AdapterState(
        {**sent.pairs, "model.q_proj": LoraPair(pair.A + 1, pair.B + 1)}, sent.scaling
    )
    merged = merge_weighted(current, [SiteUpdate("small", 1.0, sent=sent, returned=moved)]).state
    before, after = current.pairs["model.q_proj"], merged.pairs["model.q_proj"]
    np.testing.assert_allclose(after.A[0], before.A[0] + 1, atol=1e-6)
    # B moved by 1 at scaling 4; at the global scaling 2 that is a move by 2.
    np.testing.assert_allclose(after.B[:, 0], before.B[:, 0] + 2, atol=1e-5)
    np.testing.assert_array_equal(after.A[1:], before.A[1:])
    np.testing.assert_allclose(after.B[:, 1:], before.B[:, 1:], atol=1e-6)


def test_weighted_is_biased_where_svd_is_not() -> None:
    """Two sites with (A, B) = (1, 1) and (-1, -1) both mean +1; the mean of factors says 0."""

    def site(value: float) -> AdapterState:
        factor = np.array([[value]], np.float32)
        return AdapterState({"layer": LoraPair(factor, factor)}, 1.0)

    updates = _updates(site(0.5), [site(1.0), site(-1.0)], [1.0, 1.0])
    assert products(merge_weighted(site(0.5), updates).state)["layer"].item() == 0.0
    assert products(merge_svd(site(0.5), updates).state)["layer"].item() == pytest.approx(1.0)


# svd


@settings(deadline=None, max_examples=40)
@given(seed=SEEDS, weights=WEIGHTS, rank=st.integers(1, 5))
def test_svd_is_the_best_approximation_of_the_mean_product(seed: int, weights, rank: int) -> None:
    current = random_adapter(seed, rank=rank)
    returned = [random_adapter(seed + 1 + i, rank=rank) for i in range(len(weights))]
    merged = merge_svd(current, _updates(current, returned, weights))
    target = _mean_product(returned, weights)
    assert_same_products(
        merged.state, {name: _truncated(matrix, rank) for name, matrix in target.items()}
    )
    lost = {n: np.linalg.norm(m - _truncated(m, rank)) ** 2 for n, m in target.items()}
    total = {n: np.linalg.norm(m) ** 2 for n, m in target.items()}
    for name in SIDES:
        share = lost[name] / total[name]
        assert merged.discarded_energy[name] == pytest.approx(share, rel=1e-4, abs=1e-10)
    assert merged.total_discarded == pytest.approx(
        sum(lost.values()) / sum(total.values()), rel=1e-4, abs=1e-10
    )


def test_svd_at_full_rank_is_exact() -> None:
    # Rank 5 is all that a 6 x 5 and a 5 x 8 matrix have.
    current = random_adapter(0, rank=5)
    returned = [random_adapter(seed, rank=5) for seed in (1, 2, 3)]
    merged = merge_svd(current, _updates(current, returned, [1.0, 2.0, 5.0]))
    assert_same_products(merged.state, _mean_product(returned, [1.0, 2.0, 5.0]))
    assert merged.total_discarded == pytest.approx(0.0, abs=1e-12)


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS)
def test_svd_does_not_care_in_which_factors_an_update_comes(seed: int) -> None:
    current = random_adapter(seed, rank=2)
    returned = [random_adapter(seed + 1, rank=2), random_adapter(seed + 2, rank=2)]
    rotated = [returned[0], _rotated(returned[1], seed)]
    plain = merge_svd(current, _updates(current, returned, [1.0, 2.0])).state
    assert_same_products(
        merge_svd(current, _updates(current, rotated, [1.0, 2.0])).state, plain, tolerance=1e-4
    )


def test_svd_target_for_mixed_ranks_is_the_global_adapter_plus_mean_updates() -> None:
    """M = W_g + sum w_k (W_k - W_k0), computed densely; rank 5 holds it whole."""
    current = random_adapter(0, rank=5, scaling=1.6)
    updates, target = [], products(current)
    for site, rank, weight in (("small", 1, 0.25), ("large", 3, 0.75)):
        sent = leading_ranks(current, rank=rank, scaling=8 / rank)
        returned = random_adapter(rank, rank=rank, scaling=8 / rank)
        updates.append(SiteUpdate(site, weight, sent=sent, returned=returned))
        for name in SIDES:
            target[name] = target[name] + weight * (products(returned)[name] - products(sent)[name])
    assert_same_products(merge_svd(current, updates).state, target)


def test_a_site_that_holds_less_does_not_erase_the_tail_of_the_others() -> None:
    """The small site pulls its own leading component to zero; all others stay."""
    current = merge_svd(
        random_adapter(0, rank=3),
        _updates(random_adapter(0, rank=3), [random_adapter(1, rank=3)], [1]),
    ).state
    sent = leading_ranks(current, rank=1, scaling=current.scaling)
    zero = AdapterState({n: LoraPair(p.A, 0 * p.B) for n, p in sent.pairs.items()}, sent.scaling)
    merged = merge_svd(current, [SiteUpdate("small", 1.0, sent=sent, returned=zero)]).state
    tail = {n: products(current)[n] - products(sent)[n] for n in SIDES}
    assert_same_products(merged, tail)


def test_svd_splits_the_singular_values_evenly_between_the_factors() -> None:
    current = random_adapter(0, rank=3, scaling=2.0)
    state = merge_svd(current, _updates(current, [random_adapter(1, rank=3)], [1.0])).state
    for name, pair in state.pairs.items():
        values = np.linalg.svd(products(state)[name], compute_uv=False)[:3]
        # A = sqrt(S) V', s B = U sqrt(S): both Gram matrices are diag(S), the largest first.
        np.testing.assert_allclose(pair.A @ pair.A.T, np.diag(values), atol=1e-4)
        scaled = 2.0 * pair.B.astype(np.float64)
        np.testing.assert_allclose(scaled.T @ scaled, np.diag(values), atol=1e-4)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_svd_sends_b_divided_by_the_scaling_again(use_rslora: bool) -> None:
    # alpha 16, rank 4: s = 4, or 8 for rsLoRA. The product that a site computes is the target's.
    scaling = lora_scaling(alpha=16, rank=4, use_rslora=use_rslora)
    assert scaling == (8.0 if use_rslora else 4.0)
    current = random_adapter(0, rank=4, scaling=scaling)
    returned = random_adapter(1, rank=4, scaling=scaling)
    merged = merge_svd(current, _updates(current, [returned], [1.0])).state
    assert merged.scaling == scaling
    assert_same_products(merged, returned)


def _one_live_component() -> AdapterState:
    """Rank 3, of which only the first component has any energy."""
    pairs = {}
    for name, pair in random_adapter(0, rank=3).pairs.items():
        b = pair.B.copy()
        b[:, 1:] = 0.0
        pairs[name] = LoraPair(pair.A, b)
    return AdapterState(pairs, 2.0)


def test_dead_components_get_orthonormal_rows_and_zero_b() -> None:
    returned = _one_live_component()
    current = random_adapter(5, rank=3)
    merged = merge_svd(current, _updates(current, [returned], [1.0])).state
    assert_same_products(merged, returned)
    for pair in merged.pairs.values():
        assert np.all(pair.B[:, 1:] == 0.0)
        # 1/3 is the squared norm of PEFT's initial rows: d_in entries uniform in +-1/sqrt(d_in).
        np.testing.assert_allclose(pair.A[1:] @ pair.A[1:].T, np.eye(2) / 3, atol=1e-6)
        np.testing.assert_allclose(pair.A[1:] @ pair.A[0], 0.0, atol=1e-5)
    again = merge_svd(current, _updates(current, [returned], [1.0])).state
    assert again.digest() == merged.digest()


def test_dead_components_can_learn_again() -> None:
    """One gradient step on <G, s B A> reaches rank 3; with A = 0 and B = 0 it never could."""
    current = _one_live_component()
    merged = merge_svd(current, _updates(current, [current], [1.0])).state
    random = np.random.default_rng(0)
    for name, pair in merged.pairs.items():
        slope = random.standard_normal(SIDES[name])
        stepped = pair.B + 0.1 * merged.scaling * slope @ pair.A.T
        values = np.linalg.svd(stepped @ pair.A, compute_uv=False)
        assert values[2] > 1e-2


def test_an_adapter_that_learned_nothing_stays_able_to_learn() -> None:
    nothing = AdapterState(
        {n: LoraPair(p.A, 0 * p.B) for n, p in random_adapter(0, rank=3).pairs.items()}, 2.0
    )
    merged = merge_svd(nothing, _updates(nothing, [nothing, nothing], [1.0, 1.0]))
    assert merged.total_discarded == 0.0
    assert_same_products(merged.state, nothing)
    for pair in merged.state.pairs.values():
        np.testing.assert_allclose(pair.A @ pair.A.T, np.eye(3) / 3, atol=1e-6)


def test_modules_get_different_fresh_rows() -> None:
    svd = truncated_svd([np.zeros((4, 2))], [np.zeros((2, 6))], rank=2)
    first = balanced_split(svd, scaling=1.0, name="layer.0")
    second = balanced_split(svd, scaling=1.0, name="layer.1")
    assert np.abs(first.A - second.A).max() > 0.01


# leading_ranks


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, rank=st.integers(1, 4), scaling=st.floats(0.1, 16))
def test_leading_ranks_keep_the_product_of_the_leading_components(
    seed: int, rank: int, scaling: float
) -> None:
    whole = random_adapter(seed, rank=4, scaling=2.0)
    cut = leading_ranks(whole, rank=rank, scaling=scaling)
    assert (cut.rank, cut.scaling) == (rank, scaling)
    expected = {
        name: 2.0 * pair.B[:, :rank].astype(np.float64) @ pair.A[:rank].astype(np.float64)
        for name, pair in whole.pairs.items()
    }
    assert_same_products(cut, expected)
    assert {array.dtype for array in cut.tensors().values()} == {np.dtype(np.float32)}


def test_leading_ranks_of_a_merged_adapter_are_its_best_approximation() -> None:
    current = random_adapter(0, rank=4)
    merged = merge_svd(current, _updates(current, [random_adapter(1, rank=4)], [1.0])).state
    cut = leading_ranks(merged, rank=2, scaling=1.0)
    assert_same_products(cut, {n: _truncated(m, 2) for n, m in products(merged).items()})


def test_all_ranks_at_the_same_scaling_are_the_adapter_itself() -> None:
    whole = random_adapter(0, rank=4, scaling=2.0)
    assert leading_ranks(whole, rank=4, scaling=2.0) is whole
    assert leading_ranks(whole, rank=4, scaling=1.0) is not whole


def test_more_ranks_than_there_are_cannot_be_cut() -> None:
    with pytest.raises(ShapeError, match="rank 5 cannot be cut from an adapter of rank 4"):
        leading_ranks(random_adapter(0, rank=4), rank=5, scaling=1.0)
