"""What goes into a merge and what comes out, and how a site's share of the adapter is cut."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from common.adapter import AdapterState, FactorSource, LoraPair
from common.errors import ShapeError


@dataclass(frozen=True, slots=True)
class SiteUpdate:
    """One site's part in a merge.

    weight: its share, relative; `normalised_weights` makes them sum to 1.
    returned: what it sent back. What it was sent are the leading `returned.rank` ranks of the global adapter.
    """

    site: str
    weight: float
    returned: FactorSource


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """What a merge did to one module, as squared Frobenius norms.

    total_energy: of the target M. discarded_energy: of what truncation left out of it.
    mean_energy: of the exact mean of the products, which is M but for momentum. bias_energy: of the distance
    from the mean of the factors to that, whatever the method.
    live_rank: of the merged module; how many of its singular values are more than numerical dust.
    """

    total_energy: float
    discarded_energy: float
    mean_energy: float
    bias_energy: float
    live_rank: int


@dataclass(frozen=True, slots=True)
class MergedModule:
    """One module of the next global adapter. velocity: of the server's momentum, None without it."""

    name: str
    pair: LoraPair
    report: ModuleReport
    velocity: LoraPair | None = None


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merge did, in numbers.

    factor_bias: Frobenius distance from the mean of the factors to the exact mean of the products, relative
    to the latter, all modules together. discarded_energy: share of squared singular values that truncation
    left out, of all modules and of the worst one. live_ranks: lowest, median and highest of the modules.
    shares: site -> what its update was multiplied by; they sum to 1 unless updates were clipped.
    """

    method: str
    factor_bias: float
    discarded_energy: float
    worst_module: str
    worst_discarded_energy: float
    live_ranks: tuple[int, int, int]
    shares: Mapping[str, float]
    seconds: float


@dataclass(frozen=True, slots=True)
class Merged:
    """The next global adapter. velocity: the server's momentum, in factors, None without it."""

    state: AdapterState
    report: MergeReport
    velocity: AdapterState | None = None


@dataclass(frozen=True, slots=True)
class MergeRules:
    """How to merge; the fields are those of AggregationSection in common/config.py.

    clip_norm: for robust = "norm-clip"; 0 takes the median of the updates' norms. rank: lora.rank, which an
    adapter that grows never falls below; 0 takes the highest that a site returned.
    """

    method: str = "svd"
    robust: str = "none"
    clip_norm: float = 0.0
    momentum: float = 0.0
    rank: int = 0


@dataclass(frozen=True, slots=True)
class Cut:
    """One module of the target as a method cut it.

    pair: float32. total_energy, discarded_energy: as in ModuleReport. live_rank: of the pair.
    """

    pair: LoraPair
    total_energy: float
    discarded_energy: float
    live_rank: int


def normalised_weights(updates: Sequence[SiteUpdate]) -> list[float]:
    """Return the weights divided by their sum.

    Raises ShapeError when there is nothing to weigh, or a weight is negative or not finite.
    """
    total = sum(update.weight for update in updates)
    bad = [one for one in updates if not 0 <= one.weight < math.inf]
    if bad:
        raise ShapeError(
            f"{bad[0].site} has weight {bad[0].weight}: a weight is 0 or more, and finite; nothing to merge"
        )
    if not updates or not 0 < total < math.inf:
        raise ShapeError(f"{len(updates)} updates with a total weight of {total}: nothing to merge")
    return [update.weight / total for update in updates]


def leading_ranks(
    state: AdapterState,
    *,
    rank: int,
    scaling: float,
    own_scalings: Mapping[str, float] = MappingProxyType({}),
) -> AdapterState:
    """Return the leading `rank` components of an adapter, for a site that holds no more.

    scaling, own_scalings: that site's own; B is divided by it, so that scaling * B @ A is the same product.
    The factors of an SVD merge are ordered, so that the leading ones are the best.
    Raises ShapeError when rank is above the adapter's.
    """
    if rank > state.rank:
        raise ShapeError(f"rank {rank} cannot be cut from an adapter of rank {state.rank}")
    if (rank, scaling, own_scalings) == (state.rank, state.scaling, state.own_scalings):
        return state
    pairs = {}
    for name, pair in state.pairs.items():
        factor = state.scaling_of(name) / own_scalings.get(name, scaling)
        b = (pair.B[:, :rank] * factor).astype(pair.B.dtype, copy=False)
        pairs[name] = LoraPair(pair.A[:rank].copy(), b)
    return AdapterState(pairs, scaling, own_scalings)
