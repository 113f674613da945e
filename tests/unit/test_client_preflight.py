"""`consilium client check` as a whole: order, states, exit code, and a check that breaks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text
from typer.testing import CliRunner

from client import preflight as module
from client.check_line import CheckLine, failed, passed, warned
from client.check_network import Reach
from client.cli import app
from client.preflight import preflight
from client.preflight_report import preflight_json, preflight_sentence, preflight_table
from client.provisioning import init_site
from client.site_config import SiteConfig
from common.errors import BudgetError, PreflightError
from tests.unit.ready_site import make_ready_site


@pytest.fixture
def site(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> SiteConfig:
    """A site that lacks nothing; its coordinator is tested where there is one."""
    monkeypatch.setattr("common.cli.console._width", 100)
    reach = Reach((passed("coordinator", "answers"),), ahead_s=0.0)
    monkeypatch.setattr(module, "reach_coordinator", lambda config: reach)
    return make_ready_site(tmp_path / "north", tiny_model_dir)


def _check(site: Path, *options: str) -> tuple[str, BaseException | None]:
    result = CliRunner().invoke(app, ["check", "--site", str(site), *options])
    return result.stdout, result.exception


def test_a_ready_site_passes_in_an_order_that_a_person_can_follow(site: SiteConfig) -> None:
    told: list[str] = []
    lines = list(preflight(site.folder, on_check=told.append))
    assert [line.name for line in lines if line.state == "fail"] == []
    assert [line.name for line in lines if line.state == "warn"] == ["patients"]
    assert [line.name for line in lines][:3] == ["python", "libraries", "site.toml"]
    assert [line.name for line in lines][-2:] == ["coordinator", "clock"]
    assert told == [
        "python", "libraries", "policy", "keys", "models", "data", "device", "disk", "coordinator",
    ]  # fmt: skip


def test_the_command_shows_a_table_and_ends_well(site: SiteConfig) -> None:
    shown, error = _check(site.folder)
    assert error is None
    assert "1 warn, 0 fail" in shown
    assert max(map(len, shown.splitlines())) <= 100


def test_a_failure_is_an_error_of_its_own_exit_code(site: SiteConfig) -> None:
    site.signing_key_path.chmod(0o644)
    shown, error = _check(site.folder)
    assert isinstance(error, PreflightError)
    assert error.exit_code == 8
    assert str(error).startswith("failed: modes; ")
    assert "chmod 600" in shown


def test_json_is_the_same_lines_and_the_same_exit_code(site: SiteConfig) -> None:
    site.signing_key_path.chmod(0o644)
    shown, error = _check(site.folder, "--json")
    assert isinstance(error, PreflightError)
    checks = json.loads(shown)["checks"]
    assert {check["name"]: check["state"] for check in checks if check["state"] != "pass"} == {
        "modes": "fail",
        "patients": "warn",
    }
    assert all(set(check) == {"name", "state", "detail", "remedy"} for check in checks)


def test_a_check_that_breaks_is_a_line_without_what_it_broke_on(
    site: SiteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message of an error may quote a record."""

    def broken(config: SiteConfig) -> list[CheckLine]:
        raise ValueError("Mrs. Miller, born 1961")

    def refused(config: SiteConfig) -> list[CheckLine]:
        raise BudgetError("spent; raise it")

    monkeypatch.setitem(module._SITE, "data", broken)
    monkeypatch.setitem(module._SITE, "disk", refused)
    found = {line.name: line for line in preflight(site.folder)}
    assert found["data"].state == "fail"
    assert (
        "the check itself broke: ValueError at test_client_preflight.py line"
        in found["data"].detail
    )
    assert "Miller" not in str(found)
    assert (found["disk"].state, found["disk"].detail) == ("fail", "spent; raise it")
    assert found["coordinator"].state == "pass"


def test_a_site_that_has_not_joined_yet_is_told_what_is_next(tmp_path: Path) -> None:
    init_site(tmp_path / "north", name="north", declared_size=20, unit="record")
    for folder in (tmp_path, tmp_path / "north"):
        *_, line = preflight(folder)
        assert (line.name, line.state) == ("site.toml", "fail")
        assert "consilium client join" in line.remedy


def test_a_folder_of_another_user_is_said_to_be_that(
    site: SiteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path) -> SiteConfig:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(module, "load_site_config", refuse)
    *_, line = preflight(site.folder)
    assert line == failed(
        "site.toml",
        "cannot be read (Permission denied)",
        "run this as the user that owns the folder",
    )


def test_the_table_fits_and_colours_its_words() -> None:
    long = "word " * 60
    lines = [
        passed("a", long),
        warned("b", long, "do " * 60),
        failed("c" * 40, "[red]x", "y" * 150),
    ]
    terminal = Console(width=100, force_terminal=True, color_system="standard", no_color=False)
    with terminal.capture() as capture:
        terminal.print(preflight_table(lines))
    coloured = capture.get()
    assert "\x1b[32mpass\x1b[0m" in coloured
    assert "\x1b[1;31mfail\x1b[0m" in coloured
    shown = Text.from_ansi(coloured).plain
    assert max(map(len, shown.splitlines())) <= 100
    assert "[red]x" in shown
    assert "-> do do" in shown
    assert preflight_sentence(lines) == "1 pass, 1 warn, 1 fail"
    assert json.loads(preflight_json(lines))["checks"][0]["detail"] == long


def test_the_checks_are_loaded_without_torch() -> None:
    """So that a torch that cannot be loaded hides none of them."""
    code = "import sys, client.preflight\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
