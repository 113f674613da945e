"""The coordinator's own certificate authority and the SuperLink's certificate (ECDSA P-384).

Hospitals trust this CA for this one address and nothing else for it: no public authority can vouch for
somebody in between.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import ConfigError
from common.files import write_atomically

_CA_DAYS = 3650
# As long as browsers would take one for at most; renewing it needs no word from the hospitals.
_SERVER_DAYS = 398
# Clocks differ.
_BACKDATED = datetime.timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Certified:
    """A certificate and its private key, both PEM."""

    certificate: bytes
    key: bytes


def make_authority(name: str) -> Certified:
    """Return a new certificate authority. name: its common name."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = _name(name)
    certificate = (
        _builder(subject, subject, key.public_key(), days=_CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    return _pem(certificate, key)


def make_server_certificate(
    authority: Certified, *, hosts: Sequence[str], key: bytes = b""
) -> Certified:
    """Return a certificate for the SuperLink.

    hosts: every name and IP address that it is reached by. key: PEM, the one to go on with; without, a new
    one.
    Raises ConfigError when a key is none of ours, or the authority's is not that of its certificate.
    """
    ca = x509.load_pem_x509_certificate(authority.certificate)
    ca_key = _load_key(authority.key)
    if ca_key.public_key() != ca.public_key():
        raise ConfigError(
            "the CA's key is not that of tls/ca.crt; give the one that was made with it"
        )
    own_key = _load_key(key) if key else ec.generate_private_key(ec.SECP384R1())
    identifier = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    certificate = (
        _builder(_name(hosts[0][:64]), ca.subject, own_key.public_key(), days=_SERVER_DAYS)
        .add_extension(x509.SubjectAlternativeName(list(map(_general_name, hosts))), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier),
            critical=False,
        )
        .sign(ca_key, hashes.SHA384())
    )
    return _pem(certificate, own_key)


def certified_hosts(certificate: bytes) -> list[str]:
    """Return every name and IP address that a certificate (PEM) is good for. Raises ConfigError."""
    names = _load_certificate(certificate).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    return [str(name.value) for name in names.value]


def expires_at(certificate: bytes) -> float:
    """Return until when a certificate (PEM) is good, Unix seconds. Raises ConfigError."""
    return _load_certificate(certificate).not_valid_after_utc.timestamp()


def save_certified(certified: Certified, folder: Path, name: str) -> None:
    """Write NAME.key, which its owner alone may read, and NAME.crt."""
    write_atomically(folder / f"{name}.key", certified.key, mode=0o600)
    write_atomically(folder / f"{name}.crt", certified.certificate, mode=0o644)


def _load_certificate(certificate: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(certificate)
    except ValueError:
        raise ConfigError("this is no certificate in PEM form; restore it from a backup") from None


def _load_key(key: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        loaded = serialization.load_pem_private_key(key, password=None)
    except (ValueError, TypeError):
        loaded = None
    if not isinstance(loaded, ec.EllipticCurvePrivateKey):
        raise ConfigError("this is no unencrypted ECDSA key in PEM form; restore it from a backup")
    return loaded


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, *, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _pem(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Certified:
    return Certified(
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
    )
