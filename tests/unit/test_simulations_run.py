"""A whole simulated run: what it writes, what repeats, what resumes, what is refused, what stays in."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file

import server.result
from client.ledger import Ledger, LedgerRow
from client.site_config import load_site_config
from common.adapter import digest_tensors
from common.config import load_run_config, read_toml
from common.dataset import Columns, load_records
from common.errors import (
    CheckpointError,
    ConfigError,
    ConsiliumError,
    DataError,
    ModelError,
    QuorumError,
)
from common.model import load_base, release_base
from common.prompts import collate, resolve_template, tokenize_all
from server.history import read_events
from simulations.run import check_simulation, run_simulation
from simulations.synthetic import SyntheticRecord, planted_identifiers
from tests.unit.scenarios import (
    DP,
    NUM_RECORDS,
    interrupt_after,
    run,
    simulation,
    site_names,
    write_scenario,
)

DP_CHANGES = {key.replace(".", "__").replace("-", "_"): value for key, value in DP.items()}

FIXED_NOISE = {"privacy__unit": "record", "privacy__noise_multiplier": 1.0}


@pytest.fixture(scope="module")
def plain(scenario: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one finished run without DP; read only."""
    out = tmp_path_factory.mktemp("plain") / "run"
    run(scenario, out)
    return out


