"""Approvals: a run waits until the hospital said yes, and yes is for one plan."""

from __future__ import annotations

import fcntl
import math
import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from client.approvals import MAX_WAITING, Approvals, Plan, plan_of
from client.cost import RunCost
from common.canonical import canonical_json, from_canonical
from common.config import RunConfig, Scalar
from common.errors import ApprovalError, ConfigError, PolicyError, ProtocolError

COST = RunCost(
    unit="record",
    epsilon=2.5,
    delta=1e-5,
    lifetime_epsilon_after=7.25,
    rounds=3,
    steps=6,
    bytes_down=3000,
    bytes_up=3000,
    hours=0.5,
    hours_measured=False,
    more_ranks=56,
    most_bytes_down=24_000,
)
SETTINGS: dict[str, Scalar] = {"train.rounds": 3, "train.local-steps": 2, "lora.rank": 8}


def _plan(run_uid: str = "run-1", *, max_rank: int = 64, **changes: Scalar) -> Plan:
    settings = {key.replace("_", "."): value for key, value in changes.items()}
    return plan_of(
        RunConfig.parse({**SETTINGS, **settings}),
        run_uid=run_uid,
        base_digest="ab" * 32,
        coordinator="cd" * 32,
        max_rank=max_rank,
    )


def _cost() -> RunCost:
    return COST


def _ask(approvals: Approvals, plan: Plan) -> None:
    with pytest.raises(ApprovalError, match=rf"run {plan.run_uid} waits for this hospital"):
        approvals.check(plan, cost=_cost)


@pytest.fixture
def approvals(tmp_path: Path) -> Approvals:
    return Approvals(tmp_path / "approvals")


def test_a_run_waits_is_approved_and_may_begin(approvals: Approvals) -> None:
    _ask(approvals, _plan())
    _ask(approvals, _plan())
    request = approvals.approve("run-1")

    approvals.check(_plan(), cost=_cost)

    assert (request.state, request.cost, request.plan) == ("approved", COST, _plan())
    assert request.decided_at >= request.asked_at > 0


def test_a_request_of_before_frozen_ranks_were_counted_is_still_read(approvals: Approvals) -> None:
    _ask(approvals, _plan())
    path = approvals.folder / "run-1.json"
    content = from_canonical(path.read_bytes())
    for key in ("more_ranks", "most_bytes_down"):
        del content["cost"][key]
    path.write_bytes(canonical_json(content))

    assert approvals.find("run-1").cost == replace(COST, more_ranks=None, most_bytes_down=None)
    assert approvals.approve("run-1").state == "approved"


def test_a_declined_run_is_refused_for_good(approvals: Approvals) -> None:
    _ask(approvals, _plan())
    approvals.decline("run-1")

    with pytest.raises(PolicyError, match="declined run run-1; that is final"):
        approvals.check(_plan(), cost=_cost)
    with pytest.raises(ConfigError, match="was declined, which is final"):
        approvals.approve("run-1")


def test_an_approved_run_can_still_be_stopped(approvals: Approvals) -> None:
    _ask(approvals, _plan())
    approvals.approve("run-1")
    approvals.decline("run-1")

    with pytest.raises(PolicyError, match="declined"):
        approvals.check(_plan(), cost=_cost)


def test_deciding_twice_is_deciding_once(approvals: Approvals) -> None:
    _ask(approvals, _plan())

    assert approvals.approve("run-1") == approvals.approve("run-1")
    assert approvals.decline("run-1") == approvals.decline("run-1")


def test_what_was_decided_outlives_the_process(approvals: Approvals) -> None:
    _ask(approvals, _plan())
    approvals.approve("run-1")

    Approvals(approvals.folder).check(_plan(), cost=_cost)


def test_the_cost_is_computed_once(approvals: Approvals) -> None:
    _ask(approvals, _plan())

    def again() -> RunCost:
        raise AssertionError("the request holds it")

    with pytest.raises(ApprovalError, match="waits"):
        approvals.check(_plan(), cost=again)


@pytest.mark.parametrize(
    ("other", "differ"),
    [
        (_plan(train_rounds=4), "train.rounds"),
        (_plan(train_seed=1, privacy_unit="none"), "privacy.unit, train.seed"),
        (_plan(lora_rank=9), "lora.rank"),
        (replace(_plan(), base_digest="00" * 32), "base_digest"),
        (replace(_plan(), coordinator="00" * 32), "coordinator"),
    ],
)
@pytest.mark.parametrize("approved", [True, False])
def test_another_plan_under_the_same_name_is_refused_naming_what_differs(
    approvals: Approvals, other: Plan, differ: str, approved: bool
) -> None:
    """Whether it was approved or still waits: what is approved is what was shown."""
    _ask(approvals, _plan())
    if approved:
        approvals.approve("run-1")

    assert other.digest != _plan().digest
    with pytest.raises(PolicyError, match=rf"with other settings \({differ} differ\)"):
        approvals.check(other, cost=_cost)
    assert approvals.find("run-1").plan == _plan()


def test_a_lower_rank_asks_for_less(approvals: Approvals) -> None:
    _ask(approvals, _plan())
    approvals.approve("run-1")

    approvals.check(_plan(lora_rank=4), cost=_cost)


def test_a_describe_and_its_tasks_have_one_plan() -> None:
    """The describe names the run's rank, the tasks that of this site's policy."""
    described, asked = _plan(lora_rank=64, max_rank=16), _plan(lora_rank=16, max_rank=16)

    assert described.digest == asked.digest
    assert described.max_rank == 16


