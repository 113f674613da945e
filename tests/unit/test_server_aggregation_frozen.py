"""`ffa` and `fedsvd`: with one A for all, the mean of B is exact."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.adapter import AdapterState, LoraPair
from common.errors import ShapeError
from server.aggregation.frozen import orthonormal_start
from tests.unit.adapters import assert_same_products, random_adapter
from tests.unit.merging import dense_target, merged_by, trained

SEEDS = st.integers(0, 2**32 - 1)


def _identity_gram(state: AdapterState) -> None:
    for name, pair in state.pairs.items():
        np.testing.assert_allclose(pair.A @ pair.A.T, np.eye(state.rank), atol=1e-5, err_msg=name)


def test_ffa_keeps_a_to_the_bit_and_averages_b() -> None:
    current = random_adapter(0, rank=2)
    returned = [trained("ffa", seed, current) for seed in (1, 2)]
    merged = merged_by("ffa", current, returned, [1.0, 3.0]).state
    for name, pair in merged.pairs.items():
        np.testing.assert_array_equal(pair.A, current.pairs[name].A)
        b = 0.25 * returned[0].pairs[name].B + 0.75 * returned[1].pairs[name].B
        np.testing.assert_allclose(pair.B, b, atol=1e-6)


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, rounds=st.integers(1, 4))
def test_fedsvd_has_orthonormal_rows_and_stays_in_the_span_of_the_first_a(
    seed: int, rounds: int
) -> None:
    current = first = random_adapter(seed, rank=3)
    for i in range(rounds):
        returned = [trained("fedsvd", seed + 10 * i + k, current) for k in (1, 2)]
        merged = merged_by("fedsvd", current, returned).state
        assert_same_products(merged, dense_target(current, returned, [0.5, 0.5]), tolerance=1e-4)
        current = merged
    _identity_gram(current)
    for name, pair in current.pairs.items():
        basis = np.linalg.qr(first.pairs[name].A.astype(np.float64).T)[0]
        np.testing.assert_allclose(pair.A - (pair.A @ basis) @ basis.T, 0.0, atol=1e-4)


def test_fedsvd_sorts_the_singular_values_into_b() -> None:
    current = random_adapter(0, rank=3)
    merged = merged_by("fedsvd", current, [trained("fedsvd", 1, current)]).state
    for pair in merged.pairs.values():
        gram = pair.B.T.astype(np.float64) @ pair.B
        np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-3)
        assert np.all(np.diff(np.diag(gram)) <= 0)


def test_fedsvd_completes_a_from_its_own_span_where_components_are_dead() -> None:
    current = random_adapter(0, rank=3)
    returned = trained("fedsvd", 1, current)
    pairs = {
        n: LoraPair(p.A, p.B * np.array([1, 0, 0], np.float32)) for n, p in returned.pairs.items()
    }
    merged = merged_by("fedsvd", current, [AdapterState(pairs, current.scaling)])
    assert merged.report.live_ranks == (1, 1, 1)
    _identity_gram(merged.state)
    for name, pair in merged.state.pairs.items():
        assert np.all(pair.B[:, 1:] == 0.0)
        basis = np.linalg.qr(current.pairs[name].A.astype(np.float64).T)[0]
        np.testing.assert_allclose(pair.A - (pair.A @ basis) @ basis.T, 0.0, atol=1e-5)


def test_fedsvd_starts_from_orthonormal_rows() -> None:
    fresh = random_adapter(0, rank=3)
    nothing = AdapterState({n: LoraPair(p.A, 0 * p.B) for n, p in fresh.pairs.items()}, 2.0)
    _identity_gram(orthonormal_start(nothing))
    with pytest.raises(ShapeError, match="B is not 0"):
        orthonormal_start(fresh)
