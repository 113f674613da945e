"""Central records are counted once under each model, and what is kept is what counting gives."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from common.adapter import AdapterState
from common.config import RunConfig
from common.lora import initial_adapter
from common.model import BaseModel, load_base
from common.prompts import Examples
from server.evaluation import CentralCounts, CentralSet, compare_with_base, counts, load_central_set
from tests.unit.adapters import moved

CONFIG = RunConfig.parse(
    {
        "lora.rank": 4,
        "lora.alpha": 8.0,
        "data.prompt-template": "question",
        "evaluation.batch-size": 2,
    }
)


@pytest.fixture(scope="module")
def base(tiny_model_dir: Path) -> BaseModel:
    return load_base(tiny_model_dir, CONFIG.model, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def central(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> CentralSet:
    path = tmp_path_factory.mktemp("central") / "a.jsonl"
    rows = [{"instruction": "x" * (3 * i + 1), "output": "y" * (i + 1)} for i in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_central_set([path], CONFIG, base=base)
    assert found is not None
    return found


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many records each pass over a model held."""
    counted: list[int] = []
    real = counts.record_sums

    def record_sums(model: Any, base: BaseModel, examples: Examples, **named: Any) -> Any:
        counted.append(len(examples))
        return real(model, base, examples, **named)

    monkeypatch.setattr(counts, "record_sums", record_sums)
    return counted


def _adapter(base: BaseModel, by: float) -> AdapterState:
    return moved(initial_adapter(base, CONFIG.lora, seed=0), by=by)


def test_base_and_newest_adapter_are_counted_once(
    base: BaseModel, central: CentralSet, passes: list[int]
) -> None:
    kept = CentralCounts(base, central.examples, config=CONFIG)
    first, second = _adapter(base, 0.05), _adapter(base, 0.1)
    told: list[int] = []
    untouched = kept.sums(None, on_batch=told.append)
    assert kept.sums(first) != untouched
    assert kept.sums(first) == kept.sums(_adapter(base, 0.05))
    newer = kept.sums(second)
    assert kept.sums(None, on_batch=told.append) == untouched
    assert passes == [5, 5, 5]
    assert told == [2, 2, 1, 5]
    # The one before the newest is let go.
    assert kept.sums(first) != newer
    assert passes == [5, 5, 5, 5]


def test_the_same_factors_with_another_scaling_are_another_adapter(
    base: BaseModel, central: CentralSet, passes: list[int]
) -> None:
    kept = CentralCounts(base, central.examples, config=CONFIG)
    adapter = _adapter(base, 0.1)
    module = min(adapter.pairs)
    sums = [
        kept.sums(one)
        for one in (
            adapter,
            replace(adapter, scaling=9.0),
            replace(adapter, own_scalings={module: 9.0}),
        )
    ]
    assert len(passes) == len(set(sums)) == 3


def test_a_comparison_takes_what_was_counted_before_and_is_the_same(
    base: BaseModel, central: CentralSet, passes: list[int]
) -> None:
    adapter = _adapter(base, 0.1)
    anew, _ = compare_with_base(base, adapter, central, config=CONFIG)
    assert passes == [5, 5]
    kept = CentralCounts(base, central.examples, config=CONFIG)
    assert kept.metrics(None).loss != kept.metrics(adapter).loss
    passes.clear()
    taken, _ = compare_with_base(base, adapter, central, config=CONFIG, counts=kept)
    assert passes == []
    assert taken == anew
    assert taken is not None
    assert [model.language for model in taken] == [kept.metrics(None), kept.metrics(adapter)]
