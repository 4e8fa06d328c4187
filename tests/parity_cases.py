"""The parity fixtures: inputs and outputs of DPPO's reference implementation (irom-princeton/dppo at cc7234a)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmark.dppo_files import dppo_network_state
from otpr.denoisers import DenoisingMLP
from otpr.diffusion import DiffusionPolicy

FOLDER = Path(__file__).parent / "parity"
CHAIN: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}  # sampling chains
EXACT: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}  # everything else


@dataclass(frozen=True)
class Case:
    """One fixture folder and the network sizes it was made with."""

    name: str
    observation_dim: int
    action_dim: int
    activation: str
    cond_mlp_dims: tuple[int, ...]
    clip_base: float

    def arrays(self, file: str) -> dict[str, Tensor]:
        """The arrays of one npz file as tensors; observations lose their time axis of length one."""
        with np.load(FOLDER / self.name / f"{file}.npz", allow_pickle=False) as archive:
            tensors = {key: torch.as_tensor(archive[key]) for key in archive.files}
        return {key: value[:, 0] if key in ("obs", "next_obs") else value for key, value in tensors.items()}

    def network(self) -> DenoisingMLP:
        """A freshly initialised network of this case's sizes."""
        return DenoisingMLP(
            self.observation_dim,
            self.action_dim,
            4,
            torch.Generator().manual_seed(0),
            hidden_dims=(64, 64, 64),
            activation_name=self.activation,
            cond_mlp_dims=self.cond_mlp_dims,
        )

    def policy(self) -> DiffusionPolicy:
        """The pre-trained policy of the case."""
        policy = DiffusionPolicy(self.network())
        policy.network.load_state_dict(dppo_network_state(FOLDER / self.name / "state_200.pt", "ema"))
        return policy


CASES = [
    Case("hopper_like", 11, 3, "relu", (), 0.01),
    Case("square_like", 23, 7, "mish", (32, 16), 0.001),
]
