"""The named points at which a process kills itself with SIGKILL, without any test code in production.

`environment(folder)` makes every Python process below it, Flower's own too, load
tests/hooks/sitecustomize.py, which loads this file when CONSILIUM_CHAOS names a folder. Each point then
wraps a function of a module as soon as that module is imported. A point is armed by a file:

    armed/POINT    {} or {"skip": 1, "site": "north", ...}: the first hits to let pass in one process, and
                   what the hit has to say of itself
    killed/POINT-1.json    pid, argv, time and what was said: written, with fsync, by whoever removed
                   the armed file, just before it kills itself
    trace          while this file is there: reached/POINT is made at each hit

This file imports nothing but the standard library, and little of it: each of those processes loads it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

VARIABLE = "CONSILIUM_CHAOS"
HOOKS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "hooks")

# Called at a point, with what there is to say of it.
Hit = Callable[..., None]


@dataclass(frozen=True)
class Point:
    """Where a process dies. module: whose import puts the wrapping in place. who: of what process.

    wrap: does so, and raises AttributeError or LookupError when what it wraps is there no longer.
    """

    module: str
    who: str
    wrap: Callable[[ModuleType, Hit], None]


def _returning(
    owner: str, name: str, *, only: Callable[[Any], object] = lambda result: True
) -> Any:
    """Return a `wrap` that hits when the method has returned. only: what result counts."""

    def wrap(module: ModuleType, hit: Hit) -> None:
        target = getattr(module, owner)
        original = vars(target)[name]

        def wrapped(*arguments: Any, **named: Any) -> Any:
            result = original(*arguments, **named)
            if only(result):
                hit()
            return result

        setattr(target, name, wrapped)

    return wrap


def _wrap_trainer(module: ModuleType, hit: Hit) -> None:
    original = module.train

    def train(*arguments: Any, **named: Any) -> Any:
        then = named["on_step"]

        def on_step(step: int) -> None:
            then(step)
            if step == 2:
                hit(site=named["stream"], round=named["server_round"])

        return original(*arguments, **{**named, "on_step": on_step})

    module.train = train  # type: ignore[attr-defined]


def _ledger_wrapper(*, committed: bool) -> Callable[[ModuleType, Hit], None]:
    """Before COMMIT is all that the block of `transaction` does, and after it what follows that."""

    def wrap(module: ModuleType, hit: Hit) -> None:
        original = vars(module.LedgerFile)["transaction"]

        @contextmanager
        def transaction(ledger: Any) -> Iterator[Any]:
            appended = False
            site = os.path.basename(os.path.dirname(os.path.dirname(str(ledger.path))))
            with original(ledger) as opened:
                before = opened.state.head
                yield opened
                appended = opened.state.head != before
                if appended and not committed:
                    hit(site=site)
            if appended and committed:
                hit(site=site)

        module.LedgerFile.transaction = transaction

    return wrap


def _wrap_upload(module: ModuleType, hit: Hit) -> None:
    """After the first object of a reply has arrived, before the last is sent.

    Flower sends them with two threads at most, and a reply that holds an adapter has six objects.
    """
    original = module.push_object_contents_from_iterable

    def push_all(
        contents: Iterable[tuple[str, bytes]],
        push_object_fn: Callable[[str, bytes], None],
        **named: Any,
    ) -> Any:
        if not hit.armed():  # type: ignore[attr-defined]
            return original(contents, push_object_fn, **named)
        whole = list(contents)

        def push_one(object_id: str, content: bytes) -> None:
            push_object_fn(object_id, content)
            if len(whole) > 4:
                hit(objects=len(whole), size_bytes=sum(len(item) for _, item in whole))

        return original(whole, push_one, **named)

    module.push_object_contents_from_iterable = push_all  # type: ignore[attr-defined]


def _merge_wrapper(*, merged: bool) -> Callable[[ModuleType, Hit], None]:
    def wrap(module: ModuleType, hit: Hit) -> None:
        original = module.merge

        def merge(*arguments: Any, **named: Any) -> Any:
            if not merged:
                hit()
            result = original(*arguments, **named)
            if merged:
                hit()
            return result

        module.merge = merge  # type: ignore[attr-defined]

    return wrap


def _wrap_layer(module: ModuleType, hit: Hit) -> None:
    original = module.truncated_svd

    def truncated_svd(*arguments: Any, **named: Any) -> Any:
        hit()
        return original(*arguments, **named)

    module.truncated_svd = truncated_svd  # type: ignore[attr-defined]


class _Os:
    """The `os` of one module, with another rename."""

    def __init__(self, rename: Callable[..., None]) -> None:
        self.rename = rename

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


def _rename_wrapper(*, renamed: bool) -> Callable[[ModuleType, Hit], None]:
    def wrap(module: ModuleType, hit: Hit) -> None:
        original = module.os.rename

        def rename(source: Any, target: Any, **named: Any) -> None:
            checkpoint = os.path.basename(target).startswith("round-")
            if checkpoint and not renamed:
                hit(checkpoint=os.path.basename(target))
            original(source, target, **named)
            if checkpoint and renamed:
                hit(checkpoint=os.path.basename(target))

        module.os = _Os(rename)  # type: ignore[attr-defined]

    return wrap


POINTS: Mapping[str, Point] = {
    # Who takes part is chosen, and nobody is told.
    "configure": Point("server.rounds", "ServerApp", _returning("Federation", "select")),
    # The tasks are out, and nobody wrote down that they are.
    "push": Point("server.messenger", "ServerApp", _returning("Messenger", "send")),
    # A reply was taken from the SuperLink, and is not screened yet.
    "pull": Point("server.messenger", "ServerApp", _returning("Messenger", "_pull", only=bool)),
    "mid-train": Point("client.trainer", "agent", _wrap_trainer),
    "before-ledger-fsync": Point("client.ledger_file", "agent", _ledger_wrapper(committed=False)),
    "after-ledger-fsync": Point("client.ledger_file", "agent", _ledger_wrapper(committed=True)),
    "mid-upload": Point("flwr.supernode.start_client_internal", "SuperNode", _wrap_upload),
    "before-merge": Point("server.aggregation", "ServerApp", _merge_wrapper(merged=False)),
    # Arm it with {"skip": 1}: one layer is merged, and the second is not.
    "in-merge": Point("server.lowrank", "ServerApp", _wrap_layer),
    "after-merge": Point("server.aggregation", "ServerApp", _merge_wrapper(merged=True)),
    "before-checkpoint-rename": Point(
        "server.checkpoint", "ServerApp", _rename_wrapper(renamed=False)
    ),
    "after-checkpoint-rename": Point(
        "server.checkpoint", "ServerApp", _rename_wrapper(renamed=True)
    ),
}


# What a test does


def environment(folder: str | os.PathLike[str]) -> dict[str, str]:
    """Return the variables of the process, and so of its children, whose points work by `folder`."""
    folder = os.path.abspath(folder)
    _make_folders(folder)
    inherited = os.environ.get("PYTHONPATH", "")
    return {
        VARIABLE: folder,
        "PYTHONPATH": os.pathsep.join(part for part in (HOOKS, inherited) if part),
    }


def arm(folder: str | os.PathLike[str], point: str, **narrowing: Any) -> None:
    """Let the next process that reaches a point, as narrowed, kill itself there."""
    if point not in POINTS:
        raise KeyError(f"{point!r} is none of {', '.join(POINTS)}")
    if point == "in-merge":
        narrowing = {"skip": 1, **narrowing}
    _make_folders(folder)
    temporary = os.path.join(folder, f".arming-{point}")
    with open(temporary, "w") as file:
        json.dump(narrowing, file)
    os.rename(temporary, os.path.join(folder, "armed", point))


def disarm(folder: str | os.PathLike[str], point: str) -> bool:
    """Take a point's arming back; return whether it was still there: else somebody died of it."""
    try:
        os.unlink(os.path.join(folder, "armed", point))
    except FileNotFoundError:
        return False
    return True


