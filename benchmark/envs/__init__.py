"""Vector environments behind one interface, made by name."""

from __future__ import annotations

from benchmark.envs.base import ChunkStep, VectorEnv

LOCOMOTION = ("hopper", "walker2d", "halfcheetah")
NAMES = (*LOCOMOTION, "toy")

__all__ = ["NAMES", "ChunkStep", "VectorEnv", "make_env"]


def make_env(name: str, num_envs: int, action_horizon: int = 4, threads: int = 1) -> VectorEnv:
    """A batch of `num_envs` environments stepped in chunks of `action_horizon` actions.

    Args:
        name: one of 'hopper', 'walker2d', 'halfcheetah', 'toy'.
        threads: threads for the physics; never changes a result, and the toy task uses one.

    Raises:
        ValueError: for an unknown name, or a size below 1.
    """
    if name in LOCOMOTION:  # imported here: the toy task needs neither MuJoCo nor the compiler
        from benchmark.envs.locomotion import LocomotionEnv

        return LocomotionEnv(name, num_envs, action_horizon, threads)
    if name == "toy":
        from benchmark.envs.toy import ToyEnv

        return ToyEnv(num_envs, action_horizon)
    raise ValueError(f"unknown environment {name!r}; valid: {', '.join(NAMES)}")
