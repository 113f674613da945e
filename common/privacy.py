"""Privacy accounting as numbers: calibrate, compose, what still fits. No data, no model, no state.

Mechanism: Poisson-subsampled Gaussian (Abadi et al. 1607.00133), add-or-remove-one neighbours.
Accountants: PRV (Gopi, Lee and Wutschitz 2106.02848; common/prv.py), an upper bound to within 0.01, and
RDP (Mironov, Talwar and Zhang 1908.10530; Opacus's), a looser upper bound that computes at once. Both
are upper bounds, so the smaller of the two is one as well, and it is what "prv" answers.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from common.errors import PrivacyError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Accountant = Literal["prv", "rdp"]

# The filters of warnings are the whole process's, and epsilon is composed in several threads.
_WARNINGS_LOCK = threading.Lock()
_EPSILON_TOLERANCE = 0.01
# Outside these, series and squares do not end or overflow. Less noise protects nobody, more trains
# nothing and counts as this much.
_MIN_NOISE, _MAX_NOISE = 1e-3, 1e4
# How far beyond RDP's answer `steps_that_fit` looks for PRV's.
_PRV_GAIN, _PRV_STEPS = 4, 1000


@dataclass(frozen=True, slots=True, order=True)
class GaussianSteps:
    """`steps` identical steps of the Poisson-subsampled Gaussian mechanism.

    noise_multiplier: sigma, standard deviation of the noise over the clipping norm; 0 is no noise.
    sample_rate: q in (0, 1].
    """

    noise_multiplier: float
    sample_rate: float
    steps: int


@dataclass(frozen=True, slots=True)
class EpsilonBounds:
    """Two upper bounds on one epsilon. prv: None where it is not known (yet)."""

    prv: float | None
    rdp: float

    @property
    def least(self) -> float:
        """The smaller one: of two upper bounds each holds."""
        return self.rdp if self.prv is None else min(self.prv, self.rdp)


def public_sample_rate(*, batch_size: int, declared_size: int) -> float:
    """Return q = min(1, batch_size / declared_size): public constants only, never the true count."""
    if declared_size < 1:
        raise PrivacyError(
            f"declared-size {declared_size} is not a count; give a round number near that of patients, "
            "or records"
        )
    return min(1.0, batch_size / declared_size)


def as_substitution(part: GaussianSteps) -> GaussianSteps:
    """Return steps that bound `part` for a neighbour whose sampled contribution is replaced, not removed.

    Replacing moves the clipped sum by up to 2C where removing moves it by C, hence half the noise
    multiplier. For every epsilon >= 0 advanced joint convexity bounds the hockey-stick divergence of
    (1-q)N(0) + qN(u) and (1-q)N(0) + qN(v), |u|, |v| <= C, by that of (1-q)N(0) + qN(2C) and N(0), which is
    the remove pair of sensitivity 2C. That is one step; for many, tests compose the pair itself, which
    stays below at small delta (not near epsilon 0 with delta about 0.5).
    Source: Balle, Barthe and Gaboardi 1807.01647, theorem 2.
    """
    return GaussianSteps(part.noise_multiplier / 2, part.sample_rate, part.steps)


def coalesce(parts: Sequence[GaussianSteps]) -> tuple[GaussianSteps, ...]:
    """Return the parts with the steps of equal mechanisms added up, in a fixed order.

    Extreme settings become the nearest that can be computed, never a more private one.
    Raises PrivacyError for a sample rate outside (0, 1] or steps below 0.
    """
    steps_by_mechanism: dict[tuple[float, float], int] = {}
    for part in parts:
        if not 0 < part.sample_rate <= 1 or part.steps < 0:
            raise PrivacyError(
                f"{part.steps} steps at sample rate {part.sample_rate} cannot be counted; the rate "
                "lies in (0, 1] and steps are not negative"
            )
        if part.steps > 0:
            noise = part.noise_multiplier
            # Neither NaN nor infinity is noise that anybody added.
            noise = min(noise, _MAX_NOISE) if _MIN_NOISE <= noise < math.inf else 0.0
            key = (noise, part.sample_rate)
            steps_by_mechanism[key] = steps_by_mechanism.get(key, 0) + part.steps
    return tuple(
        GaussianSteps(noise, rate, steps)
        for (noise, rate), steps in sorted(steps_by_mechanism.items())
    )


def epsilon_bounds(parts: Sequence[GaussianSteps], *, delta: float) -> EpsilonBounds:
    """Return both bounds on the epsilon of all parts together.

    Twenty different mechanisms take some seconds. Raises PrivacyError when delta is not in (0, 1).
    """
    rdp = rdp_epsilon(parts, delta=delta)
    coalesced = coalesce(parts)
    if not coalesced or math.isinf(rdp):
        return EpsilonBounds(rdp, rdp)
    return EpsilonBounds(_prv_epsilon(coalesced, delta), rdp)


def rdp_epsilon(parts: Sequence[GaussianSteps], *, delta: float) -> float:
    """Return RDP's upper bound on the epsilon of all parts together, at once.

    No parts: 0. A part without noise: infinite. Raises PrivacyError when delta is not in (0, 1).
    """
    if not 0 < delta < 1:
        raise PrivacyError(f"delta {delta} is not between 0 and 1")
    coalesced = coalesce(parts)
    if any(part.noise_multiplier == 0 for part in coalesced):
        return math.inf
    return _rdp_epsilon(coalesced, delta) if coalesced else 0.0


def compose_epsilon(
    parts: Sequence[GaussianSteps], *, delta: float, accountant: Accountant = "prv"
) -> float:
    """Return the epsilon at `delta` of all parts together.

    Equal mechanisms are coalesced first. No parts: 0. A part without noise: infinite.
    Raises PrivacyError when delta is not in (0, 1).
    """
    if accountant == "rdp":
        return rdp_epsilon(parts, delta=delta)
    return epsilon_bounds(parts, delta=delta).least


def steps_that_fit(
    spent: Sequence[GaussianSteps],
    setting: GaussianSteps,
    *,
    at_most: int,
    max_epsilon: float,
    delta: float,
    accountant: Accountant = "prv",
) -> int:
    """Return how many steps of `setting`'s mechanism keep `spent` and them within `max_epsilon`.

    Never more than fit, nor than at_most; by PRV possibly fewer where far more than RDP's answer fit.
    """

    def within(steps: int, *, by: Accountant = accountant) -> bool:
        more = GaussianSteps(setting.noise_multiplier, setting.sample_rate, steps)
        return compose_epsilon([*spent, more], delta=delta, accountant=by) <= max_epsilon

    if at_most < 1:
        return 0
    fitting = _largest(lambda steps: within(steps, by="rdp"), at_most)
    at_most = min(at_most, max(_PRV_GAIN * fitting, _PRV_STEPS))
    if accountant == "rdp" or fitting == at_most:
        return fitting
    from common.prv import prv_curve

    parts = coalesce(spent)
    hopeless = rdp_epsilon(parts, delta=delta) == math.inf
    epsilon_at = None if hopeless else prv_curve(parts, setting, delta=delta, at_most=at_most)
    if epsilon_at is None:
        return fitting
    steps = max(fitting, _largest(lambda count: epsilon_at(count) <= max_epsilon, at_most))
    # The search's grid is not quite the one that will decide.
    while steps > fitting and not within(steps):
        steps = max(fitting, steps - max(1, steps // 100))
    return steps


def calibrate_noise(
    *,
    target_epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    accountant: Accountant = "prv",
) -> float:
    """Return a noise multiplier whose `steps` steps stay at or just below `target_epsilon`.

    Depends on public constants only. Within 0.01 of the target epsilon (where PRV cannot serve, of RDP's).
    Raises PrivacyError when no reasonable noise reaches the target.
    """
    return _calibrate(target_epsilon, delta, sample_rate, steps, accountant)


@lru_cache(maxsize=256)
def _prv_epsilon(parts: tuple[GaussianSteps, ...], delta: float) -> float | None:
    from common.prv import prv_epsilon

    return prv_epsilon(parts, delta=delta)


@lru_cache(maxsize=1024)
def _rdp_curve(noise_multiplier: float, sample_rate: float) -> npt.NDArray[np.float64]:
    """One step's Renyi divergence at each of Opacus's orders."""
    import numpy as np
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis.rdp import compute_rdp

    orders = RDPAccountant.DEFAULT_ALPHAS
    curve = compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=orders)
    # Rounding takes the smallest ones below zero, and a run may have many steps.
    return np.maximum(np.asarray(curve, dtype=np.float64), 0.0)


@lru_cache(maxsize=256)
def _rdp_epsilon(parts: tuple[GaussianSteps, ...], delta: float) -> float:
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis.rdp import get_privacy_spent

    curve = sum(part.steps * _rdp_curve(part.noise_multiplier, part.sample_rate) for part in parts)
    with _WARNINGS_LOCK, warnings.catch_warnings():
        # It warns when the best order lies at the edge of the list: a looser bound, still a bound.
        warnings.simplefilter("ignore")
        epsilon, _ = get_privacy_spent(orders=RDPAccountant.DEFAULT_ALPHAS, rdp=curve, delta=delta)
    return max(0.0, float(epsilon))


@lru_cache(maxsize=256)
def _calibrate(
    target_epsilon: float, delta: float, sample_rate: float, steps: int, accountant: Accountant
) -> float:
    def epsilon_of(noise: float) -> float:
        part = GaussianSteps(noise, sample_rate, steps)
        return compose_epsilon([part], delta=delta, accountant=accountant)

    low, high = 0.0, 20.0
    while (epsilon := epsilon_of(high)) > target_epsilon:
        low, high = high, 2 * high
        if high > _MAX_NOISE:
            raise PrivacyError(
                f"no noise reaches epsilon {target_epsilon} at delta {delta} with sample rate "
                f"{sample_rate:.4g} over {steps} steps; raise privacy.target-epsilon or lower "
                "train.rounds, train.local-steps or train.batch-size"
            )
    while target_epsilon - epsilon > _EPSILON_TOLERANCE:
        middle = (low + high) / 2
        at_middle = epsilon_of(middle)
        if at_middle <= target_epsilon:
            high, epsilon = middle, at_middle
        else:
            low = middle
    return high


def _largest(holds: Callable[[int], bool], at_most: int) -> int:
    """The largest count up to at_most for which `holds`, which holds up to some count and not beyond."""
    low, high = 0, at_most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
