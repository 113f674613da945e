"""The site's one door: what it answers, what it refuses, what it keeps to itself."""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

import client.examples
import client.site
import client.time_limit
import client.training
from client.ledger import Ledger
from client.site import Site
from common.adapter import AdapterShape, digest_tensors, from_safetensors
from common.errors import ConfigError, ProtocolError, SignatureError
from common.records import Envelope, Reply, Task, open_reply
from common.signing import SigningKey
from tests.unit.hospital import Hospital, make_hospital


@pytest.fixture
def hospital(tmp_path: Path, tiny_model_dir: Path) -> Hospital:
    return make_hospital(tmp_path / "north", tiny_model_dir)


def _ask(hospital: Hospital, task: Task) -> tuple[Reply, Envelope]:
    answer = hospital.open().answer(hospital.seal(task))
    public = SigningKey.load(hospital.folder / "keys" / "signing.pem").public_hex
    return open_reply(answer, task=task, site="north", public_hex=public), answer


def _rows(hospital: Hospital) -> list[Any]:
    return Ledger(hospital.folder / "state" / "ledger.sqlite").rows("notes")


def _kill_at(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str, hospital: Hospital, task: Task
) -> None:
    """Ask, and end the process, as far as the site can tell, when it calls owner.name."""

    class Killed(BaseException):
        pass

    def killed(*args: object, **kwargs: object) -> None:
        raise Killed

    with monkeypatch.context() as crash:
        crash.setattr(owner, name, killed)
        with pytest.raises(Killed):
            hospital.open().answer(hospital.seal(task))


def test_a_task_is_answered_with_a_trained_adapter_and_its_privacy(hospital: Hospital) -> None:
    task = hospital.task()

    reply, answer = _ask(hospital, task)

    assert reply.error_code == ""
    shape = AdapterShape(
        {name: (p.B.shape[0], p.A.shape[1]) for name, p in hospital.adapter.pairs.items()},
        hospital.adapter.rank,
        hospital.adapter.scaling,
    )
    trained = from_safetensors(answer.adapter, shape=shape)
    assert trained.digest() == reply.adapter_digest != hospital.adapter.digest()
    assert dict(reply.numbers) == {"steps": 2}
    assert reply.privacy is not None
    assert reply.privacy.steps == 2
    assert reply.privacy.sample_rate == 4 / 12
    assert 0 < reply.privacy.epsilon < 8


def test_the_same_task_again_gives_the_same_reply_and_no_second_charge(hospital: Hospital) -> None:
    task = hospital.task()
    first, _ = _ask(hospital, task)

    retry = replace(task, attempt=2, expires_at=task.expires_at + 100)
    second, _ = _ask(hospital, retry)

    assert second.adapter_digest == first.adapter_digest
    assert second.attempt == 2
    assert second.task_sha256 == retry.sha256
    assert [row.state for row in _rows(hospital)] == ["released"]


