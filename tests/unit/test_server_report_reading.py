"""What a report reads of a run's folder, whatever became of the run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from common.config import Scalar
from common.errors import ConfigError, DataError
from common.locks import hold_lock
from server.history import History
from server.report.comparison import comparison_page
from server.report.page import run_page
from server.report.places import place_name, without_places
from server.report.reading import read_run
from server.run_folder import run_lock
from tests.unit.fake_runs import attack, evaluation, write_results, write_run


def test_a_finished_run_is_read_with_who_was_missing_and_why(tmp_path: Path) -> None:
    missing = {(1, "north"): "silent", (2, "north"): "norm", (2, "harbour"): "absent"}
    run = read_run(write_run(tmp_path / "run", rounds=2, missing=missing))
    assert run.state.kind == "finished"
    assert [one.presence["north"] for one in run.rounds] == ["late", "refused"]
    assert [one.presence["harbour"] for one in run.rounds] == ["took part", "absent"]
    assert [dict(one.reasons) for one in run.rounds] == [{"north": "silent"}, {"north": "norm"}]
    # 0.6 + 3 / 2 and 0.6 + 3 / 4.
    assert [scores.loss for _, scores in run.evaluated] == pytest.approx([2.1, 1.35])
    assert run.base is not None
    assert run.base.loss == 3.6
    assert run.final == run.rounds[-1].scores
    assert run.max_epsilon == 8.0
    # Half of the rounds: 8 / sqrt(2).
    assert run.rounds[0].epsilon["north"] == pytest.approx(5.657, abs=1e-3)
    assert run.rounds[0].train_loss.keys() == {"harbour", "lakeside", "st-anne"}
    # Three of four answered in the first round, two in the second.
    assert (run.bytes_up, run.bytes_down) == (5 * 290_000, 8 * 291_000)


def test_a_run_of_before_the_new_fields_is_read_with_its_losses(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", old=True))
    assert [scores.loss for _, scores in run.evaluated] == pytest.approx([2.1, 1.35, 0.975, 0.7875])
    assert {one.learning_rate for one in run.rounds} == {None}
    assert run.final is not None
    assert run.final.perplexity is not None


def test_a_run_without_a_history_is_read_from_its_summary(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "history.jsonl").unlink()
    run = read_run(folder)
    assert len(run.rounds) == 4
    assert run.max_epsilon == 8.0


def test_a_run_that_goes_is_read_as_far_as_it_is(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", rounds=2, planned=5, end="")
    with hold_lock(run_lock(folder)):
        run = read_run(folder)
    assert run.state.kind == "running"
    assert (len(run.rounds), run.rounds_planned) == (2, 5)
    assert run.final == run.rounds[-1].scores


def test_an_earlier_end_says_nothing_of_a_run_that_goes_on(tmp_path: Path) -> None:
    """A finished run of two rounds is resumed to do more: summary.json is of before."""
    folder = write_run(tmp_path / "run", rounds=2)
    history = History(folder / "history.jsonl")
    history.record("resumed", round=2, rounds=3)
    history.record("round", round=3, loss=0.5, sites=["north"])
    run = read_run(folder)
    assert [one.number for one in run.rounds] == [1, 2, 3]
    assert run.final is not None
    assert run.final.loss == 0.5


def test_a_simulated_sites_own_cap_is_known_and_else_the_target(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    site = folder / "simulation" / "sites" / "north"
    site.mkdir(parents=True)
    (site / "site.toml").write_text("[policy]\nmax-epsilon = 9.5\n")
    caps = {one.site: (one.cap, one.own_cap) for one in read_run(folder).privacy}
    assert caps["north"] == (9.5, True)
    assert caps["harbour"] == (8.0, False)


def test_an_evaluation_of_another_run_in_the_folder_is_not_shown(tmp_path: Path) -> None:
    folder = write_results(write_run(tmp_path / "run"))
    assert read_run(folder).evaluation is not None
    (folder / "evaluation.json").write_text(json.dumps({**evaluation(), "run": "another"}))
    assert read_run(folder).evaluation is None


def test_an_audit_of_another_runs_twin_is_not_shown_and_a_simulations_is(tmp_path: Path) -> None:
    folder = write_results(write_run(tmp_path / "run"))
    assert read_run(folder).attack is not None
    (folder / "attack.json").write_text(json.dumps({**attack(), "run": "another"}))
    assert read_run(folder).attack is None
    simulated = {**attack(), "run": "demo", "kind": "simulation"}
    (folder / "attack.json").write_text(json.dumps(simulated))
    assert read_run(folder).attack is not None


def test_no_place_of_this_machine_is_read_into_a_report(tmp_path: Path) -> None:
    settings: dict[str, Scalar] = {
        "model.name": "/home/ann lee/models/llama",
        "evaluation.central-data": "~/private/test.jsonl",
    }
    folder = write_run(tmp_path / "run", end="", settings=settings)
    message = "the disk of /home/ann/runs/one is full ([Errno 28]: '/home/ann/runs/one/x.part')"
    History(folder / "history.jsonl").record("stopped", code="disk", message=message)
    run = read_run(folder)
    assert run.settings["model.name"] == "llama"
    assert run.settings["evaluation.central-data"] == "test.jsonl"
    assert run.state.message == "the disk of one is full ([Errno 28]: 'x.part')"


@pytest.mark.parametrize("text", ["org/name", "https://example.org/a/b", "a / b", "4/5 of 1/2"])
def test_what_is_no_place_is_left_as_it_is(text: str) -> None:
    assert (without_places(text), place_name(text)) == (text, text)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("evaluation.json", "{", "evaluation.json cannot be read as JSON"),
        (
            "attack.json",
            '{"audits": [{"canaries": 3}]}',
            r"malformed at audits.0.name; .* server audit",
        ),
    ],
)
def test_what_is_damaged_is_named_with_the_remedy(
    tmp_path: Path, name: str, content: str, said: str
) -> None:
    folder = write_run(tmp_path / "run")
    (folder / name).write_text(content)
    with pytest.raises(DataError, match=said):
        read_run(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("history.jsonl", b'{"event": "round", "time": 1}\n'),
        ("summary.json", b'{"rounds": [{"sites": []}]}'),
        ("summary.json", b'{"central": [1]}'),
        ("run.toml", b'[train]\nrounds = "many"\n'),
    ],
)
def test_a_file_of_another_form_is_told_in_words(tmp_path: Path, name: str, content: bytes) -> None:
    folder = write_run(tmp_path / "run")
    (folder / name).write_bytes(content)
    with pytest.raises(DataError, match="is not of the form that a run writes"):
        read_run(folder)


def test_a_line_that_is_no_event_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    before = read_run(folder)
    with (folder / "history.jsonl").open("ab") as file:
        file.write(b"null\n\xff\xfe\n")
    assert read_run(folder) == before


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run; give the folder that --out named"):
        read_run(tmp_path)


HUGE = 10**400


@pytest.mark.parametrize(
    ("place", "value"),
    [("wall_s", HUGE), ("bytes_up", HUGE), ("memory_bytes", math.inf), ("learning_rate", math.nan)],
    ids=["time", "bytes", "memory", "learning-rate"],
)
def test_numbers_that_no_run_writes_are_said_in_words(
    tmp_path: Path, place: str, value: float
) -> None:
    """Read or drawn, of one run or of two."""
    folder = write_run(tmp_path / "run", rounds=2)
    summary = json.loads((folder / "summary.json").read_text())
    (summary if place == "wall_s" else summary["rounds"][0])[place] = value
    (folder / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(DataError, match="is not of the form that a run writes"):
        run_page(read_run(folder))
    if place == "wall_s":
        with pytest.raises(DataError, match="is not of the form that a run writes"):
            comparison_page([write_run(tmp_path / "other"), folder])


@pytest.mark.parametrize("name", ["history.jsonl", "summary.json", "evaluation.json"])
def test_brackets_without_end_are_damage_like_any_other(tmp_path: Path, name: str) -> None:
    folder = write_results(write_run(tmp_path / "run", rounds=2))
    with (folder / name).open("w" if name == "evaluation.json" else "a") as file:
        file.write("[" * 100_000 + "\n")
    if name == "evaluation.json":
        with pytest.raises(DataError, match="cannot be read as JSON"):
            read_run(folder)
    else:
        assert len(read_run(folder).rounds) == 2


def test_half_of_an_emoji_in_a_question_spoils_no_page(tmp_path: Path) -> None:
    folder = write_results(write_run(tmp_path / "run", rounds=2))
    content = json.loads((folder / "evaluation.json").read_text())
    content["questions"][0]["question"] = "Is it fever \ud83d"
    (folder / "evaluation.json").write_text(json.dumps(content))
    assert b"Is it fever ?" in run_page(read_run(folder)).encode()
