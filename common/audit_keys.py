"""Whose signature a line of an audit log must have: the log's key may be changed in its life.

A `key-changed` line names the former key and the new one and is signed by both, over the head before it. So
whoever holds the log's key of today can vouch for all of it: without that key nobody can put a history of his
own in front, and without the former one nobody can take the log over.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from common.audit_entries import KEEP_AS_EVIDENCE, AuditEntry
from common.canonical import canonical_json
from common.chain import ChainHead
from common.errors import AuditError, SignatureError
from common.signing import AUDIT_DOMAIN, SigningKey, verify

KEY_CHANGED = "key-changed"


def key_change(head: ChainHead, *, former: SigningKey, new: SigningKey) -> dict[str, str]:
    """Return the fields of the line that changes a log's key. head: of the log before it."""
    payload = _payload(head, former=former.public_hex, new=new.public_hex)
    return {
        "from": former.public_hex,
        "to": new.public_hex,
        "signature": former.sign(payload, domain=AUDIT_DOMAIN).hex(),
        "new_signature": new.sign(payload, domain=AUDIT_DOMAIN).hex(),
    }


def first_signer(entries: Iterable[AuditEntry], *, public_hex: str) -> str:
    """Return the key that a log began with, as its first change says. public_hex: if there is none."""
    change = next((entry for entry in entries if entry.event == KEY_CHANGED), None)
    return public_hex if change is None else str(change.fields.get("from"))


def signer_after(entry: AuditEntry, signer: str, *, path: Path) -> str:
    """Return the key of the lines after one. signer: of that line.

    Raises AuditError when it changes the key without both signatures.
    """
    if entry.event != KEY_CHANGED:
        return signer
    try:
        new = str(entry.fields["to"])
        if entry.fields["from"] != signer:
            raise ValueError("from")
        payload = _payload(entry.head_before, former=signer, new=new)
        for key, name in ((signer, "signature"), (new, "new_signature")):
            signature = bytes.fromhex(str(entry.fields[name]))
            verify(payload, signature, domain=AUDIT_DOMAIN, public_hex=key)
    except (SignatureError, ValueError, TypeError, KeyError):
        raise AuditError(
            f"{path}, line {entry.number}: changes the log's key, and not both keys signed that; "
            f"{KEEP_AS_EVIDENCE}"
        ) from None
    return new


def _payload(head: ChainHead, *, former: str, new: str) -> bytes:
    return canonical_json({KEY_CHANGED: {"head": asdict(head), "from": former, "to": new}})
