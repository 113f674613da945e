"""What a simulated site costs: memory and time of 4, 20 and 50 sites on the inline engine.

Run by `make bench-simulation`. Two ranks: with the larger adapter its share of the memory is seen.
This module stays light: a child's peak memory starts at what its parent had.
"""

from __future__ import annotations

import csv
import io
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from rich.progress import track
from rich.table import Table

from common.cli import console
from common.config import Scalar
from common.files import write_atomically

SITES = (4, 20, 50)
RANKS = (8, 64)
OUT = Path("runs/bench/simulation.csv")

PATIENTS_PER_SITE = 20
RECORDS_PER_PATIENT = 3
DATA_SEED = 0
# Of each round; the first few sites say it, and fifty would cost minutes.
PAIRS_PER_ROUND = 10

SETTINGS: dict[str, Scalar] = {
    "model.name": "embedded",
    "lora.alpha": 16.0,
    "data.max-length": 96,
    "train.rounds": 2,
    "train.local-steps": 2,
    "train.batch-size": 4,
    "train.micro-batch-size": 4,
    "train.seed": 0,
    "privacy.unit": "none",
}

# The target: what memory may grow by with each site.
ADAPTERS_PER_SITE = 2.0
FIXED_MB_PER_SITE = 1.0

_FAILED = 1


@dataclass(frozen=True, slots=True)
class Row:
    """One run: sizes in MB, medians in seconds, the median ratio of its pairs."""

    sites: int
    rank: int
    peak_mb: float
    adapter_mb: float
    site_round_s: float
    bare_s: float
    ratio: float
    pairs: int


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the slope of the least-squares line through (x, y)."""
    return statistics.linear_regression(x, y).slope


def run_child(sites: int, rank: int) -> Row:
    """Return the measurement of one run in a process of its own."""
    spec = json.dumps({"num_sites": sites, "rank": rank})
    child = subprocess.run(
        [sys.executable, "-m", "simulations.bench.measure", spec],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode != 0:
        console.print(child.stderr, markup=False)
        sys.exit(f"the run of {sites} sites ended with exit code {child.returncode}; see above")
    found: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return Row(
        sites,
        rank,
        found["peak_mb"],
        found["adapter_mb"],
        statistics.median(found["site_round_s"]),
        statistics.median(found["bare_s"]),
        statistics.median(found["ratios"]),
        len(found["ratios"]),
    )


def results_table(rows: Sequence[Row]) -> Table:
    """Return the rows as a table of less than 100 columns."""
    table = Table(title="Inline engine, one process; medians over site-rounds and pairs")
    headings = ("rank", "sites", "peak MB", "adapter MB", "s / site-round", "s bare training")
    for heading in (*headings, "ratio", "pairs"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            str(row.rank),
            str(row.sites),
            f"{row.peak_mb:.0f}",
            f"{row.adapter_mb:.2f}",
            f"{row.site_round_s:.3f}",
            f"{row.bare_s:.3f}",
            f"{row.ratio:.2f}",
            str(row.pairs),
        )
    return table


def main() -> int:
    """Run the benchmark; return 0 when the target is met."""
    runs = list(product(RANKS, SITES))
    rows = [
        run_child(sites, rank)
        for rank, sites in track(runs, description="measuring", console=console, transient=True)
    ]
    console.print(results_table(rows))
    console.print(
        f"{os.cpu_count()} cores, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}, "
        f"embedded model in NF4, {SETTINGS['train.rounds']} rounds of "
        f"{SETTINGS['train.local-steps']} steps of {SETTINGS['train.batch-size']} records, no DP, "
        f"{PATIENTS_PER_SITE * RECORDS_PER_PATIENT} records a site, data seed "
        f"{DATA_SEED}, train.seed {SETTINGS['train.seed']}. Bare: the same steps, records "
        "and model by client.trainer.train alone, right after each site's reply."
    )
    passed = True
    for rank in RANKS:
        mine = [row for row in rows if row.rank == rank]
        found = slope([row.sites for row in mine], [row.peak_mb for row in mine])
        adapter_mb = mine[0].adapter_mb
        target = ADAPTERS_PER_SITE * adapter_mb + FIXED_MB_PER_SITE
        met = found <= target
        passed = passed and met
        console.print(
            f"rank {rank}: {found:.2f} MB of peak memory per site, {found / adapter_mb:.2f} adapters;"
            f" target at most {ADAPTERS_PER_SITE:g} adapters + {FIXED_MB_PER_SITE:g} MB = "
            f"{target:.2f} MB: {'[green]pass[/]' if met else '[red]FAIL[/]'}"
        )
    OUT.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(OUT, _csv(rows).encode())
    console.print(f"Wrote {OUT}: one line for each run")
    return 0 if passed else _FAILED


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = list(Row.__slots__)
    writer.writerow(names)
    writer.writerows([getattr(row, name) for name in names] for row in rows)
    return text.getvalue()


if __name__ == "__main__":
    sys.exit(main())
