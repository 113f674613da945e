"""The table of methods: how each cuts the target, what its sites train, and what they are sent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from server.aggregation.frozen import cut_fedsvd, cut_ffa
from server.aggregation.means import cut_fedex, cut_rolora, cut_weighted
from server.aggregation.svd import cut_stack, cut_svd
from server.aggregation.target import Target
from server.aggregation.types import Cut

Factors: TypeAlias = Literal["both", "a", "b"]


def _both(server_round: int) -> Factors:
    return "both"


def _only_b(server_round: int) -> Factors:
    return "b"


def _by_turns(server_round: int) -> Factors:
    # B first: it is 0 in the beginning, where A has no gradient.
    return "b" if server_round % 2 == 1 else "a"


@dataclass(frozen=True, slots=True)
class Method:
    """One way to merge.

    cut: from the target of a module to its next factors. trained: round (1 up) -> which factors sites train.
    grows: whether the global adapter's rank grows beyond lora.rank. sends_all: whether a site is sent as much
    of it as it can hold, with what is beyond its own rank frozen, and not its leading ranks alone.
    averages_factors: whether what is merged depends on more than the sites' products.
    orthonormal: whether the first A has orthonormal rows.
    """

    cut: Callable[[Target], Cut]
    trained: Callable[[int], Factors] = _both
    grows: bool = False
    sends_all: bool = False
    averages_factors: bool = False
    orthonormal: bool = False


METHODS: dict[str, Method] = {
    "svd": Method(cut_svd),
    "weighted": Method(cut_weighted, averages_factors=True),
    "stack": Method(cut_stack, grows=True),
    "ffa": Method(cut_ffa, trained=_only_b),
    "fedsvd": Method(cut_fedsvd, trained=_only_b, orthonormal=True),
    "rolora": Method(cut_rolora, trained=_by_turns, averages_factors=True),
    "fedex": Method(cut_fedex, grows=True, sends_all=True, averages_factors=True),
}
