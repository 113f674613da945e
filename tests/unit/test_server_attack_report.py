"""attack.json as people read it: within 100 columns, what exceeds the ledger in plain sight, limits last."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from server.attack_report import attack_sentences, say_attack, write_attack


def _content(*, epsilon: float | None = 8.0, lower: float = 1.25) -> dict[str, Any]:
    audit = {
        "name": "gradient canaries, white box", "canaries": 40000, "guesses": 400, "correct": 310,
        "confidence": 0.95, "epsilon_lower": lower, "delta": 1e-5, "ledger_epsilon_at_delta": epsilon,
    }  # fmt: skip
    membership = {
        "name": "loss less base", "members": 2145, "nonmembers": 2195, "confidence": 0.95,
        "auc": [0.522, 0.505, 0.54], "tpr_at_1pct_fpr": [0.008, 0.005, 0.013],
        "roc": [[0.0, 0.0], [1.0, 1.0]],
    }  # fmt: skip
    ledger = {
        "unit": "record", "epsilon": epsilon, "delta": 1e-5, "noise_multiplier": 0.55,
        "sample_rate": 0.03, "steps": 30,
    }  # fmt: skip
    planted = {
        "prompts": 200, "planted": 50, "reproduced": 3, "reproduced_by_base": 0,
        "samples_per_prompt": 4,
    }  # fmt: skip
    return {
        "kind": "simulation", "run": "study", "site": "GHR", "ledger": ledger, "audits": [audit],
        "membership": [membership], "planted": planted, "seed": 7,
        "scope": "an audit of the training pipeline on a twin, not of this release's data",
    }  # fmt: skip


def _said(content: dict[str, Any]) -> str:
    out = io.StringIO()
    say_attack(content, Console(file=out, width=100))
    return out.getvalue()


def test_tables_fit_100_columns_and_say_each_number() -> None:
    said = _said(_content())
    table = [line for line in said.splitlines() if line[:1] in "┃│"]
    assert max(map(len, table)) <= 100
    for number in ("40,000", "310", "1.25 (95%)", "8.00", "2,145", "0.522 (0.505 to 0.540)"):
        assert number in said
    assert "0.8% (0.5% to 1.3%)" in said
    assert "…" not in said


def test_an_audit_that_saw_nothing_where_it_would_have_is_not_believed() -> None:
    """As when the canaries never reached the training: a bound of 0, and no protection shown by it."""
    content = _content(lower=0.0)
    content["audits"][0]["epsilon_rehearsed"] = 1.5
    words = "the canaries may not have reached it"
    assert words in " ".join(_said(content).split())
    for rehearsed, lower in ((1.5, 0.4), (0.1, 0.0), (None, 0.0)):
        content = _content(lower=lower)
        content["audits"][0]["epsilon_rehearsed"] = rehearsed
        assert words not in " ".join(_said(content).split())


def test_limits_are_said_last() -> None:
    ledger, planted, limits = attack_sentences(_content())
    assert ledger.startswith(
        "simulation of site GHR, run study, seed 7: epsilon 8.00 at delta 1e-05"
    )
    assert "of 50 made-up people, the numbers of 3 were said" in planted
    assert "not of this release's data" in limits


def test_more_than_the_ledger_counts_is_said() -> None:
    assert not any("gave away more" in text for text in attack_sentences(_content()))
    over = _content(lower=8.5)
    assert any(
        "gave away more than its ledger counts (epsilon above 8.50 where it counts 8.00)" in text
        for text in attack_sentences(over)
    )


def test_without_protection_there_is_no_ledger_to_exceed() -> None:
    plain = _content(epsilon=None, lower=5.6)
    assert "trained without differential privacy, 30 steps" in attack_sentences(plain)[0]
    plain["planted"] = None
    assert len(attack_sentences(plain)) == 2


def test_the_file_refuses_what_is_no_number(tmp_path: Path) -> None:
    path = write_attack(tmp_path / "new", _content())
    assert json.loads(path.read_text()) == _content()
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_attack(tmp_path, _content(lower=float("nan")))
