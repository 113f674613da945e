"""What is sent along and not trained: the last ranks of an adapter, or one of its factors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.adapter import AdapterState, from_safetensors
from common.config import TrainedFactors
from common.errors import ShapeError
from common.frozen_part import split_adapter, untrained_tensors
from tests.unit.adapters import adapter_shape, products, random_adapter


@given(seed=st.integers(0, 99), rank=st.integers(1, 5), frozen=st.integers(1, 9))
def test_both_parts_together_are_the_whole_update(seed: int, rank: int, frozen: int) -> None:
    state = random_adapter(seed, rank=rank + frozen, scaling=0.5)

    leading, last = split_adapter(state, rank=rank)

    assert last is not None
    assert (leading.rank, last.rank) == (rank, frozen)
    first, second = products(leading), products(last)
    for name, whole in products(state).items():
        np.testing.assert_allclose(first[name] + second[name], whole, atol=1e-6)


def test_the_leading_ranks_are_those_that_are_trained() -> None:
    state = random_adapter(0, rank=3)
    pair = state.pairs["model.q_proj"]

    leading, last = split_adapter(state, rank=2)

    assert last is not None
    np.testing.assert_array_equal(leading.pairs["model.q_proj"].A, pair.A[:2])
    np.testing.assert_array_equal(leading.pairs["model.q_proj"].B, pair.B[:, :2])
    np.testing.assert_array_equal(last.pairs["model.q_proj"].A, pair.A[2:])


def test_own_scalings_go_with_both_parts() -> None:
    plain = random_adapter(0, rank=3)
    state = AdapterState(plain.pairs, 2.0, {"model.v_proj": 7.0})

    for part in split_adapter(state, rank=1):
        assert part is not None
        assert (part.scaling_of("model.q_proj"), part.scaling_of("model.v_proj")) == (2.0, 7.0)


def test_an_adapter_of_the_trained_rank_has_nothing_frozen() -> None:
    state = random_adapter(0, rank=3)
    assert split_adapter(state, rank=3) == (state, None)


@pytest.mark.parametrize("rank", [0, 4])
def test_more_ranks_than_there_are_cannot_be_trained(rank: int) -> None:
    with pytest.raises(ShapeError, match=rf"the first {rank} ranks of an adapter of rank 3"):
        split_adapter(random_adapter(0, rank=3), rank=rank)


@pytest.mark.parametrize(("trained", "kept"), [("both", ""), ("a", "B"), ("b", "A")])
def test_the_factor_that_is_not_trained_comes_back_without_the_frozen_ranks(
    trained: TrainedFactors, kept: str
) -> None:
    state = random_adapter(0, rank=5)

    found = untrained_tensors(state, rank=2, trained_factors=trained)

    pairs = split_adapter(state, rank=2)[0].pairs
    wanted = {
        f"base_model.model.{name}.lora_{kept}.weight": getattr(pair, kept)
        for name, pair in pairs.items()
        if kept
    }
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array)


def test_what_is_sent_with_a_frozen_part_has_its_rank_and_the_trained_parts_scaling() -> None:
    shape, state = adapter_shape(2).with_frozen(3), random_adapter(0, rank=5)

    assert (shape.rank, shape.scaling) == (5, adapter_shape(2).scaling)
    assert from_safetensors(state.to_safetensors(), shape=shape).digest() == state.digest()
