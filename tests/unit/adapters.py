"""Small adapters: random ones to state laws with, and their products to compare."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from common.adapter import AdapterShape, AdapterState, FactorSource, LoraPair

# Two layers of different sides, each at least 5, so that every rank up to 5 fits.
SIDES = {"model.q_proj": (6, 5), "model.v_proj": (5, 8)}

Products = dict[str, npt.NDArray[np.float64]]


def adapter_shape(rank: int, *, scaling: float = 2.0) -> AdapterShape:
    """Return the shape that `random_adapter` fills."""
    return AdapterShape(SIDES, rank, scaling)


def random_adapter(
    seed: int, *, rank: int, scaling: float = 2.0, size: float = 1.0
) -> AdapterState:
    """Return normally distributed factors, the same for the same seed."""
    random = np.random.default_rng(seed)
    return AdapterState(
        {
            name: LoraPair(
                (size * random.standard_normal((rank, d_in))).astype(np.float32),
                (size * random.standard_normal((d_out, rank))).astype(np.float32),
            )
            for name, (d_out, d_in) in SIDES.items()
        },
        scaling,
    )


def moved(start: AdapterState, *, by: float) -> AdapterState:
    """Return an adapter of which every weight of B is larger by so much."""
    pairs = {name: LoraPair(pair.A, pair.B + np.float32(by)) for name, pair in start.pairs.items()}
    return AdapterState(pairs, start.scaling)


def in_memory(source: FactorSource) -> AdapterState:
    """Return an adapter, wherever it lies, as a state; every module's scaling is its own."""
    own = {module: source.scaling_of(module) for module in source.modules}
    pairs = {module: source.pair(module) for module in source.modules}
    return AdapterState(pairs, next(iter(own.values())), own)


def products(state: AdapterState) -> Products:
    """Return scaling * B @ A of every module, in float64."""
    return {
        name: state.scaling * pair.B.astype(np.float64) @ pair.A.astype(np.float64)
        for name, pair in state.pairs.items()
    }


def assert_same_products(
    state: AdapterState, expected: AdapterState | Products, *, tolerance: float = 1e-5
) -> None:
    """Compare updates, not factors: two splits of one product are the same adapter."""
    wanted = products(expected) if isinstance(expected, AdapterState) else expected
    found = products(state)
    assert found.keys() == wanted.keys()
    for name, matrix in wanted.items():
        size = max(1.0, float(np.abs(matrix).max()))
        np.testing.assert_allclose(found[name], matrix, rtol=0, atol=tolerance * size)
