"""Noise comes from the operating system's entropy and has the right distribution."""

from __future__ import annotations

import inspect
import os
import random

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

import client.noise
from client.noise import add_secure_normal, secure_normal, standard_normals


def test_noise_has_the_asked_mean_and_standard_deviation() -> None:
    noise = secure_normal(100_000, std=3.0)

    assert noise.shape == (100_000,)
    assert noise.dtype == torch.float64
    # 100,000 values: the mean's standard error is 0.0095, the deviation's 0.0067; six of each.
    assert abs(float(noise.mean())) < 0.06
    assert float(noise.std()) == pytest.approx(3.0, abs=0.045)
    # A normal's fourth moment is 3 sigma^4, a uniform's would be 1.8: standard error 0.031, and a skew.
    assert float((noise**4).mean()) / 81 == pytest.approx(3.0, abs=0.22)


def test_values_are_independent_of_their_neighbours_and_of_their_twins() -> None:
    """Cosine and sine of one angle stand half the length apart."""
    noise = secure_normal(100_000, std=1.0)

    for first, second in (
        (noise[:-1], noise[1:]),
        (noise[:50_000], noise[50_000:]),
        (noise[:50_000] ** 2, noise[50_000:] ** 2),
    ):
        # Standard error at most 0.0045; seven of them.
        assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.0315


def test_torch_and_numpy_seeds_do_not_change_the_noise() -> None:
    def seeded() -> torch.Tensor:
        torch.manual_seed(7)
        np.random.seed(7)
        return secure_normal(64, std=1.0)

    assert not torch.equal(seeded(), seeded())
    for function in (secure_normal, add_secure_normal):
        assert inspect.signature(function).parameters["entropy"].default is os.urandom


def test_each_normal_is_four_draws_of_a_keystream_under_a_fresh_key() -> None:
    asked: list[int] = []

    def entropy(size: int) -> bytes:
        asked.append(size)
        return bytes(range(size))

    noise = secure_normal(10, std=3.0, entropy=entropy)

    # One key of 256 bits. 10 values are 5 pairs of 64-bit integers, four times over.
    assert asked == [32]
    stream = Cipher(algorithms.ChaCha20(bytes(range(32)), bytes(16)), mode=None).encryptor()
    bits = torch.frombuffer(bytearray(stream.update(bytes(8 * 2 * 4 * 5))), dtype=torch.int64)
    draws = standard_normals(bits.view(2, 4, 5))
    torch.testing.assert_close(noise, 3.0 * draws.sum(dim=1).flatten() / 2)


def test_box_muller_by_hand() -> None:
    # Upper 53 bits to (0, 1]: 0 is a half, 2^62 - 2^11 is three quarters, the lowest is 2^-53.
    bits = torch.tensor([[0, -(2**63)], [2**62 - 2**11, 2**63 - 1]])

    normals = standard_normals(bits)

    # Angle 3/4 of a turn: cosine 0, sine -1. A whole turn: 1 and 0.
    radius = [(2 * np.log(2)) ** 0.5, (2 * 53 * np.log(2)) ** 0.5]
    expected = torch.tensor([[0.0, radius[1]], [-radius[0], 0.0]], dtype=torch.float64)
    torch.testing.assert_close(normals, expected, atol=1e-12, rtol=0)


def test_the_extreme_bits_give_finite_noise() -> None:
    extremes = torch.tensor([-(2**63), -1, 0, 1, 2**63 - 1])
    bits = torch.cartesian_prod(extremes, extremes).T

    assert bool(standard_normals(bits).isfinite().all())


@pytest.mark.parametrize("count", [1, 2, 3, 1000])
def test_every_value_gets_noise_of_its_own(count: int) -> None:
    noise = secure_normal(count, std=1.0)

    assert len(set(noise.tolist())) == count


def test_noise_is_added_in_blocks_each_under_a_key_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client.noise, "_BLOCK", 4)
    draw, asked = random.Random(0), []

    def entropy(size: int) -> bytes:
        asked.append(size)
        return draw.randbytes(size)

    # Of float64: in float32 two of ten values around 100 are the same once in some thousand draws.
    target = torch.full((5, 2), 100.0, dtype=torch.float64)
    add_secure_normal(target, std=0.5, entropy=entropy)

    assert asked == [32, 32, 32]
    # Ten values around 100, none of them as it was.
    assert len(set(target.flatten().tolist())) == 10
    assert bool(((target - 100).abs() < 4).all())
    assert bool((target != 100).all())
