"""Where an export goes: never out of the run's folder, never over what is not ours."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from common.errors import CheckpointError, ConfigError, DiskError
from server.export.folder import MARKER, check_place, files_below, placing, write_marker


def _place(
    target: Path, *, within: Path | None = None, force: bool = False, name: str = "a"
) -> None:
    """Write an export of one file."""
    with placing(target, within=within, force=force) as folder:
        (folder / name).write_text("model")
        write_marker(folder, {"run": "r"}, later=frozenset())


def test_the_folder_appears_whole_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    target = tmp_path / "run" / "export" / "merged"
    with placing(target, within=tmp_path / "run", force=False) as folder:
        assert folder.name == target.name
        assert not target.exists()
        (folder / "model.safetensors").write_bytes(b"1")
        (folder / "model.safetensors").chmod(0o600)
        write_marker(folder, {"run": "r"}, later=frozenset())
    assert [path.name for path in target.parent.iterdir()] == ["merged"]
    assert stat.S_IMODE(target.stat().st_mode) == 0o755
    assert stat.S_IMODE((target / "model.safetensors").stat().st_mode) == 0o644
    marker = json.loads((target / MARKER).read_text())
    # sha256sum of the one byte "1".
    assert marker["files"] == {
        "model.safetensors": "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"
    }


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        _place(tmp_path / "out", name="missing/half")
    with pytest.raises(FileNotFoundError, match="missing"):
        _place(tmp_path / "new" / "export" / "merged", name="missing/half")
    assert list(tmp_path.iterdir()) == []


# Dies by SIGKILL while it writes, or after so many renames.
_KILLED = """
import os, signal, sys
from pathlib import Path
from server.export.folder import placing, write_marker
target, renames = Path(sys.argv[1]), int(sys.argv[2])
rename, done = os.rename, 0
def counted(*places):
    global done
    rename(*places)
    done += 1
    if done == renames:
        os.kill(os.getpid(), signal.SIGKILL)
with placing(target, within=None, force=True) as folder:
    (folder / "new").write_text("model")
    write_marker(folder, {"run": "r"}, later=frozenset())
    os.rename = counted
    if renames == 0:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(
    ("renames", "left", "then"),
    [(0, {"a"}, {"a"}), (1, set(), {"a"}), (2, {"new"}, {"new"})],
    ids=["while-it-writes", "between-the-renames", "at-the-end"],
)
def test_what_a_kill_left_is_gone_with_the_next_export_and_what_it_took_is_back(
    tmp_path: Path, renames: int, left: set[str], then: set[str]
) -> None:
    out = tmp_path / "out"
    _place(out)
    died = subprocess.run([sys.executable, "-c", _KILLED, str(out), str(renames)], check=False)
    assert died.returncode == -signal.SIGKILL
    assert any(path.name.startswith(".out-") for path in tmp_path.iterdir())
    assert {path.name for path in out.glob("*")} - {MARKER} == left
    with pytest.raises(CheckpointError, match="holds an export already"):
        _place(out)
    # Only whoever is let in tidies up, or whoever finds that something was taken.
    assert {path.name for path in out.iterdir()} == {*then, MARKER}
    _place(out, force=True)
    assert files_below(tmp_path) == {"out/a", f"out/{MARKER}"}


