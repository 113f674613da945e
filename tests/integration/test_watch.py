"""`server up --watch-port`: reports beside a real SuperLink, found by `server status`, gone with it."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # ships no types
import pytest

from server.report.serving_address import answers
from tests.integration.commands import Commands
from tests.integration.enrolled import must, plan_federation

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


def test_reports_are_served_while_up_runs_and_by_a_process_that_draws_nothing(
    tmp_path: Path,
) -> None:
    federation = plan_federation(tmp_path)
    with Commands(federation) as commands:
        address = f"127.0.0.1:{federation.port}"
        must(commands, "server", "init", federation.coordinator, "--address", address)
        folder = str(federation.coordinator)
        with commands.start("server", "up", folder, "--watch-port", "0") as up:
            commands.wait_for_superlink()
            commands.wait_until(lambda: bool(commands.status()["reports"]), "its address is told")
            told = commands.status()
            port = int(told["reports"].removeprefix("http://127.0.0.1:").rstrip("/"))
            commands.wait_until(lambda: answers(port), "the reports answer")
            (pid,) = [one["pid"] for one in told["processes"] if one["name"] == "reports"]
            drawn_with = {Path(one.path).name for one in psutil.Process(pid).memory_maps()}
            assert not [name for name in drawn_with if "torch" in name or "ft2font" in name]
            listening = psutil.Process(pid).net_connections(kind="inet")
            assert {one.laddr.ip for one in listening} == {"127.0.0.1"}
            up.send_signal(signal.SIGTERM)
            up.communicate(timeout=180)
        assert not answers(port)
        assert commands.status()["reports"] == ""
