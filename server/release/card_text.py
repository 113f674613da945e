"""The parts of a model card that a person reads before any number: what it is, how to use it, its limits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from common.prompts import resolve_template
from server.release.base_license import UNKNOWN
from server.release.card_evidence import group_lines, is_protected, table
from server.release.card_facts import CardFacts
from server.release.sbom import SBOM_FILE
from server.release.signature import SIGNATURE


def introduction(facts: CardFacts) -> list[str]:
    """Return the title and what this model is."""
    run = facts.run
    protected = (
        "under differential privacy" if is_protected(run) else "**without differential privacy**"
    )
    form = (
        f"the base model `{run.base_name}` with the adapter merged in, in {facts.export['dtype']}"
        if facts.export["format"] == "merged"
        else f"a LoRA adapter for the base model `{run.base_name}`"
    )
    sites, rounds = len(run.summary["sites"]), len(run.summary["rounds"])
    trained = (
        f"**This comes of a simulation:** one machine, which held all records, imitated {sites} hospitals "
        f"that train this language model together in {rounds} rounds, {protected}, with Consilium."
        if run.simulated
        else f"{sites} hospitals trained this language model together in {rounds} rounds, {protected}, with "
        "Consilium: each on its own premises and its own records, of which none left it."
    )
    return [f"# {facts.title}", "", f"{trained} It is {form}."]


def use_lines(facts: CardFacts) -> list[str]:
    """Return how to load it, what it is for, and what it is not for."""
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


def _computed_in(dtype: str) -> str:
    # "auto" tells a reader of the card nothing.
    return dtype if dtype != "auto" else "bfloat16 on CUDA, float32 on a CPU"


def training_lines(facts: CardFacts) -> list[str]:
    """Return what it was trained from, and how."""
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
        (
            "base in training",
            f"{section.quantization}, computed in {_computed_in(section.compute_dtype)}",
        ),
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


def export_lines(export: Mapping[str, Any]) -> list[str]:
    """Return what its files were measured to be, before they were signed."""
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


def limit_lines(facts: CardFacts) -> list[str]:
    """Return what is known to be wrong with it, or not known."""
    run = facts.run
    lines = [
        "It can be wrong, and sound right. Nobody has tested it on patients.",
        "It knows what its sites' records say, with their habits and gaps; it may serve people badly who are "
        "rare in them.",
    ]
    if not group_lines(facts.evidence.evaluation, facts.names):
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


def digest_lines(facts: CardFacts) -> list[str]:
    """Return the digests of what it is made of, and how to check them."""
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
