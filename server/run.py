"""A whole run at the coordinator: start or resume, rounds, merge, evaluate, checkpoint, export."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from common.adapter import AdapterShape, AdapterState
from common.canonical import canonical_json
from common.config import RunConfig
from common.errors import ConsiliumError
from common.metrics import LanguageMetrics
from common.model import (
    BaseModel,
    adapter_shape,
    choose_device,
    initial_adapter,
    load_base,
    resolve_model,
)
from common.prompts import Examples, resolve_template
from common.signing import SigningKey
from server.aggregation import METHODS, SiteUpdate
from server.audit import CoordinatorAudit
from server.checkpoint import Checkpoint, load_latest, save_checkpoint
from server.evaluation import evaluate, load_central_examples
from server.export import export_adapter
from server.history import History, Listener
from server.messenger import Messenger
from server.roster import Roster
from server.rounds import Federation, RoundReplies
from server.run_context import RunContext
from server.run_folder import RunFolder

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PreparedRun:
    """What a run needs loaded; making it checks all that can be wrong before a file is written.

    base: the quantised base model. shape: of the global adapter. examples: the tokenised central test
    set, None without one.
    """

    base: BaseModel
    shape: AdapterShape
    examples: Examples | None


@dataclass(frozen=True, slots=True)
class RunPlan:
    """Everything that a run at the coordinator starts from.

    resume: continue from the newest checkpoint in `folder`, if there is one. audit: of the coordinator,
    not of the run: it lies beside the key and outlives the run's folder.
    """

    config: RunConfig
    folder: RunFolder
    key: SigningKey
    roster: Roster
    prepared: PreparedRun
    audit: CoordinatorAudit
    resume: bool = False


def prepare_run(
    config: RunConfig, *, models: Mapping[str, Path], central_files: Sequence[Path] = ()
) -> PreparedRun:
    """Load and check the base model, the LoRA setting and the central test set.

    models: model.name -> folder. central_files: records for central evaluation, [] for none.
    Raises ModelError, ConfigError or DataError.
    """
    base = load_base(
        resolve_model(config.model, known=models, hub=True), config.model, device=choose_device()
    )
    shape = adapter_shape(base, config.lora)
    resolve_template(config.data.prompt_template)
    return PreparedRun(base, shape, load_central_examples(central_files, config, base=base))


def run_federation(
    grid: Grid, plan: RunPlan, *, listener: Listener = lambda event: None
) -> dict[str, Any]:
    """Run every round that is left and return what summary.json then holds.

    listener: is told every event of history.jsonl.
    Raises ConsiliumError, with the reason in the history and everything saved so far intact.
    """
    history = History(plan.folder.history, listener=listener)
    try:
        return _run(grid, plan, history)
    except ConsiliumError as error:
        history.record("stopped", code=error.code, message=str(error))
        plan.audit.note("stopped", run=plan.folder.run_uid, code=error.code)
        raise
    except Exception as error:
        history.record("stopped", code="internal", message=f"{type(error).__name__}: {error}")
        plan.audit.note("stopped", run=plan.folder.run_uid, code="internal")
        raise


def _run(grid: Grid, plan: RunPlan, history: History) -> dict[str, Any]:
    started = time.monotonic()
    config, folder = plan.config, plan.folder
    base, shape, examples = plan.prepared.base, plan.prepared.shape, plan.prepared.examples

    def measure(adapter: AdapterState | None) -> LanguageMetrics | None:
        if examples is None:
            return None
        return evaluate(
            base,
            examples,
            adapter=adapter,
            lora=config.lora,
            batch_size=config.evaluation.batch_size,
        )

    checkpoint = load_latest(folder.checkpoints, shape=shape) if plan.resume else None
    if checkpoint is not None:
        progress = checkpoint.progress
        current, done = checkpoint.adapter, checkpoint.server_round
        history.record("resumed", round=done, rounds=config.train.rounds)
        _note_start("resumed", plan, current, done=done)
    else:
        current, done = initial_adapter(base, config.lora, seed=config.train.seed), 0
        _note_start("run-started", plan, current, done=done)
        history.record(
            "run-started", run=folder.run_uid, rounds=config.train.rounds, base=base.digest
        )
        progress = _new_progress(folder.run_uid, config, measure(None))
        history.record("base", **progress["central"]["base"])
    wall_before_s = float(progress["wall_s"])

    context = RunContext(
        uid=folder.run_uid,
        config=config,
        key=plan.key,
        roster=plan.roster,
        base_digest=base.digest,
        history=history,
        audit=plan.audit,
    )
    federation = Federation(Messenger(grid), context, shape=shape)
    for server_round in range(done + 1, config.train.rounds + 1):
        replies = federation.run_round(current, server_round=server_round)
        merge_started = time.monotonic()
        merged = METHODS[config.aggregation.method](current, _site_updates(replies, plan))
        current = merged.state
        merge_s = time.monotonic() - merge_started
        evaluate_started = time.monotonic()
        last = server_round == config.train.rounds
        due = last or server_round % config.evaluation.every == 0
        metrics = measure(current) if due else None
        entry = _round_entry(
            server_round,
            replies,
            metrics,
            discarded_energy=merged.total_discarded,
            merge_s=merge_s,
            evaluate_s=time.monotonic() - evaluate_started,
        )
        _add_round(progress, entry, replies, metrics)
        progress["wall_s"] = round(wall_before_s + time.monotonic() - started, 2)
        save_checkpoint(
            folder.checkpoints,
            Checkpoint(server_round, current, progress),
            keep=config.checkpoint.keep,
        )
        plan.audit.note(
            "merged",
            run=folder.run_uid,
            round=server_round,
            sites=[update.site for update in replies.updates],
            adapter=current.digest(),
        )
        history.record("round", **entry, privacy=progress["privacy"])
        # Else a round's replies would stay in memory beside the next one's.
        del replies, merged

    export_adapter(
        current,
        folder.adapter,
        lora=config.lora,
        base_name=config.model.name,
    )
    progress["wall_s"] = round(wall_before_s + time.monotonic() - started, 2)
    folder.write_summary(progress)
    history.record("finished", folder=str(folder.path))
    plan.audit.note("finished", run=folder.run_uid, adapter=current.digest())
    return progress


def _note_start(event: str, plan: RunPlan, current: AdapterState, *, done: int) -> None:
    plan.audit.note(
        event,
        run=plan.folder.run_uid,
        round=done,
        base=plan.prepared.base.digest,
        adapter=current.digest(),
        config=hashlib.sha256(canonical_json(plan.config.flat())).hexdigest(),
    )


def _site_updates(replies: RoundReplies, plan: RunPlan) -> list[SiteUpdate]:
    by_size = plan.config.aggregation.weighting == "declared-size"
    return [
        SiteUpdate(
            update.site,
            float(plan.roster[update.site].declared_size) if by_size else 1.0,
            sent=replies.sent[update.site],
            returned=update.state,
        )
        for update in replies.updates
    ]


def _new_progress(run_uid: str, config: RunConfig, base: LanguageMetrics | None) -> dict[str, Any]:
    return {
        "run": run_uid,
        "rounds_planned": config.train.rounds,
        "method": config.aggregation.method,
        "sites": [],
        "wall_s": 0.0,
        "bytes_up": 0,
        "bytes_down": 0,
        "central": {"base": asdict(base) if base else {}, "final": {}},
        "rounds": [],
        "privacy": {},
    }


def _round_entry(
    server_round: int,
    replies: RoundReplies,
    metrics: LanguageMetrics | None,
    *,
    discarded_energy: float,
    merge_s: float,
    evaluate_s: float,
) -> dict[str, Any]:
    reported = [update.numbers.get("train-seconds", 0.0) for update in replies.updates]
    train_s = min(max(reported, default=0.0), replies.seconds)
    return {
        "round": server_round,
        "loss": metrics.loss if metrics else None,
        "replies": len(replies.updates),
        "sites": [update.site for update in replies.updates],
        "refused": dict(replies.refused),
        "attempts": replies.attempts,
        "discarded_energy": discarded_energy,
        "bytes_up": replies.bytes_up,
        "bytes_down": replies.bytes_down,
        "seconds": {
            "train": round(train_s, 3),
            "wait": round(replies.seconds - train_s, 3),
            "merge": round(merge_s, 3),
            "evaluate": round(evaluate_s, 3),
        },
    }


def _add_round(
    progress: dict[str, Any],
    entry: dict[str, Any],
    replies: RoundReplies,
    metrics: LanguageMetrics | None,
) -> None:
    progress["rounds"].append(entry)
    progress["sites"] = sorted({*progress["sites"], *entry["sites"]})
    progress["bytes_up"] += replies.bytes_up
    progress["bytes_down"] += replies.bytes_down
    if metrics is not None:
        progress["central"]["final"] = asdict(metrics)
    for update in replies.updates:
        row = asdict(update.privacy)
        row["epsilon"] = None if math.isinf(row["epsilon"]) else row["epsilon"]
        progress["privacy"][update.site] = row
