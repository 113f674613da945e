"""A real Flower deployment on loopback: TLS, authenticated SuperNodes, apps in their own processes.

with Deployment(folder, app_dir, server_environment={}) as deployment:
    deployment.add_node("north", node_config={"site-dir": "/abs"}, environment={})
    run_id = deployment.submit({"train.rounds": 2})
    assert deployment.wait(run_id, timeout_s=120) == "finished:completed"
"""

from __future__ import annotations

import json
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import tomli_w

from common.flower_process import flower_environment
from common.process_guard import guarded_processes
from server.flower_control import ControlError, FlowerControl
from tests.integration.certificates import write_node_key, write_server_certificates
from tests.ports import free_port

_CONNECTION = "lab"
_TAIL_LINES = 25
# Each look costs about a second of one core, which the processes that are looked at need.
_STATUS_INTERVAL_S = 4.0

Scalar = str | int | float | bool


class DeploymentError(RuntimeError):
    """A process died, a command was refused or a time ran out; the text ends with every log's tail."""


class Deployment:
    """Processes are named superlink, superexec, supernode-NAME, superexec-NAME, as are their logs.

    folder: FLWR_HOME, keys, state.db and NAME.log. server_environment: seen by the ServerApp, whose
    working folder is folder. Every process ends on leaving, also when the test is killed.
    """

    def __init__(
        self,
        folder: Path,
        app_dir: Path,
        *,
        server_environment: Mapping[str, str] | None = None,
        startup_timeout_s: float = 180.0,
    ) -> None:
        self.folder = folder.resolve()
        self.app_dir = app_dir.resolve()
        self.port = free_port()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._server_environment = dict(server_environment or {})
        self._startup_timeout_s = startup_timeout_s
        self._commands: dict[str, tuple[list[str], dict[str, str]]] = {}
        self._nodes: list[str] = []
        self._stack = ExitStack()
        self._mark: dict[str, str] = {}

    def __enter__(self) -> Self:
        """Start SuperLink and the coordinator's SuperExec; return once the SuperLink answers."""
        scratch = self.folder / "scratch"
        scratch.mkdir(parents=True)
        self._stack.callback(self._reap)
        try:
            guard = self._stack.enter_context(guarded_processes(self.folder / "guard.log", scratch))
            self._mark = guard.mark
            self._start_coordinator()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End every process."""
        self._stack.close()

    def log_file(self, name: str) -> Path:
        """The log of a process."""
        return self.folder / f"{name}.log"

    def start(self, name: str) -> None:
        """Start a process again with the command that it had."""
        command, environment = self._commands[name]
        self._start(name, command, environment)

    def kill(self, name: str) -> None:
        """End a process with kill -9, or take note that it has ended; `start` starts it again."""
        process = self.processes.pop(name)
        process.kill()
        process.wait()

    def add_node(
        self,
        name: str,
        *,
        node_config: Mapping[str, Scalar] | None = None,
        environment: Mapping[str, str] | None = None,
        register: bool = True,
    ) -> None:
        """Start a hospital's SuperNode and SuperExec; `wait_until_online` or `submit` waits for it.

        environment: seen by the ClientApp. register=False leaves the key unknown to the SuperLink.
        """
        private_key, public_key = write_node_key(self.folder, name)
        if register:
            with self._explained():
                self._control.register_node(public_key)
        port = free_port()
        config = " ".join(
            f"{key}={json.dumps(value)}" for key, value in (node_config or {}).items()
        )
        command = ["flower-supernode", "--root-certificates", str(self._ca)]
        command += ["--superlink", f"127.0.0.1:{self.port}"]
        command += ["--auth-supernode-private-key", str(private_key), "--isolation", "process"]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        if config:
            command += ["--node-config", config]
        self._start(f"supernode-{name}", command, {})
        command = ["flower-superexec", "--insecure", "--runtime-api-address", f"127.0.0.1:{port}"]
        self._wait_for(
            lambda: _answers(port),
            f"supernode-{name} answers on port {port}",
            self._startup_timeout_s,
        )
        self._start(f"superexec-{name}", command, dict(environment or {}))
        if register:
            self._nodes.append(name)

    def wait_until_online(self, name: str) -> None:
        """Return once the SuperLink has accepted the node; raise DeploymentError if it refuses."""
        log = self.log_file(f"supernode-{name}")
        self._wait_for(
            lambda: "SuperNode ID:" in log.read_text(errors="replace"),
            f"supernode-{name} is accepted",
            self._startup_timeout_s,
        )

    def submit(self, run_config: Mapping[str, Scalar] | None = None) -> str:
        """Submit the app to all nodes, once they are online; return Flower's run id."""
        for name in self._nodes:
            self.wait_until_online(name)
        overrides = self.folder / "run-config.toml"
        overrides.write_text(tomli_w.dumps(dict(run_config or {})), encoding="utf-8")
        with self._explained():
            return self._control.submit(self.app_dir, overrides)

    def status(self, run_id: str) -> tuple[str, str]:
        """Return a run's status, such as "finished:completed", and Flower's details of it."""
        with self._explained():
            return self._control.status(run_id)

    def wait(self, run_id: str, *, timeout_s: float) -> str:
        """Return the status in which the run finished.

        Raises DeploymentError if a process dies first or the time runs out.
        What the ServerApp wrote, which SuperExec hides, is then in run-ID.log, whatever the status.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self._require_alive()
            status, _ = self.status(run_id)
            if status.startswith("finished"):
                self._control.save_log(run_id, self.log_file(f"run-{run_id}"))
                return status
            time.sleep(_STATUS_INTERVAL_S)
        self._control.save_log(run_id, self.log_file(f"run-{run_id}"))
        raise self._error(f"run {run_id} has not finished within {timeout_s:g} s")

    def tails(self) -> str:
        """The last lines of every log."""
        parts = []
        for log in sorted(self.folder.glob("*.log")):
            lines = log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
            parts.append("\n".join([f"--- {log}", *lines]))
        return "\n".join(parts)

    def _reap(self) -> None:
        for process in self.processes.values():
            process.wait()

    def _start_coordinator(self) -> None:
        self._ca, certificate, key = write_server_certificates(self.folder)
        secret = self.folder / "superexec.secret"
        secret.write_bytes(secrets.token_bytes(32))
        self._control = FlowerControl(
            self.folder, _CONNECTION, self._environment(), timeout_s=self._startup_timeout_s
        )
        self._control.connect(f"127.0.0.1:{self.port}", root_certificates=self._ca)
        command = ["flower-superlink", "--ssl-ca-certfile", str(self._ca)]
        command += ["--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)]
        command += ["--enable-supernode-auth", "--disable-runtime-dependency-installation"]
        command += ["--isolation", "process", "--superexec-auth-secret-file", str(secret)]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--database", str(self.folder / "state.db")]
        self._start("superlink", command, {})
        self._wait_for(
            lambda: _answers(self.port), "the SuperLink answers", self._startup_timeout_s
        )
        command = ["flower-superexec", "--root-certificates", str(self._ca)]
        command += ["--runtime-api-address", f"127.0.0.1:{self.port}"]
        command += ["--superexec-auth-secret-file", str(secret)]
        self._start("superexec", command, self._server_environment)

    def _environment(self) -> dict[str, str]:
        return flower_environment(
            self.folder, FLWR_SUPEREXEC_TASK_POLL_INTERVAL="0.2", **self._mark
        )

    def _start(self, name: str, command: list[str], environment: dict[str, str]) -> None:
        self._commands[name] = (command, environment)
        with self.log_file(name).open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [str(Path(sys.executable).parent / command[0]), *command[1:]],
                env={**self._environment(), **environment},
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except ControlError as error:
            raise self._error(str(error)) from None

    def _wait_for(self, condition: Callable[[], bool], what: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            self._require_alive()
            if time.monotonic() > deadline:
                raise self._error(f"not within {timeout_s:g} s: {what}")
            time.sleep(0.1)

    def _require_alive(self) -> None:
        for name, process in self.processes.items():
            if process.poll() is not None:
                raise self._error(f"{name} ended with exit code {process.returncode}")

    def _error(self, message: str) -> DeploymentError:
        return DeploymentError(f"{message}\n{self.tails()}")


def _answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
        return True
    return False
