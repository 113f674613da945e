"""A coordinator and two hospitals by the product's own commands, in which anything can be killed.

with ChaosFederation(folder) as federation:
    federation.order_run()
    kill = federation.kill_at("in-merge")
    federation.recovered(kill)
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil  # type: ignore[import-untyped]  # ships no types

from common.config import Scalar
from server.run_state import run_state
from tests.chaos.checks import Findings, Trail, check_trail
from tests.chaos.points import VARIABLE, arm, disarm, environment, kills
from tests.integration.commands import Commands, write_federation

# A point may be a whole round away; and when the machine is busy, a round takes its time.
KILL_TIMEOUT_S = 400.0
RECOVERY_TIMEOUT_S = 400.0
_UP_TIMEOUT_S = 300.0
_STOP_TIMEOUT_S = 240.0

SETTINGS: dict[str, Scalar] = {
    "train.rounds": 400,
    "train.local-steps": 3,
    "train.optimizer": "sgd",
    "train.learning-rate": 0.02,
    "privacy.unit": "record",
    # Given, since calibrating it for so many rounds takes longer than many of them.
    "privacy.noise-multiplier": 1.0,
    "privacy.accountant": "rdp",
    "federation.min-sites": 2,
    "federation.quorum": 2,
    "federation.deadline-s": 90.0,
    "federation.max-retries": 5,
}


@dataclass(frozen=True)
class Process:
    """What can be killed from outside. command: a part of its command line. side: of whose FLWR_HOME."""

    command: str
    side: str


# "site" stands for either of the hospitals.
PROCESSES = {
    "SuperLink": Process("server.superlink", "server"),
    "superexec": Process("flower-superexec", "server"),
    "ServerApp": Process("flwr-serverapp", "server"),
    "SuperNode": Process("client.supernode", "site"),
    "ClientApp": Process("flwr-clientapp", "site"),
    "agent": Process("client agent", "site"),
}


@dataclass(frozen=True)
class Kill:
    """A death. at: Unix seconds. rounds_before: how many were committed then."""

    what: str
    pid: int
    at: float
    rounds_before: int


class TimeoutExpiredError(AssertionError):
    """Something did not happen in time; the text ends with the tails of all logs."""


class OverError(AssertionError):
    """The run, or who keeps it going, has ended for good; the text ends with the tails of all logs."""


class ChaosFederation:
    """The folder, the processes, and what was committed so far."""

    def __init__(self, folder: Path, changes: dict[str, Scalar] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder.resolve()
        self.chaos = self.folder / "chaos"
        self._files = write_federation(self.folder, {**SETTINGS, **(changes or {})})
        self.run_dir = self.folder / "run"
        self._commands = _MarkedCommands(self._files, environment(self.chaos))

    def __enter__(self) -> Self:
        """Start everything; return once both hospitals run."""
        self._commands.__enter__()
        try:
            self._commands.up("server")
            self._commands.wait_for_superlink()
            for site in self.sites:
                self._commands.enrol(site)
                self._commands.up(site)
        except BaseException:
            self._commands.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._commands.__exit__(None, None, None)

    def order_run(self) -> None:
        """Ask for the run."""
        code, output = self._commands.run(
            *("server", "run", str(self._files.run_file), str(self._files.coordinator)),
            *("--out", str(self.run_dir), "--detach"),
            timeout_s=_UP_TIMEOUT_S,
        )
        assert code == 0, output

    @property
    def sites(self) -> list[str]:
        """The hospitals' names."""
        return list(self._files.sites)

    def events(self) -> list[dict[str, Any]]:
        """The run's history."""
        return self._commands.events(self.run_dir)

    def rounds(self) -> list[dict[str, Any]]:
        """The committed rounds, as the history tells them."""
        return [event for event in self.events() if event["event"] == "round"]

    def kill_at(self, point: str, *, timeout_s: float = KILL_TIMEOUT_S, **narrowing: Any) -> Kill:
        """Arm a point and wait until somebody has died of it."""
        before = len(kills(self.chaos, point))
        arm(self.chaos, point, **narrowing)
        try:
            self.wait_until(
                lambda: len(kills(self.chaos, point)) > before, f"a kill at {point}", timeout_s
            )
        except TimeoutExpiredError:
            disarm(self.chaos, point)
            raise
        death = kills(self.chaos, point)[-1]
        rounds = sum(event["time"] <= death["time"] for event in self.rounds())
        # That round is safe, and only has to be told.
        rounds += point == "after-checkpoint-rename"
        return Kill(point, int(death["pid"]), float(death["time"]), rounds)

    def kill_process(self, name: str, rng: random.Random, *, site: str = "") -> Kill:
        """Kill a process from outside, of one hospital or the other where both have it."""
        found: list[psutil.Process] = []

        def is_there() -> bool:
            found[:] = self.processes(name, site=site)
            return bool(found)

        self.wait_until(is_there, f"a {name} to kill", KILL_TIMEOUT_S)
        process = rng.choice(sorted(found, key=lambda one: one.pid))
        at, rounds = time.time(), len(self.rounds())
        process.kill()
        return Kill(name, process.pid, at, rounds)

    def outage(self, seconds: float) -> Kill:
        """Take the SuperLink away for so long, as if its machine were off the net; return its end.

        Its supervisor is halted (SIGSTOP) meanwhile, and with it the keeper of runs: whoever could
        start it again is away too. ServerApp, superexec and hospitals live and find nobody.
        """
        up = self._commands.ups["server"]
        (superlink,) = self.processes("SuperLink")
        up.send_signal(signal.SIGSTOP)
        try:
            superlink.kill()
            rounds = len(self.rounds())
            time.sleep(seconds)
            assert len(self.rounds()) <= rounds + 1, "who could commit a round without a SuperLink?"
        finally:
            up.send_signal(signal.SIGCONT)
        return Kill(f"SuperLink away {seconds:g} s", superlink.pid, time.time(), len(self.rounds()))

    def recovered(self, kill: Kill) -> float:
        """Wait for the round after a kill; return how many seconds after it that was committed."""
        self.wait_until(
            lambda: len(self.rounds()) > kill.rounds_before,
            f"a round after the kill of {kill.what}",
            RECOVERY_TIMEOUT_S,
        )
        return float(self.rounds()[kill.rounds_before]["time"]) - kill.at

    def wait_for_round(self) -> float:
        """Wait for the next round to be committed; return how long the last one took."""
        before = len(self.rounds())
        self.wait_until(lambda: len(self.rounds()) > before, "another round", RECOVERY_TIMEOUT_S)
        times = [event["time"] for event in self.rounds()[-2:]]
        return float(times[-1] - times[0])

    def processes(self, name: str, *, site: str = "") -> list[psutil.Process]:
        """The living processes of a kind that this federation started. site: "" is every hospital."""
        kind = PROCESSES[name]
        sides = ["server"] if kind.side == "server" else [site] if site else self.sites
        found = []
        for side in sides:
            for process in self._commands.processes(side):
                with suppress(psutil.Error):
                    if (
                        any(kind.command in part for part in process.cmdline())
                        and process.status() != psutil.STATUS_ZOMBIE
                    ):
                        found.append(process)
        return found

    def stop(self) -> list[str]:
        """Stop the run by its command and everybody by SIGTERM; return what still lives after that."""
        if not run_state(self.events(), held=False).is_over:
            code, output = self._commands.run(
                "server", "stop", str(self._files.coordinator), timeout_s=_UP_TIMEOUT_S
            )
            assert code == 0, output
        for process in self._commands.ups.values():
            process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        while self._ours() and time.monotonic() < deadline:
            for process in self._commands.ups.values():
                process.poll()
            time.sleep(0.5)
        return self._ours()

    def check(self) -> Findings:
        """Compare all files that are left."""
        sites = {name: self._files.site(name) for name in self.sites}
        return check_trail(Trail(self.run_dir, self._files.coordinator, sites))

    def tails(self) -> str:
        """The last lines of every log."""
        return self._commands.tails()

    def wait_until(self, condition: Callable[[], object], what: str, timeout_s: float) -> None:
        """Return once a condition holds. Raises TimeoutExpiredError, or OverError when it never will."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            ended = [name for name, up in self._commands.ups.items() if up.poll() is not None]
            if ended:
                raise OverError(f"{', '.join(ended)} ended; awaited: {what}\n{self.tails()}")
            state = run_state(self.events(), held=False)
            if state.is_over:
                raise OverError(
                    f"the run is over, {state.kind} ({state.code}: {state.message}); awaited: {what}\n"
                    f"{self.tails()}"
                )
            if time.monotonic() > deadline:
                raise TimeoutExpiredError(f"not within {timeout_s:g} s: {what}\n{self.tails()}")
            time.sleep(0.25)

    def _ours(self) -> list[str]:
        """Command lines of living processes that have our variable, this one and its guard apart."""
        found = []
        guards = {os.getpid(), *(child.pid for child in psutil.Process().children())}
        ups = {up.pid for up in self._commands.ups.values()}
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                ours = process.environ().get(VARIABLE) == str(self.chaos)
                alive = process.status() != psutil.STATUS_ZOMBIE
                if ours and alive and (process.pid not in guards or process.pid in ups):
                    found.append(" ".join(process.cmdline()))
        return found


class _MarkedCommands(Commands):
    """Whose processes have the points."""

    def __init__(self, federation: Any, variables: dict[str, str]) -> None:
        super().__init__(federation)
        self._variables = variables

    def __enter__(self) -> Self:
        super().__enter__()
        self._environment.update(self._variables)
        return self
