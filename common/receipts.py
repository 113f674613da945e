"""Receipts: what a coordinator attests, signed, that one site has spent, for a site restored from a backup.

A receipt is a JSON file {"receipt": {...}, "signature": hex}: people read it before they settle it. The
signature covers the canonical form of the receipt.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from common.canonical import canonical_json
from common.chain import ChainHead
from common.config import RUN_UID
from common.errors import ProtocolError
from common.records import SiteHeads
from common.signing import RECEIPT_DOMAIN, SigningKey, verify_any

_DIGEST = re.compile("[0-9a-f]{64}")
_UNITS = ("record", "patient", "none")
_MAX_NAME = 200
# What SQLite and every JSON reader hold exactly.
_MAX_COUNT = 1 << 53


@dataclass(frozen=True, slots=True)
class ReceiptCharge:
    """One task that the site was asked for, as the coordinator knows it.

    task_id: 64 hex digits. unit: "record", "patient" or "none" (then noise_multiplier is 0). steps: of this
    task alone. answered: its reply arrived, so that the site's ledger had both of its entries.
    """

    task_id: str
    run_uid: str
    unit: str
    server_round: int
    noise_multiplier: float
    sample_rate: float
    steps: int
    answered: bool = False


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a coordinator knows of one site. heads: as last seen. issued_at: Unix seconds."""

    site: str
    heads: SiteHeads
    charges: tuple[ReceiptCharge, ...]
    issued_at: int


def seal_receipt(receipt: Receipt, key: SigningKey) -> bytes:
    """Return the file of a receipt, signed by the coordinator."""
    content = asdict(receipt)
    signature = key.sign(canonical_json(content), domain=RECEIPT_DOMAIN)
    return json.dumps({"receipt": content, "signature": signature.hex()}, indent=2).encode()


def open_receipt(data: bytes, *, public_keys: Sequence[str], site: str) -> Receipt:
    """Return the receipt in a file after every check.

    public_keys: of the coordinators that the site believes. site: who we are.
    Raises SignatureError when the signature does not hold, ProtocolError when the file is no receipt or
    is another site's.
    """
    try:
        content = json.loads(data)
        _check_fields(content, {"receipt", "signature"})
        receipt = _parse(content["receipt"])
        signed, signature = canonical_json(asdict(receipt)), bytes.fromhex(content["signature"])
    except (ValueError, TypeError, KeyError, RecursionError, ProtocolError):
        raise ProtocolError(
            "the file is not a receipt; ask the coordinator for a new one (consilium server receipt)"
        ) from None
    verify_any(signed, signature, domain=RECEIPT_DOMAIN, public_keys=public_keys)
    if receipt.site != site:
        raise ProtocolError(f"the receipt is for site {receipt.site!r}, and this is {site!r}")
    return receipt


def _parse(content: Any) -> Receipt:
    _check_fields(content, {entry.name for entry in fields(Receipt)})
    _check_fields(content["heads"], {"ledger", "audit"})
    charges = tuple(_parse_charge(charge) for charge in content["charges"])
    if len({charge.task_id for charge in charges}) < len(charges):
        raise ValueError("a task twice")
    return Receipt(
        site=_text(content["site"]),
        heads=SiteHeads(*(_parse_head(content["heads"][name]) for name in ("ledger", "audit"))),
        charges=charges,
        issued_at=_count(content["issued_at"]),
    )


def _parse_charge(content: Any) -> ReceiptCharge:
    _check_fields(content, {entry.name for entry in fields(ReceiptCharge)})
    charge = ReceiptCharge(**content)
    for number in (charge.server_round, charge.steps):
        _count(number)
    noise, rate = charge.noise_multiplier, charge.sample_rate
    if not isinstance(noise, float) or not isinstance(rate, float):
        raise ValueError("noise or rate")
    if not 0 <= noise < math.inf or not 0 < rate <= 1 or charge.steps < 1:
        raise ValueError("numbers")
    if charge.unit not in _UNITS or (charge.unit == "none") != (noise == 0):
        raise ValueError("unit")
    if not isinstance(charge.answered, bool) or _DIGEST.fullmatch(charge.task_id) is None:
        raise ValueError("task")
    if re.fullmatch(RUN_UID, charge.run_uid) is None:
        raise ValueError("run")
    return charge


def _parse_head(content: Any) -> ChainHead:
    _check_fields(content, {"count", "digest"})
    if _DIGEST.fullmatch(content["digest"]) is None:
        raise ValueError("digest")
    return ChainHead(_count(content["count"]), content["digest"])


def _check_fields(content: Any, names: set[str]) -> None:
    if not isinstance(content, dict) or set(content) != names:
        raise ValueError("fields")


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _MAX_COUNT:
        raise ValueError("count")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_NAME:
        raise ValueError("text")
    return value
