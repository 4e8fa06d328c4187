"""robosuite tasks beyond their physics: time limits, workers, memory, arguments, pictures."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("robosuite", reason="robosuite is not installed")

from conftest import wait_for_end
from test_robosuite import TASKS, action_sequences, assert_same, follow

from benchmark.envs import make_env
from benchmark.envs import robosuite_simulator as simulator_module
from benchmark.envs.robosuite import RobosuiteEnv, default_arguments

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.robosuite


def test_time_limit_truncates_inside_a_chunk() -> None:
    env = make_env("lift", 2, 4, max_episode_steps=6)
    both = np.arange(2)
    env.reset(both, both)
    zero = np.zeros((2, 4, 7), dtype=np.float32)
    assert env.max_episode_steps == 6
    assert not env.step(both, zero).truncated.any()
    last = env.step(both, zero)
    assert last.steps.tolist() == [2, 2] and last.truncated.all() and not last.terminated.any()
    with pytest.raises(RuntimeError, match=r"\[0, 1\] have no running episode"):
        env.step(both, zero)
    env.close()
    env.close()
    with pytest.raises(RuntimeError, match="closed"):
        env.reset(both, both)


def worker_ids(env: RobosuiteEnv) -> list[int]:
    group: Any = env._pool
    return [process.pid for process, _ in group._workers]


@pytest.mark.parametrize("task", ["lift", "transport"])
def test_workers_do_not_change_results(task: str) -> None:
    steps = 20
    alone, shared = RobosuiteEnv(task, 4, 4), RobosuiteEnv(task, 4, 4, threads=2)
    actions = action_sequences(steps, alone.action_dim)
    everyone, none = np.arange(4), np.zeros(0, dtype=np.int64)
    seeds = np.array([0, 1, 2, 2**50])
    np.testing.assert_array_equal(alone.reset(everyone, seeds), shared.reset(everyone, seeds), strict=True)
    for first, second in zip(follow(alone, actions[:, :12]), follow(shared, actions[:, :12]), strict=True):
        assert_same(first, second)
    single = np.array([2])
    assert_same(alone.step(single, actions[2:3, 12:16]), shared.step(single, actions[2:3, 12:16]))
    assert shared.step(none, actions[:0, :4]).rewards.shape == (0, 4)
    assert shared.reset(none, none).shape == (0, alone.observation_dim)
    for name, values in alone.state_dict().items():
        np.testing.assert_array_equal(values, shared.state_dict()[name], strict=True)
    pids = worker_ids(shared)
    second = RobosuiteEnv(task, 1, 4, threads=2)
    assert worker_ids(second) == pids  # environments of the same task share them
    shared.close()
    second.reset(np.array([0]), np.array([1]))
    second.close()
    wait_for_end(pids)


def test_dead_worker_is_one_error_and_changes_nothing() -> None:
    env = RobosuiteEnv("lift", 2, 200, threads=2)
    both = np.arange(2)
    env.reset(both, both)
    before = env.state_dict()
    pids = worker_ids(env)
    os.kill(pids[1], signal.SIGSTOP)  # so that it has not answered when it dies
    killer = threading.Timer(0.5, os.kill, (pids[1], signal.SIGKILL))
    killer.start()
    with pytest.raises(RuntimeError, match=r"worker 2 of 2 ended without an answer \(status -9\)"):
        env.step(both, np.ones((2, 200, 7), dtype=np.float32))
    with pytest.raises(RuntimeError, match="worker 2 of 2"):
        env.reset(both, both)
    for name, values in env.state_dict().items():
        np.testing.assert_array_equal(values, before[name])
    wait_for_end(pids)
    again = RobosuiteEnv("lift", 1, 4, threads=2)  # not the dead ones
    again.reset(np.array([0]), np.array([0]))
    again.close()


def test_workers_end_with_their_parent() -> None:
    code = (
        "import os, signal; from benchmark.envs.robosuite import RobosuiteEnv; env = RobosuiteEnv('can', 2, threads=2);"
        "print(*(process.pid for process, _ in env._pool._workers), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2, done.stderr
    wait_for_end(pids)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_hundred_environments_fit_into_memory(threads: int) -> None:
    """50 to train and 50 to evaluate, all models built: peak memory of all processes under 2 GiB."""
    code = (
        "import sys; import numpy as np; from pathlib import Path; from benchmark.envs.robosuite import RobosuiteEnv;"
        f"envs = [RobosuiteEnv('lift', 50, 1, threads={threads}) for _ in range(2)]; everyone = np.arange(50);"
        "[env.reset(everyone, everyone + 7) for env in envs];"
        "[env.step(everyone, np.ones((50, 1, 7), dtype=np.float32)) for env in envs];"
        "print(*(process.pid for process, _ in getattr(envs[0]._pool, '_workers', [])), flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        pids = [parent.pid, *map(int, parent.stdout.readline().split())]
        lines = [line for pid in pids for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
        peaks = [int(line.split()[1]) / 2**20 for line in lines if line.startswith("VmHWM")]
        print(f"{threads} threads: peak GiB of the processes {np.round(peaks, 2).tolist()}")
    assert len(peaks) == 1 + threads * (threads > 1) and sum(peaks) < 2.0


def test_published_arguments_are_robosuites_default_controller() -> None:
    """They differ from robosuite's own file only in the two names that robosuite 1.4.1 does not know."""
    suite = simulator_module.load_robosuite()
    own = suite.load_controller_config(default_controller="OSC_POSE")
    for task in TASKS:
        published = dict(default_arguments(task)["env_kwargs"]["controller_configs"])
        assert published.pop("damping") == own["damping_ratio"]
        assert published.pop("damping_limits") == own["damping_ratio_limits"]
        assert published == {name: value for name, value in own.items() if "damping" not in name}
        env = RobosuiteEnv(task, 1)
        simulator: Any = env._pool._simulator(0)  # type: ignore[union-attr]
        for robot in simulator.env.robots:
            np.testing.assert_array_equal(robot.controller.kd, 2 * np.sqrt(np.full(6, 150.0)))
        assert (env.observation_dim, env.action_dim) == {"lift": (19, 7), "transport": (59, 14)}.get(task, (23, 7))


