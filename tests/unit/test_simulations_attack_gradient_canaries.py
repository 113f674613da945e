"""The white-box audit of the real step: what is as claimed passes, what is weakened is caught.

Noise and sampling are seeded here through `entropy`, so that each test sees the same training each time.
"""

from __future__ import annotations

import ast
import math
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

import client
import client.dp
from client.trainer import DpSettings, Step, train
from common.config import LoraSection, TrainSection
from common.lora import attached
from common.model import BaseModel
from common.privacy import GaussianSteps, calibrate_noise, compose_epsilon
from common.prompts import Examples
from simulations.attack.gradient_canaries import (
    GradientCanaries,
    Mechanism,
    rehearse,
    step_evidence,
)
from simulations.attack.guessing import Audit, audit_scores, rehearsed_rule
from tests.unit.tiny import make_examples, tiny_base

DELTA = 1e-5
CLIP = 0.5


def _wide_base() -> BaseModel:
    """A Llama with room for 32,768 canaries at rank 16."""
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.requires_grad_(False)
    return BaseModel(model.eval(), None, "wide", torch.device("cpu"))


def _audit(
    base: BaseModel,
    lora: LoraSection,
    canaries: int,
    *,
    noise: float | None,
    sample_rate: float = 1.0,
    steps: int = 1,
    seed: int = 0,
) -> Audit:
    """Train as the trainer does, with canaries beside four records, and audit it."""
    batch_size = 8
    settings = TrainSection(
        rounds=1, local_steps=steps, batch_size=batch_size, micro_batch_size=4, warmup_ratio=0.0
    )
    mechanism = Mechanism(noise, CLIP, sample_rate, batch_size, steps)
    entropy = random.Random(seed).randbytes
    watched = GradientCanaries(canaries, mechanism, seed=seed, entropy=entropy)
    with attached(base, lora) as model:
        train(
            model,
            Examples(make_examples(4, lengths=(9, 14))),
            settings=settings,
            server_round=1,
            stream="site",
            pad_id=0,
            device=base.device,
            dp=None if noise is None else DpSettings(noise, CLIP, sample_rate),
            entropy=entropy,
            around=watched.around,
        )
    claimed = None
    if noise is not None:
        claimed = compose_epsilon([GaussianSteps(noise, sample_rate, steps)], delta=DELTA)
    rule = rehearsed_rule(
        lambda rng: rehearse(rng, canaries=canaries, mechanism=mechanism),
        delta=DELTA,
        confidence=0.95,
        seed=seed,
    ).rule
    return audit_scores(
        "audit", watched.scores, watched.coins, rules=[rule], delta=DELTA, ledger_epsilon=claimed
    )


LORA = LoraSection(rank=4, alpha=8.0)
WIDE = LoraSection(rank=16, alpha=32.0)


def _noise_for(epsilon: float) -> float:
    return calibrate_noise(target_epsilon=epsilon, delta=DELTA, sample_rate=1.0, steps=1)


def test_epsilon_of_one_stays_at_or_below_its_ledger_and_halved_noise_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, noise = _wide_base(), _noise_for(1.0)
    honest = _audit(base, WIDE, 32_768, noise=noise)

    real = client.dp.add_secure_normal
    monkeypatch.setattr(
        client.dp,
        "add_secure_normal",
        lambda target, *, std, entropy: real(target, std=std / 2, entropy=entropy),
    )
    halved = _audit(base, WIDE, 32_768, noise=noise)

    assert honest.ledger_epsilon_at_delta == pytest.approx(1.0, abs=0.02)
    assert 0 < honest.epsilon_lower <= 1.0
    assert not honest.exceeds_ledger
    assert halved.exceeds_ledger


def test_removed_clipping_is_caught_at_epsilon_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def add_sum(total: Tensor, rows: Tensor, *, sizes: Sequence[int], max_grad_norm: float) -> None:
        total += rows.sum(dim=0)

    monkeypatch.setattr(client.dp, "add_clipped_sum", add_sum)
    audit = _audit(tiny_base("llama"), LORA, 2000, noise=_noise_for(1.0))
    assert audit.exceeds_ledger
    assert audit.correct == audit.guesses


def test_without_protection_the_bound_is_above_zero() -> None:
    audit = _audit(tiny_base("llama"), LORA, 2000, noise=None, sample_rate=0.1, steps=4)
    assert audit.ledger_epsilon_at_delta is None
    assert audit.epsilon_lower > 3


@pytest.mark.parametrize("seed", range(3))
def test_sampled_steps_stay_at_or_below_their_ledger(seed: int) -> None:
    audit = _audit(tiny_base("llama"), LORA, 4000, noise=0.6, sample_rate=0.1, steps=12, seed=seed)
    assert audit.ledger_epsilon_at_delta is not None
    assert 1 < audit.epsilon_lower <= audit.ledger_epsilon_at_delta


