"""What a merge costs: a 7B model's adapters of ten sites from disk; one layer beside factor mean and PEFT.

Run by `make bench-aggregation`. Adapters have the shapes of Llama 2 7B (32 layers, all seven linear modules,
rank 16) and random factors. The whole merge runs in a process of its own, since a process's peak memory never
falls; what is measured of it is the peak above what it held before the first module.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import psutil  # type: ignore[import-untyped]  # ships no types
from rich.console import Console
from rich.table import Table

from common.files import write_atomically
from simulations.bench.merges import (
    HIDDEN,
    LAYERS,
    MANY_SITES,
    RANK,
    SEED,
    SITES,
    OneLayer,
    WholeMerge,
    llama_shape,
    merge_from_disk,
    one_layer,
    write_round,
)

# The targets of `make bench-aggregation`.
MAX_SECONDS = 20.0
MAX_BYTES_ABOVE_LAYER = 200e6
TIMES_FASTER, TIMES_FASTER_MANY = 300.0, 15.0
MAX_ERROR = 1e-5

METHODS = ("svd", "weighted")
# What PEFT's svd holds for MANY_SITES: their float32 matrices, stacked, and weighted.
_PEFT_BYTES = 3 * MANY_SITES * 4 * HIDDEN**2 + 1e9


def whole_table(rows: Sequence[WholeMerge]) -> Table:
    """Return the merges of a whole adapter."""
    table = Table(title=f"Llama 2 7B, rank {RANK}, {SITES} sites, from disk to disk")
    table.add_column("method")
    for column in ("modules", "seconds", "memory above idle", "a layer's inputs"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.method,
            str(row.modules),
            f"{statistics.median(row.seconds):.1f}",
            f"{row.bytes_above / 1e6:.0f} MB",
            f"{row.layer_bytes / 1e6:.0f} MB",
        )
    return table


def layer_table(rows: Sequence[OneLayer]) -> Table:
    """Return one module's figures; PEFT's own time at ten sites stands in where it was not run."""
    table = Table(title=f"One {HIDDEN} x {HIDDEN} module, rank {RANK}, medians")
    for column in ("sites", "stack", "svd", "factor mean", "PEFT svd", "PEFT / svd", "error / |M|"):
        table.add_column(column, justify="right")
    for row in rows:
        peft = row.peft or next((other.peft for other in rows if other.peft), ())
        least = "" if row.peft else ">= "
        ratio = _ratio(row, peft)
        table.add_row(
            str(row.sites),
            row.stack,
            f"{statistics.median(row.ours):.3f} s",
            f"{statistics.median(row.mean):.4f} s",
            f"{least}{statistics.median(peft):.1f} s" if peft else "-",
            f"{least}{ratio:.0f}" if ratio is not None else "-",
            "-" if row.error is None else f"{row.error:.1e}",
        )
    return table


def _ratio(row: OneLayer, peft: Sequence[float]) -> float | None:
    """Median over the pairs; where PEFT was not run, its least time elsewhere over our median."""
    if row.peft:
        return statistics.median(b / a for a, b in zip(row.ours, row.peft, strict=True))
    return min(peft) / statistics.median(row.ours) if peft else None


def missed(whole: Sequence[WholeMerge], layers: Sequence[OneLayer]) -> list[str]:
    """Return which targets were missed, in words."""
    misses = []
    for row in whole:
        if row.method == "svd" and statistics.median(row.seconds) > MAX_SECONDS:
            misses.append(f"{row.modules} modules took more than {MAX_SECONDS:.0f} s")
        if row.bytes_above > row.layer_bytes + MAX_BYTES_ABOVE_LAYER:
            misses.append(f"{row.method} held more than a layer's inputs and 200 MB")
    peft = next((row.peft for row in layers if row.peft), ())
    for one in layers:
        ratio, wanted = _ratio(one, peft), TIMES_FASTER if one.sites == SITES else TIMES_FASTER_MANY
        if ratio is not None and one.stack == "random" and ratio < wanted:
            misses.append(f"{one.sites} sites: {ratio:.0f} times PEFT's speed, not {wanted:.0f}")
        if one.error is not None and one.error > MAX_ERROR:
            misses.append(f"{one.sites} sites, {one.stack}: error {one.error:.1e} of |M|")
    return misses


def _in_own_process(folder: Path, layers: int, method: str, repeats: int) -> WholeMerge:
    words = [sys.executable, "-m", "simulations.bench.aggregation", "--merge", str(folder)]
    words += ["--layers", str(layers), "--method", method, "--repeats", str(repeats)]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    content = json.loads(done.stdout)
    return WholeMerge(**{**content, "seconds": tuple(content["seconds"])})


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the tables and write them as JSON; 1 when a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=LAYERS, help="decoder layers")
    parser.add_argument("--repeats", type=int, default=3, help="merges of the whole")
    parser.add_argument("--pairs", type=int, default=5, help="turns on one module")
    parser.add_argument(
        "--no-peft", action="store_true", help="leave out PEFT, which takes minutes"
    )
    parser.add_argument("--json", type=Path, default=Path("runs/bench/aggregation.json"))
    parser.add_argument("--merge", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--method", default="svd", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    shape = llama_shape(layers=asked.layers)
    if asked.merge is not None:
        one = merge_from_disk(asked.merge, shape, method=asked.method, repeats=asked.repeats)
        sys.stdout.write(json.dumps(asdict(one)))
        return 0
    with tempfile.TemporaryDirectory(prefix="consilium-bench-") as name:
        folder = Path(name)
        needed = (SITES + 3) * shape.size_bytes
        if shutil.disk_usage(folder).free < needed:
            sys.exit(
                f"{folder} has less than the {needed / 1e9:.1f} GB that this needs; set TMPDIR"
            )
        write_round(folder, shape, sites=SITES)
        whole = [_in_own_process(folder, asked.layers, m, asked.repeats) for m in METHODS]
    peft = not asked.no_peft
    # PEFT makes every site's dense matrix, and all of them again; else its time at ten is a lower bound.
    roomy = psutil.virtual_memory().available > _PEFT_BYTES
    layers = [
        one_layer(sites=SITES, stack="random", pairs=asked.pairs, with_peft=peft, reference=True),
        one_layer(sites=SITES, stack="ill-conditioned", pairs=3, with_peft=False, reference=True),
        one_layer(
            sites=MANY_SITES, stack="random", pairs=3, with_peft=roomy and peft, reference=True
        ),
    ]
    console = Console()
    console.print(whole_table(whole))
    console.print(layer_table(layers))
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    console.print(
        f"{os.cpu_count()} cores ({platform.machine()}), OMP_NUM_THREADS={threads}, seed {SEED}, "
        f"numpy {np.__version__}"
    )
    for line in missed(whole, layers):
        console.print(f"[red]Missed: {line}[/red]")
    asked.json.parent.mkdir(parents=True, exist_ok=True)
    content = {"whole": [asdict(row) for row in whole], "layer": [asdict(row) for row in layers]}
    write_atomically(asked.json, json.dumps(content, indent=2).encode())
    console.print(f"Wrote {asked.json}")
    return 1 if missed(whole, layers) else 0


if __name__ == "__main__":
    sys.exit(main())
