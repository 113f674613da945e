"""What each site is sent of the global adapter: its leading ranks, as many as the site can hold."""

from __future__ import annotations

from dataclasses import dataclass

from common.adapter import AdapterShape, AdapterState
from common.config import LoraSection, Scalar
from server.aggregation import leading_ranks
from server.gathering import Member


@dataclass(frozen=True, slots=True)
class Portion:
    """An adapter as it is sent: as a state, as bytes, and its digest. rank: of what may be trained."""

    state: AdapterState
    data: bytes
    digest: str
    rank: int

    def settings(self) -> dict[str, Scalar]:
        """Return the keys of a task that say which of the ranks, the last ones, nobody trains."""
        return {"lora.rank": self.rank, "round.frozen-rank": self.state.rank - self.rank}


class Portions:
    """The portions of one adapter, each made once.

    shape: of what is trained, at lora.rank. sends_all: whether a site is sent as much as it can hold, and not
    only the ranks that it trains.
    """

    def __init__(
        self, current: AdapterState, *, shape: AdapterShape, lora: LoraSection, sends_all: bool
    ) -> None:
        self._current = current
        self._shape = shape
        self._lora = lora
        self._sends_all = sends_all
        # By the rank that is trained and the rank that is sent.
        self._made: dict[tuple[int, int], Portion] = {}

    def shape_for(self, member: Member) -> AdapterShape:
        """Return what a site trains and sends back."""
        return self._shape.at_rank(member.rank, lora=self._lora)

    def of(self, member: Member) -> Portion:
        """Return what a site is sent."""
        held = min(self._current.rank, member.max_rank) if self._sends_all else member.rank
        key = member.rank, held
        if key not in self._made:
            shape = self.shape_for(member)
            state = leading_ranks(
                self._current, rank=held, scaling=shape.scaling, own_scalings=shape.own_scalings
            )
            self._made[key] = Portion(state, state.to_safetensors(), state.digest(), member.rank)
        return self._made[key]
