"""Multiple choice by likelihood, by hand on a model that says what it is told to."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from common.config import RunConfig
from common.errors import DataError
from common.metrics import TokenSums
from common.model import BaseModel
from common.prompts import Examples, Prompt
from server.evaluation import options
from server.evaluation.central import CentralSet
from server.evaluation.options import check_options, measure_options, option_labels

CONFIG = RunConfig.parse({"data.prompt-template": "question", "evaluation.batch-size": 2})
LABELS = ("yes", "no", "maybe")


class _Says(nn.Module):
    """After a prompt that holds a byte of `says`, its bytes and the end are likely, all else is alike."""

    def __init__(self, tokenizer: Any, says: dict[str, str]) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.says = says

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        logits = torch.zeros(*input_ids.shape, 300)
        for row, ids in enumerate(input_ids.tolist()):
            text = self.tokenizer.decode(ids)
            said = next(answer for mark, answer in self.says.items() if mark in text)
            answer = [*self.tokenizer(said, add_special_tokens=False).input_ids, 2]
            start = len(
                self.tokenizer(
                    text.split("Answer: ")[0] + "Answer: ", add_special_tokens=False
                ).input_ids
            )
            for place, token in enumerate(answer):
                position = start - 1 + place
                if position < logits.shape[1]:
                    logits[row, position, token] = 5.0
        return SimpleNamespace(logits=logits)


def _prompts(*answers: str) -> list[Prompt]:
    return [Prompt(f"#{i}#", "", answer) for i, answer in enumerate(answers)]


def test_the_likeliest_whole_answer_is_chosen_and_counted(plain: BaseModel) -> None:
    prompts = _prompts("yes", "no", "no", "maybe")
    says = {"#0#": "yes", "#1#": "no", "#2#": "yes", "#3#": "maybe"}

    found = measure_options(
        _Says(plain.tokenizer, says), plain, prompts, labels=LABELS, config=CONFIG
    )

    assert found.accuracy == pytest.approx(3 / 4)
    # Rows: yes, no, maybe as they are; columns: as they were chosen.
    assert found.confusion == ((1, 0, 0), (1, 1, 0), (0, 0, 1))
    # F1: yes 2/3, no 2/3, maybe 1.
    assert found.macro_f1 == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert (found.labels, found.records) == (LABELS, 4)


def test_a_model_that_diverged_has_chosen_nothing(plain: BaseModel) -> None:
    """The smallest of numbers that are none would be the first label, and that often enough the true one."""

    class Diverged(nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            return SimpleNamespace(logits=torch.full((*input_ids.shape, 300), torch.nan))

    prompts = _prompts("yes", "yes")
    found = measure_options(Diverged(), plain, prompts, labels=LABELS, config=CONFIG)
    assert math.isnan(found.accuracy)
    assert math.isnan(found.macro_f1)
    assert (found.confusion, found.records) == ((), 2)


def test_an_option_that_begins_like_another_is_not_preferred_for_being_shorter(
    plain: BaseModel,
) -> None:
    prompts = _prompts("no", "none")
    says = {"#0#": "no", "#1#": "none"}
    found = measure_options(
        _Says(plain.tokenizer, says), plain, prompts, labels=("no", "none"), config=CONFIG
    )
    assert found.accuracy == 1.0


def test_every_label_follows_the_same_words_of_a_long_prompt(
    plain: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, set[tuple[int, ...]]] = {}

    def record_sums(model: Any, base: Any, examples: Examples, **named: Any) -> list[TokenSums]:
        for place, one in enumerate(examples):
            seen.setdefault(place, set()).add(one.token_ids[: -one.num_answer])
        return [TokenSums()] * len(examples)

    monkeypatch.setattr(options, "record_sums", record_sums)
    short = CONFIG.replace({"data.max-length": 40})
    prompts = [Prompt("why " * 30, "", "yes"), Prompt("why", "", "no")]
    labels = ("yes", "no", "certainly not")
    measure_options(plain.model, plain, prompts, labels=labels, config=short)
    assert [len(kept) for kept in seen.values()] == [1, 1]


def test_labels_are_named_or_found() -> None:
    prompts = _prompts("yes", " no ", "yes")
    assert option_labels("yes, no,maybe", prompts) == ("yes", "no", "maybe")
    assert option_labels("", prompts) == ("no", "yes")


@pytest.mark.parametrize(
    ("labels", "answers", "said"),
    [
        ("", ["yes", "yes"], "1 different answers"),
        ("", [str(i) for i in range(21)], "21 different answers"),
        ("yes,no", ["yes", "perhaps", "never"], "2 of 3 test records answer none of the 2 labels"),
    ],
)
def test_records_that_have_no_labels_are_refused(
    labels: str, answers: list[str], said: str
) -> None:
    central = CentralSet(tuple(_prompts(*answers)), Examples([]))
    config = CONFIG.replace({"evaluation.metrics": "options", "evaluation.labels": labels})
    with pytest.raises(DataError, match=said):
        check_options(central, config)
    check_options(central, CONFIG)
    check_options(None, config)
