"""Modules of a merge, several at a time: one BLAS thread each, as many modules as BLAS would take threads.

Two cores merge two modules faster than both merge one, whose matrices are too thin to be shared. And what is
computed with one thread has the same bits with the same libraries, however many cores a machine has.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any, TypeVar

from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]  # ships no types


@lru_cache(maxsize=1)
def _blas() -> Any:
    # Numpy's and scipy's, each a library of its own; looking for them takes milliseconds.
    return ThreadpoolController().select(user_api="blas")


Done = TypeVar("Done")

# Each holds its module's factors of every site, in float64.
_MOST_AT_ONCE = 8


def map_modules(work: Callable[[str], Done], names: Sequence[str]) -> Iterator[Done]:
    """Yield work(name) for every name, in their order.

    No more modules are begun than can be worked on while the caller takes in the last one: memory holds so
    many modules' inputs. What `work` raises is raised here.
    """
    blas = _blas()
    threads = max((pool["num_threads"] for pool in blas.info()), default=1)
    at_once = min(threads, len(names), _MOST_AT_ONCE)
    if at_once <= 1:
        with blas.limit(limits=1):
            yield from map(work, names)
        return
    begun: deque[Future[Done]] = deque()
    with blas.limit(limits=1), ThreadPoolExecutor(at_once) as pool:
        try:
            for name in names:
                begun.append(pool.submit(work, name))
                if len(begun) > at_once:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            for future in begun:
                future.cancel()