@pytest.mark.parametrize("at", [1, 2, 3])
def test_what_is_killed_while_it_tidies_is_gone_with_the_next_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """The lock is what tells such a folder for ours: without it, gigabytes would stay for ever."""
    out = tmp_path / "out"
    _place(out)
    subprocess.run([sys.executable, "-c", _KILLED, str(out), "0"], check=False)
    [left] = [path for path in tmp_path.iterdir() if path != out]
    (left / "replaced").mkdir()
    done, unlink, rmdir = 0, os.unlink, os.rmdir

    def counted(remove: Any) -> Any:
        def removing(*arguments: Any, **options: Any) -> None:
            nonlocal done
            done += 1
            if done > at:
                raise KeyboardInterrupt
            remove(*arguments, **options)

        return removing

    monkeypatch.setattr(os, "unlink", counted(unlink))
    monkeypatch.setattr(os, "rmdir", counted(rmdir))
    with pytest.raises(KeyboardInterrupt):
        _place(out, force=True)
    monkeypatch.undo()
    _place(out, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_an_export_to_a_longer_name_left_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    """`.out-2-abcdefgh` is of out-2, which was killed between its renames: its earlier export is in there."""
    _place(tmp_path / "out-2")
    subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path / "out-2"), "1"], check=False)
    assert not (tmp_path / "out-2").exists()
    _place(tmp_path / "out")
    with pytest.raises(CheckpointError, match="holds an export already"):
        _place(tmp_path / "out-2")
    assert files_below(tmp_path) == {f"{n}/{f}" for n in ("out", "out-2") for f in ("a", MARKER)}


@pytest.mark.parametrize("name", [".out-notes", ".out-abcdefgh"])
def test_a_hidden_folder_of_somebody_elses_stays(tmp_path: Path, name: str) -> None:
    for file in ("lock", "diary"):
        (tmp_path / name / file).parent.mkdir(exist_ok=True)
        (tmp_path / name / file).touch()
    _place(tmp_path / "out")
    assert (tmp_path / name / "diary").exists()


@pytest.mark.parametrize("after", [1, 2])
def test_who_is_interrupted_at_the_renames_loses_no_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Ctrl-C the moment one of them is done."""
    _place(tmp_path / "out")
    rename, done = os.rename, 0

    def interrupted(source: Path, target: Path) -> None:
        nonlocal done
        rename(source, target)
        done += 1
        if done == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _place(tmp_path / "out", force=True, name="b")
    assert files_below(tmp_path) == {f"out/{'ab'[after - 1]}", f"out/{MARKER}"}


def test_an_export_that_goes_is_not_tidied_away(tmp_path: Path) -> None:
    with placing(tmp_path / "out", within=None, force=True) as folder:
        _place(tmp_path / "out")
        (folder / "b").write_text("model")
        write_marker(folder, {"run": "r"}, later=frozenset())
    assert files_below(tmp_path) == {"out/b", f"out/{MARKER}"}


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        # As safetensors says it.
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_said_with_the_remedy_and_leaves_nothing(
    tmp_path: Path, error: Exception
) -> None:
    place = placing(tmp_path / "out", within=None, force=False)
    (place.__enter__() / "half").write_text("of a model")
    with pytest.raises(DiskError, match=r"is full \(.*No space left.*--out"):
        place.__exit__(type(error), error, None)
    assert list(tmp_path.iterdir()) == []


def test_what_fails_leaves_the_earlier_export(tmp_path: Path) -> None:
    _place(tmp_path / "out")
    with (
        pytest.raises(RuntimeError, match="on purpose"),
        placing(tmp_path / "out", within=None, force=True),
    ):
        raise RuntimeError("on purpose")
    assert files_below(tmp_path) == {"out/a", f"out/{MARKER}"}


def test_where_the_new_export_cannot_take_its_place_the_earlier_one_has_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _place(tmp_path / "out")
    rename = os.rename

    def refuse_the_new_one(source: Path, target: Path) -> None:
        if target == tmp_path / "out" and Path(source).name == "out":
            raise OSError("on purpose")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse_the_new_one)
    with pytest.raises(OSError, match="on purpose"):
        _place(tmp_path / "out", force=True, name="b")
    assert files_below(tmp_path) == {"out/a", f"out/{MARKER}"}


def test_an_export_is_replaced_with_force_and_never_without(tmp_path: Path) -> None:
    _place(tmp_path / "out")
    with pytest.raises(CheckpointError, match="holds an export already; replace it with --force"):
        _place(tmp_path / "out", name="b")
    _place(tmp_path / "out", name="b", force=True)
    assert files_below(tmp_path) == {"out/b", f"out/{MARKER}"}


@pytest.mark.parametrize(
    "marker",
    [
        None,
        "not JSON",
        "[]",
        '{"form": "another", "files": {"notes.txt": ""}}',
        '{"files": {"notes.txt": ""}}',
    ],
)
def test_force_replaces_no_folder_that_we_did_not_write(tmp_path: Path, marker: str | None) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("of somebody else")
    if marker is not None:
        (out / MARKER).write_text(marker)
    with pytest.raises(CheckpointError, match="no export of ours wrote them"):
        _place(out, force=True)
    assert (out / "notes.txt").read_text() == "of somebody else"


@pytest.mark.parametrize("name", ["notes.txt", ".hidden", "below/notes.txt"])
def test_force_replaces_no_export_that_somebody_put_files_into(tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    _place(out)
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("of somebody else")
    with pytest.raises(CheckpointError, match=f"holds '{name}', which no export wrote"):
        _place(out, force=True)
    assert (out / name).exists()


def test_files_that_are_still_to_come_are_ours_too(tmp_path: Path) -> None:
    with placing(tmp_path / "out", within=None, force=False) as folder:
        write_marker(folder, {"run": "r"}, later=frozenset({"model.sig"}))
        (folder / "model.sig").write_text("later")
    _place(tmp_path / "out", force=True)
    assert files_below(tmp_path) == {"out/a", f"out/{MARKER}"}


def test_an_empty_folder_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    _place(tmp_path / "out")
    assert files_below(tmp_path) == {"out/a", f"out/{MARKER}"}


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("link", ["export", "export/merged"])
def test_no_link_in_a_runs_folder_leads_an_export_out_of_it(
    tmp_path: Path, link: str, force: bool
) -> None:
    """The folder of a run may come from elsewhere, with whatever links are in it."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    _place(elsewhere / "merged", name="precious")
    (run / link).parent.mkdir(parents=True)
    (run / link).symlink_to(elsewhere if link == "export" else elsewhere / "merged")
    with pytest.raises(ConfigError, match="leads out of .*elsewhere.*--out"):
        _place(run / "export" / "merged", within=run, force=force)
    assert files_below(elsewhere) == {"merged/precious", f"merged/{MARKER}"}


