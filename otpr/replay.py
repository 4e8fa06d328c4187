"""Replay buffer of chunk transitions, one ring in one tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from otpr.method import Rollout

TimeLimit = Literal["bootstrap", "terminal"]
TIME_LIMITS = ("bootstrap", "terminal")


@dataclass
class Batch:
    """Transitions, float32 but for their places.

    Attributes:
        observations, next_observations: (B, O).
        actions: (B, H, A).
        rewards: (B,), scaled.
        terminated: (B,), 1 where what follows has no value, else 0.
        places: (B,) int64, where in the storage order each was.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    terminated: Tensor
    next_observations: Tensor
    places: Tensor


class Replay:
    """A ring buffer; the oldest transition is overwritten first.

    A transition is one row of one (capacity, 2 O + H A + 2) float32 tensor, so that a sample costs one gather.
    Memory is committed by the operating system only as it fills (CPU).
    """

    def __init__(
        self, capacity: int, observation_dim: int, chunk_shape: tuple[int, int], device: torch.device | str
    ) -> None:
        """Raises ValueError when `capacity` is not positive."""
        if capacity < 1:
            raise ValueError(f"capacity must be positive, got {capacity}")
        self.capacity, self.observation_dim, self.chunk_shape = capacity, observation_dim, chunk_shape
        chunk_dim = chunk_shape[0] * chunk_shape[1]
        self.widths = [observation_dim, chunk_dim, 1, 1, observation_dim]
        self.rows = torch.empty(capacity, sum(self.widths), device=device)
        self.added = 0  # transitions ever written

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    @torch.no_grad()
    def add(self, rollout: Rollout, reward_scale: float, time_limit: TimeLimit = "bootstrap") -> None:
        """Append all T * N transitions of `rollout`, in time order; of more than `capacity` the newest stay.

        Args:
            rollout: one iteration of experience.
            reward_scale: factor on the rewards.
            time_limit: "bootstrap": what follows a truncation keeps its value; "terminal": it counts as terminated.
        """
        ended = rollout.terminated | rollout.truncated if time_limit == "terminal" else rollout.terminated
        columns = (
            rollout.observations,
            rollout.actions.flatten(2),
            rollout.rewards[..., None] * reward_scale,
            ended[..., None].float(),
            rollout.next_observations,
        )
        rows = torch.cat(columns, dim=-1).flatten(0, 1)  # (T * N, width)
        skipped = max(len(rows) - self.capacity, 0)
        places = torch.arange(self.added + skipped, self.added + len(rows), device=self.rows.device)
        self.rows[places % self.capacity] = rows[skipped:].to(self.rows.device)
        self.added += len(rows)

    def sample(self, batch_size: int, generator: torch.Generator) -> Batch:
        """A uniform sample with replacement of `batch_size` transitions; the tensors are views of one gathered block.

        Raises:
            ValueError: the buffer is empty.
        """
        if not len(self):
            raise ValueError("cannot sample from an empty replay buffer")
        picks = torch.randint(len(self), (batch_size,), generator=generator, device=self.rows.device)
        return self._split(self.rows.index_select(0, picks), picks)  # on the CPU a copy of whole rows

    def contents(self) -> Batch:
        """Views of all stored transitions, in storage order."""
        return self._split(self.rows[: len(self)], torch.arange(len(self), device=self.rows.device))

    def _split(self, rows: Tensor, places: Tensor) -> Batch:
        observations, actions, rewards, terminated, following = rows.split(self.widths, dim=1)
        chunks = actions.unflatten(1, self.chunk_shape)
        return Batch(observations, chunks, rewards[:, 0], terminated[:, 0], following, places)

    def state_dict(self) -> dict[str, Any]:
        """The filled part (a copy unless the buffer is full) and the count."""
        filled = self.rows if len(self) == self.capacity else self.rows[: len(self)].clone()
        return {"rows": filled, "added": self.added}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict` of a buffer of the same capacity and shapes.

        Raises:
            ValueError: the stored part does not fit this buffer.
        """
        rows, added = state["rows"], state["added"]
        if tuple(rows.shape) != (min(added, self.capacity), self.rows.shape[1]):
            raise ValueError(
                f"replay of {added} transitions stored as {tuple(rows.shape)} does not fit "
                f"capacity {self.capacity} and width {self.rows.shape[1]}"
            )
        self.rows[: len(rows)] = rows.to(self.rows.device)
        self.added = added
