"""Flower's own simulation engine (Ray), behind a SuperLink that lives as long as one run.

FLWR_HOME, port, Ray's temporary folder and every process belong to one call of `run_on_flower`; the
processes are gone when it returns, however it returns.
"""

from __future__ import annotations

import logging
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import tomli_w

from common.errors import EngineError
from common.flower_process import find_command, flower_environment, free_port
from common.process_guard import guarded_processes
from server.flower_control import ControlError, FlowerControl

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
    status_interval_s: float = 5.0  # each look costs about a second of one core

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
        control = FlowerControl(
            engine.state_dir, _CONNECTION, env, timeout_s=engine.startup_timeout_s
        )
        superlink, port = _start_superlink(engine, control)
        guard.started.append(superlink)
        _wait_for_answer(engine, superlink, port)
        run_id = _submit(engine, control, superlink, run_config)
        logger.info("run %s submitted to Flower's engine, %d sites", run_id, engine.num_sites)
        status, details = _wait(engine, control, superlink, run_id, on_poll)
        control.save_log(run_id, engine.run_log)
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
    changes = {**environment, "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": str(ray_dir)}
    env = flower_environment(engine.state_dir, **changes)
    env.pop("RAY_ADDRESS", None)  # else ray.init joins that cluster and refuses num_cpus
    return env


def _start_superlink(
    engine: FlowerEngine, control: FlowerControl
) -> tuple[subprocess.Popen[bytes], int]:
    """Start a SuperLink on a free loopback port; return it and the port."""
    port = free_port()
    control.connect(f"127.0.0.1:{port}", root_certificates=None)
    env = control.environment
    command = [find_command(env, "flower-superlink"), "--simulation", "--insecure"]
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
    control: FlowerControl,
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
    try:
        return control.submit(engine.app_dir, overrides, federation=federation)
    except ControlError as error:
        _require_alive(engine, superlink)
        raise EngineError(
            f"Flower refused the run: {error}; correct {overrides} or the app in {engine.app_dir}, or "
            f"read {engine.superlink_log}"
        ) from None


def _wait(
    engine: FlowerEngine,
    control: FlowerControl,
    superlink: subprocess.Popen[bytes],
    run_id: str,
    on_poll: Callable[[], None],
) -> tuple[str, str]:
    """Return the run's final status and its details, calling on_poll all the while."""

    def poll() -> None:
        on_poll()
        _require_alive(engine, superlink)
        time.sleep(engine.poll_interval_s)

    submitted = time.monotonic()
    failures = 0
    asking = replace(control, timeout_s=_MAX_STATUS_S, on_wait=poll)
    while True:
        asked = time.monotonic()
        try:
            status, details = asking.status(run_id)
        except ControlError as error:
            failures += 1
            logger.warning("flwr ls failed %d times: %s", failures, error)
            if failures >= _MAX_STATUS_FAILURES:
                raise EngineError(
                    f"flwr ls did not tell the state of run {run_id} {failures} times in a row "
                    f"({error}); read {engine.superlink_log}"
                ) from None
        else:
            failures = 0
            if status.startswith("finished"):
                return status, details
            if status != "running" and time.monotonic() > submitted + engine.startup_timeout_s:
                raise EngineError(
                    f"Flower's run {run_id} is still {status!r} after {engine.startup_timeout_s:g} s; "
                    f"raise startup_timeout_s or read {engine.superlink_log}"
                )
        while time.monotonic() < asked + engine.status_interval_s:
            poll()
