"""Random streams: each a generator seeded by a hash of what it is for, never of the method.

All methods of a comparison therefore see the same initial policy, environment resets and evaluation episodes (common
random numbers). Nothing seeds a global generator.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

BASE_SEED = 0  # of every committed result
TUNING_SEED = 1000  # this and up are for tuning, never reported with others


def derive_seed(*parts: str | int) -> int:
    """A seed in [0, 2^62) from the SHA-256 of `parts`, e.g. (base seed, task, seed index, stream name)."""
    text = "\0".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2


@dataclass(frozen=True)
class Streams:
    """The streams of one run, named by what they feed."""

    base_seed: int
    task: str
    seed: int

    def torch(self, name: str, device: str | torch.device = "cpu") -> torch.Generator:
        """A PyTorch generator on `device`."""
        return torch.Generator(device).manual_seed(derive_seed(self.base_seed, self.task, self.seed, name))

    def episodes(self, name: str, indices: NDArray[np.int64], numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Reset seeds of the `numbers`-th episodes of environments `indices`, both (n,): (n,) int64, non-negative."""
        seeds = [
            derive_seed(self.base_seed, self.task, self.seed, name, int(i), int(k))
            for i, k in zip(indices, numbers, strict=True)
        ]
        return np.array(seeds, dtype=np.int64)
