"""What goes into a merge and what comes out, and how a site's share of the adapter is cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from common.adapter import AdapterState, LoraPair
from common.errors import ShapeError


@dataclass(frozen=True, slots=True)
class SiteUpdate:
    """One site's part in a merge.

    weight: its share, relative; `normalised_weights` makes them sum to 1.
    sent: the adapter that it was sent. returned: what it sent back, of the same rank.
    """

    site: str
    weight: float
    sent: AdapterState
    returned: AdapterState


@dataclass(frozen=True, slots=True)
class Merged:
    """The next global adapter.

    discarded_energy: module -> share of squared singular values of M that truncation left out, in
    [0, 1]; empty where a method does not truncate. total_discarded: the same over all modules.
    """

    state: AdapterState
    discarded_energy: Mapping[str, float] = field(default_factory=dict)
    total_discarded: float = 0.0


def normalised_weights(updates: Sequence[SiteUpdate]) -> list[float]:
    """Return the weights divided by their sum. Raises ShapeError when there is nothing to weigh."""
    total = sum(update.weight for update in updates)
    if not updates or not total > 0 or any(update.weight < 0 for update in updates):
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
