"""Run folders as the coordinator leaves them, made in a moment: for what reads them."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.config import RunConfig, Scalar
from server.history import History
from server.run_folder import run_toml

SITES = ("harbour", "lakeside", "north", "st-anne")
BASE_LOSS = 3.6


def scores(loss: float) -> dict[str, float]:
    perplexity = math.exp(loss) if math.isfinite(loss) else math.nan
    return {"loss": loss, "perplexity": perplexity, "token_accuracy": 1 / (1 + loss)}


def write_run(
    folder: Path,
    *,
    rounds: int = 4,
    sites: tuple[str, ...] = SITES,
    losses: tuple[float, ...] = (),
    missing: Mapping[tuple[int, str], str] | None = None,
    end: str = "finished",
    planned: int = 0,
    protected: bool = True,
    old: bool = False,
    settings: Mapping[str, Scalar] | None = None,
) -> Path:
    """Write a run's folder and return it.

    losses: central, by round; by default they halve the way to 0.6. missing: (round, site) -> reason for
    which its update was not merged. end: "finished", "stopped" or "" for a run that broke off. old: without
    what later versions write of a round.
    """
    planned = planned or rounds
    folder.mkdir(parents=True)
    config = RunConfig.parse({"train.rounds": planned, "run.uid": "0f" * 16, **(settings or {})})
    (folder / "run.toml").write_text(run_toml(config.flat()))
    history = History(folder / "history.jsonl")
    history.record("run-started", run="0f" * 16, rounds=planned, base="ab" * 32)
    history.record("base", **scores(BASE_LOSS))
    history.record("sites", sites=list(sites), nodes={})
    entries: list[dict[str, Any]] = []
    privacy: dict[str, Any] = {}
    for number in range(1, rounds + 1):
        loss = losses[number - 1] if losses else 0.6 + 3.0 * 0.5**number
        entry = _round(history, number, loss, sites, missing or {}, planned)
        privacy = {site: _row(number, planned, protected) for site in sites}
        if old:
            for name in ("metrics", "learning_rate", "memory_bytes"):
                del entry[name]
        history.record("round", **entry, privacy=privacy)
        entries.append(entry)
    if end == "stopped":
        history.record("stopped", code="quorum", message="too few sites came")
    if end == "finished":
        summary = {
            "run": "0f" * 16,
            "rounds_planned": planned,
            "method": "svd",
            "sites": list(sites),
            "wall_s": 12.5 * rounds,
            "bytes_up": sum(one["bytes_up"] for one in entries),
            "bytes_down": sum(one["bytes_down"] for one in entries),
            "central": {"base": scores(BASE_LOSS), "final": scores(entries[-1]["loss"])},
            "best": None,
            "stopped_early": False,
            "exported_round": rounds,
            "rounds": entries,
            "privacy": privacy,
        }
        (folder / "summary.json").write_text(json.dumps(summary))
        history.record("finished", folder=str(folder))
    return folder


def _row(number: int, planned: int, protected: bool) -> dict[str, Any]:
    return {
        "unit": "record" if protected else "none",
        "epsilon": 8.0 * math.sqrt(number / planned) if protected else None,
        "delta": 1e-5,
        "noise_multiplier": 0.67,
        "sample_rate": 0.045,
        "steps": 20 * number,
    }


def _round(
    history: History,
    number: int,
    loss: float,
    sites: tuple[str, ...],
    missing: Mapping[tuple[int, str], str],
    planned: int,
) -> dict[str, Any]:
    draw = random.Random(number)
    history.record("round-started", round=number, attempt=1, sites=list(sites))
    refused = {}
    for site in sites:
        reason = missing.get((number, site))
        if reason == "absent":
            continue
        if reason is not None:
            refused[site] = reason
            history.record("refused", round=number, site=site, reason=reason)
            continue
        numbers = {
            "steps": 20,
            "train-loss": round(0.5 + 2.5 * 0.6**number + draw.uniform(0, 0.2), 3),
            "train-seconds": round(draw.uniform(9, 12), 2),
        }
        history.record("reply", round=number, site=site, numbers=numbers, update_norm=13.5)
    took_part = [site for site in sites if (number, site) not in missing]
    return {
        "round": number,
        "loss": loss,
        "metrics": scores(loss),
        "replies": len(took_part),
        "sites": took_part,
        "refused": refused,
        "attempts": 1,
        "discarded_energy": 0.2 / number,
        "merge": {"method": "svd", "shares": dict.fromkeys(took_part, 1 / len(took_part))},
        "bytes_up": 290_000 * len(took_part),
        "bytes_down": 291_000 * len(sites),
        "seconds": {"train": 11.5, "wait": 2.5 + draw.random(), "merge": 0.1, "evaluate": 1.4},
        "learning_rate": 2e-3 * (1 - (number - 1) / planned),
        "memory_bytes": int(9e8 + 1e6 * number),
    }


def evaluation() -> dict[str, Any]:
    """What `consilium server evaluate` writes, with markup where people may put it."""

    def model(loss: float, good: float) -> dict[str, Any]:
        return {
            "language": scores(loss),
            "generation": {
                "exact_match": 0.2 * good,
                "token_f1": 0.5 * good,
                "rouge_l": 0.45 * good,
                "bleu": 0.2 * good,
                "records": 120,
            },
            "options": {
                "labels": ["yes", "no", "maybe"],
                "accuracy": 0.33 + 0.4 * good,
                "macro_f1": 0.3 + 0.4 * good,
                "confusion": [[41, 9, 2], [11, 33, 4], [6, 7, 7]],
                "records": 120,
            },
            "groups": [
                {"group": site, "records": 60, **scores(loss + 0.1 * index)}
                for index, site in enumerate(SITES)
            ],
        }

    return {
        "run": "0f" * 16,
        "round": 4,
        "adapter": "ab" * 32,
        "base": "cd" * 32,
        "records": 240,
        "models": {"base": model(BASE_LOSS, 0.1), "final": model(0.8, 1.0)},
        "group_column": "site",
        "worst_group": "st-anne",
        "questions": [
            {
                "question": "Which drug is given first? <script>document.title = 'owned'</script>",
                "reference": "Aspirin & oxygen.",
                "base": "The the the the",
                "final": "Aspirin, then <b>oxygen</b>.",
            },
            {
                "question": "What does the echo show?",
                "reference": "A reduced ejection fraction of 35 %.",
                "base": "",
                "final": "A reduced ejection fraction.",
            },
        ],
        "federated": {
            "sites": {
                site: {
                    "records": 100,
                    "tokens": 4000,
                    "loss": 0.9,
                    "token_accuracy": 0.7,
                    "base_loss": 3.5,
                    "base_token_accuracy": 0.3,
                }
                for site in SITES[:2]
            },
            "all": {
                "records": 200,
                "tokens": 8000,
                "loss": 0.9,
                "token_accuracy": 0.7,
                "base_loss": 3.5,
                "base_token_accuracy": 0.3,
            },
            "outside_epsilon": True,
        },
    }


def attack(*, epsilon_lower: float = 1.3, reproduced: int = 0) -> dict[str, Any]:
    """What an audit writes: a test a little better than guessing, and bounds below the ledger."""
    roc = [[x / 200, min(1.0, (x / 200) ** 0.85)] for x in range(201)]
    audits = [
        {
            "name": name,
            "canaries": 2000,
            "guesses": 400,
            "correct": correct,
            "confidence": 0.95,
            "epsilon_lower": low,
            "delta": 1e-5,
            "ledger_epsilon_at_delta": 8.0,
        }
        for name, correct, low in (
            ("gradient canaries, white box", 310, epsilon_lower),
            ("loss canaries, black box", 214, 0.0),
        )
    ]
    membership = [
        {
            "name": name,
            "members": 2000,
            "nonmembers": 2000,
            "confidence": 0.95,
            "auc": [0.54, 0.522, 0.558],
            "tpr_at_1pct_fpr": [0.014, 0.009, 0.021],
            "roc": roc if name == "loss threshold" else [[x, x**0.92] for x, _ in roc],
        }
        for name in ("loss threshold", "min-k%")
    ]
    return {
        "kind": "simulated twin",
        "run": "0f" * 16,
        "site": "north",
        "ledger": {
            "unit": "record",
            "epsilon": 8.0,
            "delta": 1e-5,
            "noise_multiplier": 0.67,
            "sample_rate": 0.045,
            "steps": 80,
        },
        "audits": audits,
        "membership": membership,
        "planted": {
            "prompts": 200,
            "planted": 50,
            "reproduced": reproduced,
            "reproduced_by_base": 0,
            "samples_per_prompt": 1,
        },
        "seed": 0,
        "scope": "an audit of the training pipeline on a twin, not of this release's data",
    }


def write_results(folder: Path) -> Path:
    """Put an evaluation and an audit into a run's folder."""
    (folder / "evaluation.json").write_text(json.dumps(evaluation()))
    (folder / "attack.json").write_text(json.dumps(attack()))
    return folder


def write_large_run(folder: Path) -> Path:
    """200 rounds of 50 sites, some of which are often missing."""
    draw = random.Random(0)
    sites = tuple(f"hospital-{number:02d}" for number in range(1, 51))
    missing = {
        (number, site): draw.choice(["silent", "norm", "absent", "site-policy"])
        for number in range(1, 201)
        for index, site in enumerate(sites)
        if draw.random() < (0.5 if index == 17 else 0.03)
    }
    losses = tuple(
        0.9 + 2.7 * math.exp(-number / 30) + draw.gauss(0, 0.02) for number in range(200)
    )
    return write_run(folder, rounds=200, sites=sites, losses=losses, missing=missing)
