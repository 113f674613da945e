"""What `consilium client check` found, for a person and for a program."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.table import Table
from rich.text import Text

from client.check_line import CheckLine, State

_STYLES: dict[State, str] = {"pass": "green", "warn": "yellow", "fail": "bold red"}


def preflight_table(lines: Sequence[CheckLine]) -> Table:
    """Return the lines as a table; what to do stands under what was found."""
    table = Table(title="What a round will need here", show_lines=False)
    table.add_column("check", overflow="fold", max_width=22)
    table.add_column("", no_wrap=True)
    table.add_column("found, and what to do", overflow="fold")
    for line in lines:
        style = _STYLES[line.state]
        found = Text(line.detail)
        if line.remedy:
            found.append(f"\n-> {line.remedy}", style=style)
        table.add_row(Text(line.name), Text(line.state, style=style), found)
    return table


def preflight_sentence(lines: Sequence[CheckLine]) -> str:
    """Return how many lines are in which state."""
    counts = {state: sum(line.state == state for line in lines) for state in _STYLES}
    return ", ".join(f"{count} {state}" for state, count in counts.items())


def preflight_json(lines: Sequence[CheckLine]) -> str:
    """Return the lines as JSON: {"checks": [{"name", "state", "detail", "remedy"}]}."""
    return json.dumps({"checks": [asdict(line) for line in lines]}, indent=2)