def kills(folder: str | os.PathLike[str], point: str) -> list[dict[str, Any]]:
    """Return what those who died at a point wrote, oldest first."""
    killed = os.path.join(folder, "killed")
    found: list[dict[str, Any]] = []
    while os.path.exists(path := os.path.join(killed, f"{point}-{len(found) + 1}.json")):
        with open(path) as file:
            text = file.read()
        if not text.endswith("\n"):
            break
        found.append(json.loads(text))
    return found


def _make_folders(folder: str | os.PathLike[str]) -> None:
    for name in ("armed", "killed", "reached", "installed"):
        os.makedirs(os.path.join(folder, name), exist_ok=True)


# What the processes do


class _Hit:
    """What a wrapped function calls; with no file there, it costs one or two looks for one."""

    def __init__(self, folder: str, point: str) -> None:
        self._folder = folder
        self._point = point
        self._armed = os.path.join(folder, "armed", point)
        self._trace = os.path.join(folder, "trace")
        # Of the arming that was last seen here: its file, and how often it let pass.
        self._passed: tuple[tuple[int, int], int] = ((0, 0), 0)

    def armed(self) -> bool:
        return os.path.exists(self._armed)

    def __call__(self, **said: Any) -> None:
        if os.path.exists(self._trace):
            with open(os.path.join(self._folder, "reached", self._point), "a"):
                pass
        if not self.armed():
            return
        try:
            with open(self._armed) as file:
                narrowing = json.load(file)
                status = os.fstat(file.fileno())
        except FileNotFoundError:
            return
        skip = narrowing.pop("skip", 0)
        if any(said.get(name) != value for name, value in narrowing.items()):
            return
        arming = (status.st_ino, status.st_mtime_ns)
        passed = self._passed[1] if self._passed[0] == arming else 0
        if passed < skip:
            self._passed = (arming, passed + 1)
            return
        try:
            os.unlink(self._armed)
        except FileNotFoundError:
            return
        self._die(said)

    def _die(self, said: Mapping[str, Any]) -> None:
        number = 1
        while True:
            path = os.path.join(self._folder, "killed", f"{self._point}-{number}.json")
            try:
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                break
            except FileExistsError:
                number += 1
        content = {"pid": os.getpid(), "argv": sys.argv, "time": time.time(), **said}
        os.write(descriptor, (json.dumps(content) + "\n").encode())
        os.fsync(descriptor)
        os.close(descriptor)
        os.kill(os.getpid(), signal.SIGKILL)


def install() -> None:
    """Have the points' modules wrapped when they are imported, if the environment names a folder."""
    # Beside sitecustomize.py, which called this.
    from import_wrapping import wrap_imports  # type: ignore[import-not-found]

    folder = os.environ.get(VARIABLE)
    if not folder:
        return
    wraps: dict[str, list[Callable[[ModuleType], None]]] = {}
    for name, point in POINTS.items():
        wraps.setdefault(point.module, []).append(partial(_wrap, folder, name, point))
    wrap_imports(wraps)


def _wrap(folder: str, name: str, point: Point, module: ModuleType) -> None:
    point.wrap(module, _Hit(folder, name))
    with open(os.path.join(folder, "installed", name), "a"):
        pass
