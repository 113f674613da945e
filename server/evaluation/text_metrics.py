"""Generated answers beside the true ones, as torchmetrics and sacrebleu measure them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from server.evaluation.results import TextMetrics

# Of any alphabet: rouge-score knows ASCII alone, and calls everything else no word.
_NO_WORD = re.compile(r"[\W_]+")


def score_answers(answers: Sequence[str], references: Sequence[str]) -> TextMetrics:
    """Return the metrics of answers, each beside its one reference.

    Raises ValueError when there are none, or not as many references.
    """
    # Seconds to import, and most evaluations generate nothing.
    import sacrebleu
    from torchmetrics.functional.text import rouge_score, squad

    if len(answers) != len(references) or not answers:
        raise ValueError(f"{len(answers)} answers and {len(references)} references")
    numbered = list(enumerate(zip(answers, references, strict=True)))
    squad_scores = squad(
        [{"prediction_text": answer, "id": str(i)} for i, (answer, _) in numbered],
        [
            {"answers": {"answer_start": [0], "text": [true]}, "id": str(i)}
            for i, (_, true) in numbered
        ],
    )
    rouge = rouge_score(
        list(answers),
        list(references),
        rouge_keys="rougeL",
        normalizer=lambda text: _NO_WORD.sub(" ", text.lower()),
        tokenizer=str.split,
    )
    # Effective order: an answer of fewer than four words has no 4-gram to be wrong about.
    bleu = sacrebleu.BLEU(effective_order=True).corpus_score(list(answers), [list(references)])
    return TextMetrics(
        exact_match=float(squad_scores["exact_match"]) / 100,
        token_f1=float(squad_scores["f1"]) / 100,
        rouge_l=float(rouge["rougeL_fmeasure"]),
        bleu=min(bleu.score / 100, 1.0),
        records=len(answers),
    )
