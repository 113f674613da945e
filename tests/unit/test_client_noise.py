"""Noise comes from the operating system's entropy and has the right distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import client.noise
from client.noise import secure_normal


def test_noise_has_the_asked_mean_and_standard_deviation() -> None:
    noise = secure_normal(torch.Size([200, 500]), std=3.0)

    assert noise.shape == (200, 500)
    assert noise.dtype == torch.float64
    # 100,000 values: the mean's standard error is 0.0095, the deviation's 0.0067; six of each.
    assert abs(float(noise.mean())) < 0.06
    assert float(noise.std()) == pytest.approx(3.0, abs=0.045)
    # A normal's fourth moment is 3 sigma^4; a uniform's would be 1.8.
    assert float((noise**4).mean()) / 81 == pytest.approx(3.0, abs=0.15)


def test_torch_and_numpy_seeds_do_not_change_the_noise() -> None:
    def seeded() -> torch.Tensor:
        torch.manual_seed(7)
        np.random.seed(7)
        return secure_normal(torch.Size([64]), std=1.0)

    assert not torch.equal(seeded(), seeded())


def test_each_normal_takes_four_draws_of_fresh_entropy() -> None:
    taken: list[int] = []

    def entropy(size: int) -> bytes:
        taken.append(size)
        return bytes(size)

    secure_normal(torch.Size([10]), std=1.0, entropy=entropy)

    # Each draw: 5 pairs of two 64-bit integers.
    assert taken == [80, 80, 80, 80]


def test_the_extreme_bits_give_finite_noise() -> None:
    lowest = secure_normal(torch.Size([4]), std=1.0, entropy=bytes)
    highest = secure_normal(torch.Size([4]), std=1.0, entropy=lambda n: b"\xff" * n)

    assert bool(lowest.isfinite().all())
    assert bool(highest.isfinite().all())


def test_odd_shapes_and_scalars_are_filled() -> None:
    assert secure_normal(torch.Size([3, 1]), std=1.0).shape == (3, 1)
    assert secure_normal(torch.Size([]), std=1.0).shape == ()
    assert secure_normal(torch.Size([0, 5]), std=1.0).shape == (0, 5)


def test_default_entropy_is_the_operating_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    import inspect
    import os

    default = inspect.signature(client.noise.secure_normal).parameters["entropy"].default

    assert default is os.urandom
