"""What a model says of a batch's answers, without a word on the prompts before them.

A row of logits is as wide as the vocabulary: over a long prompt they are most of a step's memory, and no loss
looks at them.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from common.prompts import IGNORE, Batch


def answer_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return a batch's logits and labels from the position before its first answer token to its end.

    model: any causal language model, lent or not; of one that cannot leave positions out, all are computed.
    Returns logits (batch, kept, vocabulary) and labels (batch, kept), which fit together as
    `common.metrics.record_losses` wants them.
    """
    kept = _num_kept(batch.labels)
    options = {"logits_to_keep": kept} if _may_keep(model) else {}
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **options)
    return output.logits[:, -kept:], batch.labels[:, -kept:]


def _num_kept(labels: Tensor) -> int:
    """How many of the last positions predict an answer token, or are one; all where there is no answer."""
    length = labels.shape[1]
    answered = (labels != IGNORE).any(dim=0).nonzero()
    return length if len(answered) == 0 else length - max(int(answered[0]) - 1, 0)


def _may_keep(model: Any) -> bool:
    own = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(own.forward).parameters