def test_a_crash_before_the_reply_was_stored_trains_again_under_the_same_row(
    hospital: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = hospital.task()

    _kill_at(monkeypatch, client.site.Outbox, "store", hospital, task)
    assert [row.state for row in _rows(hospital)] == ["reserved"]

    reply, _ = _ask(hospital, task)

    assert reply.error_code == ""
    assert [row.state for row in _rows(hospital)] == ["released"]


def test_a_crash_after_the_reply_was_stored_sends_that_very_reply(
    hospital: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = hospital.task()

    _kill_at(monkeypatch, client.site.Ledger, "release", hospital, task)
    stored = (
        hospital.folder / "state" / "outbox" / task.task_id / "adapter.safetensors"
    ).read_bytes()

    _, answer = _ask(hospital, task)

    assert answer.adapter == stored


def test_budget_is_reserved_before_data_is_opened(
    hospital: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def load(*args: object, **kwargs: object) -> None:
        seen.append(len(_rows(hospital)))
        raise ConfigError("stop here")

    monkeypatch.setattr(client.examples, "load_records", load)
    _ask(hospital, hospital.task())

    assert seen == [1]


def test_epsilon_in_the_replies_composes_over_rounds(hospital: Hospital) -> None:
    epsilons = []
    for server_round in (1, 2, 3):
        reply, _ = _ask(hospital, hospital.task(server_round))
        assert reply.privacy is not None
        epsilons.append(reply.privacy.epsilon)
        assert reply.privacy.steps == 2 * server_round

    assert epsilons[0] < epsilons[1] < epsilons[2] <= 8.0
    assert epsilons[2] > 7.5, "calibrated once for all three rounds"


def test_q_and_sigma_do_not_change_when_a_record_is_added(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    rows = []
    for name, count in (("a", 12), ("b", 13)):
        hospital = make_hospital(tmp_path / name, tiny_model_dir, num_records=count)
        reply, _ = _ask(hospital, hospital.task())
        assert reply.privacy is not None
        rows.append((reply.privacy, dict(reply.numbers)))

    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("changes", "settings", "code"),
    [
        ({"base_digest": "0" * 64}, {}, "policy"),
        ({}, {"model.name": "other"}, "policy"),
        ({}, {"lora.rank": 65}, "policy"),
        ({}, {"train.local-steps": 10_001}, "policy"),
        ({}, {"privacy.unit": "none"}, "policy"),
        ({}, {"privacy.target-delta": 1e-3}, "policy"),
        ({}, {"privacy.target-epsilon": 50.0}, "policy"),
        ({}, {"privacy.noise-multiplier": 0.2}, "budget"),
        ({}, {"privacy.noise-multiplier": 0.0}, "config"),
        ({}, {"privacy.max-grad-norm": float("inf")}, "config"),
        ({}, {"no.such-key": 1}, "config"),
        ({}, {"lora.use-dora": True}, "config"),
        ({"server_round": 4}, {}, "policy"),
        ({"adapter_digest": "0" * 64}, {}, "signature"),
    ],
)
def test_what_the_policy_forbids_is_refused_with_a_code_and_no_text(
    hospital: Hospital, changes: Mapping[str, Any], settings: Mapping[str, Any], code: str
) -> None:
    reply, answer = _ask(hospital, hospital.task(**{**changes, "settings": settings}))

    assert reply.error_code == code
    assert len(reply.correlation_id) == 12
    assert answer.adapter == b""
    assert reply.privacy is None
    assert dict(reply.numbers) == {}


def test_a_refusal_by_policy_charges_nothing(hospital: Hospital) -> None:
    _ask(hospital, hospital.task(settings={"lora.rank": 65}))
    _ask(hospital, hospital.task(settings={"privacy.target-epsilon": 50.0}))

    assert _rows(hospital) == []


def test_nothing_is_answered_to_a_stranger(hospital: Hospital) -> None:
    site, task = hospital.open(), hospital.task()

    with pytest.raises(SignatureError, match="does not hold"):
        site.answer(hospital.seal(task, SigningKey.generate()))
    altered = hospital.seal(replace(task, attempt=7))
    with pytest.raises(SignatureError, match="does not hold"):
        site.answer(Envelope(altered.payload, hospital.seal(task).signature, altered.adapter))
    with pytest.raises(ProtocolError, match="for site 'south'"):
        site.answer(hospital.seal(replace(task, site="south")))
    assert _rows(hospital) == []


def test_an_unexpected_exception_leaves_as_a_code_and_stays_in_the_log(
    hospital: Hospital, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    record = "record 7: Mr Miller, born 1950"

    def explode(*args: object, **kwargs: object) -> None:
        raise RuntimeError(record)

    monkeypatch.setattr(client.training, "train", explode)
    with caplog.at_level(logging.DEBUG):
        reply, answer = _ask(hospital, hospital.task())

    assert reply.error_code == "internal"
    assert b"Miller" not in answer.payload
    assert reply.correlation_id in caplog.text
    assert "Miller" not in caplog.text, "not even at DEBUG in the site's own log"


def test_losses_and_seconds_leave_only_when_the_policy_lists_them(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    hospital = make_hospital(
        tmp_path / "open", tiny_model_dir, policy={"release-metrics": ["train-loss"]}
    )
    # At a rate of one third of twelve records two steps draw nobody once in 17,000 runs: no loss then.
    hospital = replace(hospital, config=hospital.config.replace({"train.batch-size": 12}))

    reply, _ = _ask(hospital, hospital.task())

    assert set(reply.numbers) == {"steps", "train-loss"}


def test_without_privacy_where_the_policy_allows_it(tmp_path: Path, tiny_model_dir: Path) -> None:
    lax = {"require-dp": False, "max-epsilon": float("inf")}
    hospital = make_hospital(tmp_path / "lax", tiny_model_dir, policy=lax)

    reply, _ = _ask(hospital, hospital.task(settings={"privacy.unit": "none"}))

    assert reply.privacy is not None
    assert reply.privacy.unit == "none"
    assert np.isinf(reply.privacy.epsilon)
    path = hospital.folder / "site.toml"
    path.write_text(path.read_text().replace("max-epsilon = inf", "max-epsilon = 8.0"))
    later, _ = _ask(hospital, hospital.task(2))
    assert later.error_code == "budget", "unprotected training leaves no budget"


def test_a_cap_on_epsilon_forbids_training_without_privacy(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    hospital = make_hospital(tmp_path / "capped", tiny_model_dir, policy={"require-dp": False})

    reply, _ = _ask(hospital, hospital.task(settings={"privacy.unit": "none"}))

    assert reply.error_code == "budget"


def test_a_released_task_whose_reply_is_lost_is_never_trained_again(hospital: Hospital) -> None:
    """A second output under one charge could be averaged with the first."""
    task = hospital.task()
    _ask(hospital, task)
    shutil.rmtree(hospital.folder / "state" / "outbox")

    reply, answer = _ask(hospital, replace(task, attempt=2, expires_at=task.expires_at))

    assert reply.error_code == "budget"
    assert answer.adapter == b""


@pytest.mark.parametrize(
    ("before", "after"),
    [("declared-size = 12", "declared-size = 6"), ('name = "notes"', 'name = "other"')],
)
def test_a_task_is_not_trained_as_anything_but_what_was_charged(
    hospital: Hospital, monkeypatch: pytest.MonkeyPatch, before: str, after: str
) -> None:
    task = hospital.task(settings={"privacy.noise-multiplier": 2.0})

    _kill_at(monkeypatch, client.training, "train", hospital, task)
    path = hospital.folder / "site.toml"
    path.write_text(path.read_text().replace(before, after))

    reply, _ = _ask(hospital, task)

    assert reply.error_code == "budget"


def test_a_description_says_public_constants_only(hospital: Hospital) -> None:
    task = Task(
        kind="describe", run_uid="run-1", site="", server_round=0, attempt=1,
        expires_at=hospital.task().expires_at, base_digest=hospital.base_digest,
        config=hospital.config.for_sites(),
    )  # fmt: skip

    reply, answer = _ask(hospital, task)

    assert dict(reply.numbers) == {"declared-size": 12, "max-rank": 64}
    assert answer.adapter == b""


def test_the_runs_seed_decides_neither_sampling_nor_noise(hospital: Hospital) -> None:
    """Two runs alike in everything that a coordinator sets still differ."""
    first, _ = _ask(hospital, hospital.task())
    second, _ = _ask(
        hospital,
        hospital.task(settings={"train.seed": hospital.config.train.seed}, run_uid="run-2"),
    )

    assert first.adapter_digest != second.adapter_digest


def test_a_wrong_site_toml_names_every_bad_key(hospital: Hospital) -> None:
    path = hospital.folder / "site.toml"
    path.write_text(
        path.read_text()
        .replace("max-epsilon = 10.0", 'max-epsilon = "ten"\nmax-epsilom = 3')
        .replace('name = "notes"', 'name = "notes"\ndelta = 2.0')
    )

    with pytest.raises(ConfigError, match=r"(?s)data.delta.*max-epsilon.*max-epsilom"):
        hospital.open()


def _patient_hospital(folder: Path, model: Path, *, num_patients: int, **data: Any) -> Hospital:
    settings = {"privacy.unit": "patient", "train.micro-batch-size": 4}
    hospital = make_hospital(
        folder,
        model,
        data={"unit": "patient", "patient-id": "who", **data},
        settings=settings,
    )
    rows = [
        {"instruction": f"What of {n}?", "output": f"Case {n} is well.", "who": n // 2}
        for n in range(2 * num_patients)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (hospital.folder / "records.jsonl").write_text(lines)
    return hospital


def test_patients_are_hidden_charged_and_reported_as_patients(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    hospital = _patient_hospital(tmp_path / "p", tiny_model_dir, num_patients=12)

    reply, _ = _ask(hospital, hospital.task())

    assert reply.privacy is not None
    assert (reply.privacy.unit, reply.privacy.sample_rate) == ("patient", 4 / 12)
    assert [row.unit for row in _rows(hospital)] == ["patient"]
    assert _ask(hospital, hospital.task(2, settings={"privacy.unit": "record"}))[0].error_code == (
        "policy"
    )


@pytest.mark.parametrize(("num_patients", "warned"), [(12, 1), (500, 0)])
def test_few_patients_are_warned_of_once_in_the_hospitals_own_log(
    num_patients: int,
    warned: int,
    tmp_path: Path,
    tiny_model_dir: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    hospital = _patient_hospital(
        tmp_path / "p",
        tiny_model_dir,
        num_patients=num_patients,
        **{"declared-size": num_patients},
    )
    site = hospital.open()
    noise = {"privacy.noise-multiplier": 2.0}
    with caplog.at_level(logging.WARNING):
        for server_round in (1, 2):
            site.answer(hospital.seal(hospital.task(server_round, settings=noise)))

    found = [r.getMessage() for r in caplog.records if r.name == "client.training"]
    assert len(found) == warned
    if warned:
        # 4 of 12 patients expected: 4 / (2 sqrt(dimension)).
        size = sum(p.A.size + p.B.size for p in hospital.adapter.pairs.values())
        assert found[0].startswith("north: 12 patients, fewer than 500")
        assert f"{4 / (2 * size**0.5):.2g} of its noise" in found[0]


@pytest.mark.parametrize("unit", ["record", "patient"])
def test_under_privacy_nothing_that_a_coordinator_sets_makes_two_runs_alike(
    unit: str, tmp_path: Path, tiny_model_dir: Path
) -> None:
    """Only the constructor's test-only switch does."""
    digests = []
    for name, entropy in (("a", None), ("b", None), ("c", _Fixed()), ("d", _Fixed())):
        if unit == "patient":
            hospital = _patient_hospital(tmp_path / name, tiny_model_dir, num_patients=12)
        else:
            hospital = make_hospital(tmp_path / name, tiny_model_dir)
        site = hospital.open()
        if entropy is not None:
            site = Site(site.config, SigningKey.generate(), entropy=entropy)
        task = replace(hospital.task(), expires_at=2**40)
        answer = site.answer(hospital.seal(task), now_s=0.0)
        digests.append(digest_tensors(load(bytes(answer.adapter))))
    assert len(set(digests[:2])) == 2
    assert digests[2] == digests[3]


class _Fixed:
    """The same bytes for everybody: what the operating system must never give."""

    def __init__(self) -> None:
        self._random = random.Random(7)

    def __call__(self, size: int) -> bytes:
        return self._random.randbytes(size)


def test_training_stops_at_the_hours_that_the_policy_allows(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    hospital = make_hospital(tmp_path / "n", tiny_model_dir, policy={"max-hours": 1e-9})

    reply, answer = _ask(hospital, hospital.task())

    assert reply.error_code == "training"
    assert answer.adapter == b""
    assert len(_rows(hospital)) == 1, "the charge stands"


def test_a_task_that_failed_is_not_drawn_afresh_however_often_it_is_asked(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    """Each new draw of one charge would tell more, and enough of them average the noise away."""
    hospital = make_hospital(tmp_path / "n", tiny_model_dir, policy={"max-adapter-norm": 1e-6})
    task = hospital.task()

    replies = [_ask(hospital, task)[0] for _ in range(4)]

    assert [reply.error_code for reply in replies] == ["egress"] * 4
    events = [entry.event for entry in hospital.open().audit.entries()]
    assert events.count("training") == 1
    assert [row.state for row in _rows(hospital)] == ["released"]


def test_what_fails_before_anything_is_drawn_may_be_asked_again(hospital: Hospital) -> None:
    path, task = hospital.folder / "records.jsonl", hospital.task()
    records = path.read_text()
    path.write_text("")

    assert _ask(hospital, task)[0].error_code == "data"
    path.write_text(records)

    assert _ask(hospital, task)[0].error_code == ""
    assert len(_rows(hospital)) == 1


def test_a_stored_reply_is_looked_at_again_before_it_leaves(hospital: Hospital) -> None:
    task = hospital.task()
    _, answer = _ask(hospital, task)
    path = hospital.folder / "state" / "outbox" / task.task_id / "adapter.safetensors"
    path.write_bytes(save(load(bytes(answer.adapter)), metadata={"note": "Mr Miller has gout"}))

    reply, answer = _ask(hospital, task)

    assert reply.error_code == "egress"
    assert answer.adapter == b""


def test_a_run_whose_name_is_no_file_name_leaves_a_short_line(hospital: Hospital) -> None:
    task = hospital.task(run_uid="x" * 100_000, config={}, kind="describe", site="")
    assert _ask(hospital, task)[0].error_code == "protocol"
    assert (hospital.folder / "state" / "audit.jsonl").stat().st_size < 5000


def test_a_speed_file_that_cannot_be_used_costs_no_task(
    hospital: Hospital, caplog: pytest.LogCaptureFixture
) -> None:
    path = hospital.folder / "state" / "speed.json"
    path.mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        reply, _ = _ask(hospital, hospital.task())

    assert reply.error_code == ""
    assert f"{path} cannot be written" in caplog.text
    assert path.is_dir()


def test_each_of_several_coordinators_is_believed_and_nobody_else(hospital: Hospital) -> None:
    second = SigningKey.generate()
    path, first = hospital.folder / "site.toml", hospital.coordinator.public_hex
    path.write_text(path.read_text().replace(f'"{first}"', f'["{first}", "{second.public_hex}"]'))
    site = hospital.open()

    for run_uid, key in (("run-1", hospital.coordinator), ("run-2", second)):
        task = hospital.task(run_uid=run_uid)
        answer = site.answer(hospital.seal(task, key))
        reply = open_reply(answer, task=task, site="north", public_hex=site.public_key)
        assert reply.error_code == ""
    with pytest.raises(SignatureError, match="does not hold"):
        site.answer(hospital.seal(hospital.task(3), SigningKey.generate()))


@pytest.mark.parametrize(("seconds", "code"), [(7199.0, ""), (7201.0, "training")])
def test_the_hours_that_the_policy_allows_are_hours(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, code: str
) -> None:
    hospital = make_hospital(tmp_path / "n", tiny_model_dir, policy={"max-hours": 2.0})
    site, task = hospital.open(), hospital.task()
    # Begun, and after each of two steps.
    clock = iter([0.0, 3600.0, seconds])
    monkeypatch.setattr(client.time_limit, "time", SimpleNamespace(monotonic=lambda: next(clock)))

    answer = site.answer(hospital.seal(task))

    reply = open_reply(answer, task=task, site="north", public_hex=site.public_key)
    assert reply.error_code == code


def test_a_dry_run_counts_records_and_cost_and_charges_nothing(hospital: Hospital) -> None:
    with (hospital.folder / "records.jsonl").open("a") as file:
        file.write(json.dumps({"instruction": "What of case 13?", "output": ""}) + "\n")
    site = hospital.open()
    before, steps = (site.ledger.head(), site.audit.head()), []

    result = site.dry_run(hospital.config, on_step=steps.append)

    assert (len(result.local.examples), result.local.num_skipped) == (12, 1)
    assert steps == [1, 2]
    assert (result.cost.rounds, result.cost.steps) == (3, 6)
    assert result.cost.bytes_up == 3 * result.manifest.adapter_bytes > 0
    assert 7.5 < result.cost.epsilon <= 8.0, "of the whole run"
    assert result.manifest.privacy is not None
    assert result.manifest.privacy.epsilon < result.cost.epsilon, "of its first task"
    assert (site.ledger.head(), site.audit.head()) == before
    assert _rows(hospital) == []
