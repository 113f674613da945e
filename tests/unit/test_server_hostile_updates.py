"""What hostile sites send among honest ones: nothing of it counts, and no round ends for it.

Every class is an honest reply and one small change. The draws are seeded.
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from safetensors.numpy import save

from common.adapter import AdapterState, Float32, LoraPair
from common.records import PROTOCOL, Envelope, PrivacyRow, Reply, Task, seal_reply, to_records
from common.signing import REPLY_DOMAIN, TASK_DOMAIN, SigningKey
from server.aggregation import MergeRules, SiteUpdate, merge
from server.incoming import empty_incoming
from tests.unit.adapters import in_memory
from tests.unit.fake_federation import Answer, FakeClock, FakeSite, honest_reply, incoming
from tests.unit.room import CURRENT, Room

# An honest step changes a factor's values by about so much; the limit is far above what comes of it.
STEP = 0.05
MAX_UPDATE_NORM = 50.0
# One that trains both factors, one that trains B alone, and one that trains B and A by turns.
METHODS_TO_TRY = ("svd", "ffa", "rolora")
HONEST = ("arles", "bergen")


@dataclass(frozen=True)
class Turn:
    """One site's task, and what it would honestly answer.

    state: what it trained. reply: what it would say. peers: the honest sites, of which it may know whatever
    crosses the wire. random: of this turn alone.
    """

    site: FakeSite
    task: Task
    envelope: Envelope
    random: np.random.Generator
    peers: Sequence[FakeSite]
    state: AdapterState
    reply: Reply

    @property
    def trained(self) -> str:
        return str(self.task.config["round.trained-factors"])

    def sealed(
        self,
        *,
        state: AdapterState | None = None,
        adapter: bytes | None = None,
        key: SigningKey | None = None,
        **changes: Any,
    ) -> Envelope:
        """The reply with changes, truly signed. state: sent and named; adapter: sent only."""
        if state is not None:
            changes = {"adapter_digest": state.digest(), **changes}
        if adapter is None:
            adapter = (state or self.state).to_safetensors()
        return seal_reply(replace(self.reply, **changes), key or self.site.key, adapter=adapter)

    def signed(self, payload: bytes) -> Envelope:
        """Any bytes, signed by the rightful key."""
        signature = self.site.key.sign(payload, domain=REPLY_DOMAIN)
        return Envelope(payload, signature, self.state.to_safetensors())

    def signed_text(self, old: str, new: str) -> Envelope:
        text = self.reply.canonical().decode()
        assert old in text
        return self.signed(text.replace(old, new, 1).encode())

    def tensors(self) -> dict[str, Float32]:
        return {name: array.copy() for name, array in self.state.tensors().items()}

    def one_tensor(self, change: Callable[[Float32], Any]) -> bytes:
        """The file with one tensor changed, drawn."""
        tensors: dict[str, Any] = self.tensors()
        name = str(self.random.choice(sorted(tensors)))
        return save({**tensors, name: np.ascontiguousarray(change(tensors[name]))})

    def with_value(self, value: float) -> AdapterState:
        """The adapter with one element replaced, drawn, of a factor that is trained."""
        factor = {"a": "A", "b": "B"}.get(self.trained) or str(self.random.choice(["A", "B"]))
        name = str(self.random.choice(self.state.modules))
        pair = {"A": self.state.pairs[name].A.copy(), "B": self.state.pairs[name].B.copy()}
        pair[factor][tuple(self.random.integers(0, pair[factor].shape))] = value
        return replace(self.state, pairs={**self.state.pairs, name: LoraPair(**pair)})

    def cut(self, data: bytes) -> bytes:
        return data[: int(self.random.integers(0, len(data)))]


def turn_of(
    site: FakeSite, task: Task, envelope: Envelope, *, seed: list[int], peers: Sequence[FakeSite]
) -> Turn:
    random = np.random.default_rng(seed)
    sent = incoming(task, envelope)
    factors = task.config["round.trained-factors"]

    def step(array: Float32, *, trained: bool) -> Float32:
        move = STEP * random.standard_normal(array.shape) if trained else 0.0
        return (array + move).astype(np.float32)

    pairs = {
        name: LoraPair(step(pair.A, trained=factors != "b"), step(pair.B, trained=factors != "a"))
        for name, pair in sent.pairs.items()
    }
    state = replace(sent, pairs=pairs)
    reply = honest_reply(site.name, task, state)
    return Turn(site, task, envelope, random, peers, state, reply)


# Files


def _header(data: bytes) -> tuple[str, bytes]:
    length = int.from_bytes(data[:8], "little")
    return data[8 : 8 + length].decode().rstrip(), data[8 + length :]


def _file(header: str, body: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header.encode() + body


def _key_twice(turn: Turn) -> bytes:
    header, body = _header(turn.state.to_safetensors())
    first = header[1 : header.index("},") + 1]
    return _file(f"{{{first},{header[1:]}", body)


def _overlapping(turn: Turn) -> bytes:
    header, body = _header(turn.state.to_safetensors())
    entries = json.loads(header)
    last = entries[max(entries)]["data_offsets"]
    last[:] = [last[0] - 4, last[1] - 4]
    return _file(json.dumps(entries), body[:-4])


def _renamed(turn: Turn) -> bytes:
    return save({f"{name}s": array for name, array in turn.tensors().items()})


def _without_one(turn: Turn) -> bytes:
    tensors = turn.tensors()
    del tensors[str(turn.random.choice(sorted(tensors)))]
    return save(tensors)


def _another_rank(turn: Turn) -> AdapterState:
    """Every factor with a rank more, which is nothing."""
    pairs = {
        name: LoraPair(np.pad(pair.A, ((0, 1), (0, 0))), np.pad(pair.B, ((0, 0), (0, 1))))
        for name, pair in turn.state.pairs.items()
    }
    return replace(turn.state, pairs=pairs)


def _scaled(turn: Turn, factor: float) -> AdapterState:
    """What may be trained, times a number."""
    pairs = {
        name: LoraPair(
            pair.A if turn.trained == "b" else (pair.A * np.float32(factor)),
            pair.B if turn.trained == "a" else (pair.B * np.float32(factor)),
        )
        for name, pair in turn.state.pairs.items()
    }
    return replace(turn.state, pairs=pairs)


def _frozen_changed(turn: Turn) -> AdapterState:
    """One element of the factor that is not to be trained, by the least that a float can change."""
    name = str(turn.random.choice(turn.state.modules))
    pair = turn.state.pairs[name]
    a, b = pair.A.copy(), pair.B.copy()
    frozen = a if turn.trained == "b" else b
    index = tuple(turn.random.integers(0, frozen.shape))
    frozen[index] = np.nextafter(frozen[index], np.float32(np.inf))
    return replace(turn.state, pairs={**turn.state.pairs, name: LoraPair(a, b)})


def _cancelling(turn: Turn) -> AdapterState:
    """A row of A twice, and B with +x and -x."""
    pairs = {}
    for name, pair in turn.state.pairs.items():
        a, b = pair.A.copy(), pair.B.copy()
        a[1] = a[0]
        b[:, 0] += np.float32(1e7)
        b[:, 1] -= np.float32(1e7)
        pairs[name] = LoraPair(a, b)
    return replace(turn.state, pairs=pairs)


def _rescaled(turn: Turn, factor: float) -> AdapterState:
    """(B x, A / x), the same product; for 0 the largest B beside an A of zeros."""
    pairs = {
        name: LoraPair(pair.A / np.float32(factor), pair.B * np.float32(factor))
        if factor
        else LoraPair(0 * pair.A, 0 * pair.B + np.float32(3e38))
        for name, pair in turn.state.pairs.items()
    }
    return replace(turn.state, pairs=pairs)


# Records


def _records(turn: Turn, **changes: Any) -> RecordDict:
    """The honest envelope's records with some replaced; None takes one away."""
    records = to_records(turn.sealed())
    for name, record in changes.items():
        if record is None:
            del records[name]
        else:
            records[name] = record
    return records


