"""Membership inference: how well scores tell the records that were trained on from those that were not."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest, norm, rankdata  # type: ignore[import-untyped]

from simulations.attack.guessing import Scores

# The share of non-members that may be taken for members.
_FALSE_POSITIVES = 0.01
_ROC_POINTS = 200


@dataclass(frozen=True, slots=True)
class Interval:
    """A value between the ends of its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class MembershipAttack:
    """One attack's success; chance gives an auc of 0.5 and a tpr_at_1pct_fpr of 0.01.

    roc: (false positive rate, true positive rate), rising.
    """

    name: str
    members: int
    nonmembers: int
    confidence: float
    auc: Interval
    tpr_at_1pct_fpr: Interval
    roc: tuple[tuple[float, float], ...]


def attack_membership(
    name: str, members: Scores, nonmembers: Scores, *, confidence: float = 0.95
) -> MembershipAttack:
    """Return how well scores tell members apart; higher looks more like a member.

    Raises ValueError when either is empty or a score is not finite.
    """
    if not len(members) or not len(nonmembers):
        raise ValueError(
            f"{len(members)} members and {len(nonmembers)} non-members; both are needed"
        )
    if not (np.isfinite(members).all() and np.isfinite(nonmembers).all()):
        raise ValueError("a score is not finite; the model gives no likelihood to some record")
    return MembershipAttack(
        name=name,
        members=len(members),
        nonmembers=len(nonmembers),
        confidence=confidence,
        auc=area_under_roc(members, nonmembers, confidence=confidence),
        tpr_at_1pct_fpr=true_positive_rate(members, nonmembers, confidence=confidence),
        roc=roc_points(members, nonmembers),
    )


def area_under_roc(members: Scores, nonmembers: Scores, *, confidence: float) -> Interval:
    """Return the chance that a member scores above a non-member (a tie counts half), with its interval.

    The interval is normal with the variance of DeLong et al. (Biometrics 44, 1988), from midranks as in
    Sun and Xu (IEEE Signal Processing Letters 21, 2014), cut to 0..1. That variance is 0 where the area is
    0 or 1, however few the scores are: there k = min(m, n) separate pairs, all of them alike, bound the area
    at (1 - confidence) / 2 to the power of 1 / k (Clopper and Pearson). One score alone has no variance.
    """
    m, n = len(members), len(nonmembers)
    together = rankdata(np.concatenate([members, nonmembers]))
    # Of each member the share of non-members below it, of each non-member the share of members above.
    above = (together[:m] - rankdata(members)) / n
    below = 1 - (together[m:] - rankdata(nonmembers)) / m
    value = float(above.mean())
    if value in (0.0, 1.0):
        reach = 1 - ((1 - confidence) / 2) ** (1 / min(m, n))
        return Interval(value, max(0.0, value - reach), min(1.0, value + reach))
    if min(m, n) < 2:
        return Interval(value, 0.0, 1.0)
    variance = sum(part.var(ddof=1) / len(part) for part in (above, below))
    half = float(norm.ppf((1 + confidence) / 2) * np.sqrt(variance))
    return Interval(value, max(0.0, value - half), min(1.0, value + half))


def true_positive_rate(members: Scores, nonmembers: Scores, *, confidence: float) -> Interval:
    """Return the share of members above a threshold that at most 1 % of the non-members exceed.

    The interval is that of Clopper and Pearson (Biometrika 26, 1934), at that threshold as it stands.
    """
    allowed = int(_FALSE_POSITIVES * len(nonmembers))
    threshold = np.sort(nonmembers)[::-1][allowed]
    found = int((members > threshold).sum())
    interval = binomtest(found, len(members)).proportion_ci(confidence, method="exact")
    return Interval(found / len(members), float(interval.low), float(interval.high))


def roc_points(members: Scores, nonmembers: Scores) -> tuple[tuple[float, float], ...]:
    """Return at most 200 points of the curve, from (0, 0) to (1, 1), dense at few false positives too."""
    thresholds = np.unique(np.concatenate([members, nonmembers]))[::-1]
    fpr = _share_from(nonmembers, thresholds)
    tpr = _share_from(members, thresholds)
    wanted = np.concatenate([np.geomspace(1e-4, 1, _ROC_POINTS // 2), np.linspace(0, 1, 98)])
    # The last point whose false positives do not exceed each of the wanted ones.
    kept = np.unique(np.searchsorted(fpr, wanted, side="right") - 1)
    points = [(float(fpr[i]), float(tpr[i])) for i in kept if i >= 0]
    return ((0.0, 0.0), *points, *(() if points[-1:] == [(1.0, 1.0)] else ((1.0, 1.0),)))


def _share_from(scores: Scores, thresholds: Scores) -> npt.NDArray[np.float64]:
    """Of scores, the share at or above each threshold."""
    counts = len(scores) - np.searchsorted(np.sort(scores), thresholds, side="left")
    shares: npt.NDArray[np.float64] = counts / len(scores)
    return shares
