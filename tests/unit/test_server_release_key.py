"""The release key: made once, of the kind that OpenSSF model signing takes, never overwritten."""

from __future__ import annotations

import stat
from base64 import b64decode, b64encode
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from common.errors import ConfigError
from common.signing import SigningKey
from server.release.key import load_release_key, make_release_key, public_pem


def _save(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, path: Path) -> None:
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )


def test_a_key_is_made_with_its_public_half_and_fingerprint(tmp_path: Path) -> None:
    made = make_release_key(tmp_path)
    assert load_release_key(made.private).curve.name == "secp384r1"
    assert stat.S_IMODE(made.private.stat().st_mode) == 0o600
    assert made.public.read_bytes() == public_pem(made.private) == public_pem(made.public)
    assert b"PRIVATE" not in made.public.read_bytes()
    assert made.fingerprint == sha256(made.public.read_bytes()).hexdigest()


def test_a_key_that_is_there_stays_and_its_public_half_is_written_again(tmp_path: Path) -> None:
    made = make_release_key(tmp_path)
    private, public = made.private.read_bytes(), made.public.read_bytes()
    made.public.unlink()
    assert made.is_new
    assert make_release_key(tmp_path) == replace(made, is_new=False)
    assert (made.private.read_bytes(), made.public.read_bytes()) == (private, public)


def test_a_key_of_an_earlier_version_is_set_aside_not_lost(tmp_path: Path) -> None:
    SigningKey.generate().save(tmp_path / "release.pem")
    before = (tmp_path / "release.pem").read_bytes()
    with pytest.raises(ConfigError, match="is not an ECDSA P-384 key.*server release-key DIR"):
        load_release_key(tmp_path / "release.pem")
    made = make_release_key(tmp_path)
    assert load_release_key(made.private)
    assert (tmp_path / "release-ed25519.pem").read_bytes() == before
    made.private.unlink()
    (tmp_path / "release.pem").write_bytes(before)
    with pytest.raises(ConfigError, match="is in the way"):
        make_release_key(tmp_path)


@pytest.mark.parametrize("kind", ["rsa", "secp256k1", "text"])
def test_a_key_that_can_sign_no_release_is_refused_and_left(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "release.pem"
    if kind == "rsa":
        _save(rsa.generate_private_key(65537, 2048), path)
    elif kind == "secp256k1":
        _save(ec.generate_private_key(ec.SECP256K1()), path)
    else:
        path.write_text("-----BEGIN PRIVATE KEY-----\n")
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"release\.pem is not an"):
        make_release_key(tmp_path)
    assert path.read_bytes() == before


def test_another_curve_of_the_specification_will_do(tmp_path: Path) -> None:
    _save(ec.generate_private_key(ec.SECP256R1()), tmp_path / "mine.pem")
    assert load_release_key(tmp_path / "mine.pem").curve.name == "secp256r1"


def test_what_is_no_public_key_is_said_in_words(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no public key at .*none\.pub"):
        public_pem(tmp_path / "none.pub")
    (tmp_path / "text.pub").write_text("nothing")
    with pytest.raises(ConfigError, match="is not a PEM public key"):
        public_pem(tmp_path / "text.pub")
    with pytest.raises(ConfigError, match=r"no release key at .*release-key DIR"):
        load_release_key(tmp_path / "none.pem")


def test_a_key_on_an_unknown_curve_is_said_in_words(tmp_path: Path) -> None:
    """One changed byte of a key can name another curve: 1.3.132.0.34 is P-384, 1.3.132.0.6 nobody's."""
    made = make_release_key(tmp_path)
    p384, unknown = bytes.fromhex("06052b81040022"), bytes.fromhex("06052b81040006")
    for path in (made.private, made.public):
        first, *middle, last = path.read_text().splitlines()
        der = b64decode("".join(middle))
        assert der.count(p384) == 1
        coded = b64encode(der.replace(p384, unknown)).decode()
        path.write_text(f"{first}\n{coded}\n{last}\n")
    with pytest.raises(ConfigError, match="is not a PEM public key of a known kind"):
        public_pem(made.public)
    with pytest.raises(ConfigError, match="is not an unencrypted PEM private key of a known kind"):
        make_release_key(tmp_path)