def test_a_canary_that_joins_moves_its_own_score_and_no_others() -> None:
    """Clipped from 10 C, each adds exactly C along its direction, and nothing along another's."""
    base = tiny_base("llama")
    mechanism = Mechanism(1e-9, CLIP, 1.0, 8, 1)
    watched = GradientCanaries(500, mechanism, seed=3, entropy=random.Random(0).randbytes)
    seen: list[np.ndarray] = []

    def note(seen_now: np.ndarray, _: Mechanism) -> np.ndarray:
        seen.append(seen_now)
        return seen_now

    with attached(base, LORA) as model, pytest.MonkeyPatch.context() as patch:
        patch.setattr("simulations.attack.gradient_canaries.step_evidence", note)
        train(
            model, Examples(make_examples(1, lengths=(9,), num_answer=0)),
            settings=TrainSection(rounds=1, local_steps=1, batch_size=8, micro_batch_size=4),
            server_round=1, stream="site", pad_id=0, device=base.device,
            dp=DpSettings(1e-9, CLIP, 1.0), entropy=random.Random(0).randbytes,
            around=watched.around,
        )  # fmt: skip

    (products,) = seen
    np.testing.assert_allclose(products, watched.coins.astype(float), atol=1e-4)
    assert 200 < watched.coins.sum() < 300


def test_canaries_join_every_round_where_the_factors_take_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A ledger counts the steps on either factor; an audit of one alone sees half as much."""
    base, seen = tiny_base("llama"), []
    watched = GradientCanaries(
        500, Mechanism(1e-9, CLIP, 1.0, 8, 3), seed=3, entropy=random.Random(0).randbytes
    )

    def note(seen_now: np.ndarray, _: Mechanism) -> np.ndarray:
        seen.append(seen_now)
        return seen_now

    monkeypatch.setattr("simulations.attack.gradient_canaries.step_evidence", note)
    for server_round, factors in enumerate(("b", "a", "b"), start=1):
        with attached(base, LORA, trained_factors=factors) as model:
            train(
                model, Examples(make_examples(1, lengths=(9,), num_answer=0)),
                settings=TrainSection(rounds=3, local_steps=1, batch_size=8, micro_batch_size=4),
                server_round=server_round, stream="site", pad_id=0, device=base.device,
                dp=DpSettings(1e-9, CLIP, 1.0), entropy=random.Random(0).randbytes,
                around=watched.around,
            )  # fmt: skip
    assert len(seen) == 3
    for products in seen:
        np.testing.assert_allclose(products, watched.coins.astype(float), atol=1e-4)


def test_evidence_by_hand() -> None:
    """q = 1, sigma = 1, x = 1.5: the ratio of N(1, 1) to N(0, 1) is e^(1.5 - 0.5)."""
    always = Mechanism(1.0, CLIP, 1.0, 8, 1)
    assert step_evidence(np.array([1.5]), always) == pytest.approx(1.0)
    sometimes = Mechanism(1.0, CLIP, 0.25, 8, 1)
    expected = math.log(0.75 + 0.25 * math.e)
    assert step_evidence(np.array([1.5]), sometimes) == pytest.approx(expected)


def test_more_canaries_than_weights_are_refused() -> None:
    base = tiny_base("llama")
    watched = GradientCanaries(
        10_000, Mechanism(1.0, CLIP, 1.0, 8, 1), seed=0, entropy=random.Random(0).randbytes
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    with attached(base, LORA) as model, pytest.raises(ValueError, match="4096; ask for fewer"):
        watched.around(_NoStep(), model, optimizer)


class _NoStep:
    def backward(self, loss: Tensor, *, sizes: Sequence[int]) -> None:
        raise AssertionError

    def finish(self) -> None:
        raise AssertionError


def test_the_trainer_steps_through_what_stands_around_its_step() -> None:
    base, calls = tiny_base("llama"), []

    class Spy(_NoStep):
        def __init__(self, step: Step) -> None:
            self._step = step

        def backward(self, loss: Tensor, *, sizes: Sequence[int]) -> None:
            calls.append(list(sizes))
            self._step.backward(loss, sizes=sizes)

        def finish(self) -> None:
            calls.append("finish")
            self._step.finish()

    def around(step: Step, model: nn.Module, optimizer: Optimizer) -> Step:
        return Spy(step)

    with attached(base, LORA) as model:
        train(
            model, Examples(make_examples(4, lengths=(9,))),
            settings=TrainSection(rounds=1, local_steps=2, batch_size=4, micro_batch_size=2),
            server_round=1, stream="site", pad_id=0, device=base.device, dp=None, around=around,
        )  # fmt: skip
    assert calls == [[1, 1], [1, 1], "finish"] * 2


def test_no_site_passes_anything_to_stand_around_its_step() -> None:
    """The seam is the simulation's: nothing in a hospital's code hands one on."""
    passed = [
        path.name
        for path in Path(client.__file__).parent.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and any(word.arg == "around" for word in node.keywords)
    ]
    assert passed == []


def test_a_rehearsal_throws_coins_of_its_own() -> None:
    """A rule that was chosen by the real coins would have looked at what it guesses."""
    mechanism = Mechanism(1.0, CLIP, 1.0, 8, 1)
    real = GradientCanaries(200, mechanism, seed=5, entropy=random.Random(0).randbytes).coins
    agreement: list[float] = []

    def rehearsal(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        scores, coins = rehearse(generator, canaries=200, mechanism=mechanism)
        agreement.append(float((coins == real).mean()))
        return scores, coins

    rehearsed_rule(rehearsal, delta=DELTA, confidence=0.95, seed=5)
    assert len(agreement) == 4
    assert all(0.3 < share < 0.7 for share in agreement)
