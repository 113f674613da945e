"""Generated answers beside the true ones, as torchmetrics and sacrebleu measure them."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable, Sequence

from server.evaluation.results import TextMetrics

# Of any alphabet: rouge-score knows ASCII alone, and calls everything else no word.
_NO_WORD = re.compile(r"[\W_]+")
# That SQuAD's definition takes no notice of (Rajpurkar et al. 1606.05250, section 6.1).
_ARTICLE = re.compile(r"\b(a|an|the)\b")


def score_answers(answers: Sequence[str], references: Sequence[str]) -> TextMetrics:
    """Return the metrics of answers, each beside its one reference.

    Raises ValueError when there are none, or not as many references.
    """
    # Seconds to import, and most evaluations generate nothing.
    import sacrebleu
    from torchmetrics.functional.text import rouge_score, squad

    if len(answers) != len(references) or not answers:
        raise ValueError(f"{len(answers)} answers and {len(references)} references")
    pairs = list(zip(answers, references, strict=True))
    numbered = list(enumerate(_told_apart(pairs, _squad_words)))
    squad_scores = squad(
        [{"prediction_text": answer, "id": str(i)} for i, (answer, _) in numbered],
        [
            {"answers": {"answer_start": [0], "text": [true]}, "id": str(i)}
            for i, (_, true) in numbered
        ],
    )
    worded = _told_apart(pairs, _words)
    rouge = rouge_score(
        [answer for answer, _ in worded],
        [true for _, true in worded],
        rouge_keys="rougeL",
        normalizer=lambda text: " ".join(_words(text)),
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


def _words(text: str) -> list[str]:
    return _NO_WORD.sub(" ", text.lower()).split()


def _squad_words(text: str) -> list[str]:
    """What SQuAD's definition leaves of a text."""
    bare = "".join(sign for sign in text.lower() if sign not in string.punctuation)
    return _ARTICLE.sub(" ", bare).split()


def _told_apart(
    pairs: Iterable[tuple[str, str]], words_of: Callable[[str], list[str]]
) -> list[tuple[str, str]]:
    """Return pairs of answer and reference, with words for references that a definition leaves none of.

    "A" of a multiple choice is an article and "+" a sign: whatever is nothing too would be right. There the
    text itself decides, but for case and the spaces around it.
    """
    return [
        (answer, true)
        if words_of(true)
        else ("same" if answer.strip().lower() == true.strip().lower() else "other", "same")
        for answer, true in pairs
    ]
