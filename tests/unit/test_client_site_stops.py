"""What stops a task at a site: time, a later round, a full disk. What is then owed, and to whom."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from client.gate import Gate
from client.ledger import Ledger
from client.training import Workbench
from client.turn import Caller
from client.withdrawals import Withdrawals
from common.errors import ConsiliumError, ExpiredError, OvertakenError, PolicyError
from common.records import Envelope, Reply, Task, open_reply
from tests.unit.hospital import Hospital, make_hospital


@pytest.fixture
def hospital(tmp_path: Path, tiny_model_dir: Path) -> Hospital:
    return make_hospital(tmp_path / "north", tiny_model_dir)


def _ask(hospital: Hospital, task: Task) -> tuple[Reply, Envelope]:
    site = hospital.open()
    answer = site.answer(hospital.seal(task))
    return open_reply(answer, task=task, site="north", public_hex=site.public_key), answer


def _rows(hospital: Hospital) -> list[Any]:
    return Ledger(hospital.folder / "state" / "ledger.sqlite").rows("notes")


def _stopping(error: ConsiliumError, *, at: int = 1) -> Callable[..., Any]:
    """Training that really trains, and whose step callback raises at step `at`."""
    whole = Workbench.train

    def train(bench: Workbench, *args: Any, on_step: Callable[[int], None], **kwargs: Any) -> Any:
        def stop(step: int) -> None:
            on_step(step)
            if step == at:
                raise error

        return whole(bench, *args, on_step=stop, **kwargs)

    return train


def test_a_task_whose_time_is_over_is_refused_and_charges_nothing(hospital: Hospital) -> None:
    """A clock that is ahead looks the same: the coordinator is told by a code that it can act on."""
    task = hospital.task()
    answer = hospital.open().answer(hospital.seal(task), now_s=task.expires_at + 5.0)

    reply = open_reply(answer, task=task, site="north", public_hex=hospital.open().public_key)
    assert reply.error_code == "expired"
    assert _rows(hospital) == []


def test_training_stops_when_nobody_waits_any_more_and_may_be_asked_again(
    hospital: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time comes from the task and runs by a clock that nobody sets."""
    steps: list[int] = []
    jumps = [0.0]
    monotonic = time.monotonic
    monkeypatch.setattr("client.turn.time.monotonic", lambda: monotonic() + jumps[0])
    whole = Workbench.train

    def train(bench: Workbench, *args: Any, on_step: Callable[[int], None], **kwargs: Any) -> Any:
        def watch(step: int) -> None:
            steps.append(step)
            jumps[0] = 1e6
            on_step(step)

        return whole(bench, *args, on_step=watch, **kwargs)

    task = hospital.task()
    with monkeypatch.context() as patch:
        patch.setattr(Workbench, "train", train)
        stopped, answer = _ask(hospital, task)
    assert stopped.error_code == "expired"
    assert answer.adapter == b""
    assert len(steps) == 1
    (row,) = _rows(hospital)
    assert row.state == "reserved"

    jumps[0] = 0.0
    again, _ = _ask(hospital, replace(task, attempt=2))
    assert again.error_code == ""
    assert [(row.state, row.task_id) for row in _rows(hospital)] == [("released", task.task_id)]


