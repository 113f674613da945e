"""Which coins to guess, fixed before it is seen how they fell, and how many of the guesses are right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from common.seeding import derive_seed
from server.audit_verdict import exceeds_ledger
from simulations.attack.bound import lower_bound

Scores: TypeAlias = npt.NDArray[np.float64]
Coins: TypeAlias = npt.NDArray[np.bool_]

# Shares of the canaries that may be guessed at either end.
_SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
# Fewer right guesses than this show little at 95 %.
_FEWEST = 20
_REHEARSALS = 4


@dataclass(frozen=True, slots=True)
class GuessRule:
    """Guess "in" for the so many highest scores and "out" for the so many lowest; abstain from the rest."""

    highest: int
    lowest: int

    @property
    def guesses(self) -> int:
        """How many coins are guessed."""
        return self.highest + self.lowest


@dataclass(frozen=True, slots=True)
class Rehearsed:
    """The rule that rehearsals chose. epsilon_lower: that it bounds on average where all is as claimed."""

    rule: GuessRule
    epsilon_lower: float


@dataclass(frozen=True, slots=True)
class Audit:
    """What one audit found. epsilon_lower: the mechanism's own exceeds it, at `delta` and `confidence`.

    ledger_epsilon_at_delta: what the ledger counts for the same steps; None without protection.
    epsilon_rehearsed: what the same audit shows of a mechanism that is what it is claimed to be, its power;
    None where nobody rehearsed.
    """

    name: str
    canaries: int
    guesses: int
    correct: int
    confidence: float
    epsilon_lower: float
    delta: float
    ledger_epsilon_at_delta: float | None
    epsilon_rehearsed: float | None = None

    @property
    def exceeds_ledger(self) -> bool:
        """Whether the training gave away more than its ledger says."""
        return exceeds_ledger(self.epsilon_lower, self.ledger_epsilon_at_delta)


def count_correct(scores: Scores, coins: Coins, rule: GuessRule) -> int:
    """Return how many of a rule's guesses are right. scores: higher looks more like "in"; coins: who is."""
    order = np.argsort(scores, kind="stable")
    lowest, highest = order[: rule.lowest], order[len(order) - rule.highest :]
    return int((~coins[lowest]).sum() + coins[highest].sum())


def guess_rules(canaries: int) -> list[GuessRule]:
    """Return the rules that are worth trying on so many canaries: either end alone, or both."""
    counts = sorted({round(share * canaries) for share in _SHARES})
    counts = [count for count in counts if _FEWEST <= count <= canaries // 2] or [canaries // 2]
    both = [GuessRule(count, count) for count in counts]
    return [*both, *(GuessRule(count, 0) for count in counts)]


def rehearsed_rule(
    rehearse: Callable[[np.random.Generator], tuple[Scores, Coins]],
    *,
    delta: float,
    confidence: float,
    seed: int,
) -> Rehearsed:
    """Return the rule that bounds highest, on average, in rehearsals that know no real coin.

    rehearse: draws scores and coins as a mechanism would that is what it is claimed to be.
    """
    # Streams of their own: a rehearsal with the real coins would be no rehearsal.
    seeds = [derive_seed(seed, "attack", "rehearsal", number) for number in range(_REHEARSALS)]
    draws = [rehearse(np.random.default_rng(one)) for one in seeds]

    def mean_bound(rule: GuessRule) -> float:
        return sum(_bound(*draw, rule, delta, confidence) for draw in draws) / len(draws)

    best = max(guess_rules(len(draws[0][0])), key=mean_bound)
    return Rehearsed(best, mean_bound(best))


def audit_scores(
    name: str,
    scores: Scores,
    coins: Coins,
    *,
    rules: Sequence[GuessRule],
    delta: float,
    ledger_epsilon: float | None,
    confidence: float = 0.95,
) -> Audit:
    """Return the audit of scores under rules fixed before: the best of them, corrected for their number.

    With n rules each is held to a chance of (1 - confidence) / n of being wrong (Bonferroni).
    """
    corrected = 1 - (1 - confidence) / len(rules)
    found = [(_bound(scores, coins, rule, delta, corrected), rule) for rule in rules]
    # Where no rule shows anything, the one that guesses most says so best.
    bound, best = max(found, key=lambda pair: (pair[0], pair[1].guesses))
    return Audit(
        name=name,
        canaries=len(scores),
        guesses=best.guesses,
        correct=count_correct(scores, coins, best),
        confidence=confidence,
        epsilon_lower=bound,
        delta=delta,
        ledger_epsilon_at_delta=ledger_epsilon,
    )


def _bound(scores: Scores, coins: Coins, rule: GuessRule, delta: float, confidence: float) -> float:
    return lower_bound(
        canaries=len(scores),
        guesses=rule.guesses,
        correct=count_correct(scores, coins, rule),
        delta=delta,
        confidence=confidence,
    )
