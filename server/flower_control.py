"""Asking Flower's Control API by its own command, `flwr`: submit, status, stop, nodes, log.

Each question is a process of its own and costs a second or two of a core: ask rarely.
"""

from __future__ import annotations

import json
import logging
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import tomli_w

from common.errors import EngineError
from common.files import write_atomically
from common.flower_process import find_command

logger = logging.getLogger(__name__)

_WAIT_S = 0.2
_LOG_TIMEOUT_S = 60.0


class ControlError(EngineError):
    """Flower refused, or nothing answered; the message is Flower's reason without its warnings."""


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """A SuperNode as the SuperLink sees it. online_s: for how long now; offline_at: UTC, "" if never."""

    node_id: int
    status: str
    online_s: float
    offline_at: str

    @property
    def online(self) -> bool:
        """Whether its heartbeats come."""
        return self.status == "online"


@dataclass(frozen=True, slots=True)
class FlowerControl:
    """One SuperLink's Control API. home: FLWR_HOME, with the config.toml that `connect` writes.

    environment: of the `flwr` processes; see common/flower_process.py. timeout_s: for one answer.
    on_wait: called several times a second while an answer is awaited; what it raises ends the wait.
    """

    home: Path
    connection: str
    environment: Mapping[str, str]
    timeout_s: float = 60.0
    on_wait: Callable[[], None] = lambda: None

    def connect(self, address: str, *, root_certificates: Path | None) -> None:
        """Write where the SuperLink is; without root_certificates the connection is not encrypted."""
        link: dict[str, Any] = {"address": address}
        if root_certificates is None:
            link["insecure"] = True
        else:
            link["root-certificates"] = str(root_certificates)
        settings = {"superlink": {"default": self.connection, self.connection: link}}
        content = tomli_w.dumps(settings).encode()
        path = self.home / "config.toml"
        # A full disk must not keep a coordinator from starting again.
        if not path.is_file() or path.read_bytes() != content:
            write_atomically(path, content)

    def submit(self, app_dir: Path, overrides: Path, *, federation: str = "") -> str:
        """Submit an app and return Flower's id of the run.

        overrides: a TOML of run config. federation: of the simulation engine. Raises ControlError.
        """
        arguments = ["run", str(app_dir), self.connection, "--run-config", str(overrides)]
        if federation:
            arguments += ["--federation-config", federation]
        answer = self._ask(arguments)
        if not answer.get("run-id"):
            raise ControlError("flwr run named no run id")
        return str(answer["run-id"])

    def status(self, run_id: str) -> tuple[str, str]:
        """Return a run's status, such as "finished:completed", and Flower's details of it."""
        runs = self._ask(["ls", self.connection, "--run-id", run_id]).get("runs")
        if not runs:
            raise ControlError(f"flwr ls knows no run {run_id}")
        return str(runs[0]["status"]), str(runs[0].get("status-details") or "no details")

    def stop(self, run_id: str) -> None:
        """Stop a run; one that is over already is no error. Raises ControlError."""
        try:
            self._ask(["stop", run_id, self.connection])
        except ControlError:
            if not self.status(run_id)[0].startswith("finished"):
                raise

    def nodes(self) -> list[NodeStatus]:
        """Return the SuperNodes that are registered."""
        listed = self._ask(["supernode", "list", self.connection]).get("nodes", [])
        return [
            NodeStatus(
                node_id=int(node["node-id"]),
                status=str(node["status"]),
                online_s=float(node["online-elapsed"]),
                offline_at="" if node["offline-at"] == "N/A" else str(node["offline-at"]),
            )
            for node in listed
            if node["status"] != "unregistered"
        ]

    def register_node(self, public_key: Path) -> None:
        """Let the SuperNode with this key connect. Raises ControlError."""
        self._ask(["supernode", "register", str(public_key), self.connection])

    def unregister_node(self, node_id: int) -> None:
        """Refuse a SuperNode from its next request on, for good. Raises ControlError."""
        self._ask(["supernode", "unregister", str(node_id), self.connection])

    def save_log(self, run_id: str, path: Path) -> None:
        """Fetch what the apps printed: Flower sends it to the SuperLink's state and nowhere else."""
        arguments = ["log", run_id, self.connection, "--show"]
        with path.open("wb") as log, self._started(arguments, stdout=log) as query:
            try:
                query.wait(timeout=_LOG_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                logger.warning("flwr log gave no answer; %s may be incomplete", path)

    def _ask(self, arguments: Sequence[str]) -> dict[str, Any]:
        """Return the answer to a command. It exits 0 for a refusal too: `success` decides."""
        asked = time.monotonic()
        with self._started([*arguments, "--format", "json"]) as query:
            while True:
                self.on_wait()
                try:
                    output, _ = query.communicate(timeout=_WAIT_S)
                    break
                except subprocess.TimeoutExpired:
                    if time.monotonic() > asked + self.timeout_s:
                        raise ControlError(
                            f"flwr {arguments[0]} gave no answer within {self.timeout_s:g} s"
                        ) from None
        answer = _parse_answer(output)
        if answer.get("success") is not True:
            # Flower puts its warnings in front, in a paragraph of their own.
            reason = str(answer.get("error-message", output)).strip().rsplit("\n\n", 1)[-1]
            raise ControlError(reason)
        return answer

    @contextmanager
    def _started(
        self, arguments: Sequence[str], *, stdout: IO[bytes] | int = subprocess.PIPE
    ) -> Iterator[subprocess.Popen[str]]:
        """Give a running `flwr`; it has ended on leaving."""
        query = subprocess.Popen(
            [find_command(self.environment, "flwr"), *arguments],
            env=self.environment,
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        with query:
            try:
                yield query
            finally:
                query.kill()


def _parse_answer(output: str) -> dict[str, Any]:
    try:
        answer = json.loads(output)
    except json.JSONDecodeError:
        return {"error-message": output.strip()[-2000:] or "no output"}
    return answer if isinstance(answer, dict) else {}
