"""The model card of a release, in Hugging Face's form, made from what a run left behind.

It says what is known and, in as many words, what is not: no evaluation, no attack, no protection.
"""

from __future__ import annotations

import math

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from server.release.card_evidence import (
    attack_lines,
    evaluation_lines,
    group_lines,
    is_protected,
    measured_records,
    metrics_of,
    privacy_lines,
)
from server.release.card_facts import CardFacts
from server.release.card_text import (
    digest_lines,
    export_lines,
    introduction,
    limit_lines,
    training_lines,
    use_lines,
)

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


def make_card(facts: CardFacts) -> str:
    """Return README.md: metadata for the hub, then what a person wants to know."""
    text = "\n\n".join(
        "\n".join(lines)
        for lines in (
            introduction(facts),
            use_lines(facts),
            training_lines(facts),
            ["## Privacy", "", *privacy_lines(facts.run, facts.names)],
            ["## Attacks", "", *attack_lines(facts.evidence.attack, facts.names)],
            ["## Evaluation", "", *evaluation_lines(facts.run, facts.evidence.evaluation)],
            group_lines(facts.evidence.evaluation, facts.names),
            export_lines(facts.export),
            limit_lines(facts),
            digest_lines(facts),
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
    quantization = facts.run.config.model.quantization
    # Measured as the rounds measured, which a merged release in full precision does not repeat to the digit.
    measured = "" if quantization == "none" else f", base in {quantization}"
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Text generation",
            dataset_type="private",
            dataset_name=f"the coordinator's {measured_records(facts.evidence.evaluation)}",
            metric_type=_METRIC_TYPES[name],
            metric_name=name.replace("_", " ") + measured,
            metric_value=round(value, 6),
        )
        for name, value in final.items()
        if name in _METRIC_TYPES and math.isfinite(value)
    ]
