"""What the harness asks of a method, and the data that passes between the two.

Shapes: ``N`` environments, ``T`` chunks per iteration, ``H`` actions per chunk (the action horizon), ``A`` action
dimensions, ``O`` observation dimensions. Observations and actions are normalised per dimension to about [-1, 1] by the
task's statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class TaskShape:
    """The sizes that a method needs to build its networks and buffers."""

    observation_dim: int
    action_dim: int
    action_horizon: int
    n_envs: int
    n_steps: int  # chunks per environment and iteration
    reset_at_iteration: bool = False  # every iteration starts with new episodes


@dataclass(frozen=True)
class Demonstrations:
    """Chunks of the best episodes of a task's data, for methods that go on using it while they fine-tune.

    Attributes:
        observations: (M, O) float32, normalised.
        actions: (M, H, A) float32, normalised.
        ranks: (M,) float32 in (0, 1): the share of the data's episodes that are no worse than this chunk's.
    """

    observations: Tensor
    actions: Tensor
    ranks: Tensor

    def best(self, share: float) -> Demonstrations:
        """Those of the best `share` of all episodes.

        Raises:
            ValueError: episodes of a share that is not held, or too small to have a chunk.
        """
        kept = self.ranks <= share
        largest = float(self.ranks.max())
        if share > largest + 0.01 or not kept.any():
            raise ValueError(
                f"expert_share must be at most {largest:.2f}, the share held, and have a chunk, got {share}"
            )
        return Demonstrations(self.observations[kept], self.actions[kept], self.ranks[kept])


@dataclass
class ActionChunk:
    """Actions to execute, and what the method wants back with the rollout.

    Attributes:
        actions: (N, H, A) float32; what lies outside [-1, 1] is clipped before it is executed.
        extras: tensors whose first dimension is N, e.g. the denoising chain of DPPO.
    """

    actions: Tensor
    extras: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Rollout:
    """One iteration of experience.

    Attributes:
        observations: (T, N, O) float32, what the policy saw.
        actions: (T, N, H, A) float32, the chunks as sampled: exploration noise may leave [-1, 1], what is executed is
            clipped, and for the method that clipping is part of the environment, as in DPPO's replay.
        rewards: (T, N) float32, undiscounted sum over the executed steps of the chunk, in the task's own units.
        terminated: (T, N) bool, the episode ended for good: the value of what follows is zero.
        truncated: (T, N) bool, a time limit cut the episode: what follows still has a value.
        next_observations: (T, N, O) float32; where the episode ended, its own final observation, never the next one's.
        extras: (T, N, ...) what `ActionChunk.extras` held.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    terminated: Tensor
    truncated: Tensor
    next_observations: Tensor
    extras: dict[str, Tensor] = field(default_factory=dict)


Rule = Callable[[Tensor, torch.Generator], ActionChunk]  # observations (N, O), generator -> chunks


class Method(Protocol):
    """A fine-tuning method. Constructed as ``Method(settings, policy, shape, generator)``.

    Settings with a true ``uses_demonstrations`` add a fifth argument, `Demonstrations`. An attribute ``idle`` of theirs
    maps the settings that change nothing beside the others to the reason; asking for one of those is refused.

    `generator` drives network initialisation and every draw inside `update`; `act` draws from the generator that it is
    given alone, so that evaluation and exploration stay independent streams.
    """

    gradient_steps: int

    def act(self, observations: Tensor, explore: bool, generator: torch.Generator) -> ActionChunk:
        """Choose chunks for `observations` (N, O); `explore` is true while collecting and false in evaluation."""
        ...

    def other_rules(self) -> dict[str, Rule]:
        """Other ways to act in evaluation, by name: "actor", one sample of it; "best_q", its candidate of largest Q."""
        ...

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Learn from one iteration; returns metrics named ``critic/...``, ``actor/...``, ``transport/...``."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that a resume needs: weights, optimisers, replay, generators, counters (tensors, plain values)."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; afterwards the method continues bit for bit."""
        ...
