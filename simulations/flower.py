"""Flower's own simulation engine (Ray), behind a SuperLink that lives as long as one run.

FLWR_HOME, port, Ray's temporary folder and every process belong to one call of `run_on_flower`; the
processes are gone when it returns, however it returns.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import tomli_w

from common.errors import EngineError
from simulations.process_guard import guarded_processes

logger = logging.getLogger(__name__)

_CONNECTION = "sim"
_MAX_STATUS_FAILURES = 5
_MAX_STATUS_S = 60.0
_LONGEST_RAY_DIR = 39  # Ray adds up to 68 characters for its sockets; Linux allows 107 in all


@dataclass(frozen=True, slots=True)
class FlowerEngine:
    """Where Flower's engine works and what each simulated site may use.

    app_dir: the folder of the app's pyproject.toml. state_dir: FLWR_HOME and the logs; it is kept.
    num_cpus // cpus_per_site sites train at a time; Flower 1.41 refuses fractions of a CPU.
    gpus_per_site = 0.0 hides the GPUs from the sites.
    """

    app_dir: Path
    state_dir: Path
    num_sites: int
    num_cpus: int = 2
    cpus_per_site: int = 1
    num_gpus: int = 0
    gpus_per_site: float = 0.0
    startup_timeout_s: float = 120.0  # each of: SuperLink answers; the submitted run is running
    poll_interval_s: float = 0.5
    status_interval_s: float = 2.0  # each look costs about a second of one core

    def __post_init__(self) -> None:
        """Raise EngineError where Flower would start everything first and fail then."""
        if self.num_sites < 1:
            raise EngineError(f"num_sites is {self.num_sites}; a simulation needs at least 1 site")
        if self.cpus_per_site < 1 or self.num_cpus < self.cpus_per_site:
            raise EngineError(
                f"cpus_per_site is {self.cpus_per_site} of num_cpus {self.num_cpus}; "
                "give a site at least 1 CPU and no more than there are"
            )
        if self.gpus_per_site > self.num_gpus:
            raise EngineError(
                f"gpus_per_site is {self.gpus_per_site} of num_gpus {self.num_gpus}; "
                "lower gpus_per_site or raise num_gpus"
            )

    @property
    def superlink_log(self) -> Path:
        """What SuperLink and SuperExec wrote."""
        return self.state_dir / "superlink.log"

    @property
    def run_log(self) -> Path:
        """What the ServerApp and the ClientApps wrote; there once the run has ended."""
        return self.state_dir / "run.log"


def _do_nothing() -> None:
    pass


def run_on_flower(
    engine: FlowerEngine,
    *,
    run_config: Mapping[str, str | int | float | bool],
    environment: Mapping[str, str],
    on_poll: Callable[[], None] = _do_nothing,
) -> None:
    """Run the app once on Flower's simulation engine; return when the run has completed.

    run_config: flat dotted keys, each of them present in the app's [tool.flwr.app.config].
    environment: seen by the ServerApp and by every ClientApp. on_poll: called about twice a second.
    The ServerApp's working folder is state_dir: paths in run_config and environment are absolute.
    Raises EngineError if a process does not start or dies, if the run is refused, or if it ends
    other than completed. Whatever was started has ended when this returns or raises.
    """
    engine = replace(engine, app_dir=engine.app_dir.resolve(), state_dir=engine.state_dir.resolve())
    engine.state_dir.mkdir(parents=True, exist_ok=True)
    engine.run_log.unlink(missing_ok=True)
    with _ray_folder() as ray_dir, guarded_processes(engine.superlink_log, ray_dir) as guard:
        env = {**_child_environment(engine, environment, ray_dir), **guard.mark}
        superlink, port = _start_superlink(engine, env)
        guard.started.append(superlink)
        _wait_for_answer(engine, superlink, port)
        run_id = _submit(engine, env, superlink, run_config)
        logger.info("run %s submitted to Flower's engine, %d sites", run_id, engine.num_sites)
        status, details = _wait(engine, env, superlink, run_id, on_poll)
        _save_run_log(engine, env, run_id)
    on_poll()
    if status != "finished:completed":
        raise EngineError(
            f"Flower's run {run_id} ended as {status!r} ({details}); read {engine.run_log}, then "
            f"{engine.superlink_log}, or repeat the run with the inline engine"
        )
    logger.info("run %s completed on Flower's engine", run_id)


@contextmanager
def _ray_folder() -> Iterator[Path]:
    """Give a folder whose name leaves Ray's sockets below the system's limit."""
    root = Path(tempfile.gettempdir())
    if len(str(root / "ray-12345678")) > _LONGEST_RAY_DIR:
        root = Path("/tmp")
    # A leftover file must not hide how the run ended.
    with tempfile.TemporaryDirectory(prefix="ray-", dir=root, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _child_environment(
    engine: FlowerEngine, environment: Mapping[str, str], ray_dir: Path
) -> dict[str, str]:
    """Merge what is inherited, what the caller wants and what the engine relies on."""
    env = {**os.environ, **environment}
    env.pop("RAY_ADDRESS", None)  # else ray.init joins that cluster and refuses num_cpus
    bin_dir = Path(sys.executable).parent  # Flower looks its commands up by bare name
    return {
        **env,
        "PATH": os.pathsep.join([str(bin_dir), env.get("PATH", os.defpath)]),
        "FLWR_HOME": str(engine.state_dir),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": str(ray_dir),
    }


def _start_superlink(
    engine: FlowerEngine, env: Mapping[str, str]
) -> tuple[subprocess.Popen[bytes], int]:
    """Start a SuperLink on a free loopback port; return it and the port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    connection = {"address": f"127.0.0.1:{port}", "insecure": True}
    (engine.state_dir / "config.toml").write_text(
        tomli_w.dumps({"superlink": {"default": _CONNECTION, _CONNECTION: connection}})
    )
    command = [_find(env, "flower-superlink"), "--simulation", "--insecure"]
    command += ["--disable-runtime-dependency-installation"]
    command += ["--isolation", "subprocess", "--host", "127.0.0.1", "--port", str(port)]
    with engine.superlink_log.open("ab") as log:
        superlink = subprocess.Popen(
            command,
            env=env,
            cwd=engine.state_dir,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches the caller alone
        )
    return superlink, port


