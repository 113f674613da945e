"""The one-run bound on epsilon, against its definition and small cases done by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from simulations.attack.bound import lower_bound, p_value

COUNTS = st.integers(1, 60).flatmap(lambda r: st.tuples(st.just(r), st.integers(0, r)))


def _right(epsilon: float) -> float:
    return math.exp(epsilon) / (1 + math.exp(epsilon))


def test_ten_of_ten_by_hand() -> None:
    """p^10 = 0.05 at p = 0.05^(1/10) = 0.7411, and ln(0.7411 / 0.2589) = 1.052."""
    chance = 0.05**0.1
    bound = lower_bound(canaries=10, guesses=10, correct=10, delta=0.0)
    assert bound == pytest.approx(math.log(chance / (1 - chance)), abs=2e-4)


def test_half_right_shows_nothing() -> None:
    assert lower_bound(canaries=1000, guesses=400, correct=200, delta=0.0) == 0.0


def test_the_delta_term_by_hand() -> None:
    """Two guesses at epsilon 0, both right: P[W>=2] = 1/4; P[W=1]/1 = 1/2, P[0<=W<2]/2 = 3/8."""
    chance = p_value(canaries=5, guesses=2, correct=2, epsilon=0.0, delta=0.01)
    assert chance == pytest.approx(0.25 + 2 * 5 * 0.01 * 0.5)


@given(COUNTS, st.floats(0, 4))
def test_randomised_response_is_overrated_with_a_chance_of_five_percent_at_most(
    counts: tuple[int, int], epsilon: float
) -> None:
    """It is (epsilon, 0)-DP and guesses as well as the theorem allows."""
    guesses, _ = counts
    overrated = sum(
        binom.pmf(correct, guesses, _right(epsilon))
        for correct in range(guesses + 1)
        if lower_bound(canaries=guesses, guesses=guesses, correct=correct, delta=0.0) > epsilon
    )
    assert overrated <= 0.05 + 1e-9


@given(st.integers(1, 40), st.floats(0, 3), st.floats(0, 0.05))
def test_a_mechanism_that_gives_away_all_with_chance_delta_is_not_overrated(
    guesses: int, epsilon: float, delta: float
) -> None:
    """Randomised response that shows all coins with chance delta: (epsilon, delta)-DP, and correlated."""

    def overrated(correct: int) -> bool:
        bound = lower_bound(canaries=guesses, guesses=guesses, correct=correct, delta=delta)
        return bound > epsilon

    chance = (1 - delta) * sum(
        binom.pmf(correct, guesses, _right(epsilon))
        for correct in range(guesses + 1)
        if overrated(correct)
    )
    assert chance + delta * overrated(guesses) <= 0.05 + 1e-9


@given(COUNTS, st.floats(0, 0.01))
def test_more_correct_never_bounds_lower_and_more_delta_never_higher(
    counts: tuple[int, int], delta: float
) -> None:
    guesses, correct = counts
    canaries = 2 * guesses
    bound = lower_bound(canaries=canaries, guesses=guesses, correct=correct, delta=delta)
    assert bound <= lower_bound(canaries=canaries, guesses=guesses, correct=correct, delta=0.0)
    if correct < guesses:
        more = lower_bound(canaries=canaries, guesses=guesses, correct=correct + 1, delta=delta)
        assert bound <= more + 2e-4


def test_counts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="3 correct of 2 guesses on 5 canaries"):
        lower_bound(canaries=5, guesses=2, correct=3, delta=0.0)
    with pytest.raises(ValueError, match="confidence 1"):
        lower_bound(canaries=5, guesses=2, correct=1, delta=0.0, confidence=1)
    with pytest.raises(ValueError, match="delta -0.1"):
        p_value(canaries=5, guesses=2, correct=1, epsilon=1.0, delta=-0.1)
