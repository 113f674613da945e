"""What a hospital and its coordinator give each other once: public parts only, each signed by its maker.

    enrolment   hospital -> coordinator   name, declared size, both public keys
    bundle      coordinator -> hospital   address, CA certificate, the key that signs tasks

What they give each other later is in common/membership.py.

A signature proves that the maker holds the key that is in it, not who the maker is: people compare the
fingerprint by another way, by telephone say.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_public_key,
)
from cryptography.x509 import load_pem_x509_certificate

from common.address import parse_address
from common.errors import ProtocolError
from common.sealed import open_sealed, seal
from common.signing import BUNDLE_DOMAIN, ENROLMENT_DOMAIN, SigningKey

# It becomes the name of files and folders.
SITE_NAME = "[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
# More than any data set has; it is a weight, and one beyond all reason would be the only one that counts.
MAX_DECLARED_SIZE = 10**12


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
    digits, of its tasks. signing_key: the site's own, as the coordinator has pinned it now.
    """

    site: str
    address: str
    root_certificate: str
    public_key: str
    signing_key: str

    @property
    def fingerprint(self) -> str:
        """What both sides compare."""
        return fingerprint(self.public_key)


def fingerprint(public_hex: str) -> str:
    """Return a public key's SHA-256, its first 20 bytes in groups of four digits, to be read aloud."""
    digits = hashlib.sha256(bytes.fromhex(public_hex)).hexdigest()[:40]
    return " ".join(digits[i : i + 4] for i in range(0, len(digits), 4))


def seal_enrolment(enrolment: Enrolment, key: SigningKey) -> bytes:
    """Return an enrolment as the file that is sent, signed by the site's own key."""
    return seal(enrolment, key, domain=ENROLMENT_DOMAIN)


def open_enrolment(data: bytes) -> Enrolment:
    """Return the enrolment in a file.

    Raises ProtocolError when it is none, SignatureError when whoever made it does not hold its key.
    """
    opened = open_sealed(data, Enrolment, domain=ENROLMENT_DOMAIN, key="signing_key")
    problems = []
    if not re.fullmatch(SITE_NAME, opened.site):
        problems.append(
            f"site {opened.site[:64]!r} is no name of letters, digits, '.', '_' and '-'"
        )
    if not 1 <= opened.declared_size <= MAX_DECLARED_SIZE:
        problems.append(f"declared_size is {opened.declared_size}")
    try:
        opened = replace(opened, node_key=plain_node_key(opened.node_key))
    except ProtocolError as error:
        problems.append(str(error))
    if problems:
        raise ProtocolError(f"this enrolment cannot be taken: {'; '.join(problems)}")
    return opened


def seal_bundle(bundle: Bundle, key: SigningKey) -> bytes:
    """Return a bundle as the file that is sent, signed by the coordinator's task-signing key."""
    return seal(bundle, key, domain=BUNDLE_DOMAIN)


def open_bundle(data: bytes) -> Bundle:
    """Return the bundle in a file. Raises ProtocolError and SignatureError as `open_enrolment` does."""
    opened = open_sealed(data, Bundle, domain=BUNDLE_DOMAIN, key="public_key")
    try:
        parse_address(opened.address)
        load_pem_x509_certificate(opened.root_certificate.encode())
    except ValueError as error:
        raise ProtocolError(f"this bundle cannot be taken: {error}") from None
    return opened


def plain_node_key(text: str) -> str:
    """Return a node key in OpenSSH form as it is spelt without a comment, so that it is equal to itself.

    Raises ProtocolError when it is no ECDSA P-384 key.
    """
    try:
        key = load_ssh_public_key(text.encode())
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, EllipticCurvePublicKey) or not isinstance(key.curve, SECP384R1):
        raise ProtocolError("node_key is no ECDSA P-384 key in OpenSSH form")
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode("ascii")
