"""What a model's likelihood says of each record: its mean loss, and that of its least likely tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from common.answer_logits import answer_logits
from common.metrics import record_losses, token_losses
from common.model import BaseModel
from common.prompts import Examples, collate
from simulations.attack.guessing import Scores

# The share of a record's tokens that min-k% looks at (Shi et al. 2310.16789, section 4).
MIN_K = 0.2


@dataclass(frozen=True, slots=True)
class RecordLosses:
    """Of each record, in nats per answer token.

    mean: over all its answer. least_likely: over the 20 % of highest loss.
    """

    mean: Scores
    least_likely: Scores


@torch.inference_mode()
def losses_of_records(
    model: nn.Module,
    base: BaseModel,
    examples: Examples,
    *,
    batch_size: int,
    on_records: Callable[[int], None] = lambda count: None,
) -> RecordLosses:
    """Return the losses of each record under a model, in the records' order.

    model: on `base`'s device. on_records: is told after each batch how many were in it.
    """
    model.eval()
    order = sorted(range(len(examples)), key=examples.length)
    mean, least_likely = np.zeros(len(order)), np.zeros(len(order))
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        batch = collate([examples[i] for i in places], pad_id=base.pad_id, device=base.device)
        logits, labels = answer_logits(model, batch)
        mean[places] = record_losses(logits, labels).double().cpu().numpy()
        least_likely[places] = least_likely_losses(logits, labels).double().cpu().numpy()
        on_records(len(places))
    return RecordLosses(mean, least_likely)


def least_likely_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return each record's mean loss over the 20 % of its answer tokens that are least likely, one at least.

    logits: (batch, length, vocabulary); labels: (batch, length), IGNORE outside the answer.
    Returns (batch,); 0 for a record without answer tokens.
    Source: min-k% prob, Shi et al. 2310.16789, equation 1, as a loss.
    """
    rows = []
    for losses, answered in zip(*token_losses(logits, labels), strict=True):
        own = losses[answered.bool()]
        count = max(1, math.floor(MIN_K * len(own)))
        rows.append(own.topk(count).values.mean() if len(own) else losses.new_zeros(()))
    return torch.stack(rows)
