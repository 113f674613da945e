"""Greedy answers: alone or in a batch, with an adapter or without, and with no word of the prompt."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from common.config import RunConfig
from common.lora import initial_adapter
from common.model import BaseModel
from common.prompts import Prompt
from server.evaluation.generation import generate_answers
from server.evaluation.language import lent_model
from tests.unit.adapters import moved
from tests.unit.tiny import tiny_base

CONFIG = RunConfig.parse(
    {
        "lora.rank": 4,
        "data.prompt-template": "question",
        "data.max-length": 64,
        "evaluation.max-new-tokens": 12,
    }
)
PROMPTS = [Prompt("What helps?" * length, "", "tea") for length in (1, 5, 2, 3)]


def test_a_batch_changes_no_answer(base: BaseModel) -> None:
    alone = CONFIG.replace({"evaluation.batch-size": 1})
    together = CONFIG.replace({"evaluation.batch-size": 4})
    found = generate_answers(base.model, base, PROMPTS, config=together)
    assert found == generate_answers(base.model, base, PROMPTS, config=alone)
    assert len(set(found)) > 1


def test_the_first_token_is_the_likeliest(plain: BaseModel) -> None:
    one = CONFIG.replace({"evaluation.max-new-tokens": 1})
    ids = plain.tokenizer("<s>Question: What helps?\nAnswer: ", add_special_tokens=False).input_ids
    with torch.inference_mode():
        likeliest = int(plain.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
    (answer,) = generate_answers(plain.model, plain, PROMPTS[:1], config=one)
    assert answer == plain.tokenizer.decode([likeliest], skip_special_tokens=True).strip()


def test_an_adapter_answers_otherwise_and_leaves_the_base_as_it_was(plain: BaseModel) -> None:
    before = generate_answers(plain.model, plain, PROMPTS, config=CONFIG)
    adapter = moved(initial_adapter(plain, CONFIG.lora, seed=0), by=0.5)
    with lent_model(plain, CONFIG.lora, adapter) as model:
        assert generate_answers(model, plain, PROMPTS, config=CONFIG) != before
    assert generate_answers(plain.model, plain, PROMPTS, config=CONFIG) == before


def test_what_a_model_folder_says_of_generating_changes_no_answer(
    plain: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen2.5's generation_config.json has a repetition penalty, others forbid tokens or take turns."""
    before = generate_answers(plain.model, plain, PROMPTS, config=CONFIG)
    adapter = moved(initial_adapter(plain, CONFIG.lora, seed=0), by=0.5)
    with lent_model(plain, CONFIG.lora, adapter) as model:
        lent_before = generate_answers(model, plain, PROMPTS, config=CONFIG)
    own = plain.model.generation_config  # type: ignore[attr-defined]
    for name, value in {"repetition_penalty": 1.5, "no_repeat_ngram_size": 1}.items():
        monkeypatch.setattr(own, name, value)
    assert generate_answers(plain.model, plain, PROMPTS, config=CONFIG) == before
    with lent_model(plain, CONFIG.lora, adapter) as model:
        assert generate_answers(model, plain, PROMPTS, config=CONFIG) == lent_before
    assert plain.model.generation_config is own  # type: ignore[attr-defined]


def test_the_end_of_text_ends_an_answer(plain: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    word = plain.tokenizer("ab", add_special_tokens=False).input_ids

    def generate(*, input_ids: torch.Tensor, **settings: object) -> torch.Tensor:
        assert settings["do_sample"] is False
        new = torch.tensor([[*word, 2, *word]] * len(input_ids))
        return torch.cat([input_ids, new], dim=1)

    monkeypatch.setattr(plain.model, "generate", generate)
    assert generate_answers(plain.model, plain, PROMPTS[:2], config=CONFIG) == ("ab", "ab")


def test_prompt_and_answer_fit_where_positions_are_learnt(plain: BaseModel) -> None:
    # It has 64 positions, as many as data.max-length.
    gpt2 = replace(tiny_base("gpt2"), tokenizer=plain.tokenizer)
    long = CONFIG.replace({"evaluation.max-new-tokens": 48})
    answers = generate_answers(gpt2.model, gpt2, PROMPTS, config=long)
    assert len(answers) == len(PROMPTS)


def test_progress_counts_every_prompt_once(plain: BaseModel) -> None:
    done: list[int] = []
    short = CONFIG.replace({"evaluation.batch-size": 3, "evaluation.max-new-tokens": 1})
    generate_answers(plain.model, plain, PROMPTS, config=short, on_batch=done.append)
    assert done == [3, 1]
