"""Central evaluation: which records, which model, and that batching is only about memory."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from common.adapter import AdapterState, LoraPair
from common.config import RunConfig
from common.errors import DataError
from common.lora import initial_adapter
from common.model import BaseModel, load_base
from common.prompts import Examples
from server.evaluation import central_files, evaluate, load_central_examples

CONFIG = RunConfig.parse({"lora.rank": 4, "lora.alpha": 8.0, "data.prompt-template": "question"})


@pytest.fixture(scope="module")
def base(tiny_model_dir: Path) -> BaseModel:
    return load_base(tiny_model_dir, CONFIG.model, device=torch.device("cpu"))


def _write(path: Path, *, count: int = 5, split: str = "test") -> Path:
    rows = [
        {"instruction": "x" * (3 * i + 1), "output": "y" * (i + 1), "split": split}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _examples(tmp_path: Path, base: BaseModel, **settings: object) -> Examples:
    config = CONFIG.replace({k.replace("__", "."): v for k, v in settings.items()})  # type: ignore[misc]
    examples = load_central_examples([_write(tmp_path / "a.jsonl")], config, base=base)
    assert examples is not None
    return examples


def _moved(base: BaseModel) -> AdapterState:
    start = initial_adapter(base, CONFIG.lora, seed=0)
    pairs = {n: LoraPair(p.A, p.B + 0.05) for n, p in start.pairs.items()}
    return AdapterState(pairs, start.scaling)


def test_no_central_data_evaluates_nothing(base: BaseModel) -> None:
    assert central_files("") == []
    assert central_files(" , ") == []
    assert load_central_examples([], CONFIG, base=base) is None


def test_files_and_folders_are_named_by_commas(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "notes.txt"):
        _write(tmp_path / name)
    single = _write(tmp_path.parent / f"{tmp_path.name}-single.jsonl")
    assert central_files(f"{tmp_path}, {single}") == [
        tmp_path / "a.jsonl",
        tmp_path / "b.jsonl",
        single,
    ]


def test_relative_paths_start_where_the_run_file_lies(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl")
    assert central_files("a.jsonl", relative_to=tmp_path) == [path]
    assert central_files(str(path), relative_to=Path("/elsewhere")) == [path]


def test_central_data_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for missing in ("nothing.jsonl", "empty"):
        with pytest.raises(DataError, match=f"no records at .*{missing}"):
            central_files(missing, relative_to=tmp_path)
    present = _write(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="no records at .*nothing"):
        central_files(f"{present},{tmp_path / 'nothing.jsonl'}")


def test_only_the_split_and_the_first_records_are_taken(tmp_path: Path, base: BaseModel) -> None:
    first = _write(tmp_path / "a.jsonl", count=5)
    second = _write(tmp_path / "b.jsonl", count=4, split="train")
    config = CONFIG.replace({"evaluation.max-records": 3})
    examples = load_central_examples([first], config, base=base)
    assert examples is not None
    assert len(examples) == 3
    with pytest.raises(DataError, match="none of them of split 'test'"):
        load_central_examples([second], CONFIG, base=base)
    as_train = CONFIG.replace({"evaluation.split": "train"})
    both = load_central_examples([second], as_train, base=base)
    assert both is not None
    assert len(both) == 4


def test_an_untrained_adapter_is_the_base(tmp_path: Path, base: BaseModel) -> None:
    examples = _examples(tmp_path, base)
    untouched = evaluate(base, examples, adapter=None, lora=CONFIG.lora, batch_size=4)
    start = initial_adapter(base, CONFIG.lora, seed=0)
    same = evaluate(base, examples, adapter=start, lora=CONFIG.lora, batch_size=4)
    assert same == untouched
    # Random weights over 300 tokens: the loss is near log(300) = 5.70.
    assert untouched.loss == pytest.approx(math.log(300), abs=0.3)
    assert untouched.perplexity == pytest.approx(math.exp(untouched.loss))
    assert 0.0 <= untouched.token_accuracy <= 1.0


def test_a_trained_adapter_is_measured_and_the_base_stays_as_it_was(
    tmp_path: Path, base: BaseModel
) -> None:
    examples = _examples(tmp_path, base)
    before = evaluate(base, examples, adapter=None, lora=CONFIG.lora, batch_size=4)
    moved = evaluate(base, examples, adapter=_moved(base), lora=CONFIG.lora, batch_size=4)
    after = evaluate(base, examples, adapter=None, lora=CONFIG.lora, batch_size=4)
    assert abs(moved.loss - before.loss) > 1e-3
    assert after == before


def test_an_adapter_is_measured_at_its_own_rank_and_scaling(
    tmp_path: Path, base: BaseModel
) -> None:
    """Written twice over, side by side, at half the scaling: the same update at twice the rank."""
    examples, moved = _examples(tmp_path, base), _moved(base)
    expected = evaluate(base, examples, adapter=moved, lora=CONFIG.lora, batch_size=4)

    for times in (2, 10):
        # Ten times: rank 40, and the smaller side of most layers is 16 or 32.
        pairs = {
            name: LoraPair(np.tile(pair.A, (times, 1)), np.tile(pair.B, (1, times)))
            for name, pair in moved.pairs.items()
        }
        wide = AdapterState(pairs, moved.scaling / times)
        assert wide.rank == 4 * times
        found = evaluate(base, examples, adapter=wide, lora=CONFIG.lora, batch_size=4)
        assert found.loss == pytest.approx(expected.loss, abs=1e-5)


def test_modules_with_a_scaling_of_their_own_are_measured_with_it(
    tmp_path: Path, base: BaseModel
) -> None:
    examples, moved = _examples(tmp_path, base), _moved(base)
    names = [name for name in moved.pairs if name.endswith("q_proj")]
    louder = {n: LoraPair(p.A, 3 * p.B if n in names else p.B) for n, p in moved.pairs.items()}
    own = dict.fromkeys(names, 3 * moved.scaling)

    def loss(adapter: AdapterState) -> float:
        return evaluate(base, examples, adapter=adapter, lora=CONFIG.lora, batch_size=4).loss

    found = loss(AdapterState(moved.pairs, moved.scaling, own))
    assert found == pytest.approx(loss(AdapterState(louder, moved.scaling)), abs=1e-5)
    assert abs(found - loss(moved)) > 1e-4


def test_the_batch_size_does_not_change_the_result(tmp_path: Path, base: BaseModel) -> None:
    """Records of other lengths, so that padding is in every batch but those of one."""
    examples = _examples(tmp_path, base)
    adapter = _moved(base)
    results = [
        evaluate(base, examples, adapter=adapter, lora=CONFIG.lora, batch_size=size)
        for size in (1, 2, 5, 64)
    ]
    for other in results[1:]:
        assert other.loss == pytest.approx(results[0].loss, abs=1e-5)
        assert other.token_accuracy == results[0].token_accuracy


def test_every_answer_token_weighs_the_same(tmp_path: Path, base: BaseModel) -> None:
    """The loss of two records together is the mean over tokens, not over records."""
    examples = _examples(tmp_path, base)
    parts = [
        evaluate(base, examples[i : i + 1], adapter=None, lora=CONFIG.lora, batch_size=1).loss
        for i in range(5)
    ]
    # Answers of 1..5 letters and an end token each.
    tokens = [2, 3, 4, 5, 6]
    whole = evaluate(base, examples, adapter=None, lora=CONFIG.lora, batch_size=5).loss
    expected = sum(n * loss for n, loss in zip(tokens, parts, strict=True)) / sum(tokens)
    assert whole == pytest.approx(expected, abs=1e-5)
