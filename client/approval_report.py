"""What a hospital is shown before it lets a run begin."""

from __future__ import annotations

import math
from datetime import datetime

from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from client.approvals import Request
from client.cost import RunCost

_MAX_VALUE = 120


def approval_table(request: Request, *, max_epsilon: float) -> Table:
    """Return one run's request as a table. max_epsilon: policy.max-epsilon."""
    plan, settings = request.plan, request.plan.settings
    asked_at = datetime.fromtimestamp(request.asked_at)
    rows = [
        ("state", f"{request.state}, asked {asked_at:%Y-%m-%d %H:%M}"),
        ("coordinator's key", f"{plan.coordinator[:16]}..."),
        ("model", f"{settings['model.name']}, digest {plan.base_digest[:16]}..."),
        ("adapter", f"rank {plan.max_rank}, {settings['lora.target-modules']}"),
        *_cost_rows(request.cost, max_epsilon=max_epsilon),
        (
            "what leaves",
            "each round one adapter, the number of steps and epsilon so far, and what "
            "policy.release-metrics lists",
        ),
    ]
    return _table(f"Run {plan.run_uid}", rows)


def cost_table(cost: RunCost, *, max_epsilon: float) -> Table:
    """Return what a whole run costs as a table. max_epsilon: policy.max-epsilon."""
    return _table("What the whole run costs here", _cost_rows(cost, max_epsilon=max_epsilon))


def _cost_rows(cost: RunCost, *, max_epsilon: float) -> list[tuple[str, str]]:
    cap = "without a cap" if math.isinf(max_epsilon) else f"of at most {max_epsilon:.2f}"
    source = (
        "from earlier rounds here" if cost.hours_measured else "a guess: no earlier rounds here"
    )
    return [
        ("privacy unit", cost.unit),
        ("epsilon of the run", f"{_epsilon(cost.epsilon)} at delta {cost.delta:g}"),
        ("epsilon ever, with it", f"{_epsilon(cost.lifetime_epsilon_after)} {cap}"),
        ("steps", f"{cost.steps:,} in {cost.rounds:,} rounds"),
        ("bytes in", decimal(cost.bytes_down)),
        *_frozen_rows(cost),
        ("bytes out", decimal(cost.bytes_up)),
        ("training time", f"about {_duration(cost.hours)} ({source})"),
    ]


def _frozen_rows(cost: RunCost) -> list[tuple[str, str]]:
    """The most that may come beside what is trained: a run's coordinator need not say so beforehand."""
    if cost.more_ranks is None or cost.most_bytes_down is None:
        more = "and up to policy.max-rank in all that are not trained: not counted when it asked"
    elif cost.more_ranks > 0:
        more = (
            f"and up to {cost.more_ranks} ranks more that are not trained (policy.max-rank): up to "
            f"{decimal(cost.most_bytes_down)} down"
        )
    else:
        return []
    return [("frozen ranks", more)]


def _table(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(title=Text(title), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(max_width=70, overflow="fold")
    for name, value in rows:
        # What comes from outside must not colour, move or overwrite what a person decides by.
        plain = "".join(c if c.isprintable() else "?" for c in value)
        table.add_row(name, Text(plain if len(plain) <= _MAX_VALUE else plain[:_MAX_VALUE] + "..."))
    return table


def _epsilon(epsilon: float) -> str:
    return "infinite (no protection)" if math.isinf(epsilon) else f"{epsilon:.2f}"


def _duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} hours"
    return f"{hours * 60:.1f} minutes" if hours >= 1 / 60 else f"{hours * 3600:.1f} seconds"
