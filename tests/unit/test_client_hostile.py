"""Hostile tasks against a real site: none is executed, all are in its audit log.

The worst of them come from a coordinator whose key the site believes: then only the hospital's own
policy, ledger and checks stand between a wish and the records.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

import client.examples
import client.training
from client.site import Site
from common.adapter import LoraPair, digest_tensors
from common.audit_log import verify_audit_log
from common.canonical import canonical_json, from_canonical
from common.chain import ChainHead
from common.errors import ProtocolError, SignatureError
from common.records import Envelope, SiteHeads, open_reply, reply_to, seal_reply
from common.signing import AUDIT_DOMAIN, REPLY_DOMAIN, TASK_DOMAIN, SigningKey
from tests.unit.hospital import Hospital, make_hospital

Attack = Callable[[Hospital], Envelope]

POLICY = {"allowed-target-modules": ["q_proj", "v_proj"], "max-rank": 8}
SETTINGS = {"lora.target-modules": "q_proj,v_proj"}


def _asks(**settings: Any) -> Attack:
    """A task, well signed, with other settings: dashes for _ and a dot for __."""
    changed = {key.replace("__", ".").replace("_", "-"): v for key, v in settings.items()}
    return lambda hospital: hospital.seal(hospital.task(settings=changed))


def _task(**fields: Any) -> Attack:
    """A task, well signed, with other fields."""
    return lambda hospital: hospital.seal(hospital.task(**fields))


def _describes(**settings: Any) -> Attack:
    changed = {key.replace("__", ".").replace("_", "-"): v for key, v in settings.items()}
    return lambda hospital: hospital.seal(
        hospital.task(0, kind="describe", site="", adapter_digest="", settings=changed)
    )


def _signed(payload: bytes, hospital: Hospital, domain: bytes = TASK_DOMAIN) -> Envelope:
    adapter = hospital.adapter.to_safetensors()
    return Envelope(payload, hospital.coordinator.sign(payload, domain=domain), adapter)


def _content(**changes: Any) -> Attack:
    """A payload that no Task could have, well signed; a change to None drops the field."""

    def attack(hospital: Hospital) -> Envelope:
        content = from_canonical(hospital.task().canonical())
        content = {k: v for k, v in {**content, **changes}.items() if v is not None}
        return _signed(canonical_json(content), hospital)

    return attack


def _payload(payload: bytes) -> Attack:
    return lambda hospital: _signed(payload, hospital)


def _signature(change: Callable[[bytes], bytes]) -> Attack:
    def attack(hospital: Hospital) -> Envelope:
        envelope = hospital.seal(hospital.task())
        return replace(envelope, signature=change(envelope.signature))

    return attack


def _under_an_old_signature(**changes: Any) -> Attack:
    def attack(hospital: Hospital) -> Envelope:
        old, altered = hospital.task(), hospital.task(**changes)
        return replace(hospital.seal(old), payload=altered.canonical())

    return attack


def _in_domain(domain: bytes) -> Attack:
    return lambda hospital: _signed(hospital.task().canonical(), hospital, domain)


def _by_the_sites_own_key(hospital: Hospital) -> Envelope:
    key = SigningKey.load(hospital.folder / "keys" / "signing.pem")
    return hospital.seal(hospital.task(), key)


def _a_reply_of_its_own(hospital: Hospital) -> Envelope:
    """What the site itself signed comes back as a task."""
    key = SigningKey.load(hospital.folder / "keys" / "signing.pem")
    return seal_reply(reply_to(hospital.task(), site="north", numbers={"max-rank": 8}), key)


def _adapter(change: Callable[[bytes], bytes], *, sign_it: bool = True) -> Attack:
    """Another adapter; sign_it: the task names its very digest."""

    def attack(hospital: Hospital) -> Envelope:
        data = change(hospital.adapter.to_safetensors())
        task = hospital.task()
        if sign_it:
            task = replace(task, adapter_digest=digest_tensors(load(data)))
        return replace(hospital.seal(task), adapter=data)

    return attack


def _with_tensors(
    change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]],
) -> Callable[[bytes], bytes]:
    return lambda data: save(change(load(data)))


def _first(value: float) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """One value of the first tensor replaced."""

    def change(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        name = min(tensors)
        tensors[name] = tensors[name].copy()
        tensors[name].flat[0] = value
        return tensors

    return change


def _last_bit(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def _of_another_rank(data: bytes) -> bytes:
    return save(
        {n: np.ones([3 if s == 2 else s for s in a.shape], "f4") for n, a in load(data).items()}
    )


_GONE = SiteHeads(ChainHead(7, "ab" * 32), ChainHead(9, "cd" * 32))

# What is asked, and the code that the coordinator gets; in the hospital's log are words.
REFUSED: dict[str, tuple[Attack, str]] = {
    "expired": (_task(expires_at=1), "expired"),
    # Less noise than the hospital would allow, or none.
    "sigma 0": (_asks(privacy__noise_multiplier=0.0), "config"),
    "sigma below 0": (_asks(privacy__noise_multiplier=-1.0), "config"),
    "sigma NaN": (_asks(privacy__noise_multiplier=math.nan), "config"),
    "sigma infinite": (_asks(privacy__noise_multiplier=math.inf), "config"),
    "sigma 1e-300": (_asks(privacy__noise_multiplier=1e-300), "config"),
    "sigma 0.01": (_asks(privacy__noise_multiplier=0.01), "budget"),
    "sigma in words": (_asks(privacy__noise_multiplier="none"), "config"),
    "sigma true": (_asks(privacy__noise_multiplier=True), "config"),
    "no unit": (_asks(privacy__unit="none"), "policy"),
    "another unit": (_asks(privacy__unit="patient"), "policy"),
    "a unit of its own": (_asks(privacy__unit="token"), "config"),
    "epsilon 1e5": (_asks(privacy__target_epsilon=1e5), "policy"),
    "epsilon NaN": (_asks(privacy__target_epsilon=math.nan), "config"),
    "epsilon infinite": (_asks(privacy__target_epsilon=math.inf), "config"),
    "delta 0.5": (_asks(privacy__target_delta=0.5), "config"),
    "delta 1e-4": (_asks(privacy__target_delta=1e-4), "policy"),
    "delta 1": (_asks(privacy__target_delta=1.0), "config"),
    "huge clip": (_asks(privacy__max_grad_norm=1e9), "policy"),
    "infinite clip": (_asks(privacy__max_grad_norm=math.inf), "config"),
    "another accountant": (_asks(privacy__accountant="mine"), "config"),
    # Other models, larger adapters.
    "another model": (_asks(model__name="gpt"), "policy"),
    "a model by its path": (_asks(model__name="/etc"), "policy"),
    "another digest": (_task(base_digest="0" * 64), "policy"),
    "no digest": (_task(base_digest=""), "policy"),
    "rank 4096": (_asks(lora__rank=4096), "policy"),
    "rank 9 of 8": (_asks(lora__rank=9), "policy"),
    "rank 0": (_asks(lora__rank=0), "config"),
    "half a rank": (_asks(lora__rank=2.5), "config"),
    "all modules": (_asks(lora__target_modules="all-linear"), "policy"),
    "a module more": (_asks(lora__target_modules="q_proj,v_proj,lm_head"), "policy"),
    "modules by pattern": (_asks(lora__target_modules=".*"), "policy"),
    "no module": (_asks(lora__target_modules=""), "policy"),
    "DoRA": (_asks(lora__use_dora=True), "config"),
    # More work.
    "a million steps": (_asks(train__local_steps=10**6), "config"),
    "100,000 steps": (_asks(train__local_steps=10**5), "policy"),
    "a million rounds": (_asks(train__rounds=10**6), "config"),
    "a batch of a billion": (_asks(train__batch_size=10**9), "policy"),
    "a billion tokens": (_asks(data__max_length=10**9), "policy"),
    "tokens beyond int64": (_asks(data__max_length=10**30), "policy"),
    "rate NaN": (_asks(train__learning_rate=math.nan), "config"),
    "another optimizer": (_asks(train__optimizer="mine"), "config"),
    "seed below 0": (_asks(train__seed=-1), "config"),
    # Keys that are not the coordinator's to set, and text that would run.
    "the path of the data": (_asks(data__path="/etc/passwd"), "config"),
    "the policy itself": (_asks(policy__max_epsilon=math.inf), "config"),
    "a template that looks inside": (
        _asks(data__prompt_template="{instruction.__class__}"),
        "config",
    ),
    "a template with the answer": (_asks(data__prompt_template="{output}"), "config"),
    # Rounds and runs that are not.
    "round 0": (_task(server_round=0), "policy"),
    "round 9999": (_task(server_round=9999), "policy"),
    "round below 0": (_task(server_round=-1), "policy"),
    "a run that climbs": (_task(run_uid="../../keys/signing"), "protocol"),
    "a run without a name": (_task(run_uid=""), "protocol"),
    "a run of 1000 letters": (_task(run_uid="x" * 1000), "protocol"),
    # Adapters that the task was not signed with, or that nobody trains from.
    "an altered adapter": (_adapter(_last_bit, sign_it=False), "signature"),
    "another adapter's digest": (_task(adapter_digest="0" * 64), "signature"),
    "an adapter with NaN": (_adapter(_with_tensors(_first(math.nan))), "shape"),
    "an adapter with infinity": (_adapter(_with_tensors(_first(math.inf))), "shape"),
    "an adapter of another rank": (_adapter(_of_another_rank), "shape"),
    "an adapter with a tensor more": (
        _adapter(_with_tensors(lambda tensors: {**tensors, "x": np.ones(3, np.float32)})),
        "shape",
    ),
    "an adapter in float64": (
        _adapter(_with_tensors(lambda tensors: {n: a.astype("f8") for n, a in tensors.items()})),
        "shape",
    ),
    "no adapter": (_adapter(lambda data: b"", sign_it=False), "protocol"),
    "a pickle for an adapter": (
        _adapter(lambda data: b"\x80\x04cos\nsystem\n", sign_it=False), "protocol"
    ),
    "ten megabytes for an adapter": (_adapter(lambda data: bytes(10**7), sign_it=False), "protocol"),
    # Heads that this site never had.
    "a future of its own": (_task(seen=_GONE), "restored"),
    # The same wishes before the first round.
    "a description without noise": (_describes(privacy__noise_multiplier=0.0), "config"),
    "a description without privacy": (_describes(privacy__unit="none"), "policy"),
    "a description of another model": (_describes(model__name="gpt"), "policy"),
}  # fmt: skip

# Nobody vouches for these: no signed answer at all, whatever they ask.
UNANSWERED: dict[str, tuple[Attack, str]] = {
    "unsigned": (_signature(lambda signature: b""), "signature"),
    "half a signature": (_signature(lambda signature: signature[:32]), "signature"),
    "a bit of the signature": (_signature(_last_bit), "signature"),
    "a signature of zeros": (_signature(lambda signature: bytes(64)), "signature"),
    "a stranger's key": (lambda h: h.seal(h.task(), SigningKey.generate()), "signature"),
    "the site's own key": (_by_the_sites_own_key, "signature"),
    "signed as a reply": (_in_domain(REPLY_DOMAIN), "signature"),
    "signed as a checkpoint": (_in_domain(AUDIT_DOMAIN), "signature"),
    "the site's own reply": (_a_reply_of_its_own, "signature"),
    "an altered setting": (
        _under_an_old_signature(settings={"privacy.target-epsilon": 9.0}), "signature"
    ),
    "an altered round": (_under_an_old_signature(server_round=2), "signature"),
    "an altered end": (_under_an_old_signature(expires_at=2**40), "signature"),
    "for another site": (_task(site="south"), "protocol"),
    "for no site": (_task(site=""), "protocol"),
    "protocol 1": (_content(protocol=1), "protocol"),
    "protocol 99": (_content(protocol=99), "protocol"),
    "a kind of its own": (_content(kind="reveal"), "protocol"),
    "an unknown field": (_content(command="ls"), "protocol"),
    "a field less": (_content(adapter_digest=None), "protocol"),
    "expired before there were clocks": (_task(expires_at=-(10**400)), "protocol"),
    "never to expire": (_task(expires_at=10**400), "protocol"),
    "a round beyond 2^53": (_task(server_round=2**53 + 1), "protocol"),
    "a round in words": (_content(server_round="1"), "protocol"),
    "a round that is true": (_content(server_round=True), "protocol"),
    "settings in a list": (_content(config=["lora.rank", 2]), "protocol"),
    "settings in settings": (_content(config={"lora.rank": {"rank": 2}}), "protocol"),
    "heads below 0": (
        _content(audit_head={"count": -1, "digest": "0" * 64}), "protocol"
    ),
    "nothing": (_payload(b""), "protocol"),
    "no JSON": (_payload(b"Mr Miller, born 1950"), "protocol"),
    "JSON within JSON within JSON": (_payload(b"[" * 100_000), "protocol"),
    "another spelling": (
        lambda h: _signed(h.task().canonical().replace(b":", b": ", 1), h), "protocol"
    ),
}  # fmt: skip


class Watched:
    """One site, and whatever it does that a refused task must not make it do."""

    def __init__(self, hospital: Hospital) -> None:
        self.hospital = hospital
        self.site = hospital.open()
        self.done: list[str] = []

    @contextmanager
    def spies(self) -> Iterator[None]:
        """Whoever reads records or trains inside is noted, and stopped."""

        def spy(what: str) -> Callable[..., None]:
            def did(*args: object, **kwargs: object) -> None:
                self.done.append(what)
                raise AssertionError(what)

            return did

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(client.training, "train", spy("trained"))
            patch.setattr(client.examples, "load_records", spy("read the records"))
            yield

    @contextmanager
    def refuses(self, code: str) -> Iterator[dict[str, Any]]:
        """One task is refused inside; the fields of that line of the log are filled in at the end."""
        lines, before = self.site.audit.head().count, self._traces()
        fields: dict[str, Any] = {}
        with self.spies():
            yield fields
        events = [(e.event, e.fields) for e in self.site.audit.entries() if e.number > lines]
        assert {event for event, _ in events} <= {"refused", "task", "checkpoint"}
        (refused,) = [dict(found) for event, found in events if event == "refused"]
        assert refused["code"] == code
        assert self._traces() == before
        fields.update(refused)

    def _traces(self) -> list[Any]:
        state = self.hospital.folder / "state"
        folders = [
            sorted((state / name).iterdir()) for name in ("outbox", "approvals", "manifests")
        ]
        return [list(self.done), self.site.ledger.rows("notes"), *folders]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Watched:
    folder = tmp_path_factory.mktemp("hostile") / "north"
    return Watched(make_hospital(folder, tiny_model_dir, policy=POLICY, settings=SETTINGS))


@pytest.mark.parametrize("name", REFUSED)
def test_a_believed_coordinators_hostile_task_gets_a_code_and_nothing_else(
    watched: Watched, name: str
) -> None:
    attack, code = REFUSED[name]
    envelope = attack(watched.hospital)

    with watched.refuses(code) as logged:
        answer = watched.site.answer(envelope)

    content = from_canonical(answer.payload)
    assert (content["error_code"], content["numbers"], content["privacy"]) == (code, {}, None)
    assert answer.adapter == b""
    assert b"case" not in answer.payload.lower()
    assert logged["correlation_id"] == content["correlation_id"]
    assert logged["why"]


@pytest.mark.parametrize("name", UNANSWERED)
def test_what_nobody_vouches_for_is_not_answered_at_all(watched: Watched, name: str) -> None:
    attack, code = UNANSWERED[name]
    envelope = attack(watched.hospital)

    with watched.refuses(code) as logged:
        with pytest.raises((SignatureError, ProtocolError), match=r".") as caught:
            watched.site.answer(envelope)
        assert caught.value.code == code

    assert logged["why"] == str(caught.value)


def test_a_task_at_another_site_is_another_sites_task(
    tmp_path: Path, tiny_model_dir: Path, watched: Watched
) -> None:
    """The very bytes that north was sent, at a hospital that believes the same coordinator."""
    twin = make_hospital(tmp_path / "twin", tiny_model_dir)
    path, key = twin.folder / "site.toml", watched.hospital.coordinator.public_hex
    text = path.read_text().replace(twin.coordinator.public_hex, key)
    path.write_text(text.replace('name = "north"', 'name = "south"'))
    site = Site.open(twin.folder)

    with pytest.raises(ProtocolError, match="for site 'north', and this is 'south'"):
        site.answer(watched.hospital.seal(watched.hospital.task()))
    assert [entry.event for entry in site.audit.entries()] == ["refused"]
    assert site.ledger.rows("notes") == []


def test_every_refusal_is_in_a_log_that_holds(tmp_path: Path, tiny_model_dir: Path) -> None:
    """All of them at one site: nothing executed, each on record, and honest tasks still answered."""
    watched = Watched(
        make_hospital(tmp_path / "north", tiny_model_dir, policy=POLICY, settings=SETTINGS)
    )
    hospital, site = watched.hospital, watched.site
    attacks = [attack for attack, _ in (*REFUSED.values(), *UNANSWERED.values())]
    assert len(attacks) >= 50

    with watched.spies():
        for attack in attacks:
            with suppress(SignatureError, ProtocolError):
                site.answer(attack(hospital))

    assert watched.done == []
    assert site.ledger.rows("notes") == []
    refused = [entry for entry in site.audit.entries() if entry.event == "refused"]
    assert len(refused) == len(attacks)
    verified = verify_audit_log(site.audit.path, public_hex=site.public_key)
    assert verified.checkpoints >= len(attacks) // 32
    task = hospital.task()
    reply = open_reply(
        site.answer(hospital.seal(task)), task=task, site="north", public_hex=site.public_key
    )
    assert reply.error_code == ""


@pytest.mark.parametrize(
    "key", ["model.name", "privacy.unit", "data.prompt-template", "x" * 200_000]
)
def test_the_log_of_a_refusal_does_not_grow_with_what_was_asked(watched: Watched, key: str) -> None:
    """Whoever may sign tasks could fill the disk with the reasons that they were refused for."""
    task = watched.hospital.task(settings={key: "x" * 200_000})
    before = watched.site.audit.path.stat().st_size

    watched.site.answer(watched.hospital.seal(task))
    with pytest.raises(ProtocolError, match="for site 'xxx"):
        watched.site.answer(watched.hospital.seal(replace(task, site="x" * 200_000)))

    assert watched.site.audit.path.stat().st_size - before < 10_000


def test_an_approval_covers_the_plan_that_was_shown_and_no_step_more(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    """Three rounds of two steps were approved; the same key then asks for whatever else it can."""
    policy = {**POLICY, "approval": "ask", "max-epsilon": 1000.0}
    hospital = make_hospital(tmp_path / "north", tiny_model_dir, policy=policy, settings=SETTINGS)
    site = hospital.open()

    def code(server_round: int = 1, **changes: Any) -> str:
        answer = site.answer(hospital.seal(hospital.task(server_round, **changes)))
        return str(from_canonical(answer.payload)["error_code"])

    assert [code(), code(2), code()] == ["approval"] * 3
    assert site.ledger.rows("notes") == []
    site.approve("run-1")

    assert code(settings={"privacy.target-epsilon": 9.0}) == "policy"
    assert code(settings={"train.learning-rate": 1.0}) == "policy"
    assert [code(server_round) for server_round in (1, 2, 3)] == [""] * 3
    # Another adapter makes another task of the same round.
    other = replace(hospital, adapter=replace(hospital.adapter, pairs=_doubled(hospital)))
    task = other.task()
    answer = site.answer(other.seal(task))
    assert from_canonical(answer.payload)["error_code"] == "policy"
    assert sum(row.steps.steps for row in site.ledger.rows("notes")) == 6


def _doubled(hospital: Hospital) -> dict[str, LoraPair]:
    return {name: LoraPair(2 * pair.A, pair.B) for name, pair in hospital.adapter.pairs.items()}


def test_unchanged_the_task_that_the_attacks_begin_from_would_be_trained(watched: Watched) -> None:
    before, task = len(watched.site.ledger.rows("notes")), watched.hospital.task(run_uid="honest")

    with watched.spies():
        watched.site.answer(watched.hospital.seal(task))

    assert watched.done == ["read the records"]
    assert len(watched.site.ledger.rows("notes")) == before + 1