@pytest.fixture(scope="module")
def private(scenario: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one finished run with DP; read only."""
    out = tmp_path_factory.mktemp("private") / "run"
    run(scenario, out, **DP_CHANGES)
    return out


def _summary(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return content


def _digest(out: Path) -> str:
    return digest_tensors(load_file(out / "adapter" / "adapter_model.safetensors"))


def _ledger_rows(out: Path, site: str) -> list[tuple[Any, ...]]:
    rows = _ledger(out, site)
    return sorted((row.server_round, row.unit, row.state, row.steps.steps) for row in rows)


def _runs_in_ledger(out: Path, site: str) -> set[str]:
    return {row.run_uid for row in _ledger(out, site)}


def _ledger(out: Path, site: str) -> list[LedgerRow]:
    folder = out / "simulation" / "sites" / site
    return Ledger(folder / "state" / "ledger.sqlite").rows(load_site_config(folder).data.name)


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for item in value.values():
            yield from _numbers(item)
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int | float):
        yield value


def test_run_writes_its_folder(plain: Path) -> None:
    assert {path.name for path in plain.iterdir()} == {
        "run.toml",
        "history.jsonl",
        "checkpoints",
        "adapter",
        "summary.json",
        "evaluation.json",
        "simulation",
        ".lock",
    }
    assert sorted(path.name for path in (plain / "checkpoints").iterdir()) == [
        "round-0001",
        "round-0002",
    ]
    assert {path.name for path in (plain / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert load_run_config(plain / "run.toml").run.uid == _summary(plain)["run"]


def test_summary_holds_the_fields_of_the_design_with_finite_numbers(plain: Path) -> None:
    summary = _summary(plain)
    assert set(summary) >= {
        "run",
        "rounds",
        "method",
        "sites",
        "wall_s",
        "bytes_up",
        "bytes_down",
        "central",
        "privacy",
    }
    assert len(summary["sites"]) == 2
    for metrics in (summary["central"]["base"], summary["central"]["final"]):
        assert set(metrics) == {"loss", "perplexity", "token_accuracy"}
        assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    assert [entry["round"] for entry in summary["rounds"]] == [1, 2]
    for entry in summary["rounds"]:
        assert entry["replies"] == 2
        assert entry["refused"] == {}
        assert set(entry["seconds"]) == {"train", "wait", "merge", "evaluate"}
        assert 0.0 <= entry["discarded_energy"] < 1.0
        assert entry["metrics"]["loss"] == entry["loss"]
        # A process with torch in it holds at least as much.
        assert entry["memory_bytes"] > 50e6
    # One step of warm-up, then 3/3, 2/3 and 1/3 of 0.01; a round has two steps.
    assert [entry["learning_rate"] for entry in summary["rounds"]] == pytest.approx(
        [0.01, 0.01 / 3]
    )
    assert summary["rounds"][-1]["metrics"] == summary["central"]["final"]
    for field in ("bytes_up", "bytes_down"):
        assert summary[field] == sum(entry[field] for entry in summary["rounds"]) > 0
    assert all(math.isfinite(number) for number in _numbers(summary))
    for row in summary["privacy"].values():
        assert set(row) == {
            "unit",
            "epsilon",
            "delta",
            "noise_multiplier",
            "sample_rate",
            "steps",
        }
        assert (row["unit"], row["epsilon"], row["steps"]) == ("none", None, 4)


def test_a_result_that_cannot_be_evaluated_is_handed_out_all_the_same(
    scenario: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **named: Any) -> Any:
        raise RuntimeError("no memory")

    monkeypatch.setattr(server.result, "compare_with_base", fail)
    out = tmp_path / "run"
    assert run(scenario, out, train__rounds=1)["exported_round"] == 1
    events = list(read_events(out / "history.jsonl"))
    assert [event["event"] for event in events][-2:] == ["not-evaluated", "finished"]
    assert events[-2]["message"] == "RuntimeError: no memory"
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    assert not (out / "evaluation.json").exists()


def test_history_tells_the_run_in_order(plain: Path) -> None:
    events = [event["event"] for event in read_events(plain / "history.jsonl")]
    one_round = ["round-started", "reply", "reply", "round"]
    assert events == ["run-started", "base", "sites", *one_round, *one_round, "finished"]


def test_central_loss_is_that_of_the_exported_folder_loaded_by_peft(
    plain: Path, scenario: Path, tiny_model_dir: Path
) -> None:
    config = load_run_config(plain / "run.toml")
    release_base()
    base = load_base(tiny_model_dir, config.model, device=torch.device("cpu"))
    try:
        model = PeftModel.from_pretrained(base.model, str(plain / "adapter")).eval()
        examples = tokenize_all(
            load_records(scenario / "central.jsonl", columns=Columns()).prompts,
            tokenizer=base.tokenizer,
            template=resolve_template(config.data.prompt_template),
            max_length=config.data.max_length,
        )
        nll, tokens = 0.0, 0
        for example in examples:
            batch = collate([example], pad_id=base.pad_id, device=torch.device("cpu"))
            with torch.inference_mode():
                # PEFT's own mean over the labels that are not -100, shifted by one.
                loss = float(model(input_ids=batch.input_ids, labels=batch.labels).loss)
            nll += loss * example.num_answer
            tokens += example.num_answer
    finally:
        release_base()
    assert _summary(plain)["central"]["final"]["loss"] == pytest.approx(nll / tokens, abs=1e-4)
    assert abs(nll / tokens - _summary(plain)["central"]["base"]["loss"]) > 1e-3


def test_same_seed_gives_the_same_adapter_and_another_seed_another(
    plain: Path, scenario: Path, tmp_path: Path
) -> None:
    run(scenario, tmp_path / "again")
    run(scenario, tmp_path / "other", train__seed=1)
    assert _digest(tmp_path / "again") == _digest(plain)
    assert _digest(tmp_path / "other") != _digest(plain)


def test_two_private_runs_with_one_seed_differ(
    private: Path, scenario: Path, tmp_path: Path
) -> None:
    run(scenario, tmp_path / "again", **DP_CHANGES)
    assert _digest(tmp_path / "again") != _digest(private)


def test_private_run_reports_epsilon_within_the_target_and_equal_noise(private: Path) -> None:
    rows = list(_summary(private)["privacy"].values())
    assert len(rows) == 2
    for row in rows:
        assert row["unit"] == "record"
        assert 7.0 < row["epsilon"] <= 8.0
        assert row["delta"] == 1e-5
        assert row["sample_rate"] == pytest.approx(4 / NUM_RECORDS)
        assert row["steps"] == 4
    assert rows[0]["noise_multiplier"] == rows[1]["noise_multiplier"] > 0.5


def test_private_run_leaves_one_released_row_a_round_in_each_ledger(private: Path) -> None:
    for site in _summary(private)["sites"]:
        assert _ledger_rows(private, site) == [
            (1, "record", "released", 2),
            (2, "record", "released", 2),
        ]


def test_a_second_run_in_the_folder_is_refused_and_leaves_it_as_it_was(
    plain: Path, scenario: Path
) -> None:
    before = _digest(plain), _summary(plain)
    with pytest.raises(CheckpointError, match=r"already holds a run.*--resume.*--force"):
        run(scenario, plain)
    assert (_digest(plain), _summary(plain)) == before


def test_force_replaces_the_run_its_sites_and_what_they_spent(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    scenario = write_scenario(tmp_path / "scenario", tiny_model_dir)
    first, second = site_names(scenario)
    out = tmp_path / "run"
    before = run(scenario, out, **FIXED_NOISE)
    path = scenario / "sites" / first / "site.toml"
    path.write_text(path.read_text().replace("[data]", "[data]\ndeclared-size = 16"))
    after = run(scenario, out, force=True, **FIXED_NOISE)
    assert after["run"] != before["run"]
    assert after["privacy"][first]["sample_rate"] == pytest.approx(4 / 16)
    assert len(_ledger_rows(out, second)) == 2


def test_bad_settings_leave_the_run_that_force_would_replace(plain: Path, scenario: Path) -> None:
    before = _digest(plain)
    with pytest.raises(ConfigError, match="min-sites"):
        run(scenario, plain, force=True, federation__min_sites=3)
    assert _digest(plain) == before


def test_resumed_run_is_the_same_run_and_gives_the_adapter_of_an_uninterrupted_one(
    plain: Path, scenario: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run_simulation(simulation(scenario, out), listener=interrupt_after(1))
    assert not (out / "summary.json").exists()
    uid = load_run_config(out / "run.toml").run.uid
    summary = run(scenario, out, resume=True)
    assert summary["run"] == uid
    assert [entry["round"] for entry in summary["rounds"]] == [1, 2]
    assert _digest(out) == _digest(plain)
    for site in summary["sites"]:
        assert len(_ledger_rows(out, site)) == 2
        assert _runs_in_ledger(out, site) == {uid}


def test_run_stopped_before_its_first_checkpoint_resumes_too(
    plain: Path, scenario: Path, tmp_path: Path
) -> None:
    def stop(event: Any) -> None:
        if event["event"] == "reply":
            raise KeyboardInterrupt

    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run_simulation(simulation(scenario, out), listener=stop)
    summary = run(scenario, out, resume=True)
    assert len(summary["rounds"]) == 2
    assert _digest(out) == _digest(plain)


def test_resume_without_a_run_and_with_other_settings_is_refused(
    plain: Path, scenario: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="holds no run to resume"):
        run(scenario, tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()
    with pytest.raises(CheckpointError, match=r"other settings: train\.learning-rate"):
        run(scenario, plain, resume=True, train__learning_rate=0.5)


def test_site_of_lower_rank_takes_part_at_its_own_rank(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    scenario = write_scenario(tmp_path / "scenario", tiny_model_dir)
    small, large = site_names(scenario)
    path = scenario / "sites" / small / "site.toml"
    path.write_text(path.read_text() + "\n[policy]\nmax-rank = 1\n")
    out = tmp_path / "run"
    summary = run(scenario, out)
    assert summary["sites"] == [small, large]
    for site, rank in ((small, 1), (large, 4)):
        outbox = out / "simulation" / "sites" / site / "state" / "outbox"
        sent = [load_file(path) for path in outbox.glob("*/adapter.safetensors")]
        assert len(sent) == 2
        ranks = {t.shape[0] for tensors in sent for n, t in tensors.items() if "lora_A" in n}
        assert ranks == {rank}
    exported = load_file(out / "adapter" / "adapter_model.safetensors")
    assert {t.shape[0] for n, t in exported.items() if "lora_A" in n} == {4}
    assert math.isfinite(summary["central"]["final"]["loss"])


def test_site_that_requires_privacy_is_named_and_the_others_go_on(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    scenario = write_scenario(tmp_path / "scenario", tiny_model_dir, num_sites=3)
    strict, *others = site_names(scenario)
    path = scenario / "sites" / strict / "site.toml"
    path.write_text(path.read_text() + "\n[policy]\nrequire-dp = true\n")
    out = tmp_path / "run"
    summary = run(scenario, out, federation__min_sites=2)
    assert summary["sites"] == others
    refused = [e for e in read_events(out / "history.jsonl") if e["event"] == "refused"]
    assert [(e["round"], e["site"], e["reason"]) for e in refused] == [(0, strict, "site-policy")]
    assert list(summary["privacy"]) == others
    assert _ledger_rows(out, strict) == []
    assert (out / "adapter" / "adapter_config.json").exists()


def test_capped_budget_refuses_the_run_at_its_first_task(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    scenario = write_scenario(tmp_path / "scenario", tiny_model_dir)
    capped, other = site_names(scenario)
    path = scenario / "sites" / capped / "site.toml"
    path.write_text(path.read_text() + "\n[policy]\nmax-epsilon = 0.5\n")
    out = tmp_path / "run"
    with pytest.raises(QuorumError, match=rf"round 1 .*{capped}: site-budget.*--resume"):
        run(scenario, out, **FIXED_NOISE)
    assert _ledger_rows(out, capped) == []
    assert len(_ledger_rows(out, other)) == 1
    stopped = read_events(out / "history.jsonl")[-1]
    assert (stopped["event"], stopped["code"]) == ("stopped", "quorum")
    assert not (out / "summary.json").exists()


def _break_central(scenario: Path) -> None:
    (scenario / "central.jsonl").unlink()


def _empty_central(scenario: Path) -> None:
    (scenario / "central.jsonl").write_text("")


def _empty_site(scenario: Path) -> None:
    (scenario / "sites" / site_names(scenario)[0] / "records.jsonl").write_text("")


def _missing_site_data(scenario: Path) -> None:
    (scenario / "sites" / site_names(scenario)[0] / "records.jsonl").unlink()


def _unanswered(scenario: Path) -> None:
    path = scenario / "sites" / site_names(scenario)[0] / "records.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[:3]:
        row["output"] = " "
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _bad_policy(scenario: Path) -> None:
    path = scenario / "sites" / site_names(scenario)[0] / "site.toml"
    path.write_text(path.read_text() + "\n[policy]\nmax-epsilom = 1.0\n")


@pytest.mark.parametrize(
    ("spoil", "changes", "error", "message"),
    [
        (_break_central, {}, DataError, "evaluation.central-data: no records at"),
        (_empty_central, {}, DataError, "central.jsonl is empty"),
        (_empty_site, {}, DataError, "records.jsonl is empty"),
        (_missing_site_data, {}, DataError, "no data set at"),
        (_unanswered, {}, DataError, "3 of 12 records"),
        (_bad_policy, {}, ConfigError, "max-epsilom"),
        (None, {"federation__min_sites": 3}, ConfigError, "min-sites = 3, but there are 2"),
        (None, {"model__name": "no-such-folder"}, ModelError, "no-such-folder"),
        (None, {"lora__rank": 4096}, ModelError, "lora.rank = 4096 is larger"),
        (None, {"lora__target_modules": "nope"}, ModelError, "match no layer"),
        (None, {"data__prompt_template": "{patient}"}, ConfigError, "data.prompt-template"),
    ],
)
def test_bad_input_is_said_before_anything_is_written(
    spoil: Any,
    changes: dict[str, Any],
    error: type[ConsiliumError],
    message: str,
    tiny_model_dir: Path,
    tmp_path: Path,
) -> None:
    scenario = write_scenario(tmp_path / "scenario", tiny_model_dir)
    if spoil is not None:
        spoil(scenario)
    with pytest.raises(error, match=message):
        run(scenario, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_an_evaluation_at_sites_that_each_of_them_would_refuse_is_said_before_anything_is_written(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    folder = write_scenario(tmp_path / "scenario", tiny_model_dir)
    first, second = (folder / "sites" / name for name in site_names(folder))
    path = second / "site.toml"
    path.write_text(path.read_text() + '[policy]\nrelease-metrics = ["train-loss"]\n')
    wanted = r"no site would count.*--site-test-share.*no column 'split'.*release-metrics"
    with pytest.raises(ConfigError, match=f"(?s){wanted}"):
        run(folder, tmp_path / "out", evaluation__at_sites=True)
    assert not (tmp_path / "out").exists()
    # One that counts is enough.
    records = first / "records.jsonl"
    rows = [json.loads(line) for line in records.read_text().splitlines()]
    split = [{**row, "split": "test" if n % 3 == 0 else "train"} for n, row in enumerate(rows)]
    records.write_text("".join(json.dumps(row) + "\n" for row in split))
    path = first / "site.toml"
    path.write_text(path.read_text() + "[policy]\nmin-evaluation-records = 99\n")
    with pytest.raises(ConfigError, match="min-evaluation-records = 99, and its test split has 4"):
        check_simulation(simulation(folder, tmp_path / "out", evaluation__at_sites=True))
    path.write_text(path.read_text().replace("99", "4"))
    check_simulation(simulation(folder, tmp_path / "out", evaluation__at_sites=True))


def test_everything_that_is_wrong_is_said_at_once(tiny_model_dir: Path, tmp_path: Path) -> None:
    scenario = write_scenario(tmp_path / "scenario", tiny_model_dir)
    _break_central(scenario)
    _empty_site(scenario)
    bad = {"federation__min_sites": 3, "model__name": "no-such-folder"}
    with pytest.raises(ConfigError, match="4 things are wrong") as caught:
        run(scenario, tmp_path / "run", **bad)
    for part in ("min-sites = 3", "no records at", "no-such-folder", "records.jsonl is empty"):
        assert part in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_planted_identifiers_are_in_no_file_of_the_run_but_the_sites_own(
    private: Path, plain: Path, scenario: Path
) -> None:
    planted: set[str] = set()
    own = b""
    for site in site_names(scenario):
        content = (scenario / "sites" / site / "records.jsonl").read_bytes()
        own += content
        for line in content.decode().splitlines():
            planted |= set(planted_identifiers(SyntheticRecord(**json.loads(line))))
    assert len(planted) > 12, "names, record numbers and dates"
    # The six digits of a record number turn up by chance within digests, times and losses.
    forms = [
        re.compile(
            rb"(?<![\w.])" + text.encode() + rb"(?!\w)"
            if text.isdigit()
            else re.escape(text.encode())
        )
        for text in planted
    ]
    assert all(form.search(own) for form in forms), "the search finds them where they are"
    searched = 0
    for out in (plain, private):
        for path in sorted(out.rglob("*")):
            if path.is_file() and "sites" not in path.relative_to(out).parts:
                content = path.read_bytes()
                searched += 1
                assert not [form.pattern for form in forms if form.search(content)], path
    assert searched > 12


def test_sites_own_files_are_for_their_owner_only(plain: Path) -> None:
    homes = list((plain / "simulation" / "sites").iterdir())
    assert len(homes) == 2
    for home in homes:
        assert home.stat().st_mode & 0o077 == 0
        assert (home / "site.toml").stat().st_mode & 0o077 == 0
        assert (home / "keys" / "signing.pem").stat().st_mode & 0o077 == 0
        assert "allowed-models" in read_toml(home / "site.toml")["policy"]
