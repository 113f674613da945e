"""Task and Reply: the only two things that cross the border, and the only home of wire keys.

A Task is what the coordinator asks of one site, a Reply what that site answers. Each is a frozen
value with one canonical JSON form; the sender signs that form, and it travels in an Envelope beside at
most one adapter (safetensors bytes, bound by its digest). This module imports no torch: the relay at a
hospital needs it and starts in about a second.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Literal, TypeVar, get_args

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from common.canonical import canonical_json, from_canonical
from common.chain import EMPTY, ChainHead
from common.config import Scalar
from common.errors import (
    ConsiliumError,
    DiskError,
    ExpiredError,
    ProtocolError,
    SignatureError,
    known_codes,
)
from common.files import Buffer, is_disk_full
from common.signing import REPLY_DOMAIN, TASK_DOMAIN, SigningKey, verify, verify_any

# Raised whenever a field or its meaning changes; a site refuses any other and says so in words.
PROTOCOL = 4

TaskKind = Literal["describe", "train", "evaluate"]
TASK_KINDS: tuple[TaskKind, ...] = get_args(TaskKind)

# Wire keys.
_ENVELOPE = "envelope"
_PAYLOAD = "payload"
_SIGNATURE = "signature"
_ADAPTER = "adapter"
_STYPE = "safetensors"
_MAX_PAYLOAD_BYTES = 1 << 20
# What every JSON reader and every clock can hold.
_MAX_INTEGER = 1 << 53


@dataclass(frozen=True, slots=True)
class SiteHeads:
    """Where a site's privacy ledger and its audit log stand."""

    ledger: ChainHead
    audit: ChainHead


@dataclass(frozen=True, slots=True)
class Task:
    """What the coordinator asks of one site, once.

    kind: "describe" asks who it is, "train" for an update of the adapter that comes with it, "evaluate" for
    sums over the site's own test records, with that adapter and without.
    site: whom it is for; "" in a `describe`, which is sent before names are known.
    server_round: 1 up; 0 in a `describe`. attempt: 1 up, counts retries of a round.
    expires_at: Unix seconds. base_digest, adapter_digest: SHA-256 hex of the base model and of the
    incoming adapter. config: dotted keys of the sections in `common.config.SENT_TO_SITES`.
    seen: this site's heads after the last task that it finished, or at its first introduction, None
    before: a site whose own are behind was restored from a backup. audit_head: the coordinator's own log's.
    """

    kind: TaskKind
    run_uid: str
    site: str
    server_round: int
    attempt: int
    expires_at: int
    base_digest: str = ""
    adapter_digest: str = ""
    config: Mapping[str, Scalar] = field(default_factory=dict)
    seen: SiteHeads | None = None
    audit_head: ChainHead = EMPTY
    protocol: int = PROTOCOL

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", MappingProxyType(dict(self.config)))

    def canonical(self) -> bytes:
        """Return the bytes that are signed (without the domain tag)."""
        return canonical_json(_as_dict(self))

    @property
    def sha256(self) -> str:
        """SHA-256 hex of the canonical form; a Reply carries it."""
        return hashlib.sha256(self.canonical()).hexdigest()

    @property
    def task_id(self) -> str:
        """SHA-256 hex without what a retry changes: it asks for the very same task."""
        content = _as_dict(self)
        for name in ("attempt", "expires_at", "seen", "audit_head"):
            del content[name]
        return hashlib.sha256(canonical_json(content)).hexdigest()


@dataclass(frozen=True, slots=True)
class PrivacyRow:
    """What a site says of its own privacy, for this run so far. All numbers are public constants.

    unit: "record", "patient" or "none". epsilon: composed over the run's rounds up to this one, at `delta`;
    infinite without protection. sample_rate: batch-size / declared-size. steps: optimizer steps.
    """

    unit: str
    epsilon: float
    delta: float
    noise_multiplier: float
    sample_rate: float
    steps: int


@dataclass(frozen=True, slots=True)
class Reply:
    """What one site answers to one Task.

    task_sha256: `Task.sha256` of the task answered. adapter_digest: of the outgoing adapter, "" when
    there is none. numbers: allow-listed by the site's policy. error_code: "" or one code of
    common/errors.py; correlation_id: finds the line in the site's own log. heads: of the site's ledger
    and audit log, this reply counted in; None in an answer without a state to speak of.
    """

    site: str
    run_uid: str
    server_round: int
    attempt: int
    task_sha256: str
    adapter_digest: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)
    privacy: PrivacyRow | None = None
    error_code: str = ""
    correlation_id: str = ""
    heads: SiteHeads | None = None
    protocol: int = PROTOCOL

    def __post_init__(self) -> None:
        object.__setattr__(self, "numbers", MappingProxyType(dict(self.numbers)))

    def canonical(self) -> bytes:
        """Return the bytes that are signed (without the domain tag)."""
        return canonical_json(_as_dict(self))


