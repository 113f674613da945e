"""Laws of merging: what must hold for any sites, and what each method is exact for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.adapter import AdapterState, LoraPair, lora_scaling
from common.errors import ShapeError
from server.aggregation import METHODS, SiteUpdate, leading_ranks
from tests.unit.adapters import SIDES, assert_same_products, products, random_adapter
from tests.unit.merging import (
    EXACT,
    PRODUCT_SPACE,
    dense_target,
    merged_by,
    norm_of,
    rotated,
    sent_to,
    trained,
    truncated,
    updates_of,
)

SEEDS = st.integers(0, 2**32 - 1)
WEIGHTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=5)
ALL = pytest.mark.parametrize("method", METHODS)


@ALL
@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, weights=WEIGHTS, order=st.randoms(use_true_random=False))
def test_the_order_of_sites_does_not_matter(method: str, seed: int, weights, order) -> None:
    current = random_adapter(seed, rank=2)
    sites = [(trained(method, seed + 1 + i, current), weight) for i, weight in enumerate(weights)]
    shuffled = list(sites)
    order.shuffle(shuffled)
    one, other = (
        merged_by(method, current, *zip(*each, strict=True)) for each in (sites, shuffled)
    )
    assert_same_products(one.state, other.state)


@ALL
@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, weights=WEIGHTS)
def test_sites_that_agree_get_what_they_agree_on_however_many_they_are(
    method: str, seed: int, weights
) -> None:
    """PEFT's own `linear` combination would return K times the update here."""
    current = random_adapter(seed, rank=3)
    agreed = trained(method, seed + 1, current)
    merged = merged_by(method, current, [agreed] * len(weights), weights)
    assert_same_products(merged.state, agreed)
    assert merged.state.scaling == current.scaling
    assert merged.report.discarded_energy == pytest.approx(0.0, abs=1e-12)
    assert merged.report.factor_bias == pytest.approx(0.0, abs=1e-6)


def test_pefts_linear_overscales_where_ours_does_not() -> None:
    """The law above is one that PEFT's own merging fails: K = 3 identical adapters of weight 1/3."""
    from peft.utils.merge_utils import task_arithmetic
    from torch import from_numpy, tensor

    agreed = random_adapter(1, rank=2, scaling=1.0)
    pair = agreed.pairs["model.q_proj"]
    # As LoraModel.add_weighted_adapter(combination_type="linear") does: the weights' roots, on A and on B.
    roots = tensor([1 / 3, 1 / 3, 1 / 3]).sqrt()
    a = task_arithmetic([from_numpy(pair.A)] * 3, roots)
    b = task_arithmetic([from_numpy(pair.B)] * 3, roots)
    np.testing.assert_allclose((b @ a).numpy(), 3.0 * pair.B @ pair.A, rtol=1e-5, atol=1e-5)
    ours = merged_by("weighted", random_adapter(0, rank=2, scaling=1.0), [agreed] * 3)
    assert_same_products(ours.state, agreed)


@ALL
@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, weights=WEIGHTS, factor=st.floats(0.001, 1000))
def test_only_the_ratio_of_weights_counts(method: str, seed: int, weights, factor: float) -> None:
    current = random_adapter(seed, rank=2)
    returned = [trained(method, seed + 1 + i, current) for i in range(len(weights))]
    plain = merged_by(method, current, returned, weights)
    scaled = merged_by(method, current, returned, [factor * weight for weight in weights])
    assert_same_products(scaled.state, plain.state)


@ALL
def test_a_site_of_weight_zero_moves_nothing(method: str) -> None:
    current = random_adapter(0, rank=2)
    first, second = (trained(method, seed, current) for seed in (1, 2))
    assert_same_products(merged_by(method, current, [first, second], [1.0, 0.0]).state, first)


@ALL
def test_ten_rounds_of_mixed_ranks_without_training_change_nothing(method: str) -> None:
    """Averaging states instead of updates erased 97 % of the tail in five such rounds (DESIGN 6)."""
    start = merged_by("svd", random_adapter(0, rank=4), [random_adapter(1, rank=4)]).state
    current = start
    for _ in range(10):
        returned = [
            leading_ranks(
                current, rank=rank, scaling=lora_scaling(alpha=8, rank=rank, use_rslora=True)
            )
            for rank in (1, 2, 4)
        ]
        current = merged_by(method, current, returned, [1.0, 2.0, 4.0]).state
    assert_same_products(current, start, tolerance=1e-5)


