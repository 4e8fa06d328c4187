"""Vector environments behind one interface, made by name."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Mapping
from typing import Any

from benchmark.envs.base import ChunkStep, VectorEnv

LOCOMOTION = ("hopper", "walker2d", "halfcheetah")
KITCHEN = ("kitchen-microwave-kettle-light-slider", "kitchen-microwave-kettle-bottomburner-light")
ROBOSUITE = ("lift", "can", "square", "transport")
NAMES = (*LOCOMOTION, *KITCHEN, *ROBOSUITE, "toy")

ROBOSUITE_VERSION = "1.4.1"  # of the datasets and of all published numbers
ROBOSUITE_ADVICE = f"robosuite tasks need robosuite {ROBOSUITE_VERSION}: pip install 'otpr-bench[robosuite]'"

__all__ = ["NAMES", "ChunkStep", "VectorEnv", "make_env", "why_not_here"]


def why_not_here(name: str) -> str:
    """What has to be installed for `make_env` to know the environment; '' where it is there."""
    if name in ROBOSUITE:
        try:
            found = importlib.metadata.version("robosuite")
        except importlib.metadata.PackageNotFoundError:
            return ROBOSUITE_ADVICE
        return "" if found == ROBOSUITE_VERSION else f"{ROBOSUITE_ADVICE} (found {found})"
    if ":" in name:
        try:
            _load_class(name)
        except ValueError as error:
            return str(error)
    return ""


def make_env(
    name: str,
    num_envs: int,
    action_horizon: int = 4,
    threads: int = 1,
    arguments: Mapping[str, Any] | None = None,
    max_episode_steps: int | None = None,
) -> VectorEnv:
    """A batch of `num_envs` environments stepped in chunks of `action_horizon` actions.

    Args:
        name: one of `NAMES`, or ``MODULE:CLASS`` of another package, called as
            ``CLASS(num_envs, action_horizon, threads)``.
        threads: threads for the physics, or worker processes of robosuite; never changes a result.
        arguments: of a robosuite environment, as its dataset describes them; by default the published ones.
        max_episode_steps: time limit of a robosuite environment; all others have one of their own.

    Raises:
        ValueError: for an unknown name, or a size below 1.
    """
    # Imported where they are needed: the toy task needs neither MuJoCo nor the compiler.
    if name in LOCOMOTION:
        from benchmark.envs.locomotion import LocomotionEnv

        return LocomotionEnv(name, num_envs, action_horizon, threads)
    if name in KITCHEN:
        from benchmark.envs.kitchen import KitchenEnv

        return KitchenEnv(name, num_envs, action_horizon, threads)
    if name in ROBOSUITE:
        from benchmark.envs.robosuite import RobosuiteEnv

        return RobosuiteEnv(name, num_envs, action_horizon, threads, arguments, max_episode_steps)
    if name == "toy":
        from benchmark.envs.toy import ToyEnv

        return ToyEnv(num_envs, action_horizon)
    if ":" in name:
        return _load_class(name)(num_envs, action_horizon, threads)
    raise ValueError(f"unknown environment {name!r}; valid: {', '.join(NAMES)}, or MODULE:CLASS")


def _load_class(name: str) -> Callable[[int, int, int], VectorEnv]:
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"environment {name!r}: {error}") from error
