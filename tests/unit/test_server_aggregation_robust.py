"""Robust rules compare updates as products: small, large, rotated and hostile ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from common.adapter import AdapterState, LoraPair
from server.aggregation import METHODS, MergeRules, update_shares
from server.aggregation.robust import clip_factors, geometric_median, update_gram
from tests.unit.adapters import SIDES, assert_same_products, products, random_adapter
from tests.unit.merging import merged_by, norm_of, rotated, sent_to, trained, updates_of

SEEDS = st.integers(0, 2**32 - 1)
RULES = pytest.mark.parametrize("robust", ["norm-clip", "geometric-median"])
# Those that common/config.py lets them go with: what they merge follows from the products alone.
ALL = pytest.mark.parametrize("method", ["svd", "stack", "ffa", "fedsvd"])


def _moved(current: AdapterState, seed: int, *, size: float, method: str = "svd") -> AdapterState:
    """Return what was sent with small random steps in the factors that a method trains."""
    step = random_adapter(seed, rank=current.rank, scaling=current.scaling, size=size)
    only_b = METHODS[method].trained(1) == "b"
    return AdapterState(
        {
            name: LoraPair(
                pair.A if only_b else pair.A + step.pairs[name].A, pair.B + step.pairs[name].B
            )
            for name, pair in current.pairs.items()
        },
        current.scaling,
    )


def _update(current: AdapterState, returned: AdapterState) -> np.ndarray:
    """D_k of all modules as one long vector."""
    before, after = products(sent_to(returned.rank, current)), products(returned)
    return np.concatenate([(after[name] - before[name]).ravel() for name in SIDES])


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, ranks=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_inner_products_are_those_of_the_dense_updates(seed: int, ranks: list[int]) -> None:
    current = random_adapter(seed, rank=4)
    returned = [trained("svd", seed + 1 + i, current, rank=rank) for i, rank in enumerate(ranks)]
    dense = np.array([_update(current, state) for state in returned])
    gram = update_gram(current, updates_of(returned, [1.0] * len(ranks)))
    np.testing.assert_allclose(gram, dense @ dense.T, rtol=1e-5, atol=1e-3)


def test_an_update_far_smaller_than_the_adapter_keeps_its_norm() -> None:
    current = random_adapter(0, rank=3, size=100.0)
    returned = _moved(current, 1, size=1e-2)
    dense = np.linalg.norm(_update(current, returned))
    assert dense < 1e-3 * norm_of(products(current))
    gram = update_gram(current, updates_of([returned], [1.0]))
    assert np.sqrt(gram[0, 0]) == pytest.approx(dense, rel=1e-4)


@RULES
@settings(deadline=None, max_examples=25)
@given(seed=SEEDS)
def test_a_rotated_copy_counts_as_much(robust: str, seed: int) -> None:
    current = random_adapter(seed, rank=2)
    returned = [random_adapter(seed + 1 + i, rank=2) for i in range(4)]
    turned = [*returned[:3], rotated(returned[3], seed)]
    shares = [
        update_shares(current, updates_of(each, [1, 2, 3, 4]), rules=MergeRules(robust=robust))
        for each in (returned, turned)
    ]
    np.testing.assert_allclose(shares[0], shares[1], rtol=1e-3)


@ALL
def test_clipping_acts_on_updates_and_the_global_norm_survives(method: str) -> None:
    """Clipping states to the size of an update took |W| from 16.2 to 2.4 in one merge (DESIGN 6)."""
    current = merged_by(
        method, random_adapter(0, rank=3), [trained(method, 1, random_adapter(0, rank=3))]
    ).state
    current = AdapterState(current.pairs, current.scaling)
    before = norm_of(products(current))
    returned = [_moved(current, seed, size=0.05, method=method) for seed in (2, 3)]
    merged = merged_by(method, current, returned, robust="norm-clip", clip_norm=1e-3).state
    assert norm_of(products(merged)) == pytest.approx(before, rel=0.01)
    moved = norm_of({n: products(merged)[n] - products(current)[n] for n in SIDES})
    assert moved < 2e-3


def test_an_update_beyond_the_limit_is_scaled_down_to_it_and_no_other() -> None:
    # Norms 1, 2 and 10 at a limit of 4: only the last is scaled, to 4.
    assert clip_factors(np.array([1.0, 2.0, 10.0]), max_norm=4.0) == [1.0, 1.0, 0.4]
    # The median of the norms is 2.
    assert clip_factors(np.array([1.0, 2.0, 10.0]), max_norm=0.0) == [1.0, 1.0, 0.2]
    assert clip_factors(np.array([0.0, 0.0]), max_norm=0.0) == [1.0, 1.0]


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, weights=st.lists(st.floats(0.1, 10), min_size=3, max_size=6))
def test_the_geometric_median_has_the_least_sum_of_distances(seed: int, weights) -> None:
    random = np.random.default_rng(seed)
    points = random.standard_normal((len(weights), 3))
    shares = np.array(weights) / sum(weights)
    found = geometric_median(points @ points.T, shares) @ points

    def cost(v: np.ndarray) -> float:
        return float(shares @ np.linalg.norm(points - v, axis=1))

    # From every point and from the middle: Nelder-Mead alone may stop at a kink.
    starts = [points.mean(axis=0), *points]
    best = min(minimize(cost, s, method="Nelder-Mead", tol=1e-10).fun for s in starts)
    assert cost(found) <= best + 1e-5


def test_the_geometric_median_of_a_line_is_its_median() -> None:
    # 0, 1 and 100 on a line: the median is 1, and the mean would be 33.7.
    points = np.array([[0.0], [1.0], [100.0]])
    shares = geometric_median(points @ points.T, np.full(3, 1 / 3))
    assert (shares @ points).item() == pytest.approx(1.0, abs=1e-3)
    assert shares.sum() == pytest.approx(1.0)


@ALL
@pytest.mark.parametrize("strength", [1e2, 1e6])
def test_less_than_half_of_the_weight_cannot_carry_the_median_far(
    method: str, strength: float
) -> None:
    current = random_adapter(0, rank=2)
    honest = [_moved(current, seed, size=0.01, method=method) for seed in range(1, 7)]
    hostile = [_moved(current, 9, size=0.01 * strength, method=method) for _ in range(4)]
    radius = max(np.linalg.norm(_update(current, state)) for state in honest)
    for robust, far in (("none", True), ("geometric-median", False), ("norm-clip", False)):
        merged = merged_by(method, current, [*honest, *hostile], robust=robust).state
        moved = norm_of({n: products(merged)[n] - products(current)[n] for n in SIDES})
        assert (moved > 10 * radius) == far, (robust, moved, radius)


@RULES
@ALL
def test_sites_that_agree_lose_nothing_to_a_robust_rule(method: str, robust: str) -> None:
    current = random_adapter(0, rank=2)
    agreed = trained(method, 1, current)
    merged = merged_by(method, current, [agreed] * 3, [1.0, 2.0, 3.0], robust=robust)
    assert_same_products(merged.state, agreed)
    assert sum(merged.report.shares.values()) == pytest.approx(1.0)


@RULES
def test_sites_that_did_not_move_are_no_reason_to_fail(robust: str) -> None:
    current = random_adapter(0, rank=2)
    merged = merged_by("svd", current, [current, current], robust=robust)
    assert_same_products(merged.state, current)
