"""Poisson sampling by the operating system's coin, seeded passes without privacy."""

from __future__ import annotations

import inspect
import os
import random
import struct
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.sampling import (
    check_patients,
    draw_records,
    micro_batches,
    poisson_sample,
    private_batches,
    shuffled_batches,
)
from common.errors import PrivacyError


def test_each_unit_is_drawn_at_the_public_rate() -> None:
    counts = np.zeros(50)
    sizes = []
    for drawn in poisson_sample(50, sample_rate=0.2, steps=2000):
        counts[drawn] += 1
        sizes.append(len(drawn))

    # 2000 coins of 0.2: standard deviation 17.9; seven of them either way, for there are 50 counts.
    assert bool((np.abs(counts - 400) < 125).all())
    # Sizes vary as a binomial's do (variance 8): batches of a fixed size would not.
    assert float(np.var(sizes)) == pytest.approx(8.0, rel=0.3)


def test_a_patient_of_many_records_is_drawn_no_more_often_than_one_of_few() -> None:
    patients = [[0], list(range(1, 200))]
    counts = [0, 0]
    for batch in private_batches(patients, sample_rate=0.25, max_records=3, steps=2000):
        for unit in batch:
            counts[min(unit[0], 1)] += 1
            assert len(unit) == (1 if unit[0] == 0 else 3)

    # 2000 coins of 0.25: standard deviation 19.4; seven of them.
    assert all(abs(count - 500) < 135 for count in counts)


def test_seeds_change_neither_coins_nor_draws() -> None:
    def seeded() -> list[list[list[int]]]:
        np.random.seed(3)
        random.seed(3)
        units = [list(range(start, start + 9)) for start in range(0, 900, 9)]
        return list(private_batches(units, sample_rate=0.5, max_records=2, steps=3))

    assert seeded() != seeded()
    for function in (private_batches, poisson_sample, draw_records):
        assert inspect.signature(function).parameters["entropy"].default is os.urandom


def test_the_threshold_is_exact() -> None:
    # q = 1/4: integers below 2^62 are in, 2^62 itself is out.
    draws = struct.pack("=3Q", 2**62 - 1, 2**62, 0)

    (batch,) = poisson_sample(3, sample_rate=0.25, steps=1, entropy=lambda n: draws)

    assert batch == [0, 2]


def test_a_rate_of_one_takes_every_unit_and_a_tiny_one_none() -> None:
    assert list(poisson_sample(3, sample_rate=1.0, steps=2)) == [[0, 1, 2], [0, 1, 2]]
    assert list(poisson_sample(2, sample_rate=1e-18, steps=3)) == [[], [], []]


def test_every_choice_of_a_patients_records_is_as_likely() -> None:
    counts = dict.fromkeys(((5, 6), (5, 7), (5, 8), (6, 7), (6, 8), (7, 8)), 0)
    for _ in range(3000):
        first, second = sorted(draw_records([5, 6, 7, 8], at_most=2))
        counts[first, second] += 1

    # 500 expected of each: standard deviation 20.4; seven of them.
    assert all(abs(count - 500) < 142 for count in counts.values())


def test_the_smallest_integers_decide_which_records_are_drawn() -> None:
    keys = struct.pack("=4Q", 9, 2**64 - 1, 2, 5)

    assert sorted(draw_records([3, 1, 4, 8], at_most=2, entropy=lambda n: keys)) == [4, 8]


def test_a_patient_within_the_cap_gives_all_records_and_takes_no_entropy() -> None:
    def none_left(size: int) -> bytes:
        raise AssertionError

    assert draw_records((4, 2, 7), at_most=3, entropy=none_left) == [4, 2, 7]


@pytest.mark.parametrize(
    ("patients", "problem"),
    [
        ([[0], []], "has no record"),
        ([[0, 1], [1]], "listed twice"),
        ([[0, 0]], "listed twice"),
        ([[0], [3]], "beyond the 3"),
        ([[-1]], "beyond the 3"),
    ],
)
def test_patients_that_cannot_be_are_refused(patients: list[list[int]], problem: str) -> None:
    with pytest.raises(PrivacyError, match=problem):
        check_patients(patients, num_records=3)


def test_patients_need_not_cover_every_record() -> None:
    check_patients([(2,), (0,)], num_records=3)


def _flat(batch: list[list[int]]) -> list[int]:
    return [record for unit in batch for record in unit]


def test_shuffled_batches_are_full_repeatable_and_cover_everything() -> None:
    first = list(shuffled_batches(10, batch_size=4, steps=5, seed=1))

    assert first == list(shuffled_batches(10, batch_size=4, steps=5, seed=1))
    assert first != list(shuffled_batches(10, batch_size=4, steps=5, seed=2))
    assert all(len(batch) == 4 for batch in first)
    assert all(len(unit) == 1 for batch in first for unit in batch)
    # 20 draws are two whole passes over ten records.
    assert sorted(index for batch in first for index in _flat(batch)) == sorted([*range(10)] * 2)


def test_a_batch_larger_than_the_data_repeats_records() -> None:
    (batch,) = shuffled_batches(3, batch_size=7, steps=1, seed=0)

    assert len(batch) == 7
    assert set(_flat(batch)) == {0, 1, 2}


@given(st.lists(st.integers(1, 4), max_size=20), st.integers(4, 9))
def test_micro_batches_hold_the_same_units_whole(sizes: list[int], size: int) -> None:
    ends = np.cumsum([0, *sizes]).tolist()
    batch = [list(range(a, b)) for a, b in pairwise(ends)]

    pieces = micro_batches(batch, size=size, length=lambda index: index % 7)

    assert sorted(unit for piece in pieces for unit in piece) == batch
    assert all(0 < len(_flat(piece)) <= size for piece in pieces)


def test_similar_lengths_stand_together_and_no_room_is_wasted() -> None:
    length = {0: 9, 1: 2, 2: 30, 3: 3, 4: 8}.__getitem__

    assert micro_batches([[0], [1, 2], [3], [4]], size=2, length=length) == [
        [[3], [4]],
        [[0]],
        [[1, 2]],
    ]
    assert micro_batches([], size=2, length=length) == []