@ALL
@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, ranks=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_mixed_ranks_move_the_global_adapter_by_their_mean_update(
    method: str, seed: int, ranks: list[int]
) -> None:
    """M = W_g + sum c_k D_k, computed densely; what a method cuts from it is said of that method."""
    current = random_adapter(seed, rank=4)
    returned = [trained(method, seed + 1 + i, current, rank=rank) for i, rank in enumerate(ranks)]
    merged = merged_by(method, current, returned)
    target = dense_target(current, returned, [1 / len(ranks)] * len(ranks))
    if method in EXACT:
        assert_same_products(merged.state, target, tolerance=3e-5)
    elif method == "svd":
        # The distance, since near ties at the cut leave the truncation itself undetermined.
        for name, matrix in target.items():
            found = np.linalg.norm(matrix - products(merged.state)[name])
            least = np.linalg.norm(matrix - truncated(matrix, 4))
            assert found <= least + 1e-5 * np.linalg.norm(matrix)
    else:
        bias = norm_of({n: products(merged.state)[n] - target[n] for n in target})
        assert merged.report.factor_bias == pytest.approx(bias / norm_of(target), abs=1e-5)


@ALL
@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, weights=WEIGHTS)
def test_discarded_energy_and_bias_are_what_is_measured(method: str, seed: int, weights) -> None:
    current = random_adapter(seed, rank=2)
    returned = [trained(method, seed + 1 + i, current) for i in range(len(weights))]
    merged = merged_by(method, current, returned, weights)
    shares = np.array(weights) / sum(weights)
    target = dense_target(current, returned, list(shares))
    lost = {
        name: np.linalg.norm(matrix - products(merged.state)[name]) ** 2
        for name, matrix in target.items()
    }
    share = {name: lost[name] / np.linalg.norm(target[name]) ** 2 for name in SIDES}
    report = merged.report
    if method == "weighted":
        # What the mean of factors misses is bias; it cuts nothing off.
        assert report.discarded_energy == 0.0
    else:
        whole = sum(lost.values()) / norm_of(target) ** 2
        assert report.discarded_energy == pytest.approx(whole, rel=1e-4, abs=1e-9)
        assert report.worst_discarded_energy == pytest.approx(
            max(share.values()), rel=1e-4, abs=1e-9
        )
    mean = merged_by("weighted", current, returned, weights).state
    bias = norm_of({n: products(mean)[n] - target[n] for n in target}) / norm_of(target)
    assert report.factor_bias == pytest.approx(bias, rel=1e-3, abs=1e-5)
    assert report.live_ranks[0] <= report.live_ranks[1] <= report.live_ranks[2]


@pytest.mark.parametrize("method", PRODUCT_SPACE)
@settings(deadline=None, max_examples=25)
@given(seed=SEEDS)
def test_a_rotated_copy_is_the_same_update(method: str, seed: int) -> None:
    current = random_adapter(seed, rank=2)
    returned = [random_adapter(seed + 1, rank=2), random_adapter(seed + 2, rank=2)]
    plain = merged_by(method, current, returned, [1.0, 2.0]).state
    turned = [returned[0], rotated(returned[1], seed)]
    assert_same_products(
        merged_by(method, current, turned, [1.0, 2.0]).state, plain, tolerance=1e-4
    )


@ALL
@pytest.mark.parametrize("use_rslora", [False, True])
def test_b_is_divided_by_the_scaling_of_its_own_module(method: str, use_rslora: bool) -> None:
    # alpha 16, rank 4: s = 4, or 8 for rsLoRA; v_proj has an alpha of its own, half of it.
    scaling = lora_scaling(alpha=16, rank=4, use_rslora=use_rslora)
    assert scaling == (8.0 if use_rslora else 4.0)
    own = {"model.v_proj": scaling / 2}
    current = AdapterState(random_adapter(0, rank=4).pairs, scaling, own)
    returned = AdapterState(trained(method, 1, current).pairs, scaling, own)
    merged = merged_by(method, current, [returned, returned]).state
    assert (merged.scaling, merged.own_scalings) == (scaling, own)
    for name in SIDES:
        wanted = returned.scaling_of(name) * returned.pairs[name].B @ returned.pairs[name].A
        found = merged.scaling_of(name) * merged.pairs[name].B @ merged.pairs[name].A
        np.testing.assert_allclose(found, wanted, atol=1e-3)


