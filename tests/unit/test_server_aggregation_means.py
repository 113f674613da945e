"""`weighted`, `rolora` and `fedex`: means of factors, and what they miss."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.adapter import AdapterState, LoraPair
from server.aggregation import SiteUpdate, leading_ranks
from tests.unit.adapters import SIDES, assert_same_products, products, random_adapter
from tests.unit.merging import dense_target, merged_by, sent_to

SEEDS = st.integers(0, 2**32 - 1)
WEIGHTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=5)


def test_weighted_is_the_mean_of_a_and_of_b() -> None:
    def one_by_one(a: float, b: float) -> AdapterState:
        pair = LoraPair(np.array([[a]], np.float32), np.array([[b]], np.float32))
        return AdapterState({"layer": pair}, 2.0)

    # Weights 1 : 3. A: (4 + 3 * 8) / 4 = 7; B: (2 + 3 * 6) / 4 = 5, whatever the sites were sent.
    merged = merged_by(
        "weighted", one_by_one(100.0, -100.0), [one_by_one(4, 2), one_by_one(8, 6)], [1.0, 3.0]
    )
    assert merged.state.pairs["layer"].A.item() == 7.0
    assert merged.state.pairs["layer"].B.item() == 5.0
    # 2 * 5 * 7 = 70, and the mean of the products is (2*2*4 + 3*2*6*8) / 4 = 76.
    assert merged.report.factor_bias == pytest.approx(6 / 76)
    assert merged.report.discarded_energy == 0.0


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, weights=WEIGHTS)
def test_weighted_with_equal_ranks_is_the_plain_weighted_mean(seed: int, weights) -> None:
    current = random_adapter(seed, rank=2)
    returned = [random_adapter(seed + 1 + i, rank=2) for i in range(len(weights))]
    merged = merged_by("weighted", current, returned, weights).state
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
    merged = merged_by("weighted", current, [moved]).state
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

    merged = {
        method: merged_by(method, site(0.5), [site(1.0), site(-1.0)])
        for method in ("weighted", "svd")
    }
    assert products(merged["weighted"].state)["layer"].item() == 0.0
    assert products(merged["svd"].state)["layer"].item() == pytest.approx(1.0)
    # All of M: said of a merge by svd too, which does not suffer from it.
    assert [one.report.factor_bias for one in merged.values()] == pytest.approx([1.0, 1.0])


@settings(deadline=None, max_examples=20)
@given(seed=SEEDS)
def test_rolora_is_exact_in_the_rounds_of_a_too(seed: int) -> None:
    current = random_adapter(seed, rank=2)
    returned = [
        AdapterState(
            {
                n: LoraPair(p.A, current.pairs[n].B)
                for n, p in random_adapter(s, rank=2).pairs.items()
            },
            current.scaling,
        )
        for s in (seed + 1, seed + 2)
    ]
    merged = merged_by("rolora", current, returned, [1.0, 3.0])
    assert_same_products(merged.state, dense_target(current, returned, [0.25, 0.75]))
    assert merged.report.factor_bias == pytest.approx(0.0, abs=1e-6)


def test_fedex_is_the_mean_of_factors_and_behind_it_what_that_misses() -> None:
    current = random_adapter(0, rank=2)
    returned = [random_adapter(seed, rank=2) for seed in (1, 2)]
    merged = merged_by("fedex", current, returned).state
    mean = merged_by("weighted", current, returned).state
    lead = leading_ranks(merged, rank=2, scaling=merged.scaling)
    assert_same_products(lead, mean)
    np.testing.assert_allclose(
        lead.pairs["model.q_proj"].A, mean.pairs["model.q_proj"].A, atol=1e-6
    )
    assert_same_products(merged, dense_target(current, returned, [0.5, 0.5]))


def test_fedex_keeps_its_residual_over_the_rounds() -> None:
    """Sites train the leading ranks on top of it; without training nothing changes, with it M stays exact."""
    current = random_adapter(0, rank=2)
    current = merged_by("fedex", current, [random_adapter(s, rank=2) for s in (1, 2)]).state
    assert current.rank > 2
    lead = leading_ranks(current, rank=2, scaling=current.scaling)
    still = merged_by("fedex", current, [lead, lead]).state
    assert_same_products(still, current, tolerance=1e-5)
    returned = [random_adapter(s, rank=2) for s in (3, 4)]
    updates = [SiteUpdate(str(i), 1.0, state) for i, state in enumerate(returned)]
    merged = merged_by("fedex", current, [one.returned for one in updates])  # type: ignore[misc]
    residual = {n: products(current)[n] - products(lead)[n] for n in SIDES}
    wanted = {
        n: residual[n] + (products(returned[0])[n] + products(returned[1])[n]) / 2 for n in SIDES
    }
    assert_same_products(merged.state, wanted)


def test_fedex_needs_no_residual_where_the_mean_is_exact() -> None:
    current = random_adapter(0, rank=2)
    agreed = random_adapter(1, rank=2)
    assert merged_by("fedex", current, [agreed, agreed]).state.rank == 2
    assert sent_to(2, current) is current
