"""Who does what when, over all processes of a federation: each writes marks as it passes certain functions.

`environment(folder)` makes every Python process below it load tests/hooks/sitecustomize.py, which loads this
file; each process then appends to PID.jsonl in the folder. Nothing but the standard library.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

VARIABLE = "CONSILIUM_MARKS"
_HOOKS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "hooks")

_IN_PROCESS = "CONSILIUM_MARKS_IN_PROCESS"

_Said = Callable[..., dict[str, Any] | None]


@dataclass(frozen=True)
class Mark:
    """A moment. at: Unix seconds. home: FLWR_HOME of the process. said: what the function told."""

    at: float
    name: str
    pid: int
    home: str
    said: dict[str, Any]


def environment(folder: Path, *, in_process: bool) -> dict[str, str]:
    """Return the variables of a process, and so of its children, that leave marks in `folder`.

    in_process: node config then opens the site in the ClientApp's own process, which no command of the
    product says.
    """
    folder.mkdir(exist_ok=True)
    path = os.pathsep.join(filter(None, [_HOOKS, os.environ.get("PYTHONPATH", "")]))
    return {VARIABLE: str(folder), "PYTHONPATH": path, _IN_PROCESS: "1" if in_process else ""}


def read_marks(folder: Path) -> list[Mark]:
    """Return all marks, oldest first."""
    marks = []
    for path in folder.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            content = json.loads(line)
            marks.append(Mark(**content))
    return sorted(marks, key=lambda mark: mark.at)


# What the processes do


def _write(name: str, said: dict[str, Any] | None = None, *, at: float = 0.0) -> None:
    content = {
        "at": at or time.time(), "name": name, "pid": os.getpid(),
        "home": os.environ.get("FLWR_HOME", ""), "said": said or {},
    }  # fmt: skip
    with open(os.path.join(os.environ[VARIABLE], f"{os.getpid()}.jsonl"), "a") as file:
        file.write(json.dumps(content) + "\n")


def _around(name: str, holder: Any, attribute: str, said: _Said | None = None) -> None:
    """Mark NAME when a function begins and NAME-end when it has returned.

    said: of its arguments and result; None leaves no mark.
    """
    original = getattr(holder, attribute)

    def wrapped(*arguments: Any, **named: Any) -> Any:
        began = time.time()
        result = original(*arguments, **named)
        told = said(result, *arguments) if said is not None else {}
        if told is not None:
            _write(name, told, at=began)
            _write(f"{name}-end", told)
        return result

    setattr(holder, attribute, wrapped)


def _sent(result: Any, messenger: Any, tasks: Any, **named: Any) -> dict[str, Any] | None:
    return next(
        ({"round": task.server_round} for task, _ in tasks.values() if task.kind == "train"), None
    )


def _messenger(module: ModuleType) -> None:
    _around("send", module.Messenger, "send", _sent)
    # Flower's own fetching of what has come, object by object.
    _around("fetch", module.Messenger, "_fetch", lambda result, *asked: {} if result else None)


def _taken(result: Any, going: Any, answer: Any) -> dict[str, Any]:
    task = answer.sent.task
    return {"round": task.server_round, "site": task.site}


def _pulled(result: Any, *arguments: Any) -> dict[str, Any] | None:
    return None if result is None else {}


def _merge(module: ModuleType) -> None:
    for name in list(module.METHODS):
        method = module.METHODS[name]

        def merge(*arguments: Any, method: Any = method, **named: Any) -> Any:
            _write("merge")
            result = method(*arguments, **named)
            _write("merge-end")
            return result

        module.METHODS[name] = merge


def _supernode(module: ModuleType) -> None:
    _around("pull", module, "_pull_and_store_message", _pulled)
    _around("push", module, "_push_messages")


def _clientapp(module: ModuleType) -> None:
    for name in ("pull_task_input", "install_from_fab", "push_message"):
        _around(name, module, name)


def _node(module: ModuleType) -> None:
    """Have the SuperNode's node config name the site's folder, where that is wanted."""
    original = module.node_processes

    def node_processes(node: Any) -> Any:
        supernode, *others = original(node)
        *command, _ = supernode.command
        site = json.dumps(str(node.home.parents[1]))
        return [replace(supernode, command=(*command, f"site-dir={site}")), *others]

    if os.environ.get(_IN_PROCESS):
        module.node_processes = node_processes  # type: ignore[attr-defined]


_WRAPS: dict[str, Callable[[ModuleType], None]] = {
    "server.messenger": _messenger,
    "server.open_round": lambda m: _around("take", m.OpenRound, "_take", _taken),
    "server.aggregation": _merge,
    "flwr.supernode.start_client_internal": _supernode,
    "flwr.supercore.superexec.plugin": lambda m: _around(
        "launch", m.AutoExecPlugin, "launch_task"
    ),
    "flwr.supernode.runtime.run_clientapp": _clientapp,
    "client.node": _node,
    "client.app": lambda m: _around("relay", m, "_ask"),
    "client.agent": lambda m: _around("agent", m.Agent, "_answer"),
    "client.in_process": lambda m: _around("agent", m, "answer_in_process"),
    "client.training": lambda m: _around("train", m, "train"),
}  # fmt: skip


def install() -> None:
    """Have the functions wrapped when their modules are imported."""
    # Beside sitecustomize.py, which called this.
    from import_wrapping import wrap_imports  # type: ignore[import-not-found]

    if any("flwr-clientapp" in argument for argument in sys.orig_argv):
        _write("python")
    wrap_imports({name: [partial(_call, wrap)] for name, wrap in _WRAPS.items()})


def _call(wrap: Callable[[ModuleType], None], module: ModuleType) -> None:
    wrap(module)
