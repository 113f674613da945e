"""What an enrolled hospital says later: new keys, or that it leaves; only itself can say it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from common.enrolment import Enrolment, open_enrolment, seal_enrolment
from common.errors import ProtocolError, SignatureError
from common.membership import (
    Rotation,
    Withdrawal,
    open_rotation,
    open_withdrawal,
    seal_rotation,
    seal_withdrawal,
)
from common.sealed import seal
from common.signing import ROTATION_DOMAIN, WITHDRAWAL_DOMAIN, SigningKey

FORMER, NEW, OTHER = (SigningKey.generate() for _ in range(3))
NODE = (
    ec.generate_private_key(ec.SECP384R1())
    .public_key()
    .public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    .decode()
)
ENROLMENT = Enrolment("bern", 1200, NEW.public_hex, NODE)
WITHDRAWAL = Withdrawal("bern", FORMER.public_hex, OTHER.public_hex, 1_700_000_000)


def test_a_rotation_brings_the_new_keys_and_names_the_former_one() -> None:
    opened = open_rotation(seal_rotation(ENROLMENT, former=FORMER, new=NEW))
    assert opened.former_key == FORMER.public_hex
    assert opened.opened() == ENROLMENT


def test_whoever_holds_only_one_of_the_two_keys_cannot_rotate() -> None:
    inner = seal_enrolment(ENROLMENT, NEW).decode()
    statement = Rotation("bern", FORMER.public_hex, inner)
    with pytest.raises(SignatureError, match="not its maker's"):
        open_rotation(seal(statement, OTHER, domain=ROTATION_DOMAIN))
    of_another = seal_enrolment(ENROLMENT, OTHER).decode()
    with pytest.raises(SignatureError, match="not its maker's"):
        open_rotation(
            seal(replace(statement, enrolment=of_another), FORMER, domain=ROTATION_DOMAIN)
        )


def test_the_keys_in_a_rotation_are_new_and_of_the_same_site() -> None:
    same = seal_enrolment(replace(ENROLMENT, signing_key=FORMER.public_hex), FORMER).decode()
    with pytest.raises(ProtocolError, match="brings no new signing key"):
        open_rotation(
            seal(Rotation("bern", FORMER.public_hex, same), FORMER, domain=ROTATION_DOMAIN)
        )
    inner = seal_enrolment(ENROLMENT, NEW).decode()
    with pytest.raises(ProtocolError, match="of site 'oslo', and the keys in it are of 'bern'"):
        open_rotation(
            seal(Rotation("oslo", FORMER.public_hex, inner), FORMER, domain=ROTATION_DOMAIN)
        )


def test_a_withdrawal_opens_as_it_was_sealed_and_is_nobody_elses() -> None:
    assert open_withdrawal(seal_withdrawal(WITHDRAWAL, FORMER)) == WITHDRAWAL
    with pytest.raises(SignatureError, match="not its maker's"):
        open_withdrawal(seal_withdrawal(WITHDRAWAL, OTHER))


def test_no_kind_passes_for_another() -> None:
    rotation = seal_rotation(ENROLMENT, former=FORMER, new=NEW)
    withdrawal = seal_withdrawal(WITHDRAWAL, FORMER)
    with pytest.raises(ProtocolError, match="not a Consilium withdrawal"):
        open_withdrawal(rotation)
    with pytest.raises(ProtocolError, match="not a Consilium rotation"):
        open_rotation(withdrawal)
    with pytest.raises(ProtocolError, match="not a Consilium enrolment"):
        open_enrolment(rotation)
    # The fields alone do not make it one: the domain is signed too.
    with pytest.raises(SignatureError, match="not its maker's"):
        open_withdrawal(seal(WITHDRAWAL, FORMER, domain=ROTATION_DOMAIN))
    assert ROTATION_DOMAIN != WITHDRAWAL_DOMAIN


def test_a_node_key_is_equal_to_itself_whatever_its_comment() -> None:
    commented = replace(ENROLMENT, node_key=f"{NODE} root@bern")
    assert open_enrolment(seal_enrolment(commented, NEW)) == ENROLMENT
