"""A run's progress in the terminal: rounds, sites, loss, epsilon, time left."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from server.history import Event


class RunProgress:
    """Turns history events into one progress bar; use it as a context manager.

    title: what is running. expected_sites: replies that a round is expected to bring.
    """

    def __init__(self, title: str, *, console: Console, expected_sites: int) -> None:
        self._sites = expected_sites
        self._rounds = 0
        self._replies = 0
        self._asked = expected_sites
        self._state = ""
        self._last = ""
        self._bar = Progress(
            TextColumn("[bold]{task.description}[/]"),
            BarColumn(bar_width=10),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
            console=console,
        )
        self._task = self._bar.add_task(escape(title), total=None, state="starting")

    def __enter__(self) -> RunProgress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        kind = event["event"]
        if kind in ("run-started", "resumed"):
            self._rounds = event["rounds"]
            done = event.get("round", 0) * self._sites
            self._bar.update(self._task, total=self._rounds * self._sites, completed=done)
        elif kind == "base" and "loss" in event:
            self._show(f"base loss {event['loss']:.2f}")
        elif kind == "waiting":
            self._show(f"waiting for sites ({event['present']}/{event['needed']})")
        elif kind == "round-started":
            self._replies, self._asked = 0, len(event["sites"])
            self._state = f"round {event['round']}/{self._rounds}"
            self._show(f"{self._state}  sites 0/{self._asked}{self._last}")
        elif kind == "reply":
            self._replies += 1
            self._bar.advance(self._task)
            self._show(f"{self._state}  sites {self._replies}/{self._asked}{self._last}")
        elif kind == "refused":
            site, reason = event["site"], event["reason"]
            said = (
                f"round {event['round']}: {site} refused"
                if event["round"]
                else f"{site} takes no part"
            )
            self._bar.console.print(f"[yellow]{said} ({reason})[/yellow]")
        elif kind == "approval":
            self._bar.console.print(
                f"[yellow]{event['site']} awaits its hospital's approval[/yellow]"
            )
        elif kind == "round":
            self._finish_round(event)

    def _finish_round(self, event: Event) -> None:
        epsilons = [
            row["epsilon"]
            for row in event.get("privacy", {}).values()
            if row["epsilon"] is not None
        ]
        loss = "" if event["loss"] is None else f"  loss {event['loss']:.3f}"
        epsilon = f"  eps {max(epsilons):.2f}" if epsilons else ""
        self._last = loss + epsilon
        self._bar.update(self._task, completed=event["round"] * self._sites)
        self._show(f"round {event['round']}/{self._rounds}{self._last}")

    def _show(self, state: str) -> None:
        self._bar.update(self._task, state=state)
