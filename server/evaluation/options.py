"""Multiple choice by likelihood: the option that a model finds likeliest as the whole answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn

from common.config import RunConfig
from common.errors import DataError
from common.model import BaseModel
from common.prompts import Prompt
from common.record_sums import record_sums
from server.evaluation.central import CentralSet, tokenize_prompts
from server.evaluation.results import OptionMetrics

# More different answers than this are no label set.
MAX_LABELS = 20


def option_labels(labels: str, prompts: Sequence[Prompt]) -> tuple[str, ...]:
    """Return the labels of evaluation.labels, comma-separated; "" takes those that the answers are.

    Raises DataError when an answer is none of them, or answers are too many to be labels.
    """
    answers = [_label(prompt.output) for prompt in prompts]
    named = tuple(dict.fromkeys(filter(None, map(_label, labels.split(",")))))
    found = named or tuple(sorted(set(answers)))
    if not 2 <= len(found) <= MAX_LABELS:
        raise DataError(
            f"the test records have {len(found)} different answers; labels are 2 to {MAX_LABELS}: name them "
            "in evaluation.labels, or take options out of evaluation.metrics"
        )
    strangers = sum(answer not in found for answer in answers)
    if strangers:
        raise DataError(
            f"{strangers} of {len(answers)} test records answer none of the {len(found)} labels of "
            "evaluation.labels; correct the labels, or leave those records out"
        )
    return found


def check_options(central: CentralSet | None, config: RunConfig) -> None:
    """Raise DataError when evaluation.metrics asks for options and the test records are none of them."""
    if central is not None and "options" in config.evaluation.metric_names:
        option_labels(config.evaluation.labels, central.prompts)


def measure_options(
    model: nn.Module,
    base: BaseModel,
    prompts: Sequence[Prompt],
    *,
    labels: Sequence[str],
    config: RunConfig,
    on_batch: Callable[[int], None] = lambda done: None,
) -> OptionMetrics:
    """Return how a model chooses among labels, each scored as log P(label, end of text | prompt).

    The end of text is part of it, so that labels of any length compare as whole answers. A prompt that is
    too long is cut to what the longest label leaves of data.max-length, for all labels alike. A model that
    gives a label no number has chosen nothing: its metrics are NaN, and it has no confusion.
    on_batch: is told how many records each batch held, label after label.
    """
    from torchmetrics.functional.classification import (
        multiclass_accuracy,
        multiclass_confusion_matrix,
        multiclass_f1_score,
    )

    lengths = [len(base.tokenizer(one, add_special_tokens=False).input_ids) for one in labels]
    costs = []
    for label, length in zip(labels, lengths, strict=True):
        examples = tokenize_prompts(
            [replace(prompt, output=label) for prompt in prompts],
            config,
            base=base,
            shorter_by=max(lengths) - length,
        )
        sums = record_sums(
            model, base, examples, batch_size=config.evaluation.batch_size, on_batch=on_batch
        )
        costs.append([one.nll for one in sums])
    scores = torch.tensor(costs, dtype=torch.float64)
    if scores.isnan().any():
        return OptionMetrics(tuple(labels), math.nan, math.nan, (), len(prompts))
    chosen = scores.argmin(dim=0)
    true = torch.tensor([list(labels).index(_label(prompt.output)) for prompt in prompts])
    count = len(labels)
    confusion = multiclass_confusion_matrix(chosen, true, num_classes=count)
    return OptionMetrics(
        labels=tuple(labels),
        accuracy=float(multiclass_accuracy(chosen, true, num_classes=count, average="micro")),
        macro_f1=float(multiclass_f1_score(chosen, true, num_classes=count, average="macro")),
        confusion=tuple(tuple(row) for row in confusion.tolist()),
        records=len(prompts),
    )


def _label(text: str) -> str:
    return text.strip()
