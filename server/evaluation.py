"""Central evaluation: loss, perplexity and token accuracy on the coordinator's own records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from common.adapter import AdapterState
from common.config import LoraSection, RunConfig
from common.dataset import Columns, load_records
from common.errors import DataError
from common.lora import carrying
from common.metrics import LanguageMetrics, summarize, token_sums
from common.model import BaseModel
from common.prompts import Examples, collate, resolve_template, tokenize_all


def central_files(central_data: str, *, relative_to: Path = Path()) -> list[Path]:
    """Return the files that evaluation.central-data names: files or folders, comma-separated.

    A folder stands for its *.jsonl files. Raises DataError when one of them is missing.
    """
    files: list[Path] = []
    for part in filter(None, (part.strip() for part in central_data.split(","))):
        path = relative_to / part
        found = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not found or not found[0].is_file():
            raise DataError(f"evaluation.central-data: no records at {path}")
        files += found
    return files


def load_central_examples(
    files: Sequence[Path], config: RunConfig, *, base: BaseModel
) -> Examples | None:
    """Return the tokenised test records; None when no file is given. Raises DataError."""
    if not files:
        return None
    evaluation = config.evaluation
    prompts = [
        prompt
        for path in files
        for prompt in load_records(
            path, columns=Columns(), split=evaluation.split, max_records=evaluation.max_records
        ).prompts
    ]
    return tokenize_all(
        prompts,
        tokenizer=base.tokenizer,
        template=resolve_template(config.data.prompt_template),
        max_length=config.data.max_length,
    )


def evaluate(
    base: BaseModel,
    examples: Examples,
    *,
    adapter: AdapterState | None,
    lora: LoraSection,
    batch_size: int,
) -> LanguageMetrics:
    """Return the metrics of the base with an adapter, or of the untouched base (None).

    adapter: of any rank, which no layer limits; its scalings are its own.
    """
    if adapter is None:
        return evaluate_model(base.model, base, examples, batch_size=batch_size)
    with carrying(base, lora, adapter) as model:
        return evaluate_model(model, base, examples, batch_size=batch_size)


@torch.inference_mode()
def evaluate_model(
    model: torch.nn.Module, base: BaseModel, examples: Examples, *, batch_size: int
) -> LanguageMetrics:
    """Return the metrics of any causal language model on `base`'s device and tokenizer."""
    model.eval()
    order = sorted(range(len(examples)), key=examples.length)
    parts = []
    for start in range(0, len(order), batch_size):
        batch = collate(
            [examples[i] for i in order[start : start + batch_size]],
            pad_id=base.pad_id,
            device=base.device,
        )
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        parts.append(token_sums(logits, batch.labels))
    return summarize(parts)
