"""The `consilium` command without its ten seconds of imports: `python -m tests.chaos.command`.

It imports everything once, then takes orders, one JSON line each, and forks a child for each of them, which
runs the command as its own process would. The answer to an order is the child's exit status; -9 when it
was killed. Started with the variables of tests/chaos/points.py, its children die at the named points.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any, Self

_ROOT = Path(__file__).resolve().parents[2]


class Command:
    """The process, from the outside; a context manager.

    environment: what it is given beside ours. log: what the children print, the last one's last.
    """

    def __init__(self, environment: dict[str, str], *, log: Path) -> None:
        self.log = log
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.command"],
            cwd=_ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=240)

    def __call__(self, *arguments: str) -> int:
        """Run `consilium ARGUMENTS` and return its exit status."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order = {"arguments": arguments, "log": str(self.log)}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


def _import_early() -> None:
    """What a run imports when it first needs it."""
    import opacus.accountants
    import peft
    import torch._dynamo
    from transformers.models.llama import modeling_llama

    import client.site
    import simulations.cli

    # Named, or the linter would take them for forgotten.
    _ = (opacus, peft, torch, modeling_llama, client, simulations)


def _run(order: dict[str, Any]) -> None:
    from common.cli import main

    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["consilium", *order["arguments"]]
    main()


def _run_child(order: dict[str, Any]) -> int:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            _run(order)
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    _import_early()
    for line in sys.stdin:
        sys.stdout.write(f"{_run_child(json.loads(line))}\n")
        sys.stdout.flush()