@dataclass(frozen=True, slots=True)
class Envelope:
    """Signed bytes on the wire: a canonical Task or Reply, its signature, at most one adapter."""

    payload: bytes
    signature: bytes
    adapter: Buffer = b""

    @property
    def size_bytes(self) -> int:
        """What crosses the border, before Flower's own framing."""
        return len(self.payload) + len(self.signature) + len(self.adapter)


def seal_task(task: Task, key: SigningKey, *, adapter: Buffer = b"") -> Envelope:
    """Return `task` signed by the coordinator."""
    payload = task.canonical()
    return Envelope(payload, key.sign(payload, domain=TASK_DOMAIN), adapter)


def seal_reply(reply: Reply, key: SigningKey, *, adapter: Buffer = b"") -> Envelope:
    """Return `reply` signed by the site."""
    payload = reply.canonical()
    return Envelope(payload, key.sign(payload, domain=REPLY_DOMAIN), adapter)


def open_task(envelope: Envelope, *, public_keys: Sequence[str], site: str) -> Task:
    """Return the task in an envelope after every check that needs neither policy nor clock.

    public_keys: those of the coordinators that this site believes. site: who we are.
    Raises SignatureError when the signature does not hold, ProtocolError when the task is malformed, for
    another site or of another protocol version. Whether it is still wanted says `check_not_expired`.
    """
    verify_any(envelope.payload, envelope.signature, domain=TASK_DOMAIN, public_keys=public_keys)
    task = _parse(envelope.payload, Task)
    if task.kind not in TASK_KINDS:
        raise ProtocolError(f"task kind {task.kind!r} is none of {', '.join(TASK_KINDS)}")
    if task.kind != "describe" and task.site != site:
        raise ProtocolError(f"the task is for site {task.site!r}, and this is {site!r}")
    return task


def check_not_expired(task: Task, *, now_s: float) -> None:
    """Raise ExpiredError when a task's time was over at `now_s` (Unix seconds)."""
    if now_s > task.expires_at:
        raise ExpiredError(
            f"the task expired {now_s - task.expires_at:.0f} s ago; check this machine's clock and the "
            "coordinator's, or raise federation.deadline-s"
        )


def open_reply(envelope: Envelope, *, task: Task, site: str, public_hex: str) -> Reply:
    """Return the reply in an envelope, bound to the task it answers.

    public_hex: the key that the roster pins for `site`.
    Raises SignatureError when the signature does not hold or the reply answers another task, site,
    round, attempt or run; ProtocolError when it is malformed.
    """
    verify(envelope.payload, envelope.signature, domain=REPLY_DOMAIN, public_hex=public_hex)
    reply = _parse(envelope.payload, Reply)
    expected = (site, task.run_uid, task.server_round, task.attempt, task.sha256)
    found = (
        reply.site,
        reply.run_uid,
        reply.server_round,
        reply.attempt,
        reply.task_sha256,
    )
    if found != expected:
        names = ("site", "run_uid", "round", "attempt", "task digest")
        wrong = [name for name, a, b in zip(names, found, expected, strict=True) if a != b]
        raise SignatureError(f"a reply signed by {site!r} answers another task: {', '.join(wrong)}")
    return reply


def unverified_reply_site(envelope: Envelope) -> str:
    """Return the site name that a reply claims, before its signature is checked.

    It chooses which pinned key to check against, nothing else. Raises ProtocolError.
    """
    return _parse(envelope.payload, Reply).site


def to_records(envelope: Envelope) -> RecordDict:
    """Return an envelope as Flower records: one ConfigRecord and at most one Array."""
    records = RecordDict()
    records[_ENVELOPE] = ConfigRecord({_PAYLOAD: envelope.payload, _SIGNATURE: envelope.signature})
    if envelope.adapter:
        array = Array("uint8", (len(envelope.adapter),), _STYPE, bytes(envelope.adapter))
        records[_ADAPTER] = ArrayRecord({_ADAPTER: array})
    return records


def from_records(records: RecordDict) -> Envelope:
    """Return the envelope in Flower records. Raises ProtocolError for anything else in them."""
    config = records.get(_ENVELOPE)
    extra = set(records) - {_ENVELOPE, _ADAPTER}
    if extra or not isinstance(config, ConfigRecord) or set(config) != {_PAYLOAD, _SIGNATURE}:
        raise ProtocolError(f"the message holds records {sorted(records)}, not one envelope")
    payload, signature = config[_PAYLOAD], config[_SIGNATURE]
    if not isinstance(payload, bytes) or not isinstance(signature, bytes):
        raise ProtocolError("payload and signature must be bytes")
    if len(payload) > _MAX_PAYLOAD_BYTES:
        raise ProtocolError(f"a payload of {len(payload)} bytes is above {_MAX_PAYLOAD_BYTES}")
    adapter = b""
    if _ADAPTER in records:
        arrays = records[_ADAPTER]
        if not isinstance(arrays, ArrayRecord) or set(arrays) != {_ADAPTER}:
            raise ProtocolError("an adapter travels as exactly one Array")
        array = arrays[_ADAPTER]
        if array.dtype != "uint8" or array.stype != _STYPE:
            raise ProtocolError(f"an adapter is safetensors bytes, not {array.stype!r}")
        adapter = array.data
    return Envelope(payload, signature, adapter)


