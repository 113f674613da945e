"""Screening: an honest reply passes; every other one is refused with its reason, and nothing else."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from common.adapter import AdapterState, LoraPair
from common.errors import ScreeningError
from common.records import PROTOCOL, Envelope, PrivacyRow, Reply, Task, seal_reply
from common.signing import REPLY_DOMAIN, TASK_DOMAIN, SigningKey
from server.roster import Roster, RosterEntry
from server.screening import AcceptedUpdate, screen_reply, screen_update, verified_reply
from server.update_norm import update_norm
from tests.unit.adapters import adapter_shape, in_memory, random_adapter
from tests.unit.fake_federation import HEADS, honest_reply

SHAPE = adapter_shape(2)
STATE = random_adapter(0, rank=2)
SENT = random_adapter(7, rank=2)
OSLO, BERN = SigningKey.generate(), SigningKey.generate()
ROSTER = Roster(
    [RosterEntry("oslo", OSLO.public_hex, 120), RosterEntry("bern", BERN.public_hex, 80)]
)
CONFIG = {
    "lora.rank": 2,
    "privacy.unit": "record",
    "privacy.target-delta": 1e-5,
    "round.trained-factors": "both",
}
TASK = Task("train", "run-7", "oslo", 3, 2, 2_000_000_000, "base", "incoming", CONFIG)


def _sealed(reply: Reply, *, key: SigningKey = OSLO, adapter: bytes | None = None) -> Envelope:
    return seal_reply(reply, key, adapter=STATE.to_safetensors() if adapter is None else adapter)


def _screen(envelope: Envelope) -> AcceptedUpdate:
    reply = verified_reply(envelope, task=TASK, site="oslo", roster=ROSTER)
    return screen_update(reply, envelope.adapter, task=TASK, shape=SHAPE, sent=SENT, max_norm=0.0)


def _reason(envelope: Envelope) -> str:
    with pytest.raises(ScreeningError, match="oslo|signature|task|reply|payload|site") as caught:
        _screen(envelope)
    return caught.value.reason


def _honest(**changes: object) -> Reply:
    return replace(honest_reply("oslo", TASK, STATE), **changes)  # type: ignore[arg-type]


def _answering(task: Task) -> Envelope:
    return _sealed(honest_reply("oslo", task, STATE))


def test_an_honest_reply_is_accepted() -> None:
    envelope = _sealed(_honest())
    update = _screen(envelope)
    assert update.site == "oslo"
    assert in_memory(update.adapter).digest() == STATE.digest()
    assert update.adapter.scaling_of("model.q_proj") == SHAPE.scaling
    assert update.norm == update_norm(STATE, sent=SENT)
    assert update.numbers == {"steps": 3}
    assert update.privacy == _honest().privacy


def test_a_site_that_is_not_enrolled_is_refused() -> None:
    with pytest.raises(ScreeningError, match="'rome' is not on the roster") as caught:
        verified_reply(_sealed(_honest()), task=TASK, site="rome", roster=ROSTER)
    assert caught.value.reason == "unknown-site"


def _altered(envelope: Envelope) -> Envelope:
    payload = envelope.payload.replace(b'"steps":3', b'"steps":4')
    assert payload != envelope.payload
    return replace(envelope, payload=payload)


def _signed_as_task() -> Envelope:
    payload = _honest().canonical()
    return Envelope(payload, OSLO.sign(payload, domain=TASK_DOMAIN), STATE.to_safetensors())


NOT_OSLOS_ANSWER: dict[str, Callable[[], Envelope]] = {
    "signed with a key nobody knows": lambda: _sealed(_honest(), key=SigningKey.generate()),
    "signed with another site's key": lambda: _sealed(_honest(), key=BERN),
    "another site's own reply": lambda: _sealed(_honest(site="bern"), key=BERN),
    "another site's name under its own key": lambda: _sealed(_honest(site="bern")),
    "altered after signing": lambda: _altered(_sealed(_honest())),
    "no signature": lambda: replace(_sealed(_honest()), signature=b""),
    "a signature of another length": lambda: replace(_sealed(_honest()), signature=b"x" * 63),
    "signed in the domain of tasks": _signed_as_task,
    "another task, all else equal": lambda: _sealed(_honest(task_sha256="0" * 64)),
    "a replay of another round": lambda: _answering(replace(TASK, server_round=2)),
    "a late reply to an earlier attempt": lambda: _answering(replace(TASK, attempt=1)),
    "a replay of another run": lambda: _answering(replace(TASK, run_uid="run-6")),
    "a reply to other settings": lambda: _answering(replace(TASK, config={"lora.rank": 1})),
    "a reply to another incoming adapter": lambda: _answering(replace(TASK, adapter_digest="x")),
    "the wrong round, the right task": lambda: _sealed(_honest(server_round=4)),
    "the wrong attempt, the right task": lambda: _sealed(_honest(attempt=1)),
    "the wrong run, the right task": lambda: _sealed(_honest(run_uid="run-6")),
}


@pytest.mark.parametrize("make", NOT_OSLOS_ANSWER.values(), ids=NOT_OSLOS_ANSWER.keys())
def test_what_is_not_this_sites_answer_to_this_task_is_refused(
    make: Callable[[], Envelope],
) -> None:
    assert _reason(make()) == "signature"


def _signed(payload: bytes) -> Envelope:
    """Bytes that a bad site signs with its own, rightful key."""
    return Envelope(payload, OSLO.sign(payload, domain=REPLY_DOMAIN), STATE.to_safetensors())


def _signed_with(**changes: object) -> Envelope:
    # The JSON form, floats already as hex, so that what no sender could encode can be tried.
    content = {**json.loads(_honest().canonical()), **changes}
    return _signed(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def _signed_text(old: str, new: str) -> Envelope:
    text = _honest().canonical().decode()
    assert old in text
    return _signed(text.replace(old, new).encode())


def test_signing_the_json_form_by_hand_gives_an_honest_reply() -> None:
    assert _screen(_signed_with()).site == "oslo"


NO_REPLY: dict[str, Callable[[], Envelope]] = {
    "another protocol version": lambda: _sealed(_honest(protocol=PROTOCOL + 1)),
    "nothing": lambda: _signed(b""),
    "garbage": lambda: _signed(b"\x00\xff\xfe garbage"),
    "another JSON value": lambda: _signed(b"[]"),
    "deeply nested": lambda: _signed(b"[" * 100_000),
    "a number too long to read": lambda: _signed(b"1" * 10_000),
    "a task": lambda: _signed(TASK.canonical()),
    "an unknown field": lambda: _signed_with(surprise=1),
    "text where a number belongs": lambda: _signed_with(attempt="2"),
    "a boolean round": lambda: _signed_with(server_round=True),
    "a number without bounds": lambda: _signed_with(numbers={"steps": 10**400}),
    "text among the numbers": lambda: _signed_with(numbers={"steps": "3"}),
    "NaN among the numbers": lambda: _sealed(_honest(numbers={"loss": math.nan})),
    "infinity among the numbers": lambda: _sealed(_honest(numbers={"loss": math.inf})),
    "a float above all floats": lambda: _signed_text('"0x1.8000000000000p+0"', '"0x1p99999"'),
    "privacy without its fields": lambda: _signed_with(privacy={"epsilon": 1.0}),
    "privacy that is a list": lambda: _signed_text('"privacy":{', '"privacy":[{'),
    "spaces in the JSON": lambda: _signed(_honest().canonical().replace(b",", b", ")),
    "a field twice": lambda: _signed_text('"attempt":2', '"attempt":2,"attempt":2'),
}


@pytest.mark.parametrize("make", NO_REPLY.values(), ids=NO_REPLY.keys())
def test_what_is_no_reply_is_refused_though_the_site_signed_it(
    make: Callable[[], Envelope],
) -> None:
    assert _reason(make()) == "protocol"


def _tensors(**changes: object) -> dict[str, object]:
    return {**STATE.tensors(), **changes}


FIRST = next(iter(STATE.tensors()))


def _cast(dtype: str) -> bytes:
    return save({name: array.astype(dtype) for name, array in STATE.tensors().items()})


def _safetensors_of(dtype: str, shape: list[int], size_bytes: int) -> bytes:
    """A header that says what it likes, in front of zeros."""
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, size_bytes]}
    header = json.dumps({FIRST: entry}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(size_bytes)


def _without_first() -> bytes:
    return save({name: array for name, array in STATE.tensors().items() if name != FIRST})


BAD_ADAPTERS: dict[str, Callable[[], bytes]] = {
    "none at all": lambda: b"",
    "garbage": lambda: b"\x00\xff garbage",
    "no tensors": lambda: save({}),
    "cut short": lambda: STATE.to_safetensors()[:-1],
    "a missing tensor": _without_first,
    "an extra tensor": lambda: save(_tensors(extra=np.zeros(1, np.float32))),
    "a tensor renamed": lambda: save({f"{n}s": a for n, a in STATE.tensors().items()}),
    "another rank": lambda: random_adapter(0, rank=1).to_safetensors(),
    "a tensor transposed": lambda: save(
        _tensors(**{FIRST: np.ascontiguousarray(STATE.tensors()[FIRST].T)})
    ),
    "a tensor that would broadcast": lambda: save(_tensors(**{FIRST: np.ones((1, 1), np.float32)})),
    "a scalar": lambda: save(_tensors(**{FIRST: np.ones((), np.float32)})),
    "float64": lambda: _cast("float64"),
    "float16": lambda: _cast("float16"),
    "integers": lambda: _cast("int32"),
    "bfloat16": lambda: _safetensors_of("BF16", [2, 2], 8),
    "an unknown dtype": lambda: _safetensors_of("F1", [2, 2], 4),
    "a header beyond the file": lambda: struct.pack("<Q", 2**60) + b"{}",
    "a shape beyond memory": lambda: _safetensors_of("F32", [2**31, 2**31], 8),
    "too many bytes": lambda: STATE.to_safetensors() + bytes(100_000),
    "metadata": lambda: save(STATE.tensors(), metadata={"note": "of the site's own"}),
    "a large tensor beside": lambda: save(_tensors(extra=np.zeros(100_000, np.float32))),
}


@pytest.mark.parametrize("make", BAD_ADAPTERS.values(), ids=BAD_ADAPTERS.keys())
def test_a_malformed_adapter_is_refused_though_the_site_signed_it(
    make: Callable[[], bytes],
) -> None:
    assert _reason(_sealed(_honest(), adapter=make())) == "adapter"


def test_an_oversized_adapter_is_refused_before_it_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def must_not_be_read(data: bytes) -> object:
        raise AssertionError("parsed")

    monkeypatch.setattr("common.adapter.load", must_not_be_read)
    with pytest.raises(ScreeningError, match=r"an adapter of 1000000 bytes, where at most \d+"):
        _screen(_sealed(_honest(), adapter=bytes(1_000_000)))


def test_an_adapter_that_was_not_signed_is_refused() -> None:
    other = random_adapter(1, rank=2)
    assert _reason(_sealed(_honest(), adapter=other.to_safetensors())) == "digest"
    assert _reason(_sealed(_honest(adapter_digest=""))) == "digest"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("factor", ["A", "B"])
def test_an_adapter_that_is_not_finite_is_refused(factor: str, value: float) -> None:
    pair = STATE.pairs["model.v_proj"]
    changed = {"A": pair.A.copy(), "B": pair.B.copy()}
    changed[factor][-1, -1] = value
    state = AdapterState({**STATE.pairs, "model.v_proj": LoraPair(**changed)}, 2.0)
    reply = _honest(adapter_digest=state.digest())
    assert _reason(_sealed(reply, adapter=state.to_safetensors())) == "not-finite"


@pytest.mark.parametrize("code", ["policy", "budget", "internal"])
def test_a_sites_own_error_code_is_the_reason(code: str) -> None:
    reply = _honest(error_code=code, correlation_id="abc123", adapter_digest="")
    with pytest.raises(ScreeningError, match="ask the site for log entry abc123") as caught:
        _screen(_sealed(reply, adapter=b""))
    assert caught.value.reason == f"site-{code}"


def test_a_reply_without_heads_is_refused_unless_it_is_an_error() -> None:
    """Whether a site was restored from a backup would go unseen."""
    assert _reason(_sealed(_honest(heads=None))) == "heads"
    with pytest.raises(ScreeningError, match="oslo does not say where its ledger") as caught:
        screen_reply(_honest(adapter_digest="", heads=None))
    assert caught.value.reason == "heads"
    error = _honest(error_code="internal", correlation_id="abc", heads=None)
    assert _reason(_sealed(error)) == "site-internal"


def test_a_verified_error_is_a_reply_until_it_is_screened() -> None:
    error = _honest(error_code="restored", adapter_digest="")
    reply = verified_reply(_sealed(error), task=TASK, site="oslo", roster=ROSTER)
    assert (reply, reply.heads) == (error, HEADS)


def test_an_error_code_wins_over_an_adapter_beside_it() -> None:
    assert _reason(_sealed(_honest(error_code="training"))) == "site-training"


def test_a_key_on_the_roster_that_is_no_key_refuses_the_reply() -> None:
    roster = Roster([RosterEntry("oslo", "not hex", 120)])
    with pytest.raises(ScreeningError, match="signature does not hold") as caught:
        verified_reply(_sealed(_honest()), task=TASK, site="oslo", roster=roster)
    assert caught.value.reason == "signature"


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_no_byte_can_be_changed_and_nothing_else_is_ever_raised(data: st.DataObject) -> None:
    """A single changed byte anywhere in payload, signature or adapter is refused."""
    envelope = _sealed(_honest())
    part = data.draw(st.sampled_from(["payload", "signature", "adapter"]))
    content = bytearray(getattr(envelope, part))
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ScreeningError, match=r"."):
        _screen(replace(envelope, **{part: bytes(content)}))


@settings(deadline=None, max_examples=100)
@given(payload=st.binary(max_size=200), adapter=st.binary(max_size=200), sign=st.booleans())
def test_random_bytes_are_refused_signed_or_not(payload: bytes, adapter: bytes, sign: bool) -> None:
    signature = OSLO.sign(payload, domain=REPLY_DOMAIN) if sign else b""
    with pytest.raises(ScreeningError, match=r"."):
        _screen(Envelope(payload, signature, adapter))


def test_a_finite_adapter_whose_merge_would_overflow_is_refused() -> None:
    pairs = {
        name: LoraPair(np.full_like(p.A, 3e38), np.full_like(p.B, 3e38))
        for name, p in STATE.pairs.items()
    }
    state = AdapterState(pairs, STATE.scaling)
    reply = _honest(adapter_digest=state.digest())

    assert _reason(_sealed(reply, adapter=state.to_safetensors())) == "too-large"


@pytest.mark.parametrize(("size", "reason"), [(1e7, "cancels"), (1.0, "")])
def test_huge_factors_of_a_small_product_are_refused(size: float, reason: str) -> None:
    """A row of A twice, and B with +x and -x: nothing as a product, and rubble in anybody's arithmetic."""
    pairs = {}
    for name, pair in STATE.pairs.items():
        a, b = pair.A.copy(), pair.B.copy()
        a[1] = a[0]
        b[:, 1] = 0.5 * b[:, 0] - np.float32(size)
        b[:, 0] += np.float32(size)
        pairs[name] = LoraPair(a, b)
    state = AdapterState(pairs, STATE.scaling)
    sealed = _sealed(_honest(adapter_digest=state.digest()), adapter=state.to_safetensors())
    if reason:
        assert _reason(sealed) == reason
    else:
        assert _screen(sealed).site == "oslo"


