"""Gaussian noise from the operating system's entropy, for differential privacy.

No seed, no stored state: whoever knows every seed of a run learns nothing about the noise. Each
normal is four draws summed and halved, which defends against attacks on floating-point Gaussians
(Holohan and Braghin 2107.10138, section 5.1; Mironov 2012), as Opacus's secure mode does it.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Entropy = Callable[[int], bytes]
_DRAWS = 4


def secure_normal(shape: torch.Size, *, std: float, entropy: Entropy = os.urandom) -> Tensor:
    """Return independent N(0, std^2) values of `shape`, float64, on the CPU.

    entropy: returns that many unpredictable bytes; a test may pass another, no configuration can.
    """
    count = int(np.prod(shape, dtype=np.int64))
    total = np.zeros(count)
    for _ in range(_DRAWS):
        total += _box_muller(count, entropy)
    return torch.from_numpy(total * (std / np.sqrt(_DRAWS))).reshape(shape)


def _box_muller(count: int, entropy: Entropy) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Return `count` standard normals (Box and Muller, 1958) from 53-bit uniforms."""
    pairs = (count + 1) // 2
    bits = np.frombuffer(entropy(16 * pairs), dtype=np.uint64) >> np.uint64(11)
    # (bits + 1) / 2^53 lies in (0, 1]: the logarithm below is finite.
    uniform = (bits.astype(np.float64) + 1.0) * 2.0**-53
    radius = np.sqrt(-2.0 * np.log(uniform[:pairs]))
    angle = 2.0 * np.pi * uniform[pairs:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
