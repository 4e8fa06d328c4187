"""The one training loop, used by every method: collect, update, evaluate, record, checkpoint, resume.

A run killed at any moment and started again gives the same bytes as one that was never interrupted: everything that
changes over time is in the checkpoint, which is written at iteration boundaries.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from baselines import frozen
from benchmark.envs import VectorEnv
from benchmark.evaluation import Diverged, environment_actions, evaluate
from benchmark.methods import get_arm
from benchmark.policies import Normalizer, Pretrained, load_pretrained
from benchmark.policies.demonstrations import load_demonstrations
from benchmark.seeding import Streams
from benchmark.spec import RunSpec
from benchmark.store import (
    CURVE_COLUMNS,
    RULE_COLUMNS,
    Guard,
    RunPaths,
    load_latest_checkpoint,
    nothing,
    read_json,
    save_checkpoint,
    write_rows,
)
from benchmark.tasks import LoopSettings, get_task
from otpr.method import ActionChunk, Demonstrations, Method, Rollout, Rule

EXPLODED_Q = 1e6  # |mean Q| beyond which a critic has diverged; discounted returns of all tasks stay far below


class Collector:
    """Fills one preallocated `Rollout` per iteration; episodes go on across iterations."""

    def __init__(
        self, env: VectorEnv, normalizer: Normalizer, streams: Streams, loop: LoopSettings, device: str
    ) -> None:
        self.env, self.normalizer, self.streams = env, normalizer, streams
        self.n_steps, self.reset_at_iteration, self.device = loop.n_steps, loop.reset_at_iteration, device
        self.generator = streams.torch("exploration", device)
        self.episode_numbers = np.zeros(env.num_envs, dtype=np.int64)
        self.everyone = np.arange(env.num_envs)
        self.observations = self._normalised(self._reset(self.everyone))
        self.rollout: Rollout | None = None

    def collect(self, act: Callable[[Tensor, bool, torch.Generator], ActionChunk]) -> Rollout:
        """Step every environment `n_steps` chunks; the returned rollout is overwritten by the next call.

        Raises:
            Diverged: an action is not finite.
        """
        if self.reset_at_iteration:
            self.observations = self._normalised(self._reset(self.everyone))
        for t in range(self.n_steps):
            chunk = act(self.observations, True, self.generator)
            step = self.env.step(self.everyone, environment_actions(chunk.actions, self.normalizer))
            rollout = self.rollout or self._allocate(chunk)
            following = self._normalised(step.observations)
            rollout.observations[t], rollout.actions[t] = self.observations, chunk.actions
            rollout.rewards[t] = torch.from_numpy(step.rewards.sum(1))
            rollout.terminated[t] = torch.from_numpy(step.terminated)
            rollout.truncated[t] = torch.from_numpy(step.truncated & ~step.terminated)
            rollout.next_observations[t] = following
            for name, values in chunk.extras.items():
                rollout.extras[name][t] = values
            ended = np.flatnonzero(step.terminated | step.truncated)
            if ended.size:
                following = following.clone()
                following[torch.from_numpy(ended)] = self._normalised(self._reset(ended))
            self.observations = following
        assert self.rollout is not None
        return self.rollout

    def _allocate(self, chunk: ActionChunk) -> Rollout:
        count = (self.n_steps, self.env.num_envs)
        floats = {"dtype": torch.float32, "device": self.device}
        shape = (*count, self.env.observation_dim)
        self.rollout = Rollout(
            observations=torch.empty(shape, **floats),
            actions=torch.empty((*count, *chunk.actions.shape[1:]), **floats),
            rewards=torch.empty(count, **floats),
            terminated=torch.empty(count, dtype=torch.bool, device=self.device),
            truncated=torch.empty(count, dtype=torch.bool, device=self.device),
            next_observations=torch.empty(shape, **floats),
            extras={name: v.new_empty((*count, *v.shape[1:])) for name, v in chunk.extras.items()},
        )
        return self.rollout

    def _reset(self, indices: NDArray[np.int64]) -> NDArray[np.float64]:
        seeds = self.streams.episodes("training-episode", indices, self.episode_numbers[indices])
        self.episode_numbers[indices] += 1
        return self.env.reset(indices, seeds)

    def _normalised(self, observations: NDArray[np.float64]) -> Tensor:
        return torch.from_numpy(self.normalizer.normalize_observations(observations)).to(self.device)

    def state_dict(self) -> dict[str, Any]:
        """Simulator state, current observations, episode counters, exploration generator."""
        env = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in self.env.state_dict().items()}
        return {
            "env": env,
            "episode_numbers": torch.from_numpy(self.episode_numbers),
            "observations": self.observations,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self.env.load_state_dict({k: v.numpy() if isinstance(v, Tensor) else v for k, v in state["env"].items()})
        self.episode_numbers = state["episode_numbers"].numpy().copy()
        self.observations = state["observations"].to(self.device)
        self.generator.set_state(state["generator"].cpu())


class Trainer:
    """One run in memory: built from its spec, advanced an iteration at a time, saved to and restored from its files.

    Raises:
        ValueError: the spec names something unknown, or the installed pre-trained policy is not the spec's.
    """

    def __init__(self, spec: RunSpec) -> None:
        self.spec, self.task = spec, get_task(spec.task)
        pretrained = pretrained_of(spec)
        loop, task = spec.loop, self.task
        self.normalizer, self.streams = pretrained.normalizer, Streams(spec.base_seed, spec.task, spec.seed)
        env = task.make_env(loop.n_envs, spec.threads, pretrained.arguments)
        self.evaluation_env = task.make_env(loop.eval_episodes, spec.threads, pretrained.arguments)
        self.collector = Collector(env, self.normalizer, self.streams, loop, spec.device)
        policy = pretrained.policy.to(spec.device)
        self.shape = task.shape(loop)
        self.method: Method = get_arm(spec.method).build(
            spec.method_settings(),
            policy,
            self.shape,
            self.streams.torch("updates", spec.device),
            demonstrations_of(spec),
        )
        self.pretrained: Method = frozen.Frozen(frozen.Settings(), policy, self.shape, torch.Generator())
        self.learns = get_arm(spec.method).learns
        self.iteration, self.wall_seconds = 0, 0.0
        self.curve: list[dict[str, Any]] = []
        self.rule_rows: list[dict[str, Any]] = []  # of `evaluations.csv`
        self.metrics: list[dict[str, Any]] = []

    @property
    def done(self) -> bool:
        """Whether the budget is spent."""
        return self.iteration >= self.spec.loop.iterations

    @property
    def env_steps(self) -> int:
        """Environment steps so far: chunks times the action horizon, also where an episode's end cut a chunk short."""
        return self.iteration * self.shape.n_envs * self.shape.n_steps * self.shape.action_horizon

    def advance(self) -> None:
        """Row 0 first; then one iteration of collecting and updating, and its evaluation where one is due.

        Raises:
            Diverged: something is no longer finite.
        """
        started = time.perf_counter()
        row: dict[str, Any] = {}
        if not self.curve:
            self._record_evaluation(self.pretrained)
        else:
            row = self._train()
        evaluated = time.perf_counter()
        due = self.iteration % self.spec.loop.eval_every == 0 or self.done
        if self.iteration and due:
            self._record_evaluation(self.method)
        self.wall_seconds += time.perf_counter() - started
        if due:
            self.curve[-1]["wall_seconds"] = round(self.wall_seconds, 3)
        if row:
            self.metrics.append(row | {"time/evaluate": round(time.perf_counter() - evaluated, 4)})

    def _train(self) -> dict[str, Any]:
        started, metrics = time.perf_counter(), {}
        collected = started
        if self.learns:
            rollout = self.collector.collect(self.method.act)
            collected = time.perf_counter()
            metrics = self.method.update(rollout)
            metrics |= {"collect/reward": rollout.rewards.mean().item()}
            ends = (rollout.terminated | rollout.truncated).sum().item()
            metrics |= {"collect/episodes_ended": ends}
        self._check_divergence(metrics)
        self.iteration += 1
        times = {"time/collect": collected - started, "time/update": time.perf_counter() - collected}
        return {
            "iteration": self.iteration,
            "env_steps": self.env_steps,
            **metrics,
            **{name: round(value, 4) for name, value in times.items()},
        }

    def _check_divergence(self, metrics: dict[str, Any]) -> None:
        when = f"after iteration {self.iteration + 1}"
        bad = [name for name, value in metrics.items() if not np.isfinite(value)]
        if bad:
            raise Diverged(f"not finite {when}: {', '.join(bad)}")
        if abs(metrics.get("critic/q", 0.0)) > EXPLODED_Q:
            raise Diverged(f"Q exploded {when}: critic/q is {metrics['critic/q']:.3g}, beyond {EXPLODED_Q:.0g}")

    def _record_evaluation(self, method: Method) -> None:
        at = {"iteration": self.iteration, "env_steps": self.env_steps}
        if self.curve and not self.learns:  # the same policy on the same episodes as in row 0
            self.curve.append(self.curve[0] | at)
            self.rule_rows += [row | at for row in self.rule_rows if row["iteration"] == 0]
            return
        row = self.play(lambda observations, generator: method.act(observations, False, generator))
        self.curve.append(row | at | {"gradient_steps": self.method.gradient_steps})
        if self.spec.loop.evaluate_rules:
            rules = method.other_rules().items()
            self.rule_rows += [self.play(rule) | at | {"rule": name} for name, rule in rules]

    def play(self, rule: Rule) -> dict[str, Any]:
        """The evaluation columns of a way to act; all play the same episodes, with a generator of the same seed."""
        indices, device = np.arange(self.spec.loop.eval_episodes), self.spec.device
        seeds = self.streams.episodes("evaluation-episode", indices, np.zeros_like(indices))
        generator = self.streams.torch("evaluation-actions", device)
        played = evaluate(
            self.evaluation_env, lambda observations: rule(observations, generator), self.normalizer, seeds, device
        )
        return played.row(self.task, self.spec.loop.success_rule)

    def save(self, paths: RunPaths, last: bool = False, guard: Guard = nothing) -> None:
        """Write the checkpoint; `last` says that no further one follows, `guard` may prevent it."""
        state = {
            "digest": self.spec.digest,
            "iteration": self.iteration,
            "wall_seconds": self.wall_seconds,
            "curve": self.curve,
            "rule_rows": self.rule_rows,
            "metrics": self.metrics,
            "collector": self.collector.state_dict(),
            "method": self.method.state_dict(),
        }
        save_checkpoint(paths, state, last, guard)

    def record(self, paths: RunPaths, guard: Guard = nothing) -> None:
        """Write `curve.csv`, `metrics.csv` and, where asked for, `evaluations.csv`; `guard` may prevent it."""
        write_rows(paths.curve, self.curve, CURVE_COLUMNS, guard)
        if self.rule_rows:
            write_rows(paths.evaluations, self.rule_rows, RULE_COLUMNS, guard)
        write_rows(paths.metrics, self.metrics, ("iteration", "env_steps"), guard)

    def restore(self, paths: RunPaths, own: bool = False) -> None:
        """Continue from the checkpoint, if there is one.

        Args:
            own: the run's lease is held, see `load_latest_checkpoint`.

        Raises:
            ValueError: it is unreadable, or belongs to another spec.
        """
        state = load_latest_checkpoint(paths, own)
        if state is None:
            return
        # A run begun before a setting was added goes by the digest that its file had then.
        if state.get("digest") not in (self.spec.digest, read_json(paths.spec).get("digest")):
            raise ValueError(f"{paths.checkpoint}: checkpoint of another specification")
        self.iteration, self.wall_seconds = state["iteration"], state["wall_seconds"]
        self.curve, self.metrics = state["curve"], state["metrics"]
        self.rule_rows = state.get("rule_rows", [])  # checkpoints of before there were such rules
        self.collector.load_state_dict(state["collector"])
        self.method.load_state_dict(state["method"])

    def close(self) -> None:
        """Release the environments."""
        self.collector.env.close()
        self.evaluation_env.close()


def pretrained_of(spec: RunSpec) -> Pretrained:
    """The pre-trained policy that the spec names.

    Raises:
        ValueError: an unknown task, or what is installed is damaged or not what the run was specified with.
    """
    held = load_pretrained(get_task(spec.task), spec.sampler)
    if held.digest != spec.policy_digest:
        raise ValueError(
            f"the pre-trained policy of {spec.task} has digest {held.digest[:12]}, "
            f"the run was specified with {spec.policy_digest[:12]}"
        )
    return held


def demonstrations_of(spec: RunSpec) -> Demonstrations | None:
    """The expert pairs that the spec names.

    Raises:
        ValueError: what is installed is not what the run was specified with.
    """
    if not spec.demonstrations_digest:
        return None
    held = load_demonstrations(get_task(spec.task))
    if held.digest != spec.demonstrations_digest:
        raise ValueError(
            f"the expert pairs of {spec.task} have digest {held.digest[:12]}, "
            f"the run was specified with {spec.demonstrations_digest[:12]}"
        )
    return held.pairs