def _arrays(turn: Turn, **changes: Any) -> RecordDict:
    data = turn.state.to_safetensors()
    content = {"dtype": "uint8", "shape": (len(data),), "stype": "safetensors", "data": data}
    array = Array(**{**content, **changes})
    return _records(turn, adapter=ArrayRecord({"adapter": array}))


def _row(turn: Turn, **changes: Any) -> Envelope:
    assert turn.reply.privacy is not None
    return turn.sealed(privacy=replace(turn.reply.privacy, **changes))


def _peer(turn: Turn) -> FakeSite:
    return turn.peers[int(turn.random.integers(len(turn.peers)))]


def _error(turn: Turn, code: str) -> Envelope:
    changes = {"error_code": code, "correlation_id": "abc123", "adapter_digest": ""}
    return turn.sealed(adapter=b"", **changes)


def _answering(turn: Turn, **changes: Any) -> Envelope:
    """A faultless reply to a task that is not the one asked."""
    task = replace(turn.task, **changes)
    return turn.sealed(
        task_sha256=task.sha256,
        run_uid=task.run_uid,
        server_round=task.server_round,
        attempt=task.attempt,
    )


# Class -> the reason that it is refused for, and how it is made of an honest reply.
MALFORMED: dict[str, tuple[str, Callable[[Turn], Answer]]] = {
    "a tensor is missing": ("adapter", lambda t: t.sealed(adapter=_without_one(t))),
    "a tensor too many": (
        "adapter", lambda t: t.sealed(adapter=save({**t.tensors(), "x": np.ones(1, np.float32)})),
    ),
    "tensors of other names": ("adapter", lambda t: t.sealed(adapter=_renamed(t))),
    "a tensor of another shape": (
        "adapter", lambda t: t.sealed(adapter=t.one_tensor(lambda array: array[:, 1:])),
    ),
    "a tensor that would broadcast": (
        "adapter", lambda t: t.sealed(adapter=t.one_tensor(lambda array: array[:1, :1])),
    ),
    "a flat tensor": ("adapter", lambda t: t.sealed(adapter=t.one_tensor(np.ravel))),
    "a tensor transposed": (
        "adapter", lambda t: t.sealed(adapter=t.one_tensor(np.transpose)),
    ),
    "float16": ("adapter", lambda t: t.sealed(adapter=t.one_tensor(np.float16))),
    "float64": ("adapter", lambda t: t.sealed(adapter=t.one_tensor(np.float64))),
    "int32": ("adapter", lambda t: t.sealed(adapter=t.one_tensor(np.int32))),
    "another rank": (
        "adapter", lambda t: t.sealed(state=_another_rank(t)),
    ),
    "no adapter": ("adapter", lambda t: t.sealed(adapter=b"")),
    "no tensors": ("adapter", lambda t: t.sealed(adapter=save({}))),
    "a file that is cut": ("adapter", lambda t: t.sealed(adapter=t.cut(t.state.to_safetensors()))),
    "bytes after the end": (
        "adapter", lambda t: t.sealed(adapter=t.state.to_safetensors() + t.random.bytes(8)),
    ),
    "no safetensors": ("adapter", lambda t: t.sealed(adapter=t.random.bytes(300))),
    "a header of 2^60 bytes": (
        "adapter", lambda t: t.sealed(adapter=struct.pack("<Q", 2**60) + b"{}"),
    ),
    "a key twice in the header": ("adapter", lambda t: t.sealed(adapter=_key_twice(t))),
    "overlapping tensors": ("adapter", lambda t: t.sealed(adapter=_overlapping(t))),
    "metadata in the header": (
        "adapter", lambda t: t.sealed(adapter=save(t.tensors(), metadata={"note": "hello"})),
    ),
    "an oversized adapter": (
        "adapter", lambda t: t.sealed(adapter=t.state.to_safetensors() + bytes(100_000)),
    ),
    "an adapter that was not signed": (
        "digest", lambda t: t.sealed(adapter=t.with_value(7.0).to_safetensors()),
    ),
    "no digest": ("digest", lambda t: t.sealed(adapter_digest="")),
    "NaN": ("not-finite", lambda t: t.sealed(state=t.with_value(math.nan))),
    "infinity": ("not-finite", lambda t: t.sealed(state=t.with_value(math.inf))),
    "minus infinity": ("not-finite", lambda t: t.sealed(state=t.with_value(-math.inf))),
    "a product that overflows": ("too-large", lambda t: t.sealed(state=t.with_value(3e38))),
    "an update that is too large": ("update-norm", lambda t: t.sealed(state=_scaled(t, 1e3))),
    "an update turned round and too large": (
        "update-norm", lambda t: t.sealed(state=_scaled(t, -1e3)),
    ),
    "a product that cancels": ("cancels", lambda t: t.sealed(state=_cancelling(t))),
    "an honest product in factors of 2^60 and 2^-60": (
        "too-large", lambda t: t.sealed(state=_rescaled(t, 2.0**60)),
    ),
    "a huge factor beside nothing": ("too-large", lambda t: t.sealed(state=_rescaled(t, 0.0))),
    "the frozen factor changed": ("frozen", lambda t: t.sealed(state=_frozen_changed(t))),
    "another task": ("signature", lambda t: t.sealed(task_sha256="0" * 64)),
    "a task of another base": ("signature", lambda t: _answering(t, base_digest="other")),
    "a task of another adapter": ("signature", lambda t: _answering(t, adapter_digest="other")),
    "a task of other settings": ("signature", lambda t: _answering(t, config={"lora.rank": 1})),
    "another round": ("signature", lambda t: t.sealed(server_round=t.task.server_round + 1)),
    "another attempt": ("signature", lambda t: t.sealed(attempt=t.task.attempt + 1)),
    "another run": ("signature", lambda t: t.sealed(run_uid="run-8")),
    "another site": ("signature", lambda t: t.sealed(site=HONEST[0])),
    "unsigned": ("signature", lambda t: replace(t.sealed(), signature=b"")),
    "a signature that is cut": (
        "signature", lambda t: replace(t.sealed(), signature=t.cut(t.sealed().signature)),
    ),
    "signed by another enrolled site": ("signature", lambda t: t.sealed(key=_peer(t).key)),
    "signed in the domain of tasks": (
        "signature",
        lambda t: replace(
            t.sealed(), signature=t.site.key.sign(t.reply.canonical(), domain=TASK_DOMAIN)
        ),
    ),
    "JSON with spaces": ("protocol", lambda t: t.signed_text('":', '": ')),
    "a field twice": ("protocol", lambda t: t.signed_text('"attempt":', '"attempt":1,"attempt":')),
    "no JSON": ("protocol", lambda t: t.signed(t.random.bytes(200))),
    "nested without end": ("protocol", lambda t: t.signed(b"[" * 100_000)),
    "a task as reply": ("protocol", lambda t: t.signed(t.task.canonical())),
    "another protocol": ("protocol", lambda t: t.sealed(protocol=PROTOCOL + 1)),
    "NaN among the numbers": ("protocol", lambda t: t.sealed(numbers={"steps": math.nan})),
    "infinity among the numbers": ("protocol", lambda t: t.sealed(numbers={"steps": math.inf})),
    "text among the numbers": ("protocol", lambda t: t.signed_text('"steps":3', '"steps":"3"')),
    "an error code that nobody knows": ("protocol", lambda t: _error(t, "because")),
    "no privacy row": ("privacy", lambda t: t.sealed(privacy=None)),
    "another privacy unit": ("privacy", lambda t: _row(t, unit="patient")),
    "no privacy at all": (
        "privacy", lambda t: t.sealed(privacy=PrivacyRow("none", math.inf, 1e-5, 0.0, 1.0, 3)),
    ),
    "another delta": ("privacy", lambda t: _row(t, delta=1e-3)),
    "infinite epsilon": ("privacy", lambda t: _row(t, epsilon=math.inf)),
    "an epsilon that is none": ("protocol", lambda t: _row(t, epsilon=math.nan)),
    "an epsilon below nothing": ("protocol", lambda t: _row(t, epsilon=-1.0)),
    "no heads": ("heads", lambda t: t.sealed(heads=None)),
    "a refusal": ("site-policy", lambda t: _error(t, "policy")),
    "an error of Flower's": ("unanswered", lambda t: 3),
    "no records": ("unanswered", lambda t: RecordDict()),
    "other records": ("unanswered", lambda t: _records(t, metrics=ConfigRecord({"loss": 1.0}))),
    "an adapter without an envelope": ("unanswered", lambda t: _records(t, envelope=None)),
    "an envelope with other keys": (
        "unanswered", lambda t: _records(t, envelope=ConfigRecord({"payload": b"x", "more": b"y"})),
    ),
    "an envelope of text": (
        "unanswered",
        lambda t: _records(t, envelope=ConfigRecord({"payload": "x", "signature": "y"})),
    ),
    "an oversized payload": ("unanswered", lambda t: t.signed(b"1" * ((1 << 20) + 1))),
    "arrays of numpy's": ("unanswered", lambda t: _arrays(t, stype="numpy.ndarray")),
    "an array of floats": ("unanswered", lambda t: _arrays(t, dtype="float32")),
    "two arrays": (
        "unanswered",
        lambda t: _records(t, adapter=ArrayRecord({"a": Array(np.ones(1)), "b": Array(np.ones(1))})),
    ),
}  # fmt: skip


