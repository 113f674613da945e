"""A lower bound on epsilon from one training run: how well membership of many canaries was guessed.

Each of m canaries is in or out by its own fair coin. Under (epsilon, delta)-differential privacy, whoever
guesses r of the coins is right as often as r coins that fall right with chance e^epsilon / (1 + e^epsilon),
but for a term in m * delta; an auditor who is right more often than that refutes the claim.
Source: Steinke, Nasr and Jagielski 2305.08846, theorem 5.2 and appendix D.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import binom  # type: ignore[import-untyped]

# No finite number of guesses tells such an epsilon from a larger one.
_LARGEST = 60.0
_TOLERANCE = 1e-4


def p_value(*, canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Return the most that the chance of so many correct guesses can be under (epsilon, delta)-DP.

    canaries: m, all whose coins were thrown. guesses: r, those that were not abstained from. correct: v.
    With W ~ Binomial(r, e^epsilon / (1 + e^epsilon)): P[W >= v] + 2 m delta max_i P[v - i <= W < v] / i.
    Raises ValueError when the counts do not fit each other, or epsilon or delta is out of range.
    """
    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(
            f"{correct} correct of {guesses} guesses on {canaries} canaries; none may exceed the next"
        )
    if epsilon < 0 or not 0 <= delta <= 1:
        raise ValueError(f"epsilon {epsilon} is below 0, or delta {delta} not between 0 and 1")
    right = 1 / (1 + math.exp(-epsilon))
    by_chance = float(binom.sf(correct - 1, guesses, right))
    if correct == 0 or delta == 0:
        return min(1.0, by_chance)
    below = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, right))
    worst = float((below / np.arange(1, correct + 1)).max())
    return min(1.0, by_chance + 2 * canaries * delta * worst)


def lower_bound(
    *, canaries: int, guesses: int, correct: int, delta: float, confidence: float = 0.95
) -> float:
    """Return an epsilon that the mechanism's own at `delta` exceeds, wrong with chance 1 - confidence.

    Arguments as in `p_value`; which coins to guess must not depend on how they fell. 0: nothing is shown.
    Raises ValueError as `p_value` does, or when confidence is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence} is not between 0 and 1; 0.95 is customary")

    def refuted(epsilon: float) -> bool:
        chance = p_value(
            canaries=canaries, guesses=guesses, correct=correct, epsilon=epsilon, delta=delta
        )
        return chance <= 1 - confidence

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, _LARGEST
    while high - low > _TOLERANCE:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low
