"""Task and Reply: the only two things that cross the border, and the only home of wire keys.

A Task is what the coordinator asks of one site, a Reply what that site answers. Each is a frozen
value with one canonical JSON form; the sender signs that form, and it travels in an Envelope beside at
most one adapter (safetensors bytes, bound by its digest). This module imports no torch: the relay at a
hospital needs it and starts in about a second.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from common.config import Scalar
from common.errors import ConsiliumError, ProtocolError, SignatureError, known_codes
from common.signing import REPLY_DOMAIN, TASK_DOMAIN, SigningKey, verify

# Raised whenever a field or its meaning changes; a site refuses any other and says so in words.
PROTOCOL = 1

TaskKind = Literal["describe", "train"]

# Wire keys.
_ENVELOPE = "envelope"
_PAYLOAD = "payload"
_SIGNATURE = "signature"
_ADAPTER = "adapter"
_STYPE = "safetensors"
_MAX_PAYLOAD_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Task:
    """What the coordinator asks of one site, once.

    site: whom it is for; "" in a `describe`, which is sent before names are known.
    server_round: 1 up; 0 in a `describe`. attempt: 1 up, counts retries of a round.
    expires_at: Unix seconds. base_digest, adapter_digest: SHA-256 hex of the base model and of the
    incoming adapter. config: dotted keys of the sections in `common.config.SENT_TO_SITES`.
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
        """SHA-256 hex without attempt and expires_at: a retry asks for the very same task."""
        content = _as_dict(self)
        del content["attempt"], content["expires_at"]
        return hashlib.sha256(canonical_json(content)).hexdigest()


@dataclass(frozen=True, slots=True)
class PrivacyRow:
    """What a site says of its own privacy, for this run so far. All numbers are public constants.

    unit: "record" or "none". epsilon: composed over the run's rounds up to this one, at `delta`;
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
    common/errors.py; correlation_id: finds the line in the site's own log.
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
    adapter: bytes = b""

    @property
    def size_bytes(self) -> int:
        """What crosses the border, before Flower's own framing."""
        return len(self.payload) + len(self.signature) + len(self.adapter)


def seal_task(task: Task, key: SigningKey, *, adapter: bytes = b"") -> Envelope:
    """Return `task` signed by the coordinator."""
    payload = task.canonical()
    return Envelope(payload, key.sign(payload, domain=TASK_DOMAIN), adapter)


def seal_reply(reply: Reply, key: SigningKey, *, adapter: bytes = b"") -> Envelope:
    """Return `reply` signed by the site."""
    payload = reply.canonical()
    return Envelope(payload, key.sign(payload, domain=REPLY_DOMAIN), adapter)


def open_task(envelope: Envelope, *, public_hex: str, site: str, now_s: float) -> Task:
    """Return the task in an envelope after every check that needs no policy.

    public_hex: the coordinator's pinned key. site: who we are. now_s: Unix seconds.
    Raises SignatureError when the signature does not hold, ProtocolError when the task is malformed,
    expired, for another site or of another protocol version.
    """
    verify(envelope.payload, envelope.signature, domain=TASK_DOMAIN, public_hex=public_hex)
    task = _parse(envelope.payload, Task)
    if task.kind not in ("describe", "train"):
        raise ProtocolError(f"task kind {task.kind!r} is none of 'describe', 'train'")
    if now_s > task.expires_at:
        raise ProtocolError(
            f"the task expired {now_s - task.expires_at:.0f} s ago; check this machine's clock, or "
            "raise federation.deadline-s"
        )
    if task.kind == "train" and task.site != site:
        raise ProtocolError(f"the task is for site {task.site!r}, and this is {site!r}")
    return task


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
        array = Array("uint8", (len(envelope.adapter),), _STYPE, envelope.adapter)
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


def error_reply(task: Task, *, site: str, error: BaseException, correlation_id: str) -> Reply:
    """Return the reply to a task that failed: a code and a correlation id, no text."""
    code = error.code if isinstance(error, ConsiliumError) else "internal"
    return Reply(
        site=site,
        run_uid=task.run_uid,
        server_round=task.server_round,
        attempt=task.attempt,
        task_sha256=task.sha256,
        error_code=code,
        correlation_id=correlation_id,
    )


def with_attempt(task: Task, *, attempt: int, expires_at: int) -> Task:
    """Return the same task (same task_id) for another attempt."""
    return replace(task, attempt=attempt, expires_at=expires_at)


def canonical_json(content: Any) -> bytes:
    """Return the one JSON form: sorted keys, ASCII, no spaces, floats as {"float": hex}.

    Two values have equal bytes exactly when they are equal, bit for bit.
    Raises ProtocolError for types that JSON has no unambiguous form for.
    """
    return json.dumps(
        _encode(content), sort_keys=True, separators=(",", ":"), ensure_ascii=True
    ).encode("ascii")


def _encode(value: Any) -> Any:
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        # Two lone surrogates and the character that they spell have the same JSON.
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise ProtocolError("text with a lone surrogate has no canonical form")
        return value
    if isinstance(value, float):
        return {"float": value.hex()}
    if isinstance(value, Mapping):
        if set(value) == {"float"} or not all(isinstance(key, str) for key in value):
            raise ProtocolError("a mapping needs text keys, and not 'float' alone")
        return {_encode(key): _encode(item) for key, item in value.items()}
    raise ProtocolError(f"a {type(value).__name__} has no canonical form")


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {"float"} and isinstance(value["float"], str):
            return float.fromhex(value["float"])
        return {key: _decode(item) for key, item in value.items()}
    return value


def _as_dict(item: Task | Reply | PrivacyRow) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for entry in fields(item):
        value = getattr(item, entry.name)
        content[entry.name] = _as_dict(value) if isinstance(value, PrivacyRow) else value
    return content


_T = TypeVar("_T", Task, Reply)


def _parse(payload: bytes, kind: type[_T]) -> _T:
    name = kind.__name__.lower()
    protocol: Any = PROTOCOL
    try:
        content = _decode(json.loads(payload))
        if not isinstance(content, dict):
            raise ValueError("not an object")
        # Before the fields: another protocol may have others.
        protocol = content.get("protocol")
        if not isinstance(protocol, int) or protocol != PROTOCOL:
            raise ValueError("protocol")
        if content.get("privacy") is not None:
            content["privacy"] = PrivacyRow(**_typed(content["privacy"], PrivacyRow))
        item = kind(**_typed(content, kind))
        canonical = item.canonical()
    except (
        ValueError, TypeError, AttributeError, OverflowError, RecursionError, ProtocolError,
    ):  # fmt: skip
        if isinstance(protocol, int) and protocol != PROTOCOL:
            raise ProtocolError(
                f"the {name}'s sender speaks protocol {protocol}, this machine {PROTOCOL}; "
                "upgrade the older of the two"
            ) from None
        raise ProtocolError(f"the payload is not a {name} of protocol {PROTOCOL}") from None
    if canonical != payload:
        raise ProtocolError(f"the {name} is not in canonical form")
    return item


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
}


def _typed(content: Any, kind: type[Any]) -> dict[str, Any]:
    if not isinstance(content, dict) or set(content) != {entry.name for entry in fields(kind)}:
        raise ValueError("fields")
    for name, value in content.items():
        wanted = _TYPES.get(name, str)
        if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
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
