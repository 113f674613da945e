"""Only answers are worth a row of logits, and losses and gradients are those of all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.answer_logits import answer_logits
from common.config import RunConfig
from common.lora import attached
from common.metrics import record_losses, token_sums
from common.model import BaseModel
from common.prompts import Batch, Example, collate
from tests.unit.tiny import CONFIGS, tiny_base

CONFIG = RunConfig.parse({"lora.rank": 4, "lora.target-modules": "all-linear"})
CPU = torch.device("cpu")
# Prompts of 3 and 5 tokens, answers of 3 and 4.
RECORDS = [Example(tuple(range(3, 9)), 3), Example(tuple(range(10, 19)), 4)]


@pytest.fixture(params=sorted(CONFIGS))
def base(request: pytest.FixtureRequest) -> BaseModel:
    return tiny_base(request.param)


def _batch(records: list[Example] | None = None) -> Batch:
    return collate(records or RECORDS, pad_id=0, device=CPU)


def test_losses_sums_and_gradients_are_those_of_all_logits(base: BaseModel) -> None:
    batch = _batch()
    with attached(base, CONFIG.lora) as model:
        # The same weights whichever tests drew before.
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.2, generator=generator)
        everything = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        expected = record_losses(everything, batch.labels)
        wanted = _gradients(model, expected)
        logits, labels = answer_logits(model, batch)
        found = record_losses(logits, labels)
        assert torch.allclose(found, expected, atol=1e-6)
        for one, other in zip(_gradients(model, found), wanted, strict=True):
            assert torch.allclose(one, other, atol=1e-6)
    for one, other in zip(
        token_sums(logits, labels), token_sums(everything, batch.labels), strict=True
    ):
        assert (one.tokens, one.correct) == (other.tokens, other.correct)
        assert one.nll == pytest.approx(other.nll, rel=1e-5)
    assert found[0] != found[1]


def _gradients(model: nn.Module, losses: Tensor) -> tuple[Tensor, ...]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(losses.sum(), trained)


def test_prompts_are_not_multiplied_by_the_vocabulary(base: BaseModel) -> None:
    seen: list[int] = []
    head: Any = base.model.get_output_embeddings()  # type: ignore[operator]
    with attached(base, CONFIG.lora) as model:
        handle = head.register_forward_pre_hook(
            lambda module, given: seen.append(given[0].shape[1])
        )
        logits, labels = answer_logits(model, _batch())
        handle.remove()
    # Of 9 positions the first answer token is the fourth, which the third predicts.
    assert seen == [7]
    assert logits.shape[:2] == labels.shape == (2, 7)


@pytest.mark.parametrize(
    ("records", "kept"),
    [
        ([Example((3, 4, 5, 6), 1)], 2),
        ([Example((3, 4, 5, 6), 3)], 4),
        ([Example((3, 4, 5, 6), 4)], 4),
        ([Example((3, 4, 5, 6), 0)], 4),
        ([Example((3, 4, 5, 6), 1), Example((3, 4), 1)], 4),
    ],
    ids=["one", "all-but-one", "all", "none", "an-early-one"],
)
def test_as_many_positions_are_kept_as_an_answer_needs(records: list[Example], kept: int) -> None:
    logits, labels = answer_logits(tiny_base("llama").model, _batch(records))
    assert logits.shape[:2] == labels.shape == (len(records), kept)
    assert torch.isfinite(record_losses(logits, labels)).all()


@dataclass
class _Output:
    logits: Tensor


class _ComputesAll(nn.Module):
    """A model that knows no logits_to_keep."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> _Output:
        return _Output(nn.functional.one_hot(input_ids, 32).float())


def test_a_model_that_computes_all_gives_the_same_positions() -> None:
    batch = _batch()
    logits, labels = answer_logits(_ComputesAll(), batch)
    assert torch.equal(logits.argmax(dim=-1), batch.input_ids[:, 2:])
    assert torch.equal(labels, batch.labels[:, 2:])
