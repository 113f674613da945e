"""A hospital's process that can be killed at a chosen line: `python -m tests.chaos.answer`.

It imports everything once, then takes orders, one JSON line each, and forks a child for each of them. The
child opens the site, answers the task and hands the reply over; told to, it ends itself by SIGKILL on
the way, which no `finally`, no `atexit` and no buffer survives. The answer to an order is the child's
exit status: 0, or -9 when it was killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

# What a site imports while it answers for the first time: a child that had to would take ten seconds.
import opacus.accountants
import peft
import torch._dynamo
from transformers.models.llama import modeling_llama

from client.gate import Gate
from client.ledger import Ledger
from client.outbox import Outbox
from client.replies import Replies
from client.site import Site
from client.training import Workbench
from common.records import Envelope

_IMPORTED_EARLY = (opacus, peft, torch, modeling_llama)
_ROOT = Path(__file__).resolve().parents[2]
_TRACED = {
    *map(str, (_ROOT / "client").glob("*.py")),
    *(str(_ROOT / "common" / name) for name in ("files.py", "audit_log.py", "audit_entries.py")),
    str(Path(__file__).resolve()),
}


def hand_over(reply: Envelope, path: Path) -> None:
    """Stand for sending: the coordinator has the whole reply or nothing of it."""
    partial = path.with_suffix(".partial")
    partial.write_bytes(pack(reply))
    os.replace(partial, path)


def pack(envelope: Envelope) -> bytes:
    parts = (envelope.payload, envelope.signature, envelope.adapter)
    return json.dumps([part.hex() for part in parts]).encode()


def unpack(data: bytes) -> Envelope:
    return Envelope(*map(bytes.fromhex, json.loads(data)))


# What happens to a task, in order; the lines below a function on the stack are the phase's.
PHASES: dict[str, Callable[..., Any]] = {
    "reserve": Gate.charge,
    "train": Workbench.train,
    "store": Outbox.store,
    "release": Ledger.release,
    "seal": Replies.seal,
    "send": hand_over,
}


class Tracer:
    """Counts the lines of each phase, and kills this process at a chosen one.

    kill: a phase and its how-many-eth line; (phase, 0), or a phase that has fewer lines this time,
    means its end: the moment before its caller goes on.
    """

    def __init__(self, kill: tuple[str, int] | None) -> None:
        self.lines: Counter[str] = Counter()
        self._kill = kill
        self._phases: dict[CodeType, str] = {
            function.__code__: name for name, function in PHASES.items()
        }
        self._phase = ""

    def __call__(self, frame: FrameType, event: str, argument: object) -> Any:
        """Follow a call into the files that are traced, and no other."""
        if frame.f_code.co_filename not in _TRACED:
            return None
        self._phase = self._phases.get(frame.f_code, self._phase)
        return self._follow

    def _follow(self, frame: FrameType, event: str, argument: object) -> Any:
        if event == "line" and self._phase:
            self.lines[self._phase] += 1
            if self._kill == (self._phase, self.lines[self._phase]):
                os.kill(os.getpid(), signal.SIGKILL)
        if event == "return" and frame.f_code in self._phases:
            if self._kill is not None and self._kill[0] == self._phase:
                os.kill(os.getpid(), signal.SIGKILL)
            self._phase = ""
        return self._follow


def _answer(order: dict[str, Any]) -> None:
    tracer = Tracer(tuple(order["kill"]) if order["kill"] else None)
    task, reply = unpack(Path(order["task"]).read_bytes()), Path(order["reply"])
    sys.settrace(tracer)
    hand_over(Site.open(Path(order["folder"])).answer(task), reply)
    sys.settrace(None)
    if "lines" in order:
        Path(order["lines"]).write_text(json.dumps(tracer.lines))


def _run_child(order: dict[str, Any]) -> int:
    child = os.fork()
    if child == 0:
        try:
            _answer(order)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    for line in sys.stdin:
        sys.stdout.write(f"{_run_child(json.loads(line))}\n")
        sys.stdout.flush()
