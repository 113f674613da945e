"""The `consilium` command: its groups, its exit codes, and errors as one paragraph."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from common import cli
from common.errors import BudgetError, ConfigError, ConsiliumError, QuorumError
from common.model_folder import digest_model


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level, environment = list(root.handlers), root.level, dict(os.environ)
    yield
    root.handlers[:], root.level = handlers, level
    for name in ("common", "client", "server", "simulations", "transformers", "bitsandbytes",
                 "peft", "flwr"):  # fmt: skip
        logging.getLogger(name).setLevel(logging.NOTSET)
    for name in set(os.environ) - set(environment):
        del os.environ[name]


def _command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from common.cli import main; main()", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"},
        timeout=120,
    )


def _main(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int:
    """Run main() with a command that ends in `error`; return the exit code."""
    app = typer.Typer()

    @app.command()
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "build_app", lambda: app)
    monkeypatch.setattr(sys, "argv", ["consilium"])
    with pytest.raises(SystemExit, match=r"^\d+$") as caught:
        cli.main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_help_lists_the_groups_and_ends_well() -> None:
    done = CliRunner().invoke(cli.build_app(), ["--help"])

    assert done.exit_code == 0
    assert "no record leaves any of them" in done.stdout
    for group in ("model", "simulate", "demo"):
        assert group in done.stdout


def test_a_list_of_digests_is_named_as_its_file_is(tiny_model_dir: Path, tmp_path: Path) -> None:
    listed = tmp_path / "list [a].txt"
    words = ["model", "digest", str(tiny_model_dir), "--write", str(listed)]
    done = CliRunner().invoke(cli.build_app(), words)
    assert f"Wrote {listed}: " in done.stderr.replace("\n", "")


def test_model_digest_prints_the_digest_and_nothing_else(tiny_model_dir: Path) -> None:
    done = CliRunner().invoke(cli.build_app(), ["model", "digest", str(tiny_model_dir)])

    assert done.exit_code == 0
    assert done.stdout == digest_model(tiny_model_dir) + "\n"


def test_unusable_model_folder_ends_with_one_paragraph_and_no_traceback(tmp_path: Path) -> None:
    done = _command("model", "digest", str(tmp_path))

    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error (model): model folder ")
    assert "lacks config.json" in done.stderr
    assert "Traceback" not in done.stderr
    assert "\n\n" not in done.stderr.strip()


def test_unknown_command_is_a_usage_error() -> None:
    done = CliRunner().invoke(cli.build_app(), ["nonsense"])

    assert done.exit_code == 2
    assert "No such command 'nonsense'" in done.output


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("a [bold]literal[/] bracket"), 2),
        (QuorumError("one of two sites"), 3),
        (BudgetError("spent"), 1),
        (ConsiliumError("something"), 1),
    ],
)
def test_error_ends_with_its_exit_code_its_wire_code_and_its_own_words(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: ConsiliumError,
    code: int,
) -> None:
    assert _main(monkeypatch, error) == code

    captured = capsys.readouterr()
    assert captured.err == f"error ({error.code}): {error}\n"
    assert captured.out == ""


def test_what_this_user_may_not_read_is_said_with_its_name_and_the_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "locked").mkdir(mode=0)
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def look() -> None:
        user = os.geteuid()
        # Nothing is locked for root.
        os.seteuid(user or 65534)
        try:
            (tmp_path / "locked" / "site.toml").is_file()
        finally:
            os.seteuid(user)

    monkeypatch.setattr(cli, "build_app", lambda: app)
    monkeypatch.setattr(sys, "argv", ["consilium"])
    with pytest.raises(SystemExit, match="^2$"):
        cli.main()
    said = capsys.readouterr().err.replace("\n", "")
    assert "error (config): " in said
    assert "locked/site.toml is not to be read or written by this user (Permission denied)" in said


def test_interrupt_ends_with_130_and_says_that_what_was_saved_stands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main(monkeypatch, KeyboardInterrupt()) == cli.INTERRUPTED == 130
    assert capsys.readouterr().err == "interrupted; what was saved stands\n"


def test_programming_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def fail() -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(cli, "build_app", lambda: app)
    monkeypatch.setattr(sys, "argv", ["consilium"])
    with pytest.raises(ZeroDivisionError, match="a bug"):
        cli.main()


def test_groups_are_found_by_entry_point_and_nothing_else_is_imported() -> None:
    code = (
        "import sys, common.cli\n"
        "print([m for m in ('server', 'client', 'simulations', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


def test_log_is_quiet_unless_asked_for() -> None:
    cli.set_up_logging(verbose=False)
    assert not logging.getLogger("server.rounds").isEnabledFor(logging.INFO)
    assert logging.getLogger("server.rounds").isEnabledFor(logging.WARNING)

    cli.set_up_logging(verbose=True)
    assert logging.getLogger("server.rounds").isEnabledFor(logging.INFO)
    assert not logging.getLogger("urllib3").isEnabledFor(logging.INFO)


def test_a_sentence_is_said_to_the_letter(capsys: pytest.CaptureFixture[str]) -> None:
    said = "Wrote /srv/[/v2]/:x:/run, fe80:ab:cd"
    cli.say(said)
    assert capsys.readouterr().out == f"{said}\n"
