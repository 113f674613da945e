"""What differential privacy costs: a DP step beside the plain one, on the same NF4 model and batch.

Run by `make bench-dp`, or `python -m simulations.bench.dp --device cuda --shape 7b` on a GPU. Time: the
plain step and each arm take turns, and the median of the ratios of such pairs counts; noise is timed
apart and not in the ratio. Memory: the highest sum of live tensors over two steps beyond the model,
its adapter and the batch; on a CPU by the profiler's record of every allocation (what the C library or
a kernel's own workspace holds is not in it), on CUDA by torch.cuda.max_memory_allocated.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.profiler import profile

from common.config import LoraSection, ModelSection
from common.lora import attached
from common.model import BaseModel, load_base
from common.prompts import IGNORE, Batch
from simulations.bench.dp_arms import ARMS, OURS, Step, Work, checkpointing, plain
from simulations.bench.shapes import SHAPES, random_llama

SMALL = "stories260K"
SMALL_FOLDER = Path(__file__).resolve().parents[3] / "shared" / "models" / SMALL
SEED = 0

# The targets, for our own arms.
MAX_RATIO = 1.25
MAX_NOISE_SHARE = 0.1
# Only its noise has a target: a tiny model's step is mostly overhead, which hides the noise.
NOISE_SHAPE = "20m"
ADAPTERS_BEYOND_MICRO_BATCH = 2.0

_FAILED = 1
_console = Console()


@dataclass(frozen=True, slots=True)
class Arm:
    """One arm beside the plain step. step_s, ratio: without noise. error: why it has no figures.

    noise_share: of the step with its noise. extra_mb: peak memory above the plain step's.
    """

    name: str
    error: str = ""
    step_s: float = 0.0
    ratio: float = 0.0
    noise_s: float = 0.0
    extra_mb: float = 0.0
    extra_adapters: float = 0.0

    @property
    def noise_share(self) -> float:
        """Seconds of noise over those of the whole step."""
        return self.noise_s / (self.step_s + self.noise_s)


@dataclass(frozen=True, slots=True)
class Figures:
    """One model's measurements and their conditions."""

    model: str
    parameters: int
    adapter: int
    rank: int
    micro_batch: int
    tokens: int
    checkpointing: bool
    device: str
    threads: int
    pairs: int
    plain_s: float
    plain_mb: float
    arms: tuple[Arm, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 0 when our arms meet the targets."""
    options = _parser().parse_args(arguments)
    device = torch.device(options.device)
    results = []
    for name in options.shape or [SMALL, NOISE_SHAPE]:
        if name == SMALL and not SMALL_FOLDER.is_dir():
            _console.print(f"skipped {name}: there is no folder {SMALL_FOLDER}")
            continue
        figures = measure(
            name,
            device=device,
            rank=options.rank,
            micro_batch=options.micro_batch,
            tokens=options.tokens,
            recompute=options.checkpointing or name in {"3b", "7b"},
            pairs=options.pairs,
        )
        results.append(figures)
        _console.print(results_table(figures))
        _console.print(conditions(figures))
        # Written after each model: a later one may not fit.
        if options.json:
            file = Path(options.json)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps([asdict(f) for f in results], indent=1) + "\n")
    missed = [line for figures in results for line in shortfalls(figures)]
    for line in missed:
        _console.print(f"[red]FAIL[/] {line}")
    if results and not missed:
        _console.print("[green]pass[/] every target is met")
    if options.json and results:
        _console.print(f"Wrote {options.json}: every figure of the tables")
    return _FAILED if missed else 0


def measure(
    name: str,
    *,
    device: torch.device,
    rank: int,
    micro_batch: int,
    tokens: int,
    recompute: bool,
    pairs: int,
) -> Figures:
    """Return the figures of one model."""
    base = _base(name, device)
    with attached(base, LoraSection(rank=rank, alpha=2.0 * rank)) as model:
        batch = _batch(base, micro_batch=micro_batch, tokens=tokens)
        work = Work(model, batch, device)
        adapter = sum(p.numel() for p in work.parameters)
        model.train()
        with checkpointing(model, on=recompute):
            plain_bytes = peak_bytes(work, plain)
            plain_s = statistics.median(_timed(work, plain) for _ in range(3))
            arms = tuple(
                _measure_arm(
                    work,
                    arm,
                    pairs=pairs,
                    plain_bytes=plain_bytes,
                    adapter_bytes=4 * adapter,
                    title=f"{name}: {arm}",
                )
                for arm in ARMS
            )
    return Figures(
        model=name,
        parameters=_num_parameters(base),
        adapter=adapter,
        rank=rank,
        micro_batch=micro_batch,
        tokens=tokens,
        checkpointing=recompute,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        threads=torch.get_num_threads(),
        pairs=pairs,
        plain_s=plain_s,
        plain_mb=plain_bytes / 1e6,
        arms=arms,
    )


def _measure_arm(
    work: Work, name: str, *, pairs: int, plain_bytes: int, adapter_bytes: int, title: str
) -> Arm:
    """One arm's figures, or why there are none: the others are to go on."""
    try:
        extra = peak_bytes(work, ARMS[name]) - plain_bytes
        ratios, seconds, noises = [], [], []
        for _ in track(range(pairs), description=title, console=_console, transient=True):
            beside_s = _timed(work, plain)
            before_s = work.noise_s
            step_s = _timed(work, ARMS[name])
            # Of the untimed step and the timed one.
            noises.append((work.noise_s - before_s) / 2)
            seconds.append(step_s)
            ratios.append(step_s / beside_s)
    except Exception as error:
        text = (str(error).splitlines() or [""])[0]
        return Arm(name, error=f"{type(error).__name__}: {text[:60]}")
    finally:
        _tidy(work)
    return Arm(
        name,
        step_s=statistics.median(seconds),
        ratio=statistics.median(ratios),
        noise_s=statistics.median(noises),
        extra_mb=extra / 1e6,
        extra_adapters=extra / adapter_bytes,
    )


def _timed(work: Work, arm: Callable[[Work], AbstractContextManager[Step]]) -> float:
    """Seconds of the arm's second step, noise not counted: the first one takes its memory."""
    with arm(work) as step:
        step()
        noise_s, started = work.noise_s, work.now()
        step()
        return work.now() - started - (work.noise_s - noise_s)


def peak_bytes(work: Work, arm: Callable[[Work], AbstractContextManager[Step]]) -> int:
    """Return by how much live tensors rise at most above what was there, over two steps of an arm."""
    _tidy(work)
    if work.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(work.device)
        before = torch.cuda.memory_allocated(work.device)
        with arm(work) as step:
            step()
            step()
        return torch.cuda.max_memory_allocated(work.device) - before
    with profile(profile_memory=True) as watched, arm(work) as step:
        step()
        step()
    highest = level = 0
    kineto = watched.profiler.kineto_results
    allocations = [e for e in kineto.events() if e.name() == "[memory]"]
    for event in sorted(allocations, key=lambda e: e.start_ns()):
        level += event.nbytes()
        highest = max(highest, level)
    return highest


def _tidy(work: Work) -> None:
    for parameter in work.parameters:
        parameter.grad = None
        for leftover in ("grad_sample", "summed_grad"):
            vars(parameter).pop(leftover, None)
    gc.collect()
    if work.device.type == "cuda":
        torch.cuda.empty_cache()


def results_table(figures: Figures) -> Table:
    """Return a model's arms as a table of less than 100 columns."""
    table = Table(title=f"{figures.model}: one micro-batch, plain step {figures.plain_s:.4f} s")
    table.add_column("arm", no_wrap=True)
    for heading in ("s / step", "x plain", "noise s", "noise", "+ MB", "+ adapters"):
        table.add_column(heading, justify="right")
    for arm in figures.arms:
        if arm.error:
            table.add_row(arm.name, arm.error)
            continue
        table.add_row(
            arm.name,
            f"{arm.step_s:.4f}",
            f"{arm.ratio:.2f}",
            f"{arm.noise_s:.4f}",
            f"{arm.noise_share:.1%}",
            f"{arm.extra_mb:.1f}",
            f"{arm.extra_adapters:.1f}",
        )
    return table


def conditions(figures: Figures) -> str:
    """Return in words what the figures hold for."""
    return (
        f"{figures.device}, {os.cpu_count()} cores, {figures.threads} threads, torch "
        f"{torch.__version__}; {figures.parameters / 1e6:.1f} M parameters in NF4, LoRA on all linear "
        f"layers at rank {figures.rank}: {figures.adapter} parameters; {figures.micro_batch} records "
        f"of {figures.tokens} tokens, half of them the answer; gradient checkpointing "
        f"{'on' if figures.checkpointing else 'off'}; AdamW; seed {SEED} for weights and tokens, none "
        f"for noise; medians over {figures.pairs} pairs; plain step's memory "
        f"{figures.plain_mb:.1f} MB. Noise: ours secure, Opacus's torch.normal."
    )


def shortfalls(figures: Figures) -> list[str]:
    """Return in words where our arms miss a target."""
    lines = []
    for arm in figures.arms:
        if arm.name not in OURS:
            continue
        where = f"{figures.model}, {arm.name}: "
        if arm.error:
            lines.append(where + arm.error)
            continue
        if arm.ratio > MAX_RATIO:
            lines.append(where + f"{arm.ratio:.2f} times the plain step, target {MAX_RATIO}")
        if figures.model == NOISE_SHAPE and arm.noise_share > MAX_NOISE_SHARE:
            lines.append(where + f"noise {arm.noise_share:.1%}, target {MAX_NOISE_SHARE:.0%}")
        most = figures.micro_batch + ADAPTERS_BEYOND_MICRO_BATCH
        if arm.extra_adapters > most:
            lines.append(where + f"{arm.extra_adapters:.1f} adapters more, target {most:g}")
    return lines


def _base(name: str, device: torch.device) -> BaseModel:
    if name == SMALL:
        return load_base(SMALL_FOLDER, ModelSection(quantization="nf4"), device=device)
    return random_llama(name, device=device, seed=SEED)


def _batch(base: BaseModel, *, micro_batch: int, tokens: int) -> Batch:
    vocabulary = base.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    random = torch.Generator().manual_seed(SEED)
    ids = torch.randint(3, vocabulary, (micro_batch, tokens), generator=random).to(base.device)
    labels = ids.clone()
    labels[:, : tokens // 2] = IGNORE
    return Batch(ids, torch.ones_like(ids), labels)


def _num_parameters(base: BaseModel) -> int:
    """NF4 packs two weights into a byte."""
    return sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in base.model.parameters())


def _processor() -> str:
    return platform.processor() or platform.machine()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="simulations.bench.dp", description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--shape",
        action="append",
        choices=[SMALL, *SHAPES],
        help=f"may be given several times; {SMALL} and {NOISE_SHAPE} when not",
    )
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--micro-batch", type=int, default=16, help="records")
    parser.add_argument("--tokens", type=int, default=128, help="of each record")
    parser.add_argument("--pairs", type=int, default=7, help="at least 7 for figures to report")
    parser.add_argument(
        "--checkpointing", action="store_true", help="of activations; always for 3b and 7b"
    )
    parser.add_argument("--json", help="a file for the figures")
    return parser


if __name__ == "__main__":
    # The libraries' remarks on what is deprecated would drown the tables.
    warnings.simplefilter("ignore")
    sys.exit(main())
