"""Privacy accounting as numbers: calibrate, compose. No data, no model, no state.

Mechanism: Poisson-subsampled Gaussian (Abadi et al. 1607.00133), add-or-remove-one neighbours.
Accountants are Opacus's: PRV (Gopi, Lee and Wutschitz 2106.02848), an upper bound to within 0.01, and
RDP (Mironov, Talwar and Zhang 1908.10530), a looser upper bound that computes at once.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from common.errors import PrivacyError

Accountant = Literal["prv", "rdp"]

# PRV's memory grows with epsilon (gigabytes at some hundreds, and the noise may be a stranger's wish);
# far beyond any protection, RDP's bound serves.
_MAX_PRV_EPSILON = 100.0


@dataclass(frozen=True, slots=True, order=True)
class GaussianSteps:
    """`steps` identical steps of the Poisson-subsampled Gaussian mechanism.

    noise_multiplier: sigma, standard deviation of the noise over the clipping norm; 0 is no noise.
    sample_rate: q in (0, 1].
    """

    noise_multiplier: float
    sample_rate: float
    steps: int


def public_sample_rate(*, batch_size: int, declared_size: int) -> float:
    """Return q = min(1, batch_size / declared_size): public constants only, never the true count."""
    if declared_size < 1:
        raise PrivacyError(
            f"declared-size {declared_size} is not a count; give the number of records"
        )
    return min(1.0, batch_size / declared_size)


def compose_epsilon(
    parts: Sequence[GaussianSteps], *, delta: float, accountant: Accountant = "prv"
) -> float:
    """Return the epsilon at `delta` of all parts together.

    Equal mechanisms are coalesced first. No parts: 0. A part without noise: infinite.
    Raises PrivacyError when delta is not in (0, 1).
    """
    if not 0 < delta < 1:
        raise PrivacyError(f"delta {delta} is not between 0 and 1")
    steps_by_mechanism: dict[tuple[float, float], int] = {}
    for part in parts:
        if part.steps > 0:
            key = (part.noise_multiplier, part.sample_rate)
            steps_by_mechanism[key] = steps_by_mechanism.get(key, 0) + part.steps
    if any(noise <= 0 for noise, _ in steps_by_mechanism):
        return math.inf
    coalesced = tuple(
        GaussianSteps(noise, rate, steps)
        for (noise, rate), steps in sorted(steps_by_mechanism.items())
    )
    return _epsilon(coalesced, delta, accountant) if coalesced else 0.0


def calibrate_noise(
    *,
    target_epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    accountant: Accountant = "prv",
) -> float:
    """Return the least noise multiplier whose `steps` steps stay at or below `target_epsilon`.

    Depends on public constants only. Within 0.01 of the target epsilon (a target above 50: by RDP).
    Raises PrivacyError when no reasonable noise reaches the target.
    """
    return _calibrate(target_epsilon, delta, sample_rate, steps, accountant)


@lru_cache(maxsize=256)
def _epsilon(parts: tuple[GaussianSteps, ...], delta: float, accountant: Accountant) -> float:
    from opacus.accountants import create_accountant

    if accountant == "prv":
        bound = _epsilon(parts, delta, "rdp")
        if bound > _MAX_PRV_EPSILON:
            return bound
    meter = create_accountant(accountant)
    meter.history = [(part.noise_multiplier, part.sample_rate, part.steps) for part in parts]
    with warnings.catch_warnings():
        # RDP warns when its best order lies at the edge of its list: a looser bound, still a bound.
        warnings.simplefilter("ignore")
        return float(meter.get_epsilon(delta=delta))


@lru_cache(maxsize=256)
def _calibrate(
    target_epsilon: float, delta: float, sample_rate: float, steps: int, accountant: Accountant
) -> float:
    from opacus.accountants.utils import get_noise_multiplier

    if target_epsilon > _MAX_PRV_EPSILON / 2:
        accountant = "rdp"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return float(
                get_noise_multiplier(
                    target_epsilon=target_epsilon,
                    target_delta=delta,
                    sample_rate=sample_rate,
                    steps=steps,
                    accountant=accountant,
                    epsilon_tolerance=0.01,
                )
            )
    except ValueError:
        raise PrivacyError(
            f"no noise reaches epsilon {target_epsilon} at delta {delta} with sample rate "
            f"{sample_rate:.4g} over {steps} steps; raise privacy.target-epsilon or lower "
            "train.rounds, train.local-steps or train.batch-size"
        ) from None