def test_a_run_that_is_itself_reached_by_a_link_is_exported(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "real")
    _place(tmp_path / "run" / "export" / "merged", within=tmp_path / "run")
    assert (tmp_path / "real" / "export" / "merged" / "a").is_file()


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_is_no_folder_is_in_the_way(tmp_path: Path, kind: str) -> None:
    _place(tmp_path / "real")
    if kind == "file":
        (tmp_path / "out").write_text("of somebody else")
    else:
        (tmp_path / "out").symlink_to(tmp_path / "real")
    with pytest.raises(CheckpointError, match="is not a folder"):
        check_place(tmp_path / "out", within=None, force=True)


def test_a_place_where_nothing_can_be_written_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ConfigError, match=r"notes/out cannot be written \(File exists\); choose"):
        _place(tmp_path / "notes" / "out")
    with pytest.raises(ConfigError, match="/proc/out cannot be written"):
        _place(Path("/proc/out"))


def test_a_place_that_may_not_be_looked_at_is_refused_in_words(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    (locked / "in").mkdir(parents=True)
    locked.chmod(0)
    user = os.geteuid()
    # Nothing is locked for root.
    os.seteuid(user or 65534)
    try:
        with pytest.raises(
            ConfigError, match=r"out cannot be written \(Permission denied\); choose"
        ):
            check_place(locked / "in" / "out", within=None, force=False)
    finally:
        os.seteuid(user)
        locked.chmod(0o700)


def test_what_came_while_an_export_was_written_is_not_replaced(tmp_path: Path) -> None:
    place = placing(tmp_path / "out", within=None, force=True)
    place.__enter__()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("of somebody else")
    with pytest.raises(CheckpointError, match="no export of ours wrote them"):
        place.__exit__(None, None, None)
    assert files_below(tmp_path) == {"out/notes.txt"}
