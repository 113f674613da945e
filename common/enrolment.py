"""What a hospital and its coordinator give each other once: public parts only, each signed by its maker.

    enrolment   hospital -> coordinator   name, declared size, both public keys
    bundle      coordinator -> hospital   address, CA certificate, the key that signs tasks

A signature proves that the maker holds the key that is in it, not who the maker is: people compare the
fingerprint by another way, by telephone say.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from cryptography.x509 import load_pem_x509_certificate

from common.address import parse_address
from common.canonical import canonical_json, from_canonical
from common.errors import ProtocolError, SignatureError
from common.signing import BUNDLE_DOMAIN, ENROLMENT_DOMAIN, SigningKey, verify

# It becomes the name of files and folders.
SITE_NAME = "[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_HEX_KEY = re.compile(r"[0-9a-f]{64}")
_MAX_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Enrolment:
    """A hospital asks to take part.

    site: its name. declared_size: the public size of its data set. signing_key: Ed25519, 64 hex digits,
    of its replies. node_key: ECDSA P-384 in OpenSSH form, of its SuperNode.
    """

    site: str
    declared_size: int
    signing_key: str
    node_key: str

    @property
    def fingerprint(self) -> str:
        """What both sides compare."""
        return fingerprint(self.signing_key)


@dataclass(frozen=True, slots=True)
class Bundle:
    """A coordinator's answer to one enrolment.

    site: whom it is for. address: HOST:PORT. root_certificate: PEM, of the CA. public_key: Ed25519, 64 hex
    digits, of its tasks.
    """

    site: str
    address: str
    root_certificate: str
    public_key: str

    @property
    def fingerprint(self) -> str:
        """What both sides compare."""
        return fingerprint(self.public_key)


_Kind = TypeVar("_Kind", Enrolment, Bundle)


def fingerprint(public_hex: str) -> str:
    """Return a public key's SHA-256, its first 20 bytes in groups of four digits, to be read aloud."""
    digits = hashlib.sha256(bytes.fromhex(public_hex)).hexdigest()[:40]
    return " ".join(digits[i : i + 4] for i in range(0, len(digits), 4))


def seal_enrolment(enrolment: Enrolment, key: SigningKey) -> bytes:
    """Return an enrolment as the file that is sent, signed by the site's own key."""
    return _seal(asdict(enrolment), key, domain=ENROLMENT_DOMAIN)


def open_enrolment(data: bytes) -> Enrolment:
    """Return the enrolment in a file.

    Raises ProtocolError when it is none, SignatureError when whoever made it does not hold its key.
    """
    opened = _open(data, Enrolment, domain=ENROLMENT_DOMAIN, key="signing_key")
    problems = []
    if not re.fullmatch(SITE_NAME, opened.site):
        problems.append(
            f"site {opened.site[:64]!r} is no name of letters, digits, '.', '_' and '-'"
        )
    if opened.declared_size < 1:
        problems.append(f"declared_size is {opened.declared_size}")
    if not _is_node_key(opened.node_key):
        problems.append("node_key is no ECDSA P-384 key in OpenSSH form")
    if problems:
        raise ProtocolError(f"this enrolment cannot be taken: {'; '.join(problems)}")
    return opened


def seal_bundle(bundle: Bundle, key: SigningKey) -> bytes:
    """Return a bundle as the file that is sent, signed by the coordinator's task-signing key."""
    return _seal(asdict(bundle), key, domain=BUNDLE_DOMAIN)


def open_bundle(data: bytes) -> Bundle:
    """Return the bundle in a file. Raises ProtocolError and SignatureError as `open_enrolment` does."""
    opened = _open(data, Bundle, domain=BUNDLE_DOMAIN, key="public_key")
    try:
        parse_address(opened.address)
        load_pem_x509_certificate(opened.root_certificate.encode())
    except ValueError as error:
        raise ProtocolError(f"this bundle cannot be taken: {error}") from None
    return opened


def _seal(content: Mapping[str, Any], key: SigningKey, *, domain: bytes) -> bytes:
    payload = canonical_json(content)
    signature = key.sign(payload, domain=domain)
    return canonical_json({"payload": payload.decode(), "signature": signature.hex()}) + b"\n"


def _open(data: bytes, kind: type[_Kind], *, domain: bytes, key: str) -> _Kind:
    name = kind.__name__.lower()
    try:
        if len(data) > _MAX_BYTES:
            raise ValueError("too long")
        outer = from_canonical(data.strip())
        payload, signature = outer["payload"].encode(), bytes.fromhex(outer["signature"])
        content = from_canonical(payload)
        types = {item.name: item.type for item in fields(kind)}
        if set(content) != set(types):
            raise ValueError("fields")
        for field_name, type_name in types.items():
            if type(content[field_name]).__name__ != type_name:
                raise ValueError(field_name)
        opened = kind(**content)
        if not _HEX_KEY.fullmatch(content[key]):
            raise ValueError(key)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, ProtocolError):
        raise ProtocolError(
            f"this file is not a Consilium {name}, or was cut on its way; ask for it again"
        ) from None
    try:
        verify(payload, signature, domain=domain, public_hex=content[key])
    except SignatureError:
        raise SignatureError(
            f"this {name} was changed on its way, or is not its maker's; do not use it, ask for it again"
        ) from None
    return opened


def _is_node_key(text: str) -> bool:
    try:
        key = load_ssh_public_key(text.encode())
    except (ValueError, UnsupportedAlgorithm):
        return False
    return isinstance(key, EllipticCurvePublicKey) and isinstance(key.curve, SECP384R1)