def test_a_task_that_was_overtaken_is_settled_and_never_trained_again(
    hospital: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = hospital.task(1), hospital.task(2)
    with monkeypatch.context() as patch:
        patch.setattr(Workbench, "train", _stopping(OvertakenError("round 2 is here")))
        reply, _ = _ask(hospital, first)
    assert reply.error_code == "overtaken"
    assert [row.state for row in _rows(hospital)] == ["reserved"]

    assert _ask(hospital, second)[0].error_code == ""
    assert [row.state for row in _rows(hospital)] == ["released", "released"]
    with monkeypatch.context() as patch:
        patch.setattr(Workbench, "train", _stopping(OvertakenError("it was trained"), at=0))
        again, answer = _ask(hospital, replace(first, attempt=2))
    assert (again.error_code, answer.adapter) == ("overtaken", b"")
    overtaken = [e.fields for e in hospital.open().audit.entries() if e.event == "overtaken"]
    assert [(fields["task_id"], fields["round"]) for fields in overtaken] == [(first.task_id, 1)]
    # What it was charged for stays charged: a third round's epsilon counts all three.
    assert len(_rows(hospital)) == 2


def test_what_another_run_left_open_is_its_own(
    hospital: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Workbench, "train", _stopping(ExpiredError("time is over")))
        _ask(hospital, hospital.task(1))
    _ask(hospital, hospital.task(2, run_uid="run-2"))
    assert [row.state for row in _rows(hospital)] == ["reserved", "released"]


def test_a_disk_without_room_for_the_result_costs_nothing(
    hospital: Hospital, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full = shutil.disk_usage("/")._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: full)
        refused, _ = _ask(hospital, hospital.task())
    assert refused.error_code == "disk"
    assert "1,000 bytes free, and this task needs" in caplog.text
    assert _rows(hospital) == []
    assert _ask(hospital, hospital.task())[0].error_code == ""


def test_a_task_that_waited_for_its_turn_is_judged_again(
    hospital: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meanwhile the hospital declined, or another task took the last steps of what was approved."""
    judged: list[str] = []
    whole = Gate.consider

    def consider(gate: Gate, task: Task, *, signer: str) -> Any:
        judged.append(task.task_id)
        if len(judged) > 1:
            raise PolicyError("this hospital declined the run while its task waited")
        return whole(gate, task, signer=signer)

    monkeypatch.setattr(Gate, "consider", consider)
    reply, _ = _ask(hospital, hospital.task())
    assert reply.error_code == "policy"
    assert _rows(hospital) == []


def test_what_the_hospital_left_while_it_was_trained_does_not_leave(
    hospital: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last step is done, and the hospital's people withdraw before the reply is signed."""
    whole = Workbench.train

    def then_withdraw(*args: Any, **kwargs: Any) -> Any:
        trained = whole(*args, **kwargs)
        Withdrawals(hospital.folder).add(hospital.coordinator.public_hex)
        return trained

    monkeypatch.setattr(Workbench, "train", then_withdraw)
    reply, answer = _ask(hospital, hospital.task())
    assert (reply.error_code, bytes(answer.adapter)) == ("policy", b"")
    assert [row.state for row in _rows(hospital)] == ["reserved"]


def test_what_was_stopped_after_its_last_step_does_not_leave_either(hospital: Hospital) -> None:
    site, task, steps = hospital.open(), hospital.task(), []

    # Gone as soon as the last step was told.
    caller = Caller(is_there=lambda: len(steps) < 2, on_step=steps.append)
    answer = site.answer(hospital.seal(task), caller=caller)
    reply = open_reply(answer, task=task, site="north", public_hex=site.public_key)
    assert (steps, reply.error_code, bytes(answer.adapter)) == ([1, 2], "cancelled", b"")
    # Asked again by somebody who waits, it is answered under the one charge.
    again, _ = _ask(hospital, task)
    assert again.error_code == ""
    assert [row.state for row in _rows(hospital)] == ["released"]


def test_an_adapter_is_taken_for_a_task_that_will_be_trained_and_no_larger(
    hospital: Hospital,
) -> None:
    site, signer = hospital.open(), hospital.coordinator.public_hex
    size = len(hospital.adapter.to_safetensors())
    assert size <= site.adapter_limit(hospital.task(), signer) < 3 * size + 20_000
    describe = hospital.task(0, kind="describe", site="")
    expired = hospital.task(expires_at=int(time.time()) - 5)
    forbidden = hospital.task(settings={"train.local-steps": 10**6})
    assert [site.adapter_limit(one, signer) for one in (describe, expired, forbidden)] == [0, 0, 0]


def test_the_replies_of_a_runs_newest_rounds_are_kept_and_no_others(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    """A hospital's disk would fill up with what no coordinator asks for any more."""
    hospital = make_hospital(
        tmp_path / "north", tiny_model_dir,
        settings={"train.rounds": 6, "privacy.noise-multiplier": 5.0},
    )  # fmt: skip
    answers = {round_: _ask(hospital, hospital.task(round_))[1] for round_ in range(1, 7)}
    kept = list((hospital.folder / "state" / "outbox").glob("*/adapter.safetensors"))
    assert len(kept) == 4
    for round_, answer in answers.items():
        reply, again = _ask(hospital, hospital.task(round_))
        if round_ <= 2:
            assert (reply.error_code, again.adapter) == ("overtaken", b"")
        else:
            assert (reply.error_code, again.adapter) == ("", answer.adapter)
    # None of it was charged or trained twice.
    assert [row.state for row in _rows(hospital)] == ["released"] * 6
