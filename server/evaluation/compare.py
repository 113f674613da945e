"""A result beside its untouched base, by everything that evaluation.metrics asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from torch import nn

from common.adapter import AdapterState
from common.config import RunConfig
from common.dataset import Columns, load_records
from common.metrics import TokenSums, summarize
from common.model import BaseModel
from common.prompts import Prompt
from server.evaluation.central import CentralSet
from server.evaluation.counts import CentralCounts
from server.evaluation.generation import generate_answers
from server.evaluation.language import group_metrics, lent_model
from server.evaluation.options import measure_options, option_labels
from server.evaluation.results import AnsweredQuestion, ModelResults
from server.evaluation.text_metrics import score_answers

_T = TypeVar("_T")


def pick_questions(central: CentralSet | None, config: RunConfig) -> tuple[Prompt, ...]:
    """Return the fixed list of questions: those of evaluation.questions, or test records from all groups.

    The same for the same records, whatever the model. Raises DataError when the file is unusable.
    """
    settings = config.evaluation
    count = settings.num_questions
    if settings.questions:
        path = Path(settings.questions)
        return load_records(path, columns=Columns(), max_records=count).prompts if count else ()
    if central is None:
        return ()
    groups = central.groups or ("",) * len(central)
    by_group = sorted(range(len(central)), key=lambda place: groups[place])
    return tuple(central.prompts[place] for place in _spread(by_group, count))


def planned_passes(central: CentralSet | None, config: RunConfig, *, questions: int) -> int:
    """Return how many records `compare_with_base` will tell `on_batch` of, all in all."""
    if central is None:
        return 2 * questions
    settings, size = config.evaluation, len(central)
    passes = size + questions
    if "generation" in settings.metric_names:
        passes += len(_generated(central, config))
    if "options" in settings.metric_names:
        passes += size * len(option_labels(settings.labels, central.prompts))
    return 2 * passes


def compare_with_base(
    base: BaseModel,
    adapter: AdapterState,
    central: CentralSet | None,
    *,
    config: RunConfig,
    questions: Sequence[Prompt] = (),
    counts: CentralCounts | None = None,
    on_batch: Callable[[int], None] = lambda done: None,
) -> tuple[tuple[ModelResults, ModelResults] | None, tuple[AnsweredQuestion, ...]]:
    """Return what base and base with adapter are worth, in this order, and their answers to `questions`.

    counts: of these records, where some were counted before. on_batch: is told how many records each batch
    held; see `planned_passes`. Raises DataError.
    """
    if central is None and not questions:
        return None, ()
    if counts is None and central is not None:
        counts = CentralCounts(base, central.examples, config=config)
    results, answers = [], []
    for state in (None, adapter):
        sums = () if counts is None else counts.sums(state, on_batch=on_batch)
        with lent_model(base, config.lora, state) as model:
            if central is not None:
                results.append(
                    _measure(model, base, central, sums, config=config, on_batch=on_batch)
                )
            answers.append(
                generate_answers(model, base, questions, config=config, on_batch=on_batch)
            )
    answered = tuple(
        AnsweredQuestion(_asked(prompt), prompt.output, before, after)
        for prompt, before, after in zip(questions, *answers, strict=True)
    )
    return ((results[0], results[1]) if results else None), answered


def _measure(
    model: nn.Module,
    base: BaseModel,
    central: CentralSet,
    sums: Sequence[TokenSums],
    *,
    config: RunConfig,
    on_batch: Callable[[int], None],
) -> ModelResults:
    settings = config.evaluation
    generation = options = None
    if "generation" in settings.metric_names:
        prompts = _generated(central, config)
        answers = generate_answers(model, base, prompts, config=config, on_batch=on_batch)
        generation = score_answers(answers, [prompt.output for prompt in prompts])
    if "options" in settings.metric_names:
        labels = option_labels(settings.labels, central.prompts)
        options = measure_options(
            model, base, central.prompts, labels=labels, config=config, on_batch=on_batch
        )
    return ModelResults(summarize(sums), generation, options, group_metrics(sums, central.groups))


def _generated(central: CentralSet, config: RunConfig) -> Sequence[Prompt]:
    """The records that answers are generated for, spread over all of them."""
    return _spread(central.prompts, config.evaluation.max_generated or len(central))


def _spread(items: Sequence[_T], count: int) -> Sequence[_T]:
    """So many of the items at even distances, or all of them."""
    kept = min(count, len(items))
    return [items[i * len(items) // kept] for i in range(kept)]


def _asked(prompt: Prompt) -> str:
    return "\n".join(filter(None, (prompt.instruction, prompt.input)))