@pytest.mark.parametrize(
    ("by_factors", "factor", "reason"),
    [
        (False, 2.0**20, ""),
        (True, 2.0**20, "update-norm"),
        (True, -1.0, "update-norm"),
        (True, 1.0, ""),
    ],
)
def test_where_factors_are_averaged_they_may_not_move_far_behind_the_same_product(
    by_factors: bool, factor: float, reason: str
) -> None:
    """(B x, A / x): nothing as an update, and everything to a mean of factors."""
    scale = np.float32(factor)
    pairs = {name: LoraPair(p.A / scale, p.B * scale) for name, p in STATE.pairs.items()}
    state = AdapterState(pairs, STATE.scaling)
    envelope = _sealed(_honest(adapter_digest=state.digest()), adapter=state.to_safetensors())
    reply = verified_reply(envelope, task=TASK, site="oslo", roster=ROSTER)

    def screen() -> AcceptedUpdate:
        return screen_update(reply, envelope.adapter, task=TASK, shape=SHAPE, sent=STATE,
                             max_norm=5.0, by_factors=by_factors)  # fmt: skip

    if reason:
        with pytest.raises(ScreeningError, match="moves the factors by") as caught:
            screen()
        assert caught.value.reason == reason
    else:
        assert screen().norm == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize(
    "privacy",
    [
        None,
        PrivacyRow("none", math.inf, 1e-5, 0.0, 1.0, 3),
        PrivacyRow("record", 1.5, 1e-3, 0.8, 0.16, 3),
        PrivacyRow("record", math.inf, 1e-5, 0.8, 0.16, 3),
    ],
)
def test_an_update_without_the_privacy_that_was_asked_for_is_refused(
    privacy: PrivacyRow | None,
) -> None:
    assert _reason(_sealed(_honest(privacy=privacy))) == "privacy"


