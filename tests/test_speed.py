"""The speed command: turns, equal work for all contenders, every part at tiny sizes, the JSON file, refusals."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmark.envs import ROBOSUITE, robosuite_simulator
from benchmark.envs.kitchen import load_model
from benchmark.methods import ARMS, Arm
from benchmark.speed import __main__ as command
from benchmark.speed import learning
from benchmark.speed.learning import learning_methods, matmul, prepare_update, run_iteration, sampling, update
from benchmark.speed.measuring import Figure, Row, Sizes, measure, ratio
from benchmark.speed.physics import EpisodeRollout, make_native, physics, physics_of, play, played_episodes, record
from benchmark.speed.robosuite import robosuite

TINY = Sizes(
    repeats=2,
    envs=2,
    physics_chunks=3,
    kitchen_envs=2,
    kitchen_chunks=1,
    robosuite_chunks=1,
    sampling_calls=1,
    update_chunks=1,
    replay_chunks=1,
    iteration_chunks=2,
    matmul_size=32,
)


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_measured(rows: list[Row], samples: int) -> None:
    for row in rows:
        assert len(row.samples) == samples, row
        assert all(math.isfinite(rate) and rate > 0 for rate in row.samples), row
        assert all(math.isfinite(figure.value) and figure.value > 0 for figure in row.figures), row


def test_functions_take_turns() -> None:
    calls: list[str] = []

    def work(name: str, units: int) -> int:
        calls.append(name)
        return units

    rates = measure({"a": partial(work, "a", 1), "b": partial(work, "b", 10**9)}, repeats=3)
    assert calls == ["a", "b"] * 3
    assert [len(values) for values in rates.values()] == [3, 3]
    assert min(rates["b"]) > max(rates["a"])
    assert ratio([2.0, 9.0, 4.0], [1.0, 3.0, 8.0]) == 2.0


def test_figures_say_whether_the_aim_is_reached() -> None:
    assert str(Figure("GFLOP/s", 1234.0)) == "1,234 GFLOP/s"
    assert str(Figure("x", 0.8, 0.7)) == "0.800 x (aim >= 0.7: reached)"
    assert str(Figure("GiB", 2.5, 2.0, at_most=True)) == "2.500 GiB (aim <= 2: missed)"


@pytest.mark.parametrize(("name", "chunks"), [("hopper", 40), ("kitchen-microwave-kettle-light-slider", 2)])
def test_rollout_repeats_the_episodes_bit_for_bit(name: str, chunks: int) -> None:
    env = make_native(name, 3, 4, threads=1)
    actions = np.random.default_rng(1).uniform(-1, 1, (chunks, 3, 4, env.action_dim)).astype(np.float32)
    steps, ended = play(env, actions)
    assert ended.any() == (name == "hopper")
    episodes = played_episodes(steps, ended, actions)
    assert len(episodes) >= ended.sum()
    assert len({seed for seed, _ in episodes}) == len(episodes)
    assert sum(len(executed) for _, executed in episodes) == steps.sum()
    native = EpisodeRollout(env, record(name, episodes, threads=2), batch=1, threads=1)
    assert native.run() == steps.sum()
    finals = {tuple(states[0, -1]) for *_, states in native.batches}
    size = native.batches[0][0].shape[1]
    running = [row for row, last in zip(env.state_dict()["states"], ended[-1], strict=True) if not last]
    assert running and all(tuple(row[:size]) in finals for row in running)  # the first entries: the physics' state
    if name == "hopper":
        heights = [states[0, 3 * 4 :: 4, 2] for *_, states in native.batches]  # time, x, height; after each step
        assert all((height[:-1] > 0.7).all() for height in heights)  # until its last step no episode has fallen
    native.pool.close()


def test_physics_measures_all_contenders() -> None:
    rows = physics_of("hopper", TINY, threads=2)
    assert [row.name.split(", ")[1] for row in rows] == ["ours", "mujoco.rollout", "AsyncVectorEnv", "SyncVectorEnv"]
    assert_measured(rows, TINY.repeats)
    assert [figure.aim for figure in rows[0].figures] == [0.85, 2.5, None]


def test_physics_measures_the_kitchen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmark.speed.physics.LOCOMOTION", ())
    rows = physics(TINY, threads=2)
    assert [row.name.split(", ")[1] for row in rows] == ["ours", "mujoco.rollout"]
    assert_measured(rows, TINY.repeats)
    assert [figure.aim for figure in rows[0].figures] == [0.90]
    monkeypatch.setattr("benchmark.envs.kitchen.importlib.util.find_spec", lambda name: None)
    load_model.cache_clear()
    (row,) = physics(TINY, threads=2)
    assert row.rate is None and row.note.startswith("not available: the kitchen needs the package gymnasium-robotics")


def test_robosuite_that_is_missing_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    robosuite_simulator.load_robosuite.cache_clear()
    monkeypatch.setitem(sys.modules, "robosuite", None)
    rows = robosuite(TINY, threads=1)
    assert [(row.name, row.rate) for row in rows] == [(name, None) for name in ROBOSUITE]
    assert all(row.note.startswith("not available: robosuite tasks need robosuite 1.4.1") for row in rows)


def test_sampling_and_products() -> None:
    rows = sampling(TINY, threads=1)
    assert_measured([*rows, *matmul(TINY, threads=1)], TINY.repeats)
    assert [row.name for row in rows if row.figures] == ["DDPM, 20 steps", "DDIM, 5 steps"]


def test_iteration_counts_its_steps_and_memory() -> None:
    result = run_iteration("dppo", TINY.envs, TINY.iteration_chunks, threads=1)
    assert (result["env_steps"], result["gradient_steps"]) == (2 * 2 * 4, 5)
    assert 2**20 < result["memory"] < 2**40
    assert result["collect"] > 0 < result["update"]


def test_update_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(set(learning_methods())) == len({(arm.module, arm.class_name) for arm in ARMS.values() if arm.learns})
    for name in list(ARMS):
        if name != "dppo":
            monkeypatch.delitem(ARMS, name)
    monkeypatch.setitem(ARMS, "absent", Arm("baselines.absent", "Absent"))
    measured, missing = update(TINY, threads=1)
    assert measured.name == "dppo"
    assert_measured([measured], TINY.repeats)
    assert (missing.name, missing.rate) == ("absent", None)
    assert missing.note == "not available: No module named 'baselines.absent'"


def test_every_method_can_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "PROTOCOL", "embedded")  # smaller batches
    for name in learning_methods():
        assert prepare_update(name, TINY)() >= 1


def test_command_writes_its_json(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "DEFAULT", TINY)
    path = tmp_path / "new" / "speed.json"
    arguments = command.Arguments(parts=("matmul", "iteration"), threads=1, json=path)
    assert command.main(arguments) == 0
    content: dict[str, Any] = json.loads(path.read_text())
    assert content.keys() == {"format", "full", "machine", "seconds", "rows"}
    assert {"cpu", "cores", "threads", "packages", "git"} <= content["machine"].keys()
    assert [row["part"] for row in content["rows"]] == ["iteration", "matmul"]
    for row in content["rows"]:
        assert row.keys() == {"part", "name", "unit", "samples", "median", "figures", "note"}
        assert row["median"] > 0
        assert all(figure.keys() == {"name", "value", "aim", "at_most"} for figure in row["figures"])
    assert [path.name for path in path.parent.iterdir()] == ["speed.json"]
    assert content["machine"]["cpu"] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (command.Arguments(parts=("physic",)), "unknown part 'physic'; valid: " + ", ".join(command.PARTS)),
        (command.Arguments(threads=0), "--threads must be at least 1, got 0"),
        (command.Arguments(json=Path(".")), ". is a directory"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    arguments: command.Arguments, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(arguments) == 2
    assert capsys.readouterr().err == f"error: {error}\n"
