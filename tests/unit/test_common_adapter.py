"""Adapters: shapes, digest, and what safetensors bytes are refused for."""

from __future__ import annotations

import hashlib
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save

from common.adapter import (
    AdapterShape,
    AdapterState,
    LoraPair,
    adapter_shape_of,
    digest_tensors,
    from_safetensors,
    lora_scaling,
    state_from_tensors,
)
from common.config import LoraSection
from common.errors import ProtocolError, ShapeError

SHAPE = AdapterShape({"q": (3, 4), "v": (2, 4)}, rank=2, scaling=2.0)
A_Q, B_Q = "base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"


def _pair(d_out: int, d_in: int, *, rank: int = 2, first: float = 0.0) -> LoraPair:
    values = np.arange(rank * (d_in + d_out), dtype=np.float32) + np.float32(first)
    return LoraPair(
        values[: rank * d_in].reshape(rank, d_in), values[rank * d_in :].reshape(d_out, rank)
    )


STATE = AdapterState({"q": _pair(3, 4), "v": _pair(2, 4, first=0.5)}, scaling=2.0)


def test_scaling_is_alpha_over_rank_or_its_root() -> None:
    assert lora_scaling(alpha=16, rank=4, use_rslora=False) == 4
    assert lora_scaling(alpha=16, rank=4, use_rslora=True) == 8


def test_shape_and_state_agree_on_rank_and_size() -> None:
    assert STATE.rank == SHAPE.rank == 2
    # q: 2 x (3 + 4) values, v: 2 x (2 + 4) values, 4 bytes each.
    assert STATE.size_bytes == SHAPE.size_bytes == 4 * (14 + 12)
    assert SHAPE.at_rank(1, lora=LoraSection(alpha=5)) == AdapterShape(SHAPE.modules, 1, 5.0)


def test_tensor_names_are_pefts() -> None:
    assert list(STATE.tensors()) == [
        "base_model.model.q.lora_A.weight",
        "base_model.model.q.lora_B.weight",
        "base_model.model.v.lora_A.weight",
        "base_model.model.v.lora_B.weight",
    ]


def test_factors_that_do_not_multiply_are_refused() -> None:
    bad = LoraPair(np.zeros((2, 4), np.float32), np.zeros((3, 1), np.float32))

    with pytest.raises(ShapeError, match=r"q: A \(2, 4\) and B \(3, 1\) do not multiply"):
        AdapterState({"q": bad}, 1.0)


def test_mixed_ranks_and_no_modules_are_refused() -> None:
    with pytest.raises(ShapeError, match="different ranks"):
        AdapterState({"q": _pair(3, 4), "v": _pair(2, 4, rank=1)}, 1.0)
    with pytest.raises(ShapeError, match="at least one module"):
        AdapterState({}, 1.0)


def test_digest_is_that_of_its_definition() -> None:
    pair = LoraPair(np.array([[1.0]], np.float32), np.array([[-2.0]], np.float32))
    expected = hashlib.sha256(
        json.dumps([A_Q, [1, 1]]).encode() + b"\x00" + bytes.fromhex("0000803f")
        + json.dumps([B_Q, [1, 1]]).encode() + b"\x00" + bytes.fromhex("000000c0")
    )  # fmt: skip

    assert AdapterState({"q": pair}, 1.0).digest() == expected.hexdigest()


def test_digest_does_not_depend_on_insertion_order() -> None:
    assert AdapterState(dict(reversed(STATE.pairs.items())), 2.0).digest() == STATE.digest()
    assert digest_tensors(dict(reversed(STATE.tensors().items()))) == STATE.digest()


def test_digest_does_not_depend_on_memory_layout_or_byte_order() -> None:
    q, v = STATE.pairs["q"], STATE.pairs["v"]
    wide = np.zeros((4, 8), np.float32)
    wide[::2, ::2] = q.A
    for A in (np.asfortranarray(q.A), wide[::2, ::2], q.A.astype(">f4")):
        assert A.tolist() == q.A.tolist()
        assert AdapterState({"q": LoraPair(A, q.B), "v": v}, 2.0).digest() == STATE.digest()


def test_digest_depends_on_every_name_shape_and_value() -> None:
    tensors = STATE.tensors()
    seen = {STATE.digest()}
    for name, array in tensors.items():
        renamed = {f"{n}x" if n == name else n: a for n, a in tensors.items()}
        reshaped = {**tensors, name: array.T}
        seen |= {digest_tensors(renamed), digest_tensors(reshaped)}
        for index in np.ndindex(array.shape):
            changed = array.copy()
            changed[index] = np.nextafter(changed[index], np.float32(np.inf))
            seen.add(digest_tensors({**tensors, name: changed}))

    assert len(seen) == 1 + 2 * 4 + 26


def test_digest_is_independent_of_the_scaling() -> None:
    assert replace(STATE, scaling=1.0).digest() == STATE.digest()


@given(
    hnp.arrays(np.float32, (2, 4), elements=st.floats(width=32)),
    hnp.arrays(np.float32, (3, 2), elements=st.floats(width=32)),
)
def test_safetensors_keep_every_bit(A: np.ndarray, B: np.ndarray) -> None:
    state = AdapterState({"q": LoraPair(A, B), "v": _pair(2, 4)}, 2.0)

    found = from_safetensors(state.to_safetensors(), shape=SHAPE)

    assert found.digest() == state.digest()
    assert found.scaling == 2.0
    assert found.is_finite() == bool(np.isfinite(A).all() and np.isfinite(B).all())