def changed(part: str, **changes: Any) -> dict[str, Any]:
    arguments = default_arguments("lift")
    places = {"top": arguments, "env": arguments["env_kwargs"]}
    places.get(part, arguments["env_kwargs"]["controller_configs"]).update(changes)
    return arguments


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (changed("top", env_name="PickPlaceCan"), "env_name 'Lift', got 'PickPlaceCan'"),
        (changed("top", env_version="1.5.1"), "env_version '1.4.1', got '1.5.1'"),
        (changed("top", type=2), "type 1, got 2"),
        (changed("top", env_kwargs=None), "mapping env_kwargs"),
        (
            changed("env", lite_physics=True, colour=3),
            r"Lift of robosuite 1\.4\.1 has no argument colour, lite_physics",
        ),
        (changed("env", controller_configs="OSC_POSE"), "mapping for each arm, got 'OSC_POSE'"),
        (changed("env", control_freq=10), "control_freq 20, got 10"),
        (changed("controller", type="JOINT_VELOCITY"), "type 'OSC_POSE', got 'JOINT_VELOCITY'"),
        (changed("controller", impedance_mode="variable"), "impedance_mode 'fixed', got 'variable'"),
        (changed("controller", interpolation="linear"), "interpolation None, got 'linear'"),
        (changed("env", robots=["Pando"]), "robosuite refuses the arguments of Lift"),
        (changed("env", robots=["Panda", "Panda"]), "robosuite refuses the arguments of Lift"),
        (changed("env", gripper_types="RobotiqThreeFingerGripper"), "observations of 28 numbers, not 19"),
        (changed("env", table_friction={1, 2}), "plain JSON"),
    ],
)
def test_arguments_that_do_not_fit_are_one_line(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        RobosuiteEnv("lift", 1, arguments=arguments)
    assert "\n" not in str(caught.value)


def test_workers_hand_on_robosuites_refusal() -> None:
    with pytest.raises(ValueError, match="robosuite refuses the arguments of Lift"):
        RobosuiteEnv("lift", 1, threads=2, arguments=changed("env", robots=["Pando"]))


def test_dataset_arguments_lose_rendering_and_shaping_and_stay_unchanged() -> None:
    arguments = changed("env", use_camera_obs=True, has_offscreen_renderer=True, reward_shaping=True, hard_reset=True)
    copied = repr(arguments)
    env = RobosuiteEnv("lift", 1, arguments=arguments)
    plain = RobosuiteEnv("lift", 1)
    assert repr(arguments) == copied
    one = np.array([0])
    np.testing.assert_array_equal(env.reset(one, one), plain.reset(one, one))
    actions = np.zeros((1, 4, 7), dtype=np.float32)
    assert_same(env.step(one, actions), plain.step(one, actions))
    softer = RobosuiteEnv("lift", 1, arguments=changed("controller", kp=50))  # and those that matter do
    softer.reset(one, one)
    plain.reset(one, one)
    assert np.any(softer.step(one, actions + 1).observations != plain.step(one, actions + 1).observations)


def test_unknown_task_and_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="'door'; valid: lift, can, square, transport"):
        RobosuiteEnv("door", 1)
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        RobosuiteEnv("lift", 1, threads=0)
    with pytest.raises(ValueError, match="max_episode_steps must be at least 1, got 0"):
        RobosuiteEnv("lift", 1, max_episode_steps=0)


def test_missing_robosuite_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    simulator_module.load_robosuite.cache_clear()
    monkeypatch.setitem(sys.modules, "robosuite", None)
    with pytest.raises(ValueError) as caught:
        RobosuiteEnv("lift", 1)
    assert str(caught.value) == "robosuite tasks need robosuite 1.4.1: pip install 'otpr-bench[robosuite]'"


def test_picture_shows_the_state(tmp_path: Path) -> None:
    """Drawn in a process of its own, where the way to draw can still be chosen; changes nothing."""
    code = (
        "import sys; import numpy as np; from benchmark.envs.robosuite import RobosuiteEnv; i = np.arange(2);"
        "env = RobosuiteEnv('lift', 3); env.reset(i, i); before = env.state_dict()['states'];"
        "pictures = [env.render(k, 160, 120) for k in (0, 1, 0)]; np.savez(sys.argv[1], *pictures);"
        "assert env.render(0, 700, 650).shape == (650, 700, 3);"
        "assert np.array_equal(before, env.state_dict()['states']); env.render(2)"
    )
    environment = {**os.environ, "MUJOCO_GL": "egl"}
    script = [sys.executable, "-c", code, str(tmp_path / "pictures.npz")]
    done = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if "cannot be rendered on this machine" in done.stderr:
        pytest.skip("no EGL on this machine")
    assert "ValueError: environment 2 has no episode to render" in done.stderr, done.stderr
    first, second, again = np.load(tmp_path / "pictures.npz").values()
    assert first.shape == (120, 160, 3) and first.dtype == np.uint8 and first.std() > 10.0
    np.testing.assert_array_equal(first, again)
    assert np.any(first != second)
