"""The PRV accountant: against Opacus's, against closed formulas, and against the pairs themselves."""

from __future__ import annotations

import math
import time

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant
from scipy.fft import irfft, rfft
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr

from common import prv
from common.privacy import GaussianSteps, as_substitution, compose_epsilon, rdp_epsilon
from common.prv import prv_curve, prv_epsilon

DELTA = 1e-5

# Runs as hospitals make them: 1 to 5 epsilon each, over some hundred steps.
MIXED = [
    GaussianSteps(0.8, 0.032, 300),
    GaussianSteps(1.1, 0.08, 150),
    GaussianSteps(2.5, 0.2, 60),
]


def _opacus(parts: list[GaussianSteps], delta: float) -> float:
    accountant = PRVAccountant()
    accountant.history = [(part.noise_multiplier, part.sample_rate, part.steps) for part in parts]
    with np.errstate(divide="ignore"):
        # It takes the logarithm of 1 - q.
        return float(accountant.get_epsilon(delta=delta))


@pytest.mark.parametrize("parts", [MIXED[:1], MIXED[1:], MIXED, [GaussianSteps(1.0, 1.0, 3)]])
@pytest.mark.parametrize("delta", [1e-5, 1e-7])
def test_it_agrees_with_opacus(parts: list[GaussianSteps], delta: float) -> None:
    assert prv_epsilon(parts, delta=delta) == pytest.approx(_opacus(parts, delta), abs=1e-6)


def _exact_gaussian(sigma: float, delta: float) -> float:
    """Balle and Wang 1805.06530, theorem 8, for sensitivity 1."""

    def excess(epsilon: float) -> float:
        upper, lower = 0.5 / sigma - epsilon * sigma, -0.5 / sigma - epsilon * sigma
        return float(ndtr(upper) - math.exp(epsilon + log_ndtr(lower))) - delta

    return float(brentq(excess, 0, 100))


@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-9])
@pytest.mark.parametrize(("sigma", "steps"), [(0.5, 1), (1.0, 10), (5.0, 100), (20.0, 1000)])
def test_without_sampling_it_bounds_the_exact_formula_from_above(
    sigma: float, steps: int, delta: float
) -> None:
    # Steps of the plain Gaussian mechanism compose to one with sigma / sqrt(steps).
    exact = _exact_gaussian(sigma / math.sqrt(steps), delta)

    bound = prv_epsilon([GaussianSteps(sigma, 1.0, steps)], delta=delta)

    assert bound is not None
    assert exact + 0.0099 <= bound <= exact + 0.015


@pytest.mark.parametrize("noise", [0.2, 1.0, 4.0])
@pytest.mark.parametrize(
    ("steps", "delta"),
    [
        (100_000, 1e-11),
        (100_000, 1e-12),
        (100_000, 1e-13),
        (10_000, 1e-13),
        (1_000, 1e-13),
        (1, 1e-15),
    ],
)
def test_a_delta_that_rounding_hides_is_left_to_rdp(noise: float, steps: int, delta: float) -> None:
    # Composed, this is the Gaussian mechanism with `noise`.
    part = GaussianSteps(noise * math.sqrt(steps), 1.0, steps)

    assert prv_epsilon([part], delta=delta) is None
    assert prv_curve([part], part, delta=delta, at_most=1) is None
    assert compose_epsilon([part], delta=delta) >= _exact_gaussian(noise, delta)


@pytest.mark.parametrize("noise", [0.2, 1.0, 4.0])
@pytest.mark.parametrize("steps", [1, 100, 1_000, 10_000, 100_000])
def test_the_smallest_delta_that_it_takes_is_bounded_from_above(noise: float, steps: int) -> None:
    delta = 20 * (steps + 10) * 2.0**-52 * 1.001
    part = GaussianSteps(noise * math.sqrt(steps), 1.0, steps)

    bound = prv_epsilon([part], delta=delta)

    assert bound is not None
    assert bound >= _exact_gaussian(noise, delta)


def test_the_steps_of_all_parts_count_as_rounding() -> None:
    parts = [GaussianSteps(100.0 + index, 1.0, 1_000) for index in range(4)]

    assert prv_epsilon(parts[:1], delta=1e-11) is not None
    assert prv_epsilon(parts, delta=1e-11) is None
    assert prv_curve(parts[:1], parts[1], delta=1e-11, at_most=3_000) is None


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.builds(GaussianSteps, st.floats(0.6, 5.0), st.floats(0.001, 0.5), st.integers(1, 300)),
        min_size=1,
        max_size=3,
    )
)
def test_it_is_hardly_ever_above_rdp(parts: list[GaussianSteps]) -> None:
    bound, rdp = prv_epsilon(parts, delta=DELTA), rdp_epsilon(parts, delta=DELTA)

    assert bound is None or bound <= rdp + 0.02
    assert bound is not None or rdp > 50


def test_a_curve_gives_what_composing_each_point_would() -> None:
    more = GaussianSteps(1.5, 0.1, 1)
    curve = prv_curve(MIXED, more, delta=DELTA, at_most=400)

    assert curve is not None
    for steps in (0, 1, 57, 400):
        whole = [*MIXED, GaussianSteps(1.5, 0.1, steps)] if steps else MIXED
        assert curve(steps) == pytest.approx(prv_epsilon(whole, delta=DELTA), abs=1e-5)


