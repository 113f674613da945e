"""What a run survives, and what it does not go on from: crashes, damage, another process, another run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

import server.run
from common.audit_log import read_audit_log
from common.errors import CheckpointError, ConfigError
from common.locks import hold_lock
from server.history import read_events
from server.run_folder import run_lock
from simulations.run import run_simulation
from tests.unit.scenarios import interrupt_after, run, simulation


def _exported(out: Path) -> Path:
    return out / "adapter" / "adapter_model.safetensors"


def _adapter(out: Path) -> bytes:
    return _exported(out).read_bytes()


def _events(out: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(out / "history.jsonl") if event["event"] == kind]


def _lines(out: Path, kind: str) -> list[dict[str, Any]]:
    path = out / "simulation" / "coordinator" / "audit.jsonl"
    return [dict(entry.fields) for entry in read_audit_log(path) if entry.event == kind]


def _begin(scenario: Path, out: Path, *, after: int, **changes: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_simulation(simulation(scenario, out, **changes), listener=interrupt_after(after))


def _edit_state(checkpoint: Path, **changes: Any) -> None:
    """Change what a checkpoint says of itself, and its digests with it."""
    path = checkpoint / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    sums = [
        f"{hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()}  {name}\n"
        for name in ("adapter.safetensors", "state.json")
    ]
    (checkpoint / "SHA256SUMS").write_text("".join(sums))


# Checkpoints


@pytest.mark.parametrize("lost", ["merged", "round"])
def test_a_round_whose_process_died_before_it_could_say_so_counts_and_is_told(
    scenario: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """After the checkpoint's rename: before the audit log's line, or before the history's."""
    out = tmp_path / "run"
    noted: Callable[..., None] = server.run._note_merged

    def die(plan: Any, merged: Any, entry: Any) -> None:
        if lost == "round":
            noted(plan, merged, entry)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(server.run, "_note_merged", die)
        with pytest.raises(KeyboardInterrupt):
            run(scenario, out)
    assert _events(out, "round") == []
    run(scenario, out, resume=True)
    assert [event["round"] for event in _events(out, "round")] == [1, 2]
    assert [event["round"] for event in _events(out, "round-started")] == [1, 2]
    assert [line["round"] for line in _lines(out, "merged")] == [1, 2]


def test_a_damaged_checkpoint_costs_its_round_and_nothing_else(
    scenario: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    run(scenario, whole, train__rounds=3)
    _begin(scenario, out, after=2, train__rounds=3)
    newest = out / "checkpoints" / "round-0002" / "adapter.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    run(scenario, out, resume=True, train__rounds=3)
    assert "round-0002 is damaged (adapter.safetensors is not what was saved)" in caplog.text
    assert _adapter(out) == _adapter(whole)
    # The sites sent again what they had sent: nothing was trained twice for round 2.
    assert [event["round"] for event in _events(out, "resumed")] == [1]


def test_another_runs_checkpoints_are_not_gone_on_from(scenario: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    _begin(scenario, out, after=1)
    _edit_state(out / "checkpoints" / "round-0001", run="another")
    with pytest.raises(
        CheckpointError, match=r"are of run 'another', and .* holds run '[0-9a-f]+'"
    ):
        run(scenario, out, resume=True)


def test_a_roster_that_changed_between_is_on_record(scenario: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    _begin(scenario, out, after=1)
    _edit_state(out / "checkpoints" / "round-0001", roster="another")
    run(scenario, out, resume=True)
    (event,) = _events(out, "roster-changed")
    assert event["before"] == "another"
    assert len(event["sites"]) == 2
    assert len(_lines(out, "roster-changed")) == 1


# One process for a run


def test_a_run_that_goes_elsewhere_is_left_alone(scenario: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    _begin(scenario, out, after=1)
    before = (out / "history.jsonl").read_bytes()
    with (
        hold_lock(run_lock(out)),
        pytest.raises(CheckpointError, match=rf"process {os.getpid()} runs the run in .*wait for"),
    ):
        run(scenario, out, resume=True)
    assert (out / "history.jsonl").read_bytes() == before
    run(scenario, out, resume=True)


# The best round

# Far too fast: the loss soon goes up and down.
WILD = {"train__rounds": 12, "train__learning_rate": 3.0, "train__schedule": "constant"}


def test_a_run_stops_early_when_the_loss_no_longer_falls_and_hands_out_its_best(
    scenario: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    settings = {
        **WILD,
        "evaluation__patience": 2,
        "export__round": "best",
        "checkpoint__keep": 1,
    }
    summary = run(scenario, out, **settings)
    losses = [entry["loss"] for entry in summary["rounds"]]
    best = losses.index(min(losses)) + 1
    assert len(losses) == best + 2 < 12
    assert summary["stopped_early"] is True
    assert summary["best"]["round"] == summary["exported_round"] == best
    assert summary["central"]["final"]["loss"] == min(losses)
    assert len(_events(out, "early-stop")) == 1
    kept = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert kept == [f"round-{best:04d}", f"round-{best + 2:04d}"]
    saved = out / "checkpoints" / kept[0] / "adapter.safetensors"
    exported, kept_best = (load_file(path) for path in (_exported(out), saved))
    # alpha 8 at rank 4: the export carries the scaling of 2 in B.
    expected = {(2 * kept_best[n] if "lora_B" in n else kept_best[n]).tobytes() for n in kept_best}
    assert {tensor.tobytes() for tensor in exported.values()} == expected


def test_the_best_round_is_counted_over_a_resumption(scenario: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = {**WILD, "evaluation__patience": 2, "export__round": "best"}
    whole = run(scenario, tmp_path / "whole", **settings)
    _begin(scenario, out, after=whole["best"]["round"] + 1, **settings)
    summary = run(scenario, out, resume=True, **settings)
    assert summary["best"] == whole["best"]
    assert summary["exported_round"] == whole["exported_round"]
    assert len(summary["rounds"]) == len(whole["rounds"]) == whole["best"]["round"] + 2


@pytest.mark.parametrize("setting", [{"evaluation__patience": 1}, {"export__round": "best"}])
def test_the_best_round_needs_something_to_go_by(
    scenario: Path, tmp_path: Path, setting: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.central-data is empty"):
        run(scenario, tmp_path / "run", evaluation__central_data="", **setting)
    assert not (tmp_path / "run").exists()
