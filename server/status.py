"""How a coordinator is now: its processes, its nodes, its runs, and what to do where something is wrong.

Processes are looked up with the system, locks are tried, the SuperLink is asked: no file is believed that
says somebody lives.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from common.errors import ConfigError, ConsiliumError, EngineError
from common.flower_process import http_answers
from common.supervisor_state import ProcessStatus, process_statuses, read_supervisor_state
from server.certificates import expires_at
from server.coordinator import Coordinator
from server.flower_control import NodeStatus
from server.keeper import Submission, read_submissions
from server.report.serving_address import page_address
from server.run_place import Refusals, run_place
from server.run_state import BY_ORDER
from server.runs import AskedRun, AskedRuns
from server.superlink_state import registered_nodes
from server.up import probed_host

_NODES_TIMEOUT_S = 8.0
_ANSWER_TIMEOUT_S = 2.0
# Time enough for a person to be away.
_RENEW_BEFORE_S = 30 * 86_400.0

# What helps against each end of a run, where its message does not say it.
_REMEDIES = {
    "finished": "",
    "stopped": "let it go on with `consilium server run RUN.toml DIR --resume`",
    "gave-up": "mend what its message names, then `consilium server run RUN.toml DIR --resume`",
}


@dataclass(frozen=True, slots=True)
class NodeReport:
    """A SuperNode. site: "" while no run has heard from it. online_s: for how long now."""

    # As text: not every reader of JSON holds 64 bits.
    node: str
    site: str
    online: bool
    online_s: float
    offline_at: str


@dataclass(frozen=True, slots=True)
class RunReport:
    """A run. state: waiting, running, finished, stopped or gave-up; code, message: why it ended.

    round: the one that goes, else the newest committed one. sites: of that round; replied: of them.
    refused: site -> reason, of that round and of the gathering before it; refusals: of the whole run.
    awaiting: sites whose hospital has yet to approve it. epsilon: by site, as reported; null without
    differential privacy. checkpoint: the newest. process: of the ServerApp, null when none runs. trouble: why
    nothing runs it now.
    """

    run: str
    folder: str
    state: str
    code: str
    message: str
    round: int
    rounds: int
    sites: tuple[str, ...]
    replied: tuple[str, ...]
    refused: Mapping[str, str]
    refusals: Mapping[str, Refusals]
    awaiting: tuple[str, ...]
    epsilon: Mapping[str, float | None]
    checkpoint: str
    process: int | None
    trouble: str


@dataclass(frozen=True, slots=True)
class CoordinatorStatus:
    """All of it. up: the process of `consilium server up`, null when it does not run.

    nodes: null when the SuperLink does not answer. certificate_until: of the SuperLink, Unix seconds, null
    when it cannot be read. advice: what is wrong and what to do about it. reports: the address of the
    page that shows the runs, "" where none is served.
    """

    folder: str
    time: float
    up: int | None
    processes: tuple[ProcessStatus, ...]
    nodes: tuple[NodeReport, ...] | None
    runs: tuple[RunReport, ...]
    certificate_until: float | None
    advice: tuple[str, ...]
    reports: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return it for another program to read."""
        return asdict(self)


def coordinator_status(coordinator: Coordinator) -> CoordinatorStatus:
    """Look at everything once; it takes less than ten seconds, whatever does not answer."""
    up = coordinator.up_pid()
    processes = process_statuses(read_supervisor_state(coordinator.up_state))
    runs = AskedRuns(coordinator.launches).all()
    nodes = _nodes(coordinator, {**_sites_of_nodes(runs), **_enrolled_nodes(coordinator)})
    submissions = read_submissions(coordinator.keeper_state)
    shown = [run for run in runs if not run.state.is_over]
    over = [run for run in runs if run.state.is_over]
    reports = tuple(_report(run, submissions.get(run.uid)) for run in [*over[-1:], *shown])
    until = _certificate_until(coordinator)
    return CoordinatorStatus(
        folder=str(coordinator.folder),
        time=round(time.time(), 3),
        up=up,
        processes=processes,
        nodes=nodes,
        runs=reports,
        certificate_until=until,
        advice=(
            *_advice(coordinator, up, processes, nodes, reports),
            *_certificate_advice(coordinator, until),
        ),
        reports=_reports_address(coordinator) if up is not None else "",
    )