def _flipped(data: bytes, turn: Turn) -> bytes:
    content = bytearray(data)
    content[int(turn.random.integers(len(content)))] ^= 1 << int(turn.random.integers(8))
    return bytes(content)


def _flip(turn: Turn, part: str) -> Envelope:
    envelope = turn.sealed()
    return replace(envelope, **{part: _flipped(bytes(getattr(envelope, part)), turn)})


def _theirs(turn: Turn) -> Envelope:
    """What an honest site has just sealed, for this very round."""
    return _peer(turn).sealed[-1]


def _resigned(turn: Turn, key: SigningKey) -> Envelope:
    """Another site's reply under a signature of one's own."""
    theirs = _theirs(turn)
    return replace(theirs, signature=key.sign(theirs.payload, domain=REPLY_DOMAIN))


def _renamed_theirs(turn: Turn) -> Envelope:
    """Another site's reply with one's own name in it."""
    theirs = _theirs(turn)
    text = theirs.payload
    for name in HONEST:
        text = text.replace(f'"site":"{name}"'.encode(), f'"site":"{turn.site.name}"'.encode())
    assert text != theirs.payload
    return Envelope(text, turn.site.key.sign(text, domain=REPLY_DOMAIN), theirs.adapter)


def _earlier(turn: Turn) -> Envelope:
    """One's own reply of an earlier round, faultless then."""
    return turn.site.sealed[int(turn.random.integers(len(turn.site.sealed) - 1))]


