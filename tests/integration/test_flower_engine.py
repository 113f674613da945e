"""The engine on Flower's own simulation runtime, with an app small enough to see through."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # ships no types
import pytest

from common.errors import EngineError
from simulations.flower import FlowerEngine, run_on_flower
from tests.integration.echo_app import write_echo_app

pytestmark = pytest.mark.integration

_ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def app_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_echo_app(tmp_path_factory.mktemp("app"))


def _running_for(state_dir: Path) -> list[str]:
    """Command lines of live processes that have state_dir as FLWR_HOME."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("FLWR_HOME") == str(state_dir):
                found.append(" ".join(process.cmdline()))
        except (psutil.Error, OSError):
            continue
    return found


def test_a_run_completes_and_its_environment_reaches_every_site(
    app_dir: Path, tmp_path: Path
) -> None:
    engine = FlowerEngine(app_dir=app_dir, state_dir=tmp_path / "state", num_sites=2)
    out = tmp_path / "out.json"
    polls: list[float] = []
    run_on_flower(
        engine,
        run_config={"out": str(out), "lora.alpha": 2.0},
        environment={"CONSILIUM_PROBE": "seen by a site"},
        on_poll=lambda: polls.append(time.monotonic()),
    )
    seen = json.loads(out.read_text())
    assert [len(replies) for replies in seen["rounds"]] == [2, 2]
    replies = [reply for replies in seen["rounds"] for reply in replies]
    assert all(reply["same_bytes"] for reply in replies)
    assert {reply["probe"] for reply in replies} == {"seen by a site"}
    partitions = [json.loads(reply["node_config"])["partition-id"] for reply in replies]
    assert sorted(partitions) == [0, 0, 1, 1]
    assert seen["config"]["lora.alpha"] == 2.0
    assert seen["cwd"] == str(engine.state_dir)
    assert len(polls) > 4
    assert engine.run_log.stat().st_size > 0
    assert _running_for(engine.state_dir) == []


def test_a_server_app_that_raises_is_an_engine_error_that_names_the_log(
    app_dir: Path, tmp_path: Path
) -> None:
    engine = FlowerEngine(app_dir=app_dir, state_dir=tmp_path / "state", num_sites=1)
    with pytest.raises(EngineError, match=r"finished:failed.*asked to fail.*run\.log"):
        run_on_flower(engine, run_config={"fail": True}, environment={})
    assert "asked to fail" in engine.run_log.read_text()
    assert _running_for(engine.state_dir) == []


def test_a_key_that_the_app_does_not_have_is_refused_before_anything_runs(
    app_dir: Path, tmp_path: Path
) -> None:
    engine = FlowerEngine(app_dir=app_dir, state_dir=tmp_path / "state", num_sites=1)
    with pytest.raises(EngineError, match=r"refused the run.*run-config\.toml"):
        run_on_flower(engine, run_config={"no-such-key": 1}, environment={})
    assert _running_for(engine.state_dir) == []


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_when_the_caller_is_interrupted_in_the_middle(
    how: signal.Signals, app_dir: Path, tmp_path: Path
) -> None:
    state_dir, out = tmp_path / "state", tmp_path / "out.json"
    code = (
        "import signal, sys; from pathlib import Path\n"
        "from simulations.flower import FlowerEngine, run_on_flower\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "app, state, out = sys.argv[1:]\n"
        "engine = FlowerEngine(app_dir=Path(app), state_dir=Path(state), num_sites=1)\n"
        "run_on_flower(engine, run_config={'out': out, 'endless': True, 'nodes': 1},"
        " environment={})\n"
    )
    caller = subprocess.Popen(
        [sys.executable, "-c", code, str(app_dir), str(state_dir), str(out)],
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 300
        while not out.exists() and time.monotonic() < deadline:
            assert caller.poll() is None
            time.sleep(0.2)
        assert any("raylet" in command for command in _running_for(state_dir))
        caller.send_signal(how)
        caller.wait(timeout=120)
    finally:
        caller.kill()
        caller.wait()
    deadline = time.monotonic() + 120
    while _running_for(state_dir) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert _running_for(state_dir) == []


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"num_sites": 0}, "num_sites is 0"),
        ({"num_sites": 1, "cpus_per_site": 3}, "cpus_per_site is 3 of num_cpus 2"),
        ({"num_sites": 1, "gpus_per_site": 1}, "gpus_per_site is 1 of num_gpus 0"),
    ],
)
def test_resources_that_cannot_be_met_are_refused(settings: dict[str, int], match: str) -> None:
    with pytest.raises(EngineError, match=match):
        FlowerEngine(app_dir=Path(), state_dir=Path(), **settings)
