"""A signed folder: every change of any kind is found, by a check that asks no network."""

from __future__ import annotations

import base64
import errno
import io
import json
import os
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from common.errors import ConfigError, ReleaseError
from server.cli import app
from server.release.key import ReleaseKey, make_release_key
from server.release.signature import SIGNATURE, Difference, sign_folder, verify_folder

FILES = {
    "README.md": b"# A model\n",
    "config.json": b'{"hidden_size": 32}',
    "model.safetensors": bytes(range(256)) * 8,
    "tokenizer/vocab.json": b'{"a": 1}',
    ".hidden": b"x",
    # The library passes over it unless it is told not to.
    ".gitattributes": b"*.safetensors filter=lfs\n",
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError(f"connects to {arguments[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> ReleaseKey:
    return make_release_key(tmp_path_factory.mktemp("key"))


@pytest.fixture(scope="module")
def signed(key: ReleaseKey, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A signed folder; read only."""
    folder = tmp_path_factory.mktemp("signed") / "release"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    sign_folder(folder, key=key.private)
    return folder


@pytest.fixture
def release(signed: Path, tmp_path: Path) -> Path:
    """A copy of it to change."""
    return Path(shutil.copytree(signed, tmp_path / "release"))


def _is_found(folder: Path, key: ReleaseKey) -> bool:
    try:
        return bool(verify_folder(folder, key=key.public).differences)
    except ReleaseError:
        return True


def _names(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


def test_a_release_as_it_was_signed_is_whole(signed: Path, key: ReleaseKey) -> None:
    found = verify_folder(signed, key=key.public)
    assert found.files == len(FILES)
    assert found.differences == ()


def test_a_copy_under_another_name_is_whole(release: Path, key: ReleaseKey) -> None:
    moved = release.rename(release.with_name("elsewhere"))
    assert verify_folder(moved, key=key.public).differences == ()


def _change_byte(folder: Path, chance: random.Random) -> None:
    path = folder / chance.choice(_names(folder))
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= chance.randrange(1, 256)
    path.write_bytes(content)


def _add(folder: Path, chance: random.Random) -> None:
    name = chance.choice(["new", ".new", "sub/new", ".git/config", ".gitignore", ".gitattributes",
                          ".github/x", "model.sig.bak", "model.sig~", "MODEL.SIG",
                          "tokenizer/new"])  # fmt: skip
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(chance.randbytes(chance.randrange(3)))


def _remove(folder: Path, chance: random.Random) -> None:
    (folder / chance.choice(_names(folder))).unlink()


def _rename(folder: Path, chance: random.Random) -> None:
    path = folder / chance.choice(_names(folder))
    path.rename(path.with_name(path.name + chance.choice(["x", ".bak", " "])))


def _swap(folder: Path, chance: random.Random) -> None:
    one, other = (folder / name for name in chance.sample(_names(folder), 2))
    one.rename(folder / "t")
    other.rename(one)
    (folder / "t").rename(other)


def _link(folder: Path, chance: random.Random) -> None:
    """A link to the very content, elsewhere."""
    path = folder / chance.choice(_names(folder))
    moved = folder.with_name(f"moved-{chance.random()}")
    path.rename(moved)
    path.symlink_to(moved)


def _add_link(folder: Path, chance: random.Random) -> None:
    (folder / chance.choice(["link", ".git", ".gitignore"])).symlink_to(
        chance.choice(["README.md", "tokenizer", "/nowhere"])
    )


def _add_folder(folder: Path, chance: random.Random) -> None:
    (folder / chance.choice(["empty", ".git", "tokenizer/empty"])).mkdir()


def _add_pipe(folder: Path, chance: random.Random) -> None:
    os.mkfifo(folder / chance.choice(["pipe", ".gitignore"]))


CHANGES: list[Callable[[Path, random.Random], None]] = [
    _change_byte, _add, _remove, _rename, _swap, _link, _add_link, _add_folder, _add_pipe,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_every_random_change_is_found(
    signed: Path, tmp_path: Path, key: ReleaseKey, change: Callable[[Path, random.Random], None]
) -> None:
    """100 of each kind, model.sig among the files: found, 100 % of them."""
    missed = []
    for seed in range(100):
        folder = tmp_path / str(seed)
        shutil.copytree(signed, folder)
        change(folder, random.Random(seed))
        if not _is_found(folder, key):
            missed.append(seed)
        shutil.rmtree(folder)
    assert missed == []


def test_every_byte_of_the_signature_counts(release: Path, key: ReleaseKey) -> None:
    """Also those that no signature covers: spaces, names of fields, spare bits of base64."""
    content = (release / SIGNATURE).read_bytes()
    chance = random.Random(0)
    for position in range(0, len(content), 7):
        for value in {content[position] ^ 1, content[position] ^ 32, chance.randrange(256)}:
            if value != content[position]:
                altered = content[:position] + bytes([value]) + content[position + 1 :]
                (release / SIGNATURE).write_bytes(altered)
                assert _is_found(release, key), (position, value)


@pytest.mark.parametrize("where", ["end", "space", "twice", "key id", "extra", "no hint"])
def test_another_spelling_of_the_signature_is_found(
    release: Path, key: ReleaseKey, where: str
) -> None:
    text = (release / SIGNATURE).read_text()
    content = json.loads(text)
    if where == "key id":
        content["dsseEnvelope"]["signatures"][0]["keyid"] = "me"
    elif where == "no hint":
        # The library takes that for the form of its earlier versions.
        content["verificationMaterial"]["publicKey"]["hint"] = ""
    elif where == "extra":
        content["verificationMaterial"]["publicKey"]["rawBytes"] = ""
    spelled = {
        "end": text + "\n",
        "space": text.replace(":", ": ", 1),
        "twice": '{"mediaType":"x",' + text[1:],
    }.get(where, json.dumps(content, separators=(",", ":")))
    assert spelled != text
    (release / SIGNATURE).write_text(spelled)
    with pytest.raises(ReleaseError, match="is not a signature in the form"):
        verify_folder(release, key=key.public)


def test_spare_bits_of_base64_are_found(release: Path, key: ReleaseKey) -> None:
    """`QQ==` and `QR==` are both the byte A: the signature holds, and the file is another one."""
    code = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    padded = ""
    while not padded:
        # A P-384 signature has 102 to 104 bytes; 102 need no padding.
        sign_folder(release, key=key.private)
        text = (release / SIGNATURE).read_text()
        coded = json.loads(text)["dsseEnvelope"]["signatures"][0]["sig"]
        padded = coded if coded.endswith("=") else ""
    last = padded.rstrip("=")[-1]
    other = padded.rstrip("=")[:-1] + code[code.index(last) + 1]
    other += "=" * (len(padded) - len(other))
    assert base64.b64decode(other) == base64.b64decode(padded)
    (release / SIGNATURE).write_text(text.replace(padded, other))
    with pytest.raises(ReleaseError, match="is not a signature in the form"):
        verify_folder(release, key=key.public)


def test_a_signature_that_is_a_link_is_refused(release: Path, key: ReleaseKey) -> None:
    moved = (release / SIGNATURE).rename(release.with_name("elsewhere.sig"))
    (release / SIGNATURE).symlink_to(moved)
    with pytest.raises(ReleaseError, match="is not a signature in the form"):
        verify_folder(release, key=key.public)


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_a_signature_that_is_no_plain_file_is_refused(
    release: Path, key: ReleaseKey, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Unread: a read of a pipe never ends."""
    (release / SIGNATURE).unlink()
    (os.mkfifo if kind == "pipe" else os.mkdir)(release / SIGNATURE)
    read = Path.read_bytes
    monkeypatch.setattr(
        Path,
        "read_bytes",
        lambda path: pytest.fail("reads it") if path.name == SIGNATURE else read(path),
    )
    with pytest.raises(ReleaseError, match="is not a signature in the form"):
        verify_folder(release, key=key.public)


def test_a_signature_that_would_fill_the_memory_is_not_read(release: Path, key: ReleaseKey) -> None:
    """A sparse file of 1 TB."""
    os.truncate(release / SIGNATURE, 1 << 40)
    with pytest.raises(ReleaseError, match="is not a signature in the form"):
        verify_folder(release, key=key.public)


@pytest.mark.parametrize("name", ["config.json", "new"])
def test_a_file_that_cannot_be_read_is_said_in_words(
    release: Path, key: ReleaseKey, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Signed or not; root, who may run this, can read any file."""
    (release / name).write_text("x")
    opened = io.open

    def refuse(path: Any, *arguments: Any, **options: Any) -> Any:
        if Path(str(path)).name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(io, "open", refuse)
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ReleaseError, match=f"cannot be read whole.*Permission denied.*{name}"):
        verify_folder(release, key=key.public)


def test_a_key_that_came_with_the_release_is_not_believed(release: Path, tmp_path: Path) -> None:
    """Whoever signs it anew ships the key that fits."""
    thief = make_release_key(tmp_path)
    (release / SIGNATURE).unlink()
    shutil.copy(thief.public, release / "release.pub")
    sign_folder(release, key=thief.private)
    with pytest.raises(ConfigError, match=r"came with what it is to check.*by another way"):
        verify_folder(release, key=release / "release.pub")
    (tmp_path / "link").symlink_to(release)
    with pytest.raises(ConfigError, match="came with what it is to check"):
        verify_folder(tmp_path / "link", key=release / "release.pub")


def test_a_release_that_is_reached_by_a_link_is_whole(
    release: Path, key: ReleaseKey, tmp_path: Path
) -> None:
    (tmp_path / "current").symlink_to(release)
    assert verify_folder(tmp_path / "current", key=key.public).differences == ()


def test_what_changed_is_named(release: Path, key: ReleaseKey) -> None:
    (release / "config.json").write_text('{"hidden_size": 33}')
    (release / ".hidden").unlink()
    (release / "README.md").rename(release / "READ.md")
    (release / ".gitignore").write_text("*")
    (release / "link").symlink_to("config.json")
    (release / "empty").mkdir()
    assert sorted(verify_folder(release, key=key.public).differences) == [
        Difference(".gitignore", "added"),
        Difference(".hidden", "removed"),
        Difference("READ.md", "renamed", "README.md"),
        Difference("config.json", "changed"),
        Difference("empty", "empty folder"),
        Difference("link", "not a plain file"),
    ]


def test_what_the_library_passes_over_is_found_alone(release: Path, key: ReleaseKey) -> None:
    """Empty folders are in no list of files, and nothing else is wrong here."""
    (release / ".git").mkdir()
    assert verify_folder(release, key=key.public).differences == (
        Difference(".git", "empty folder"),
    )


def test_another_key_and_a_swapped_signature_are_refused(
    release: Path, key: ReleaseKey, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    other = make_release_key(tmp_path / "other")
    with pytest.raises(ReleaseError, match="was not made by the key in"):
        verify_folder(release, key=other.public)
    (release / SIGNATURE).unlink()
    with pytest.raises(ReleaseError, match="has no model.sig"):
        verify_folder(release, key=key.public)
    # A whole new signature, over the very same files.
    sign_folder(release, key=other.private)
    with pytest.raises(ReleaseError, match="was not made by the key in"):
        verify_folder(release, key=key.public)


def test_a_signature_of_another_release_by_the_same_key_names_what_differs(
    release: Path, key: ReleaseKey, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "README.md").write_text("# Another model\n")
    sign_folder(other, key=key.private)
    shutil.copy(other / SIGNATURE, release / SIGNATURE)
    found = verify_folder(release, key=key.public)
    assert found.files == 1
    assert {one.change for one in found.differences} == {"added", "changed"}


def test_a_list_that_was_changed_under_its_signature_is_refused(
    release: Path, key: ReleaseKey
) -> None:
    """A new digest for a new file, in the signed statement itself."""
    from hashlib import sha256

    content = json.loads((release / SIGNATURE).read_text())
    envelope = content["dsseEnvelope"]
    statement = base64.b64decode(envelope["payload"]).decode()
    before = sha256((release / "README.md").read_bytes()).hexdigest()
    assert statement.count(before) == 1
    (release / "README.md").write_text("# Better\n")
    after = sha256((release / "README.md").read_bytes()).hexdigest()
    envelope["payload"] = base64.b64encode(statement.replace(before, after).encode()).decode()
    (release / SIGNATURE).write_text(json.dumps(content, separators=(",", ":")))
    with pytest.raises(ReleaseError, match="was not made by the key in"):
        verify_folder(release, key=key.public)


def _cli(folder: Path, key: ReleaseKey) -> subprocess.CompletedProcess[str]:
    """`model_signing verify key` in its own process."""
    return subprocess.run(
        [sys.executable, "-m", "model_signing", "verify", "key", str(folder),
         "--no-ignore-git-paths", "--signature", str(folder / SIGNATURE), "--public_key", str(key.public)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_librarys_own_command_verifies_a_release(release: Path, key: ReleaseKey) -> None:
    """So that nobody needs our program to check what it released."""
    done = _cli(release, key)
    assert (done.returncode, done.stdout) == (0, "Verification succeeded\n"), done.stderr
    (release / "README.md").write_text("# Better\n")
    done = _cli(release, key)
    assert done.returncode != 0
    assert "README.md" in done.stderr


def test_a_link_is_not_signed(tmp_path: Path, key: ReleaseKey) -> None:
    (tmp_path / "release").mkdir()
    (tmp_path / "release" / "link").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match="symlink"):
        sign_folder(tmp_path / "release", key=key.private)


def test_without_its_package_it_says_what_to_install(
    signed: Path, key: ReleaseKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(ConfigError, match=r"pip install 'consilium\[release\]'"):
        verify_folder(signed, key=key.public)


def test_the_command_names_what_changed_and_ends_with_its_own_code(
    release: Path, key: ReleaseKey
) -> None:
    def verify(*options: str) -> Any:
        command = ["verify", str(release), "--key", str(key.public), *options]
        return CliRunner().invoke(app, command)

    done = verify()
    assert done.exit_code == 0
    assert "6 files, each to the byte, and nothing beside them" in done.output.replace("\n", " ")
    (release / "config.json").write_text("{}")
    (release / "\x1b[2Jcleared").write_text("")
    done = verify()
    assert isinstance(done.exception, ReleaseError)
    assert done.exception.exit_code == 9
    assert "2 of its paths differ" in str(done.exception)
    assert "config.json" in done.output
    assert "\x1b[2J" not in done.output
    told = json.loads(verify("--json").output)
    assert told["files"] == 6
    assert {"path": "config.json", "change": "changed", "before": ""} in told["differences"]
