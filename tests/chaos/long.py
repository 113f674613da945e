"""Every process killed at every point, again and again: `make chaos-long`, about an hour.

A coordinator and two hospitals run under the product's own commands, with differential privacy. In a random
order, by seed: each named point of tests/chaos/points.py, and each kind of process at a random moment of a
round, `--times` times; the SuperLink away for 10, 90 and 300 seconds. After each kill the next
committed round is awaited. At the end all files are compared (tests/chaos/checks.py).

An outage is not a kill: the SuperLink is killed and `server up`, which would start it again, is halted
(SIGSTOP) meanwhile. So nothing answers on its port and nobody mends that, as if the machine were off the
net, while the ServerApp and the hospitals live and have to bear it. Its recovery counts from its end.

    python -m tests.chaos.long [--times 3] [--only POINT,...] [--seed 0] [--folder runs/chaos]
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.chaos.checks import Findings
from tests.chaos.federation import PROCESSES, ChaosFederation, OverError, TimeoutExpiredError
from tests.chaos.points import POINTS

LONGEST_RECOVERY_S = 120.0
OUTAGES = {f"outage-{seconds}": float(seconds) for seconds in (10, 90, 300)}
WHAT = (*POINTS, *PROCESSES, *OUTAGES)


@dataclass(frozen=True)
class Result:
    """What came of one kill. recovery_s: None when no round came after it, and `failure` says why."""

    what: str
    recovery_s: float | None
    failure: str = ""

    @property
    def is_good(self) -> bool:
        return self.recovery_s is not None and self.recovery_s <= LONGEST_RECOVERY_S


@dataclass(frozen=True)
class Report:
    """A whole session. left: processes that outlived their end."""

    seed: int
    minutes: float
    results: Sequence[Result]
    findings: Findings
    left: Sequence[str]

    @property
    def is_good(self) -> bool:
        return (
            all(result.is_good for result in self.results)
            and self.findings.faultless
            and not self.left
        )


def plan(*, times: int, only: Sequence[str], seed: int) -> list[str]:
    """Return what to kill, in order: an outage once, all else `times` times."""
    wanted = [what for what in WHAT if not only or what in only]
    order = [what for what in wanted for _ in range(1 if what in OUTAGES else times)]
    random.Random(seed).shuffle(order)
    return order


def disturb(federation: ChaosFederation, what: str, rng: random.Random) -> Result:
    """Kill once, and wait for the next round."""
    try:
        if what in POINTS:
            kill = federation.kill_at(what)
        elif what in OUTAGES:
            kill = federation.outage(OUTAGES[what])
        else:
            round_s = federation.wait_for_round()
            time.sleep(rng.uniform(0.0, round_s))
            kill = federation.kill_process(what, rng)
        return Result(what, round(federation.recovered(kill), 1))
    except TimeoutExpiredError as error:
        return Result(what, None, str(error))


def run_session(folder: Path, order: Sequence[str], *, seed: int, console: Console) -> Report:
    """Work through a plan. Ends early when the run does, or after two failures in a row."""
    started = time.monotonic()
    rng = random.Random(f"moments {seed}")
    results: list[Result] = []
    with ChaosFederation(folder) as federation:
        federation.order_run()
        federation.wait_for_round()
        federation.wait_for_round()
        for number, what in enumerate(order, start=1):
            over = ""
            try:
                results.append(disturb(federation, what, rng))
            except OverError as error:
                over = str(error)
                results.append(Result(what, None, over))
            last = results[-1]
            said = "no round came" if last.recovery_s is None else f"{last.recovery_s:.1f} s"
            minutes = (time.monotonic() - started) / 60
            console.print(f"{minutes:5.1f} min  {number:3}/{len(order)}  {what}: {said}")
            if last.failure:
                console.print(last.failure, markup=False, highlight=False)
            if over or (number > 1 and all(result.failure for result in results[-2:])):
                break
        left = federation.stop()
        findings = federation.check()
    return Report(seed, (time.monotonic() - started) / 60, results, findings, left)


def report_table(report: Report) -> Table:
    """Return recoveries by what was killed."""
    table = Table(title=f"Killed with -9, seed {report.seed}, {report.minutes:.0f} minutes")
    table.add_column("where or what")
    table.add_column("who dies")
    for name in ("kills", "median s", "worst s"):
        table.add_column(name, justify="right")
    for what in WHAT:
        results = [result for result in report.results if result.what == what]
        if not results:
            continue
        times = [result.recovery_s for result in results if result.recovery_s is not None]
        who = POINTS[what].who if what in POINTS else "SuperLink" if what in OUTAGES else what
        worst = f"{max(times):.1f}" if len(times) == len(results) else "never"
        median = f"{statistics.median(times):.1f}" if times else "-"
        table.add_row(what, who, str(len(results)), median, worst)
    return table


def print_report(report: Report, console: Console) -> None:
    """Print the table, and below it what must be zero."""
    console.print(report_table(report))
    findings = report.findings
    console.print(
        f"{findings.rounds} rounds, {findings.replies} replies, {findings.charges} charges"
    )
    slow = [result for result in report.results if not result.is_good]
    console.print(f"{len(slow)} recoveries above {LONGEST_RECOVERY_S:.0f} s")
    for name, faults in findings.faults.items():
        console.print(f"{len(faults)} {name}")
        for fault in faults:
            console.print(f"  {fault}", markup=False, highlight=False)
    console.print(f"{len(report.left)} processes left")
    for command in report.left:
        console.print(f"  {command}", markup=False, highlight=False)


def main() -> None:
    """Run a session and exit with 1 when anything is wrong."""
    parser = argparse.ArgumentParser(description="Kill everything, everywhere, again and again.")
    parser.add_argument("--times", type=int, default=3, help="of each; an outage comes once")
    parser.add_argument("--only", default="", help=f"some of {','.join(WHAT)}")
    parser.add_argument("--seed", type=int, default=0, help="of order and moments")
    parser.add_argument("--folder", type=Path, default=Path("runs/chaos"))
    arguments = parser.parse_args()
    only = [what for what in arguments.only.split(",") if what]
    if unknown := set(only) - set(WHAT):
        parser.error(f"{', '.join(sorted(unknown))}: not one of {', '.join(WHAT)}")
    console = Console(width=100)
    order = plan(times=arguments.times, only=only, seed=arguments.seed)
    work = arguments.folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    report = run_session(work, order, seed=arguments.seed, console=console)
    print_report(report, console)
    with (arguments.folder / "long.txt").open("w") as file:
        print_report(report, Console(file=file, width=100))
    (arguments.folder / "long.json").write_text(json.dumps(asdict(report), indent=2) + "\n")
    console.print(f"Wrote {arguments.folder}: long.txt, long.json, work/", soft_wrap=True)
    sys.exit(0 if report.is_good else 1)


if __name__ == "__main__":
    main()
