"""Keeps child processes alive: starts again what dies or hangs, and leaves none behind.

with guarded_processes(log_file) as guard:
    Supervisor([ChildSpec("superlink", ...)], guard=guard, state_file=folder / "up.json").run()
"""

from __future__ import annotations

import logging
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import psutil  # type: ignore[import-untyped]  # ships no types

from common.errors import EngineError
from common.process_guard import Guard
from common.supervisor_state import ChildState, SupervisorState

logger = logging.getLogger(__name__)

_TAIL_LINES = 15
_TICK_S = 0.1
_NOT_STARTED = 127
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """A process to keep alive.

    environment: the whole of it; the guard's mark is added. log_file: what it writes is appended.
    patience: exit code -> seconds until the next start, for an end that only time mends.
    probe: whether it answers, in a few seconds at most; without one a child hangs only when stopped.
    hung_s: how long it may give no answer; None is as `Timing` says.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    log_file: Path
    cwd: Path
    patience: Mapping[int, float] = field(default_factory=dict)
    probe: Callable[[], bool] | None = None
    hung_s: float | None = None


@dataclass(frozen=True, slots=True)
class Timing:
    """How long is long; the defaults are for production.

    first_backoff_s doubles with every death in a row up to max_backoff_s. A child that stays up for
    settled_s has made good. max_quick_deaths in a row before that end the supervisor; those in
    `patience` do not count for max_patience_s.
    """

    first_backoff_s: float = 1.0
    max_backoff_s: float = 30.0
    settled_s: float = 60.0
    max_quick_deaths: int = 8
    max_patience_s: float = 900.0
    # An answer to a probe may take this long after a start; after one answer, so long may be none.
    first_answer_s: float = 300.0
    hung_s: float = 30.0
    look_every_s: float = 2.0
    stop_s: float = 10.0
    max_log_bytes: int = 20_000_000


class Supervisor:
    """Runs its children until it is told to stop by SIGTERM, SIGINT or SIGHUP.

    guard: whose mark they carry, so that nothing is left whatever happens to this process.
    state_file: where it says how they are; see common/supervisor_state.py.
    """

    def __init__(
        self,
        children: Sequence[ChildSpec],
        *,
        guard: Guard,
        state_file: Path,
        timing: Timing | None = None,
    ) -> None:
        self._timing = timing or Timing()
        self._children = [_Child(spec, guard.mark, self._timing) for spec in children]
        self._guard = guard
        self._state_file = state_file
        self._since = time.time()
        self._stop = threading.Event()
        self._written: tuple[ChildState, ...] = ()
        self._disk_is_full = False

    def run(self, *, on_tick: Callable[[], None] = lambda: None) -> None:
        """Keep the children alive until a signal; they have ended when this returns or raises.

        on_tick: called several times a second; what it raises ends the supervisor.
        Raises EngineError, with the end of its log, for a child that does not stay up.
        """
        with _signals(self._stop), ThreadPoolExecutor(len(self._children) or 1) as probes:
            try:
                next_look = 0.0
                while not self._stop.wait(_TICK_S):
                    on_tick()
                    look = time.monotonic() >= next_look
                    if look:
                        next_look = time.monotonic() + self._timing.look_every_s
                    for child in self._children:
                        child.attend(probes, look=look)
                    self._write_state(always=look)
            finally:
                self._stop_children()

    def stop(self) -> None:
        """Let `run` end, as a signal would; from any thread."""
        self._stop.set()

    def _stop_children(self) -> None:
        """The last started is stopped first: it needs the others to end well."""
        for child in reversed(self._children):
            child.stop()
        self._write_state(always=True)

    def _write_state(self, *, always: bool) -> None:
        children = tuple(child.state() for child in self._children)
        if not always and children == self._written:
            return
        self._written = children
        mark = self._guard.own_mark
        try:
            SupervisorState(self._guard.pid, self._since, mark, children).write(self._state_file)
            self._disk_is_full = False
        except OSError as error:
            if not self._disk_is_full:
                logger.warning(
                    "%s cannot be written (%s); going on without it, `status` will be out of date",
                    self._state_file,
                    error.strerror,
                )
            self._disk_is_full = True


class _Child:
    """One child over all its lives. Times are monotonic unless they are shown."""

    def __init__(self, spec: ChildSpec, mark: Mapping[str, str], timing: Timing) -> None:
        self._spec = spec
        self._environment = {**spec.environment, **mark}
        self._timing = timing
        self._process: subprocess.Popen[bytes] | None = None
        self._since = time.time()
        self._started = 0.0
        self._due = 0.0
        self._starts = 0
        self._exit_code: int | None = None
        self._backoff_s = timing.first_backoff_s
        self._quick_deaths = 0
        self._patient_since: float | None = None
        # When it last proved to be well, and whether it ever answered its probe in this life.
        self._well = 0.0
        self._answered = False
        self._answer: Future[bool] | None = None

    def attend(self, probes: ThreadPoolExecutor, *, look: bool) -> None:
        """Start it when that is due, take note of its death, and, on a look, whether it hangs."""
        if self._process is None:
            if time.monotonic() >= self._due:
                self._start()
            return
        exit_code = self._process.poll()
        if exit_code is not None:
            self._process = None
            self._mourn(exit_code)
        elif look:
            _shorten(self._spec.log_file, max_bytes=self._timing.max_log_bytes)
            self._look(self._process, probes)

    def stop(self) -> None:
        """Ask it to end, then make it."""
        process, self._process = self._process, None
        if process is None:
            return
        # One that was stopped would hear of it only when it goes on.
        for number in (signal.SIGTERM, signal.SIGCONT):
            with suppress(ProcessLookupError):
                process.send_signal(number)
        try:
            process.wait(timeout=self._timing.stop_s)
        except subprocess.TimeoutExpired:
            logger.warning(
                "%s did not end within %g s: kill -9", self._spec.name, self._timing.stop_s
            )
            process.kill()
            process.wait()
        self._exit_code, self._since = process.returncode, time.time()
        logger.info("%s stopped", self._spec.name)

    def state(self) -> ChildState:
        """What the state file says of it."""
        process = self._process
        return ChildState(
            name=self._spec.name,
            pid=process.pid if process else 0,
            state="running" if process else "waiting",
            since=round(self._since, 3),
            restarts=max(0, self._starts - 1),
            last_exit_code=self._exit_code,
        )

    @property
    def _hung_s(self) -> float:
        return self._timing.hung_s if self._spec.hung_s is None else self._spec.hung_s

    def _start(self) -> None:
        self._starts += 1
        _shorten(self._spec.log_file, max_bytes=self._timing.max_log_bytes)
        self._started = self._well = time.monotonic()
        self._since = time.time()
        self._answered, self._answer = False, None
        try:
            self._process = self._spawn()
        except OSError as error:
            logger.error("%s cannot be started: %s", self._spec.name, error)
            self._mourn(_NOT_STARTED)
            return
        logger.info("%s started, process %d", self._spec.name, self._process.pid)

    def _spawn(self) -> subprocess.Popen[bytes]:
        try:
            log = self._spec.log_file.open("ab")
        except OSError as error:
            logger.warning("%s goes on without its log: %s", self._spec.name, error)
            return self._popen(None)
        with log:
            return self._popen(log.fileno())

    def _popen(self, log: int | None) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self._spec.command,
            env=self._environment,
            cwd=self._spec.cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL if log is None else log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches the supervisor alone
        )

    def _look(self, process: subprocess.Popen[bytes], probes: ThreadPoolExecutor) -> None:
        """Kill a child that has not been well for too long."""
        now = time.monotonic()
        if self._answer is not None and self._answer.done():
            if self._answer.result():
                self._well, self._answered = now, True
            self._answer = None
        if _is_stopped(process.pid):
            patience_s = self._hung_s
        elif self._spec.probe is None:
            self._well = now
            return
        else:
            patience_s = self._hung_s if self._answered else self._timing.first_answer_s
            if self._answer is None:
                self._answer = probes.submit(self._spec.probe)
        if now - self._well > patience_s:
            logger.warning("%s has not answered for %.0f s: kill -9", self._spec.name, patience_s)
            process.kill()

    def _mourn(self, exit_code: int) -> None:
        """Say when it is to be started again. Raises EngineError once that is hopeless."""
        now, timing = time.monotonic(), self._timing
        self._exit_code, self._since = exit_code, time.time()
        if now - self._started >= timing.settled_s:
            self._backoff_s, self._quick_deaths = timing.first_backoff_s, 0
            self._patient_since = None
        if exit_code in self._spec.patience and self._is_patient(now):
            wait_s = self._spec.patience[exit_code]
        else:
            if now - self._started < timing.settled_s:
                self._quick_deaths += 1
            wait_s = self._backoff_s
            self._backoff_s = min(2 * self._backoff_s, timing.max_backoff_s)
        if self._quick_deaths >= timing.max_quick_deaths:
            raise EngineError(
                f"{self._spec.name} ended {self._quick_deaths} times in a row within "
                f"{timing.settled_s:g} s of its start, the last time {_how(exit_code)}. The end of its log "
                f"is below; mend what it names, then start this again. The whole log: "
                f"{self._spec.log_file}\n{_tail(self._spec.log_file)}"
            )
        self._due = now + wait_s
        logger.warning(
            "%s ended %s after %.0f s; starting it again in %g s",
            self._spec.name,
            _how(exit_code),
            now - self._started,
            wait_s,
        )

    def _is_patient(self, now: float) -> bool:
        if self._patient_since is None:
            self._patient_since = now
        return now - self._patient_since <= self._timing.max_patience_s


@contextmanager
def _signals(stop: threading.Event) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        # Only the main one may take signals.
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        stop.set()

    before = {number: signal.signal(number, handle) for number in _STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_stopped(pid: int) -> bool:
    with suppress(psutil.Error):
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    return False


def _how(exit_code: int) -> str:
    return f"by signal {-exit_code}" if exit_code < 0 else f"with exit code {exit_code}"


def _tail(log_file: Path) -> str:
    try:
        lines = log_file.read_text(errors="replace").splitlines()
    except OSError as error:
        return f"  (it cannot be read: {error.strerror})"
    return "\n".join(f"  {line}" for line in lines[-_TAIL_LINES:])


def _shorten(log_file: Path, *, max_bytes: int) -> None:
    """Keep the newest half of a log that has grown too long; its writer appends and does not notice."""
    try:
        if log_file.stat().st_size <= max_bytes:
            return
        with log_file.open("r+b") as file:
            file.seek(-max_bytes // 2, 2)
            file.readline()
            newest = file.read()
            file.truncate(0)
        with log_file.open("ab") as file:
            file.write(newest)
    except FileNotFoundError:
        return
    except OSError as error:
        logger.warning("%s cannot be shortened: %s", log_file, error)
