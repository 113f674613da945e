"""Wraps functions of modules as soon as those are imported, by name: Flower unpacks the app elsewhere.

Nothing but the standard library, and little of it: each of Flower's processes loads this.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing itself: it has the others find a module, and wraps what its execution defines."""

    def __init__(self, wraps: Mapping[str, Sequence[Callable[[ModuleType], None]]]) -> None:
        self._wraps = wraps
        self._finding: set[str] = set()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in self._wraps or name in self._finding:
            return None
        self._finding.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._finding.discard(name)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            for wrap in self._wraps[name]:
                wrap(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def wrap_imports(wraps: Mapping[str, Sequence[Callable[[ModuleType], None]]]) -> None:
    """Call each module's wraps with it, right after it was imported. wraps: by module name."""
    sys.meta_path.insert(0, _Finder(wraps))
