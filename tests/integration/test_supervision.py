"""A coordinator and two hospitals as people run them: kept alive, looked at, refused twice, stopped."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]  # ships no types
import pytest

from common.locks import lock_holder
from server.run_folder import run_lock
from tests.integration.commands import Commands, Federation, write_federation

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """A coordinator and two hospitals that are up."""
    federation = write_federation(tmp_path_factory.mktemp("federation"), {"train.rounds": 2})
    with Commands(federation) as commands:
        commands.up("server")
        commands.wait_for_superlink()
        for site in federation.sites:
            commands.enrol(site)
            commands.up(site)
        yield commands


def _run_dir(federation: Federation) -> Path:
    return federation.folder / "run"


def _order(federation: Federation, *more: str) -> list[str]:
    out = str(_run_dir(federation))
    order = ["server", "run", str(federation.run_file), str(federation.coordinator), "--out", out]
    return [*order, *more]


def test_a_run_whose_server_app_is_killed_finishes_by_itself(commands: Commands) -> None:
    federation = commands.federation
    run_dir, history = _run_dir(federation), lambda: commands.events(_run_dir(federation))
    with commands.start(*_order(federation)) as follower:
        commands.wait_until(lambda: any(e["event"] == "round" for e in history()), "round 1")
        server_app = psutil.Process(lock_holder(run_lock(run_dir)) or 0)
        assert "flwr-serverapp" in " ".join(server_app.cmdline())
        server_app.kill()

        _check_that_a_second_one_is_refused(commands)

        output, _ = follower.communicate(timeout=200)
    assert follower.returncode == 0, output + commands.tails()
    assert "its ServerApp died" in output
    assert "2 rounds, 2 sites" in output
    assert f"Wrote {run_dir}: adapter/" in output
    kinds = [event["event"] for event in history()]
    assert kinds[0] == "requested"
    assert kinds.count("run-started") == 1
    assert kinds.count("resumed") == 1
    assert kinds.count("round") == 2
    assert kinds[-1] == "finished"
    summary = json.loads((run_dir / "summary.json").read_text())
    assert [one["round"] for one in summary["rounds"]] == [1, 2]


def _check_that_a_second_one_is_refused(commands: Commands) -> None:
    federation = commands.federation
    uid = commands.events(_run_dir(federation))[1]["run"]
    code, said = commands.run(*_order(federation)[:-1], str(federation.folder / "other"))
    assert code == 4
    said = " ".join(said.split())
    assert uid in said
    assert "consilium server stop" in said
    assert not (federation.folder / "other").exists()
    for who in ("server", federation.sites[0]):
        code, said = commands.run(*commands.arguments(who))
        assert code == 5
        said = " ".join(said.split())
        assert f"process {commands.ups[who].pid} is" in said
        assert f"kill {commands.ups[who].pid}" in said


def test_status_asked_right_after_a_kill_tells_what_is_so(commands: Commands) -> None:
    before = commands.status()
    assert before["up"] == commands.ups["server"].pid
    assert [one["state"] for one in before["runs"]] == ["finished"]
    assert before["runs"][0]["round"] == before["runs"][0]["rounds"] == 2
    assert before["advice"] == []
    assert {node["site"]: node["online"] for node in before["nodes"]} == dict.fromkeys(
        commands.federation.sites, True
    )
    was = {one["name"]: one for one in before["processes"]}["superlink"]

    killed = commands.child("server", "superlink")
    os.kill(killed, signal.SIGKILL)
    now = commands.status()
    superlink = {one["name"]: one for one in now["processes"]}["superlink"]
    assert superlink["pid"] != killed
    assert superlink["last_exit_code"] == -9 or not superlink["alive"]

    commands.wait_until(lambda: commands.child("server", "superlink"), "the SuperLink is back")
    commands.wait_for_superlink()
    after = {one["name"]: one for one in commands.status()["processes"]}["superlink"]
    assert after["alive"]
    assert after["restarts"] == was["restarts"] + 1
    code, text = commands.run("server", "status", str(commands.federation.coordinator))
    assert code == 0
    assert "finished, round 2 of 2" in text
    assert "signal 9" in text
    assert max(map(len, text.splitlines())) <= 100


def _is_in_a_round(events: list[dict[str, Any]]) -> bool:
    """Not that of the finished run that was there before."""
    kinds = [event["event"] for event in events]
    return "round-started" in kinds and "finished" not in kinds


def test_a_run_that_is_stopped_stays_stopped_until_it_is_resumed(commands: Commands) -> None:
    federation = commands.federation
    run_dir = _run_dir(federation)
    # With a warm agent a round takes seconds; it must not be over before it is stopped.
    order = _order(federation, "--set", "train.rounds=6")
    with commands.start(*order, "--force") as follower:
        commands.wait_until(lambda: _is_in_a_round(commands.events(run_dir)), "round 1")
        follower.send_signal(signal.SIGINT)
        said, _ = follower.communicate(timeout=120)
    assert follower.returncode == 130
    assert "Detached: run" in said
    assert "goes on" in said
    assert lock_holder(run_lock(run_dir)) is not None
    code, said = commands.run("server", "stop", str(federation.coordinator), timeout_s=90)
    assert code == 0, said
    assert "--resume" in said
    assert lock_holder(run_lock(run_dir)) is None
    # Longer than the keeper's first back-off and two of its looks.
    time.sleep(10)
    assert lock_holder(run_lock(run_dir)) is None
    status = commands.status()["runs"][-1]
    assert (status["state"], status["code"]) == ("stopped", "stopped")
    assert commands.run("server", "stop", str(federation.coordinator))[0] == 2

    code, output = commands.run(*order, "--resume", timeout_s=200)
    assert code == 0, output + commands.tails()
    assert "6 rounds, 2 sites" in output


def test_a_terminated_up_leaves_no_process_behind(commands: Commands) -> None:
    everybody = ["server", *commands.federation.sites]
    assert all(commands.processes(who) for who in everybody)
    for who in everybody:
        commands.ups[who].terminate()
    for who in everybody:
        assert commands.ups[who].wait(timeout=180) == 0, commands.tails()
        assert commands.processes(who) == []
    status = commands.status()
    assert status["up"] is None
    assert status["nodes"] is None
    assert not any(one["alive"] for one in status["processes"])
    assert "consilium server up" in status["advice"][0]
