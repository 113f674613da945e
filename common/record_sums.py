"""What a model makes of tokenised records, counted record by record."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from common.answer_logits import answer_logits
from common.metrics import TokenSums, token_sums
from common.model import BaseModel
from common.prompts import Examples, collate


@torch.inference_mode()
def record_sums(
    model: nn.Module,
    base: BaseModel,
    examples: Examples,
    *,
    batch_size: int,
    on_batch: Callable[[int], None] = lambda done: None,
) -> tuple[TokenSums, ...]:
    """Return each record's sums over its answer tokens, in the order of `examples`.

    model: any causal language model on `base`'s device and tokenizer. batch_size: records in memory at once;
    it changes nothing else. on_batch: is told how many records each batch held.
    """
    model.eval()
    sums: list[TokenSums] = [TokenSums()] * len(examples)
    # Alike in length, they need little padding.
    order = sorted(range(len(examples)), key=examples.length)
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        batch = collate([examples[i] for i in places], pad_id=base.pad_id, device=base.device)
        logits, labels = answer_logits(model, batch)
        for place, one in zip(places, token_sums(logits, labels), strict=True):
            sums[place] = one
        on_batch(len(places))
    return tuple(sums)
