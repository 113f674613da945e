"""A whole run at the coordinator: start or resume, rounds, merge, evaluate, checkpoint, export."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from common.adapter import AdapterState
from common.audit_log import read_audit_log
from common.canonical import canonical_json
from common.config import RunConfig
from common.errors import CheckpointError, ConsiliumError, DiskError
from common.files import is_disk_full
from common.metrics import LanguageMetrics
from common.process_memory import peak_memory_bytes
from common.schedule import scheduled_rate
from common.signing import SigningKey
from server.audit import CoordinatorAudit
from server.checkpoint import Checkpoint, load_latest, load_round, save_checkpoint
from server.evaluation import CentralCounts
from server.exclusions import Exclusions
from server.export.adapter import export_adapter
from server.global_adapter import first_adapter, merge_replies
from server.history import Event, History, Listener, read_events
from server.incoming import empty_incoming, incoming_folder
from server.prepared_run import PreparedRun
from server.result import evaluated_at_sites, try_to_evaluate
from server.roster import LiveRoster, Roster
from server.rounds import Federation
from server.run_context import RunContext
from server.run_folder import RunFolder
from server.run_state import BY_ORDER, run_state
from server.summary import (
    Summary,
    add_round,
    evaluations_since_best,
    new_summary,
    round_entry,
)
from server.tracking import tracked

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunPlan:
    """Everything that a run at the coordinator starts from.

    resume: continue from the newest checkpoint in `folder`, if there is one. roster_file: where the roster
    came from, read again while the run goes. audit: of the coordinator, not of the run: it lies beside the
    key and outlives the run's folder. pull_threads: how many replies are fetched at a time, see `Messenger`;
    0 where fetching one is what trains it.
    """

    config: RunConfig
    folder: RunFolder
    key: SigningKey
    roster: Roster
    prepared: PreparedRun
    audit: CoordinatorAudit
    resume: bool = False
    pull_threads: int = 0
    roster_file: Path | None = None


def run_federation(
    grid: Grid, plan: RunPlan, *, listener: Listener = lambda event: None
) -> Summary:
    """Run every round that is left and return what summary.json then holds.

    listener: is told every event of history.jsonl.
    Raises ConsiliumError, with the reason in the history and everything saved so far intact:
    CheckpointError at once, and without a word in the history, while another process runs this run.
    """
    with plan.folder.held():
        if run_state(read_events(plan.folder.history), held=True).code == BY_ORDER:
            raise CheckpointError(
                f"the run in {plan.folder.path} was stopped by order; `consilium server run --resume` lets "
                "it go on"
            )
        with tracked(plan.config, run_uid=plan.folder.run_uid) as track:
            return _run_noted(grid, plan, _to_both(track, listener))


def _to_both(first: Listener, second: Listener) -> Listener:
    def tell(event: Event) -> None:
        first(event)
        second(event)

    return tell


def _run_noted(grid: Grid, plan: RunPlan, listener: Listener) -> Summary:
    """Run, and write down why where it stops."""
    history = History(plan.folder.history, listener=listener)
    try:
        with incoming_folder(plan.folder.incoming):
            return _run(grid, plan, history)
    except ConsiliumError as error:
        _note_stop(plan, history, error.code, str(error))
        raise
    except Exception as error:
        if is_disk_full(error):
            full = DiskError(
                f"the disk of {plan.folder.path} is full ({error}); free some space and continue with "
                "--resume: every round that was merged is safe"
            )
            _note_stop(plan, history, full.code, str(full))
            raise full from error
        _note_stop(plan, history, "internal", f"{type(error).__name__}: {error}")
        raise


def _note_stop(plan: RunPlan, history: History, code: str, message: str) -> None:
    try:
        history.record("stopped", code=code, message=message)
        plan.audit.note("stopped", run=plan.folder.run_uid, code=code)
    except (OSError, ConsiliumError) as error:
        # Why it stopped matters more than that it cannot be written down.
        logger.error(
            "the run stopped (%s: %s), and its trail ends before that: %s", code, message, error
        )


def _run(grid: Grid, plan: RunPlan, history: History) -> Summary:
    started = time.monotonic()
    config, folder = plan.config, plan.folder
    base, shape, central = plan.prepared.base, plan.prepared.shape, plan.prepared.central
    context = RunContext(
        uid=folder.run_uid,
        config=config,
        key=plan.key,
        roster=LiveRoster(plan.roster, plan.roster_file),
        base_digest=base.digest,
        history=history,
        audit=plan.audit,
        exclusions=Exclusions(folder.exclusions),
        incoming=folder.incoming,
    )

    counts = None if central is None else CentralCounts(base, central.examples, config=config)

    def measure(adapter: AdapterState | None) -> LanguageMetrics | None:
        return None if counts is None else counts.metrics(adapter)

    checkpoint = _checkpoint_to_continue(plan, history)
    if checkpoint is not None:
        summary = checkpoint.progress
        current, done = checkpoint.adapter, checkpoint.server_round
        velocity = checkpoint.velocity
        _complete_trail(plan, history, checkpoint)
        history.record("resumed", round=done, rounds=config.train.rounds)
        _note_start("resumed", plan, current, done=done)
    else:
        current, done, velocity = first_adapter(base, config), 0, None
        _note_start("run-started", plan, current, done=done)
        history.record(
            "run-started", run=folder.run_uid, rounds=config.train.rounds, base=base.digest
        )
        summary = new_summary(folder.run_uid, config, measure(None))
        history.record("base", **summary["central"]["base"])
    wall_before_s = float(summary["wall_s"])

    federation = Federation(grid, context, shape=shape, pull_threads=plan.pull_threads)
    for server_round in range(done + 1, config.train.rounds + 1):
        if _is_over(summary, config):
            break
        replies = federation.run_round(current, server_round=server_round)
        merged = merge_replies(replies, current, velocity, config=config, roster=plan.roster)
        current, velocity = merged.state, merged.velocity
        empty_incoming(folder.incoming)
        evaluate_started = time.monotonic()
        last = server_round == config.train.rounds
        due = last or server_round % config.evaluation.every == 0
        metrics = measure(current) if due else None
        entry = round_entry(
            server_round,
            replies,
            metrics,
            merge=merged.report,
            evaluate_s=time.monotonic() - evaluate_started,
            learning_rate=scheduled_rate(
                server_round * config.train.local_steps - 1,
                total_steps=config.total_steps,
                settings=config.train,
            ),
            memory_bytes=peak_memory_bytes(),
        )
        add_round(summary, entry, replies, metrics)
        summary["wall_s"] = round(wall_before_s + time.monotonic() - started, 2)
        save_checkpoint(
            folder.checkpoints,
            Checkpoint(
                server_round, current, summary, folder.run_uid, plan.roster.digest(), velocity
            ),
            keep=config.checkpoint.keep,
            best=None if summary["best"] is None else summary["best"]["round"],
        )
        _note_merged(plan, current, entry)
        history.record("round", **entry, privacy=summary["privacy"])
        # Else a round's replies would stay in memory beside the next one's.
        del replies, merged
    if _is_over(summary, config):
        summary["stopped_early"] = len(summary["rounds"]) < config.train.rounds
        history.record("early-stop", best=summary["best"])
    exported = _adapter_to_export(summary, current, plan)
    export_adapter(exported, folder.adapter, lora=config.lora, base_name=config.model.name)
    try_to_evaluate(
        plan.prepared,
        exported,
        plan.folder,
        config=config,
        server_round=summary["exported_round"],
        at_sites=partial(evaluated_at_sites, federation, history),
        counts=counts,
        history=history,
    )
    summary["wall_s"] = round(wall_before_s + time.monotonic() - started, 2)
    folder.write_summary(summary)
    history.record("finished", folder=str(folder.path), adapter=exported.unscaled().digest())
    plan.audit.note("finished", run=folder.run_uid, adapter=exported.digest())
    return summary


def _checkpoint_to_continue(plan: RunPlan, history: History) -> Checkpoint | None:
    """Return the newest whole checkpoint of this very run, None where it begins."""
    folder = plan.folder
    if not plan.resume:
        return None
    checkpoint = load_latest(folder.checkpoints, shape=plan.prepared.shape)
    if checkpoint is None:
        return None
    if checkpoint.run_uid != folder.run_uid:
        raise CheckpointError(
            f"the checkpoints in {folder.checkpoints} are of run {checkpoint.run_uid!r}, and {folder.path} "
            f"holds run {folder.run_uid!r}; put the right ones there, or start again with --force"
        )
    roster = plan.roster.digest()
    if roster != checkpoint.roster:
        # Sites may join, leave and change their keys; that they did is on record.
        change = {"before": checkpoint.roster, "now": roster, "sites": sorted(plan.roster)}
        history.record("roster-changed", **change)
        plan.audit.note("roster-changed", run=folder.run_uid, **change)
    return checkpoint


def _is_over(summary: Summary, config: RunConfig) -> bool:
    """Whether the central loss has not come down for evaluation.patience evaluations."""
    patience = config.evaluation.patience
    return bool(patience) and evaluations_since_best(summary) >= patience


def _adapter_to_export(summary: Summary, current: AdapterState, plan: RunPlan) -> AdapterState:
    """Return the adapter of the last round, or of the best one where the run asks for it."""
    last = summary["rounds"][-1]["round"] if summary["rounds"] else 0
    best = summary["best"]
    if plan.config.export.round == "last" or best is None or best["round"] == last:
        summary["exported_round"] = last
        return current
    summary["exported_round"] = best["round"]
    summary["central"]["final"] = {key: best[key] for key in best if key != "round"}
    kept = load_round(plan.folder.checkpoints, best["round"], shape=plan.prepared.shape)
    return kept.adapter


def _note_start(event: str, plan: RunPlan, current: AdapterState, *, done: int) -> None:
    plan.audit.note(
        event,
        run=plan.folder.run_uid,
        round=done,
        base=plan.prepared.base.digest,
        adapter=current.digest(),
        config=hashlib.sha256(canonical_json(plan.config.flat())).hexdigest(),
    )


def _note_merged(plan: RunPlan, merged: AdapterState, entry: Mapping[str, Any]) -> None:
    plan.audit.note(
        "merged",
        run=plan.folder.run_uid,
        round=entry["round"],
        sites=entry["sites"],
        adapter=merged.digest(),
    )


def _complete_trail(plan: RunPlan, history: History, checkpoint: Checkpoint) -> None:
    """Write down the round of a checkpoint whose process died before it could: it counts."""
    entry = checkpoint.progress["rounds"][-1]
    if not any(
        line.event == "merged"
        and (line.fields["run"], line.fields["round"]) == (plan.folder.run_uid, entry["round"])
        for line in read_audit_log(plan.audit.path)
    ):
        _note_merged(plan, checkpoint.adapter, entry)
    told = (event for event in history.events() if event["event"] == "round")
    if entry["round"] not in {event["round"] for event in told}:
        history.record("round", **entry, privacy=checkpoint.progress["privacy"])
