"""Ed25519 keys and signatures over domain-separated bytes.

Every signature covers a domain tag, a zero byte and the payload, so that bytes signed as a task can
never pass for a reply. Keys are PEM files of mode 0600; public keys travel as 64 hex digits.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from common.errors import ConfigError, SignatureError
from common.files import write_atomically

TASK_DOMAIN = b"consilium/task/1"
REPLY_DOMAIN = b"consilium/reply/1"
AUDIT_DOMAIN = b"consilium/audit/1"
RECEIPT_DOMAIN = b"consilium/receipt/1"
ENROLMENT_DOMAIN = b"consilium/enrolment/1"
BUNDLE_DOMAIN = b"consilium/bundle/1"
ROTATION_DOMAIN = b"consilium/rotation/1"
WITHDRAWAL_DOMAIN = b"consilium/withdrawal/1"


class SigningKey:
    """A private Ed25519 key."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key

    @classmethod
    def generate(cls) -> SigningKey:
        """Return a fresh key from the operating system's entropy."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: Path) -> SigningKey:
        """Return the key in a PEM file. Raises ConfigError when it is missing or not Ed25519."""
        try:
            key = serialization.load_pem_private_key(path.read_bytes(), password=None)
        except FileNotFoundError:
            raise ConfigError(f"no signing key at {path}; make one, or correct the path") from None
        except (ValueError, TypeError):
            raise ConfigError(f"{path} is not an unencrypted PEM private key") from None
        if not isinstance(key, Ed25519PrivateKey):
            raise ConfigError(f"{path} is not an Ed25519 key; signing needs one")
        return cls(key)

    def save(self, path: Path) -> None:
        """Write the key as PEM, mode 0600. Raises ConfigError when the file exists."""
        if path.exists():
            raise ConfigError(f"{path} exists; a signing key is never overwritten")
        pem = self._key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        write_atomically(path, pem, mode=0o600)

    @property
    def public_hex(self) -> str:
        """The public key, 32 bytes as 64 hex digits."""
        raw = self._key.public_key().public_bytes(
            serialization.Encoding.Raw, serialization.PublicFormat.Raw
        )
        return raw.hex()

    def sign(self, payload: bytes, *, domain: bytes) -> bytes:
        """Return the 64-byte signature of `payload` under `domain`."""
        return self._key.sign(domain + b"\x00" + payload)


def verify(payload: bytes, signature: bytes, *, domain: bytes, public_hex: str) -> None:
    """Check a signature. Raises SignatureError when it does not hold, whatever the cause."""
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_hex))
        key.verify(signature, domain + b"\x00" + payload)
    except (InvalidSignature, ValueError):
        raise SignatureError(
            f"a {domain.decode()} signature does not hold for key {public_hex[:16]}...; "
            "the sender has another key, or the message was altered"
        ) from None


def verify_any(
    payload: bytes, signature: bytes, *, domain: bytes, public_keys: Sequence[str]
) -> str:
    """Return the one of `public_keys` that signed. Raises SignatureError when none did."""
    for public_hex in public_keys[:-1]:
        try:
            verify(payload, signature, domain=domain, public_hex=public_hex)
        except SignatureError:
            continue
        return public_hex
    verify(payload, signature, domain=domain, public_hex=public_keys[-1])
    return public_keys[-1]


def load_or_generate(path: Path) -> SigningKey:
    """Return the key at `path`, made and saved first when there is none."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        os.chmod(path.parent, 0o700)
        SigningKey.generate().save(path)
    return SigningKey.load(path)
