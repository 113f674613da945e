"""Which records make up a step's batch.

Under differential privacy: Poisson sampling, each record by its own coin, from the operating system's
entropy, since a coordinator who could foresee the batches would undo amplification by sampling.
Without: seeded passes over the data. (Opacus's own sampler draws from a torch generator and fixes the
number of steps to 1 / rate; neither fits.)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import numpy as np

from client.noise import Entropy


def poisson_batches(
    num_records: int, *, sample_rate: float, steps: int, entropy: Entropy = os.urandom
) -> Iterator[list[int]]:
    """Yield `steps` batches of record indices; each holds each record with chance `sample_rate`.

    A batch may be empty: that is a real step of the mechanism.
    Source: Abadi et al. 1607.00133, section 3.1; Mironov et al. 1908.10530, section 3.
    entropy: returns that many unpredictable bytes; a test may pass another, no configuration can.
    """
    # A 64-bit integer lies below the threshold with chance sample_rate, to within 2^-64.
    threshold = int(sample_rate * 2.0**64)
    for _ in range(steps):
        if threshold >= 2**64:
            yield list(range(num_records))
            continue
        draws = np.frombuffer(entropy(8 * num_records), dtype=np.uint64)
        yield np.flatnonzero(draws < np.uint64(threshold)).tolist()


def shuffled_batches(
    num_records: int, *, batch_size: int, steps: int, seed: int
) -> Iterator[list[int]]:
    """Yield `steps` batches of exactly `batch_size` indices from seeded passes over the data."""
    random = np.random.default_rng(seed)
    pool: list[int] = []
    for _ in range(steps):
        while len(pool) < batch_size:
            pool.extend(random.permutation(num_records).tolist())
        yield pool[:batch_size]
        del pool[:batch_size]


def micro_batches(batch: list[int], *, size: int, length: Callable[[int], int]) -> list[list[int]]:
    """Return a batch in pieces of at most `size`, similar lengths together; at least one piece.

    An empty batch is one empty piece. Which records form a step does not change.
    """
    ordered = sorted(batch, key=length)
    return [ordered[start : start + size] for start in range(0, len(ordered), size)] or [[]]
