"""Guesses that are fixed before: what they count, and that several of them are paid for."""

from __future__ import annotations

import numpy as np
import pytest

from simulations.attack.bound import lower_bound
from simulations.attack.guessing import (
    GuessRule,
    audit_scores,
    count_correct,
    guess_rules,
    rehearsed_rule,
)
from simulations.attack.record_canaries import canary_prompts, fair_coins


def test_guesses_by_hand() -> None:
    """The two highest are in and out, the lowest is out: two of three guesses are right."""
    scores = np.array([0.5, 3.0, -1.0, 2.0])
    coins = np.array([True, True, False, False])
    assert count_correct(scores, coins, GuessRule(highest=2, lowest=1)) == 2
    assert count_correct(scores, coins, GuessRule(highest=0, lowest=1)) == 1


def test_the_best_of_several_rules_is_held_to_its_share_of_the_error() -> None:
    random = np.random.default_rng(0)
    coins = random.random(1000) < 0.5
    scores = coins + random.standard_normal(1000)
    rules = guess_rules(1000)
    audit = audit_scores("x", scores, coins, rules=rules, delta=1e-5, ledger_epsilon=1.0)
    found = {"canaries": 1000, "guesses": audit.guesses, "correct": audit.correct, "delta": 1e-5}
    assert len(rules) > 10
    assert audit.epsilon_lower == lower_bound(**found, confidence=1 - 0.05 / len(rules))  # type: ignore[arg-type]
    assert 0 < audit.epsilon_lower < lower_bound(**found)  # type: ignore[arg-type]
    assert audit.exceeds_ledger == (audit.epsilon_lower > 1.0)


def test_scores_that_know_nothing_bound_nothing_in_nineteen_of_twenty_audits() -> None:
    random = np.random.default_rng(1)
    bounds = []
    for _ in range(200):
        coins, scores = random.random(400) < 0.5, random.standard_normal(400)
        audit = audit_scores(
            "x", scores, coins, rules=guess_rules(400), delta=1e-5, ledger_epsilon=None
        )
        bounds.append(audit.epsilon_lower)
    # At most 10 in the mean; with this seed 7, and 38 without the correction.
    assert sum(bound > 0 for bound in bounds) <= 10


def test_where_nothing_is_shown_the_most_guesses_are_reported() -> None:
    coins = np.arange(400) % 2 == 0
    audit = audit_scores(
        "x", np.zeros(400), coins, rules=guess_rules(400), delta=1e-5, ledger_epsilon=None
    )
    assert (audit.epsilon_lower, audit.guesses, audit.correct) == (0.0, 400, 200)


@pytest.mark.parametrize("canaries", [1, 7, 30, 2000])
def test_rules_fit_the_canaries(canaries: int) -> None:
    for rule in guess_rules(canaries):
        assert rule.highest + rule.lowest == rule.guesses <= canaries


def test_a_rehearsal_leaves_alone_the_end_that_tells_nothing() -> None:
    """Where a tenth of the canaries that are in show up, and nothing else does, those are guessed."""

    def rehearse(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        coins = random.random(4000) < 0.5
        return 10.0 * (coins & (random.random(4000) < 0.1)), coins

    found = rehearsed_rule(rehearse, delta=1e-5, confidence=0.95, seed=0)
    assert found.rule.lowest == 0
    assert 80 <= found.rule.highest <= 200
    # 80 that are all right bound higher than 2, and none but those.
    assert 2.0 < found.epsilon_lower < 5.0


def test_canaries_and_coins_are_their_seeds() -> None:
    assert canary_prompts(3, seed=4) == canary_prompts(3, seed=4)
    assert canary_prompts(3, seed=4)[0].output != canary_prompts(3, seed=5)[0].output
    coins = fair_coins(2000, seed=0, stream="one")
    assert (coins == fair_coins(2000, seed=0, stream="one")).all()
    assert (coins != fair_coins(2000, seed=0, stream="two")).any()
    assert 900 < coins.sum() < 1100
