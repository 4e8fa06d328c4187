"""Every task as gymnasium's environment: registered, passing its checker, the same physics."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from benchmark.gym import NAMESPACE  # importing the module registers the tasks
from benchmark.tasks import TASKS

ROOT = Path(__file__).parents[1]
CHECKED = [
    "toy",
    "hopper-local",
    "walker2d-local",
    "halfcheetah-local",
    "kitchen-local",
    pytest.param("lift-local", marks=pytest.mark.robosuite),
]
PACKAGES = {"kitchen-local": "gymnasium_robotics", "lift-local": "robosuite"}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def make(task: str, **options) -> gymnasium.Env:
    return gymnasium.make(f"{NAMESPACE}/{task}", **options)


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, away from the repository's folder."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, check=False)


def test_every_task_is_registered() -> None:
    names = {name.removeprefix("otpr_bench/") for name in gymnasium.registry if name.startswith("otpr_bench/")}
    assert names >= set(TASKS)


def test_gymnasium_finds_the_tasks_by_the_name_of_the_module() -> None:
    done = python("import gymnasium; print(gymnasium.make('benchmark.gym:otpr_bench/toy').reset(seed=1)[0].shape)")
    assert done.stdout == "(2,)\n", done.stderr


@pytest.mark.parametrize("task", CHECKED)
def test_the_checker_of_gymnasium_passes(task: str) -> None:
    if task in PACKAGES:
        pytest.importorskip(PACKAGES[task], reason=f"the simulator of {task}")
    drawn = make(task, render_mode="rgb_array").unwrapped
    drawn.reset(seed=0)
    try:
        picture = drawn.render()
        assert isinstance(picture, np.ndarray) and picture.shape == (480, 480, 3) and picture.std() > 5
    except ValueError as error:
        assert task != "toy", error  # the others need OpenGL
        drawn = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*value is -?infinity")  # as gymnasium's own
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        check_env(make(task).unwrapped, skip_render_check=drawn is None)


@pytest.mark.parametrize(
    ("task", "reference"), [("hopper-local", "Hopper-v4"), ("halfcheetah-local", "HalfCheetah-v4")]
)
def test_steps_are_those_of_gymnasium(task: str, reference: str) -> None:
    ours, theirs, rng = make(task), gymnasium.make(reference), np.random.default_rng(0)
    np.testing.assert_array_equal(ours.reset(seed=7)[0], theirs.reset(seed=7)[0])
    for _ in range(40):
        action = rng.uniform(-0.2, 0.2, ours.action_space.shape).astype(np.float32)
        (observation, reward, terminated, truncated, _), expected = ours.step(action), theirs.step(action)
        np.testing.assert_array_equal(observation, expected[0])
        assert (reward, terminated, truncated) == expected[1:4]
        if terminated:
            break
    ours.close()


def test_the_time_limit_truncates() -> None:
    env = make("toy")
    env.reset(seed=0)
    flags = [env.step(np.zeros(2, dtype=np.float32))[2:4] for _ in range(48)]
    assert flags == [(False, False)] * 47 + [(False, True)]
    with pytest.raises(RuntimeError, match="no running episode"):
        env.step(np.zeros(2, dtype=np.float32))


def test_unseeded_resets_are_drawn_from_the_last_seed() -> None:
    first, second = make("toy"), make("toy")
    starts = [[env.reset(seed=4)[0], env.reset()[0], env.reset()[0]] for env in (first, second)]
    np.testing.assert_array_equal(*starts)
    assert len({tuple(start) for start in starts[0]}) == 3


@pytest.mark.parametrize(("task", "package"), [("lift-local", "robosuite"), ("kitchen-local", "gymnasium_robotics")])
def test_a_missing_simulator_is_one_line(task: str, package: str) -> None:
    code = f"""import sys
import benchmark.gym, gymnasium
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == {package!r} else found(name, *rest)
sys.modules[{package!r}] = None
try:
    gymnasium.make("otpr_bench/{task}")
except ValueError as error:
    print(error)"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1 and package.replace("_", "-") in done.stdout
    assert "install" in done.stdout


@pytest.mark.filterwarnings("ignore:.*render_mode='ansi':UserWarning")
def test_an_unknown_render_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="ansi"):
        make("toy", render_mode="ansi")
