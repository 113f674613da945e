"""Poisson sampling by the operating system's coin, seeded passes without privacy."""

from __future__ import annotations

import inspect
import os
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.sampling import micro_batches, poisson_batches, shuffled_batches


def test_each_record_is_drawn_at_the_public_rate() -> None:
    counts = np.zeros(50)
    sizes = []
    for batch in poisson_batches(50, sample_rate=0.2, steps=2000):
        counts[batch] += 1
        sizes.append(len(batch))

    # 2000 coins of 0.2: standard deviation 17.9; five of them either way.
    assert bool((np.abs(counts - 400) < 90).all())
    # Batch sizes vary as a binomial's do (variance 8): batches of a fixed size would not.
    assert float(np.var(sizes)) == pytest.approx(8.0, rel=0.3)


def test_a_seed_does_not_change_poisson_batches() -> None:
    def seeded() -> list[list[int]]:
        np.random.seed(3)
        return list(poisson_batches(100, sample_rate=0.5, steps=3))

    assert seeded() != seeded()
    assert inspect.signature(poisson_batches).parameters["entropy"].default is os.urandom


def test_the_threshold_is_exact() -> None:
    # q = 1/4: integers below 2^62 are in, 2^62 itself is out.
    draws = struct.pack("=3Q", 2**62 - 1, 2**62, 0)

    (batch,) = poisson_batches(3, sample_rate=0.25, steps=1, entropy=lambda n: draws)

    assert batch == [0, 2]


def test_a_rate_of_one_takes_every_record_and_a_tiny_one_gives_empty_batches() -> None:
    assert list(poisson_batches(3, sample_rate=1.0, steps=2)) == [[0, 1, 2], [0, 1, 2]]
    assert list(poisson_batches(2, sample_rate=1e-18, steps=3)) == [[], [], []]


def test_shuffled_batches_are_full_repeatable_and_cover_everything() -> None:
    first = list(shuffled_batches(10, batch_size=4, steps=5, seed=1))

    assert first == list(shuffled_batches(10, batch_size=4, steps=5, seed=1))
    assert first != list(shuffled_batches(10, batch_size=4, steps=5, seed=2))
    assert all(len(batch) == 4 for batch in first)
    # 20 draws are two whole passes over ten records.
    assert sorted(index for batch in first for index in batch) == sorted([*range(10)] * 2)


def test_a_batch_larger_than_the_data_repeats_records() -> None:
    (batch,) = shuffled_batches(3, batch_size=7, steps=1, seed=0)

    assert len(batch) == 7
    assert set(batch) == {0, 1, 2}


@given(st.lists(st.integers(0, 99), max_size=30, unique=True), st.integers(1, 8))
@settings(deadline=None)
def test_micro_batches_hold_the_same_records_in_pieces(batch: list[int], size: int) -> None:
    pieces = micro_batches(batch, size=size, length=lambda index: index % 7)

    assert sorted(index for piece in pieces for index in piece) == sorted(batch)
    assert all(len(piece) <= size for piece in pieces)
    assert len(pieces) >= 1
