"""Flower's SuperNode, ended by whatever would leave it half alive: python -m client.supernode ARGS.

Flower 1.41 goes on when its heartbeat thread has died, of one HTTP 500 for instance, and when its main loop
has: such a node is offline for ever and nobody is told. Here it ends, so that it can be started again.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading

from flwr.supernode.cli import flower_supernode

# Flower says "Exit Code: 305" in its log and exits with 1, as for any error.
CONNECTION_REFUSED = 305 & 0xFF
# A thread died of an exception, or the main loop ended by itself.
HALF_DEAD = 70

logger = logging.getLogger(__name__)


class _SaidExitCode(logging.Handler):
    """Remembers the exit code that Flower's log names."""

    def __init__(self) -> None:
        super().__init__()
        self.code: int | None = None

    def emit(self, record: logging.LogRecord) -> None:
        match = re.search(r"^Exit Code: (\d+)", record.getMessage(), re.MULTILINE)
        if match:
            self.code = int(match[1])


def main() -> None:
    """Run Flower's SuperNode with this process's arguments until it ends, and end this process."""
    said = _SaidExitCode()
    logging.getLogger("flwr").addHandler(said)
    threading.excepthook = _end
    code = HALF_DEAD
    try:
        flower_supernode()
        logger.error("the SuperNode's main loop ended; ending the process, to be started again")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if code and said.code:
            code = said.code & 0xFF or code
    # Its HTTP thread would keep a process without a main loop alive.
    _leave(code)


def _end(failed: threading.ExceptHookArgs) -> None:
    name = failed.thread.name if failed.thread else "a thread"
    # The hospital's own log: Flower's exceptions quote no record.
    logger.error(
        "%s of the SuperNode died; ending the process, to be started again",
        name,
        exc_info=(failed.exc_type, failed.exc_value or failed.exc_type(), failed.exc_traceback),
    )
    _leave(HALF_DEAD)


def _leave(code: int) -> None:
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
