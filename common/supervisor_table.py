"""Supervised processes as a table, for the `status` of either side."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table
from rich.text import Text

from common.supervisor_state import ProcessStatus


def process_table(processes: Iterable[ProcessStatus], *, now_s: float) -> Table:
    """Return one row for each process. now_s: Unix seconds."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("process", "state", "since", "pid", "restarts", "last end"):
        table.add_column(name, justify="right" if name in ("pid", "restarts") else "left")
    for one in processes:
        table.add_row(
            one.name,
            Text("running", style="green") if one.alive else Text("down", style="red"),
            f"{in_words(now_s - one.since)} ago",
            str(one.pid) if one.alive else "-",
            str(one.restarts),
            _end(one.last_exit_code),
        )
    return table


def in_words(seconds: float) -> str:
    """Return a span of time as a person would say it."""
    if seconds < 120:
        return f"{max(0.0, seconds):.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.0f} h"
    return f"{seconds / 86400:.0f} days"


def _end(exit_code: int | None) -> str:
    if exit_code is None:
        return "-"
    return f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
