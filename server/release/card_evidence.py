"""The parts of a model card that rest on measurements: privacy, attacks, metrics, groups. Pure text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from server.audit_verdict import exceeds_ledger, is_blind
from server.finished_run import FinishedRun
from server.release.card_facts import group_names

_SHOWN = {
    "loss": "loss",
    "perplexity": "perplexity",
    "token_accuracy": "token accuracy",
    "exact_match": "exact match",
    "token_f1": "token F1",
    "rouge_l": "ROUGE-L",
    "bleu": "BLEU",
    "accuracy": "accuracy of the choice",
    "macro_f1": "macro F1 of the choice",
}
_PARTS = {
    "language": ("loss", "perplexity", "token_accuracy"),
    "generation": ("exact_match", "token_f1", "rouge_l", "bleu"),
    "options": ("accuracy", "macro_f1"),
}


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Return a Markdown table; what is in it stays in its cell."""
    return [
        _row(header),
        "|" + "---|" * len(header),
        *(_row(row) for row in rows),
    ]


def is_protected(run: FinishedRun) -> bool:
    """Whether every site that took part was protected by differential privacy."""
    rows = run.summary["privacy"]
    return bool(rows) and all(
        site in rows and rows[site]["epsilon"] is not None
        for site in {*run.summary["sites"], *rows}
    )


def privacy_lines(run: FinishedRun, names: Mapping[str, str]) -> list[str]:
    """Return what each site spent, or in bold that nothing protects its records."""
    rows = run.summary["privacy"]
    without = [names[site] for site in names if rows.get(site, {}).get("epsilon") is None]
    if len(without) == len(names):
        return [
            "**This model was trained without differential privacy.** No bound holds on what it gives away "
            "of a record that it was trained on: whoever may not see the records should not be given it."
        ]
    lines = []
    if without:
        lines += [
            f"**{len(without)} of {len(names)} sites trained without differential privacy**: "
            f"{', '.join(sorted(without))}. No bound holds on what this model gives away of their records.",
            "",
        ]
    accountant = run.config.privacy.accountant
    protected = sorted((names[site], row) for site, row in rows.items() if site in names)
    lines += table(
        ("site", "hides", "epsilon", "delta", "noise", "steps", "accountant"),
        (
            (
                name,
                f"a {row['unit']}",
                f"{row['epsilon']:.3f}",
                f"{row['delta']:g}",
                f"{row['noise_multiplier']:.4g}",
                row["steps"],
                accountant,
            )
            for name, row in protected
            if row["epsilon"] is not None
        ),
    )
    return [
        *lines,
        "",
        "These are the sites' own signed words: nobody else saw their training.",
        "",
        f"DP-SGD: each unit's gradient is clipped to {run.config.privacy.max_grad_norm:g} and Gaussian noise "
        "is added at the site. No single unit of a site changes what anybody can learn from this model by "
        "more than epsilon and delta allow, over all rounds of this run, and for this run alone.",
    ]


def _verdict(audit: Mapping[str, Any]) -> list[str]:
    """What nobody may have to read out of a table's numbers."""
    low, name = audit["epsilon_lower"], audit["name"]
    if exceeds_ledger(low, audit.get("ledger_epsilon_at_delta")):
        said = (
            f"**{name}: the training gave away more than the ledger counts; do not rely on its "
            "epsilon.**"
        )
    elif is_blind(low, audit.get("epsilon_rehearsed")):
        said = (
            f"**{name}: nothing was seen, not even what training as claimed shows; it is no sign of "
            "protection.**"
        )
    else:
        return []
    return ["", said]


def attack_lines(attack: Mapping[str, Any] | None, names: Mapping[str, str]) -> list[str]:
    """Return what was tried against the model's making, or that nothing was."""
    if attack is None:
        return ["No attack was run against this model or its training."]
    ledger, of = attack.get("ledger") or {}, attack.get("site", "")
    spent = ledger.get("epsilon")
    lines = [
        f"On a {attack['kind']} of this training, at {names.get(of, 'one of its sites')}, ledger "
        + (
            f"epsilon {spent:.2f} at delta {ledger['delta']:g}"
            if spent is not None
            else "without protection"
        )
        + f": {attack.get('scope', 'an audit of the training pipeline')}.",
    ]
    audits, membership = attack.get("audits") or [], attack.get("membership") or []
    if audits:
        lines += ["", *table(
            ("audit", "canaries", "guesses, correct", "epsilon at least", "ledger's epsilon there"),
            (
                (
                    one["name"],
                    one["canaries"],
                    f"{one['guesses']}, {one['correct']}",
                    f"{one['epsilon_lower']:.2f} ({one['confidence']:.0%})",
                    _number(one.get("ledger_epsilon_at_delta"), "infinite"),
                )
                for one in audits
            ),
        )]  # fmt: skip
        lines += [sentence for one in audits for sentence in _verdict(one)]
    if membership:
        lines += ["", *table(
            ("membership inference", "members, others", "AUC", "true positives at 1 % false ones"),
            (
                (
                    one["name"],
                    f"{one['members']}, {one['nonmembers']}",
                    _interval(one["auc"]),
                    _interval(one["tpr_at_1pct_fpr"]),
                )
                for one in membership
            ),
        ), "", f"In brackets {membership[0]['confidence']:.0%} confidence intervals; guessing is AUC 0.5 "
            "and 0.01."]  # fmt: skip
    planted = attack.get("planted")
    if planted:
        lines += [
            "",
            f"Of {planted['planted']} planted identifiers it reproduced {planted['reproduced']} on "
            f"{planted['prompts']} prompts, its base {planted['reproduced_by_base']}.",
        ]
    return lines


