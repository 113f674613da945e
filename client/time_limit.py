"""How long a task may go on here: policy.max-hours, looked at every step."""

from __future__ import annotations

import time
from collections.abc import Callable

from common.errors import TrainingError


def within_hours(max_hours: float, *, then: Callable[[int], None]) -> Callable[[int], None]:
    """Return a step callback that stops a task, with TrainingError, once policy.max-hours have passed.

    The hours begin now. then: is told each step before that.
    """
    started = time.monotonic()

    def on_step(step: int) -> None:
        hours = (time.monotonic() - started) / 3600
        if hours > max_hours:
            raise TrainingError(
                f"policy.max-hours = {max_hours}: stopped after {hours:.2f} hours and {step} steps; "
                "nothing leaves, and what it was charged stands"
            )
        then(step)

    return on_step