# Refused for one of these reasons: where a bit falls decides which.
SPOOFED: dict[str, tuple[set[str], Callable[[Turn], Answer]]] = {
    "another site's reply": ({"signature"}, _theirs),
    "another site's reply, signed by oneself": (
        {"signature"}, lambda t: _resigned(t, t.site.key),
    ),
    "another site's reply, signed by a stranger": (
        {"signature"}, lambda t: _resigned(t, SigningKey.generate()),
    ),
    "another site's reply with one's own name": ({"signature"}, _renamed_theirs),
    "one's own reply in another's name": (
        {"signature"}, lambda t: t.sealed(site=_peer(t).name),
    ),
    "in another's name and with its payload's signature": (
        {"signature"},
        lambda t: replace(t.sealed(site=HONEST[0]), signature=_theirs(t).signature),
    ),
    "one's own reply of an earlier round": ({"signature"}, _earlier),
    "one's own reply to an earlier attempt": (
        {"signature"}, lambda t: _answering(t, attempt=t.task.attempt - 1),
    ),
    "one's own reply of another run": ({"signature"}, lambda t: _answering(t, run_uid="run-6")),
    "an earlier signature": (
        {"signature"}, lambda t: replace(t.sealed(), signature=_earlier(t).signature),
    ),
    "signed by a stranger": ({"signature"}, lambda t: t.sealed(key=SigningKey.generate())),
    "signed by another enrolled site": ({"signature"}, lambda t: t.sealed(key=_peer(t).key)),
    "the coordinator's own task": ({"signature"}, lambda t: t.envelope),
    "the coordinator's own task, signed": (
        {"protocol"}, lambda t: t.signed(t.envelope.payload),
    ),
    "a bit of the payload": ({"signature"}, lambda t: _flip(t, "payload")),
    "a bit of the signature": ({"signature"}, lambda t: _flip(t, "signature")),
    "a bit of the adapter": ({"adapter", "digest"}, lambda t: _flip(t, "adapter")),
    "another site's adapter": (
        {"digest"}, lambda t: replace(t.sealed(), adapter=_theirs(t).adapter),
    ),
    "the adapter that was sent": (
        {"digest"}, lambda t: replace(t.sealed(), adapter=t.envelope.adapter),
    ),
    "an earlier adapter": ({"digest"}, lambda t: replace(t.sealed(), adapter=_earlier(t).adapter)),
}  # fmt: skip


