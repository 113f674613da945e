"""A hospital's folder from nothing, and how it comes to believe a coordinator."""

from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path

import pytest

from client.node import check_connection
from client.provisioning import ENROLMENT_FILE, init_site, join
from client.site_config import load_site_config
from common.config import read_toml
from common.enrolment import Bundle, open_enrolment
from common.errors import ConfigError, ConsiliumError
from common.model_folder import digest_model
from common.signing import SigningKey
from server.certificates import make_authority

OWN = SigningKey.generate()
BUNDLE = Bundle(
    "bern",
    "consilium.example.org:8000",
    make_authority("test").certificate.decode(),
    SigningKey.generate().public_hex,
    OWN.public_hex,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "bern"
    (folder / "keys").mkdir(parents=True)
    OWN.save(folder / "keys" / "signing.pem")
    init_site(folder, name="bern", declared_size=1200, unit="patient", patient_id="pseudonym")
    return folder


def test_the_enrolment_holds_public_parts_only(folder: Path) -> None:
    sealed = (folder / ENROLMENT_FILE).read_bytes()
    enrolment = open_enrolment(sealed)
    assert (enrolment.site, enrolment.declared_size) == ("bern", 1200)
    assert enrolment.signing_key == SigningKey.load(folder / "keys" / "signing.pem").public_hex
    assert enrolment.node_key == (folder / "keys" / "node.pub").read_text().strip()
    for private in ("signing.pem", "node"):
        body = (folder / "keys" / private).read_text().splitlines()[1]
        assert body.encode() not in sealed
    for private in ("signing.pem", "node"):
        assert stat.S_IMODE((folder / "keys" / private).stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_before_it_has_joined_it_believes_nobody(folder: Path) -> None:
    with pytest.raises(ConfigError, match="give the key of at least one coordinator"):
        load_site_config(folder)


def test_joining_pins_the_coordinator_and_keeps_what_people_wrote(folder: Path) -> None:
    path = folder / "site.toml"
    path.write_text(path.read_text().replace("max-epsilon = 8.0 ", "max-epsilon = 3.0 "))
    config = join(folder, BUNDLE)

    assert config.coordinator.public_keys == (BUNDLE.public_key,)
    assert config.coordinator.address == "consilium.example.org:8000"
    assert config.policy.max_epsilon == 3.0
    assert (config.data.unit, config.data.patient_id) == ("patient", "pseudonym")
    assert "# who is hidden, for this data set's whole life" in path.read_text()
    assert config.root_certificates_path.read_text() == BUNDLE.root_certificate
    check_connection(config)


def test_the_same_bundle_again_changes_nothing(folder: Path) -> None:
    join(folder, BUNDLE)
    before = (folder / "site.toml").read_text()
    join(folder, BUNDLE)
    assert (folder / "site.toml").read_text() == before


def test_a_bundle_that_answers_other_keys_is_refused(folder: Path) -> None:
    before = (folder / "site.toml").read_text()
    with pytest.raises(ConfigError, match=r"signs with .*rotate --finish"):
        join(folder, replace(BUNDLE, signing_key="ab" * 32))
    assert (folder / "site.toml").read_text() == before


def test_another_sites_bundle_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="is for site 'oslo', and .* is 'bern'"):
        join(folder, replace(BUNDLE, site="oslo"))


def test_another_coordinator_never_takes_the_place_of_the_first(folder: Path) -> None:
    join(folder, BUNDLE)
    before = (folder / "site.toml").read_text()
    with pytest.raises(ConfigError, match="believes another coordinator"):
        join(folder, replace(BUNDLE, public_key=SigningKey.generate().public_hex))
    assert (folder / "site.toml").read_text() == before


def test_a_site_toml_that_does_not_hold_is_left_as_it_was(folder: Path) -> None:
    path = folder / "site.toml"
    path.write_text(path.read_text().replace("delta = 1e-5", "delta = 7.0"))
    before = path.read_text()
    with pytest.raises(ConfigError, match=r"data\.delta"):
        join(folder, BUNDLE)
    assert path.read_text() == before


def test_a_folder_with_a_site_is_not_made_again(folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="holds a site already; its enrolment is"):
        init_site(folder, name="oslo", declared_size=1, unit="record")
    assert before == {path: path.read_bytes() for path in before}


def test_keys_that_are_there_are_kept(folder: Path) -> None:
    """A folder whose making was interrupted: what the coordinator may have seen stays."""
    keys = {
        name: (folder / "keys" / name).read_bytes() for name in ("signing.pem", "node", "node.pub")
    }
    (folder / "site.toml").unlink()
    init_site(folder, name="bern", declared_size=1200, unit="record")
    assert keys == {name: (folder / "keys" / name).read_bytes() for name in keys}


def test_patients_need_a_column(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--unit patient needs --patient-id"):
        init_site(tmp_path / "bern", name="bern", declared_size=10, unit="patient")
    assert not (tmp_path / "bern").exists()


def test_joining_one_of_several_coordinators_again_keeps_the_others(folder: Path) -> None:
    join(folder, BUNDLE)
    path, other = folder / "site.toml", SigningKey.generate().public_hex
    key = BUNDLE.public_key
    path.write_text(path.read_text().replace(f'"{key}"', f'["{key}", "{other}"]'))
    config = join(folder, replace(BUNDLE, address="other.example.org:8000"))
    assert config.coordinator.public_keys == (key, other)
    assert config.coordinator.address == "other.example.org:8000"


@pytest.mark.parametrize("name", ["St. Mary", "", "../bern", ".bern", "x" * 65, "bern\n"])
def test_a_name_that_the_coordinator_would_refuse_makes_no_folder(
    tmp_path: Path, name: str
) -> None:
    with pytest.raises(ConfigError, match="a site's name is 1 to 64 letters"):
        init_site(tmp_path / "new", name=name, declared_size=10, unit="record")
    assert not (tmp_path / "new").exists()


def test_data_and_models_that_are_named_stand_in_site_toml(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    data = tmp_path / "notes.jsonl"
    data.write_text("{}\n")
    init_site(
        tmp_path / "new", name="bern", declared_size=10, unit="record", data=data,
        models=[tiny_model_dir],
    )  # fmt: skip
    written = read_toml(tmp_path / "new" / "site.toml")
    assert written["data"]["path"] == str(data)
    assert written["policy"]["allowed-models"] == [
        {
            "name": tiny_model_dir.name,
            "path": str(tiny_model_dir),
            "digest": digest_model(tiny_model_dir),
        }
    ]
    assert written["agent"] == {"socket": "state/agent.sock", "idle-unload-s": 1800}


@pytest.mark.parametrize("wrong", ["data", "models"])
def test_data_or_a_model_that_is_not_there_makes_no_folder(tmp_path: Path, wrong: str) -> None:
    nothing = tmp_path / "nothing"
    given = {"data": nothing} if wrong == "data" else {"models": [nothing]}
    with pytest.raises(ConsiliumError, match="nothing"):
        init_site(tmp_path / "new", name="bern", declared_size=10, unit="record", **given)
    assert not (tmp_path / "new").exists()
