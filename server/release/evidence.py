"""What was found out about a run's model after the run: evaluation.json and attack.json in its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import CheckpointError
from server.finished_run import FinishedRun

EVALUATION_FILE, ATTACK_FILE = "evaluation.json", "attack.json"


@dataclass(frozen=True, slots=True)
class Evidence:
    """Each is None where nobody has looked."""

    evaluation: Mapping[str, Any] | None
    attack: Mapping[str, Any] | None


def load_evidence(run: FinishedRun) -> Evidence:
    """Return what is known of a run's model.

    Raises CheckpointError when a file is damaged, an evaluation is of another adapter, or an attack is on
    another run.
    """
    evaluation = _read(run.folder.path / EVALUATION_FILE)
    if evaluation is not None:
        found = evaluation.get("adapter")
        # With its scaling apart or within B it is the same adapter.
        if found not in (run.adapter_digest, run.adapter.digest()):
            raise CheckpointError(
                f"{run.folder.path / EVALUATION_FILE} is of adapter {str(found)[:16]}..., and this run's is "
                f"{run.adapter_digest[:16]}...; evaluate the run again, or move that file away"
            )
    attack = _read(run.folder.path / ATTACK_FILE)
    if attack is not None and attack.get("run") != run.folder.run_uid:
        raise CheckpointError(
            f"{run.folder.path / ATTACK_FILE} is of run {str(attack.get('run'))[:16]!r}, and this one is "
            f"{run.folder.run_uid[:16]!r}; make it anew with `consilium server audit`, or move that file away"
        )
    return Evidence(evaluation, attack)


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged; write it again, or move it away")
    return content
