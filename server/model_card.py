"""The model card of a release, in Hugging Face's form, made from what a run left behind.

It says what is known and, in as many words, what is not: no evaluation, no attack, no protection.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from common.prompts import resolve_template
from server.base_license import UNKNOWN, BaseLicense
from server.card_evidence import (
    attack_lines,
    evaluation_lines,
    group_lines,
    is_protected,
    metrics_of,
    privacy_lines,
    table,
)
from server.evidence import Evidence
from server.finished_run import FinishedRun
from server.release_signature import SIGNATURE
from server.sbom import SBOM_FILE

CARD_FILE = "README.md"
# Our name of a metric -> the hub's.
_METRIC_TYPES = {
    "perplexity": "perplexity",
    "token_accuracy": "accuracy",
    "exact_match": "exact_match",
    "token_f1": "f1",
    "rouge_l": "rouge",
    "bleu": "bleu",
    "macro_f1": "f1",
    "accuracy": "accuracy",
}


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What a card is made from. export: what export.json says. names: how each site is called in the card."""

    title: str
    run: FinishedRun
    evidence: Evidence
    export: Mapping[str, Any]
    license: BaseLicense
    names: Mapping[str, str]


def site_names(run: FinishedRun, *, named: bool) -> dict[str, str]:
    """Return how each site is called: by its name, or by a number that its name does not give away."""
    rows = run.summary["privacy"]
    sites = sorted({*run.summary["sites"], *rows})
    if named:
        return {site: site for site in sites}
    # By what they spent: in the order of their names, a number would say something of the name.
    order = sorted(sites, key=lambda site: (_spent(rows.get(site)), site))
    return {site: f"site {number}" for number, site in enumerate(order, start=1)}


def make_card(facts: CardFacts) -> str:
    """Return README.md: metadata for the hub, then what a person wants to know."""
    text = "\n\n".join(
        "\n".join(lines)
        for lines in (
            _introduction(facts),
            _use(facts),
            _training(facts),
            ["## Privacy", "", *privacy_lines(facts.run, facts.names)],
            ["## Attacks", "", *attack_lines(facts.evidence.attack, facts.names)],
            ["## Evaluation", "", *evaluation_lines(facts.run, facts.evidence.evaluation)],
            group_lines(facts.evidence.evaluation, facts.names),
            _measured_export(facts.export),
            _limits(facts),
            _files(facts),
        )
        if lines
    )
    card = ModelCard(f"---\n{card_data(facts).to_yaml()}\n---\n\n{text}\n")
    return str(card.content)


def card_data(facts: CardFacts) -> ModelCardData:
    """Return the metadata block."""
    run, license = facts.run, facts.license
    protected = is_protected(run)
    private = ["differential-privacy"] if protected else []
    results = _eval_results(facts)
    own_terms = license.license == "other"
    return ModelCardData(
        model_name=facts.title,
        base_model=run.base_name,
        license=license.license,
        license_name=license.name or None if own_terms else None,
        license_link=license.name or None if own_terms else None,
        library_name="transformers" if facts.export["format"] == "merged" else "peft",
        pipeline_tag="text-generation",
        tags=["consilium", "federated-learning", "lora", *private],
        metrics=sorted({result.metric_type for result in results}) or None,
        eval_results=results or None,
    )


def _eval_results(facts: CardFacts) -> list[EvalResult]:
    _, final = metrics_of(facts.run, facts.evidence.evaluation)
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Text generation",
            dataset_type="private",
            dataset_name="the coordinator's central test records",
            metric_type=_METRIC_TYPES[name],
            metric_name=name.replace("_", " "),
            metric_value=round(value, 6),
        )
        for name, value in final.items()
        if name in _METRIC_TYPES and math.isfinite(value)
    ]


def _introduction(facts: CardFacts) -> list[str]:
    run = facts.run
    protected = (
        "under differential privacy" if is_protected(run) else "**without differential privacy**"
    )
    form = (
        f"the base model `{run.base_name}` with the adapter merged in, in {facts.export['dtype']}"
        if facts.export["format"] == "merged"
        else f"a LoRA adapter for the base model `{run.base_name}`"
    )
    return [
        f"# {facts.title}",
        "",
        f"{len(run.summary['sites'])} hospitals trained this language model together in "
        f"{len(run.summary['rounds'])} rounds, {protected}, with Consilium: each on its own premises and its "
        f"own records, of which none left it. It is {form}.",
    ]


def _use(facts: CardFacts) -> list[str]:
    run = facts.run
    merged = facts.export["format"] == "merged"
    load = (
        ["model = AutoModelForCausalLM.from_pretrained(DIR)"]
        if merged
        else [
            "from peft import PeftModel",
            "",
            "model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), DIR)",
        ]
    )
    template = resolve_template(run.config.data.prompt_template)
    return [
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({'DIR' if merged else 'BASE'})",
        *load,
        "```",
        "",
        "It was trained on prompts of this form, which the answer follows:",
        "",
        _fenced(template),
        "",
        "**Intended use:** research on language models for text like that of the hospitals that trained it, "
        "and drafts that a qualified person reads and answers for.",
        "",
        "**Out of scope:** diagnosis, triage, treatment or any other decision about a patient without such a "
        "person; a medical device; finding out whether or with what a person was among the records; use "
        "beyond the licence of the base model.",
    ]


