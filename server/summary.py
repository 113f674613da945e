"""What summary.json holds: a run in numbers, kept from round to round and in every checkpoint.

A plain dictionary, since it is what the file holds; this is the only place that makes or changes one.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from common.config import RunConfig
from common.metrics import LanguageMetrics
from server.aggregation import MergeReport
from server.open_round import RoundReplies

Summary = dict[str, Any]


def new_summary(run_uid: str, config: RunConfig, base: LanguageMetrics | None) -> Summary:
    """Return the summary of a run before its first round. base: metrics of the untouched base model."""
    return {
        "run": run_uid,
        "rounds_planned": config.train.rounds,
        "method": config.aggregation.method,
        "sites": [],
        "wall_s": 0.0,
        "bytes_up": 0,
        "bytes_down": 0,
        "central": {"base": asdict(base) if base else {}, "final": {}},
        "best": None,
        "stopped_early": False,
        "exported_round": None,
        "rounds": [],
        "privacy": {},
    }


def round_entry(
    server_round: int,
    replies: RoundReplies,
    metrics: LanguageMetrics | None,
    *,
    merge: MergeReport,
    evaluate_s: float,
    learning_rate: float,
    memory_bytes: int,
) -> dict[str, Any]:
    """Return one round in numbers.

    evaluate_s: seconds of central evaluation. learning_rate: of the round's last step. memory_bytes: the
    most that this process has held so far.
    """
    reported = [update.numbers.get("train-seconds", 0.0) for update in replies.updates]
    train_s = min(max(reported, default=0.0), replies.seconds)
    return {
        "round": server_round,
        "loss": metrics.loss if metrics else None,
        "metrics": asdict(metrics) if metrics else None,
        "replies": len(replies.updates),
        "sites": [update.site for update in replies.updates],
        "refused": dict(replies.refused),
        "attempts": replies.attempts,
        "discarded_energy": merge.discarded_energy,
        "merge": {
            "method": merge.method,
            "factor_bias": merge.factor_bias,
            "worst_module": merge.worst_module,
            "worst_discarded_energy": merge.worst_discarded_energy,
            "live_ranks": dict(zip(("min", "median", "max"), merge.live_ranks, strict=True)),
            "shares": dict(merge.shares),
        },
        "bytes_up": replies.bytes_up,
        "bytes_down": replies.bytes_down,
        "seconds": {
            "train": round(train_s, 3),
            "wait": round(replies.seconds - train_s, 3),
            "merge": round(merge.seconds, 3),
            "evaluate": round(evaluate_s, 3),
        },
        "learning_rate": learning_rate,
        "memory_bytes": memory_bytes,
    }


def add_round(
    summary: Summary,
    entry: dict[str, Any],
    replies: RoundReplies,
    metrics: LanguageMetrics | None,
) -> None:
    """Count one round in."""
    summary["rounds"].append(entry)
    summary["sites"] = sorted({*summary["sites"], *entry["sites"]})
    summary["bytes_up"] += replies.bytes_up
    summary["bytes_down"] += replies.bytes_down
    if metrics is not None:
        summary["central"]["final"] = asdict(metrics)
        if is_better(metrics.loss, than=summary["best"]):
            summary["best"] = {"round": entry["round"], **asdict(metrics)}
    for update in replies.updates:
        row = asdict(update.privacy)
        row["epsilon"] = None if math.isinf(row["epsilon"]) else row["epsilon"]
        summary["privacy"][update.site] = row


def is_better(loss: float, *, than: dict[str, Any] | None) -> bool:
    """Whether a central loss is the lowest so far; NaN never is."""
    return not math.isnan(loss) and (than is None or loss < than["loss"])


def evaluations_since_best(summary: Summary) -> int:
    """Return how many evaluations in a row have not lowered the central loss."""
    best = 0 if summary["best"] is None else int(summary["best"]["round"])
    later = [entry for entry in summary["rounds"] if entry["round"] > best]
    return sum(entry["loss"] is not None for entry in later)