def test_rounding_to_a_coarse_grid_keeps_the_mean_of_every_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, many = GaussianSteps(1.0, 0.03, 1), GaussianSteps(1.0, 0.03, 300)
    fine = prv_epsilon([many], delta=DELTA)
    monkeypatch.setattr(prv, "_MAX_POINTS", 1 << 10)
    monkeypatch.setattr(prv, "_MAX_EPSILON_ERROR", 1.0)

    coarse = prv_epsilon([many], delta=DELTA)
    curve = prv_curve([], one, delta=DELTA, at_most=300)

    # Half the loss of a step lies within one grid point; without its mean 300 of them err by 0.08.
    assert fine is not None
    assert coarse is not None
    assert curve is not None
    assert coarse - fine == pytest.approx(0.9517 - 0.01, abs=0.02)
    assert curve(300) == pytest.approx(coarse, abs=1e-9)


def test_twenty_different_settings_take_less_than_twenty_seconds() -> None:
    parts = [
        GaussianSteps(0.9 + 0.05 * index, 0.01 * (1 + index % 7), 40 * (1 + index % 5))
        for index in range(20)
    ]
    started = time.thread_time()

    bound = prv_epsilon(parts, delta=DELTA)

    assert time.thread_time() - started < 20
    assert bound is not None
    # Opacus 1.6.0 takes several seconds to say so.
    assert bound == pytest.approx(9.3034449, abs=1e-5)


@pytest.mark.parametrize(
    "hopeless",
    [
        GaussianSteps(0.05, 0.032, 300),
        GaussianSteps(1e-200, 0.5, 1),
        GaussianSteps(1000.0, 1.0, 10**7),
        GaussianSteps(1.0, 0.5, 10**15),
    ],
)
def test_what_no_bearable_grid_can_hold_is_left_to_rdp_at_once(hopeless: GaussianSteps) -> None:
    started = time.thread_time()

    assert prv_epsilon([hopeless], delta=DELTA) is None
    assert time.thread_time() - started < 1


# The pairs of distributions themselves, composed on a plain grid of losses.
_POINTS, _MESH = 1 << 18, 3e-4
Mixture = list[tuple[float, float]]


def _log_density(output: npt.NDArray[np.float64], mixture: Mixture) -> npt.NDArray[np.float64]:
    parts = [math.log(weight) - (output - mean) ** 2 / 2 for mean, weight in mixture]
    return np.logaddexp.reduce(parts)


def _pair_epsilon(here: Mixture, there: Mixture, *, sigma: float, steps: int) -> float:
    """The epsilon of `steps` observations of one mixture of normals rather than another.

    Means in units of C and unit variance after scaling by sigma. Losses are split between the two nearest
    grid points, which keeps their mean.
    """
    here = [(mean / sigma, weight) for mean, weight in here]
    there = [(mean / sigma, weight) for mean, weight in there]
    output = np.linspace(-12 - 2 / sigma, 12 + 2 / sigma, 200_001)
    log_here = _log_density(output, here)
    mass = np.exp(log_here)
    place = (log_here - _log_density(output, there)) / _MESH
    low = np.floor(place).astype(int)
    share = place - low
    pmf = np.bincount(low % _POINTS, mass * (1 - share), _POINTS)
    pmf += np.bincount((low + 1) % _POINTS, mass * share, _POINTS)
    composed = np.roll(irfft(rfft(pmf / pmf.sum()) ** steps, _POINTS), _POINTS // 2)
    losses = (np.arange(_POINTS) - _POINTS // 2) * _MESH

    def excess(epsilon: float) -> float:
        above = losses > epsilon
        return float(composed[above] @ -np.expm1(epsilon - losses[above])) - DELTA

    return float(brentq(excess, 0, 35)) if excess(0) > 0 else 0.0


@pytest.mark.parametrize("steps", [1, 10, 100])
@pytest.mark.parametrize(("sigma", "rate"), [(1.0, 0.01), (2.0, 0.05), (3.0, 0.3), (6.0, 0.9)])
def test_substitution_counts_at_least_what_the_pair_itself_does(
    sigma: float, rate: float, steps: int
) -> None:
    # A sampled contribution of norm C on one side replaced by its opposite.
    pair = ([(0.0, 1 - rate), (1.0, rate)], [(0.0, 1 - rate), (-1.0, rate)])
    exact = _pair_epsilon(*pair, sigma=sigma, steps=steps)

    counted = as_substitution(GaussianSteps(sigma, rate, steps))

    bound = prv_epsilon([counted], delta=DELTA)
    assert bound is not None
    assert exact <= bound
    # And removing alone would not have been enough.
    if rate >= 0.05:
        assert exact > _pair_epsilon(pair[0], [(0.0, 1.0)], sigma=sigma, steps=steps)


@pytest.mark.parametrize(("sigma", "rate"), [(0.8, 0.032), (2.0, 0.3)])
def test_adding_a_record_costs_no_more_than_removing_it(sigma: float, rate: float) -> None:
    with_it, without = [(0.0, 1 - rate), (1.0, rate)], [(0.0, 1.0)]
    for steps in (1, 30):
        adding = _pair_epsilon(without, with_it, sigma=sigma, steps=steps)
        removing = _pair_epsilon(with_it, without, sigma=sigma, steps=steps)
        bound = prv_epsilon([GaussianSteps(sigma, rate, steps)], delta=DELTA)

        assert bound is not None
        assert adding <= removing <= bound <= removing + 0.02
