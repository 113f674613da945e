"""What `consilium client ledger` shows: each run, the whole life, what is left and what still fits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from rich.table import Table
from rich.text import Text

from client.budget import MAX_EXACT_SETTINGS, Unit, counted_steps
from client.ledger import Ledger, LedgerRow
from client.settlement import UNKNOWN_RUN
from client.site_config import SiteConfig
from common.canonical import plain_json
from common.chain import ChainHead
from common.privacy import (
    EpsilonBounds,
    GaussianSteps,
    coalesce,
    compose_epsilon,
    rdp_epsilon,
    steps_that_fit,
)

NO_PROTECTION = "no protection"
# As far as "what still fits" looks: more steps than anybody trains.
_MOST_STEPS = 1_000_000


@dataclass(frozen=True, slots=True)
class RunSpending:
    """One run's charges. first_at, last_at: Unix seconds. settings: as trained; steps over all rounds.

    unit: as trained; rounds: distinct ones; unanswered: tasks charged whose reply is not on disk.
    epsilon: of this run alone, in the ledger's unit at its delta.
    """

    run_uid: str
    unit: str
    first_at: int
    last_at: int
    rounds: int
    unanswered: int
    settings: tuple[GaussianSteps, ...]
    epsilon: float

    @property
    def steps(self) -> int:
        """Optimizer steps of all its tasks."""
        return sum(setting.steps for setting in self.settings)


@dataclass(frozen=True, slots=True)
class Fitting:
    """How many more steps of the last task's setting fit. rounds: of as many steps as that task had."""

    setting: GaussianSteps
    steps: int
    rounds: int


@dataclass(frozen=True, slots=True)
class LedgerReport:
    """The ledger of one data set. bounds: on the epsilon of its whole life. max_epsilon: the cap.

    fits: None without a task to take a setting from, without a cap, or where nothing can be left.
    other_datasets: other names with charges in this ledger; a budget belongs to patients, not to names.
    """

    site: str
    dataset: str
    unit: Unit
    delta: float
    max_epsilon: float
    runs: tuple[RunSpending, ...]
    bounds: EpsilonBounds
    fits: Fitting | None
    other_datasets: tuple[str, ...]
    head: ChainHead

    @property
    def epsilon(self) -> float:
        """The lifetime epsilon: the smaller of the two upper bounds."""
        return self.bounds.least

    @property
    def remaining(self) -> float:
        """The cap less what is spent; infinite without a cap. Epsilons do not add: see `fits`."""
        return (
            max(0.0, self.max_epsilon - self.epsilon)
            if math.isfinite(self.max_epsilon)
            else math.inf
        )

    def as_json(self) -> dict[str, Any]:
        """Return it for another program: None for an epsilon without protection, and for no cap."""
        plain: dict[str, Any] = plain_json(
            {
                "site": self.site,
                "dataset": self.dataset,
                "unit": self.unit,
                "delta": self.delta,
                "epsilon": self.epsilon,
                "epsilon_prv": self.bounds.prv,
                "epsilon_rdp": self.bounds.rdp,
                "max_epsilon": self.max_epsilon,
                "remaining": self.remaining,
                "fits": None if self.fits is None else asdict(self.fits),
                "runs": [{**asdict(run), "steps": run.steps} for run in self.runs],
                "other_datasets": self.other_datasets,
                "head": asdict(self.head),
            }
        )
        return plain

    def sentences(self) -> list[str]:
        """Return what stands below the table, in words."""
        unprotected = math.isinf(self.epsilon)
        spent = NO_PROTECTION if unprotected else f"epsilon {self.epsilon:.2f}"
        lines = [f"{self.dataset}, whole life: {spent} by {self.unit} at delta {self.delta:g}"]
        if not unprotected:
            prv = "cannot be computed" if self.bounds.prv is None else f"{self.bounds.prv:.2f}"
            lines[0] += f" (PRV {prv}, RDP {self.bounds.rdp:.2f})"
        if math.isinf(self.max_epsilon):
            lines.append("policy.max-epsilon is inf: no cap")
        else:
            lines.append(
                f"of policy.max-epsilon {self.max_epsilon:g}; {self.remaining:.2f} is left"
            )
        if self.fits is not None:
            setting = self.fits.setting
            lines.append(
                f"{self.fits.steps} more steps at noise multiplier {setting.noise_multiplier:.4g} and "
                f"sample rate {setting.sample_rate:.4g} still fit: {self.fits.rounds} rounds of "
                f"{setting.steps}"
            )
        unanswered = sum(run.unanswered for run in self.runs)
        if unanswered:
            lines.append(f"{unanswered} of the tasks charged have no reply on disk (yet)")
        for name in self.other_datasets:
            lines.append(
                f"This ledger also holds charges of {name!r}: they count apart, rightly only if those are "
                "other patients"
            )
        lines.append(f"Ledger head {self.head}")
        return lines


