"""Greedy answers of a model to prompts, in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from common.config import RunConfig
from common.model import BaseModel
from common.prompts import Prompt, resolve_template, tokenize_question


@torch.inference_mode()
def generate_answers(
    model: nn.Module,
    base: BaseModel,
    prompts: Sequence[Prompt],
    *,
    config: RunConfig,
    on_batch: Callable[[int], None] = lambda done: None,
) -> tuple[str, ...]:
    """Return the likeliest next tokens after each prompt, as text, at most evaluation.max-new-tokens of them.

    model: on `base`'s device and tokenizer. on_batch: is told how many prompts each batch held.
    Prompt and answer fit into data.max-length, of which the prompt keeps at least half.
    """
    model.eval()
    settings, length = config.evaluation, config.data.max_length
    # Where positions are learnt, there are no more of them than a model may hold.
    new_tokens = min(settings.max_new_tokens, length - length // 2)
    template = resolve_template(config.data.prompt_template)
    questions = [
        tokenize_question(
            prompt,
            tokenizer=base.tokenizer,
            template=template,
            max_tokens=length - new_tokens,
        )
        for prompt in prompts
    ]
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(questions[i]))
    for start in range(0, len(order), settings.batch_size):
        places = order[start : start + settings.batch_size]
        new = _continue(model, base, [questions[i] for i in places], new_tokens)
        for place, ids in zip(places, new, strict=True):
            text: str = base.tokenizer.decode(ids, skip_special_tokens=True)
            answers[place] = text.strip()
        on_batch(len(places))
    return tuple(answers)


@contextmanager
def without_own_settings(model: nn.Module) -> Iterator[None]:
    """Set aside what a model's folder says of generating, so that the caller's settings are all there are.

    What a caller leaves open transformers takes from the model's generation_config.json: Qwen2.5's asks for
    a penalty on repeated tokens, and then the likeliest token is not what is generated.
    """
    from transformers import GenerationConfig

    # Of a lent model it is the base's own, which PEFT reads through.
    lent: Any = model
    inner = lent.get_base_model() if hasattr(model, "get_base_model") else lent
    own = inner.generation_config
    inner.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        inner.generation_config = own


def _continue(
    model: Any, base: BaseModel, questions: Sequence[tuple[int, ...]], max_new_tokens: int
) -> list[list[int]]:
    """The new tokens after each question, up to the end of text."""
    # On the left, so that what is new begins in one column.
    length = max(map(len, questions))
    ids = torch.full((len(questions), length), base.pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, question in enumerate(questions):
        ids[row, length - len(question) :] = torch.tensor(question, dtype=torch.int64)
        mask[row, length - len(question) :] = 1
    with without_own_settings(model):
        output = model.generate(
            input_ids=ids.to(base.device),
            attention_mask=mask.to(base.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            pad_token_id=base.pad_id,
            eos_token_id=base.tokenizer.eos_token_id,
        )
    end = base.tokenizer.eos_token_id
    new: list[list[int]] = output[:, length:].tolist()
    return [row[: row.index(end)] if end in row else row for row in new]
