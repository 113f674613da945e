"""From record to tokens: templates, truncation, the mask of answer tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from common.errors import ConfigError, DataError
from common.prompts import (
    IGNORE,
    TEMPLATES,
    Example,
    Examples,
    Prompt,
    collate,
    resolve_template,
    tokenize,
    tokenize_all,
)

BOS, EOS = 1, 2
CPU = torch.device("cpu")


class Letters:
    """A tokenizer whose ids are code points: what comes out can be read."""

    def __init__(self, *, bos: int | None = BOS, eos: int | None = EOS) -> None:
        self.bos_token_id, self.eos_token_id = bos, eos

    def __call__(self, text: str, *, add_special_tokens: bool) -> Any:
        assert not add_special_tokens
        return type("Encoding", (), {"input_ids": [ord(letter) for letter in text]})


def _tokens(question: str, answer: str, *, max_length: int = 100, **special: Any) -> Example:
    return tokenize(
        Prompt(question, "", answer),
        tokenizer=Letters(**special),
        template="{instruction}",
        max_length=max_length,
    )


def _text(example: Example) -> str:
    names = {BOS: "<", EOS: ">"}
    return "".join(names.get(token, chr(token)) for token in example.token_ids)


# Templates


@pytest.mark.parametrize("name", TEMPLATES)
def test_named_templates_hold_the_question(name: str) -> None:
    text = resolve_template(name)

    assert "WHY" in text.format(instruction="WHY", input="")


def test_text_with_fields_is_its_own_template() -> None:
    assert resolve_template("{instruction} {input}?") == "{instruction} {input}?"
    assert resolve_template("{{literal}} {instruction}").format(instruction="x", input="") == (
        "{literal} x"
    )


@pytest.mark.parametrize(
    "text",
    [
        "instructions",
        "",
        "{input}",
        "{instruction} {output}",
        "{instruction} {}",
        "{instruction} {0}",
        "{instruction",
        "{instruction.__class__}",
        "{instruction[0]}",
        "{instruction!r}",
        "{instruction:d}",
        "{instruction:>1000000000}",
        "{instruction:{input}}",
    ],
)
def test_template_that_is_no_usable_text_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"data.prompt-template = .* is none of \['instruction'"):
        resolve_template(text)


# Tokens


def test_record_is_bos_prompt_answer_eos() -> None:
    example = _tokens("why?", "so")

    assert _text(example) == "<why?so>"
    assert example.num_answer == 3


def test_instruction_and_input_go_where_the_template_says() -> None:
    example = tokenize(
        Prompt("I", "X", "O"),
        tokenizer=Letters(),
        template="[{input}|{instruction}]",
        max_length=50,
    )

    assert _text(example) == "<[X|I]O>"


def test_empty_input_leaves_its_place_empty() -> None:
    text = resolve_template("instruction")
    example = tokenize(Prompt("I", "", "O"), tokenizer=Letters(), template=text, max_length=200)

    assert _text(example) == ("<### Instruction:\nI\n\n### Input:\n\n\n### Response:\nO>")


def test_braces_in_a_record_are_text() -> None:
    assert _text(_tokens("{instruction} {x", "}")) == "<{instruction} {x}>"


def test_tokenizer_without_special_tokens_adds_none() -> None:
    example = _tokens("why", "so", bos=None, eos=None)

    assert (_text(example), example.num_answer) == ("whyso", 2)


@pytest.mark.parametrize(
    ("question", "answer", "expected", "num_answer"),
    [
        # max_length 9 with <: room for 8, half of it is 4.
        ("abcd", "xyz", "<abcdxyz>", 4),
        ("abcde", "xyz", "<bcdexyz>", 4),
        ("abcdefghijkl", "xyz", "<ijklxyz>", 4),
        ("abcdefghijkl", "x", "<ghijklx>", 2),
        ("abcdefghijkl", "stuvwxyz", "<ijklstuv", 4),
        ("ab", "stuvwxyz", "<abstuvwx", 6),
        ("", "stuvwxyz", "<stuvwxyz", 8),
        ("abcd", "", "<abcd>", 1),
    ],
    ids=[
        "fits", "prompt loses its beginning", "long prompt keeps half", "short answer leaves more",
        "both too long: half each", "answer loses its end", "no prompt", "no answer",
    ],
)  # fmt: skip
def test_truncation(question: str, answer: str, expected: str, num_answer: int) -> None:
    example = _tokens(question, answer, max_length=9)

    assert (_text(example), example.num_answer) == (expected, num_answer)


@given(
    st.text("abc", max_size=30),
    st.text("xyz", min_size=1, max_size=30),
    st.integers(8, 40),
)
def test_truncation_laws(question: str, answer: str, max_length: int) -> None:
    text = _text(_tokens(question, answer, max_length=max_length))
    kept = text[1:].rstrip("xyz>")
    answered = text[1 + len(kept) :]

    assert len(text) == min(max_length, 2 + len(question) + len(answer))
    assert text[0] == "<"
    assert question.endswith(kept)
    assert f"{answer}>".startswith(answered)
    assert len(kept) >= min(len(question), (max_length - 1) // 2)
    assert _tokens(question, answer, max_length=max_length).num_answer == len(answered) > 0


def test_real_tokenizer_gives_one_token_a_byte(tiny_model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    example = tokenize(
        Prompt("é", "", "ok"), tokenizer=tokenizer, template="{instruction}: ", max_length=50
    )

    # 2 bytes of é, colon, space, o, k, and the two ends.
    assert (len(example.token_ids), example.num_answer) == (8, 3)
    assert example.token_ids[0] == tokenizer.bos_token_id
    assert example.token_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(example.token_ids[1:-1]) == "é: ok"


def test_tokenizer_error_gives_a_number_and_never_text() -> None:
    class Quoting(Letters):
        def __call__(self, text: str, *, add_special_tokens: bool) -> Any:
            if "Example" in text:
                raise ValueError(f"cannot tokenise {text!r}")
            return super().__call__(text, add_special_tokens=add_special_tokens)

    prompts = [Prompt("q", "", "a"), Prompt("Mrs Example", "", "a")]

    with pytest.raises(
        DataError, match=r"^usable record 1 could not be tokenised \(ValueError\)$"
    ) as caught:
        tokenize_all(prompts, tokenizer=Quoting(), template="{instruction}", max_length=20)

    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_all_records_are_tokenised_in_order() -> None:
    prompts = [Prompt(letter, "", "x") for letter in "abc"]

    examples = tokenize_all(prompts, tokenizer=Letters(), template="{instruction}", max_length=20)

    assert [_text(example) for example in examples] == ["<ax>", "<bx>", "<cx>"]


# Examples

examples_ = st.lists(
    st.builds(
        Example,
        st.lists(st.integers(0, 2**31 - 1), max_size=5).map(tuple),
        st.integers(0, 5),
    ),
    max_size=6,
)


@given(examples_)
def test_examples_are_the_sequence_that_they_were_made_from(items: list[Example]) -> None:
    examples = Examples(iter(items))

    assert list(examples) == items
    assert len(examples) == len(items)
    assert [examples.length(i) for i in range(len(items))] == [len(e.token_ids) for e in items]
    assert [examples[-1 - i] for i in range(len(items))] == items[::-1]
    assert list(reversed(examples)) == items[::-1]
    with pytest.raises(IndexError, match="out of range"):
        examples[len(items)]
    with pytest.raises(IndexError, match="out of range"):
        examples[-len(items) - 1]


@given(examples_, st.slices(6))
def test_slice_of_examples_is_that_of_the_list(items: list[Example], part: slice) -> None:
    found = Examples(items)[part]

    assert isinstance(found, Examples)
    assert list(found) == items[part]


# Batches


def test_labels_cover_exactly_the_answer_and_its_eos() -> None:
    examples = [_tokens("why?", "so"), _tokens("a", "b")]

    batch = collate(examples, pad_id=0, device=CPU)

    s, o, b = ord("s"), ord("o"), ord("b")
    assert batch.labels.tolist() == [
        [IGNORE] * 5 + [s, o, EOS],
        [IGNORE] * 2 + [b, EOS] + [IGNORE] * 4,
    ]
    assert batch.attention_mask.tolist() == [[1] * 8, [1] * 4 + [0] * 4]
    assert batch.input_ids.tolist()[1] == [BOS, ord("a"), b, EOS, 0, 0, 0, 0]


def test_padding_that_equals_eos_is_masked_and_unlabelled() -> None:
    batch = collate([_tokens("why?", "so"), _tokens("a", "b")], pad_id=EOS, device=CPU)

    assert batch.labels[1].tolist()[4:] == [IGNORE] * 4
    assert batch.attention_mask[1].tolist()[4:] == [0] * 4
    assert batch.labels[1, 3] == EOS


def test_first_token_has_nothing_to_be_predicted_from() -> None:
    batch = collate([Example((5, 6, 7), 3)], pad_id=0, device=CPU)

    assert batch.labels.tolist() == [[IGNORE, 6, 7]]


def test_no_examples_are_no_batch() -> None:
    with pytest.raises(ValueError, match="empty"):
        collate([], pad_id=0, device=CPU)
