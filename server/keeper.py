"""Keeps the coordinator's runs going: submits what was asked for, and again what died.

A ServerApp that dies is never started again by Flower, and neither is one that stopped because the
SuperLink was away. The keeper looks at files and locks; it asks Flower only when something is to be done.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # ships no types

from common.errors import ConsiliumError, DiskError
from common.files import is_disk_full, write_atomically
from server.coordinator import Coordinator
from server.flower_control import ControlError, FlowerControl
from server.history import History
from server.launch import APP_DIR
from server.run_state import BY_ORDER
from server.runs import AskedRun, AskedRuns

logger = logging.getLogger(__name__)

_KEPT_LOGS = 20


@dataclass(frozen=True, slots=True)
class KeeperTiming:
    """How long is long; the defaults are for production.

    backoffs_s: the pause before each resume in a row without a newly committed round; after the last
    one the keeper gives up. A full disk is waited for at the last one's pace, without end.
    start_s: until a run that Flower has not begun is submitted again; load_s: until one whose ServerApp
    lives but has not taken up the run is.
    """

    look_every_s: float = 2.0
    backoffs_s: tuple[float, ...] = (5.0, 10.0, 20.0, 40.0, 60.0)
    ask_every_s: float = 15.0
    start_s: float = 180.0
    load_s: float = 1800.0
    stopped_s: float = 60.0
    max_refused_backoff_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Submission:
    """What was last submitted for a run.

    flower_run: Flower's id of it, "" while it could not be submitted. at: Unix seconds. resumes: in a row
    without a newly committed round. rounds_done: when it was submitted. trouble: why it does not go on.
    requested_at: which of a person's requests it answers.
    """

    flower_run: str = ""
    at: float = 0.0
    resumes: int = 0
    rounds_done: int = 0
    trouble: str = ""
    requested_at: float = 0.0


def read_submissions(path: Path) -> dict[str, Submission]:
    """Return what a keeper remembers, by run; {} when there is nothing usable."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {uid: Submission(**one) for uid, one in content.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


