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
from common.metrics import LanguageMetrics
from common.model import BaseModel, load_base
from common.prompts import Examples
from server.evaluation import (
    central_files,
    compare_with_base,
    evaluate,
    load_central_examples,
    load_central_set,
    pick_questions,
    planned_passes,
)
from server.evaluation.results import GroupMetrics, ModelResults
from tests.unit.adapters import moved

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
    return moved(initial_adapter(base, CONFIG.lora, seed=0), by=0.05)


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


def test_groups_are_the_column_the_files_or_none(tmp_path: Path, base: BaseModel) -> None:
    rows = [{"instruction": "x", "output": "y", "site": site, "kind": 7} for site in "bab"]
    one = _rows(tmp_path / "one.jsonl", rows)
    two = _rows(tmp_path / "two.jsonl", [{"instruction": "x", "output": "y"}])

    def groups(*files: Path, by: str = "") -> tuple[tuple[str, ...], str]:
        central = load_central_set(files, CONFIG.replace({"evaluation.group-by": by}), base=base)
        assert central is not None
        return central.groups, central.group_by

    assert groups(one) == (("b", "a", "b"), "site")
    # One group is none; where not every record has a site, files tell them apart.
    assert groups(one, by="kind") == ((), "")
    assert groups(one, two) == (("one", "one", "one", "two"), "file")
    assert groups(one, by="file") == ((), "")
    with pytest.raises(DataError, match="1 of 4 test records have no such column"):
        groups(one, two, by="site")


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path: Path, base: BaseModel) -> None:
    for site in ("north", "south"):
        (tmp_path / site).mkdir()
    files = [_write(tmp_path / site / "records.jsonl", count=2) for site in ("north", "south")]
    central = load_central_set([*files, _write(tmp_path / "c.jsonl", count=1)], CONFIG, base=base)
    assert central is not None
    assert central.groups == ("north/records",) * 2 + ("south/records",) * 2 + ("c",)


def test_groups_are_measured_as_if_each_were_alone(tmp_path: Path, base: BaseModel) -> None:
    files = [_write(tmp_path / "a.jsonl", count=3), _write(tmp_path / "b.jsonl", count=5)]
    central = load_central_set(files, CONFIG, base=base)
    assert central is not None
    models, questions = compare_with_base(
        base, _moved(base), central, config=CONFIG, questions=pick_questions(central, CONFIG)
    )
    assert models is not None
    untouched, result = models
    for path, before, after in zip(files, untouched.groups, result.groups, strict=True):
        alone = load_central_examples([path], CONFIG, base=base)
        assert alone is not None
        assert (before.group, before.records) == (path.stem, len(alone))
        for found, adapter in ((before, None), (after, _moved(base))):
            expected = evaluate(base, alone, adapter=adapter, lora=CONFIG.lora, batch_size=2)
            assert found.metrics.loss == pytest.approx(expected.loss, abs=1e-5)
    worst = max(result.groups, key=lambda one: one.metrics.loss)
    assert result.worst_group == worst.group
    # Of a0 a1 a2 b0 ... b4, five at even distances: a0 a1 b0 b1 b3.
    lengths = [len(one.question) for one in questions]
    assert lengths == [1, 4, 1, 4, 10]
    assert all(one.base != one.final for one in questions)


@pytest.mark.parametrize(
    "losses", [(1.0, math.nan, 2.0), (math.nan, 1.0, 2.0), (1.0, 2.0, math.nan)]
)
def test_a_group_whose_loss_is_no_number_is_served_worst(losses: tuple[float, ...]) -> None:
    """Whatever place the alphabet gives it."""
    groups = tuple(
        GroupMetrics(name, 1, LanguageMetrics(loss, 1.0, 0.5))
        for name, loss in zip("abc", losses, strict=True)
    )
    found = ModelResults(LanguageMetrics(1.0, 1.0, 0.5), groups=groups).worst_group
    assert found == "abc"[[math.isnan(loss) for loss in losses].index(True)]


def test_questions_of_ones_own_are_asked_without_any_test_record(
    tmp_path: Path, base: BaseModel
) -> None:
    path = _rows(tmp_path / "q.jsonl", [{"instruction": "Why?", "input": "Fever", "output": "Flu"}])
    config = CONFIG.replace({"evaluation.questions": str(path)})
    questions = pick_questions(None, config)
    models, answered = compare_with_base(
        base, _moved(base), None, config=config, questions=questions
    )
    assert models is None
    assert [(one.question, one.reference) for one in answered] == [("Why?\nFever", "Flu")]
    assert pick_questions(None, config.replace({"evaluation.num-questions": 0})) == ()


def test_progress_reaches_what_was_planned(tmp_path: Path, base: BaseModel) -> None:
    config = CONFIG.replace(
        {
            "evaluation.metrics": "generation, options",
            "evaluation.max-generated": 3,
            "evaluation.max-new-tokens": 2,
            "evaluation.labels": "y,yy,yyy,yyyy,yyyyy",
        }
    )
    central = load_central_set([_write(tmp_path / "a.jsonl")], config, base=base)
    assert central is not None
    questions = pick_questions(central, config)
    done: list[int] = []
    models, _ = compare_with_base(
        base, _moved(base), central, config=config, questions=questions, on_batch=done.append
    )
    assert sum(done) == planned_passes(central, config, questions=len(questions))
    assert models is not None
    generation, options = models[1].generation, models[1].options
    assert generation is not None
    assert options is not None
    assert (generation.records, options.records) == (3, 5)


def _rows(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
