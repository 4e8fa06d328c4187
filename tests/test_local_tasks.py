"""Every method on every task that comes with embedded data: whole runs of two short iterations, and what they hold."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmark.envs import ROBOSUITE
from benchmark.launch.execute import execute
from benchmark.plan import PlannedRun, prepare
from benchmark.policies import load_pretrained
from benchmark.seeding import BASE_SEED, Streams
from benchmark.spec import make_spec
from benchmark.store import read_json, run_paths
from benchmark.tasks import TASKS
from otpr.diffusion import SamplerSettings

LOCAL = [name for name, task in TASKS.items() if name.endswith("-local") and "embedded" in task.loops]
METHODS = ("frozen", "otpr", "dppo", "idql", "dql", "dql-dppo")
SHORT = {"n_envs": 4, "n_steps": 12, "iterations": 2, "eval_every": 2, "eval_episodes": 1}  # 192 steps an iteration
SMALL = {"batch_size": 16, "replay_ratio": 1.0, "critic_warmup_iterations": 1}
PEAK = 4 * 1024**3  # bytes that a run may take

# A run whose replay holds a million transitions: filled, learned from once, and put into a checkpoint.
FULL_REPLAY = """
import resource, sys
from pathlib import Path
import torch
from benchmark.finetune import Trainer
from benchmark.spec import make_spec
from benchmark.store import RunPaths
torch.set_num_threads(1)
settings = {"replay_capacity": 1_000_000, "replay_ratio": 1.0, "batch_size": 64, "critic_warmup_iterations": 0}
loop = {"n_envs": 4, "n_steps": 12, "iterations": 1, "eval_every": 1, "eval_episodes": 1}
sampler = {"kind": "ddim", "ddim_steps": 5}
trainer = Trainer(make_spec("kitchen-local", "idql", 0, "embedded", loop, sampler, settings, 1, "cpu"))
replay = trainer.method.replay
replay.rows.zero_()
replay.added = replay.capacity
trainer.advance()
trainer.advance()
trainer.save(RunPaths(Path(sys.argv[1])))
print(len(replay), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def local_task(name: str) -> object:
    marks = [pytest.mark.slow] + ([pytest.mark.robosuite] if TASKS[name].environment in ROBOSUITE else [])
    return pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", [local_task(name) for name in LOCAL])
@pytest.mark.parametrize("method", METHODS)
def test_two_iterations(name: str, method: str, tmp_path: Path) -> None:
    if TASKS[name].environment in ROBOSUITE:
        pytest.importorskip("robosuite", reason="robosuite is not installed")
    overrides = (
        {"ft_denoising_steps": 5, "batch_size": 100} if method == "dppo" else SMALL if method != "frozen" else {}
    )
    sampler = {"kind": "ddim", "ddim_steps": 5}
    spec = make_spec(name, method, 1000, "embedded", SHORT, sampler, overrides, threads=1, device="cpu")
    run = PlannedRun(spec, run_paths(tmp_path, name, method, 1000), "missing")
    prepare(run)
    assert execute(run.paths.root) == "done", read_json(run.paths.status)
    rows = run.paths.curve.read_text().splitlines()
    assert len(rows) == 3  # header, the policy it starts from, the end
    assert rows[-1].startswith("2,384,")


@pytest.mark.slow
def test_a_run_with_a_million_transitions_stays_within_its_memory(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL_REPLAY, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    count, peak = (int(word) for word in done.stdout.split())
    assert count == 1_000_000
    assert peak < PEAK, f"{peak / 1024**3:.2f} GiB"


@pytest.mark.slow
def test_an_exploring_policy_sees_what_the_kitchens_data_never_touch_at_thousands_unless_clipped() -> None:
    task, everyone = TASKS["kitchen-local"], np.arange(40)
    pretrained, generator = load_pretrained(task, SamplerSettings(kind="ddim")), torch.Generator().manual_seed(1000)
    clipped, unclipped = pretrained.normalizer, replace(pretrained.normalizer, observation_clip=math.inf)
    resets = Streams(BASE_SEED, task.name, 1000).episodes("start-resets", everyone, np.zeros_like(everyone))
    env = task.make_env(len(everyone), 1, pretrained.arguments)
    try:
        observations, seen = env.reset(everyone, resets), []
        for _ in range(task.max_episode_steps // task.action_horizon - 1):
            seen.append(observations)
            normalized = torch.from_numpy(unclipped.normalize_observations(observations))
            with torch.no_grad():
                chunks = pretrained.policy.sample(normalized, True, generator).numpy()
            observations = env.step(everyone, unclipped.denormalize_actions(chunks)).observations
    finally:
        env.close()
    assert np.abs(unclipped.normalize_observations(np.stack(seen))).max() > 1000
    assert np.abs(clipped.normalize_observations(np.stack(seen))).max() == task.observation_clip
