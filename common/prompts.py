"""How a record becomes tokens: prompt templates, tokenising, the mask of answer tokens."""

from __future__ import annotations

import string
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from torch import Tensor

from common.errors import ConfigError, DataError

# A label that no loss looks at (torch's and transformers' default ignore_index).
IGNORE = -100

TEMPLATES = {
    "instruction": "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
    "question": "Question: {instruction}\nAnswer: ",
}
_FIELDS = {"instruction", "input"}


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model is asked (`instruction`, `input`) and what it should answer (`output`).

    Text stays out of repr(), and so out of tracebacks and logs.
    """

    instruction: str = field(repr=False)
    input: str = field(repr=False)
    output: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised record: token ids, of which the last `num_answer` are the answer."""

    token_ids: tuple[int, ...]
    num_answer: int


class Examples(Sequence[Example]):
    """Many tokenised records in two flat int32 arrays: a tenth of the memory of Python's ints."""

    def __init__(self, examples: Iterable[Example]) -> None:
        tokens, ends, answers = array("i"), array("i"), array("i")
        for example in examples:
            tokens.extend(example.token_ids)
            ends.append(len(tokens))
            answers.append(example.num_answer)
        self._tokens, self._ends, self._answers = tokens, ends, answers

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> Example | Examples:
        if isinstance(index, slice):
            return Examples(self[i] for i in range(*index.indices(len(self))))
        index = range(len(self))[index]
        start = self._ends[index - 1] if index else 0
        return Example(tuple(self._tokens[start : self._ends[index]]), self._answers[index])

    def length(self, index: int) -> int:
        """Return the number of tokens of one record."""
        return self._ends[index] - (self._ends[index - 1] if index else 0)


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded examples on one device, each (batch, length): int64, int64 (0 is padding), int64."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def resolve_template(name_or_text: str) -> str:
    """Return a template's text. Raises ConfigError when it is neither a name nor a usable text."""
    text = TEMPLATES.get(name_or_text, name_or_text)
    try:
        fields = [field for field in string.Formatter().parse(text) if field[1] is not None]
        # A width or a conversion could fail, or fill the memory, only once records are there.
        names = {"" if spec or conversion else name for _, name, spec, conversion in fields}
    except ValueError:
        names = {""}
    if "instruction" not in names or not names <= _FIELDS:
        raise ConfigError(
            f"data.prompt-template = {name_or_text!r} is none of {sorted(TEMPLATES)} and no text "
            "with {instruction} and, if wanted, {input} in it"
        )
    return text


def tokenize(prompt: Prompt, *, tokenizer: Any, template: str, max_length: int) -> Example:
    """Return a record as tokens: [bos] prompt answer [eos], at most `max_length` of them.

    An answer that is too long is cut at its end. A prompt that is too long loses its beginning, but
    keeps half of `max_length` where the answer leaves it no more.
    """
    bos, question = _question(prompt, tokenizer=tokenizer, template=template)
    answer = list(tokenizer(prompt.output, add_special_tokens=False).input_ids)
    if tokenizer.eos_token_id is not None:
        answer.append(tokenizer.eos_token_id)
    room = max_length - len(bos)
    kept = max(room - len(answer), min(len(question), room // 2))
    question = question[-kept:] if kept else []
    answer = answer[: room - len(question)]
    return Example((*bos, *question, *answer), len(answer))


def tokenize_question(
    prompt: Prompt, *, tokenizer: Any, template: str, max_tokens: int
) -> tuple[int, ...]:
    """Return what stands before a record's answer as tokens: [bos] prompt, its last `max_tokens` at most."""
    bos, question = _question(prompt, tokenizer=tokenizer, template=template)
    return (*bos, *question[-max(max_tokens - len(bos), 1) :])


def _question(prompt: Prompt, *, tokenizer: Any, template: str) -> tuple[list[int], list[int]]:
    """The ids of [bos], if there is one, and of the filled template."""
    text = template.format(instruction=prompt.instruction, input=prompt.input)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return bos, list(tokenizer(text, add_special_tokens=False).input_ids)


def tokenize_all(
    prompts: Iterable[Prompt], *, tokenizer: Any, template: str, max_length: int
) -> Examples:
    """Return records as tokens (see `tokenize`). Raises DataError without a word of any record."""
    examples = []
    for number, prompt in enumerate(prompts):
        try:
            examples.append(
                tokenize(prompt, tokenizer=tokenizer, template=template, max_length=max_length)
            )
        except Exception as error:
            # A tokenizer's own error may quote the text.
            raise DataError(
                f"usable record {number} could not be tokenised ({type(error).__name__})"
            ) from None
    return Examples(examples)


def collate(examples: Sequence[Example], *, pad_id: int, device: torch.device) -> Batch:
    """Return examples padded on the right to the longest of them. Raises ValueError when empty."""
    length = max(len(example.token_ids) for example in examples)
    input_ids = torch.full((len(examples), length), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(examples), length), dtype=torch.int64)
    labels = torch.full((len(examples), length), IGNORE, dtype=torch.int64)
    for row, example in enumerate(examples):
        size = len(example.token_ids)
        ids = torch.tensor(example.token_ids, dtype=torch.int64)
        input_ids[row, :size] = ids
        mask[row, :size] = 1
        start = max(size - example.num_answer, 1)
        labels[row, start:size] = ids[start:]
    return Batch(input_ids.to(device), mask.to(device), labels.to(device))
