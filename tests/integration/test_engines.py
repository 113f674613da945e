"""The inline engine and Flower's own give the same adapter."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from common.config import RunConfig
from server.history import read_events
from simulations.run import EngineName, Simulation, run_simulation
from simulations.sites import find_sites
from tests.integration.sites import SMALL, write_data

pytestmark = pytest.mark.integration


def test_inline_and_flower_give_the_same_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread each, DP off, same seed, SGD: equal to 1e-6."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    write_data(tmp_path)
    config = RunConfig.parse({**SMALL, "evaluation.central-data": "central.jsonl"})
    adapters, events = {}, {}
    engines: tuple[EngineName, EngineName] = ("inline", "flower")
    for engine in engines:
        seen: list[str] = []
        summary = run_simulation(
            Simulation(
                config=config,
                sources=find_sites(tmp_path / "sites"),
                out=tmp_path / engine,
                base_dir=tmp_path,
                engine=engine,
            ),
            listener=lambda event, seen=seen: seen.append(event["event"]),  # type: ignore[misc]
        )
        assert len(summary["sites"]) == 2
        adapters[engine] = load_file(tmp_path / engine / "adapter" / "adapter_model.safetensors")
        events[engine] = seen
        stored = json.loads((tmp_path / engine / "summary.json").read_text())
        assert stored == summary
        assert [e["event"] for e in read_events(tmp_path / engine / "history.jsonl")] == seen

    assert set(adapters["inline"]) == set(adapters["flower"])
    for name, tensor in adapters["inline"].items():
        np.testing.assert_allclose(tensor, adapters["flower"][name], atol=1e-6, rtol=0)
    moved = [np.abs(t).max() for n, t in adapters["inline"].items() if "lora_B" in n]
    assert min(moved) > 1e-4, "the comparison is of trained adapters"
    assert events["flower"].count("round") == 2
