"""`consilium server plan`: what it says is what a site then does, to the byte and the epsilon."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from common.adapter import AdapterShape
from common.config import RunConfig
from common.errors import ConfigError, PrivacyError
from common.records import Task, open_reply, reply_to
from common.signing import SigningKey
from server.audit import CoordinatorAudit
from server.cli import app
from server.coordinator import Coordinator
from server.history import History
from server.plan import PlannedRun, plan_run, plan_sentences
from server.roster import Roster, RosterEntry
from server.run_folder import run_toml
from server.run_time import TimeEstimate
from tests.unit.coordinator import ask_for_run, write_coordinator
from tests.unit.fake_federation import HEADS
from tests.unit.hospital import SETTINGS, make_hospital

SHAPE = AdapterShape({"layer": (3, 4)}, rank=4, scaling=2.0)
ROSTER = Roster([RosterEntry("bern", "aa" * 32, 100), RosterEntry("oslo", "bb" * 32, 400)])
UNKNOWN = TimeEstimate(None, 0, training_told=False)


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.cli.console._width", 100)


def _config(**changes: Any) -> RunConfig:
    settings = {key.replace("__", ".").replace("_", "-"): v for key, v in changes.items()}
    return RunConfig.parse(
        {"lora.rank": 4, "train.rounds": 3, "train.local-steps": 5, "train.batch-size": 10,
         "privacy.accountant": "rdp", **settings}
    )  # fmt: skip


def _plan(config: RunConfig, ranks: dict[str, int] | None = None) -> PlannedRun:
    return plan_run(config, roster=ROSTER, shape=SHAPE, ranks=ranks or {}, time=UNKNOWN)


# Against what a site does


@pytest.mark.parametrize("noise", ["auto", 1.3])
def test_noise_epsilon_steps_and_bytes_are_those_that_a_site_then_has(
    tmp_path: Path, tiny_model_dir: Path, noise: float | str
) -> None:
    hospital = make_hospital(
        tmp_path / "north", tiny_model_dir, settings={"privacy.noise-multiplier": noise}
    )
    site, config = hospital.open(), hospital.config
    [planned] = plan_run(
        config,
        roster=Roster([RosterEntry("north", site.public_key, 12)]),
        shape=AdapterShape(
            {
                name: (pair.B.shape[0], pair.A.shape[1])
                for name, pair in hospital.adapter.pairs.items()
            },
            config.lora.rank,
            hospital.adapter.scaling,
        ),
        ranks={},
        time=UNKNOWN,
    ).sites

    down = up = 0
    for server_round in range(1, config.train.rounds + 1):
        task = hospital.task(server_round)
        sent = hospital.seal(task)
        answer = site.answer(sent)
        row = open_reply(answer, task=task, site="north", public_hex=site.public_key).privacy
        down, up = down + len(sent.adapter), up + len(answer.adapter)

    assert row is not None
    assert planned.noise_multiplier == row.noise_multiplier
    assert planned.sample_rate == row.sample_rate
    assert planned.steps == row.steps
    assert planned.epsilon == pytest.approx(row.epsilon, rel=1e-9)
    assert (planned.bytes_down, planned.bytes_up) == (down, up)


# By hand


def test_each_site_has_its_own_rate_and_needs_its_own_noise() -> None:
    bern, oslo = _plan(_config(privacy__target_epsilon=4.0)).sites
    assert (bern.sample_rate, oslo.sample_rate) == (0.1, 0.025)
    assert bern.noise_multiplier > oslo.noise_multiplier
    assert bern.epsilon <= 4.0
    assert oslo.epsilon <= 4.0
    assert bern.steps == oslo.steps == 15


def test_a_site_that_holds_a_lower_rank_is_sent_less() -> None:
    plan = _plan(_config(), {"bern": 1, "oslo": 64})
    bern, oslo = plan.sites
    assert (bern.rank, oslo.rank) == (1, 4)
    assert bern.bytes_down < oslo.bytes_down
    assert plan.bytes_up == bern.bytes_up + oslo.bytes_up
    assert not any("Not asked yet" in said for said in plan_sentences(plan))
    assert any("Not asked yet which rank they can hold: bern, oslo" in said
               for said in plan_sentences(_plan(_config())))  # fmt: skip


def test_with_a_fraction_of_the_sites_a_round_weighs_less() -> None:
    whole, half = (
        _plan(_config()),
        _plan(_config(federation__fraction=0.5, federation__min_sites=1)),
    )
    assert (whole.sites_per_round, half.sites_per_round) == (2, 1)
    assert half.bytes_down == whole.bytes_down // 2
    assert "1 of 2 sites, drawn anew" in plan_sentences(half)[0]


def test_without_protection_that_is_what_it_says() -> None:
    plan = _plan(_config(privacy__unit="none"))
    assert all(math.isinf(one.epsilon) and one.noise_multiplier == 0 for one in plan.sites)
    assert "No differential privacy" in plan_sentences(plan)[1]


# The command


@pytest.fixture
def coordinator(tmp_path: Path) -> Coordinator:
    coordinator = write_coordinator(tmp_path / "coordinator")
    SigningKey.load(coordinator.signing_key)
    return coordinator


@pytest.fixture
def run_file(tmp_path: Path, tiny_model_dir: Path) -> Path:
    path = tmp_path / "run.toml"
    settings = {**SETTINGS, "model.name": str(tiny_model_dir)}
    path.write_text(run_toml(RunConfig.parse(settings).flat()))
    return path


def _run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["plan", *map(str, words)], env={"COLUMNS": "100"})


def _files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_table_reads_at_a_hundred_columns_and_nothing_is_written(
    coordinator: Coordinator, run_file: Path
) -> None:
    before = _files(coordinator.folder)
    done = _run(run_file, coordinator.folder)
    assert done.exit_code == 0, done.output
    table = done.output.split("Whole run")[0].splitlines()
    assert max(map(len, table)) <= 100
    words = {line.split()[0]: line.split()[1:] for line in table if line}
    assert words["bern"][:2] == ["1,000", "0.004"]
    assert words["bern"][4:6] == ["6", "2?"]
    assert words["oslo"][1:] == words["bern"][1:]
    assert "Time: unknown until a first round" in done.output
    assert _files(coordinator.folder) == before


def test_as_json_it_holds_the_same_with_null_for_no_bound(
    coordinator: Coordinator, run_file: Path
) -> None:
    content = json.loads(_run(run_file, coordinator.folder, "--json").output)
    assert [one["site"] for one in content["sites"]] == ["bern", "oslo"]
    assert content["sites"][0]["steps"] == 6
    assert content["bytes_down"] == 2 * content["sites"][0]["bytes_down"]
    assert content["time"]["seconds"] is None
    done = _run(run_file, coordinator.folder, "--json", "--set", "privacy.unit=none")
    assert json.loads(done.output)["sites"][0]["epsilon"] is None


def test_the_rank_that_a_site_said_is_planned_with(
    coordinator: Coordinator, run_file: Path
) -> None:
    audit = CoordinatorAudit(coordinator.folder, SigningKey.load(coordinator.signing_key))
    ask = Task("describe", "run-1", "", 0, 1, 0, config={})
    reply = reply_to(ask, site="bern", heads=HEADS, numbers={"max-rank": 1, "declared-size": 1000})
    audit.replied(reply, task=ask, size_bytes=1, seen=None)
    bern, oslo = json.loads(_run(run_file, coordinator.folder, "--json").output)["sites"]
    assert (bern["rank"], bern["rank_known"]) == (1, True)
    assert (oslo["rank"], oslo["rank_known"]) == (2, False)


def test_what_a_run_would_be_refused_for_is_refused_in_the_same_words(
    coordinator: Coordinator, run_file: Path
) -> None:
    for refused, kind, words in (
        ("federation.min-sites=3", ConfigError, "min-sites = 3, but 2 sites are enrolled"),
        ("privacy.target-epsilon=0.0001", PrivacyError, "no noise"),
    ):
        run = ["run", str(run_file), str(coordinator.folder), "--set", refused]
        errors = [
            _run(run_file, coordinator.folder, "--set", refused).exception,
            CliRunner().invoke(app, run).exception,
        ]
        assert all(isinstance(error, kind) for error in errors), errors
        assert str(errors[0]) == str(errors[1])
        assert words in str(errors[0])


# Time


def _ran(
    coordinator: Coordinator, folder: Path, base: str, seconds: list[dict[str, float]]
) -> None:
    """A finished run of 2 steps of batch 4 with 48 tokens each."""
    run = ask_for_run(coordinator, folder)
    (folder / "run.toml").write_text(
        run_toml({**RunConfig.parse(SETTINGS).flat(), "run.uid": run.run_uid})
    )
    history = History(run.history)
    history.record("run-started", run=run.run_uid, rounds=3, base=base)
    for number, phases in enumerate(seconds, start=1):
        history.record("round", round=number, seconds=phases)
    history.record("finished", folder="")


@pytest.mark.parametrize(
    ("train_s", "wait_s", "expected_s", "words"),
    [
        # Twice the steps: 2 x 10 + 6 + 1 + 1 a round, three rounds.
        (10.0, 6.0, 84.0, "the sites' own training seconds scaled"),
        # Nobody says how long it trained: 2 x 16 + 1 + 1.
        (0.0, 16.0, 102.0, "the whole wait for replies"),
    ],
)
def test_the_time_comes_from_earlier_rounds_with_the_same_model(
    coordinator: Coordinator,
    run_file: Path,
    tmp_path: Path,
    train_s: float,
    wait_s: float,
    expected_s: float,
    words: str,
) -> None:
    from common.model import digest_model

    [name] = [line for line in run_file.read_text().splitlines() if line.startswith("name = ")]
    base = digest_model(Path(name.split('"')[1]))
    phases = {"train": train_s, "wait": wait_s, "merge": 1.0, "evaluate": 1.0}
    slow = {**phases, "wait": 900.0}
    _ran(coordinator, tmp_path / "earlier", base, [phases, slow, phases])
    longer = ["--set", "train.local-steps=4"]
    content = json.loads(_run(run_file, coordinator.folder, "--json", *longer).output)
    assert content["time"]["seconds"] == pytest.approx(expected_s)
    assert words in _run(run_file, coordinator.folder, *longer).output


def test_another_models_rounds_tell_nothing(
    coordinator: Coordinator, run_file: Path, tmp_path: Path
) -> None:
    phases = {"train": 1.0, "wait": 1.0, "merge": 1.0, "evaluate": 1.0}
    _ran(coordinator, tmp_path / "earlier", "ab" * 32, [phases])
    content = json.loads(_run(run_file, coordinator.folder, "--json").output)
    assert content["time"]["seconds"] is None


def test_an_estimate_says_of_how_many_rounds() -> None:
    told = TimeEstimate(7300.0, 1, training_told=True)
    assert told.sentence().startswith("about 2.0 h, roughly: the median of 1 earlier round with")
    assert "90 s" in replace(told, seconds=90.0).sentence()