_IN_BOTH_FACTORS = (
    "a product that cancels",
    "an honest product in factors of 2^60 and 2^-60",
    "a huge factor beside nothing",
)


@dataclass(frozen=True)
class Attack:
    """A class of hostile replies. reasons: what it may be refused for."""

    name: str
    reasons: set[str]
    make: Callable[[Turn], Answer]


class Siege:
    """A room of two honest sites and some hostile ones, round after round.

    plan: what each hostile site sends in this round; without a plan it is honest.
    """

    def __init__(
        self, clock: FakeClock, folder: Path, *, hostile: int, seed: int, method: str = "svd"
    ) -> None:
        folder.mkdir()
        self.method = method
        self.trained: dict[str, AdapterState] = {}
        self.plan: dict[str, Attack] = {}
        self.seed = seed
        names = [f"x-{number:02d}" for number in range(hostile)]
        scripts: dict[str, list[Any]] = {name: [self._honest] for name in HONEST}
        scripts |= {name: [self._hostile] for name in names}
        self.room = Room(
            clock, folder, scripts,
            **{"federation__max-retries": 0, "aggregation__max-update-norm": MAX_UPDATE_NORM,
               "aggregation__method": method},
        )  # fmt: skip
        self.room.federation.gather()
        self.hostile = names
        self.current = CURRENT
        self.expected = CURRENT
        self.refused: Counter[str] = Counter()

    def run_peaceful_round(self) -> None:
        """Let everybody be honest once, and so have something to replay."""
        replies = self.room.federation.run_round(self.current, server_round=1)
        assert len(replies.updates) == len(self.room.sites)
        empty_incoming(self.room.incoming)

    def run_round(self, server_round: int, attacks: list[Attack]) -> None:
        """Run a round in which each hostile site makes one attack, and check what came of it."""
        self.plan = dict(zip(self.hostile, attacks, strict=True))
        self.trained.clear()
        replies = self.room.federation.run_round(self.current, server_round=server_round)
        assert [update.site for update in replies.updates] == list(HONEST)
        assert set(replies.refused) == set(self.hostile)
        for site, reason in replies.refused.items():
            attack = self.plan[site]
            assert reason in attack.reasons, f"{attack.name}: {reason}"
            self.refused[attack.name] += 1
        told = {
            (event["site"], event["reason"])
            for event in self.room.events("refused")
            if event["round"] == server_round
        }
        assert told == set(replies.refused.items())
        assert [
            event["site"] for event in self.room.events("reply") if event["round"] == server_round
        ] == list(HONEST)
        returned = {update.site: in_memory(update.adapter) for update in replies.updates}
        self.current = self._merged(self.current, returned)
        empty_incoming(self.room.incoming)
        # What a coordinator would make of the honest sites' adapters that never heard of the others.
        self.expected = self._merged(self.expected, self.trained)
        assert self.current.to_safetensors() == self.expected.to_safetensors()

    def _merged(self, current: AdapterState, by_site: Mapping[str, AdapterState]) -> AdapterState:
        updates = [SiteUpdate(site, 100.0, by_site[site]) for site in HONEST]
        return merge(current, updates, rules=MergeRules(self.method)).state

    def check_trail(self) -> None:
        """The audit log tells of every refusal what the history tells."""
        keys = ("round", "site", "reason")
        told = [tuple(event[key] for key in keys) for event in self.room.events("refused")]
        assert [tuple(line[key] for key in keys) for line in self.room.lines("refused")] == told
        assert len(told) == sum(self.refused.values())

    def _turn(self, site: FakeSite, task: Task, envelope: Envelope) -> Turn:
        index = sorted(self.room.sites).index(site.name)
        peers = [self.room.sites[name] for name in HONEST]
        seed = [self.seed, task.server_round, index]
        return turn_of(site, task, envelope, seed=seed, peers=peers)

    def _honest(self, site: FakeSite, task: Task, envelope: Envelope) -> Answer:
        turn = self._turn(site, task, envelope)
        self.trained[site.name] = turn.state
        site.sealed.append(turn.sealed())
        return site.sealed[-1]

    def _hostile(self, site: FakeSite, task: Task, envelope: Envelope) -> Answer:
        turn = self._turn(site, task, envelope)
        site.sealed.append(turn.sealed())
        return self.plan[site.name].make(turn) if self.plan else site.sealed[-1]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    return FakeClock().install(monkeypatch)


