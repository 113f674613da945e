"""What may leave: exactly the expected tensors, and allow-listed numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.numpy import save

from client.egress import adapter_norm, check_adapter, check_numbers
from common.adapter import AdapterShape
from common.errors import EgressError
from tests.unit.adapters import random_adapter

SHAPE = AdapterShape({"layer": (3, 4)}, rank=2, scaling=1.0)
A, B = "base_model.model.layer.lora_A.weight", "base_model.model.layer.lora_B.weight"


def _tensors() -> dict[str, np.ndarray]:
    return {A: np.ones((2, 4), np.float32), B: np.zeros((3, 2), np.float32)}


def test_the_expected_adapter_may_leave() -> None:
    assert check_adapter(save(_tensors()), shape=SHAPE, max_norm=10.0).state.rank == 2


@pytest.mark.parametrize(
    "change",
    [
        {"records": np.ones(3, np.float32)},
        {A: np.ones((2, 5), np.float32)},
        {A: np.ones((2, 4), np.float64)},
        {A: np.ones((4, 2), np.float32)},
        {B: np.full((3, 2), np.nan, np.float32)},
        {B: np.full((3, 2), np.inf, np.float32)},
    ],
)
def test_any_other_tensor_may_not(change: dict[str, np.ndarray]) -> None:
    with pytest.raises(EgressError, match="outgoing adapter"):
        check_adapter(save({**_tensors(), **change}), shape=SHAPE, max_norm=math.inf)


def test_a_missing_tensor_and_garbage_may_not() -> None:
    with pytest.raises(EgressError, match="1 tensors missing"):
        check_adapter(save({A: _tensors()[A]}), shape=SHAPE, max_norm=10.0)
    with pytest.raises(EgressError, match="not a safetensors file"):
        check_adapter(b"Mr Miller, born 1950", shape=SHAPE, max_norm=10.0)


def test_text_hidden_in_the_files_metadata_may_not_leave() -> None:
    data = save(_tensors(), metadata={"note": "Mr Miller"})

    with pytest.raises(EgressError, match="more than its tensors") as caught:
        check_adapter(data, shape=SHAPE, max_norm=10.0)
    assert "Miller" not in str(caught.value)


def test_the_norm_is_of_all_tensors_together() -> None:
    """Eight ones in A and six twos in B: 8 + 24 = 32."""
    tensors = {**_tensors(), B: np.full((3, 2), 2.0, np.float32)}
    norm = math.sqrt(32)

    assert adapter_norm(check_adapter(save(tensors), shape=SHAPE, max_norm=norm + 1e-9).state) == (
        pytest.approx(norm)
    )
    with pytest.raises(EgressError, match=r"policy.max-adapter-norm = 5: .* has norm 5\.66"):
        check_adapter(save(tensors), shape=SHAPE, max_norm=5.0)


def test_the_norm_of_the_largest_floats_does_not_overflow() -> None:
    """Squares of 3e38 are no float32s: the norm is 3e38 x sqrt 8, and the cap holds."""
    tensors = {**_tensors(), A: np.full((2, 4), 3e38, np.float32)}

    with pytest.raises(EgressError, match=r"has norm 8\.49e\+38"):
        check_adapter(save(tensors), shape=SHAPE, max_norm=1e30)


@given(seed=st.integers(0, 1000), size=st.floats(1e-3, 1e3))
def test_the_norm_is_that_of_one_long_vector(seed: int, size: float) -> None:
    state = random_adapter(seed, rank=3, size=size)
    vector = np.concatenate([array.ravel() for array in state.tensors().values()])

    assert adapter_norm(state) == pytest.approx(np.linalg.norm(vector.astype(np.float64)))


def test_a_tensor_that_nobody_trains_leaves_as_it_came_to_the_bit() -> None:
    came = _tensors()
    untrained = {A: came[A]}

    trained = save({**came, B: np.full((3, 2), 7.0, np.float32)})
    assert check_adapter(trained, shape=SHAPE, max_norm=99.0, untrained=untrained).data == trained
    for change in (np.float32(1 + 2**-23), -np.float32(1)):
        leak = came[A].copy()
        leak[1, 3] = change
        with pytest.raises(EgressError, match=rf"outgoing {A} is not as it came"):
            check_adapter(save({**came, A: leak}), shape=SHAPE, max_norm=99.0, untrained=untrained)


def test_the_sign_of_a_zero_is_a_bit_too() -> None:
    came = _tensors()
    hidden = came[B].copy()
    hidden[2, 1] = -0.0

    with pytest.raises(EgressError, match=rf"outgoing {B} is not as it came"):
        check_adapter(save({**came, B: hidden}), shape=SHAPE, max_norm=99.0, untrained={B: came[B]})


def test_public_numbers_may_leave_and_others_only_when_listed() -> None:
    assert check_numbers({"steps": 3, "declared-size": 100}, released=(), digits=1) == {
        "steps": 3,
        "declared-size": 100,
    }
    assert check_numbers({"train-loss": 1.5}, released=("train-loss",), digits=3) == {
        "train-loss": 1.5
    }
    with pytest.raises(EgressError, match="'train-loss' is not on this site's list"):
        check_numbers({"train-loss": 1.5}, released=("train-seconds",), digits=3)
    with pytest.raises(EgressError, match="'num-records' is not on"):
        check_numbers({"num-records": 412}, released=("train-loss", "num-records"), digits=3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, "12"])
def test_a_number_is_a_finite_number(value: object) -> None:
    with pytest.raises(EgressError, match="'steps' is"):
        check_numbers({"steps": value}, released=(), digits=3)  # type: ignore[dict-item]


def test_released_numbers_are_rounded_and_public_ones_exact() -> None:
    numbers = {
        "steps": 12345,
        "declared-size": 98765,
        "train-loss": 1.23456,
        "train-seconds": 98765,
    }

    assert check_numbers(numbers, released=("train-loss", "train-seconds"), digits=3) == {
        "steps": 12345,
        "declared-size": 98765,
        "train-loss": 1.23,
        "train-seconds": 98800.0,
    }


def test_a_number_that_rounds_up_to_infinity_may_not_leave() -> None:
    with pytest.raises(EgressError, match="'train-loss' is not finite"):
        check_numbers({"train-loss": 1.797e308}, released=("train-loss",), digits=2)


@example(value=11026412.417954745, digits=16)
@given(
    value=st.floats(-1e300, 1e300).filter(lambda value: value == 0 or abs(value) > 1e-300),
    digits=st.integers(1, 17),
)
def test_rounding_is_within_half_a_digit_and_once_is_enough(value: float, digits: int) -> None:
    """The last of n digits of a number is at most 10^(1-n) of it; a float adds its own rounding."""
    once = check_numbers({"train-loss": value}, released=("train-loss",), digits=digits)
    twice = check_numbers(once, released=("train-loss",), digits=digits)

    assert twice == once
    half = 0.5000001 * 10.0 ** (1 - digits) * abs(value) + math.ulp(value)
    assert abs(once["train-loss"] - value) <= half
