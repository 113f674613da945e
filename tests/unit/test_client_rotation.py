"""A hospital's new keys: the old ones answer until the coordinator has taken the new ones, not longer."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from client.provisioning import ENROLMENT_FILE, init_site, join
from client.rotation import ROTATION_FILE, finish_rotation, rotate
from client.site import Site
from client.site_config import SiteConfig, load_site_config
from common.audit_log import AuditLog, verify_audit_log
from common.enrolment import Bundle, open_enrolment
from common.errors import AuditError, ConfigError, SignatureError
from common.locks import hold_lock
from common.membership import open_rotation
from common.signing import SigningKey
from server.certificates import make_authority

COORDINATOR = SigningKey.generate()
CERTIFICATE = make_authority("test").certificate.decode()


@pytest.fixture
def site(tmp_path: Path) -> SiteConfig:
    """A hospital that has joined, with two lines in its log."""
    folder = tmp_path / "bern"
    made = init_site(folder, name="bern", declared_size=1200, unit="record")
    site = join(folder, _bundle(made.signing_key))
    log = AuditLog(folder / "state" / "audit.jsonl", SigningKey.load(site.signing_key_path))
    log.append("sent", round=1)
    log.append("sent", round=2)
    return site


def _bundle(signing_key: str) -> Bundle:
    return Bundle("bern", "127.0.0.1:9", CERTIFICATE, COORDINATOR.public_hex, signing_key)


def _files(site: SiteConfig) -> dict[str, bytes]:
    return {
        str(path.relative_to(site.folder)): path.read_bytes()
        for path in site.folder.rglob("*")
        if path.is_file() and ".lock" not in path.name
    }


def test_the_old_keys_stay_in_use_until_the_coordinator_has_answered(site: SiteConfig) -> None:
    before = _files(site)
    sealed = rotate(site).read_bytes()
    after = _files(site)
    assert {name for name in after if before.get(name) != after[name]} == {
        "keys/next/signing.pem", "keys/next/node", "keys/next/node.pub", ROTATION_FILE,
    }  # fmt: skip
    rotation = open_rotation(sealed)
    assert rotation.former_key == SigningKey.load(site.signing_key_path).public_hex
    new = SigningKey.load(site.folder / "keys" / "next" / "signing.pem")
    assert rotation.opened().signing_key == new.public_hex
    for private in ("signing.pem", "node"):
        path = site.folder / "keys" / "next" / private
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert path.read_bytes().splitlines()[1] not in sealed
    # Asked for again, before it was sent or after: the same keys.
    assert rotate(site).read_bytes() == sealed


def test_the_new_keys_take_their_place_and_the_log_goes_on(site: SiteConfig) -> None:
    new = open_rotation(rotate(site).read_bytes()).opened()
    former = SigningKey.load(site.signing_key_path)
    finish_rotation(site, _bundle(new.signing_key))
    assert SigningKey.load(site.signing_key_path).public_hex == new.signing_key
    assert site.node_key_path.with_suffix(".pub").read_text().strip() == new.node_key
    assert open_enrolment((site.folder / ENROLMENT_FILE).read_bytes()) == new
    assert not (site.folder / "keys" / "next").exists()
    opened = Site.open(site.folder)
    opened.audit.append("sent", round=3)
    verified = verify_audit_log(opened.audit.path, public_hex=opened.public_key)
    assert verified.lines == 4
    with pytest.raises(AuditError, match="the key of .* was changed to"):
        AuditLog(opened.audit.path, former).append("sent", round=4)
    before = _files(site)
    finish_rotation(site, _bundle(new.signing_key))
    assert _files(site) == before


@pytest.mark.parametrize("cut_at", range(5))
def test_a_finish_that_was_cut_off_is_finished_by_the_same_command(
    site: SiteConfig, cut_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = open_rotation(rotate(site).read_bytes()).opened()
    writes = iter(range(10))
    written = _really_write()

    def cut(path: Path, content: bytes, *, mode: int = 0o644) -> None:
        if next(writes) == cut_at:
            raise OSError("cut")
        written(path, content, mode=mode)

    with monkeypatch.context() as patch:
        patch.setattr("client.rotation.write_atomically", cut)
        patch.setattr("client.rotation.shutil.rmtree", lambda path: cut(path, b""))
        with pytest.raises(OSError, match="cut"):
            finish_rotation(site, _bundle(new.signing_key))
    finish_rotation(load_site_config(site.folder), _bundle(new.signing_key))
    opened = Site.open(site.folder)
    assert opened.public_key == new.signing_key
    opened.audit.append("sent", round=3)
    assert verify_audit_log(opened.audit.path, public_hex=new.signing_key).lines == 4


def _really_write():  # type: ignore[no-untyped-def]
    from common.files import write_atomically

    return write_atomically


def test_only_the_answer_of_a_coordinator_of_this_site_to_these_keys_is_taken(
    site: SiteConfig,
) -> None:
    bundle = _bundle(open_rotation(rotate(site).read_bytes()).opened().signing_key)
    before = _files(site)
    stranger = SigningKey.generate().public_hex
    with pytest.raises(SignatureError, match="which site.toml does not name"):
        finish_rotation(site, replace(bundle, public_key=stranger))
    for other in (replace(bundle, signing_key=stranger), replace(bundle, site="oslo")):
        with pytest.raises(ConfigError, match="ask for the bundle that answers rotation.json"):
            finish_rotation(site, other)
    assert _files(site) == before


@pytest.mark.parametrize("command", ["up", "agent"])
def test_keys_are_not_exchanged_under_a_site_that_runs(site: SiteConfig, command: str) -> None:
    bundle = _bundle(open_rotation(rotate(site).read_bytes()).opened().signing_key)
    with (
        hold_lock(site.folder / "state" / f"{command}.lock"),
        pytest.raises(ConfigError, match=f"process {os.getpid()} is `consilium client {command}`"),
    ):
        finish_rotation(site, bundle)


def test_finishing_what_was_not_begun_says_so(site: SiteConfig) -> None:
    with pytest.raises(ConfigError, match="no new keys that wait; make them"):
        finish_rotation(site, _bundle("ab" * 32))
