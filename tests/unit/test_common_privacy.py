"""Privacy accounting: reference numbers, laws of composition, calibration."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import prv
from common.errors import PrivacyError
from common.privacy import (
    EpsilonBounds,
    GaussianSteps,
    as_substitution,
    calibrate_noise,
    coalesce,
    compose_epsilon,
    epsilon_bounds,
    public_sample_rate,
    rdp_epsilon,
    steps_that_fit,
)
from common.prv import prv_curve

# DESIGN section 7: q = 0.032, sigma = 0.8, delta = 1e-5; 10 rounds of 30 steps.
ROUND = GaussianSteps(noise_multiplier=0.8, sample_rate=0.032, steps=30)
RUN = GaussianSteps(noise_multiplier=0.8, sample_rate=0.032, steps=300)
DELTA = 1e-5

Accountant = Literal["prv", "rdp"]
accountants = pytest.mark.parametrize("accountant", ["prv", "rdp"])

sigmas = st.floats(0.5, 4.0)
rates = st.floats(0.001, 0.5)
steps_ = st.integers(1, 500)


def _rdp(*parts: GaussianSteps, delta: float = DELTA) -> float:
    return compose_epsilon(parts, delta=delta, accountant="rdp")


def test_reference_run_has_the_published_epsilon() -> None:
    assert compose_epsilon([RUN], delta=DELTA) == pytest.approx(5.96, abs=0.01)
    assert compose_epsilon([RUN], delta=DELTA, accountant="rdp") == pytest.approx(6.80, abs=0.01)
    assert compose_epsilon([ROUND], delta=DELTA) == pytest.approx(2.74, abs=0.01)


def test_plain_gaussian_mechanism_is_bounded_from_below_by_the_exact_formula() -> None:
    # Balle and Wang 1805.06530, theorem 8: sigma = 1, sensitivity 1, epsilon = 4.376 is exact at 1e-5.
    exact = 4.3766

    def delta_of(epsilon: float) -> float:
        def phi(x: float) -> float:
            return 0.5 * math.erfc(-x / math.sqrt(2))

        return phi(0.5 - epsilon) - math.exp(epsilon) * phi(-0.5 - epsilon)

    assert delta_of(exact) == pytest.approx(DELTA, rel=0.01)
    once = [GaussianSteps(1.0, 1.0, 1)]
    assert exact - 0.001 <= compose_epsilon(once, delta=DELTA) <= exact + 0.02
    assert exact <= compose_epsilon(once, delta=DELTA, accountant="rdp")


@accountants
def test_ten_rounds_compose_to_the_whole_run_and_not_to_ten_times_one(
    accountant: Accountant,
) -> None:
    rounds = compose_epsilon([ROUND] * 10, delta=DELTA, accountant=accountant)

    assert rounds == compose_epsilon([RUN], delta=DELTA, accountant=accountant)
    assert rounds < 10 * compose_epsilon([ROUND], delta=DELTA, accountant=accountant) / 4


@accountants
def test_different_mechanisms_compose_in_any_order(accountant: Accountant) -> None:
    a, b = ROUND, GaussianSteps(1.2, 0.05, 20)
    both = compose_epsilon([a, b, a], delta=DELTA, accountant=accountant)

    assert both == compose_epsilon([b, a, a], delta=DELTA, accountant=accountant)
    for part in (a, b):
        assert both > compose_epsilon([part], delta=DELTA, accountant=accountant)
    assert both < 2 * compose_epsilon([a], delta=DELTA, accountant=accountant) + compose_epsilon(
        [b], delta=DELTA, accountant=accountant
    )


@settings(max_examples=8)
@given(sigmas, rates, steps_, st.floats(1.05, 2.0))
def test_more_noise_is_a_smaller_epsilon(
    sigma: float, rate: float, steps: int, factor: float
) -> None:
    noisy = _rdp(GaussianSteps(sigma * factor, rate, steps))

    assert noisy < _rdp(GaussianSteps(sigma, rate, steps))


@settings(max_examples=8)
@given(sigmas, rates, steps_, st.integers(1, 100))
def test_more_steps_are_a_larger_epsilon(sigma: float, rate: float, steps: int, more: int) -> None:
    longer = _rdp(GaussianSteps(sigma, rate, steps + more))

    assert longer > _rdp(GaussianSteps(sigma, rate, steps))


@pytest.mark.parametrize(
    ("sigma", "rate", "steps"), [(0.8, 0.01, 1), (0.8, 0.1, 40), (1.5, 0.01, 40), (1.5, 0.1, 1)]
)
def test_prv_obeys_the_same_laws_and_stays_below_rdp(sigma: float, rate: float, steps: int) -> None:
    here = compose_epsilon([GaussianSteps(sigma, rate, steps)], delta=DELTA)

    assert compose_epsilon([GaussianSteps(2 * sigma, rate, steps)], delta=DELTA) < here
    assert compose_epsilon([GaussianSteps(sigma, rate, 2 * steps)], delta=DELTA) > here
    assert compose_epsilon([GaussianSteps(sigma, rate, steps)], delta=DELTA / 10) > here
    # PRV reports its estimate plus an error bound of 0.01.
    assert here <= _rdp(GaussianSteps(sigma, rate, steps)) + 0.02


def test_steps_too_small_to_compute_do_not_count_as_less_than_nothing() -> None:
    # One step's divergence is rounded to -1e-16 at some orders.
    few, many = (_rdp(GaussianSteps(9000.0, 7e-9, steps)) for steps in (1, 10**17))

    assert few <= many


@accountants
def test_nothing_done_costs_nothing(accountant: Accountant) -> None:
    assert compose_epsilon([], delta=DELTA, accountant=accountant) == 0.0
    nothing = [GaussianSteps(0.8, 0.032, 0), GaussianSteps(0.0, 1.0, 0)]
    assert compose_epsilon(nothing, delta=DELTA, accountant=accountant) == 0.0


@accountants
@pytest.mark.parametrize("noise", [0.0, -0.8])
def test_one_step_without_noise_costs_everything(accountant: Accountant, noise: float) -> None:
    parts = [RUN, GaussianSteps(noise, 0.001, 1)]

    assert compose_epsilon(parts, delta=DELTA, accountant=accountant) == math.inf


@pytest.mark.parametrize("noise", [math.nan, math.inf, 1e-200])
def test_noise_that_nobody_can_have_added_protects_nothing(noise: float) -> None:
    assert compose_epsilon([GaussianSteps(noise, 0.1, 1)], delta=DELTA) == math.inf


@pytest.mark.parametrize(("noise", "rate"), [(1e12, 0.5), (1e300, 0.1), (1.0, 1e-300), (1e-3, 1.0)])
def test_the_strangest_settings_are_counted_in_bounded_time(noise: float, rate: float) -> None:
    # Opacus's series for RDP would not end for some of them.
    tame = GaussianSteps(min(noise, 1e3), max(rate, 1e-6), 10)

    epsilon = compose_epsilon([GaussianSteps(noise, rate, 10)], delta=DELTA)

    assert 0 <= epsilon <= compose_epsilon([tame], delta=DELTA)


@pytest.mark.parametrize("part", [(1.0, 0.0, 1), (1.0, 1.5, 1), (1.0, math.nan, 1), (1.0, 0.1, -1)])
def test_rates_and_steps_that_cannot_be_counted_are_refused(part: tuple[float, float, int]) -> None:
    with pytest.raises(PrivacyError, match="cannot be counted"):
        compose_epsilon([GaussianSteps(*part)], delta=DELTA)


def test_equal_mechanisms_are_coalesced_in_one_order() -> None:
    other = GaussianSteps(1.2, 0.05, 20)

    assert (
        coalesce([ROUND, other, ROUND])
        == coalesce([other, ROUND, ROUND])
        == (
            GaussianSteps(0.8, 0.032, 60),
            other,
        )
    )


def test_both_bounds_are_kept_and_the_smaller_one_counts() -> None:
    bounds = epsilon_bounds([RUN], delta=DELTA)

    assert bounds.prv == pytest.approx(5.96, abs=0.01)
    assert bounds.rdp == pytest.approx(6.80, abs=0.01)
    assert bounds.least == bounds.prv == compose_epsilon([RUN], delta=DELTA)
    assert EpsilonBounds(prv=2.0, rdp=1.5).least == 1.5
    assert EpsilonBounds(None, 3.0).least == 3.0
    assert epsilon_bounds([], delta=DELTA) == EpsilonBounds(0.0, 0.0)


def test_substitution_counts_with_half_the_noise() -> None:
    assert as_substitution(ROUND) == GaussianSteps(0.4, 0.032, 30)


@accountants
@pytest.mark.parametrize("cap", [2.0, 6.0, 9.3])
def test_the_steps_that_fit_fit_and_one_more_does_not(accountant: Accountant, cap: float) -> None:
    spent, more = [ROUND], GaussianSteps(1.0, 0.05, 1)

    steps = steps_that_fit(
        spent, more, at_most=5000, max_epsilon=cap, delta=DELTA, accountant=accountant
    )

    def together(count: int) -> float:
        whole = [*spent, GaussianSteps(1.0, 0.05, count)]
        return compose_epsilon(whole, delta=DELTA, accountant=accountant)

    assert together(steps) <= cap or steps == 0
    assert together(steps + 1) > cap
    assert (steps == 0) == (cap == 2.0)


def test_what_the_search_finds_is_checked_by_what_will_decide(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spent, more, cap = [ROUND], GaussianSteps(1.0, 0.05, 1), 6.0
    right = steps_that_fit(spent, more, at_most=5000, max_epsilon=cap, delta=DELTA)

    def hopeful(*arguments: Any, **options: Any) -> Callable[[int], float]:
        curve = prv_curve(*arguments, **options)
        assert curve is not None
        # Composing, which decides, goes the same way, and asks for no further steps.
        return (lambda steps: curve(steps) - 0.05) if options["at_most"] > 0 else curve

    monkeypatch.setattr(prv, "prv_curve", hopeful)
    found = steps_that_fit(spent, more, at_most=5000, max_epsilon=cap, delta=DELTA)

    assert 0.97 * right < found <= right


def test_no_more_steps_fit_than_are_asked_for_and_none_without_noise() -> None:
    def fitting(noise: float, at_most: int) -> int:
        more = GaussianSteps(noise, 0.05, 1)
        return steps_that_fit([ROUND], more, at_most=at_most, max_epsilon=50.0, delta=DELTA)

    assert fitting(1.0, 7) == 7
    assert fitting(1.0, 0) == 0
    assert fitting(0.0, 7) == 0
    unprotected = [GaussianSteps(0.0, 1.0, 1)]
    assert steps_that_fit(unprotected, ROUND, at_most=5, max_epsilon=50.0, delta=DELTA) == 0


def test_a_strangers_many_steps_are_searched_in_bounded_time() -> None:
    more = GaussianSteps(1.0, 0.05, 1)

    many = steps_that_fit([], more, at_most=10**12, max_epsilon=6.0, delta=DELTA)

    assert rdp_epsilon([GaussianSteps(1.0, 0.05, many)], delta=DELTA) > 6.0
    assert many == steps_that_fit([], more, at_most=5000, max_epsilon=6.0, delta=DELTA)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_delta_outside_zero_and_one_is_refused(delta: float) -> None:
    with pytest.raises(PrivacyError, match="is not between 0 and 1"):
        compose_epsilon([RUN], delta=delta)


def test_feeble_noise_is_bounded_at_once_instead_of_filling_the_memory() -> None:
    # PRV would ask for gigabytes here; a task may name any noise.
    feeble = [GaussianSteps(0.05, 0.032, 300)]

    assert compose_epsilon(feeble, delta=DELTA) == _rdp(*feeble) > 10_000
    sigma = calibrate_noise(target_epsilon=1000.0, delta=DELTA, sample_rate=0.032, steps=1)
    assert _rdp(GaussianSteps(sigma, 0.032, 1)) <= 1000.0


@pytest.mark.parametrize(
    ("target", "accountant"), [(8.0, "prv"), (1.0, "prv"), (8.0, "rdp"), (3.0, "rdp"), (0.5, "rdp")]
)
def test_calibrated_noise_meets_the_target_within_a_hundredth_and_never_exceeds_it(
    target: float, accountant: Accountant
) -> None:
    sigma = calibrate_noise(
        target_epsilon=target, delta=DELTA, sample_rate=0.032, steps=300, accountant=accountant
    )
    parts = [GaussianSteps(sigma, 0.032, 300)]

    epsilon = compose_epsilon(parts, delta=DELTA, accountant=accountant)

    assert target - 0.01 <= epsilon <= target


def test_stronger_target_takes_more_noise() -> None:
    noises = [
        calibrate_noise(
            target_epsilon=target, delta=DELTA, sample_rate=0.032, steps=300, accountant="rdp"
        )
        for target in (8.0, 3.0, 0.5)
    ]

    assert noises == sorted(noises)
    assert len(set(noises)) == 3


@accountants
def test_target_that_no_noise_reaches_is_refused_in_words(accountant: Accountant) -> None:
    with pytest.raises(PrivacyError, match=r"no noise reaches epsilon 0.001.*raise privacy.target"):
        calibrate_noise(
            target_epsilon=0.001, delta=DELTA, sample_rate=0.032, steps=3, accountant=accountant
        )


def test_sample_rate_is_the_ratio_of_public_constants_and_at_most_one() -> None:
    assert public_sample_rate(batch_size=32, declared_size=1000) == 0.032
    assert public_sample_rate(batch_size=32, declared_size=10) == 1.0


@pytest.mark.parametrize("size", [0, -5])
def test_declared_size_that_is_no_count_is_refused(size: int) -> None:
    with pytest.raises(PrivacyError, match=f"declared-size {size} is not a count"):
        public_sample_rate(batch_size=8, declared_size=size)