def test_a_setting_left_out_is_its_default() -> None:
    assert _plan(data_split="train").digest == _plan().digest


def test_an_approval_is_for_the_planned_steps(approvals: Approvals) -> None:
    _ask(approvals, _plan())
    approvals.approve("run-1")

    approvals.check_steps("run-1", charged_steps=4, asked_steps=2)
    with pytest.raises(PolicyError, match=r"for 6 steps: 5 are charged .* asks for 2 more"):
        approvals.check_steps("run-1", charged_steps=5, asked_steps=2)


def test_waiting_lists_what_nobody_decided(approvals: Approvals) -> None:
    for run_uid in ("run-1", "run-2", "run-3"):
        _ask(approvals, _plan(run_uid))
    approvals.approve("run-1")
    approvals.decline("run-3")

    assert [request.run_uid for request in approvals.waiting()] == ["run-2"]
    assert [request.state for request in approvals.all()] == ["approved", "waiting", "declined"]


def test_a_run_that_never_asked_can_be_neither_approved_nor_declined(approvals: Approvals) -> None:
    _ask(approvals, _plan())

    for decide in (approvals.approve, approvals.decline):
        with pytest.raises(ConfigError, match=r"no run run-7 has asked .*; waiting: run-1"):
            decide("run-7")


def test_requests_cannot_fill_the_disk(approvals: Approvals) -> None:
    for number in range(MAX_WAITING):
        _ask(approvals, _plan(f"run-{number}"))

    with pytest.raises(PolicyError, match=f"{MAX_WAITING} runs of this coordinator wait for"):
        approvals.check(_plan("one-more"), cost=_cost)
    assert len(list(approvals.folder.iterdir())) == MAX_WAITING
    approvals.decline("run-0")
    _ask(approvals, _plan("one-more"))


def test_one_coordinators_requests_keep_no_other_from_asking(approvals: Approvals) -> None:
    for number in range(MAX_WAITING):
        _ask(approvals, _plan(f"run-{number}"))

    _ask(approvals, replace(_plan("theirs"), coordinator="ef" * 32))

    assert approvals.find("theirs").state == "waiting"
    with pytest.raises(PolicyError, match=f"{MAX_WAITING} runs of this coordinator wait for"):
        approvals.check(_plan("one-more"), cost=_cost)


@pytest.mark.parametrize("run_uid", ["../run", "a/b", "", ".hidden", "a" * 65, "run\n"])
def test_a_runs_name_cannot_leave_the_folder(approvals: Approvals, run_uid: str) -> None:
    uses: list[Callable[[], Any]] = [
        lambda: approvals.check(replace(_plan(), run_uid=run_uid), cost=_cost),
        lambda: approvals.approve(run_uid),
        lambda: approvals.decline(run_uid),
        lambda: approvals.check_steps(run_uid, charged_steps=0, asked_steps=1),
    ]
    for use in uses:
        with pytest.raises(ProtocolError, match="a run is named by"):
            use()
    assert list(approvals.folder.iterdir()) == []


def test_a_request_is_for_the_hospital_alone(approvals: Approvals) -> None:
    _ask(approvals, _plan())

    assert stat.S_IMODE((approvals.folder / "run-1.json").stat().st_mode) == 0o600
    assert stat.S_IMODE(approvals.folder.stat().st_mode) == 0o700


def test_infinite_epsilon_is_kept_as_it_is(approvals: Approvals) -> None:
    cost = replace(COST, epsilon=math.inf, lifetime_epsilon_after=math.inf)
    with pytest.raises(ApprovalError, match="waits"):
        approvals.check(_plan(), cost=lambda: cost)

    assert approvals.find("run-1").cost == cost


@pytest.mark.parametrize(
    ("before", "after"),
    [(b"waiting", b"Approved"), (b'"cost"', b'"cst"'), (b"{", b""), (b'"settings"', b'"set"')],
)
def test_a_damaged_request_approves_nothing(
    approvals: Approvals, before: bytes, after: bytes
) -> None:
    _ask(approvals, _plan())
    path = approvals.folder / "run-1.json"
    path.write_bytes(path.read_bytes().replace(before, after, 1))

    with pytest.raises(ConfigError, match=r"run-1.json is damaged"):
        approvals.check(_plan(), cost=_cost)


def test_a_decision_made_while_the_cost_is_computed_stands(approvals: Approvals) -> None:
    """Two processes ask at once: the second must not file the run as waiting again."""

    def approved_meanwhile() -> RunCost:
        other = Approvals(approvals.folder)
        _ask(other, _plan())
        other.approve("run-1")
        return COST

    approvals.check(_plan(), cost=approved_meanwhile)

    assert approvals.find("run-1").state == "approved"


def test_many_who_ask_at_once_file_one_request_each(approvals: Approvals) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(
            pool.map(lambda n: _ask(Approvals(approvals.folder), _plan(f"run-{n % 4}")), range(32))
        )

    assert sorted(request.run_uid for request in approvals.all()) == [f"run-{n}" for n in range(4)]


def test_a_decision_waits_for_whoever_is_writing(approvals: Approvals) -> None:
    """Else a request filed at that moment could overwrite it."""
    _ask(approvals, _plan())
    descriptor = os.open(approvals.folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with ThreadPoolExecutor(1) as pool:
        decision = pool.submit(approvals.approve, "run-1")
        with pytest.raises(TimeoutError, match=r"^$"):
            decision.result(timeout=0.3)
        os.close(descriptor)

        assert decision.result(timeout=30).state == "approved"
