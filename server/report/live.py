"""Reports of runs that go: drawn when somebody looks and something has changed, in a process of their own."""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from common.locks import lock_holder
from server.report.markup import render
from server.report.results import ATTACK_FILE, EVALUATION_FILE
from server.run_folder import run_lock

logger = logging.getLogger(__name__)

_DRAW_TIMEOUT_S = 120.0
# What a report is made of.
_FILES = ("run.toml", "history.jsonl", "summary.json", EVALUATION_FILE, ATTACK_FILE)


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A page as it was drawn last."""

    version: str
    page: str


class LiveReports:
    """Draws reports, one at a time, and keeps the last page of each run."""

    def __init__(self) -> None:
        self._drawn: dict[Path, _Drawn] = {}
        self._drawing = threading.Lock()

    def version(self, run_dir: Path) -> str:
        """Return what changes whenever a run's report would."""
        seen = [f"held {lock_holder(run_lock(run_dir)) is not None}"]
        for name in _FILES:
            try:
                status = (run_dir / name).stat()
            except FileNotFoundError:
                continue
            seen.append(f"{name} {status.st_mtime_ns} {status.st_size}")
        return hashlib.sha256("\n".join(seen).encode()).hexdigest()[:16]

    def page(self, run_dir: Path) -> str:
        """Return a run's report as it is now, or in words why there is none."""
        with self._drawing:
            version = self.version(run_dir)
            known = self._drawn.get(run_dir)
            if known is not None and known.version == version:
                return known.page
            page, trouble = self._draw(run_dir, version)
            if page:
                self._drawn[run_dir] = _Drawn(version, page)
                return page
            # Rather how it was a moment ago; whoever looks asks again.
            return known.page if known is not None else note_page(trouble, version=version)

    def _draw(self, run_dir: Path, version: str) -> tuple[str, str]:
        """Return a page, or "" and why there is none."""
        if not (run_dir / "run.toml").is_file():
            return "", "The run has not begun."
        command = [sys.executable, "-m", "server.report", str(run_dir), version]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_DRAW_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired:
            return "", "The report takes too long to draw."
        if done.returncode != 0:
            said = (done.stderr.strip().splitlines() or ["no reason was given"])[-1]
            logger.warning("the report of %s was not drawn: %s", run_dir, said)
            return "", f"The report cannot be drawn now: {said}"
        return done.stdout, ""


def note_page(sentence: str, *, version: str) -> str:
    """Return a page that says one thing and looks for a newer one."""
    return render("runs.html.j2", version=version, title="Run report", outcome=sentence, runs=())