def _update(
    returned: AdapterState,
    *,
    trained: str = "both",
    sent: AdapterState = SENT,
    max_norm: float = 0.0,
) -> AcceptedUpdate:
    task = replace(TASK, config={**CONFIG, "round.trained-factors": trained})
    return screen_update(
        honest_reply("oslo", task, returned),
        returned.to_safetensors(),
        task=task,
        shape=SHAPE,
        sent=sent,
        max_norm=max_norm,
    )


def _with(state: AdapterState, factors: str, source: AdapterState) -> AdapterState:
    """`state` with some factors of another one."""
    pairs = {
        name: LoraPair(
            source.pairs[name].A if "A" in factors else pair.A,
            source.pairs[name].B if "B" in factors else pair.B,
        )
        for name, pair in state.pairs.items()
    }
    return replace(state, pairs=pairs)


@pytest.mark.parametrize(("trained", "factor"), [("b", "B"), ("a", "A")])
def test_the_factor_that_is_not_trained_must_come_back_as_it_was_sent(
    trained: str, factor: str
) -> None:
    frozen = "A" if factor == "B" else "B"
    honest = _with(SENT, factor, STATE)
    assert _update(honest, trained=trained).norm == update_norm(honest, sent=SENT)
    # A negative zero is another number of the digest, and only its sign bit differs.
    pair = SENT.pairs["model.v_proj"]
    zeroed = {"A": pair.A.copy(), "B": pair.B.copy()}
    zeroed[frozen][-1, -1] = 0.0
    sent = replace(SENT, pairs={**SENT.pairs, "model.v_proj": LoraPair(**zeroed)})
    zeroed = {name: array.copy() for name, array in zeroed.items()}
    zeroed[frozen][-1, -1] = -0.0
    signed = replace(SENT, pairs={**SENT.pairs, "model.v_proj": LoraPair(**zeroed)})
    for before, returned in ((SENT, STATE), (SENT, _with(SENT, frozen, STATE)), (sent, signed)):
        with pytest.raises(
            ScreeningError, match=rf"oslo: factor {frozen} of model\..* changed, .* trains {factor}"
        ) as caught:
            _update(returned, trained=trained, sent=before)
        assert caught.value.reason == "frozen"


def test_with_both_factors_trained_both_may_change() -> None:
    for returned in (SENT, STATE, _with(SENT, "A", STATE), _with(SENT, "B", STATE)):
        assert _update(returned).site == "oslo"


def test_ranks_that_were_sent_along_frozen_are_not_looked_for() -> None:
    """Of the four ranks that were sent the leading two are trained, and only these come back."""
    sent = random_adapter(3, rank=4)
    pairs = {
        name: LoraPair(pair.A[:2].copy(), STATE.pairs[name].B) for name, pair in sent.pairs.items()
    }
    update = _update(AdapterState(pairs, 2.0), trained="b", sent=sent)
    assert update.norm == update_norm(AdapterState(pairs, 2.0), sent=sent)


def test_an_update_above_the_limit_is_refused_with_both_numbers() -> None:
    norm = update_norm(STATE, sent=SENT)
    assert _update(STATE, max_norm=0.0).norm == norm
    assert _update(STATE, max_norm=norm).norm == norm
    with pytest.raises(
        ScreeningError,
        match=rf"oslo: the update has norm {norm:.6g}, and aggregation\.max-update-norm is 1;",
    ) as caught:
        _update(STATE, max_norm=1.0)
    assert caught.value.reason == "update-norm"
