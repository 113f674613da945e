"""What a hospital's side does now, for its own people; nothing of it leaves.

No torch here: it is asked often, and by monitoring.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from client.agent_control import agent_status
from client.site_config import SiteConfig
from common.audit_log import AuditEntry, read_audit_log
from common.canonical import from_canonical
from common.errors import AuditError
from common.locks import lock_holder
from common.supervisor_state import ProcessStatus, process_statuses, read_supervisor_state
from common.supervisor_table import in_words, process_table

# What the log says of tasks.
_OF_TASKS = frozenset({"sent", "refused"})


@dataclass(frozen=True, slots=True)
class AgentReport:
    """The agent, which answers. base: digest of the model in memory, "" when none is.

    run: what is trained, "" when nothing is. Times are Unix seconds, 0 where there is none.
    """

    pid: int
    since: float
    base: str
    answered: int
    last_answer: float
    run: str
    round: int
    step: int
    steps: int


@dataclass(frozen=True, slots=True)
class TaskReport:
    """The newest task that was answered or refused, as the audit log has it. at: Unix seconds."""

    at: float
    event: str
    run: str
    round: int
    what: str


@dataclass(frozen=True, slots=True)
class SiteStatus:
    """A hospital's side at `time`. up: the process of `client up`, None when it does not run.

    advice: what is wrong, each with what to do.
    """

    site: str
    folder: str
    coordinator: str
    time: float
    up: int | None
    processes: tuple[ProcessStatus, ...]
    agent: AgentReport | None
    last_task: TaskReport | None
    waiting: int
    advice: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Return it for another program to read."""
        return asdict(self)


def site_status(config: SiteConfig) -> SiteStatus:
    """Return what a hospital's side does now."""
    state = config.folder / "state"
    up = lock_holder(state / "up.lock")
    processes = process_statuses(read_supervisor_state(state / "up.json"))
    agent = _agent(config)
    advice, last = [], None
    try:
        last = _last_task(config)
    except AuditError as error:
        advice.append(str(error))
    waiting = _num_waiting(state / "approvals")
    if up is None and agent is None:
        advice.append(
            f"Nothing runs; start it: consilium client up --site {config.folder}, or its services, where two "
            "users run it"
        )
    elif agent is None:
        advice.append(
            f"The agent does not answer at {config.control_socket_path}; its log: "
            f"{state / 'flower' / 'agent.log'}"
        )
    if waiting:
        advice.append(
            f"{waiting} waiting for approval: consilium client approve --site {config.folder}"
        )
    return SiteStatus(
        config.site.name, str(config.folder), config.coordinator.address or "", time.time(), up,
        processes, agent, last, waiting, tuple(advice),
    )  # fmt: skip


def status_tables(status: SiteStatus) -> Iterator[RenderableType]:
    """Give one table after the other, then what is wrong, line by line."""
    yield Text(f"{status.site} in {status.folder}: {_what_runs(status)}", style="bold")
    if status.processes:
        yield process_table(status.processes, now_s=status.time)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("coordinator", status.coordinator or "none yet")
    if status.agent is not None:
        for name, text in _agent_rows(status.agent, now_s=status.time):
            table.add_row(name, text)
    if status.last_task is not None:
        task = status.last_task
        when = datetime.fromtimestamp(task.at).strftime("%Y-%m-%d %H:%M:%S")
        what = f"{when} {task.event}, run {task.run[:8]}, round {task.round}: {task.what}"
        table.add_row("last task", Text(what))
    yield table
    for sentence in status.advice:
        yield Text(f"! {sentence}", style="yellow", overflow="fold")


def _what_runs(status: SiteStatus) -> str:
    if status.up is not None:
        return f"up, process {status.up}"
    # Where two users run it: what the node does, its own user sees.
    return "the agent alone" if status.agent is not None else "down"


def _agent_rows(agent: AgentReport, *, now_s: float) -> Iterator[tuple[str, str]]:
    answered = f"{agent.answered} answered"
    if agent.last_answer:
        answered += f", the last {in_words(now_s - agent.last_answer)} ago"
    yield "agent", f"process {agent.pid}, for {in_words(now_s - agent.since)}, {answered}"
    yield "model", f"{agent.base[:16]}... in memory" if agent.base else "none in memory"
    if agent.run:
        # An evaluation has no steps that were asked for.
        place = f"step {agent.step} of {agent.steps}" if agent.steps else f"test batch {agent.step}"
        yield "training", f"run {agent.run[:8]}, round {agent.round}, {place}"
    else:
        yield "training", "nothing"


def _agent(config: SiteConfig) -> AgentReport | None:
    said = agent_status(config.control_socket_path)
    if said is None:
        return None
    return AgentReport(
        said.pid, said.since, said.base_digest, said.answered, said.last_answer,
        said.work.run, said.work.server_round, said.work.step, said.work.steps,
    )  # fmt: skip


def _num_waiting(folder: Path) -> int:
    """Count without client/approvals.py, which loads torch for what a run would cost."""
    count = 0
    for path in folder.glob("[!.]*.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            count += from_canonical(path.read_bytes())["state"] == "waiting"
    return count


def _last_task(config: SiteConfig) -> TaskReport | None:
    path = config.folder / "state" / "audit.jsonl"
    if not path.exists():
        return None
    last: AuditEntry | None = None
    for entry in read_audit_log(path):
        if entry.event in _OF_TASKS:
            last = entry
    if last is None:
        return None
    fields = last.fields
    what = fields.get("code") or f"{fields.get('size_bytes', 0):,} adapter bytes"
    return TaskReport(
        last.at, last.event, str(fields.get("run", "")), int(fields.get("round", 0)), str(what)
    )
