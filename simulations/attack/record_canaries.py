"""Records that nobody has: random made-up words, in or out of the training by a fair coin.

Whether one was in shows in how far training lowered its loss, which anybody with the model and the base can
see: the black-box auditor of Steinke et al. (2305.08846, section 6) with inputs of our own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from common.prompts import Prompt
from common.seeding import derive_seed

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_QUESTION_WORDS, _ANSWER_WORDS = 4, 16


def canary_prompts(count: int, *, seed: int) -> list[Prompt]:
    """Return so many records of random words, the same for the same seed."""
    random = np.random.default_rng(derive_seed(seed, "attack", "record canaries"))
    return [
        Prompt(_words(random, _QUESTION_WORDS), "", _words(random, _ANSWER_WORDS) + ".")
        for _ in range(count)
    ]


def fair_coins(count: int, *, seed: int, stream: str) -> np.ndarray:
    """Return so many fair coins, (count,) bool. stream: names them, apart from others of the seed."""
    coins: np.ndarray = (
        np.random.default_rng(derive_seed(seed, "attack", stream)).random(count) < 0.5
    )
    return coins


def _words(random: np.random.Generator, count: int) -> str:
    return " ".join(_word(random) for _ in range(count))


def _word(random: np.random.Generator) -> str:
    syllables = random.integers(2, 4)
    return "".join(_one(random, _CONSONANTS) + _one(random, _VOWELS) for _ in range(syllables))


def _one(random: np.random.Generator, letters: Sequence[str]) -> str:
    return letters[int(random.integers(len(letters)))]
