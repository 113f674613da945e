"""The last look before anything leaves: exactly the expected tensors, and allow-listed numbers."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from common.adapter import AdapterShape, AdapterState, Float32, from_safetensors
from common.errors import EgressError, ProtocolError, ShapeError
from common.files import Buffer

# Numbers that any reply may carry: public constants only, the same whatever the records are.
PUBLIC_NUMBERS = frozenset({"steps", "declared-size", "max-rank"})
# Numbers that leave only when site.toml lists them.
OPTIONAL_NUMBERS = frozenset({"train-loss", "train-seconds"})
# What policy.release-metrics calls "evaluation": counts and sums over all of a site's test records.
EVALUATION_NUMBERS = frozenset(
    {
        "evaluation-records",
        "evaluation-tokens",
        "evaluation-nll",
        "evaluation-correct",
        "evaluation-base-nll",
        "evaluation-base-correct",
    }
)


@dataclass(frozen=True, slots=True)
class CheckedAdapter:
    """An adapter that may leave. data: the very bytes; state: what is in them, as views of them."""

    data: Buffer
    state: AdapterState


def check_adapter(
    data: Buffer,
    *,
    shape: AdapterShape,
    max_norm: float,
    untrained: Mapping[str, Float32] | None = None,
) -> CheckedAdapter:
    """Return the adapter in the very bytes about to leave.

    shape: what the task asked to be trained. max_norm: policy.max-adapter-norm, of all tensors together.
    untrained: those of its tensors that no training may change, as they came.
    Raises EgressError for any other tensor, shape or dtype, for anything else in the file, for values
    that are not finite, for a norm above `max_norm` and for an untrained tensor that is not as it came.
    """
    try:
        state = from_safetensors(data, shape=shape)
    except (ShapeError, ProtocolError) as error:
        raise EgressError(f"the outgoing adapter is not what was asked for: {error}") from None
    if not state.is_finite():
        raise EgressError("the outgoing adapter holds values that are not finite")
    header = shape.safetensors_header()
    if len(data) != shape.safetensors_size() or data[: len(header)] != header:
        raise EgressError("the outgoing file holds more than its tensors")
    tensors = state.tensors()
    for name, came in (untrained or {}).items():
        # Bits, not values: 0.0 equals -0.0, and a difference that no number shows could still say something.
        if not np.array_equal(tensors[name].view(np.uint32), came.view(np.uint32)):
            raise EgressError(
                f"the outgoing {name} is not as it came, and round.trained-factors says that nobody trains "
                "it; nothing leaves. Report this with the version of Consilium"
            )
    norm = adapter_norm(state)
    if norm > max_norm:
        raise EgressError(
            f"policy.max-adapter-norm = {max_norm:g}: the outgoing adapter has norm {norm:.3g}, as one "
            "that diverged; lower train.learning-rate, or raise that line in site.toml"
        )
    return CheckedAdapter(data, state)


def adapter_norm(state: AdapterState) -> float:
    """Return the Euclidean norm of all factors together, in float64."""
    norms = (np.linalg.norm(array.astype(np.float64)) for array in state.tensors().values())
    return math.hypot(*map(float, norms))


def check_numbers(
    numbers: Mapping[str, float], *, released: Collection[str], digits: int
) -> dict[str, float]:
    """Return the numbers as they may leave: public ones exact, the others rounded.

    released: policy.release-metrics of this site. digits: significant ones, policy.metric-digits.
    Raises EgressError naming the first that may not leave.
    """
    allowed = PUBLIC_NUMBERS | (OPTIONAL_NUMBERS & set(released))
    if "evaluation" in released:
        allowed |= EVALUATION_NUMBERS
    checked: dict[str, float] = {}
    for name, value in numbers.items():
        if name not in allowed:
            raise EgressError(f"number {name!r} is not on this site's list of what may leave")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise EgressError(f"number {name!r} is a {type(value).__name__}, not a number")
        leaving = value if name in PUBLIC_NUMBERS else float(f"{value:.{digits}g}")
        # After rounding: the largest floats round up to infinity.
        if not math.isfinite(leaving):
            raise EgressError(f"number {name!r} is not finite")
        checked[name] = leaving
    return checked
