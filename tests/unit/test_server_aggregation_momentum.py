"""Server momentum in factored form: V' = trunc_r(beta V + sum c_k D_k), W' = trunc_r(W_g + V')."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.adapters import SIDES, assert_same_products, products, random_adapter
from tests.unit.merging import dense_target, merged_by, trained, truncated

METHODS = pytest.mark.parametrize("method", ["svd", "ffa", "fedsvd"])


@METHODS
def test_momentum_is_the_formula_computed_densely(method: str) -> None:
    current, velocity = random_adapter(0, rank=2), None
    dense_w, dense_v = products(current), {name: np.zeros(SIDES[name]) for name in SIDES}
    for seed in (1, 3, 5):
        returned = [trained(method, seed + k, current) for k in (0, 1)]
        target = dense_target(current, returned, [0.5, 0.5])
        for name in SIDES:
            moved = 0.9 * dense_v[name] + target[name] - dense_w[name]
            dense_v[name] = truncated(moved, 2)
            dense_w[name] = truncated(dense_w[name] + dense_v[name], 2)
        merged = merged_by(method, current, returned, momentum=0.9, velocity=velocity)
        current, velocity = merged.state, merged.velocity
        assert velocity is not None
        assert_same_products(velocity, dense_v, tolerance=1e-4)
        assert_same_products(current, dense_w, tolerance=1e-4)


def test_without_momentum_there_is_no_velocity() -> None:
    current = random_adapter(0, rank=2)
    assert merged_by("svd", current, [random_adapter(1, rank=2)]).velocity is None


@METHODS
def test_momentum_carries_on_where_sites_stand_still(method: str) -> None:
    current = random_adapter(0, rank=2)
    first = merged_by(method, current, [trained(method, 1, current)], momentum=0.5)
    second = merged_by(method, first.state, [first.state], momentum=0.5, velocity=first.velocity)
    step = {n: products(first.state)[n] - products(current)[n] for n in SIDES}
    if method != "svd":
        # svd cuts W_g + V' to rank 2; the others hold it whole.
        on = {n: products(first.state)[n] + 0.5 * step[n] for n in SIDES}
        assert_same_products(second.state, on, tolerance=1e-4)
    assert first.velocity is not None
    assert second.velocity is not None
    half = {n: 0.5 * matrix for n, matrix in products(first.velocity).items()}
    assert_same_products(second.velocity, half, tolerance=1e-4)


def test_the_bias_is_that_of_the_mean_of_factors_and_not_of_momentum() -> None:
    current = random_adapter(0, rank=2)
    returned = [random_adapter(1, rank=2), random_adapter(2, rank=2)]
    plain = merged_by("svd", current, returned)
    velocity = random_adapter(7, rank=2)
    carried = merged_by("svd", current, returned, momentum=0.9, velocity=velocity)
    assert carried.report.factor_bias == pytest.approx(plain.report.factor_bias, rel=1e-6)
