"""A federation learns to choose among yes, no and maybe, and the evaluation sees it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.unit.scenarios import run
from tests.unit.yes_no_maybe import LABELS, write_task


def test_a_federation_learns_the_task_and_the_base_does_not_know_it(tmp_path: Path) -> None:
    task = write_task(
        tmp_path / "task",
        {
            "model.name": "embedded",
            "model.quantization": "none",
            "data.max-length": 96,
            "train.rounds": 2,
            "train.local-steps": 20,
            "train.batch-size": 16,
            "train.learning-rate": 5e-3,
            "privacy.unit": "none",
            "evaluation.central-data": "central.jsonl",
            "evaluation.metrics": "options",
            "evaluation.labels": ",".join(LABELS),
            "evaluation.every": 2,
            "evaluation.num-questions": 0,
        },
    )
    run(task, tmp_path / "run")
    models = json.loads((tmp_path / "run" / "evaluation.json").read_text())["models"]
    base, final = models["base"]["options"], models["final"]["options"]
    # 12 of each label: who always says the same is right in a third, at macro-F1 1/6.
    assert base["accuracy"] < 0.5
    assert final["accuracy"] > 0.9
    assert final["macro_f1"] > 0.9
    assert [sum(row) for row in final["confusion"]] == [12, 12, 12]
