"""What of an adapter is sent along and not trained: one of its factors, or its last ranks.

Training B alone leaves A as every site has it, so that the mean of the sites' updates is exact (FFA-LoRA,
2403.12313). Ranks beyond those that are trained carry what a mean of factors misses (FedEx-LoRA,
2410.09432).
"""

from __future__ import annotations

from common.adapter import AdapterState, Float32, LoraPair
from common.config import TrainedFactors
from common.errors import ShapeError

# The part of a tensor's name that says which factor it is, by the factors that are trained.
UNTRAINED = {"both": None, "a": ".lora_B.", "b": ".lora_A."}


def split_adapter(state: AdapterState, *, rank: int) -> tuple[AdapterState, AdapterState | None]:
    """Return an adapter's leading `rank` ranks, and the ranks after them, None where there are none.

    Both are views of `state` and scaled as it is. Raises ShapeError when `state` has fewer ranks.
    """
    if not 1 <= rank <= state.rank:
        raise ShapeError(f"the first {rank} ranks of an adapter of rank {state.rank} do not exist")
    if rank == state.rank:
        return state, None
    leading = {n: LoraPair(p.A[:rank], p.B[:, :rank]) for n, p in state.pairs.items()}
    last = {n: LoraPair(p.A[rank:], p.B[:, rank:]) for n, p in state.pairs.items()}
    return (
        AdapterState(leading, state.scaling, state.own_scalings),
        AdapterState(last, state.scaling, state.own_scalings),
    )


def untrained_tensors(
    state: AdapterState, *, rank: int, trained_factors: TrainedFactors
) -> dict[str, Float32]:
    """Return the tensors that come back from training as they were sent, by name.

    state: as it was sent. rank: of what is trained of it. Raises ShapeError as `split_adapter` does.
    """
    part = UNTRAINED[trained_factors]
    if part is None:
        return {}
    trained, _ = split_adapter(state, rank=rank)
    return {name: array for name, array in trained.tensors().items() if part in name}
