"""Signing keys and domain-separated signatures."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigError, SignatureError
from common.signing import REPLY_DOMAIN, TASK_DOMAIN, SigningKey, load_or_generate, verify

# RFC 8032, section 7.1, TEST 1: the secret key and its public key.
RFC_SECRET = "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"
RFC_PUBLIC = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"

KEY = SigningKey(Ed25519PrivateKey.from_private_bytes(bytes.fromhex(RFC_SECRET)))


def test_public_key_is_that_of_rfc_8032() -> None:
    assert KEY.public_hex == RFC_PUBLIC


@given(st.binary(max_size=40))
def test_signature_holds_for_what_was_signed(payload: bytes) -> None:
    signature = KEY.sign(payload, domain=TASK_DOMAIN)

    assert len(signature) == 64
    verify(payload, signature, domain=TASK_DOMAIN, public_hex=RFC_PUBLIC)


@pytest.mark.parametrize("bit", [0, 7])
def test_flipping_a_bit_of_any_byte_of_payload_or_signature_is_refused(bit: int) -> None:
    payload = b'{"round":1}'
    signature = KEY.sign(payload, domain=TASK_DOMAIN)
    whole = payload + signature

    for position in range(len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 1 << bit
        with pytest.raises(SignatureError, match="does not hold"):
            verify(
                bytes(changed[: len(payload)]),
                bytes(changed[len(payload) :]),
                domain=TASK_DOMAIN,
                public_hex=RFC_PUBLIC,
            )


def test_task_signature_is_refused_as_a_reply() -> None:
    signature = KEY.sign(b"{}", domain=TASK_DOMAIN)

    with pytest.raises(SignatureError, match="consilium/reply/1 signature does not hold"):
        verify(b"{}", signature, domain=REPLY_DOMAIN, public_hex=RFC_PUBLIC)


def test_domain_cannot_be_extended_into_the_payload() -> None:
    signature = KEY.sign(b"1rest", domain=b"consilium/task/")

    with pytest.raises(SignatureError, match="does not hold"):
        verify(b"rest", signature, domain=b"consilium/task/1", public_hex=RFC_PUBLIC)


def test_another_key_is_refused() -> None:
    signature = SigningKey.generate().sign(b"{}", domain=TASK_DOMAIN)

    with pytest.raises(SignatureError, match=f"key {RFC_PUBLIC[:16]}"):
        verify(b"{}", signature, domain=TASK_DOMAIN, public_hex=RFC_PUBLIC)


@pytest.mark.parametrize("public_hex", ["", "zz", RFC_PUBLIC[:-2], RFC_PUBLIC + "00"])
def test_malformed_public_key_is_refused_as_a_signature(public_hex: str) -> None:
    signature = KEY.sign(b"{}", domain=TASK_DOMAIN)

    with pytest.raises(SignatureError, match="does not hold"):
        verify(b"{}", signature, domain=TASK_DOMAIN, public_hex=public_hex)


@pytest.mark.parametrize("signature", [b"", b"\x00" * 64, b"\x01" * 63])
def test_malformed_signature_is_refused(signature: bytes) -> None:
    with pytest.raises(SignatureError, match="does not hold"):
        verify(b"{}", signature, domain=TASK_DOMAIN, public_hex=RFC_PUBLIC)


def test_saved_key_is_private_and_loads_as_the_same_key(tmp_path: Path) -> None:
    path = tmp_path / "site.key"

    KEY.save(path)

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert SigningKey.load(path).public_hex == RFC_PUBLIC


def test_key_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "site.key"
    KEY.save(path)

    with pytest.raises(ConfigError, match="never overwritten"):
        SigningKey.generate().save(path)

    assert SigningKey.load(path).public_hex == RFC_PUBLIC


def test_key_is_made_once_in_a_private_folder(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "site.key"

    first, second = load_or_generate(path), load_or_generate(path)

    assert first.public_hex == second.public_hex
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_fresh_keys_differ() -> None:
    assert SigningKey.generate().public_hex != SigningKey.generate().public_hex


def test_missing_key_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no signing key at .*absent"):
        SigningKey.load(tmp_path / "absent")


def test_garbage_and_encrypted_key_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(b"not a key")
    with pytest.raises(ConfigError, match="is not an unencrypted PEM private key"):
        SigningKey.load(path)
    path.write_bytes(
        Ed25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(ConfigError, match="is not an unencrypted PEM private key"):
        SigningKey.load(path)


def test_flowers_own_kind_of_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p384"
    path.write_bytes(
        ec.generate_private_key(ec.SECP384R1()).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )

    with pytest.raises(ConfigError, match="not an Ed25519 key"):
        SigningKey.load(path)
