"""A site's rounds in which one factor is trained, or ranks come along that are not."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import client.training
from client.ledger import Ledger
from common.adapter import AdapterShape, AdapterState, LoraPair, from_safetensors
from common.config import RunConfig, Scalar, TrainedFactors
from common.frozen_part import split_adapter
from common.records import Envelope, Reply, Task, open_reply
from common.signing import SigningKey
from tests.unit.hospital import Hospital, make_hospital

UNPROTECTED = {"require-dp": False, "max-epsilon": math.inf}


@pytest.fixture
def hospital(tmp_path: Path, tiny_model_dir: Path) -> Hospital:
    return _lively(make_hospital(tmp_path / "north", tiny_model_dir))


def _lively(hospital: Hospital) -> Hospital:
    """Its adapter has a B that is not zero, without which A has no gradient."""
    return replace(hospital, adapter=_random(hospital.adapter, rank=hospital.adapter.rank))


def _random(like: AdapterState, *, rank: int, size: float = 0.1) -> AdapterState:
    random = np.random.default_rng(rank)
    pairs = {
        name: LoraPair(
            (size * random.standard_normal((rank, pair.A.shape[1]))).astype(np.float32),
            (size * random.standard_normal((pair.B.shape[0], rank))).astype(np.float32),
        )
        for name, pair in like.pairs.items()
    }
    return AdapterState(pairs, like.scaling, like.own_scalings)


def _ask(hospital: Hospital, task: Task) -> tuple[Reply, Envelope]:
    answer = hospital.open().answer(hospital.seal(task))
    public = SigningKey.load(hospital.folder / "keys" / "signing.pem").public_hex
    return open_reply(answer, task=task, site="north", public_hex=public), answer


def _trained(hospital: Hospital, settings: dict[str, Scalar]) -> tuple[Reply, AdapterState]:
    reply, answer = _ask(hospital, hospital.task(settings=settings))
    assert reply.error_code == ""
    state = hospital.adapter
    shape = AdapterShape(
        {name: (pair.B.shape[0], pair.A.shape[1]) for name, pair in state.pairs.items()},
        hospital.config.lora.rank,
        state.scaling,
    )
    return reply, from_safetensors(answer.adapter, shape=shape)


@pytest.mark.parametrize("unit", ["none", "record", "patient"])
@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
@pytest.mark.parametrize("factors", ["a", "b"])
def test_a_reply_carries_both_factors_and_the_one_that_was_not_trained_as_it_came(
    tmp_path: Path,
    tiny_model_dir: Path,
    factors: TrainedFactors,
    quantization: str,
    unit: str,
) -> None:
    made = make_hospital(
        tmp_path / "north", tiny_model_dir, policy=UNPROTECTED,
        data={"unit": "patient" if unit == "patient" else "record", "patient-id": "instruction"},
    )  # fmt: skip
    hospital = _lively(made)
    settings: dict[str, Scalar] = {
        "round.trained-factors": factors,
        "model.quantization": quantization,
        "privacy.unit": unit,
    }

    _, after = _trained(hospital, settings)

    for name, pair in hospital.adapter.pairs.items():
        moved = {"a": after.pairs[name].A != pair.A, "b": after.pairs[name].B != pair.B}
        assert moved.pop(factors).any()
        assert not any(other.any() for other in moved.values())


@pytest.mark.parametrize("factors", ["a", "b"])
def test_training_one_factor_costs_the_privacy_of_training_both(
    tmp_path: Path, tiny_model_dir: Path, factors: TrainedFactors
) -> None:
    replies = [
        _trained(
            _lively(make_hospital(tmp_path / name, tiny_model_dir)), {"round.trained-factors": name}
        )[0]
        for name in ("both", factors)
    ]
    assert replies[0].privacy == replies[1].privacy is not None


@pytest.mark.parametrize("trained_anew", [True, False])
def test_a_factor_that_nobody_trains_and_that_changed_does_not_leave(
    hospital: Hospital, monkeypatch: pytest.MonkeyPatch, trained_anew: bool
) -> None:
    """By a bug in what trains, or by a file that was exchanged in the outbox."""
    task = hospital.task(settings={"round.trained-factors": "b"})
    kept = hospital.folder / "state" / "outbox" / task.task_id / "adapter.safetensors"
    if trained_anew:
        real = client.training.train

        def leaking(model, *args, **options):  # type: ignore[no-untyped-def]
            result = real(model, *args, **options)
            for name, parameter in model.named_parameters():
                if name.endswith("layers.0.self_attn.q_proj.lora_A.default.weight"):
                    parameter.data[0, 0] += 1
            return result

        monkeypatch.setattr(client.training, "train", leaking)
    else:
        _, answer = _ask(hospital, task)
        data = bytearray(answer.adapter)
        # The first tensor in the file is a lora_A.
        start = 8 + int.from_bytes(data[:8], "little")
        data[start] ^= 1
        kept.write_bytes(data)

    reply, answer = _ask(hospital, task)

    assert (reply.error_code, bytes(answer.adapter)) == ("egress", b"")
    # What training leaked is not even kept.
    assert trained_anew == (not kept.exists() or kept.read_bytes() == b"")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("frozen_rank", [1, 30])
@pytest.mark.parametrize("unit", ["record", "none"])
def test_frozen_ranks_come_along_and_those_that_are_trained_go_back(
    tmp_path: Path, tiny_model_dir: Path, unit: str, frozen_rank: int, checkpointing: bool
) -> None:
    """2 + 30 ranks is the smaller side of most layers and twice that of some."""
    made = make_hospital(tmp_path / "north", tiny_model_dir, policy=UNPROTECTED)
    hospital = replace(made, adapter=_random(made.adapter, rank=2 + frozen_rank))
    settings: dict[str, Scalar] = {
        "round.frozen-rank": frozen_rank,
        "privacy.unit": unit,
        "train.gradient-checkpointing": checkpointing,
    }

    _, after = _trained(hospital, settings)

    leading, _ = split_adapter(hospital.adapter, rank=2)
    assert after.rank == 2
    assert all((after.pairs[name].B != pair.B).any() for name, pair in leading.pairs.items())
    # Two steps at a learning rate of 2e-3 of AdamW.
    for name, pair in leading.pairs.items():
        np.testing.assert_allclose(after.pairs[name].A, pair.A, atol=0.01)


def test_frozen_ranks_are_part_of_the_model_that_is_trained(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    """Without noise: what is trained depends on them, and not on how their product is split."""
    settings: dict[str, Scalar] = {"round.frozen-rank": 3, "privacy.unit": "none"}

    def outcome(name: str, frozen_size: float, split: float) -> AdapterState:
        made = make_hospital(tmp_path / name, tiny_model_dir, policy=UNPROTECTED)
        first = _random(made.adapter, rank=2)
        frozen = _random(made.adapter, rank=3, size=frozen_size)
        pairs = {
            n: LoraPair(
                np.concatenate([first.pairs[n].A, split * frozen.pairs[n].A]).astype(np.float32),
                np.concatenate(
                    [first.pairs[n].B, frozen.pairs[n].B / split], axis=1, dtype=np.float32
                ),
            )
            for n in first.pairs
        }
        whole = AdapterState(pairs, first.scaling)
        return _trained(replace(made, adapter=whole), settings)[1]

    nothing, something, resplit = (
        outcome("zero", 0.0, 1.0), outcome("one", 0.3, 1.0), outcome("two", 0.3, 4.0),
    )  # fmt: skip
    difference = max(
        float(np.abs(pair.B - nothing.pairs[name].B).max())
        for name, pair in something.pairs.items()
    )
    assert difference > 1e-4
    for name, pair in something.pairs.items():
        np.testing.assert_allclose(resplit.pairs[name].B, pair.B, atol=1e-5)


def test_an_adapter_without_the_frozen_ranks_that_the_task_names_is_refused(
    hospital: Hospital,
) -> None:
    reply, _ = _ask(hospital, hospital.task(settings={"round.frozen-rank": 1}))
    assert reply.error_code == "shape"
    wide = replace(hospital, adapter=_random(hospital.adapter, rank=3))
    assert _ask(wide, wide.task())[0].error_code == "shape"
    assert Ledger(hospital.folder / "state" / "ledger.sqlite").rows("notes") == []


def test_the_agent_takes_an_adapter_as_long_as_with_its_frozen_ranks(hospital: Hospital) -> None:
    site, key = hospital.open(), hospital.coordinator.public_hex
    wide = _random(hospital.adapter, rank=2 + 40).to_safetensors()

    assert site.adapter_limit(hospital.task(), key) < len(wide)
    task = hospital.task(settings={"round.frozen-rank": 40})
    assert site.adapter_limit(task, key) >= len(wide)


def test_frozen_ranks_above_the_sites_highest_are_refused_before_anything(
    hospital: Hospital,
) -> None:
    task = hospital.task(settings={"round.frozen-rank": 63})

    assert _ask(hospital, task)[0].error_code == "policy"
    (line,) = [e for e in hospital.open().audit.entries() if e.event == "refused"]
    assert line.fields["why"] == (
        "policy.max-rank = 64: the task asks for lora.rank 2 and round.frozen-rank 63 beside it"
    )


def test_of_few_patients_the_noise_is_reckoned_on_what_is_trained(
    tmp_path: Path, tiny_model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = make_hospital(
        tmp_path / "p", tiny_model_dir, data={"unit": "patient", "patient-id": "instruction"},
    )  # fmt: skip
    hospital = replace(made, adapter=_random(made.adapter, rank=2 + 3))
    settings: dict[str, Scalar] = {
        "round.trained-factors": "b",
        "round.frozen-rank": 3,
        "privacy.unit": "patient",
        "privacy.noise-multiplier": 2.0,
    }
    with caplog.at_level(logging.WARNING):
        _trained(hospital, settings)

    (found,) = [r.getMessage() for r in caplog.records if r.name == "client.training"]
    size = sum(2 * pair.B.shape[0] for pair in hospital.adapter.pairs.values())
    # 4 of 12 patients expected, beside noise in each coordinate of B at rank 2.
    assert f"{4 / (2 * size**0.5):.2g} of its noise" in found


def test_a_dry_run_needs_neither(hospital: Hospital) -> None:
    run = RunConfig.parse({**hospital.config.flat(), "round.trained-factors": "b"})

    dry = hospital.open().dry_run(run, on_step=lambda step: None)

    assert dry.manifest.adapter_bytes == len(hospital.adapter.to_safetensors())
    assert dry.cost.bytes_up == 3 * dry.manifest.adapter_bytes
