"""What may leave: exactly the expected tensors, and allow-listed numbers."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save

from client.egress import check_adapter, check_numbers
from common.adapter import AdapterShape
from common.errors import EgressError

SHAPE = AdapterShape({"layer": (3, 4)}, rank=2, scaling=1.0)
A, B = "base_model.model.layer.lora_A.weight", "base_model.model.layer.lora_B.weight"


def _tensors() -> dict[str, np.ndarray]:
    return {A: np.ones((2, 4), np.float32), B: np.zeros((3, 2), np.float32)}


def test_the_expected_adapter_may_leave() -> None:
    assert check_adapter(save(_tensors()), shape=SHAPE).rank == 2


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
        check_adapter(save({**_tensors(), **change}), shape=SHAPE)


def test_a_missing_tensor_and_garbage_may_not() -> None:
    with pytest.raises(EgressError, match="1 tensors missing"):
        check_adapter(save({A: _tensors()[A]}), shape=SHAPE)
    with pytest.raises(EgressError, match="not a safetensors file"):
        check_adapter(b"Mr Miller, born 1950", shape=SHAPE)


def test_text_hidden_in_the_files_metadata_may_not_leave() -> None:
    data = save(_tensors(), metadata={"note": "Mr Miller"})

    with pytest.raises(EgressError, match="more than its tensors") as caught:
        check_adapter(data, shape=SHAPE)
    assert "Miller" not in str(caught.value)


def test_public_numbers_may_leave_and_others_only_when_listed() -> None:
    assert check_numbers({"steps": 3, "declared-size": 100}, released=()) == {
        "steps": 3,
        "declared-size": 100,
    }
    assert check_numbers({"train-loss": 1.5}, released=("train-loss",)) == {"train-loss": 1.5}
    with pytest.raises(EgressError, match="'train-loss' is not on this site's list"):
        check_numbers({"train-loss": 1.5}, released=("train-seconds",))
    with pytest.raises(EgressError, match="'num-records' is not on"):
        check_numbers({"num-records": 412}, released=("train-loss", "num-records"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, "12"])
def test_a_number_is_a_finite_number(value: object) -> None:
    with pytest.raises(EgressError, match="'steps' is"):
        check_numbers({"steps": value}, released=())  # type: ignore[dict-item]
