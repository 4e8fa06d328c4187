"""Keypoints of masked transport: expert pairs (s_k, a_k) that are matched with each other, and guide all other pairs.

The mask forbids every pair of a keypoint with anything but its partner (Gu et al. 2022, KPG-RL). The guide g(s, a) is
small where s relates to the keypoints' states as a relates to their chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor


def relation(points: Tensor, keypoints: Tensor, unit: Tensor, temperature: float) -> Tensor:
    """R_k(x) = softmax_k(-d(x, x_k) / temperature), d the squared distance in units of `unit`; (..., D) to (..., K)."""
    return (-torch.cdist(points, keypoints).square() / (unit * temperature)).softmax(-1)


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """KL(p | m) / 2 + KL(q | m) / 2 with m = (p + q) / 2, of distributions (..., K): (...), in [0, log 2]."""
    m = (p + q) / 2
    inner = (torch.xlogy(p, p) + torch.xlogy(q, q)) / 2 - torch.xlogy(m, m)
    return inner.sum(-1).clamp_min(0)


class Keypoints:
    """K fixed expert pairs and the guide that they give."""

    def __init__(self, observations: Tensor, chunks: Tensor, temperature: float) -> None:
        """Keep the pairs; the unit of each distance is the largest between two keypoints (KPG-RL: between two samples).

        Args:
            observations: (K, O).
            chunks: (K, H, A).
            temperature: of both softmaxes, positive; 0.1 in KPG-RL and OTCS.
        """
        self.observations, self.chunks, self.temperature = observations, chunks, temperature
        self.flat = chunks.flatten(1)  # (K, H * A)
        self.units = [torch.cdist(x, x).square().max().clamp_min(1e-12) for x in (observations, self.flat)]

    def __len__(self) -> int:
        return len(self.observations)

    def guide(self, observations: Tensor, chunks: Tensor) -> Tensor:
        """g(s, a) = JS(R(s) | R(a)) of S chunks (B, S, H, A) at each of (B, O) observations: (B, S), in [0, log 2]."""
        return jensen_shannon(self.state_relation(observations)[:, None], self.chunk_relation(chunks))

    def state_relation(self, observations: Tensor) -> Tensor:
        """R(s) of observations (..., O), (..., K)."""
        return relation(observations, self.observations, self.units[0], self.temperature)

    def chunk_relation(self, chunks: Tensor) -> Tensor:
        """R(a) of chunks (..., H, A), (..., K)."""
        return relation(chunks.flatten(-2), self.flat, self.units[1], self.temperature)
