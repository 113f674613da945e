"""A release as a person makes it: everything is in it, signed; what is amiss is said before any work."""

from __future__ import annotations

import json
import random
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from common.config import RunConfig, flatten, read_toml
from common.errors import CheckpointError, ConfigError, ReleaseError
from common.signing import SigningKey
from server.cli import app
from server.finished_run import load_finished_run
from server.history import History
from server.release.key import ReleaseKey, make_release_key
from server.release.signature import verify_folder
from tests.conftest import save_tiny_model
from tests.unit.finished import UID, finished_config, write_finished_run
from tests.unit.scenarios import run as run_scenario


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> ReleaseKey:
    return make_release_key(tmp_path_factory.mktemp("key"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither an export nor a signature asks anybody."""

    def refuse(*arguments: Any) -> None:
        raise AssertionError(f"connects to {arguments[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model with a licence."""
    folder = save_tiny_model(tmp_path_factory.mktemp("base") / "tiny")
    (folder / "LICENSE").write_text("MIT License\n\nPermission is hereby granted, free of charge")
    return folder


@pytest.fixture
def run_dir(base: Path, tmp_path: Path) -> Path:
    private = {"evaluation.central-data": "/srv/private/test.jsonl"}
    config = finished_config().replace(private)
    return write_finished_run(tmp_path / "run", base, config).path


def server(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


MERGED = ["LICENSE", "README.md", "config.json", "export.json", "generation_config.json",
          "model.safetensors", "model.sig", "run.toml", "sbom.cdx.json", "tokenizer.json",
          "tokenizer_config.json"]  # fmt: skip
ADAPTER = ["LICENSE", "README.md", "adapter_config.json", "adapter_model.safetensors",
           "export.json", "model.sig", "run.toml", "sbom.cdx.json"]  # fmt: skip


@pytest.mark.parametrize(("form", "files"), [("merged", MERGED), ("adapter", ADAPTER)])
def test_a_release_holds_the_model_and_its_evidence_and_verifies(
    run_dir: Path, key: ReleaseKey, form: str, files: list[str]
) -> None:
    said = server("release", run_dir, "--key", key.private, "--format", form)
    release = run_dir / "release"
    assert sorted(path.name for path in release.iterdir()) == files
    assert "Read README.md before you hand it on" in said
    assert f"{len(files) - 1} files, each to the byte" in server(
        "verify", release, "--key", key.public
    ).replace("\n", " ")
    marker = json.loads((release / "export.json").read_text())
    assert sorted(["export.json", *marker["files"]]) == files
    data = ModelCard.load(release / "README.md").data
    assert data.license == "mit"
    assert data.library_name == ("transformers" if form == "merged" else "peft")
    sbom = json.loads((release / "sbom.cdx.json").read_text())
    name = data.model_name
    assert sbom["metadata"]["component"]["name"] == name == "tiny-consilium-ffffffff"


def test_a_merged_release_is_loaded_by_plain_transformers(run_dir: Path, key: ReleaseKey) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    server("release", run_dir, "--key", key.private)
    release = run_dir / "release"
    tokens = AutoTokenizer.from_pretrained(release)("Fever", return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(release)
    assert model.generate(tokens, max_new_tokens=3, do_sample=False).shape[1] == 8


def test_its_settings_are_those_of_the_sites_and_nothing_of_the_coordinators(
    run_dir: Path, key: ReleaseKey
) -> None:
    server("release", run_dir, "--key", key.private, "--format", "adapter")
    text = (run_dir / "release" / "run.toml").read_text()
    settings = flatten(read_toml(run_dir / "release" / "run.toml"))
    assert not any(name.startswith(("evaluation.", "export.", "checkpoint.")) for name in settings)
    again = RunConfig.parse(settings)
    assert again.lora == load_finished_run(run_dir).config.lora
    assert "/" not in text
    for path in (run_dir / "release").iterdir():
        content = path.read_bytes()
        assert b"/srv/private" not in content
        assert str(run_dir.parent).encode() not in content


@pytest.mark.parametrize("seed", range(4))
def test_a_hundred_random_bytes_changed_in_a_real_release_are_all_found(
    run_dir: Path, key: ReleaseKey, tmp_path: Path, seed: int
) -> None:
    """25 for each seed, each in a file drawn by its size or not, model.sig among them."""
    server("release", run_dir, "--key", key.private, "--format", "adapter", "--out", tmp_path / "r")
    chance = random.Random(seed)
    files = sorted(path for path in (tmp_path / "r").iterdir())
    sizes = [path.stat().st_size for path in files]
    missed = []
    for number in range(25):
        [path] = chance.choices(files, weights=sizes if number % 2 else None)
        before = path.read_bytes()
        position = chance.randrange(len(before))
        changed = bytearray(before)
        changed[position] ^= chance.randrange(1, 256)
        path.write_bytes(changed)
        try:
            if not verify_folder(tmp_path / "r", key=key.public).differences:
                missed.append((path.name, position))
        except ReleaseError:
            pass
        path.write_bytes(before)
    assert missed == []
    assert verify_folder(tmp_path / "r", key=key.public).differences == ()


def test_a_protected_run_is_released_with_what_its_sites_spent(
    scenario: Path, tmp_path: Path, key: ReleaseKey
) -> None:
    """Of a real run under DP, from its own summary."""
    summary = run_scenario(scenario, tmp_path / "run", privacy__unit="record")
    server("release", tmp_path / "run", "--key", key.private, "--name-sites", "--format", "adapter")
    card = (tmp_path / "run" / "release" / "README.md").read_text()
    for site, row in summary["privacy"].items():
        assert f"| {site} | a record | {row['epsilon']:.3f} | 1e-05 |" in card
    loss = summary["central"]["final"]["loss"]
    assert f"| loss | {summary['central']['base']['loss']:.3f} | {loss:.3f} |" in card
    assert "differential-privacy" in ModelCard.load(tmp_path / "run/release/README.md").data.tags


def test_a_release_is_replaced_with_force_alone(run_dir: Path, key: ReleaseKey) -> None:
    options = ["--key", key.private, "--format", "adapter"]
    server("release", run_dir, *options)
    with pytest.raises(CheckpointError, match="replace it with --force"):
        server("release", run_dir, *options)
    server("release", run_dir, *options, "--name", "second", "--force")
    assert "# second\n" in (run_dir / "release" / "README.md").read_text()
    (run_dir / "release" / "notes.txt").write_text("of somebody else")
    with pytest.raises(CheckpointError, match=r"'notes\.txt', which no export wrote"):
        server("release", run_dir, *options, "--force")


def test_the_coordinators_own_key_is_taken_where_its_runs_are(base: Path, tmp_path: Path) -> None:
    folder = write_finished_run(tmp_path / "runs" / "one", base, finished_config())
    make_release_key(tmp_path)
    server("release", folder.path, "--format", "adapter")
    server("verify", folder.path / "release", "--key", tmp_path / "release.pub")


def test_release_key_makes_one_and_says_its_fingerprint(tmp_path: Path) -> None:
    from hashlib import sha256

    said = server("release-key", tmp_path / "keys")
    public = (tmp_path / "keys" / "release.pub").read_bytes()
    assert sha256(public).hexdigest() in said.replace("\n", "")


@pytest.mark.parametrize(
    ("amiss", "match"),
    [
        ("no key", r"no release key at .*consilium server release-key DIR"),
        ("earlier key", r"is not an ECDSA P-384 key.*release-key DIR"),
        ("not finished", "has not finished"),
        ("damaged evaluation", r"evaluation\.json is damaged"),
        ("evaluation of another", r"is of adapter 0000.*evaluate the run again"),
        ("odd evaluation", r"is not of the form that a model card is made from"),
        ("damaged attack", r"attack\.json is damaged"),
        ("attack on another", r"attack\.json is of run 'another'.*consilium server audit"),
        ("odd attack", r"is not of the form that a model card is made from"),
        ("no package", r"pip install 'consilium\[release\]'"),
    ],
)
def test_what_is_amiss_is_said_before_any_work_and_nothing_is_left(
    run_dir: Path,
    key: ReleaseKey,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    amiss: str,
    match: str,
) -> None:
    private = key.private
    adapter = load_finished_run(run_dir).adapter_digest
    if amiss == "no key":
        private = tmp_path / "none.pem"
    elif amiss == "earlier key":
        private = tmp_path / "ed25519.pem"
        SigningKey.generate().save(private)
    elif amiss == "not finished":
        History(run_dir / "history.jsonl").record("requested", resume=True)
    elif amiss == "no package":
        monkeypatch.setitem(__import__("sys").modules, "cyclonedx.output", None)
    else:
        name = "attack.json" if "attack" in amiss else "evaluation.json"
        content = {
            "damaged evaluation": "[",
            "damaged attack": "[1]",
            "evaluation of another": json.dumps({"adapter": "0" * 64}),
            "odd evaluation": json.dumps({"adapter": adapter, "models": {}}),
            "attack on another": json.dumps({"kind": "simulation", "run": "another"}),
            "odd attack": json.dumps({"kind": "twin", "run": UID, "audits": [{}], "ledger": {}}),
        }[amiss]
        (run_dir / name).write_text(content)
    monkeypatch.setattr(
        "server.release.releasing.write_export", lambda *a, **k: pytest.fail("worked")
    )
    with pytest.raises((ConfigError, CheckpointError), match=match):
        server("release", run_dir, "--key", private)
    assert not (run_dir / "release").exists()


def test_without_the_signing_package_it_is_said_before_any_work(
    run_dir: Path, key: ReleaseKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "model_signing", None)
    monkeypatch.setattr(
        "server.release.releasing.write_export", lambda *a, **k: pytest.fail("worked")
    )
    with pytest.raises(ConfigError, match=r"pip install 'consilium\[release\]'"):
        server("release", run_dir, "--key", key.private)


def test_a_folder_that_changes_while_it_is_signed_is_no_release(
    run_dir: Path, key: ReleaseKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    from server.release import releasing as release

    original = release.sign_folder

    def meddle(folder: Path, *, key: Path) -> None:
        original(folder, key=key)
        (folder / "README.md").write_text("# Better\n")

    monkeypatch.setattr(release, "sign_folder", meddle)
    with pytest.raises(ReleaseError, match="changed while it was signed"):
        server("release", run_dir, "--key", key.private, "--format", "adapter")
    assert not (run_dir / "release").exists()


def test_an_evaluation_of_this_adapter_is_in_the_card(run_dir: Path, key: ReleaseKey) -> None:
    """By either digest of it: with its scaling apart, or within B."""
    found = load_finished_run(run_dir)
    metrics = {"loss": 1.25, "perplexity": 3.49, "token_accuracy": 0.5}
    for digest in (found.adapter_digest, found.adapter.digest()):
        evaluation = {
            "adapter": digest,
            "records": 24,
            "models": {"base": {"language": metrics}, "final": {"language": metrics}},
        }
        (run_dir / "evaluation.json").write_text(json.dumps(evaluation))
        shutil.rmtree(run_dir / "release", ignore_errors=True)
        server("release", run_dir, "--key", key.private, "--format", "adapter")
        assert "| loss | 1.250 | 1.250 |" in (run_dir / "release" / "README.md").read_text()
