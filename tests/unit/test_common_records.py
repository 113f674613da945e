"""Tasks and replies: one canonical form, bound signatures, and Flower's real wire between."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import FrozenInstanceError, asdict, fields, replace
from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.error import Error
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import (
    inflate_object_from_contents,
    pull_objects,
    push_objects,
)
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given
from hypothesis import strategies as st

from common.canonical import canonical_json
from common.chain import EMPTY, ChainHead
from common.errors import BudgetError, ExpiredError, ProtocolError, SignatureError
from common.records import (
    PROTOCOL,
    Envelope,
    PrivacyRow,
    Reply,
    SiteHeads,
    Task,
    check_not_expired,
    envelope_of,
    error_code,
    from_records,
    open_reply,
    open_task,
    reply_to,
    seal_reply,
    seal_task,
    to_records,
    unverified_reply_site,
)
from common.signing import REPLY_DOMAIN, TASK_DOMAIN, SigningKey

HEADS = SiteHeads(ChainHead(3, "12" * 32), ChainHead(9, "34" * 32))
COORDINATOR = SigningKey.generate()
NORTH = SigningKey.generate()

TASK = Task(
    kind="train",
    run_uid="run-1",
    site="north",
    server_round=2,
    attempt=1,
    expires_at=1000,
    base_digest="ab" * 32,
    adapter_digest="cd" * 32,
    config={"lora.rank": 8, "privacy.target-delta": 1e-5, "lora.use-dora": False, "data.split": ""},
    seen=HEADS,
    audit_head=ChainHead(5, "56" * 32),
)
REPLY = Reply(
    site="north",
    run_uid="run-1",
    server_round=2,
    attempt=1,
    task_sha256=TASK.sha256,
    adapter_digest="ef" * 32,
    numbers={"train_s": 1.5, "steps": 20},
    privacy=PrivacyRow("record", 2.5, 1e-5, 0.8, 0.032, 40),
    heads=HEADS,
)


def _open_task(envelope: Envelope, *, site: str = "north") -> Task:
    return open_task(envelope, public_keys=[COORDINATOR.public_hex], site=site)


def _open_reply(envelope: Envelope, *, task: Task = TASK, site: str = "north") -> Reply:
    return open_reply(envelope, task=task, site=site, public_hex=NORTH.public_hex)


def _signed(content: object, *, domain: bytes = TASK_DOMAIN) -> Envelope:
    """Anything at all, signed by the right key: what a broken or hostile peer could send."""
    payload = content if isinstance(content, bytes) else canonical_json(content)
    key = COORDINATOR if domain == TASK_DOMAIN else NORTH
    return Envelope(payload, key.sign(payload, domain=domain))


def _fields(item: Task | Reply) -> dict[str, Any]:
    content = {entry.name: getattr(item, entry.name) for entry in fields(item)}
    return {
        name: asdict(value) if isinstance(value, PrivacyRow | SiteHeads | ChainHead) else value
        for name, value in content.items()
    }


# Identity


def test_task_id_ignores_what_a_retry_changes() -> None:
    again = replace(TASK, attempt=7, expires_at=5000)
    assert replace(TASK, seen=None, audit_head=EMPTY).task_id == TASK.task_id
    assert replace(TASK, seen=None).sha256 != TASK.sha256 != replace(TASK, audit_head=EMPTY).sha256

    assert again.task_id == TASK.task_id
    assert again.sha256 != TASK.sha256
    assert (again.attempt, again.expires_at, again.site) == (7, 5000, "north")


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "describe"},
        {"run_uid": "run-2"},
        {"site": "south"},
        {"server_round": 3},
        {"base_digest": "00"},
        {"adapter_digest": "00"},
        {"config": {**TASK.config, "lora.rank": 9}},
        {"config": {**TASK.config, "lora.rank": 8.0}},
        {"config": {}},
        {"protocol": PROTOCOL + 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_task_id_depends_on_everything_else(change: dict[str, Any]) -> None:
    assert replace(TASK, **change).task_id != TASK.task_id


def test_every_field_of_a_task_is_covered_above() -> None:
    assert {entry.name for entry in fields(Task)} == {
        "kind", "run_uid", "site", "server_round", "base_digest", "adapter_digest", "config",
        "protocol", "attempt", "expires_at", "seen", "audit_head",
    }  # fmt: skip


def test_tasks_and_replies_are_frozen_and_hold_copies() -> None:
    config: dict[str, Any] = {"lora.rank": 8}
    task = replace(TASK, config=config)
    config["lora.rank"] = 9

    assert task.config == {"lora.rank": 8}
    with pytest.raises(TypeError, match="item assignment"):
        task.config["lora.rank"] = 9  # type: ignore[index]
    with pytest.raises(TypeError, match="item assignment"):
        REPLY.numbers["steps"] = 9  # type: ignore[index]
    with pytest.raises(FrozenInstanceError, match="cannot assign"):
        task.site = "south"  # type: ignore[misc]


# Opening a task


def test_task_opens_as_it_was_sealed() -> None:
    opened = _open_task(seal_task(TASK, COORDINATOR, adapter=b"bytes"))

    assert opened == TASK
    assert {k: type(v) for k, v in opened.config.items()} == {
        k: type(v) for k, v in TASK.config.items()
    }


config_values = st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)


@given(
    st.text(max_size=5),
    st.integers(min_value=0, max_value=1 << 53),
    st.dictionaries(st.text("abc.-", min_size=1), config_values, max_size=4),
)
def test_any_task_survives_sealing(run_uid: str, server_round: int, config: Any) -> None:
    task = replace(TASK, run_uid=run_uid, server_round=server_round, config=config)

    assert _open_task(seal_task(task, COORDINATOR)).canonical() == task.canonical()


def test_flipping_any_byte_of_a_sealed_task_is_refused() -> None:
    sealed = seal_task(TASK, COORDINATOR)

    for position in range(len(sealed.payload)):
        payload = bytearray(sealed.payload)
        payload[position] ^= 1
        with pytest.raises(SignatureError, match="does not hold"):
            _open_task(replace(sealed, payload=bytes(payload)))
    for position in range(len(sealed.signature)):
        signature = bytearray(sealed.signature)
        signature[position] ^= 1
        with pytest.raises(SignatureError, match="does not hold"):
            _open_task(replace(sealed, signature=bytes(signature)))


def test_task_signed_by_another_coordinator_is_refused() -> None:
    with pytest.raises(SignatureError, match="another key"):
        _open_task(seal_task(TASK, SigningKey.generate()))


def test_task_signature_never_passes_as_a_reply_nor_a_reply_as_a_task() -> None:
    key = SigningKey.generate()
    as_task = Envelope(REPLY.canonical(), key.sign(REPLY.canonical(), domain=TASK_DOMAIN))
    as_reply = Envelope(TASK.canonical(), key.sign(TASK.canonical(), domain=REPLY_DOMAIN))

    with pytest.raises(SignatureError, match="consilium/reply/1 signature does not hold"):
        open_reply(as_task, task=TASK, site="north", public_hex=key.public_hex)
    with pytest.raises(SignatureError, match="consilium/task/1 signature does not hold"):
        open_task(as_reply, public_keys=[key.public_hex], site="north")


@pytest.mark.parametrize("name", ["server_round", "attempt", "expires_at"])
@pytest.mark.parametrize("value", [2**53 + 1, -(2**53) - 1, 10**400, -(10**400)])
def test_task_with_an_integer_that_not_every_reader_holds_is_none(name: str, value: int) -> None:
    task = replace(TASK, **{name: value})

    with pytest.raises(ProtocolError, match="the payload is not a task"):
        _open_task(seal_task(task, COORDINATOR))


@pytest.mark.parametrize("chain", ["ledger", "audit"])
def test_so_is_one_with_such_a_count_in_a_head(chain: str) -> None:
    far = ChainHead(2**53 + 1, "12" * 32)
    task = replace(TASK, seen=replace(HEADS, **{chain: far}))

    with pytest.raises(ProtocolError, match="the payload is not a task"):
        _open_task(seal_task(task, COORDINATOR))


def test_the_largest_integer_that_every_reader_holds_is_taken() -> None:
    task = replace(TASK, server_round=2**53, expires_at=2**53)

    assert _open_task(seal_task(task, COORDINATOR)) == task


def test_task_is_good_until_it_expires_and_not_a_moment_longer() -> None:
    check_not_expired(TASK, now_s=1000.0)
    with pytest.raises(ExpiredError, match=r"expired 5 s ago; check this machine's clock"):
        check_not_expired(TASK, now_s=1005.0)


def test_task_for_another_site_is_refused() -> None:
    with pytest.raises(ProtocolError, match="the task is for site 'north', and this is 'south'"):
        _open_task(seal_task(TASK, COORDINATOR), site="south")


def test_describe_task_is_for_whoever_gets_it() -> None:
    describe = replace(TASK, kind="describe", site="", server_round=0)

    assert _open_task(seal_task(describe, COORDINATOR), site="south") == describe


def test_another_protocol_version_is_refused_in_words() -> None:
    newer = seal_task(replace(TASK, protocol=PROTOCOL + 1), COORDINATOR)

    with pytest.raises(
        ProtocolError,
        match=f"task's sender speaks protocol {PROTOCOL + 1}, this machine {PROTOCOL}; upgrade",
    ):
        _open_task(newer)
    with pytest.raises(ProtocolError, match=f"reply's sender speaks protocol {PROTOCOL - 1}"):
        _open_reply(seal_reply(replace(REPLY, protocol=PROTOCOL - 1), NORTH))


def test_newer_protocol_is_named_even_when_its_fields_have_changed() -> None:
    content = {**_fields(TASK), "protocol": PROTOCOL + 1, "colour": "blue"}

    with pytest.raises(ProtocolError, match=f"speaks protocol {PROTOCOL + 1}.*upgrade"):
        _open_task(_signed(content))


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ProtocolError, match="'erase' is none of describe, train, evaluate"):
        _open_task(_signed({**_fields(TASK), "kind": "erase"}))


@pytest.mark.parametrize(
    "payload",
    [
        TASK.canonical().replace(b'","', b'", "', 1),
        TASK.canonical() + b"\n",
        b'{"attempt":1,' + TASK.canonical()[1:],
        TASK.canonical().replace(b"0x1.4f8b588e368f1p-17", b"0x1.4F8B588E368F1p-17"),
        TASK.canonical().replace(b'"north"', b'"\\u006eorth"'),
    ],
    ids=["space", "newline", "duplicate key", "other hex", "escape"],
)
def test_payload_that_is_not_canonical_is_refused(payload: bytes) -> None:
    assert payload != TASK.canonical()
    with pytest.raises(ProtocolError, match="not in canonical form"):
        _open_task(_signed(payload))


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"[]",
        b"null",
        b"\xff",
        b"1" * 5000,
        b"[" * 100_000,
        b'{"float":"0x1p99999"}',
        b'{"float":"0x1p+0"}',
        b"{}",
    ],
    ids=[
        "empty",
        "list",
        "null",
        "no text",
        "huge number",
        "deep",
        "overflow",
        "float",
        "no fields",
    ],
)
def test_payload_that_is_no_task_is_refused_in_words(payload: bytes) -> None:
    with pytest.raises(ProtocolError, match=f"not a task of protocol {PROTOCOL}"):
        _open_task(_signed(payload))


@pytest.mark.parametrize(
    "change",
    [
        {"extra": 1},
        {"server_round": True},
        {"server_round": 1.0},
        {"server_round": "1"},
        {"site": 1},
        {"site": None},
        {"protocol": True},
        {"protocol": "1"},
        {"expires_at": 1e300},
        {"expires_at": -(10**400)},
        {"server_round": (1 << 53) + 1},
        {"config": None},
        {"config": {"lora.rank": None}},
        {"config": {"lora": {"rank": 1}}},
        {"seen": {}},
        {"seen": {**asdict(HEADS), "other": 1}},
        {"seen": {**asdict(HEADS), "audit": {"count": -1, "digest": "00" * 32}}},
        {"seen": {**asdict(HEADS), "audit": {"count": 1.0, "digest": "00" * 32}}},
        {"audit_head": {"count": 1, "digest": "00"}},
        {"audit_head": {"count": 1, "digest": "zz" * 32}},
        {"audit_head": None},
    ],
    ids=repr,
)
def test_signed_task_with_a_field_of_another_type_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError, match="not a task"):
        _open_task(_signed({**_fields(TASK), **change}))


@pytest.mark.parametrize(
    "change",
    [
        {"numbers": {"loss": math.nan}},
        {"numbers": {"loss": math.inf}},
        {"numbers": {"loss": True}},
        {"numbers": {"loss": "a patient's name"}},
        {"privacy": {"unit": "record"}},
        {"privacy": "none"},
        {"privacy": {**_fields(REPLY)["privacy"], "steps": 1.0}},
        {"privacy": {**_fields(REPLY)["privacy"], "epsilon": 1}},
        {"note": "text"},
    ],
    ids=repr,
)
def test_signed_reply_with_a_field_of_another_type_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError, match="not a reply"):
        _open_reply(_signed({**_fields(REPLY), **change}, domain=REPLY_DOMAIN))


# Opening a reply


@pytest.mark.parametrize("privacy", [REPLY.privacy, None])
def test_reply_opens_as_it_was_sealed(privacy: PrivacyRow | None) -> None:
    reply = replace(REPLY, privacy=privacy)

    assert _open_reply(seal_reply(reply, NORTH)) == reply


def test_infinite_epsilon_survives_the_wire() -> None:
    row = PrivacyRow("none", math.inf, 1e-5, 0.0, 1.0, 40)

    assert _open_reply(seal_reply(replace(REPLY, privacy=row), NORTH)).privacy == row


def test_flipping_any_byte_of_a_sealed_reply_is_refused() -> None:
    sealed = seal_reply(REPLY, NORTH)

    for position in range(len(sealed.payload)):
        payload = bytearray(sealed.payload)
        payload[position] ^= 1
        with pytest.raises(SignatureError, match="does not hold"):
            _open_reply(replace(sealed, payload=bytes(payload)))


def test_reply_signed_by_another_site_is_refused() -> None:
    with pytest.raises(SignatureError, match="does not hold"):
        _open_reply(seal_reply(REPLY, SigningKey.generate()))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"site": "south"}, "site"),
        ({"run_uid": "run-2"}, "run_uid"),
        ({"server_round": 1}, "round"),
        ({"attempt": 2}, "attempt"),
        ({"task_sha256": "00" * 32}, "task digest"),
        ({"attempt": 2, "server_round": 1}, "round, attempt"),
    ],
)
def test_reply_to_another_task_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(SignatureError, match=f"'north' answers another task: {named}$"):
        _open_reply(seal_reply(replace(REPLY, **change), NORTH))


def test_reply_is_bound_to_the_whole_task_and_not_only_to_its_number() -> None:
    other = replace(TASK, config={**TASK.config, "lora.rank": 4})

    with pytest.raises(SignatureError, match="another task: task digest$"):
        _open_reply(seal_reply(REPLY, NORTH), task=other)


def test_claimed_site_is_read_before_any_check() -> None:
    assert unverified_reply_site(seal_reply(REPLY, SigningKey.generate())) == "north"
    with pytest.raises(ProtocolError, match="not a reply"):
        unverified_reply_site(seal_task(TASK, COORDINATOR))


@pytest.mark.parametrize(
    ("error", "code"),
    [(BudgetError("icu-notes has spent 7.6"), "budget"), (KeyError("Mrs Example"), "internal")],
)
def test_error_in_a_reply_is_a_code_and_no_text(error: BaseException, code: str) -> None:
    reply = reply_to(TASK, site="north", error_code=error_code(error), correlation_id="c-1")

    assert (reply.error_code, reply.correlation_id) == (code, "c-1")
    assert _open_reply(seal_reply(reply, NORTH)) == reply
    assert not any(word in reply.canonical() for word in (b"icu", b"7.6", b"Example"))


# Flower's records


def _array(data: bytes = b"abc", *, dtype: str = "uint8", stype: str = "safetensors") -> Array:
    return Array(dtype, (len(data),), stype, data)


ENVELOPE_RECORD = ConfigRecord({"payload": b"p", "signature": b"s"})


@pytest.mark.parametrize("adapter", [b"", b"\x00\xff" * 3])
def test_envelope_survives_records(adapter: bytes) -> None:
    envelope = Envelope(b"p", b"s", adapter)

    assert from_records(to_records(envelope)) == envelope
    assert envelope.size_bytes == 2 + len(adapter)


def test_adapter_is_one_array_of_bytes() -> None:
    arrays = to_records(Envelope(b"p", b"s", b"abc")).array_records

    assert [(n, list(r)) for n, r in arrays.items()] == [("adapter", ["adapter"])]
    array = arrays["adapter"]["adapter"]
    assert (array.dtype, tuple(array.shape), array.stype) == ("uint8", (3,), "safetensors")


BAD_RECORDS: Mapping[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "not one envelope"),
    "no envelope": ({"adapter": ArrayRecord({"adapter": _array()})}, "not one envelope"),
    "extra config": ({"envelope": ENVELOPE_RECORD, "notes": ConfigRecord({"a": "b"})}, "notes"),
    "extra metrics": ({"envelope": ENVELOPE_RECORD, "m": MetricRecord({"loss": 1.0})}, "'m'"),
    "extra arrays": ({"envelope": ENVELOPE_RECORD, "x": ArrayRecord({"x": _array()})}, "'x'"),
    "other kind": ({"envelope": MetricRecord({"payload": 1})}, "not one envelope"),
    "no signature": ({"envelope": ConfigRecord({"payload": b"p"})}, "not one envelope"),
    "extra key": (
        {"envelope": ConfigRecord({"payload": b"p", "signature": b"s", "x": 1})},
        "not one envelope",
    ),
    "text": ({"envelope": ConfigRecord({"payload": "p", "signature": b"s"})}, "must be bytes"),
    "too long": (
        {"envelope": ConfigRecord({"payload": b"p" * (2**20 + 1), "signature": b"s"})},
        "1048577 bytes is above 1048576",
    ),
    "two arrays": (
        {"envelope": ENVELOPE_RECORD, "adapter": ArrayRecord({"adapter": _array(), "b": _array()})},
        "exactly one Array",
    ),
    "other array name": (
        {"envelope": ENVELOPE_RECORD, "adapter": ArrayRecord({"weights": _array()})},
        "exactly one Array",
    ),
    "no array": ({"envelope": ENVELOPE_RECORD, "adapter": ArrayRecord()}, "exactly one Array"),
    "metrics as adapter": (
        {"envelope": ENVELOPE_RECORD, "adapter": MetricRecord({"adapter": 1.0})},
        "exactly one Array",
    ),
    "other dtype": (
        {"envelope": ENVELOPE_RECORD, "adapter": ArrayRecord({"adapter": _array(dtype="int8")})},
        "safetensors bytes",
    ),
    "pickle": (
        {
            "envelope": ENVELOPE_RECORD,
            "adapter": ArrayRecord({"adapter": _array(stype="numpy.ndarray")}),
        },
        "not 'numpy.ndarray'",
    ),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_anything_but_one_envelope_is_refused(name: str) -> None:
    records, why = BAD_RECORDS[name]

    with pytest.raises(ProtocolError, match=why):
        from_records(RecordDict(records))


@pytest.fixture
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def _through_protobuf(message: Message) -> Message:
    return message_from_proto(
        ProtoMessage.FromString(message_to_proto(message).SerializeToString())
    )


def _through_objects(message: Message) -> Message:
    """What HttpGrid and SuperNode do: deflate every nested object, push, pull, inflate."""
    message_id = message.object_id
    tree = get_object_tree(message)
    store: dict[str, bytes] = {}
    push_objects(get_all_nested_objects(message), push_object_fn=store.__setitem__)
    contents = pull_objects(
        [node.object_id for node in iterate_object_tree(tree)], pull_object_fn=store.__getitem__
    )
    inflated = inflate_object_from_contents(message_id, contents)
    assert isinstance(inflated, Message)
    return inflated


@pytest.mark.usefixtures("identity")
@pytest.mark.parametrize("wire", [_through_protobuf, _through_objects])
def test_task_and_reply_cross_flowers_wire_unchanged(wire: Callable[[Message], Message]) -> None:
    adapter = bytes(range(256)) * 40
    sent = seal_task(TASK, COORDINATOR, adapter=adapter)
    question = Message(to_records(sent), 2, "train")
    question.metadata.__dict__["_message_id"] = question.object_id

    received = wire(question)

    assert envelope_of(received) == sent
    assert _open_task(envelope_of(received)) == TASK

    answered = seal_reply(REPLY, NORTH, adapter=adapter[::-1])
    returned = envelope_of(wire(Message(to_records(answered), reply_to=received)))

    assert returned == answered
    assert _open_reply(returned) == REPLY
    assert returned.adapter == adapter[::-1]


@pytest.mark.usefixtures("identity")
def test_message_that_carries_flowers_error_is_refused_by_code() -> None:
    question = Message(to_records(seal_task(TASK, COORDINATOR)), 2, "train")
    question.metadata.__dict__["_message_id"] = "m"
    failed = Message(Error(code=3, reason="text of a hospital's own"), reply_to=question)

    with pytest.raises(ProtocolError, match="^Flower answered with error code 3$"):
        envelope_of(failed)


def test_what_the_relay_imports_holds_no_torch() -> None:
    code = (
        "import sys, common.records, common.signing, common.errors, common.config\n"
        "heavy = {'torch', 'transformers', 'peft', 'opacus', 'datasets', 'bitsandbytes'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("epsilon", [float("nan"), -1.0])
def test_an_epsilon_that_is_no_bound_is_refused(epsilon: float) -> None:
    row = PrivacyRow("record", epsilon, 1e-5, 1.0, 0.1, 3)

    with pytest.raises(ProtocolError, match="not a reply"):
        _open_reply(seal_reply(replace(REPLY, privacy=row), NORTH))


def test_an_error_code_of_ones_own_making_is_refused() -> None:
    with pytest.raises(ProtocolError, match="not a reply"):
        _open_reply(seal_reply(replace(REPLY, error_code="patient Miller"), NORTH))
