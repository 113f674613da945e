"""Files that people carry between hospital and coordinator: a statement, signed by whose key is in it.

A file is canonical JSON {"payload": canonical JSON, "signature": hex}. Each kind has a signature domain of
its own, so that none can pass for another.
"""

from __future__ import annotations

import re
from dataclasses import asdict, fields, is_dataclass
from typing import Any, TypeVar

from common.canonical import canonical_json, from_canonical
from common.errors import ProtocolError, SignatureError
from common.signing import SigningKey, verify

_HEX_KEY = re.compile(r"[0-9a-f]{64}")
_MAX_BYTES = 64 * 1024
_Kind = TypeVar("_Kind")


def seal(statement: Any, key: SigningKey, *, domain: bytes) -> bytes:
    """Return a statement as the file that is sent. statement: a dataclass of strings and integers."""
    payload = canonical_json(asdict(statement))
    signature = key.sign(payload, domain=domain)
    return canonical_json({"payload": payload.decode(), "signature": signature.hex()}) + b"\n"


def open_sealed(data: bytes, kind: type[_Kind], *, domain: bytes, key: str) -> _Kind:
    """Return the statement in a file.

    key: the field that holds the public key of its maker. Raises ProtocolError when the file is of another
    kind, SignatureError when whoever made it does not hold that key.
    """
    name = kind.__name__.lower()
    try:
        if len(data) > _MAX_BYTES:
            raise ValueError("too long")
        outer = from_canonical(data.strip())
        payload, signature = outer["payload"].encode(), bytes.fromhex(outer["signature"])
        content = from_canonical(payload)
        assert is_dataclass(kind)  # as every statement is
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