def _drawn(table: Mapping[str, Any], count: int, *, seed: int) -> Iterator[str]:
    """Names of a table, all of them equally often, shuffled."""
    random = np.random.default_rng(seed)
    names = sorted(table)
    repeated = [names[number % len(names)] for number in range(count)]
    return iter([repeated[index] for index in random.permutation(count)])


def test_500_malformed_updates_of_many_classes_change_nothing(
    clock: FakeClock, tmp_path: Path
) -> None:
    assert len(MALFORMED) >= 18
    refused: Counter[str] = Counter()
    for index, (method, rounds) in enumerate(zip(METHODS_TO_TRY, (17, 17, 16), strict=True)):
        siege = Siege(clock, tmp_path / method, hostile=10, seed=index, method=method)
        # With both factors trained there is none to be frozen, and with one none to be rescaled.
        table = {
            name: Attack(name, {reason}, make)
            for name, (reason, make) in MALFORMED.items()
            if (reason != "frozen" if method == "svd" else name not in _IN_BOTH_FACTORS)
        }
        names = _drawn(table, 10 * rounds, seed=index)
        for server_round in range(1, rounds + 1):
            siege.run_round(server_round, [table[next(names)] for _ in range(10)])
        siege.check_trail()
        refused += siege.refused
    assert refused.total() == 500
    assert set(refused) == set(MALFORMED)