def test_transposed_view_is_saved_by_value() -> None:
    A = np.arange(8, dtype=np.float32).reshape(4, 2).T
    state = AdapterState({"q": LoraPair(A, _pair(3, 4).B), "v": _pair(2, 4)}, 2.0)

    assert from_safetensors(state.to_safetensors(), shape=SHAPE).pairs["q"].A.tolist() == A.tolist()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_is_found(value: float) -> None:
    pair = _pair(3, 4)
    pair.B[2, 1] = value

    assert STATE.is_finite()
    assert not AdapterState({"q": pair}, 1.0).is_finite()


def test_missing_and_unknown_tensors_are_counted_and_the_first_is_named() -> None:
    tensors = STATE.tensors()
    del tensors[B_Q]
    with pytest.raises(ShapeError, match=f"1 tensors missing, 0 not expected; first missing {B_Q}"):
        from_safetensors(save(tensors), shape=SHAPE)
    extra = {**STATE.tensors(), "base_model.model.k.lora_A.weight": np.zeros((2, 4), np.float32)}
    with pytest.raises(ShapeError, match="0 tensors missing, 1 not expected$"):
        from_safetensors(save(extra), shape=SHAPE)


@pytest.mark.parametrize("dimensions", [(4, 2), (2, 3), (8,), (1, 2, 4), (1, 4)])
def test_tensor_of_another_shape_is_refused(dimensions: tuple[int, ...]) -> None:
    tensors = {**STATE.tensors(), A_Q: np.zeros(dimensions, np.float32)}

    with pytest.raises(ShapeError, match=rf"{A_Q} is \(.*expected \(2, 4\)"):
        from_safetensors(save(tensors), shape=SHAPE)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int32, np.uint8, np.bool_])
def test_tensor_of_another_type_is_refused(dtype: type) -> None:
    tensors = {**STATE.tensors(), A_Q: np.zeros((2, 4), dtype)}

    with pytest.raises(ShapeError, match=f"{A_Q} is {np.dtype(dtype).name}, expected float32"):
        from_safetensors(save(tensors), shape=SHAPE)


def _bfloat16_file() -> bytes:
    """A hand-made file: numpy has no bfloat16."""
    header = json.dumps({A_Q: {"dtype": "BF16", "shape": [2, 4], "data_offsets": [0, 16]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(16)


WIRE = STATE.to_safetensors()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 7,
        b"garbage that is long enough to have a header",
        pickle.dumps(STATE.tensors()[A_Q]),
        WIRE[:-1],
        WIRE + b"\x00",
        b"\xff" * 8 + WIRE[8:],
    ],
    ids=["empty", "short", "garbage", "pickle", "cut", "longer", "header length"],
)
def test_bytes_that_are_no_safetensors_file_are_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError, match=f"{len(data)} bytes are not a safetensors file"):
        from_safetensors(data, shape=SHAPE)


def test_bfloat16_is_refused() -> None:
    with pytest.raises((ProtocolError, ShapeError), match="not a safetensors|missing|expected"):
        from_safetensors(_bfloat16_file(), shape=SHAPE)


def test_more_bytes_than_the_adapter_needs_are_refused_before_they_are_parsed() -> None:
    # 104 bytes of values, and 1 KiB a module and eight more for the header.
    limit = 104 + 1024 * 10
    with pytest.raises(ProtocolError, match=f"{limit + 1} bytes, where at most {limit}"):
        from_safetensors(b"\x00" * (limit + 1), shape=SHAPE)
    with pytest.raises(ProtocolError, match="not a safetensors"):
        from_safetensors(b"\x00" * limit, shape=SHAPE)


@given(st.binary(max_size=200) | st.binary(max_size=60).map(lambda tail: WIRE[:80] + tail))
def test_no_bytes_raise_anything_but_our_own_errors(data: bytes) -> None:
    with pytest.raises((ProtocolError, ShapeError), match=r".+"):
        from_safetensors(data, shape=SHAPE)


def test_named_tensors_become_the_state_that_they_came_from() -> None:
    found = state_from_tensors(STATE.tensors(), shape=SHAPE)

    assert found.digest() == STATE.digest()
    assert list(found.pairs) == ["q", "v"]


def test_modules_that_a_pattern_names_have_a_scaling_of_their_own() -> None:
    modules = {"layers.0.q_proj": (4, 4), "layers.1.q_proj": (4, 4), "layers.1.xq_proj": (4, 4)}
    lora = LoraSection(alpha=8, alpha_pattern="1.q_proj=2, q_proj = 32", use_rslora=True)
    shape = adapter_shape_of(modules, rank=4, lora=lora)
    assert shape.scaling == 4.0
    assert shape.own_scalings == {"layers.0.q_proj": 16.0, "layers.1.q_proj": 1.0}
    tensors = {n: np.zeros(s, np.float32) for n, s in shape.tensor_shapes().items()}
    state = state_from_tensors(tensors, shape=shape)
    found = [state.scaling_of(name) for name in modules]
    assert found == [16.0, 1.0, 4.0]


def test_an_unscaled_adapter_is_the_same_update() -> None:
    """2 x and 0.25 x B @ A, for B of powers of two to the bit."""
    state = AdapterState(STATE.pairs, 2.0, {"v": 0.25})

    found = state.unscaled()

    assert (found.scaling, dict(found.own_scalings)) == (1.0, {})
    for name, factor in (("q", 2.0), ("v", 0.25)):
        np.testing.assert_array_equal(found.pairs[name].A, STATE.pairs[name].A)
        np.testing.assert_array_equal(found.pairs[name].B, factor * STATE.pairs[name].B)
        assert found.pairs[name].B.dtype == np.float32
