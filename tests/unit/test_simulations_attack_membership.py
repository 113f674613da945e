"""Membership inference: areas and rates by hand, DeLong's variance by its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm
from torchmetrics.functional.classification import binary_auroc

from common.prompts import IGNORE
from simulations.attack.membership import (
    area_under_roc,
    attack_membership,
    roc_points,
    true_positive_rate,
)
from simulations.attack.record_losses import least_likely_losses

SCORES = st.lists(st.integers(-3, 3), min_size=2, max_size=30).map(
    lambda values: np.array(values, dtype=np.float64)
)


def test_area_by_hand() -> None:
    """Of 2 x 3 pairs the member is above in 4 and level in 1."""
    auc = area_under_roc(np.array([2.0, 1.0]), np.array([0.0, 1.0, 1.5]), confidence=0.95)
    assert auc.value == pytest.approx(4.5 / 6)


@given(SCORES, SCORES)
def test_area_and_interval_are_delongs_and_torchmetrics(
    members: np.ndarray, nonmembers: np.ndarray
) -> None:
    auc = area_under_roc(members, nonmembers, confidence=0.95)
    target = torch.tensor([1] * len(members) + [0] * len(nonmembers))
    # torchmetrics takes scores outside 0..1 through a sigmoid, which keeps their order.
    reference = binary_auroc(torch.tensor(np.concatenate([members, nonmembers]) * 0.1), target)
    assert auc.value == pytest.approx(float(reference), abs=1e-6)
    if auc.value in (0.0, 1.0):
        return

    wins = (members[:, None] > nonmembers) + 0.5 * (members[:, None] == nonmembers)
    by_member, by_nonmember = wins.mean(axis=1), wins.mean(axis=0)
    variance = by_member.var(ddof=1) / len(members) + by_nonmember.var(ddof=1) / len(nonmembers)
    half = norm.ppf(0.975) * np.sqrt(variance)
    assert auc.low == pytest.approx(max(0, wins.mean() - half), abs=1e-9)
    assert auc.high == pytest.approx(min(1, wins.mean() + half), abs=1e-9)


def test_a_few_records_that_are_all_told_apart_are_no_certainty() -> None:
    """Three pairs of three: 0.025^(1/3) = 0.2924."""
    members, others = np.array([4.0, 5.0, 6.0]), np.array([1.0, 2.0, 3.0, 0.0])
    all_right = area_under_roc(members, others, confidence=0.95)
    all_wrong = area_under_roc(others, members, confidence=0.95)
    assert (all_right.low, all_right.high) == (pytest.approx(0.2924, abs=1e-4), 1.0)
    assert (all_wrong.low, all_wrong.high) == (0.0, pytest.approx(0.7076, abs=1e-4))
    level = area_under_roc(np.ones(1), np.ones(9), confidence=0.95)
    assert (level.value, level.low, level.high) == (0.5, 0.0, 1.0)


def test_rate_at_one_percent_by_hand() -> None:
    """Of 200 non-members 2 may be taken: the threshold is the third highest, 197, and 3 of 10 exceed it."""
    nonmembers = np.arange(200, dtype=np.float64)
    members = np.array([197.5, 198.5, 400, *[0.0] * 7])
    rate = true_positive_rate(members, nonmembers, confidence=0.95)
    assert rate.value == pytest.approx(0.3)
    # Clopper and Pearson's interval for 3 of 10.
    assert (rate.low, rate.high) == (
        pytest.approx(0.0667, abs=1e-4),
        pytest.approx(0.6525, abs=1e-4),
    )


@given(SCORES, SCORES)
def test_the_curve_rises_from_corner_to_corner(members: np.ndarray, nonmembers: np.ndarray) -> None:
    points = roc_points(members, nonmembers)
    assert points[0] == (0.0, 0.0)
    assert points[-1] == (1.0, 1.0)
    assert list(points) == sorted(points)
    for fpr, tpr in points[1:-1]:
        thresholds = set(members) | set(nonmembers)
        assert any(
            fpr == (nonmembers >= t).mean() and tpr == (members >= t).mean() for t in thresholds
        )


def test_a_long_curve_has_at_most_200_points_and_keeps_few_false_positives() -> None:
    random = np.random.default_rng(0)
    points = roc_points(random.normal(1, 1, 5000), random.normal(0, 1, 5000))
    assert 100 < len(points) <= 200
    assert sum(0 < fpr <= 0.01 for fpr, _ in points) >= 20


def test_members_that_all_score_higher_are_found_and_equal_ones_are_not() -> None:
    found = attack_membership("x", np.ones(50), np.zeros(60))
    assert (found.auc.value, found.tpr_at_1pct_fpr.value) == (1.0, 1.0)
    nothing = attack_membership("x", np.zeros(50), np.zeros(60))
    assert nothing.auc.value == 0.5
    assert nothing.tpr_at_1pct_fpr.value == 0.0


def test_scores_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match="0 members and 3 non-members"):
        attack_membership("x", np.zeros(0), np.zeros(3))
    with pytest.raises(ValueError, match="not finite"):
        attack_membership("x", np.array([np.nan]), np.zeros(3))


def test_least_likely_tokens_by_hand() -> None:
    """Ten answer tokens of losses ln 2, but two of ln 8: the least likely fifth has ln 8."""
    vocabulary = 8
    likely = torch.full((11, vocabulary), -1e9)
    likely[:, :2] = 0.0
    likely[[2, 5]] = 0.0
    labels = torch.zeros((1, 11), dtype=torch.int64)
    labels[0, 0] = IGNORE
    found = least_likely_losses(likely[None], labels)
    assert found.tolist() == pytest.approx([np.log(8)])
    assert least_likely_losses(likely[None], torch.full((1, 11), IGNORE)).tolist() == [0.0]
