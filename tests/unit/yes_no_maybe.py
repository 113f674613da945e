"""A task of our own like PubMedQA (Jin et al. 1909.06146): a question, a finding, yes, no or maybe."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import tomli_w

from common.config import Scalar

LABELS = ("yes", "no", "maybe")
_DRUGS = ("cardolol", "tamoxil", "paracet", "furolix", "renalin", "dermalex")
_SIGNS = ("cough", "fever", "rash", "swelling", "headache", "tremor", "fatigue", "nausea")
# What a finding says, and so the answer; the drug and the sign say nothing.
_FINDINGS = {
    "yes": ("Most patients were better.", "It helped in nearly all."),
    "no": ("No patient was better.", "It helped in none."),
    "maybe": ("Some patients were better, some were worse.", "The numbers were too small."),
}


def rows() -> list[dict[str, str]]:
    """Every drug, sign and finding once: 288 records, of which the last sign is the test set."""
    return [
        {
            "instruction": f"Does {drug} help against {sign}?",
            "input": finding,
            "output": label,
            "split": "test" if sign == _SIGNS[-1] else "train",
        }
        for sign, drug, label in product(_SIGNS, _DRUGS, LABELS)
        for finding in _FINDINGS[label]
    ]


def write_task(folder: Path, settings: dict[str, Scalar]) -> Path:
    """Write run.toml, central.jsonl and two sites; return the folder."""
    train = [row for row in rows() if row["split"] == "train"]
    for number, part in enumerate((train[::2], train[1::2])):
        home = folder / "sites" / f"site-{number}"
        home.mkdir(parents=True)
        _write(home / "records.jsonl", part)
        tree = {"site": {"name": home.name}, "data": {"name": home.name, "path": "records.jsonl"}}
        (home / "site.toml").write_text(tomli_w.dumps(tree))
    _write(folder / "central.jsonl", [row for row in rows() if row["split"] == "test"])
    tree_of_settings: dict[str, dict[str, Scalar]] = {}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        tree_of_settings.setdefault(section, {})[name] = value
    (folder / "run.toml").write_text(tomli_w.dumps(tree_of_settings))
    return folder


def _write(path: Path, content: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
