"""Hospitals that fail in three rounds of ten: the run goes on without them, and comes out as well."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.chaos.dropout import (
    NUM_SITES,
    QUORUM,
    ROUNDS,
    DropOut,
    Outcome,
    compared,
    everybody_answers,
    run,
    write_hospitals,
)
from tests.unit.scenarios import site_names

pytestmark = pytest.mark.chaos

# With this seed one round has a quorum to the man, and none has less.
FATE = DropOut(0.3, seed=2)


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_hospitals(tmp_path_factory.mktemp("dropout") / "scenario")


@pytest.fixture(scope="module")
def disturbed(scenario: Path) -> Outcome:
    """The run in which sites drop out."""
    return run(scenario, scenario.parent / "disturbed", FATE)


def _fates(scenario: Path, server_round: int) -> dict[str, str]:
    return {site: FATE(site, server_round) for site in site_names(scenario)}


def test_three_in_ten_sites_fail_in_each_of_three_ways(scenario: Path) -> None:
    """Else the rest would be said of a run in which little happened."""
    fates = Counter(fate for n in range(1, ROUNDS + 1) for fate in _fates(scenario, n).values())
    assert sum(fates.values()) == NUM_SITES * ROUNDS
    assert 0.25 < 1 - fates["answers"] / (NUM_SITES * ROUNDS) < 0.35
    assert min(fates["raises"], fates["silent"], fates["late"]) > 10


def test_each_round_merges_those_who_answered_in_time_and_at_least_a_quorum(
    scenario: Path, disturbed: Outcome
) -> None:
    committed = [event for event in disturbed.events if event["event"] == "round"]
    assert [event["round"] for event in committed] == list(range(1, ROUNDS + 1))
    for event in committed:
        fates = _fates(scenario, event["round"])
        assert event["sites"] == sorted(site for site in fates if fates[site] == "answers")
        assert event["replies"] == len(event["sites"]) >= QUORUM
        assert event["attempts"] == 1


def test_a_reply_that_comes_after_its_round_is_named_and_counts_in_none(
    scenario: Path, disturbed: Outcome
) -> None:
    late = [
        (event["round"], event["site"]) for event in disturbed.events if event["event"] == "late"
    ]
    assert sorted(late) == sorted(
        (n, site)
        # What is late in the last round has no round to come in.
        for n in range(1, ROUNDS)
        for site, fate in _fates(scenario, n).items()
        if fate == "late"
    )
    accepted = Counter(
        (event["round"], event["site"]) for event in disturbed.events if event["event"] == "reply"
    )
    assert set(accepted.values()) == {1}
    assert not accepted.keys() & set(late)


def test_the_loss_is_within_5_percent_of_the_run_without_drop_out(
    scenario: Path, disturbed: Outcome
) -> None:
    undisturbed = run(scenario, scenario.parent / "undisturbed", everybody_answers)
    said = compared(undisturbed, disturbed)
    assert {entry["replies"] for entry in undisturbed.rounds} == {NUM_SITES}
    learnt = undisturbed.base_loss - undisturbed.final_loss
    assert learnt > 0.1 * undisturbed.base_loss, f"nothing to lose: {said}"
    assert abs(disturbed.final_loss / undisturbed.final_loss - 1) < 0.05, said
