"""The same ServerApp and ClientApp on a real SuperLink with TLS and authenticated SuperNodes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from peft import PeftModel

from client.app import SITES_VARIABLE
from client.ledger import Ledger
from common.config import RunConfig
from common.model import choose_device, load_base, release_base
from server.app_bundle import app_folder
from server.evaluation import evaluate_model, load_central_examples
from server.launch import LAUNCH_VARIABLE
from server.run_folder import RunFolder
from tests.integration.deployment import Deployment
from tests.integration.sites import Lab, make_lab

pytestmark = pytest.mark.integration


def test_two_rounds_on_two_hospitals_and_the_export_gives_the_runs_loss(tmp_path: Path) -> None:
    lab = make_lab(
        tmp_path,
        {"privacy.unit": "record", "privacy.accountant": "rdp", "train.optimizer": "adamw"},
    )
    assert SITES_VARIABLE not in lab.launch("a" * 32)
    environment = {LAUNCH_VARIABLE: str(lab.launch_dir), "OMP_NUM_THREADS": "1"}
    app_dir = app_folder(tmp_path)
    with Deployment(tmp_path / "flower", app_dir, server_environment=environment) as deployment:
        for site in lab.roster:
            deployment.add_node(
                site,
                node_config={"site-dir": str(lab.sites / site)},
                environment={"OMP_NUM_THREADS": "1"},
            )
        run_id = deployment.submit(lab.launch("a" * 32))
        status = deployment.wait(run_id, timeout_s=400)
        assert status == "finished:completed", deployment.tails()

    summary = json.loads((lab.run_dir / "summary.json").read_text())
    assert summary["run"] == "a" * 32
    assert [entry["replies"] for entry in summary["rounds"]] == [2, 2]
    assert summary["central"]["final"]["loss"] != summary["central"]["base"]["loss"]
    _check_privacy(lab, summary)
    assert abs(_loss_of_export(lab) - summary["central"]["final"]["loss"]) < 1e-4


def _check_privacy(lab: Lab, summary: dict[str, object]) -> None:
    privacy = summary["privacy"]
    assert isinstance(privacy, dict)
    for site, entry in lab.roster.items():
        row = privacy[site]
        assert 0 < row["epsilon"] <= 8.0
        assert row["steps"] == 4
        assert row["sample_rate"] == min(1.0, 4 / entry.declared_size)
        rows = Ledger(lab.sites / site / "state" / "ledger.sqlite").rows(site)
        assert [r.state for r in rows] == ["released", "released"]
        assert all(math.isclose(r.steps.noise_multiplier, row["noise_multiplier"]) for r in rows)


def _loss_of_export(lab: Lab) -> float:
    """The exported folder, loaded by plain PEFT on the same quantised base."""
    release_base()
    folder = RunFolder(lab.run_dir, "")
    config = RunConfig.parse({**lab.config.flat()})
    base = load_base(lab.model_path, config.model, device=choose_device("cpu"))
    model = PeftModel.from_pretrained(base.model, str(folder.adapter))
    examples = load_central_examples([lab.folder / "central.jsonl"], config, base=base)
    assert examples is not None
    loss = evaluate_model(model, base, examples, batch_size=8).loss
    release_base()
    return loss
