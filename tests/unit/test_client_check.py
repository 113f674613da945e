"""What `consilium client check` looks at in a hospital's own folder and machine; each is broken once."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import namedtuple
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from client import check_device, check_software
from client.check_data import check_data
from client.check_keys import check_keys
from client.check_line import CheckLine
from client.check_model import check_disk, check_models
from client.check_policy import check_policy
from client.model_size import ModelSize, Workload, read_model_size
from client.provisioning import make_node_key
from client.site_config import SiteConfig
from common.config import LoraSection, ModelSection
from common.errors import ModelError
from common.lora import adapter_shape
from common.model import load_base
from common.signing import SigningKey
from tests.unit.ready_site import edited, make_ready_site

_Usage = namedtuple("_Usage", "total used free")


@pytest.fixture
def site(tmp_path: Path, tiny_model_dir: Path) -> SiteConfig:
    return make_ready_site(tmp_path / "north", tiny_model_dir)


def _by_name(lines: Iterable[CheckLine]) -> dict[str, CheckLine]:
    found = {line.name: line for line in lines}
    assert all(bool(line.remedy) == (line.state != "pass") for line in found.values())
    return found


def _states(lines: Iterable[CheckLine]) -> dict[str, str]:
    return {name: line.state for name, line in _by_name(lines).items()}


# Software


def test_this_python_and_these_libraries_pass(tmp_path: Path) -> None:
    assert _states(check_software.check_python()) == {"python": "pass"}
    line = _by_name(check_software.check_libraries(tmp_path / "absent"))["libraries"]
    assert line.state == "pass"
    assert "libraries as needed" in line.detail


def test_an_older_python_than_needed_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.python_version", lambda: "3.10.4")
    line = _by_name(check_software.check_python())["python"]
    assert (line.state, line.detail) == ("fail", "3.10.4, needed: >=3.11")


def test_missing_and_old_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["nobody-made-this>=1", "numpy>=99", "scipy>=1", 'pytest>=99; extra == "dev"']
    monkeypatch.setattr(check_software, "requires", lambda name: wanted)
    line = _by_name(check_software.check_libraries())["libraries"]
    assert line.state == "fail"
    assert "nobody-made-this missing (needed: >=1), numpy " in line.detail
    assert "scipy" not in line.detail
    assert "pytest" not in line.detail


def test_other_versions_than_the_tested_ones_warn(tmp_path: Path) -> None:
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("# tested\nnumpy==1.0.0\nnobody-made-this==1.0\ntorch==2.13.0\n")
    line = _by_name(check_software.check_libraries(constraints))["libraries"]
    assert line.state == "warn"
    assert line.detail.startswith("not the tested versions: numpy ")
    assert "nobody" not in line.detail


# Models, disk and memory


def test_the_folder_that_site_toml_names_passes_and_another_one_fails(
    site: SiteConfig, tiny_model_dir: Path, tmp_path: Path
) -> None:
    assert _states(check_models(site)) == {"model tiny": "pass"}
    copy = Path(shutil.copytree(tiny_model_dir, tmp_path / "copy"))
    with (copy / "config.json").open("a") as file:
        file.write(" ")
    model = site.policy.allowed_models[0].model_copy(update={"path": str(copy)})
    other = site.model_copy(
        update={"policy": site.policy.model_copy(update={"allowed_models": (model,)})}
    )
    line = _by_name(check_models(other))["model tiny"]
    assert line.state == "fail"
    assert f"allowed-models says {model.digest[:16]}..." in line.detail
    assert f"consilium model digest {copy} --check LIST" in line.remedy
    shutil.rmtree(copy)
    line = _by_name(check_models(other))["model tiny"]
    assert line.state == "fail"
    assert "lacks config.json" in line.detail


def test_a_model_that_this_user_may_not_read_is_no_damaged_one(
    site: SiteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = site.models["tiny"] / "model.safetensors"

    def refuse(folder: Path) -> str:
        raise PermissionError(13, "Permission denied", str(weights))

    with monkeypatch.context() as patch:
        patch.setattr("client.check_model.digest_model", refuse)
        line = _by_name(check_models(site))["model tiny"]
    assert (line.state, line.detail) == ("fail", f"{weights} cannot be read by this user")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    line = _by_name(check_models(site))["model tiny"]
    assert line.detail == f"{weights.parent} cannot be read by this user"


def test_a_model_without_weights_leaves_the_other_lines_alone(site: SiteConfig) -> None:
    model = site.policy.allowed_models[0].model_copy(update={"path": "absent"})
    other = site.model_copy(
        update={"policy": site.policy.model_copy(update={"allowed_models": (model,)})}
    )
    assert _states(check_models(other)) == {"model tiny": "fail"}
    assert _states(check_disk(other)) == {"disk": "pass"}
    assert _states(check_device.check_device(other)) == {"device": "pass"}


def test_the_size_is_that_of_the_model_which_is_loaded(tiny_model_dir: Path) -> None:
    """Llama of tests/conftest.py: 2 layers; 300 x 32 embedding and head stay as they are."""
    size = read_model_size(tiny_model_dir)
    base = load_base(tiny_model_dir, ModelSection(quantization="none"), device=torch.device("cpu"))
    layers = 2 * (32 * 32 * 2 + 16 * 32 * 2 + 64 * 32 * 3)
    assert size.quantised == layers
    assert size.quantised + size.other == sum(p.numel() for p in base.model.parameters())
    assert size.vocabulary == 300
    shape = adapter_shape(base, LoraSection(rank=4, alpha=8.0))
    sides = sum(d_out + d_in for d_out, d_in in shape.modules.values())
    assert size.adapter_bytes(4) == 4 * sides * 4
    assert size.base_bytes(float_bytes=4, nf4=False) == 4 * (size.quantised + size.other)


def test_memory_grows_with_what_is_trained_at_once() -> None:
    """By hand: one 10 x 20 matrix, vocabulary 5, two bytes a number."""
    size = ModelSize(0, quantised=200, other=50, inputs=20, outputs=10, vocabulary=5)
    assert size.base_bytes(float_bytes=2) == round(200 * 0.51587) + 100
    work = Workload(rank=1, records=1, tokens=1)
    adapter = 30 * 4
    token = 20 * (2 + 4) + 10 * 2 + 5 * 4 * 3
    assert size.training_bytes(work, float_bytes=2) == adapter * 5 + token
    # In float32 the adapter takes a layer's input as it is.
    assert size.training_bytes(work, float_bytes=4) == adapter * 5 + 20 * 4 + 10 * 4 + 5 * 4 * 3
    more = Workload(rank=1, records=2, tokens=3)
    assert size.training_bytes(more, float_bytes=2) == adapter * 6 + 6 * token


def test_a_cut_weight_file_is_said_in_words(tiny_model_dir: Path, tmp_path: Path) -> None:
    content = (tiny_model_dir / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(ModelError, match="cannot be read as safetensors .* copy it again"):
        read_model_size(tmp_path)


@pytest.mark.parametrize(("models", "state"), [(1.5, "pass"), (0.5, "warn"), (-0.5, "fail")])
def test_disk_space_is_held_against_adapters_and_model(
    site: SiteConfig, monkeypatch: pytest.MonkeyPatch, models: float, state: str
) -> None:
    """models: so many times the model's size is free beyond the adapters and 200 MB."""
    size = read_model_size(site.models["tiny"])
    free = 200_000_000 + 7 * size.adapter_bytes(64) + int(models * size.file_bytes)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: _Usage(free, 0, free))
    line = _by_name(check_disk(site))["disk"]
    assert line.state == state, line
    assert "7 adapters of rank 64" in line.detail


