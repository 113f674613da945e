"""Which model a folder holds, and how a copy of it is held against the list that came with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from common.digest_list import DigestList, FileDigest, compare_digests, parse_digest_list
from common.errors import ConfigError, ModelError, SignatureError
from common.model_cli import app
from common.model_folder import digest_files, digest_model

_HEX = st.text("0123456789abcdef", min_size=64, max_size=64)
_NAMES = st.text(st.characters(codec="ascii", categories=("L", "N", "P"), exclude_characters="/"))
_LISTS = st.dictionaries(_NAMES.filter(bool), _HEX, max_size=5).map(
    lambda found: DigestList(tuple(sorted(FileDigest(*item) for item in found.items())))
)


@pytest.fixture
def copy(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def _digest(*words: object) -> str:
    result = CliRunner().invoke(app, ["digest", *map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


@given(_LISTS)
def test_a_list_is_read_back_as_it_was_written(digests: DigestList) -> None:
    assert parse_digest_list(digests.text(), name="it") == digests


@given(_LISTS, _LISTS)
def test_differences_name_every_file_once_and_only_where_there_are_some(
    left: DigestList, right: DigestList
) -> None:
    found = compare_digests(left, right)
    named = [*found.differing, *found.missing, *found.extra]
    assert len(set(named)) == len(named)
    assert bool(found) == (left != right)
    assert set(found.missing) == set(compare_digests(right, left).extra)


def test_the_total_of_a_list_is_what_allowed_models_holds(copy: Path) -> None:
    assert digest_files(copy).total == digest_model(copy)
    assert _digest(copy) == digest_model(copy) + "\n"


def test_sha256sum_agrees_with_a_written_list(copy: Path) -> None:
    """The list stands in the folder, under a name that the digest does not cover."""
    before = digest_model(copy)
    _digest(copy, "--write", copy / "SHA256SUMS")
    assert digest_model(copy) == before
    done = subprocess.run(
        ["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=copy, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "model.safetensors: OK" in done.stdout


def test_a_copy_is_checked_and_every_file_that_is_not_as_it_was_is_named(
    copy: Path, tmp_path: Path
) -> None:
    listed = tmp_path / "model.sha256"
    assert _digest(copy, "--write", listed) == digest_model(copy) + "\n"
    assert listed.read_text() == _digest(copy, "--list")
    assert _digest(copy, "--check", listed) == digest_model(copy) + "\n"

    with (copy / "config.json").open("a") as file:
        file.write(" ")
    (copy / "tokenizer.json").unlink()
    (copy / "added.safetensors").write_bytes(b"")
    (copy / "README.md").write_text("not part of the model")
    with pytest.raises(
        SignatureError,
        match=r"other content: config\.json; missing: tokenizer\.json; not on the list: added\.safetensors;",
    ):
        _digest(copy, "--check", listed)


def test_a_list_that_was_cut_is_not_believed(copy: Path, tmp_path: Path) -> None:
    """Without a line, the file that it named could be anything."""
    listed = tmp_path / "model.sha256"
    _digest(copy, "--write", listed)
    lines = listed.read_text().splitlines()
    listed.write_text("\n".join(lines[:-1]))
    with pytest.raises(SignatureError, match=r"says digest \w{16} and its 4 lines make .* copy it"):
        _digest(copy, "--check", listed)
    listed.write_text("\n".join(lines[1:]))
    with pytest.raises(SignatureError, match="says digest nothing and its 5 lines make"):
        _digest(copy, "--check", listed)


@pytest.mark.parametrize("line", ["abc  model.safetensors", f"{'0' * 64}  ../model.safetensors"])
def test_a_line_that_names_no_file_of_the_folder_is_refused(line: str) -> None:
    with pytest.raises(SignatureError, match="list line 1 is not 64 hex digits"):
        parse_digest_list(line, name="list")


def test_a_list_inside_the_folder_may_not_become_part_of_the_model(copy: Path) -> None:
    with pytest.raises(ConfigError, match=r"sums\.txt would count as a file of the model itself"):
        _digest(copy, "--write", copy / "sums.txt")
    assert not (copy / "sums.txt").exists()


def test_what_cannot_be_read_or_written_is_said_in_words(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read as a digest list"):
        _digest(copy, "--check", tmp_path / "absent")
    with pytest.raises(ConfigError, match="cannot be written"):
        _digest(copy, "--write", tmp_path / "absent" / "list")
    with pytest.raises(ModelError, match=r"lacks config\.json"):
        _digest(tmp_path)


def test_the_command_loads_neither_torch_nor_another_group(tiny_model_dir: Path) -> None:
    code = (
        "import sys\nfrom common.cli import main\n"
        "sys.argv[1:] = ['model', 'digest', sys.argv[1]]\n"
        "try:\n    main()\nfinally:\n"
        "    print([m for m in ('torch', 'client', 'server', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_model_dir)],
        capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"}, timeout=60,
    )  # fmt: skip
    assert done.stdout == f"{digest_model(tiny_model_dir)}\n[]\n", done.stderr
