"""A process that serves one run's report for as long as the run goes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.flower_process import free_port
from common.process_guard import guarded_processes
from server.report.serving_address import answers, page_address

_START_S = 60.0
_PROJECT = Path(__file__).resolve().parents[2]


@contextmanager
def watched(run_dir: Path) -> Iterator[str]:
    """Serve a run's report on a free port of loopback and give its address; "" where that did not start.

    The process ends with the block, however the block ends.
    """
    port = free_port()
    search = [str(_PROJECT), os.environ.get("PYTHONPATH", "")]
    with tempfile.TemporaryDirectory(prefix="consilium-watch-") as scratch:
        log = Path(scratch) / "watch.log"
        with guarded_processes(log) as guard, log.open("ab") as output:
            process = subprocess.Popen(
                _command(run_dir, port),
                env={
                    **os.environ,
                    **guard.mark,
                    "PYTHONPATH": os.pathsep.join(filter(None, search)),
                },
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C reaches the caller alone
            )
            guard.started.append(process)
            yield page_address(port) if _started(process, port) else ""


def _command(run_dir: Path, port: int) -> list[str]:
    words = ["--run", str(run_dir.resolve()), "--port", str(port)]
    return [sys.executable, "-m", "server.report.serving", *words]


def _started(process: subprocess.Popen[bytes], port: int) -> bool:
    deadline = time.monotonic() + _START_S
    while process.poll() is None and time.monotonic() < deadline:
        if answers(port):
            return True
        time.sleep(0.1)
    return False
