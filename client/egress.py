"""The last look before anything leaves: exactly the expected tensors, and allow-listed numbers."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from common.adapter import AdapterShape, AdapterState, from_safetensors
from common.errors import EgressError, ProtocolError, ShapeError

# Numbers that any reply may carry: public constants only, the same whatever the records are.
PUBLIC_NUMBERS = frozenset({"steps", "declared-size", "max-rank"})
# Numbers that leave only when site.toml lists them.
OPTIONAL_NUMBERS = frozenset({"train-loss", "train-seconds"})


def check_adapter(data: bytes, *, shape: AdapterShape) -> AdapterState:
    """Return the adapter in the very bytes about to leave.

    shape: what the task asked to be trained. Raises EgressError for any other tensor, shape or dtype,
    and for values that are not finite.
    """
    try:
        state = from_safetensors(data, shape=shape)
    except (ShapeError, ProtocolError) as error:
        raise EgressError(f"the outgoing adapter is not what was asked for: {error}") from None
    if not state.is_finite():
        raise EgressError("the outgoing adapter holds values that are not finite")
    if data != state.to_safetensors():
        raise EgressError("the outgoing file holds more than its tensors")
    return state


def check_numbers(numbers: Mapping[str, float], *, released: Collection[str]) -> dict[str, float]:
    """Return the numbers unchanged when each may leave.

    released: policy.release-metrics of this site. Raises EgressError naming the first that may not.
    """
    allowed = PUBLIC_NUMBERS | (OPTIONAL_NUMBERS & set(released))
    for name, value in numbers.items():
        if name not in allowed:
            raise EgressError(f"number {name!r} is not on this site's list of what may leave")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise EgressError(f"number {name!r} is a {type(value).__name__}, not a number")
        if not math.isfinite(value):
            raise EgressError(f"number {name!r} is not finite")
    return dict(numbers)
