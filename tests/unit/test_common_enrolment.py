"""Enrolments and bundles: signed by their makers, and nothing else passes for one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from common.canonical import canonical_json, from_canonical
from common.enrolment import (
    Bundle,
    Enrolment,
    fingerprint,
    open_bundle,
    open_enrolment,
    seal_bundle,
    seal_enrolment,
)
from common.errors import ProtocolError, SignatureError
from common.signing import BUNDLE_DOMAIN, ENROLMENT_DOMAIN, SigningKey
from server.certificates import make_authority

KEY = SigningKey.generate()
OPENSSH = (serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)


def _ssh(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> str:
    return key.public_key().public_bytes(*OPENSSH).decode()


ENROLMENT = Enrolment("bern", 1200, KEY.public_hex, _ssh(ec.generate_private_key(ec.SECP384R1())))
BUNDLE = Bundle(
    "bern",
    "consilium.example.org:8000",
    make_authority("test").certificate.decode(),
    KEY.public_hex,
    "ab" * 32,
)


def test_both_open_as_they_were_sealed() -> None:
    assert open_enrolment(seal_enrolment(ENROLMENT, KEY)) == ENROLMENT
    assert open_bundle(seal_bundle(BUNDLE, KEY)) == BUNDLE


def test_flipping_any_byte_is_refused() -> None:
    for sealed, open_ in (
        (seal_enrolment(ENROLMENT, KEY), open_enrolment),
        (seal_bundle(BUNDLE, KEY), open_bundle),
    ):
        for position in range(len(sealed) - 1):
            changed = bytearray(sealed)
            changed[position] ^= 1
            with pytest.raises((SignatureError, ProtocolError), match=r"ask for it again|taken"):
                open_(bytes(changed))  # type: ignore[operator]


def test_whoever_does_not_hold_the_key_cannot_use_it() -> None:
    with pytest.raises(SignatureError, match="is not its maker's; do not use it"):
        open_enrolment(seal_enrolment(ENROLMENT, SigningKey.generate()))


def test_one_kind_never_passes_for_the_other() -> None:
    payload = canonical_json(from_canonical(seal_enrolment(ENROLMENT, KEY))["payload"])
    signature = KEY.sign(payload, domain=BUNDLE_DOMAIN)
    forged = canonical_json({"payload": payload.decode(), "signature": signature.hex()})
    with pytest.raises((ProtocolError, SignatureError), match="ask for it again"):
        open_enrolment(forged)
    with pytest.raises(ProtocolError, match="not a Consilium bundle"):
        open_bundle(seal_enrolment(ENROLMENT, KEY))
    assert ENROLMENT_DOMAIN != BUNDLE_DOMAIN


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"site": "../bern"}, "site '../bern' is no name"),
        ({"site": ""}, "is no name"),
        ({"declared_size": 0}, "declared_size is 0"),
        ({"declared_size": 10**12 + 1}, "declared_size is 1000000000001"),
        ({"node_key": "ssh-rsa AAAA"}, "node_key is no ECDSA P-384"),
        ({"node_key": _ssh(ed25519.Ed25519PrivateKey.generate())}, "no ECDSA P-384"),
        ({"node_key": _ssh(ec.generate_private_key(ec.SECP256R1()))}, "no ECDSA P-384"),
    ],
)
def test_an_enrolment_that_cannot_be_used_is_refused_in_words(
    change: dict[str, Any], match: str
) -> None:
    with pytest.raises(ProtocolError, match=match):
        open_enrolment(seal_enrolment(replace(ENROLMENT, **change), KEY))


@pytest.mark.parametrize("change", [{"address": "nowhere"}, {"root_certificate": "not one"}])
def test_a_bundle_that_cannot_be_used_is_refused(change: dict[str, str]) -> None:
    with pytest.raises(ProtocolError, match="this bundle cannot be taken"):
        open_bundle(seal_bundle(replace(BUNDLE, **change), KEY))


@pytest.mark.parametrize("data", [b"", b"{}", b"[" * 100_000, b"x" * 100_000, b"\xff\xfe"])
def test_a_file_that_is_neither_is_refused(data: bytes) -> None:
    for open_ in (open_enrolment, open_bundle):
        with pytest.raises(ProtocolError, match="ask for it again"):
            open_(data)  # type: ignore[operator]


def test_a_fingerprint_can_be_read_aloud_and_differs_by_key() -> None:
    shown = fingerprint(KEY.public_hex)
    assert [len(group) for group in shown.split(" ")] == [4] * 10
    assert shown == ENROLMENT.fingerprint != fingerprint(SigningKey.generate().public_hex)
