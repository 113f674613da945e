"""A coordinator's status for a person: tables that read well at 100 columns."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from common.supervisor_table import in_words, process_table
from server.run_place import Refusals
from server.status import CoordinatorStatus, NodeReport, RunReport


def status_tables(status: CoordinatorStatus) -> Iterator[RenderableType]:
    """Give one table after the other, then what is wrong, line by line."""
    up = f"up, process {status.up}" if status.up is not None else "down"
    yield Text(f"{status.folder}: {up}", style="bold")
    yield process_table(status.processes, now_s=status.time)
    if status.reports:
        yield Text(f"Reports: {status.reports}")
    if status.nodes is None:
        yield Text("Nodes: unknown, the SuperLink does not answer")
    elif status.nodes:
        yield _node_table(status.nodes)
    else:
        yield Text("Nodes: none is enrolled")
    for run in status.runs:
        yield _run_table(run)
    if not status.runs:
        yield Text("Runs: none was asked for")
    for sentence in status.advice:
        yield Text(f"! {sentence}", style="yellow", overflow="fold")


def _node_table(nodes: tuple[NodeReport, ...]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("site", "node", "state", "last heard"):
        table.add_column(name)
    for node in nodes:
        heard = f"now, online for {in_words(node.online_s)}" if node.online else node.offline_at
        table.add_row(
            node.site or "not known yet",
            node.node,
            Text("online", style="green") if node.online else Text("offline", style="red"),
            heard or "never",
        )
    return table


def _run_table(run: RunReport) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    state = f"{run.state}, round {run.round} of {run.rounds or '?'}"
    if run.process is not None:
        state += f", process {run.process}"
    table.add_row("run", run.run)
    table.add_row("state", state)
    if run.message:
        table.add_row("because", Text(f"{run.code}: {run.message}"))
    if run.sites:
        replied = set(run.replied)
        waits = [site for site in run.sites if site not in replied and site not in run.refused]
        table.add_row("replied", ", ".join(run.replied) or "none yet")
        if waits and run.state == "running":
            table.add_row("asked", ", ".join(waits))
    for site, all_of_it in sorted(run.refusals.items()):
        table.add_row("refused", Text(_refusals(site, all_of_it, now=run.refused.get(site))))
    if run.awaiting:
        table.add_row("approval", f"awaited from {', '.join(run.awaiting)}")
    if run.epsilon:
        spent = ", ".join(
            f"{site} {'no protection' if epsilon is None else f'{epsilon:.2f}'}"
            for site, epsilon in sorted(run.epsilon.items())
        )
        table.add_row("epsilon", spent)
    table.add_row("checkpoint", Text(run.checkpoint or "none yet"))
    table.add_row("folder", Text(run.folder))
    return table


def _refusals(site: str, refusals: Refusals, *, now: str | None) -> str:
    """What a site was refused for, and whether that is how it stands."""
    times = "once" if refusals.count == 1 else f"{refusals.count} times"
    place = f"round {refusals.round}" if refusals.round else "before a round"
    if now is not None:
        return f"{site}: {now} ({times} in this run)"
    return f"{site}: not now; {times} in this run, last {refusals.reason}, {place}"