def _wait_for_answer(engine: FlowerEngine, superlink: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + engine.startup_timeout_s
    while time.monotonic() < deadline:
        _require_alive(engine, superlink)
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
            return
        time.sleep(0.1)
    raise EngineError(
        f"Flower's SuperLink did not answer on port {port} within {engine.startup_timeout_s:g} s; "
        f"raise startup_timeout_s or read {engine.superlink_log}"
    )


def _require_alive(engine: FlowerEngine, superlink: subprocess.Popen[bytes]) -> None:
    exit_code = superlink.poll()
    if exit_code is not None:
        raise EngineError(
            f"Flower's SuperLink ended with exit code {exit_code} before the run did; "
            f"read the end of {engine.superlink_log}"
        )


def _submit(
    engine: FlowerEngine,
    env: Mapping[str, str],
    superlink: subprocess.Popen[bytes],
    run_config: Mapping[str, str | int | float | bool],
) -> str:
    """Submit the app with its overrides; return Flower's run id."""
    overrides = engine.state_dir / "run-config.toml"
    overrides.write_text(tomli_w.dumps(dict(run_config)), encoding="utf-8")
    federation = (
        f"num-supernodes={engine.num_sites} "
        f"client-resources-num-cpus={engine.cpus_per_site} "
        f"client-resources-num-gpus={engine.gpus_per_site:.6f} "
        f"init-args-num-cpus={engine.num_cpus} init-args-num-gpus={engine.num_gpus}"
    )
    command = ["run", str(engine.app_dir), _CONNECTION, "--run-config", str(overrides)]
    command += ["--format", "json", "--federation-config", federation]
    with _flwr(engine, env, command) as query:
        try:
            output, _ = query.communicate(timeout=engine.startup_timeout_s)
        except subprocess.TimeoutExpired:
            query.kill()
            raise EngineError(
                f"flwr run gave no answer within {engine.startup_timeout_s:g} s; "
                f"raise startup_timeout_s or read {engine.superlink_log}"
            ) from None
    answer = _parse_answer(output)
    if answer.get("success") is not True or not answer.get("run-id"):
        _require_alive(engine, superlink)
        # Flower puts its warnings in front, in a paragraph of their own.
        reason = str(answer.get("error-message", output)).strip().rsplit("\n\n", 1)[-1]
        raise EngineError(
            f"Flower refused the run: {reason}; correct {overrides} or the app in {engine.app_dir}"
        )
    return str(answer["run-id"])


def _wait(
    engine: FlowerEngine,
    env: Mapping[str, str],
    superlink: subprocess.Popen[bytes],
    run_id: str,
    on_poll: Callable[[], None],
) -> tuple[str, str]:
    """Return the run's final status and its details, calling on_poll all the while."""
    submitted = time.monotonic()
    failures = 0
    while True:
        asked = time.monotonic()
        with _flwr(
            engine, env, ["ls", _CONNECTION, "--run-id", run_id, "--format", "json"]
        ) as query:
            while query.poll() is None or time.monotonic() < asked + engine.status_interval_s:
                on_poll()
                _require_alive(engine, superlink)
                if time.monotonic() > asked + _MAX_STATUS_S:
                    query.kill()
                time.sleep(engine.poll_interval_s)
            answer = _parse_answer(query.communicate()[0])
        runs = answer.get("runs")
        if not runs:
            failures += 1
            logger.warning("flwr ls failed %d times: %s", failures, answer.get("error-message"))
            if failures >= _MAX_STATUS_FAILURES:
                raise EngineError(
                    f"flwr ls did not tell the state of run {run_id} {failures} times in a row "
                    f"({answer.get('error-message', 'no answer')}); read {engine.superlink_log}"
                )
            continue
        failures = 0
        status = str(runs[0]["status"])
        if status.startswith("finished"):
            return status, str(runs[0].get("status-details", "no details"))
        if status != "running" and time.monotonic() > submitted + engine.startup_timeout_s:
            raise EngineError(
                f"Flower's run {run_id} is still {status!r} after {engine.startup_timeout_s:g} s; "
                f"raise startup_timeout_s or read {engine.superlink_log}"
            )


def _save_run_log(engine: FlowerEngine, env: Mapping[str, str], run_id: str) -> None:
    """Fetch what the apps printed: Flower sends it to the SuperLink's state and nowhere else."""
    with (
        engine.run_log.open("wb") as log,
        _flwr(engine, env, ["log", run_id, _CONNECTION, "--show"], stdout=log) as query,
    ):
        try:
            query.wait(timeout=_MAX_STATUS_S)
        except subprocess.TimeoutExpired:
            query.kill()
            logger.warning("flwr log gave no answer; %s may be incomplete", engine.run_log)


def _find(env: Mapping[str, str], name: str) -> str:
    executable = shutil.which(name, path=env["PATH"])
    if executable is None:
        raise EngineError(f"{name} is not on PATH {env['PATH']!r}; install flwr[simulation]")
    return executable


def _flwr(
    engine: FlowerEngine,
    env: Mapping[str, str],
    arguments: list[str],
    *,
    stdout: IO[bytes] | int = subprocess.PIPE,
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [_find(env, "flwr"), *arguments],
        env=env,
        cwd=engine.state_dir,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )


def _parse_answer(output: str) -> dict[str, Any]:
    """Flower's JSON answer; it exits 0 for a refusal too, so `success` is all there is to go by."""
    try:
        answer = json.loads(output)
    except json.JSONDecodeError:
        return {"error-message": output.strip()[-2000:] or "no output"}
    return answer if isinstance(answer, dict) else {}