def report_ledger(ledger: Ledger, config: SiteConfig) -> LedgerReport:
    """Return the report of a site's data set, with the exact epsilon, however long that takes."""
    data, max_epsilon = config.data, config.policy.max_epsilon
    rows = ledger.rows(data.name)
    return LedgerReport(
        site=config.site.name,
        dataset=data.name,
        unit=data.unit,
        delta=data.delta,
        max_epsilon=max_epsilon,
        runs=_runs(rows, unit=data.unit, delta=data.delta),
        bounds=ledger.bounds(data.name, unit=data.unit, delta=data.delta, wait=True),
        fits=_fitting(rows, unit=data.unit, delta=data.delta, max_epsilon=max_epsilon),
        other_datasets=tuple(name for name in ledger.datasets() if name != data.name),
        head=ledger.head(),
    )


def ledger_table(report: LedgerReport) -> Table:
    """Return the runs as a table of at most 100 columns."""
    # Names are Text: in a string, square brackets would be markup.
    title = Text(f"Privacy ledger of {report.site}: {report.dataset}", style="table.title")
    table = Table(title=title, box=None)
    table.add_column("run", overflow="ellipsis", max_width=20, no_wrap=True)
    table.add_column("from", no_wrap=True)
    table.add_column("to", no_wrap=True)
    table.add_column("unit", no_wrap=True)
    for name in ("rounds", "sigma", "q", "steps", "epsilon"):
        table.add_column(name, justify="right", max_width=13)
    for run in report.runs:
        noises = sorted({setting.noise_multiplier for setting in run.settings})
        rates = sorted({setting.sample_rate for setting in run.settings})
        table.add_row(
            Text("(settled)" if run.run_uid == UNKNOWN_RUN else run.run_uid),
            _date(run.first_at),
            _date(run.last_at),
            run.unit,
            str(run.rounds),
            ", ".join(f"{noise:.3g}" for noise in noises),
            ", ".join(f"{rate:.3g}" for rate in rates),
            str(run.steps),
            NO_PROTECTION if math.isinf(run.epsilon) else f"{run.epsilon:.2f}",
        )
    return table


def _runs(rows: Sequence[LedgerRow], *, unit: Unit, delta: float) -> tuple[RunSpending, ...]:
    by_run: dict[tuple[str, str], list[LedgerRow]] = {}
    for row in rows:
        by_run.setdefault((row.run_uid, row.unit), []).append(row)
    return tuple(
        RunSpending(
            run_uid=run_uid,
            unit=run_unit,
            first_at=min(row.reserved_at for row in own),
            last_at=max(row.reserved_at for row in own),
            rounds=len({row.server_round for row in own}),
            unanswered=sum(row.state == "reserved" for row in own),
            settings=coalesce([row.steps for row in own]),
            epsilon=compose_epsilon(counted_steps(own, unit=unit), delta=delta),
        )
        for (run_uid, run_unit), own in by_run.items()
    )


def _fitting(
    rows: Sequence[LedgerRow], *, unit: Unit, delta: float, max_epsilon: float
) -> Fitting | None:
    known = [row for row in rows if row.run_uid != UNKNOWN_RUN]
    spent = counted_steps(rows, unit=unit)
    if not known or math.isinf(max_epsilon) or math.isinf(rdp_epsilon(spent, delta=delta)):
        return None
    steps = steps_that_fit(
        spent,
        counted_steps(known[-1:], unit=unit)[0],
        at_most=_MOST_STEPS,
        max_epsilon=max_epsilon,
        delta=delta,
        accountant="prv" if len(coalesce(spent)) < MAX_EXACT_SETTINGS else "rdp",
    )
    return Fitting(known[-1].steps, steps, steps // known[-1].steps.steps)


def _date(seconds: int) -> str:
    return datetime.fromtimestamp(seconds).date().isoformat()
