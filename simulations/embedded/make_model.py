"""Make the embedded base model: `python -m simulations.embedded.make_model [--out DIR]`.

Writes prose, trains a byte-level BPE tokenizer and a small Llama on it, and records in MADE.json
how that was done. One thread and one seed: the same machine makes the same files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from simulations.embedded import embedded_model_dir
from simulations.embedded.prose import write_documents

RECORD_NAME = "MADE.json"
BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
VALIDATION_DOCUMENTS = 200
# The tokenizer, and it alone, sees the words of the question form, so that prompts stay short.
_PROMPT_FORM = "### Instruction:\nWhich\n\n### Input:\nSeen\n\n### Response:\nThis"
_PROMPT_FORM_EVERY = 20


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Say how the embedded model is made; sizes in tokens and records unless named otherwise."""

    seed: int = 0
    vocab_size: int = 1024  # more shortens texts, and the embedding outgrows the 4 MB
    hidden_size: int = 128  # with the next two: 0.82 M weights; more learns better, runs slower
    intermediate_size: int = 320  # a multiple of 64: the NF4 kernels of some processors need it
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    max_positions: int = 512
    documents: int = 50_000  # enough that no training step sees a document twice
    steps: int = 900  # five to seven minutes on one thread; more steps buys fluency
    batch_size: int = 32
    block_length: int = 128
    learning_rate: float = 4e-3  # high for the short run, with a warm-up and a cosine to zero
    warmup_steps: int = 50


def train_tokenizer(
    documents: Sequence[str], *, vocab_size: int, max_length: int = 512
) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer: any text has tokens, and every text starts with BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    forms = [_PROMPT_FORM] * (len(documents) // _PROMPT_FORM_EVERY)
    tokenizer.train_from_iterator([*documents, *forms], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=max_length,
    )


def pack_documents(
    tokenizer: PreTrainedTokenizerFast, documents: Sequence[str], *, block_length: int
) -> torch.Tensor:
    """Return token blocks, int64 (blocks, block_length): documents end to end, EOS after each.

    The last tokens that do not fill a block are dropped.
    """
    stream: list[int] = []
    for ids in tokenizer(list(documents))["input_ids"]:
        stream += [*ids, tokenizer.eos_token_id]
    blocks = len(stream) // block_length
    return torch.tensor(stream[: blocks * block_length]).view(blocks, block_length)


def mean_token_loss(model: torch.nn.Module, blocks: torch.Tensor) -> float:
    """Return the mean loss of next-token prediction over token blocks, in nats."""
    model.eval()
    total = 0.0
    with torch.no_grad():
        for batch in torch.split(blocks, 32):
            total += float(model(input_ids=batch, labels=batch).loss) * len(batch)
    return total / len(blocks)


def validation_blocks(tokenizer: PreTrainedTokenizerFast, spec: ModelSpec) -> torch.Tensor:
    """Return the blocks behind validation_loss in MADE.json; no training step saw them."""
    documents = write_documents(seed=spec.seed + 1, count=VALIDATION_DOCUMENTS)
    return pack_documents(tokenizer, documents, block_length=spec.block_length)


def train_model(
    spec: ModelSpec,
    blocks: torch.Tensor,
    *,
    tokenizer: PreTrainedTokenizerFast,
    on_step: Callable[[int, float], None],
) -> tuple[LlamaForCausalLM, float]:
    """Return a trained model, float32, and its mean training loss over the last 50 steps.

    blocks: int64 (blocks, block_length). on_step: called with the step, from 1, and its loss.
    """
    torch.manual_seed(spec.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=spec.vocab_size,
            hidden_size=spec.hidden_size,
            intermediate_size=spec.intermediate_size,
            num_hidden_layers=spec.num_layers,
            num_attention_heads=spec.num_heads,
            num_key_value_heads=spec.num_kv_heads,
            max_position_embeddings=spec.max_positions,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=spec.learning_rate, betas=(0.9, 0.95), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, spec))
    order = torch.randperm(len(blocks))
    recent: list[float] = []
    for step in range(spec.steps):
        start = step * spec.batch_size
        batch = blocks[order[torch.arange(start, start + spec.batch_size) % len(blocks)]]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        recent = [*recent[-49:], float(loss.detach())]
        on_step(step + 1, recent[-1])
    model.train(False)
    return model, sum(recent) / len(recent)


def make_model(spec: ModelSpec, out: Path, *, command: str, console: Console) -> dict[str, Any]:
    """Write model, tokenizer and MADE.json into a folder; return what MADE.json says."""
    started = time.monotonic()
    torch.use_deterministic_algorithms(True)
    documents = write_documents(seed=spec.seed, count=spec.documents)
    tokenizer = train_tokenizer(
        documents, vocab_size=spec.vocab_size, max_length=spec.max_positions
    )
    blocks = pack_documents(tokenizer, documents, block_length=spec.block_length)
    columns = (
        TextColumn("training, loss {task.fields[loss]:.3f}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=spec.steps, loss=math.log(spec.vocab_size))
        model, train_loss = train_model(
            spec,
            blocks,
            tokenizer=tokenizer,
            on_step=lambda step, loss: progress.update(bar, completed=step, loss=loss),
        )
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    for path in out.iterdir():
        path.chmod(0o644)  # safetensors writes for the owner alone; a package is for all to read
    made: dict[str, Any] = {
        "command": command,
        **asdict(spec),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "tokens_seen": spec.steps * spec.batch_size * spec.block_length,
        "train_loss": round(train_loss, 4),
        "validation_loss": round(mean_token_loss(model, validation_blocks(tokenizer, spec)), 4),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "seconds": round(time.monotonic() - started, 1),
        "sha256": {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(out.iterdir())
            if path.is_file() and path.name != RECORD_NAME
        },
    }
    (out / RECORD_NAME).write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    defaults = ModelSpec()
    parser = argparse.ArgumentParser(prog="python -m simulations.embedded.make_model")
    parser.add_argument("--out", type=Path, default=embedded_model_dir(), help="folder to write")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--steps", type=int, default=defaults.steps)
    chosen = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    torch.set_num_threads(1)
    console = Console()
    made = make_model(
        ModelSpec(seed=chosen.seed, steps=chosen.steps),
        chosen.out,
        command=shlex.join(["python", "-m", "simulations.embedded.make_model", *given]),
        console=console,
    )
    size = sum(path.stat().st_size for path in chosen.out.iterdir() if path.is_file())
    console.print(
        f"wrote {made['parameters']} weights, {size / 1e6:.2f} MB in all, validation loss "
        f"{made['validation_loss']}, after {made['seconds']} s to {chosen.out}"
    )
    return 0


def _rate(step: int, spec: ModelSpec) -> float:
    """Return the share of the learning rate at a step: linear warm-up, cosine to zero."""
    if step < spec.warmup_steps:
        return (step + 1) / spec.warmup_steps
    done = (step - spec.warmup_steps) / max(1, spec.steps - spec.warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * done))


if __name__ == "__main__":
    raise SystemExit(main())