def _nodes(coordinator: Coordinator, sites: Mapping[int, str]) -> tuple[NodeReport, ...] | None:
    host, port = probed_host(coordinator), coordinator.bind.port
    if not http_answers(host, port, tls=True, timeout_s=_ANSWER_TIMEOUT_S):
        return None
    try:
        listed: Sequence[NodeStatus] = coordinator.control(timeout_s=_NODES_TIMEOUT_S).nodes()
    except EngineError:
        return None
    return tuple(
        NodeReport(
            node=str(node.node_id),
            site=sites.get(node.node_id, ""),
            online=node.online,
            online_s=node.online_s if node.online else 0.0,
            offline_at="" if node.online else node.offline_at,
        )
        for node in listed
    )


def _sites_of_nodes(runs: Sequence[AskedRun]) -> dict[int, str]:
    """Which site answered on which node last."""
    sites: dict[int, str] = {}
    for run in runs:
        for event in run.events:
            if event["event"] == "sites":
                sites.update({int(node): site for site, node in event.get("nodes", {}).items()})
    return sites


def _enrolled_nodes(coordinator: Coordinator) -> dict[int, str]:
    """Which site's key each node was registered with."""
    try:
        sites = {one.node_key: one.site for one in coordinator.roster().values() if one.node_key}
        nodes = registered_nodes(coordinator.superlink_database, sites)
    except ConsiliumError:
        # Neither is needed to look at the rest.
        return {}
    return {node: sites[key] for key, node in nodes.items()}


def _reports_address(coordinator: Coordinator) -> str:
    try:
        return page_address(int(json.loads(coordinator.watch_state.read_text())["port"]))
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _certificate_until(coordinator: Coordinator) -> float | None:
    try:
        return expires_at(coordinator.certificate.read_bytes())
    except ConfigError:
        return None


def _report(run: AskedRun, submission: Submission | None) -> RunReport:
    state = run.state
    place = run_place(run.events)
    checkpoints = sorted(run.folder.checkpoints.glob("round-*"))
    trouble = ""
    if submission is not None and run.holder is None and not state.is_over:
        trouble = submission.trouble
    return RunReport(
        run=run.uid,
        folder=str(run.folder.path),
        state=state.kind,
        code=state.code,
        message=state.message,
        round=max(place.server_round, state.rounds_done),
        rounds=state.rounds,
        sites=place.sites,
        replied=place.replied,
        refused=place.refused,
        refusals=place.refusals,
        awaiting=place.awaiting,
        epsilon=place.epsilon,
        checkpoint=str(checkpoints[-1]) if checkpoints else "",
        process=run.holder,
        trouble=trouble,
    )


def _advice(
    coordinator: Coordinator,
    up: int | None,
    processes: Sequence[ProcessStatus],
    nodes: Sequence[NodeReport] | None,
    runs: Sequence[RunReport],
) -> list[str]:
    """Say what is wrong and what to do, the most pressing first."""
    said = []
    if up is None:
        said.append(f"nothing runs; start it: consilium server up {coordinator.folder}")
    else:
        for one in processes:
            if not one.alive:
                said.append(
                    f"{one.name} is down and will be started again; if it stays down, read "
                    f"{coordinator.flower_home / one.name}.log"
                )
        if nodes is None:
            said.append(
                "the SuperLink does not answer, so nodes are unknown; if that stays so, read "
                f"{coordinator.flower_home / 'superlink.log'}"
            )
    offline = [node for node in nodes or () if not node.online]
    if offline:
        names = ", ".join(node.site or node.node for node in offline)
        said.append(f"offline: {names}; at each of them `consilium client up` should run")
    for run in runs:
        if run.awaiting:
            said.append(
                f"{', '.join(run.awaiting)}: there, `consilium client approve {run.run}` lets the run begin"
            )
        if run.trouble:
            said.append(f"run {run.run} does not go on: {run.trouble}")
        if run.state in ("stopped", "gave-up") and not run.trouble:
            order = run.code == BY_ORDER
            said.append(
                f"run {run.run} {'was stopped by order' if order else f'{run.state} ({run.code})'}; "
                f"{_REMEDIES[run.state].replace('DIR', str(coordinator.folder))}"
            )
    return said


def _certificate_advice(coordinator: Coordinator, until: float | None) -> list[str]:
    if until is None:
        return [f"{coordinator.certificate} is no certificate; restore it from a backup"]
    left_s = until - time.time()
    if left_s > _RENEW_BEFORE_S:
        return []
    when = f"expires in {left_s / 86_400:.0f} days" if left_s > 0 else "has expired"
    return [
        f"the SuperLink's certificate {when}: consilium server renew {coordinator.folder}, then start "
        "`consilium server up` anew; without that no hospital connects"
    ]
