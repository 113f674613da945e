"""Text metrics equal their references', and a perfect and an empty answer are 1 and 0."""

from __future__ import annotations

import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from server.evaluation.results import TextMetrics
from server.evaluation.text_metrics import score_answers

WORDS = st.sampled_from(["the", "a", "cough", "fever", "Fever", "rest,", "2 mg", "daily."])
TEXTS = st.lists(WORDS, min_size=1, max_size=9).map(" ".join)


def test_a_perfect_answer_is_one_and_an_empty_one_is_zero() -> None:
    # Short ones too: an answer of one word has no 4-gram.
    for texts in (
        ["yes", "no", "maybe"],
        ["Fièvre élevée à traiter", "咳嗽"],
        ["Rest and drink a lot of warm tea."],
        # An article and a sign are nothing to SQuAD's definition, and signs to ROUGE's.
        ["A", "B", "C"],
        ["+", "-"],
    ):
        count = len(texts)
        assert score_answers(texts, texts) == pytest.approx(TextMetrics(1, 1, 1, 1, count))
        assert score_answers([""] * count, texts) == TextMetrics(0, 0, 0, 0, count)


def test_an_option_that_is_an_article_is_right_by_its_letter_alone() -> None:
    found = score_answers(["a ", "The", "B", ""], ["A", "A", "A", "A"])
    assert (found.exact_match, found.token_f1) == (0.25, 0.25)
    assert score_answers([" +", "-", "++"], ["+", "+", "+"]).rouge_l == pytest.approx(1 / 3)


def test_squads_definition_by_hand() -> None:
    # Articles, case and full stops do not count: two of three answer words are among the reference's
    # four, F1 = 2 (2/3 1/2) / (2/3 + 1/2) = 4/7; the other is an exact match.
    found = score_answers(["Rest, the tea now", "A fever."], ["rest and warm tea", "fever"])
    assert found.exact_match == pytest.approx(0.5)
    assert found.token_f1 == pytest.approx((4 / 7 + 1) / 2)


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5))
def test_rouge_and_bleu_are_those_of_their_reference_programs(pairs: list[tuple[str, str]]) -> None:
    answers, references = [a for a, _ in pairs], [r for _, r in pairs]
    found = score_answers(answers, references)

    scorer = RougeScorer(["rougeL"])
    rouge = [scorer.score(r, a)["rougeL"].fmeasure for a, r in pairs]
    assert found.rouge_l == pytest.approx(sum(rouge) / len(rouge), abs=1e-5)
    bleu = sacrebleu.BLEU(effective_order=True).corpus_score(answers, [references]).score
    assert found.bleu == pytest.approx(bleu / 100)
    assert 0 <= found.exact_match <= found.token_f1 <= 1


def test_bleu_of_papineni_s_kind_by_hand() -> None:
    # Precisions 5/6, 3/5, 1/4 and, smoothed, 1/2 of 1/3; no brevity penalty.
    found = score_answers(["the cat sat on a mat"], ["the cat is on a mat"])
    product = (5 / 6) * (3 / 5) * (1 / 4) * (1 / 6)
    assert found.bleu == pytest.approx(product**0.25)


def test_every_answer_needs_its_reference() -> None:
    with pytest.raises(ValueError, match="1 answers and 2 references"):
        score_answers(["x"], ["x", "y"])
    with pytest.raises(ValueError, match="0 answers and 0 references"):
        score_answers([], [])
