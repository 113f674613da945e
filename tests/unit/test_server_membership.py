"""Enrolling, changing keys, revoking: who is on the roster, whose keys hold, what Flower is told."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from common.audit_log import read_audit_log
from common.enrolment import Enrolment, open_bundle
from common.errors import ConfigError, EngineError, SignatureError
from common.locks import hold_lock
from common.membership import Withdrawal, open_rotation, seal_rotation
from common.signing import SigningKey
from server.coordinator import Coordinator
from server.flower_control import ControlError, FlowerControl
from server.membership import enrol, revoke, rotate, strike_revoked
from server.provisioning import init_coordinator
from server.revocations import Revocations
from server.superlink_state import registered_nodes

OPENSSH = (serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
PEM = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


class Flower:
    """The SuperLink, as far as its database goes; `up` is held as `server up` holds it."""

    def __init__(self, coordinator: Coordinator) -> None:
        self.coordinator = coordinator
        self.away = False
        with self.database() as database:
            database.execute(
                "CREATE TABLE node (node_id INTEGER UNIQUE, status TEXT, unregistered_at TEXT, "
                "public_key BLOB UNIQUE)"
            )

    @contextmanager
    def database(self) -> Iterator[sqlite3.Connection]:
        self.coordinator.flower_home.mkdir(exist_ok=True)
        connection = sqlite3.connect(self.coordinator.superlink_database)
        with connection:
            yield connection
        connection.close()

    def register(self, control: FlowerControl, public_key: Path) -> None:
        key = serialization.load_ssh_public_key(public_key.read_bytes()).public_bytes(*PEM)
        try:
            with self.database() as database:
                count = len(database.execute("SELECT * FROM node").fetchall())
                # As Flower keeps them: an id from 2^63 up is negative here.
                database.execute(
                    "INSERT INTO node VALUES (?, 'registered', NULL, ?)", (count - 2, key)
                )
        except sqlite3.IntegrityError:
            raise ControlError("Public key already in use") from None

    def unregister(self, control: FlowerControl, node_id: int) -> None:
        if self.away:
            raise ControlError("no answer")
        with self.database() as database:
            signed = node_id - (1 << 64) if node_id >= 1 << 63 else node_id
            changed = database.execute(
                "UPDATE node SET status = 'unregistered' WHERE node_id = ?", (signed,)
            )
            assert changed.rowcount == 1

    def lets_in(self, *keys: str) -> list[str]:
        return list(registered_nodes(self.coordinator.superlink_database, keys))


@pytest.fixture
def coordinator(tmp_path: Path) -> Coordinator:
    return init_coordinator(tmp_path / "coordinator", address="127.0.0.1:9")


@pytest.fixture
def flower(coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch) -> Iterator[Flower]:
    flower = Flower(coordinator)
    monkeypatch.setattr(FlowerControl, "register_node", lambda *a: flower.register(*a))
    monkeypatch.setattr(FlowerControl, "unregister_node", lambda *a: flower.unregister(*a))
    with hold_lock(coordinator.up_lock):
        yield flower


def _enrolment(site: str = "bern", key: SigningKey | None = None) -> Enrolment:
    node = ec.generate_private_key(ec.SECP384R1()).public_key().public_bytes(*OPENSSH).decode()
    return Enrolment(site, 1200, (key or SigningKey.generate()).public_hex, node)


def _lines(coordinator: Coordinator, event: str) -> list[dict[str, object]]:
    log = read_audit_log(coordinator.audit_log)
    return [dict(line.fields) for line in log if line.event == event]


def test_a_revoked_site_is_off_the_roster_and_its_node_is_refused(
    coordinator: Coordinator, flower: Flower
) -> None:
    bern, oslo = _enrolment("bern"), _enrolment("oslo")
    enrol(coordinator, bern)
    enrol(coordinator, oslo)
    done = revoke(coordinator, "bern", why="its agreement ended")
    assert (done.again, done.node_known) == (False, True)
    assert list(coordinator.roster()) == ["oslo"]
    assert flower.lets_in(bern.node_key, oslo.node_key) == [oslo.node_key]
    [line] = _lines(coordinator, "revoked")
    assert line == {"site": "bern", "key": bern.signing_key, "why": "its agreement ended"}


@pytest.mark.parametrize("key", ["signing_key", "node_key"])
def test_a_key_of_another_site_is_not_enrolled_again(
    coordinator: Coordinator, flower: Flower, key: str
) -> None:
    """Else revoking the one would shut out the other."""
    bern = _enrolment("bern")
    enrol(coordinator, bern)
    copied = replace(_enrolment("oslo"), **{key: getattr(bern, key)})
    with pytest.raises(ConfigError, match="oslo brings a key of bern"):
        enrol(coordinator, copied)
    assert list(coordinator.roster()) == ["bern"]


@pytest.mark.parametrize("changed", ["signing_key", "node_key", "site"])
def test_a_revoked_key_is_never_enrolled_again_whatever_comes_with_it(
    coordinator: Coordinator, flower: Flower, changed: str
) -> None:
    bern = _enrolment()
    enrol(coordinator, bern)
    revoke(coordinator, "bern")
    other = replace(bern, **{changed: getattr(_enrolment("rome"), changed)})
    with pytest.raises(ConfigError, match=r"a key that holds no more: bern was revoked on 20\d\d-"):
        enrol(coordinator, other)
    assert len(coordinator.roster()) == 0
    enrol(coordinator, _enrolment())
    assert list(coordinator.roster()) == ["bern"]


def test_while_nothing_runs_the_superlinks_own_database_is_changed(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    flower, bern = Flower(coordinator), _enrolment()
    monkeypatch.setattr(FlowerControl, "register_node", lambda *a: flower.register(*a))
    with hold_lock(coordinator.up_lock):
        enrol(coordinator, bern)
    assert flower.lets_in(bern.node_key) == [bern.node_key]
    revoke(coordinator, "bern")
    assert flower.lets_in(bern.node_key) == []


def test_when_flower_cannot_be_told_the_site_is_out_and_the_next_start_tells_it(
    coordinator: Coordinator, flower: Flower
) -> None:
    bern = _enrolment()
    enrol(coordinator, bern)
    flower.away = True
    with pytest.raises(EngineError, match=r"the roster is changed.*give the same command again"):
        revoke(coordinator, "bern")
    assert len(coordinator.roster()) == 0
    assert flower.lets_in(bern.node_key) == [bern.node_key]
    strike_revoked(coordinator)
    assert flower.lets_in(bern.node_key) == []
    flower.away = False
    assert revoke(coordinator, "bern").again
    assert len(_lines(coordinator, "revoked")) == 1


def test_revoking_who_was_never_there_names_who_is(
    coordinator: Coordinator, flower: Flower
) -> None:
    enrol(coordinator, _enrolment("oslo"))
    with pytest.raises(ConfigError, match="no site 'bern' is enrolled; enrolled are oslo"):
        revoke(coordinator, "bern")


def test_a_withdrawal_revokes_by_the_sites_own_word(
    coordinator: Coordinator, flower: Flower
) -> None:
    key = SigningKey.generate()
    enrol(coordinator, _enrolment(key=key))
    ours = SigningKey.load(coordinator.signing_key).public_hex
    said = Withdrawal("bern", key.public_hex, ours, 1_700_000_000)
    stranger = SigningKey.generate().public_hex
    with pytest.raises(SignatureError, match="not the pinned one of bern"):
        revoke(coordinator, "bern", withdrawal=replace(said, signing_key=stranger))
    with pytest.raises(ConfigError, match="withdraws from another coordinator"):
        revoke(coordinator, "bern", withdrawal=replace(said, coordinator=stranger))
    assert list(coordinator.roster()) == ["bern"]
    revoke(coordinator, "bern", why="something else", withdrawal=said)
    assert [one.why for one in Revocations(coordinator.revocations_file).all()] == ["withdrawn"]
    assert len(coordinator.roster()) == 0


def test_new_keys_take_the_place_of_the_old_ones_which_hold_no_more(
    coordinator: Coordinator, flower: Flower
) -> None:
    former, new = SigningKey.generate(), SigningKey.generate()
    before, after = _enrolment(key=former), _enrolment(key=new)
    enrol(coordinator, before)
    rotation = open_rotation(seal_rotation(after, former=former, new=new))
    bundle = open_bundle(rotate(coordinator, rotation))
    assert bundle.signing_key == new.public_hex
    entry = coordinator.roster()["bern"]
    assert (entry.public_key, entry.node_key) == (new.public_hex, after.node_key)
    assert flower.lets_in(before.node_key, after.node_key) == [after.node_key]
    # Again, as after a cut; and never back.
    rotate(coordinator, rotation)
    assert len(_lines(coordinator, "rotated")) == 1
    with pytest.raises(ConfigError, match="is enrolled with another key"):
        enrol(coordinator, before)
    back = open_rotation(seal_rotation(before, former=new, new=former))
    with pytest.raises(ConfigError, match=r"holds no more: bern was revoked .*\(rotated\)"):
        rotate(coordinator, back)


def test_a_rotation_that_the_pinned_key_did_not_sign_is_refused(
    coordinator: Coordinator, flower: Flower
) -> None:
    stranger, new = SigningKey.generate(), SigningKey.generate()
    enrol(coordinator, _enrolment())
    rotation = open_rotation(seal_rotation(_enrolment(key=new), former=stranger, new=new))
    with pytest.raises(SignatureError, match="not the pinned one of bern"):
        rotate(coordinator, rotation)
    revoke(coordinator, "bern")
    with pytest.raises(ConfigError, match="no site 'bern' is on the roster"):
        rotate(coordinator, rotation)


def test_another_node_key_by_the_pinned_signing_key_replaces_the_node(
    coordinator: Coordinator, flower: Flower
) -> None:
    key = SigningKey.generate()
    first, second = _enrolment(key=key), _enrolment(key=key)
    enrol(coordinator, first)
    enrol(coordinator, second)
    assert flower.lets_in(first.node_key, second.node_key) == [second.node_key]
    with pytest.raises(ConfigError, match="holds no more"):
        enrol(coordinator, first)
    assert coordinator.roster()["bern"].public_key == key.public_hex


def test_a_damaged_list_of_revoked_keys_lets_nobody_in(
    coordinator: Coordinator, flower: Flower
) -> None:
    coordinator.revocations_file.write_text('[{"site": "bern"}]')
    with pytest.raises(ConfigError, match="is not a list of revoked keys"):
        enrol(coordinator, _enrolment())
    with pytest.raises(ConfigError, match="is not a list of revoked keys"):
        strike_revoked(coordinator)