def metrics_of(
    run: FinishedRun, evaluation: Mapping[str, Any] | None
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the metrics of the untouched base and of the model, by our names; {} where none was measured."""
    # A run without central records writes an evaluation too, of no models.
    models = None if evaluation is None else evaluation["models"]
    if models is None:
        central = run.summary["central"]
        return _numbers(central["base"]), _numbers(central["final"])
    base, final = (
        {
            name: float(value)
            for part, names in _PARTS.items()
            for name, value in ((models[which].get(part) or {}).items())
            if name in names and value is not None
        }
        for which in ("base", "final")
    )
    return base, final


def evaluation_lines(run: FinishedRun, evaluation: Mapping[str, Any] | None) -> list[str]:
    """Return the model's metrics beside the untouched base's, or that there are none."""
    base, final = metrics_of(run, evaluation)
    federated = (evaluation or {}).get("federated") or {}
    all_sites = federated.get("all")
    if not final and not all_sites:
        asked = "no site that was asked counted any" if federated else "no site was asked"
        return [f"**It was not evaluated:** there were no central test records, and {asked}."]
    lines = []
    if final:
        fewer = _on_fewer(evaluation)
        records = f"{evaluation['records']} " if evaluation and evaluation["models"] else ""
        lines += [
            f"On {records}{measured_records(evaluation)}, which the coordinator chose (whether a site "
            "trained on any of them, nobody checked); base in "
            f"{run.config.model.quantization}, as in training:",
            "",
            *table(
                ("metric", "untouched base", "this model"),
                (
                    (
                        shown + fewer.get(name, ""),
                        _number(base.get(name), "-"),
                        _number(final[name], "-"),
                    )
                    for name, shown in _SHOWN.items()
                    if name in final
                ),
            ),
        ]
    if all_sites:
        outside = (
            " These sums are of the sites' own records and outside epsilon."
            if federated.get("outside_epsilon")
            else ""
        )
        lines += [
            "",
            f"At the sites, on {all_sites['records']} records of their own: loss "
            f"{_number(all_sites['loss'], '-')} (untouched base {_number(all_sites['base_loss'], '-')}), "
            f"token accuracy {_number(all_sites['token_accuracy'], '-')} "
            f"({_number(all_sites['base_token_accuracy'], '-')}).{outside}",
        ]
    return lines


def measured_records(evaluation: Mapping[str, Any] | None) -> str:
    """Return what the metrics were measured on; the rounds were always on the run's own records."""
    if evaluation and evaluation["models"] and evaluation.get("other_records"):
        return "test records that were named for this evaluation"
    return "central test records"


def _on_fewer(evaluation: Mapping[str, Any] | None) -> dict[str, str]:
    """Return of how many records each metric is that is not of all of them."""
    models = (evaluation or {}).get("models") or {}
    found: dict[str, str] = {}
    for part, names in _PARTS.items():
        records = ((models.get("final") or {}).get(part) or {}).get("records")
        if evaluation is not None and records is not None and records < evaluation["records"]:
            found |= dict.fromkeys(names, f" (on {records} of them)")
    return found


def group_lines(evaluation: Mapping[str, Any] | None, names: Mapping[str, str]) -> list[str]:
    """Return how each group fares, the worst one named; [] where groups were not told apart."""
    models = (evaluation or {}).get("models") or {}
    groups = (models.get("final") or {}).get("groups") or []
    if evaluation is None or not groups:
        return []
    before = {one["group"]: one for one in (models.get("base") or {}).get("groups") or []}
    worst = evaluation.get("worst_group")
    # In the order of their names, a number would say something of the name.
    groups = sorted(groups, key=lambda one: math.inf if one["loss"] is None else one["loss"])
    shown = group_names([one["group"] for one in groups], names)
    return [
        "## Groups",
        "",
        *table(
            ("group", "records", "loss", "untouched base", "token accuracy"),
            (
                (
                    shown[one["group"]] + (" (worst)" if one["group"] == worst else ""),
                    one["records"],
                    _number(one["loss"], "-"),
                    _number(before.get(one["group"], {}).get("loss"), "-"),
                    _number(one["token_accuracy"], "-"),
                )
                for one in groups
            ),
        ),
    ]


def _numbers(content: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(content[name]) for name in _SHOWN if isinstance(content.get(name), int | float)
    }


def _number(value: float | None, absent: str) -> str:
    return absent if value is None else f"{value:.3f}"


def _interval(values: Sequence[float]) -> str:
    value, low, high = values
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def _row(cells: Sequence[object]) -> str:
    return "| " + " | ".join(_cell(str(cell)) for cell in cells) + " |"


def _cell(text: str) -> str:
    """Text that cannot leave its cell, nor be taken for HTML."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