def test_1000_spoofed_replayed_or_signed_anew_change_nothing(
    clock: FakeClock, tmp_path: Path
) -> None:
    siege = Siege(clock, tmp_path / "room", hostile=25, seed=7)
    siege.run_peaceful_round()
    table = {name: Attack(name, reasons, make) for name, (reasons, make) in SPOOFED.items()}
    names = _drawn(table, 1000, seed=7)
    for server_round in range(2, 42):
        siege.run_round(server_round, [table[next(names)] for _ in range(25)])
    siege.check_trail()
    assert siege.refused.total() == 1000
    assert set(siege.refused) == set(SPOOFED)


# Sizes from one that float32 only holds as subnormals to far above any adapter that was trained.
SIZES = (0.0, 1e-40, 1e-6, 1e-2, 1.0, 1e2, 1e5)


@pytest.mark.parametrize("method", METHODS_TO_TRY)
def test_500_honest_updates_are_all_accepted(clock: FakeClock, tmp_path: Path, method: str) -> None:
    """Whatever the size of a step, and whichever rank a site holds."""
    rounds = {"svd": 17, "ffa": 17, "rolora": 16}[method]
    random = np.random.default_rng(rounds)

    def any_step(site: FakeSite, task: Task, envelope: Envelope) -> Answer:
        sent, trained = incoming(task, envelope), task.config["round.trained-factors"]
        size = float(random.choice(SIZES))

        def moved(array: Float32, *, moves: bool) -> Float32:
            step = size * random.standard_normal(array.shape) if moves else 0.0
            return (array + step).astype(np.float32)

        pairs = {
            name: LoraPair(moved(pair.A, moves=trained != "b"), moved(pair.B, moves=trained != "a"))
            for name, pair in sent.pairs.items()
        }
        state = replace(sent, pairs=pairs)
        reply = honest_reply(site.name, task, state)
        return seal_reply(reply, site.key, adapter=state.to_safetensors())

    sites = [f"site-{number}" for number in range(10)]
    scripts: dict[str, list[Any]] = {name: [any_step] for name in sites}
    # Two factors moved by 1e5 each: products of 1e10 in 70 places, times a scaling of up to 8.
    limits = {"aggregation__method": method, "aggregation__max-update-norm": 1e13}
    room = Room(clock, tmp_path, scripts, **limits)
    for number, name in enumerate(sites):
        room.sites[name].max_rank = 1 + number % 4
    for server_round in range(1, rounds + 1):
        replies = room.federation.run_round(CURRENT, server_round=server_round)
        assert [update.site for update in replies.updates] == sites
        assert dict(replies.refused) == {}
        assert all(math.isfinite(update.norm) for update in replies.updates)
        empty_incoming(room.incoming)
    assert room.events("refused") == []
    assert len(room.events("reply")) == 10 * rounds