@ALL
def test_a_merge_gives_float32_factors_of_one_rank(method: str) -> None:
    current = random_adapter(0, rank=3)
    state = merged_by(method, current, [trained(method, 1, current)]).state
    assert state.rank >= 3
    assert state.rank == 3 or METHODS[method].grows
    assert {array.dtype for array in state.tensors().values()} == {np.dtype(np.float32)}


@ALL
def test_the_leading_ranks_of_a_merge_are_what_sites_can_train(method: str) -> None:
    """A row of zeros in A beside a column of zeros in B has no gradient, and never learns again."""
    current = random_adapter(0, rank=3)
    nothing = AdapterState({n: LoraPair(p.A, 0 * p.B) for n, p in current.pairs.items()}, 2.0)
    merged = merged_by(method, nothing, [nothing, nothing]).state
    for name, pair in leading_ranks(merged, rank=3, scaling=2.0).pairs.items():
        assert np.linalg.matrix_rank(pair.A) == 3, name


@ALL
def test_nothing_to_merge_is_an_error(method: str) -> None:
    current = random_adapter(0, rank=2)
    with pytest.raises(ShapeError, match="0 updates .* nothing to merge"):
        merged_by(method, current, [])
    for weights in ([0.0, 0.0], [2.0, -1.0], [1.0, float("inf")], [1.0, float("nan")]):
        with pytest.raises(ShapeError, match="nothing to merge"):
            merged_by(method, current, [current, current], weights)


@pytest.mark.parametrize("method", ["ffa", "fedsvd"])
def test_a_site_that_trained_the_frozen_factor_is_not_merged(method: str) -> None:
    current = random_adapter(0, rank=2)
    with pytest.raises(ShapeError, match="another A than it was sent"):
        merged_by(method, current, [random_adapter(1, rank=2)])


def test_an_update_of_other_sides_or_of_a_higher_rank_is_named() -> None:
    current = random_adapter(0, rank=2)
    with pytest.raises(ShapeError, match="site-0: model.q_proj of 6 x 5 at rank 3, where"):
        merged_by("svd", current, [random_adapter(1, rank=3)])


def test_what_each_method_lets_a_site_train() -> None:
    asked = {name: [method.trained(r) for r in (1, 2, 3)] for name, method in METHODS.items()}
    assert asked.pop("rolora") == ["b", "a", "b"]
    assert asked.pop("ffa") == asked.pop("fedsvd") == ["b"] * 3
    assert set(map(tuple, asked.values())) == {("both",) * 3}


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


@pytest.mark.parametrize("method", PRODUCT_SPACE)
def test_leading_ranks_of_a_merged_adapter_are_its_best_approximation(method: str) -> None:
    current = random_adapter(0, rank=4)
    returned = [random_adapter(1, rank=4), random_adapter(2, rank=4)]
    merged = merged_by(method, current, returned).state
    cut = leading_ranks(merged, rank=2, scaling=1.0)
    assert_same_products(cut, {n: truncated(m, 2) for n, m in products(merged).items()})


def test_all_ranks_at_the_same_scaling_are_the_adapter_itself() -> None:
    whole = random_adapter(0, rank=4, scaling=2.0)
    assert leading_ranks(whole, rank=4, scaling=2.0) is whole
    assert leading_ranks(whole, rank=4, scaling=1.0) is not whole
    assert (
        leading_ranks(whole, rank=4, scaling=2.0, own_scalings={"model.q_proj": 1.0}) is not whole
    )


def test_more_ranks_than_there_are_cannot_be_cut() -> None:
    with pytest.raises(ShapeError, match="rank 5 cannot be cut from an adapter of rank 4"):
        leading_ranks(random_adapter(0, rank=4), rank=5, scaling=1.0)


def test_updates_are_of_the_leading_ranks_that_a_site_was_sent() -> None:
    current = random_adapter(0, rank=3)
    sent = sent_to(1, current)
    merged = merged_by("stack", current, [sent, current])
    assert_same_products(merged.state, current)
    assert isinstance(updates_of([sent], [1.0])[0], SiteUpdate)