def envelope_of(message: Message) -> Envelope:
    """Return the envelope in a Flower message. Raises ProtocolError when it carries an error."""
    if message.has_error():
        raise ProtocolError(f"Flower answered with error code {message.error.code}")
    return from_records(message.content)


def reply_to(task: Task, *, site: str, **content: Any) -> Reply:
    """Return a reply bound to the task that it answers; content: the other fields of Reply."""
    return Reply(
        site=site,
        run_uid=task.run_uid,
        server_round=task.server_round,
        attempt=task.attempt,
        task_sha256=task.sha256,
        **content,
    )


def error_code(error: BaseException) -> str:
    """Return all that an error may say outside a hospital: one code of common/errors.py."""
    if is_disk_full(error):
        return DiskError.code
    return error.code if isinstance(error, ConsiliumError) else "internal"


def _as_dict(item: Task | Reply | PrivacyRow | SiteHeads | ChainHead) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for entry in fields(item):
        value = getattr(item, entry.name)
        nested = isinstance(value, PrivacyRow | SiteHeads | ChainHead)
        content[entry.name] = _as_dict(value) if nested else value
    return content


_T = TypeVar("_T", Task, Reply)


def _parse(payload: bytes, kind: type[_T]) -> _T:
    name = kind.__name__.lower()
    protocol: Any = PROTOCOL
    try:
        content = from_canonical(payload)
        if not isinstance(content, dict):
            raise ValueError("not an object")
        # Before the fields: another protocol may have others.
        protocol = content.get("protocol")
        if type(protocol) is not int or protocol != PROTOCOL:
            raise ValueError("protocol")
        if content.get("privacy") is not None:
            content["privacy"] = PrivacyRow(**_typed(content["privacy"], PrivacyRow))
        for field_name in ("seen", "heads"):
            if content.get(field_name) is not None:
                content[field_name] = parse_heads(content[field_name])
        if "audit_head" in content:
            content["audit_head"] = _head(content["audit_head"])
        item = kind(**_typed(content, kind))
        canonical = item.canonical()
    except (
        ValueError, TypeError, AttributeError, OverflowError, RecursionError, ProtocolError,
    ):  # fmt: skip
        if type(protocol) is int and protocol != PROTOCOL:
            raise ProtocolError(
                f"the {name}'s sender speaks protocol {protocol}, this machine {PROTOCOL}; "
                "upgrade the older of the two"
            ) from None
        raise ProtocolError(f"the payload is not a {name} of protocol {PROTOCOL}") from None
    if canonical != payload:
        raise ProtocolError(f"the {name} is not in canonical form")
    return item


def _head(content: Any) -> ChainHead:
    head = ChainHead(**_typed(content, ChainHead))
    if head.count < 0 or re.fullmatch("[0-9a-f]{64}", head.digest) is None:
        raise ValueError("head")
    return head


def parse_heads(content: Any) -> SiteHeads:
    """Return the heads that `asdict` made a mapping of. Raises ValueError for anything else."""
    if not isinstance(content, dict) or set(content) != {"ledger", "audit"}:
        raise ValueError("heads")
    return SiteHeads(_head(content["ledger"]), _head(content["audit"]))


_TYPES: dict[str, type | tuple[type, ...]] = {
    "protocol": int,
    "server_round": int,
    "attempt": int,
    "expires_at": int,
    "steps": int,
    "epsilon": float,
    "delta": float,
    "noise_multiplier": float,
    "sample_rate": float,
    "config": dict,
    "numbers": dict,
    "privacy": (PrivacyRow, type(None)),
    "seen": (SiteHeads, type(None)),
    "heads": (SiteHeads, type(None)),
    "audit_head": ChainHead,
    "count": int,
}


def _typed(content: Any, kind: type[Any]) -> dict[str, Any]:
    if not isinstance(content, dict) or set(content) != {entry.name for entry in fields(kind)}:
        raise ValueError("fields")
    for name, value in content.items():
        wanted = _TYPES.get(name, str)
        if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
            raise ValueError(name)
        if isinstance(value, int) and abs(value) > _MAX_INTEGER:
            raise ValueError(name)
    for value in content.get("config", {}).values():
        if not isinstance(value, bool | int | float | str):
            raise ValueError("config")
    for value in content.get("numbers", {}).values():
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise ValueError("numbers")
    for name in ("epsilon", "delta", "noise_multiplier", "sample_rate"):
        # Infinite epsilon is an honest answer; NaN and less than nothing are not.
        if name in content and not content[name] >= 0:
            raise ValueError(name)
    code = content.get("error_code", "")
    if code and code not in known_codes():
        raise ValueError("error_code")
    return content
