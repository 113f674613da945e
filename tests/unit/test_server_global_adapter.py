"""Whole runs by every method: what sites train, what grows, what is exported, and going on after a crash."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from common.errors import ConfigError
from server.aggregation import METHODS
from server.history import read_events
from simulations.run import run_simulation
from tests.unit.scenarios import interrupt_after, run, simulation, write_scenario

ROUNDS = 3


def _exported(out: Path) -> dict[str, np.ndarray]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def _checkpoint(out: Path, server_round: int) -> dict[str, np.ndarray]:
    return load_file(out / "checkpoints" / f"round-{server_round:04d}" / "adapter.safetensors")


def _trained(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> set[str]:
    """The factors that differ, "A" and "B"."""
    return {
        "A" if ".lora_A." in name else "B"
        for name in before
        if not np.array_equal(before[name], after[name])
    }


def _settings(method: str, **more: Any) -> dict[str, Any]:
    return {"aggregation__method": method, "train__rounds": ROUNDS, "checkpoint__keep": 0, **more}


@pytest.mark.parametrize("unit", ["none", "record", "patient"])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_by_each_method_with_and_without_dp(
    scenario: Path, tmp_path: Path, method: str, unit: str
) -> None:
    out = tmp_path / "run"
    summary = run(scenario, out, **_settings(method, privacy__unit=unit))
    assert [entry["sites"] for entry in summary["rounds"]] == [["harbour", "north"]] * ROUNDS
    assert summary["central"]["final"]["loss"] != summary["central"]["base"]["loss"]
    for entry in summary["rounds"]:
        told = entry["merge"]
        assert told["method"] == method
        assert set(told["live_ranks"]) == {"min", "median", "max"}
        assert sum(told["shares"].values()) == pytest.approx(1.0)
        assert told["factor_bias"] >= 0
        # All that is left out is what svd cuts.
        assert (entry["discarded_energy"] > 0) == (method == "svd")
        assert told["worst_discarded_energy"] >= entry["discarded_energy"]
    ranks = {len(a) for name, a in _exported(out).items() if ".lora_A." in name}
    assert len(ranks) == 1
    assert (ranks.pop() > 4) == METHODS[method].grows
    if method in ("ffa", "rolora"):
        factors = [_trained(_checkpoint(out, r), _checkpoint(out, r + 1)) for r in (1, 2)]
        assert factors == ([{"B"}, {"B"}] if method == "ffa" else [{"A"}, {"B"}])


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("svd", {"aggregation__server-momentum": 0.9}),
        ("fedsvd", {"aggregation__server-momentum": 0.5, "aggregation__robust": "norm-clip"}),
        ("stack", {"aggregation__robust": "geometric-median"}),
        ("fedex", {}),
        ("rolora", {}),
    ],
)
def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(
    scenario: Path, tmp_path: Path, method: str, settings: dict[str, Any]
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    changes = _settings(method, **settings)
    run(scenario, whole, **changes)
    with pytest.raises(KeyboardInterrupt):
        run_simulation(simulation(scenario, out, **changes), listener=interrupt_after(2))
    run(scenario, out, resume=True, **changes)
    assert [e["round"] for e in read_events(out / "history.jsonl") if e["event"] == "resumed"] == [
        2
    ]
    for folder in (whole, out):
        assert len(list(folder.glob("checkpoints/round-*"))) == ROUNDS
    assert {k: v.tobytes() for k, v in _exported(out).items()} == {
        k: v.tobytes() for k, v in _exported(whole).items()
    }
    has_velocity = (out / "checkpoints" / "round-0003" / "velocity.safetensors").exists()
    assert has_velocity == bool(settings.get("aggregation__server-momentum"))


def test_momentum_moves_the_adapter_further_than_none(scenario: Path, tmp_path: Path) -> None:
    def norm(momentum: float) -> float:
        out = tmp_path / f"momentum-{momentum}"
        run(scenario, out, **_settings("svd"), **{"aggregation__server-momentum": momentum})
        content = _exported(out)
        names = [name for name in content if ".lora_A." in name]
        products = [content[n.replace("lora_A", "lora_B")] @ content[n] for n in names]
        return float(np.sqrt(sum(np.linalg.norm(product) ** 2 for product in products)))

    assert norm(0.9) > 1.1 * norm(0.0)


def _full_ranks(folder: Path, model: Path) -> Path:
    return write_scenario(folder / "full-scenario", model)


@pytest.mark.parametrize("method", ["svd", "stack", "fedex"])
def test_sites_of_mixed_ranks_each_train_what_they_can_hold(
    tiny_model_dir: Path, tmp_path: Path, method: str
) -> None:
    scenario = write_scenario(
        tmp_path / "scenario", tiny_model_dir, policies={"harbour": {"max-rank": 1}}
    )
    out = tmp_path / "run"
    summary = run(scenario, out, **_settings(method))
    assert [entry["sites"] for entry in summary["rounds"]] == [["harbour", "north"]] * ROUNDS
    sent = [e for e in read_events(out / "history.jsonl") if e["event"] == "round"]
    # Of rank 1 and of rank 4 go up: 5/8 of what two of rank 4 would be.
    up = [event["bytes_up"] for event in sent]
    full = run(_full_ranks(tmp_path, tiny_model_dir), tmp_path / "full", **_settings(method))
    assert all(b < 0.75 * entry["bytes_up"] for b, entry in zip(up, full["rounds"], strict=True))
    ranks = {len(a) for name, a in _exported(out).items() if ".lora_A." in name}
    assert ranks.pop() == 4 or method != "svd"


def test_updates_are_clipped_and_the_summary_says_so(scenario: Path, tmp_path: Path) -> None:
    changes = _settings(
        "svd", **{"aggregation__robust": "norm-clip", "aggregation__clip-norm": 1e-3}
    )
    summary = run(scenario, tmp_path / "run", **changes)
    events = read_events(tmp_path / "run" / "history.jsonl")
    norms = {(e["round"], e["site"]): e["update_norm"] for e in events if e["event"] == "reply"}
    for entry in summary["rounds"]:
        for site, share in entry["merge"]["shares"].items():
            assert share == pytest.approx(0.5 * 1e-3 / norms[entry["round"], site], rel=1e-3)


def test_what_a_round_asks_is_not_for_run_toml(scenario: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="are said anew in each round, by aggregation.method"):
        run(scenario, tmp_path / "run", **{"round__trained-factors": "b"})
    assert not (tmp_path / "run").exists()
