"""The learning rate over a whole run, which sites follow and the coordinator reports."""

from __future__ import annotations

import math

from common.config import TrainSection


def scheduled_rate(step: int, *, total_steps: int, settings: TrainSection) -> float:
    """Return the learning rate of a step, counted from 0 over the whole run.

    Rises over ceil(warmup_ratio * total_steps) steps, then stays (constant) or falls towards 0,
    which it would reach one step after the last (linear).
    """
    warmup = math.ceil(settings.warmup_ratio * total_steps)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    if settings.schedule == "constant":
        return settings.learning_rate
    return settings.learning_rate * (total_steps - step) / (total_steps - warmup)