def _training(facts: CardFacts) -> list[str]:
    run, config = facts.run, facts.run.config
    section, lora, train = config.model, config.lora, config.train
    source = f", {facts.license.source}" if facts.license.source else ""
    said = (
        f"{UNKNOWN}: neither its folder nor whoever made this release says it; find it out before you use "
        "or pass on this model"
        if facts.license.license == UNKNOWN
        else f"{facts.license.shown}{source}"
    )
    named = sorted(facts.names[site] for site in run.summary["sites"])
    shown = f": {', '.join(named)}" if set(named) == set(run.summary["sites"]) else ", not named"
    rows = [
        ("base model", f"`{run.base_name}`"),
        ("its licence", said),
        ("sites", f"{len(named)}{shown}"),
        (
            "rounds",
            f"{len(run.summary['rounds'])}, of which round {run.exported_round} is released",
        ),
        ("merged by", f"`{config.aggregation.method}`, weights {config.aggregation.weighting}"),
        (
            "adapter",
            f"LoRA, rank {lora.rank}, alpha {lora.alpha:g}, {lora.target_modules}; released at rank "
            f"{run.adapter.rank}",
        ),
        ("base in training", f"{section.quantization}, computed in {section.compute_dtype}"),
        (
            "a site's round",
            f"{train.local_steps} steps of {train.batch_size}, learning rate {train.learning_rate:g}, "
            f"{train.optimizer}, {train.schedule}",
        ),
        ("tokens of a record", f"at most {config.data.max_length}"),
    ]
    return [
        "## Training",
        "",
        *table(("", ""), rows),
        "",
        "`run.toml` beside this card holds every setting that the sites were sent.",
    ]


def _measured_export(export: Mapping[str, Any]) -> list[str]:
    rows = [
        ("these files, loaded by plain transformers", export["dtype"], f"{export['loss']:.6f}"),
        ("the adapter on the base", export["dtype"], f"{export['adapter_loss']:.6f}"),
        (
            "the adapter on the base as it was trained",
            export["quantization"],
            f"{export['run_loss']:.6f}",
        ),
    ]
    return [
        "## The same model",
        "",
        f"Loss on {export['records']} {export['measured_on']}, before this was signed; the first two may "
        f"differ by {export['tolerance']:g}:",
        "",
        *table(("what", "precision", "loss"), rows),
    ]


def _limits(facts: CardFacts) -> list[str]:
    run = facts.run
    lines = [
        "It can be wrong, and sound right. Nobody has tested it on patients.",
        "It knows what its sites' records say, with their habits and gaps; it may serve people badly who are "
        "rare in them.",
    ]
    if facts.evidence.evaluation is None:
        lines.append("How it does for each site or group was not measured.")
    if facts.export["measured_on"] == "fixed texts":
        lines.append(
            "There was no central test set: the fixed texts above show that the files are the model, not "
            "that it is good."
        )
    if is_protected(run):
        lines.append(
            "Epsilon bounds what this run gives away of one record or patient at one site. A patient at two "
            "sites, and other runs on the same records, add up."
        )
    lines.append(
        "A name that stands in many records is no secret of one of them; protection does not hide it."
    )
    return ["## Limits", "", *(f"- {line}" for line in lines)]


def _files(facts: CardFacts) -> list[str]:
    run, export = facts.run, facts.export
    digests = [
        ("run", f"`{run.folder.run_uid}`, round {run.exported_round}"),
        ("base model (`consilium model digest`)", f"`{run.base_digest}`"),
        ("adapter, as the rounds had it", f"`{run.adapter_digest}`"),
        *((f"`{name}`", f"`{digest}`") for name, digest in export["files"].items() if digest),
    ]
    return [
        "## Digests",
        "",
        *table(("what", "SHA-256"), digests),
        "",
        f"`{SBOM_FILE}` lists the software that made it. `{SIGNATURE}` signs every file here in the OpenSSF "
        "model-signing form; with the coordinator's `release.pub`, which you should have by another way,",
        "",
        "    consilium server verify DIR --key release.pub",
        "",
        "finds any change, and so does `model_signing verify key DIR --no-ignore-git-paths --signature "
        f"DIR/{SIGNATURE} --public_key release.pub`, which needs nothing of ours.",
    ]


def _fenced(text: str) -> str:
    """A text as it stands, in a fence that it cannot end."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _spent(row: Mapping[str, Any] | None) -> Sequence[float]:
    if row is None:
        return (math.inf,)
    epsilon = math.inf if row["epsilon"] is None else row["epsilon"]
    return (epsilon, row["delta"], row["steps"])
