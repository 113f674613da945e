"""The coordinator's release key: ECDSA P-384, which OpenSSF model signing takes, and its public half.

A key of its own: whoever checks a release need not know the key that signs tasks, and one that is stolen
does not open the other.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from common.errors import ConfigError
from common.files import write_atomically

PRIVATE_FILE, PUBLIC_FILE = "release.pem", "release.pub"
_SET_ASIDE = "release-ed25519.pem"
# Those that OpenSSF model signing takes.
_CURVES = ("secp256r1", "secp384r1", "secp521r1")
# A single changed byte can name a curve that the library does not know.
_NO_KEY = (ValueError, TypeError, UnsupportedAlgorithm)


@dataclass(frozen=True, slots=True)
class ReleaseKey:
    """A release key's files. fingerprint: SHA-256 of release.pub, as `sha256sum` and model.sig have it.

    is_new: whether the private key was made now, and not kept.
    """

    private: Path
    public: Path
    fingerprint: str
    is_new: bool


def make_release_key(folder: Path) -> ReleaseKey:
    """Write release.pem (mode 0600) and release.pub into a folder.

    An Ed25519 release.pem, as earlier versions wrote it, is set aside. Where release.pem is a release key
    already, release.pub alone is written. Raises ConfigError when release.pem is none of these.
    """
    private = folder / PRIVATE_FILE
    is_new = not private.exists() or _is_earlier_kind(private)
    if not is_new:
        load_release_key(private)
    else:
        if private.exists():
            if (folder / _SET_ASIDE).exists():
                raise ConfigError(f"{folder / _SET_ASIDE} is in the way; move it away")
            os.rename(private, folder / _SET_ASIDE)
        pem = ec.generate_private_key(ec.SECP384R1()).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        write_atomically(private, pem, mode=0o600)
    public = _public_pem(load_release_key(private))
    write_atomically(folder / PUBLIC_FILE, public)
    return ReleaseKey(private, folder / PUBLIC_FILE, sha256(public).hexdigest(), is_new)


def load_release_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Return the private key in a PEM file. Raises ConfigError when it can sign no release."""
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise ConfigError(
            f"no release key at {path} ({error.strerror}); make one with `consilium server release-key DIR`, "
            "or name it: --key FILE"
        ) from None
    except _NO_KEY:
        raise ConfigError(
            f"{path} is not an unencrypted PEM private key of a known kind; give the release.pem that "
            "`consilium server release-key DIR` wrote"
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name not in _CURVES:
        raise ConfigError(
            f"{path} is not an ECDSA P-384 key, which OpenSSF model signing needs (earlier versions wrote "
            "Ed25519 ones); make one with `consilium server release-key DIR`"
        )
    return key


def public_pem(path: Path) -> bytes:
    """Return the public half of a release key, from its file or from release.pub, as release.pub has it.

    Raises ConfigError when the file holds neither.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"no public key at {path} ({error.strerror}); give the release.pub that its coordinator gave you"
        ) from None
    if b"PRIVATE KEY" in content:
        return _public_pem(load_release_key(path))
    try:
        key = serialization.load_pem_public_key(content)
    except _NO_KEY:
        raise ConfigError(
            f"{path} is not a PEM public key of a known kind; give a release.pub"
        ) from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in _CURVES:
        raise ConfigError(
            f"{path} is not an ECDSA key, and releases are signed by one; give a release.pub"
        )
    return _pem(key)


def _public_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return _pem(key.public_key())


def _pem(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def _is_earlier_kind(path: Path) -> bool:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except _NO_KEY:
        return False
    return isinstance(key, Ed25519PrivateKey)