def test_the_cpu_passes_where_it_is_meant_and_has_room(site: SiteConfig) -> None:
    lines = _by_name(check_device.check_device(site))
    assert _states(lines.values()) == {"device": "pass", "memory for tiny": "pass"}
    assert "rank 8, 16 records of 256 tokens" in lines["memory for tiny"].detail


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_asked_for_and_not_there_fails(site: SiteConfig) -> None:
    asked = edited(site.folder, device={"name": "cuda:1"})
    line = _by_name(check_device.check_device(asked))["device"]
    assert line.state == "fail"
    assert "sees 0 GPUs" in line.detail


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_auto_without_a_gpu_warns_and_a_driver_without_torch_for_it_is_seen(
    site: SiteConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    auto = edited(site.folder, device={"name": "auto"})
    monkeypatch.setattr(check_device, "_NVIDIA_DRIVER", tmp_path / "absent")
    line = _by_name(check_device.check_device(auto))["device"]
    assert (line.state, 'name = "cpu"' in line.remedy) == ("warn", True)
    monkeypatch.setattr(check_device, "_NVIDIA_DRIVER", tmp_path)
    line = _by_name(check_device.check_device(auto))["device"]
    assert line.state == "warn"
    assert "there is an NVIDIA driver, and torch sees no GPU" in line.detail


def test_a_torch_that_cannot_be_loaded_is_a_line(
    site: SiteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    line = _by_name(check_device.check_device(site))["device"]
    assert (line.state, line.detail) == ("fail", "torch cannot be loaded (ModuleNotFoundError)")


@pytest.mark.parametrize(
    ("free", "state"), [(10**9, "pass"), (4_000_000, "warn"), (100_000, "fail")]
)
def test_memory_too_small_for_training_warns_and_for_the_model_fails(free: int, state: str) -> None:
    size = ModelSize(0, quantised=10**6, other=0, inputs=1000, outputs=1000, vocabulary=100)
    memory = check_device.Memory("a card", free, float_bytes=2)
    line = check_device.memory_line("m", size, memory)
    assert line.state == state, line
    assert "a card has " in line.detail


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    machine = check_device.free_memory_bytes(tmp_path)
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("1500\n")
    (tmp_path / "memory.stat").write_text("anon 900\ninactive_file 500\nactive_file 100\n")
    assert check_device.free_memory_bytes(tmp_path) == 2000
    (tmp_path / "memory.max").write_text("max\n")
    assert check_device.free_memory_bytes(tmp_path) == pytest.approx(machine, rel=0.2)


# Data


def test_records_and_patients_are_counted(site: SiteConfig) -> None:
    lines = _by_name(check_data(site))
    assert lines["data"].state == "pass"
    assert "40 usable records of 20 patients, 0 skipped" in lines["data"].detail
    assert lines["declared size"].detail == "20 declared, 20 patients here"
    assert lines["patients"].state == "warn"


@pytest.mark.parametrize(
    ("declared", "state"), [(10, "pass"), (9, "warn"), (40, "pass"), (41, "warn")]
)
def test_a_declared_size_far_from_the_truth_warns(
    site: SiteConfig, declared: int, state: str
) -> None:
    changed = edited(site.folder, data={"declared-size": declared})
    assert _states(check_data(changed))["declared size"] == state


def test_data_that_cannot_be_used_fails_without_its_name_or_text(
    site: SiteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = site.data_path
    with records.open("a") as file:
        file.write("{Mrs. Miller, born 1961\n")
    line = _by_name(check_data(site))["data"]
    assert line.state == "fail"
    assert "data.path line 41 is not JSON" in line.detail
    records.write_text(json.dumps({"question": "Mrs. Miller"}) + "\n")
    line = _by_name(check_data(site))["data"]
    assert "1 of 1 records in data.path have no 'instruction'" in line.detail
    records.rename(records.with_name("miller.jsonl"))
    gone = _by_name(check_data(edited(site.folder, data={"path": "mrs-miller.jsonl"})))["data"]
    assert gone.state == "fail"
    assert "iller" not in f"{line}{gone}".lower()

    def refuse(*arguments: object, **named: object) -> None:
        raise PermissionError(13, "Permission denied", str(records))

    monkeypatch.setattr("common.dataset.load_records", refuse)
    line = _by_name(check_data(site))["data"]
    assert (line.state, line.detail) == ("fail", "data.path cannot be read (Permission denied)")


# Policy


def test_a_policy_that_was_gone_through_passes(site: SiteConfig) -> None:
    lines = _by_name(check_policy(site))
    assert {line.state for line in lines.values()} == {"pass"}
    assert lines["allowed models"].detail == "tiny"
    assert "epsilon 8 for 'north-records', ever" in lines["budget"].detail


@pytest.mark.parametrize(
    ("section", "values", "name", "state"),
    [
        ("policy", {"allowed-models": []}, "allowed models", "fail"),
        ("policy", {"max-epsilon": float("inf")}, "budget", "warn"),
        ("data", {"delta": 0.05}, "delta", "fail"),
        ("policy", {"max-delta": 0.06}, "delta", "fail"),
        ("policy", {"require-dp": False}, "release", "warn"),
        ("policy", {"release-metrics": ["train-loss"]}, "release", "warn"),
    ],
)
def test_what_protects_less_than_it_seems_is_said(
    site: SiteConfig, section: str, values: dict[str, Any], name: str, state: str
) -> None:
    """delta 0.05 is 1 / 20 patients: not below it."""
    states = _states(check_policy(edited(site.folder, **{section: values})))
    assert states.pop(name) == state
    assert set(states.values()) == {"pass"}


# Keys


def test_keys_as_init_makes_them_pass(site: SiteConfig) -> None:
    lines = _by_name(check_keys(site))
    assert {line.state for line in lines.values()} == {"pass"}
    public = SigningKey.load(site.signing_key_path).public_hex
    assert public[:16] in lines["signing key"].detail


@pytest.mark.parametrize("path", ["keys/signing.pem", "keys/node", "site.toml", "keys", "."])
def test_what_others_may_read_fails_with_the_command_that_mends_it(
    site: SiteConfig, path: str
) -> None:
    target = site.folder / path
    mode = "700" if target.is_dir() else "600"
    target.chmod(0o755 if target.is_dir() else 0o640)
    line = _by_name(check_keys(site))["modes"]
    assert line.state == "fail"
    assert line.remedy == f"chmod {mode} {target}"
    target.chmod(int(mode, 8))
    assert _states(check_keys(site))["modes"] == "pass"


def test_a_folder_that_a_group_may_only_pass_through_is_private(site: SiteConfig) -> None:
    site.folder.chmod(0o710)
    assert _states(check_keys(site))["modes"] == "pass"


def test_missing_and_wrong_keys_fail(site: SiteConfig) -> None:
    node, signing = site.node_key_path, site.signing_key_path
    private = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    for content, said in (
        (private, "is not ECDSA P-384"),
        (b"nothing", "is no unencrypted private key in OpenSSH form"),
        (None, "no node key at"),
    ):
        node.unlink()
        if content is not None:
            node.write_bytes(content)
        line = _by_name(check_keys(site))["node key"]
        assert line.state == "fail"
        assert said in line.detail
        node.touch()
    signing.write_bytes(node.read_bytes())
    line = _by_name(check_keys(site))["signing key"]
    assert (line.state, "is not an unencrypted PEM private key" in line.detail) == ("fail", True)


def test_a_public_half_of_another_key_is_seen(site: SiteConfig, tmp_path: Path) -> None:
    make_node_key(tmp_path / "other")
    shutil.copy(tmp_path / "other.pub", site.node_key_path.with_suffix(".pub"))
    line = _by_name(check_keys(site))["node key"]
    assert line.state == "fail"
    assert "is not the public half of" in line.detail


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_files_of_another_user_fail(site: SiteConfig) -> None:
    os.chown(site.signing_key_path, 65534, -1)
    line = _by_name(check_keys(site))["owner"]
    assert line.state == "fail"
    assert str(site.signing_key_path) in line.detail
    assert line.remedy.startswith("chown -R root ")


def test_another_user_than_the_owner_is_told_whose_it_is(
    site: SiteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 65533)
    line = _by_name(check_keys(site))["owner"]
    assert line.state == "fail"
    assert "and this is 65533" in line.detail
