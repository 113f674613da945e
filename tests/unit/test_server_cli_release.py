"""`consilium server export`, as a person gives it."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from common.errors import CheckpointError, ConfigError, DataError
from server.cli import app
from tests.unit.finished import finished_config, write_finished_run


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.cli.console._width", 160)


@pytest.fixture
def run_dir(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return write_finished_run(tmp_path / "run", tiny_model_dir, finished_config()).path


def server(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_export_says_what_it_measured_and_what_it_wrote_where(run_dir: Path, form: str) -> None:
    said = server("export", run_dir, "--format", form)
    assert "loss on 6 fixed texts" in said
    assert "the export, loaded back, float32" in said
    assert "adapter on the base as the run had it, nf4" in said
    assert f"Wrote {run_dir / 'export' / form}: " in said.replace("\n", "")
    assert (run_dir / "export" / form / "export.json").is_file()


def test_export_measures_on_the_records_that_are_named(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "some.jsonl").write_text('{"instruction": "Is it?", "output": "It is."}\n' * 3)
    said = server("export", run_dir, "--data", tmp_path / "some.jsonl", "--out", tmp_path / "out")
    assert "loss on 3 central records" in said
    with pytest.raises(DataError, match="no records at"):
        server("export", run_dir, "--data", tmp_path / "none.jsonl", "--out", tmp_path / "other")


def test_export_does_not_replace_without_force_and_says_so_before_it_works(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server("export", run_dir)
    monkeypatch.setattr("server.finished_run.load_finished_run", lambda path: pytest.fail("worked"))
    with pytest.raises(CheckpointError, match="replace it with --force"):
        server("export", run_dir)
    monkeypatch.undo()
    server("export", run_dir, "--force")


def test_export_follows_no_link_out_of_the_run(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (run_dir / "export").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="leads out of"):
        server("export", run_dir)
    assert list((tmp_path / "elsewhere").iterdir()) == []
    server("export", run_dir, "--out", tmp_path / "elsewhere" / "named")


def test_release_key_says_whether_it_made_or_kept_the_key(tmp_path: Path) -> None:
    assert f"Wrote {tmp_path / 'k' / 'release.pem'}" in server("release-key", tmp_path / "k")
    assert f"Kept {tmp_path / 'k' / 'release.pem'} as it was" in server(
        "release-key", tmp_path / "k"
    )
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ConfigError, match="notes cannot be made a folder .*; choose another one"):
        server("release-key", tmp_path / "notes")
