"""A coordinator and two hospitals on disk, run by the `consilium` command as people run it.

with Commands(write_federation(folder)) as commands:
    commands.up("server"); commands.up("north"); commands.enrol("north")
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil  # type: ignore[import-untyped]  # ships no types
import tomli_w

from common.config import Scalar, read_toml
from common.flower_process import http_answers
from common.process_guard import guarded_processes
from common.supervisor_state import read_supervisor_state
from server.coordinator import load_coordinator
from simulations.embedded import embedded_model_dir
from tests.integration.certificates import write_node_key, write_server_certificates
from tests.integration.sites import make_lab
from tests.ports import free_port

CONSILIUM = str(Path(sys.executable).parent / "consilium")


@dataclass(frozen=True)
class Federation:
    """Where everything lies: a coordinator's folder, each hospital's in `hospitals`, RUN.toml in `folder`."""

    folder: Path
    coordinator: Path
    hospitals: Path
    port: int
    sites: tuple[str, ...] = ()

    @property
    def run_file(self) -> Path:
        return self.folder / "run.toml"

    def site(self, name: str) -> Path:
        return self.hospitals / name


def write_federation(
    folder: Path,
    changes: dict[str, Scalar] | None = None,
    *,
    host: str = "127.0.0.1",
    num_sites: int = 2,
) -> Federation:
    """Write what `server init`, `client init` and enrolment would.

    host: the IP address at which hospitals reach the coordinator.
    """
    settings = {"model.name": str(embedded_model_dir()), **(changes or {})}
    lab = make_lab(folder, settings, num_sites=num_sites)
    port = free_port()
    address = f"{host}:{port}"
    tls = lab.launch_dir / "tls"
    tls.mkdir()
    write_server_certificates(tls, host=host)
    (lab.launch_dir / "superexec.secret").write_bytes(secrets.token_bytes(32))
    (lab.launch_dir / "coordinator.toml").write_text(
        tomli_w.dumps(
            {
                "server": {
                    "address": address,
                    "bind-host": "0.0.0.0",
                    "local-address": f"127.0.0.1:{port}",
                }
            }
            if host != "127.0.0.1"
            else {"server": {"address": address}}
        )
    )
    for name in lab.roster:
        home = lab.sites / name
        write_node_key(home / "keys", "node")
        (home / "coordinator").mkdir()
        (home / "coordinator" / "ca.crt").write_bytes((tls / "ca.crt").read_bytes())
        settings_of_site = read_toml(home / "site.toml")
        settings_of_site["coordinator"]["address"] = address
        (home / "site.toml").write_text(tomli_w.dumps(settings_of_site))
    run = {
        **lab.config.flat(),
        "model.name": settings["model.name"],
        "evaluation.central-data": "central.jsonl",
    }
    (folder / "run.toml").write_text(tomli_w.dumps(run))
    return Federation(folder, lab.launch_dir, lab.sites, port, tuple(lab.roster))


def _hear_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Commands:
    """Runs `consilium`; whatever it started has ended on leaving, also when the test was killed."""

    def __init__(self, federation: Federation) -> None:
        self.federation = federation
        self.ups: dict[str, subprocess.Popen[bytes]] = {}
        # By who is kept up, "" for all that people give beside: what stands before the command, to run it
        # in a network of its own, or watched.
        self.prefix: dict[str, list[str]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        guard = self._stack.enter_context(guarded_processes(self.federation.folder / "guard.log"))
        self._environment = {
            **os.environ,
            **guard.mark,
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "100",
            "NO_COLOR": "1",
        }
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()
        for process in self.ups.values():
            process.wait()

    def arguments(self, who: str) -> list[str]:
        """The command that keeps somebody up: "server" or the name of a site."""
        if who == "server":
            return ["server", "up", str(self.federation.coordinator)]
        return ["client", "up", "--site", str(self.federation.site(who))]

    def up(self, who: str) -> subprocess.Popen[bytes]:
        """Start `server up`, or `client up` for the site of that name; its output is in WHO.log."""
        log_file = self.federation.folder / f"{who}.log"
        with log_file.open("ab") as log:
            self.ups[who] = subprocess.Popen(
                [*self.prefix.get(who, []), CONSILIUM, *self.arguments(who)],
                env=self._environment,
                cwd=self.federation.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self.ups[who]

    def wait_for_superlink(self) -> None:
        """Return once the SuperLink answers."""
        port = self.federation.port
        self.wait_until(lambda: http_answers("127.0.0.1", port, tls=True), "the SuperLink answers")

    def enrol(self, site: str) -> None:
        """Let a site's SuperNode connect."""
        coordinator = load_coordinator(self.federation.coordinator)
        coordinator.control().register_node(self.federation.site(site) / "keys" / "node.pub")

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start `consilium ARGUMENTS`, its output in a pipe."""
        return subprocess.Popen(
            [*self.prefix.get("", []), CONSILIUM, *arguments],
            env=self._environment,
            cwd=self.federation.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # A shell that runs the tests in the background lets them ignore it, and children inherit that.
            preexec_fn=_hear_interrupts,
        )

    def run(self, *arguments: str, timeout_s: float = 240) -> tuple[int, str]:
        """Run `consilium ARGUMENTS`; return its exit code and output."""
        with self.start(*arguments) as process:
            try:
                output, _ = process.communicate(timeout=timeout_s)
            finally:
                process.kill()
        return process.returncode, output

    def status(self) -> dict[str, Any]:
        """What `server status --json` tells."""
        code, output = self.run("server", "status", str(self.federation.coordinator), "--json")
        assert code == 0, output
        content: dict[str, Any] = json.loads(output)
        return content

    def child(self, who: str, name: str) -> int:
        """The process of a supervised child, 0 while it does not run."""
        state_file = (
            self.federation.coordinator / "up.json"
            if who == "server"
            else self.federation.site(who) / "state" / "up.json"
        )
        state = read_supervisor_state(state_file)
        for child in state.children if state else ():
            if child.name == name and child.is_alive():
                return child.pid
        return 0

    def processes(self, who: str) -> list[psutil.Process]:
        """All processes that work for somebody, its `up` apart: they have its FLWR_HOME."""
        home = (
            self.federation.coordinator / "flower"
            if who == "server"
            else self.federation.site(who) / "state" / "flower"
        )
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if process.environ().get("FLWR_HOME") == str(home):
                    found.append(process)
        return found

    def events(self, run_dir: Path) -> list[dict[str, Any]]:
        """The history of a run so far."""
        path = run_dir / "history.jsonl"
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]

    def wait_until(
        self, condition: Callable[[], object], what: str, *, timeout_s: float = 300
    ) -> None:
        """Return once a condition holds; fail, with the end of every log, when it does not in time."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, (
                f"not within {timeout_s:g} s: {what}\n{self.tails()}"
            )
            time.sleep(0.2)

    def tails(self) -> str:
        """The last lines of every log."""
        parts = []
        for log in sorted(self.federation.folder.rglob("*.log")):
            parts += [f"--- {log}", *log.read_text(errors="replace").splitlines()[-25:]]
        return "\n".join(parts)