class Keeper:
    """Looks after runs in a thread of its own, from `start` to `stop`.

    What an earlier keeper submitted is dead when this one starts: its processes carried a mark.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        control: FlowerControl,
        *,
        app_dir: Path = APP_DIR,
        timing: KeeperTiming | None = None,
    ) -> None:
        self._coordinator = coordinator
        self._control = replace(control, on_wait=self._end_early)
        self._app_dir = app_dir
        self._timing = timing or KeeperTiming()
        self._runs = AskedRuns(coordinator.launches)
        self._submissions = read_submissions(coordinator.keeper_state)
        self._dead = set(self._submissions)
        self._resume_at: dict[str, float] = {}
        self._refusals = 0
        self._submitted = 0.0
        self._asked = 0.0
        self._stopped_since: tuple[int, float] | None = None
        self._over = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._keep, name="keeper", daemon=True)

    def start(self) -> None:
        """Begin to look after runs."""
        self._thread.start()

    def stop(self) -> None:
        """End, leaving every run as it is."""
        self._over.set()
        self._thread.join(timeout=10)

    def check(self) -> None:
        """Raise what ended the keeper, if anything did."""
        if self._error is not None:
            raise self._error

    def _keep(self) -> None:
        try:
            while not self._over.wait(self._timing.look_every_s):
                try:
                    self.look()
                except (ConsiliumError, OSError, subprocess.SubprocessError) as error:
                    logger.error("the runs could not be looked after: %s; trying again", error)
        except _OverError:
            return
        except BaseException as error:
            self._error = error

    def _end_early(self) -> None:
        if self._over.is_set():
            raise _OverError

    def look(self) -> None:
        """Look once, and do what is due. One run goes at a time; others wait."""
        runs = self._runs.open()
        if not runs:
            return
        run = runs[0]
        if run.holder is not None:
            self._dead.discard(run.uid)
            self._resume_at.pop(run.uid, None)
            self._kill_if_stopped(run.holder)
            return
        submission = self._current(run)
        if submission is None:
            state = run.state
            first = Submission(rounds_done=state.rounds_done, requested_at=state.requested_at)
            self._submit(run, first)
            return
        if run.uid not in self._resume_at:
            reason = self._death(run, submission)
            if not reason:
                return
            self._plan_resume(run, submission, reason)
        elif time.monotonic() >= self._resume_at[run.uid]:
            self._submit(run, submission)

    def _current(self, run: AskedRun) -> Submission | None:
        """What was submitted since a person last asked for the run."""
        submission = self._submissions.get(run.uid)
        # Equal, not later: a clock may be set back.
        if submission is None or submission.requested_at != run.state.requested_at:
            return None
        return submission

    def _death(self, run: AskedRun, submission: Submission) -> str:
        """Say why a submitted run that nothing runs has to be submitted again; "" while it may come."""
        if run.uid in self._dead:
            return "`consilium server up` was started again"
        if run.state.ran_at >= submission.at:
            if run.state.kind == "stopped":
                return f"it stopped ({run.state.code}): {run.state.message}"
            return "its ServerApp died"
        now = time.monotonic()
        waited_s = now - self._submitted
        if now - self._asked < self._timing.ask_every_s:
            return ""
        self._asked = now
        try:
            status, details = self._control.status(submission.flower_run)
        except ControlError as error:
            status, details = "unknown", str(error)
        if status.startswith("finished"):
            return f"its ServerApp ended before it began ({status}: {details})"
        patience_s = self._timing.load_s if status == "running" else self._timing.start_s
        if waited_s > patience_s:
            return f"its ServerApp did not begin within {waited_s:.0f} s ({status}: {details})"
        return ""

    def _plan_resume(self, run: AskedRun, submission: Submission, reason: str) -> None:
        """Set the time of the next try, or give up."""
        went_on = run.state.rounds_done > submission.rounds_done
        # Nobody mends a full disk within minutes at night, and it is no fault of the run.
        said_so = run.state.kind == "stopped" and run.state.code == DiskError.code
        patient = said_so or _disk_is_full(run.folder.path)
        resumes = submission.resumes
        if run.uid not in self._dead and not patient:
            resumes = 1 if went_on else submission.resumes + 1
        self._save_log(submission)
        self._remember(
            run.uid,
            replace(submission, resumes=resumes, rounds_done=run.state.rounds_done, trouble=reason),
        )
        backoffs = self._timing.backoffs_s
        if resumes > len(backoffs):
            message = (
                f"the run was resumed {len(backoffs)} times in a row without a new round; the last time "
                f"{reason}. Mend that, then: consilium server run --resume. What its ServerApp printed is "
                f"in {self._log(submission)}"
            )
            logger.error("giving up run %s: %s", run.uid, message)
            History(run.folder.history).record("gave-up", code="engine", message=message)
            return
        wait_s = backoffs[-1] if patient else backoffs[max(0, resumes - 1)]
        self._resume_at[run.uid] = time.monotonic() + wait_s
        logger.warning(
            "run %s: %s; resuming it in %g s (try %d of %d without a new round)",
            run.uid,
            reason,
            wait_s,
            max(1, resumes),
            len(backoffs),
        )

    def _submit(self, run: AskedRun, submission: Submission) -> None:
        """Submit a run, once what Flower still thinks to run of it is stopped."""
        earlier = self._submissions.get(run.uid)
        if earlier is not None and earlier.flower_run:
            try:
                self._control.stop(earlier.flower_run)
            except ControlError as error:
                # Two ServerApps of one run do no harm: only one gets its lock.
                logger.warning("Flower's run %s was not stopped: %s", earlier.flower_run, error)
        try:
            flower_run = self._control.submit(self._app_dir, run.overrides)
        except ControlError as error:
            self._refusals += 1
            wait_s = min(2.0**self._refusals, self._timing.max_refused_backoff_s)
            self._resume_at[run.uid] = time.monotonic() + wait_s
            trouble = f"Flower did not take it: {error}"
            logger.warning("run %s: %s; again in %g s", run.uid, trouble, wait_s)
            self._remember(
                run.uid,
                replace(submission, at=submission.at or time.time(), trouble=trouble),
            )
            return
        self._refusals = 0
        self._submitted = self._asked = time.monotonic()
        self._resume_at.pop(run.uid, None)
        self._dead.discard(run.uid)
        self._remember(
            run.uid, replace(submission, flower_run=flower_run, at=time.time(), trouble="")
        )
        logger.info("run %s submitted, Flower's run %s", run.uid, flower_run)
        now = self._runs.find(run.uid)
        if now is not None and now.state.code == BY_ORDER:
            logger.info("run %s was stopped by order meanwhile", run.uid)
            self._control.stop(flower_run)

    def _kill_if_stopped(self, pid: int) -> None:
        """A ServerApp that was halted (SIGSTOP) holds its run for ever."""
        now = time.monotonic()
        try:
            halted = psutil.Process(pid).status() == psutil.STATUS_STOPPED
        except psutil.Error:
            halted = False
        if not halted:
            self._stopped_since = None
        elif self._stopped_since is None or self._stopped_since[0] != pid:
            self._stopped_since = (pid, now)
        elif now - self._stopped_since[1] > self._timing.stopped_s:
            logger.warning("the ServerApp, process %d, is halted: kill -9", pid)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _save_log(self, submission: Submission) -> None:
        """Keep what a dead ServerApp printed; a SuperLink that does not answer only costs that."""
        if not submission.flower_run:
            return
        home = self._coordinator.flower_home
        try:
            self._control.save_log(submission.flower_run, self._log(submission))
            logs = sorted(home.glob("run-*.log"), key=lambda path: path.stat().st_mtime)
            for old in logs[:-_KEPT_LOGS]:
                old.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("the log of run %s is not kept: %s", submission.flower_run, error)

    def _log(self, submission: Submission) -> Path:
        return self._coordinator.flower_home / f"run-{submission.flower_run}.log"

    def _remember(self, uid: str, submission: Submission) -> None:
        self._submissions[uid] = submission
        content = {one: asdict(said) for one, said in self._submissions.items()}
        try:
            write_atomically(
                self._coordinator.keeper_state, (json.dumps(content, indent=2) + "\n").encode()
            )
        except OSError as error:
            logger.warning(
                "%s cannot be written: %s", self._coordinator.keeper_state, error.strerror
            )


def _disk_is_full(folder: Path) -> bool:
    """Whether nothing can be written there: a ServerApp could not even say so."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
            file.flush()
    except OSError as error:
        return is_disk_full(error)
    return False


class _OverError(Exception):
    """The keeper was told to end in the middle of a question."""
