"""attack.json: how leaky a run's training is, as a file and as people read it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from common.files import write_atomically
from server.audit_verdict import exceeds_ledger, is_blind

ATTACK_FILE = "attack.json"


def write_attack(folder: Path, content: Mapping[str, Any]) -> Path:
    """Write attack.json into a folder, which is made if need be, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ATTACK_FILE
    write_atomically(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())
    return path


def say_attack(content: Mapping[str, Any], console: Console) -> None:
    """Print an attack.json for people."""
    for table in attack_tables(content):
        console.print(table)
    for sentence in attack_sentences(content):
        console.print(sentence, soft_wrap=True, markup=False, highlight=False)


def attack_tables(content: Mapping[str, Any]) -> list[Table]:
    """Return the audits and the membership attacks of an attack.json as tables of 100 columns at most."""
    return [_audit_table(content["audits"]), _membership_table(content["membership"])]


def attack_sentences(content: Mapping[str, Any]) -> list[str]:
    """Return what else attack.json says, its limits last."""
    sentences = [_ledger_sentence(content)]
    planted = content["planted"]
    if planted is not None:
        sentences.append(
            f"Planted identifiers: of {planted['planted']} made-up people, the numbers of "
            f"{planted['reproduced']} were said in {planted['samples_per_prompt']} answers to each of "
            f"{planted['prompts']} prompts (by the untouched base: {planted['reproduced_by_base']})"
        )
    sentences += [
        f"{audit['name']}: the training gave away more than its ledger counts (epsilon above "
        f"{audit['epsilon_lower']:.2f} where it counts {audit['ledger_epsilon_at_delta']:.2f})"
        for audit in content["audits"]
        if _exceeds(audit)
    ]
    sentences += [
        f"{audit['name']}: nothing was seen, and training as it is claimed shows about "
        f"{audit['epsilon_rehearsed']:.2f}: the canaries may not have reached it, so find out before you "
        "trust this audit"
        for audit in content["audits"]
        if _saw_nothing(audit)
    ]
    sentences.append(
        f"This is {content['scope']}. A lower bound near 0 shows that these attacks failed, not that "
        "every attack would."
    )
    return sentences


def _exceeds(audit: Mapping[str, Any]) -> bool:
    return exceeds_ledger(audit["epsilon_lower"], audit["ledger_epsilon_at_delta"])


def _saw_nothing(audit: Mapping[str, Any]) -> bool:
    return is_blind(audit["epsilon_lower"], audit.get("epsilon_rehearsed"))


def _ledger_sentence(content: Mapping[str, Any]) -> str:
    ledger = content["ledger"]
    who = (
        f"{content['kind']} of site {content['site']}, run {content['run']}, seed {content['seed']}"
    )
    if ledger["epsilon"] is None:
        return f"{who}: trained without differential privacy, {ledger['steps']} steps"
    return (
        f"{who}: epsilon {ledger['epsilon']:.2f} at delta {ledger['delta']:g} for each {ledger['unit']} "
        f"(sigma {ledger['noise_multiplier']:.4g}, q {ledger['sample_rate']:.4g}, {ledger['steps']} steps)"
    )


def _audit_table(audits: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="Epsilon, bounded from below", header_style="bold")
    table.add_column("audit")
    columns = ("canaries", "guesses", "correct", "epsilon at least", "as claimed", "ledger")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for audit in audits:
        claimed = audit["ledger_epsilon_at_delta"]
        table.add_row(
            audit["name"],
            f"{audit['canaries']:,}",
            f"{audit['guesses']:,}",
            f"{audit['correct']:,}",
            f"{audit['epsilon_lower']:.2f} ({audit['confidence']:.0%})",
            "-" if (shown := audit.get("epsilon_rehearsed")) is None else f"{shown:.2f}",
            "none" if claimed is None else f"{claimed:.2f}",
            style="bold red" if _exceeds(audit) or _saw_nothing(audit) else None,
        )
    return table


def _membership_table(attacks: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(
        title="Was this record trained on? By chance: AUC 0.5, found 1 %", header_style="bold"
    )
    table.add_column("attack")
    for name in ("members", "others", "AUC", "found at 1 % false"):
        table.add_column(name, justify="right")
    for attack in attacks:
        auc, rate = attack["auc"], attack["tpr_at_1pct_fpr"]
        table.add_row(
            attack["name"],
            f"{attack['members']:,}",
            f"{attack['nonmembers']:,}",
            f"{auc[0]:.3f} ({auc[1]:.3f} to {auc[2]:.3f})",
            f"{rate[0]:.1%} ({rate[1]:.1%} to {rate[2]:.1%})",
        )
    return table
