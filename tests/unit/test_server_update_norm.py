"""The size of an update, compared with the products that it is never formed from."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.adapter import AdapterState, LoraPair
from common.errors import ShapeError
from server.update_norm import parts_norm, product_norm, update_norm
from tests.unit.adapters import random_adapter


def _dense(returned: AdapterState, *, sent: AdapterState) -> float:
    squares = 0.0
    for name, pair in returned.pairs.items():
        before = sent.pairs[name]
        product = returned.scaling_of(name) * pair.B.astype(np.float64) @ pair.A.astype(np.float64)
        product -= sent.scaling_of(name) * before.B.astype(np.float64) @ before.A.astype(np.float64)
        squares += float(np.sum(product**2))
    return math.sqrt(squares)


def _moved(state: AdapterState, *, by: float, seed: int) -> AdapterState:
    """Every factor moved a little, relative to its size."""
    step = random_adapter(seed, rank=state.rank)
    pairs = {
        name: LoraPair(
            (pair.A + by * step.pairs[name].A).astype(np.float32),
            (pair.B + by * step.pairs[name].B).astype(np.float32),
        )
        for name, pair in state.pairs.items()
    }
    return replace(state, pairs=pairs)


def _rotated(state: AdapterState, *, seed: int) -> AdapterState:
    """(B R, R^-1 A): the same products from other factors, to the rounding of float32."""
    random = np.random.default_rng(seed)
    pairs = {}
    for name, pair in state.pairs.items():
        rotation, _ = np.linalg.qr(random.standard_normal((state.rank, state.rank)))
        a, b = rotation.T @ pair.A.astype(np.float64), pair.B.astype(np.float64) @ rotation
        pairs[name] = LoraPair(a.astype(np.float32), b.astype(np.float32))
    return replace(state, pairs=pairs)


def test_one_small_module_by_hand() -> None:
    """2 x [[3], [4]] [[1, 0]] is sent, 2 x [[3], [4]] [[0, 1]] comes back: four entries, 6, 6, 8, 8."""
    b = np.array([[3.0], [4.0]], np.float32)
    sent = AdapterState({"q": LoraPair(np.array([[1.0, 0.0]], np.float32), b)}, 2.0)
    returned = AdapterState({"q": LoraPair(np.array([[0.0, 1.0]], np.float32), b)}, 2.0)
    assert update_norm(returned, sent=sent) == pytest.approx(math.sqrt(6**2 + 6**2 + 8**2 + 8**2))


def test_what_comes_back_as_it_was_sent_is_no_update() -> None:
    state = random_adapter(0, rank=4)
    assert update_norm(state, sent=state) == 0.0


@given(
    seed=st.integers(0, 2**16),
    rank=st.integers(1, 5),
    by=st.sampled_from([1.0, 1e-2, 1e-4, 1e-6]),
    size=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_it_is_the_norm_of_the_dense_difference(
    seed: int, rank: int, by: float, size: float
) -> None:
    sent = random_adapter(seed, rank=rank, size=size)
    returned = _moved(sent, by=by * size, seed=seed + 1)
    assert update_norm(returned, sent=sent) == pytest.approx(_dense(returned, sent=sent), rel=1e-6)


@given(seed=st.integers(0, 2**16), by=st.sampled_from([1.0, 1e-2, 1e-4]))
def test_a_rotated_copy_is_the_same_update(seed: int, by: float) -> None:
    """Of a 10000th of the product too, where two large products nearly cancel."""
    sent = random_adapter(seed, rank=4)
    returned = _moved(sent, by=by, seed=seed + 1)
    rotated = _rotated(returned, seed=seed)
    norm, product = update_norm(returned, sent=sent), _dense(returned, sent=_nothing(sent))
    assert norm > 0
    found = update_norm(rotated, sent=sent)
    assert found == pytest.approx(_dense(rotated, sent=sent), rel=1e-5)
    # Rotating rounds to float32: so much of the whole product and no more.
    assert found == pytest.approx(norm, rel=1e-6, abs=1e-6 * product)
    assert update_norm(_rotated(sent, seed=seed), sent=sent) <= 1e-6 * product


@given(
    seed=st.integers(0, 2**16),
    decades=st.integers(0, 12),
    tilt=st.integers(-60, 60),
)
def test_parts_that_cancel_hide_no_large_update(seed: int, decades: int, tilt: int) -> None:
    """Two ranks are each other's opposite, and 10**decades times what the others did.

    tilt: the binary exponent that A has more and B less, which changes no product.
    """
    sent = random_adapter(seed, rank=4)
    returned = _moved(sent, by=0.1, seed=seed + 1)
    pairs = {}
    for name, pair in returned.pairs.items():
        a, b = np.ldexp(pair.A, tilt), np.ldexp(pair.B, -tilt)
        b[:, 0] *= np.float32(10.0**decades)
        a[1], b[:, 1] = a[0], -b[:, 0]
        pairs[name] = LoraPair(a, b)
    hidden = replace(returned, pairs=pairs)
    # Without the two ranks, whose sum is exactly nothing.
    rest = {
        name: LoraPair(np.where([[0], [0], [1], [1]], pair.A, 0).astype(np.float32), pair.B)
        for name, pair in hidden.pairs.items()
    }
    true = _dense(replace(returned, pairs=rest), sent=sent)
    found = update_norm(hidden, sent=sent)
    assert found >= (1 - 1e-5) * true
    if decades <= 6 and tilt == 0:
        assert found == pytest.approx(true, rel=1e-4)


def _nothing(state: AdapterState) -> AdapterState:
    pairs = {name: LoraPair(p.A, np.zeros_like(p.B)) for name, p in state.pairs.items()}
    return replace(state, pairs=pairs)


def test_each_modules_own_scaling_counts() -> None:
    sent = random_adapter(0, rank=2)
    own = {"model.q_proj": 5.0}
    sent, returned = (replace(s, own_scalings=own) for s in (sent, random_adapter(1, rank=2)))
    assert update_norm(returned, sent=sent) == pytest.approx(_dense(returned, sent=sent))
    assert update_norm(returned, sent=sent) != pytest.approx(
        update_norm(replace(returned, own_scalings={}), sent=sent)
    )


def test_ranks_that_were_sent_along_frozen_count_for_nothing() -> None:
    wide = random_adapter(0, rank=5)
    pairs = {n: LoraPair(p.A[:2].copy(), p.B[:, :2].copy()) for n, p in wide.pairs.items()}
    assert update_norm(AdapterState(pairs, wide.scaling), sent=wide) == 0.0


def test_what_is_no_update_of_what_was_sent_is_refused() -> None:
    one = AdapterState({"model.q_proj": random_adapter(0, rank=2).pairs["model.q_proj"]}, 2.0)
    with pytest.raises(ShapeError, match="rank 2 on 1 modules is no update of one of rank 2 on 2"):
        update_norm(one, sent=random_adapter(0, rank=2))
    with pytest.raises(ShapeError, match="rank 3 on 2 modules is no update of one of rank 2"):
        update_norm(random_adapter(0, rank=3), sent=random_adapter(0, rank=2))


def test_parts_are_summed_as_if_nothing_cancelled() -> None:
    # Rows (3, 4) and (3, 4), columns (1, 0) and (-1, 0): 2 * (1 * 5 + 1 * 5) = 20, and the product is 0.
    pair = LoraPair(np.array([[3, 4], [3, 4]], np.float32), np.array([[1, -1], [0, 0]], np.float32))
    state = AdapterState({"layer": pair}, 2.0)
    assert parts_norm(state) == pytest.approx(20.0)
    assert product_norm(state) == pytest.approx(0.0, abs=1e-9)
    alone = AdapterState({"layer": LoraPair(pair.A[:1], pair.B[:, :1])}, 2.0)
    assert parts_norm(alone) == product_norm(alone) == pytest.approx(10.0)
