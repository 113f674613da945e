"""Modules are merged several at a time, in order, and to the same bits whatever the number of cores."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from common.adapter import AdapterState, LoraPair
from server.aggregation.by_module import map_modules
from tests.unit.merging import merged_by

NAMES = [f"layer.{i:02d}" for i in range(20)]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_come_in_order_and_no_more_are_begun_than_are_worked_on(threads: int) -> None:
    begun: list[str] = []

    def work(name: str) -> str:
        begun.append(name)
        return name.upper()

    with threadpool_limits(threads, user_api="blas"):
        for taken, result in enumerate(map_modules(work, NAMES), start=1):
            assert result == NAMES[taken - 1].upper()
            assert len(begun) <= taken + threads
    assert sorted(begun) == NAMES


def test_two_are_worked_on_at_a_time_with_one_thread_of_blas_each() -> None:
    meeting = threading.Barrier(2, timeout=30)

    def work(name: str) -> int:
        # Two at once, or nobody ever comes through.
        meeting.wait()
        return max(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")

    with threadpool_limits(2, user_api="blas"):
        assert list(map_modules(work, NAMES)) == [1] * len(NAMES)


@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_of_a_module_is_the_callers(threads: int) -> None:
    def work(name: str) -> str:
        if name == "layer.07":
            raise ValueError(name)
        return name

    with (
        threadpool_limits(threads, user_api="blas"),
        pytest.raises(ValueError, match="layer.07"),
    ):
        list(map_modules(work, NAMES))


def test_a_merge_has_the_same_bits_however_many_threads_there_are() -> None:
    def adapter(seed: int) -> AdapterState:
        random = np.random.default_rng(seed)
        pairs = {}
        for name in NAMES[:4]:
            a = random.standard_normal((8, 900), dtype=np.float32)
            pairs[name] = LoraPair(a, random.standard_normal((700, 8), dtype=np.float32))
        return AdapterState(pairs, 2.0)

    digests = set()
    for threads in (1, 2):
        with threadpool_limits(threads, user_api="blas"):
            merged = merged_by("svd", adapter(0), [adapter(seed) for seed in range(1, 6)])
            digests.add(merged.state.digest())
    assert len(digests) == 1
