"""The speed command: turns, equal work for all contenders, every part at tiny sizes, the JSON file, refusals."""

from __future__ import annotations

import json
import math
import sys
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
from benchmark.speed import contenders, iterations, learning, profile
from benchmark.speed.contenders import Contender, Iteration, Learner, Parts
from benchmark.speed.iterations import Outcome, measure_group, outcome
from benchmark.speed.learning import learning_methods, matmul, prepare_update, sampling, update
from benchmark.speed.measuring import Figure, OperationCounter, Row, Sizes, measure, ratio
from benchmark.speed.physics import EpisodeRollout, make_native, physics, physics_of, play, played_episodes, record
from benchmark.speed.profile import Clock, profile_of, published_loop, short_chunks
from benchmark.speed.robosuite import robosuite
from benchmark.tasks import get_task

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
    iteration_turns=2,
    iteration_chunks=2,
    replay_iteration_chunks=8,
    profile_envs=2,
    matmul_size=32,
)


pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_operations_are_those_of_the_products() -> None:
    layer = torch.nn.Linear(3, 5)
    with OperationCounter() as counter:
        layer(torch.rand(7, 3)).tanh().sum().backward()
    assert counter.total == 2 * 2 * 7 * 3 * 5  # forward, and backward to the weights


def test_dppo_takes_turns_with_plain() -> None:
    plain, ours, product = measure_group((Contender("dppo", plain=True), Contender("dppo")), TINY, threads=1)
    assert_measured([plain, ours, product], TINY.iteration_turns)
    assert plain.name == "dppo, plain, float32, 2 x 500 chunks (from 2)"
    assert (product.unit, ours.unit) == ("GFLOP/s", "env steps/s")
    assert [(f.name, f.aim) for f in ours.figures][:2] == [("x plain", 2.0), ("of 1,500 env steps/s", 1.0)]
    assert [f.name for f in plain.figures] == [
        "GFLOP/s",
        "of the matrix product's GFLOP/s",
        "GiB peak memory without workers",
        "s collecting",
        "s in gradient steps",
    ]
    assert next(f.value for f in ours.figures if f.name == "GiB peak memory") < 100


@pytest.fixture
def quick_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    def overrides(name: str, chunks: int) -> dict[str, Any]:
        quick = {"replay_ratio": 10.0, "batch_size": 64, "replay_capacity": 1000}
        return quick | ({"transport_block_size": 32, "transport_first_steps": 3} if name == "otpr" else {})

    monkeypatch.setattr(contenders, "iteration_settings", overrides)


@pytest.mark.parametrize("name", ["idql", "dql", "otpr"])
def test_an_iteration_is_measured_in_its_parts(name: str, quick_methods: None) -> None:
    learner = Learner(Contender(name), envs=2, chunks=8, threads=1)
    try:
        counted, timed = learner.prepare(2), learner.iterate()
    finally:
        learner.close()
    assert counted.gradient_steps == timed.gradient_steps == 2
    assert len(learner.method.replay) == 1000
    for parts in (counted.seconds, timed.seconds, counted.operations):
        assert parts.collect > 0 < parts.learn
        assert (parts.fit > 0) == (name == "otpr")
    assert timed.operations.total == 0
    assert 2**20 < timed.memory < 2**40


def test_plain_and_ours_do_about_the_same_operations() -> None:
    totals = []
    for plain in (False, True):
        learner = Learner(Contender("dppo", plain=plain), envs=2, chunks=2, threads=1)
        totals.append(learner.prepare(2).operations.total)
        learner.close()
    assert 0.5 < totals[0] / totals[1] < 1.1


def test_the_published_iteration_is_put_together_from_parts() -> None:
    turn = Iteration(Parts(1.0, 2.0, 3.0), Parts(0.0, 0.0, 0.0), 30, 2**30)
    counted = Iteration(turn.seconds, Parts(10.0, 20.0, 30.0), 30, 2**30)

    class Seat(iterations.Seat):
        def __init__(self) -> None:
            self.contender, self.counted, self.turns = Contender("idql"), counted, [turn]

    found = outcome(Seat(), envs=40, chunks=5)
    steps = 500 * 40 * 128 / 1000  # published gradient steps
    assert found.seconds == [Parts(100.0, 2.0 * steps / 30, 3.0)]
    assert found.operations == pytest.approx(10 * 100 + 20 * steps / 30 + 30)
    assert found.rates == [500 * 40 * 4 / found.seconds[0].total]


def test_who_cannot_take_part_on_this_machine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    contender = Contender("idql", precision="bfloat16")
    for feature in ("avx512bf16", "amx-bf16", "bf16"):
        monkeypatch.setattr(contenders, "get_host_cpu_features", lambda feature=feature: {feature: True})
        assert contender.lacking == ""
    monkeypatch.setattr(contenders, "get_host_cpu_features", lambda: {"avx2": True, "avx512bf16": False})
    monkeypatch.setattr(contenders, "COMPILER", "no-such-compiler")
    compiled = Contender("idql", plain=True, compiled=True)
    assert Contender("idql").lacking == ""
    rounded, translated = measure_group((contender, compiled), TINY, 1)
    assert rounded.note.startswith("not available: the processor has no instructions for bfloat16")
    assert translated.note == "not available: torch.compile needs a compiler, and there is no no-such-compiler"


def test_references_and_aims() -> None:
    def made(contender: Contender, seconds: float) -> Outcome:
        parts = [Parts(seconds / 2, seconds / 2, 0.0)] * 2
        return Outcome(contender, parts, 1e9, 100, [Iteration(parts[0], parts[0], 1, 2**30)] * 2)

    plain, ours, otpr = Contender("idql", plain=True), Contender("idql"), Contender("otpr")
    compiled = Contender("idql", plain=True, compiled=True)
    outcomes = {c: made(c, s) for c, s in ((plain, 4.0), (compiled, 3.2), (ours, 2.0), (otpr, 2.5))}
    products = {"float32": [10.0, 10.0]}
    first = {c.label: iterations.figures_of(outcomes[c], outcomes, products)[0] for c in outcomes}
    assert first["idql, plain, float32"] == Figure("GFLOP/s", 0.25)
    assert first["idql, plain with torch.compile, float32"] == Figure("x plain", 1.25)
    assert first["idql, ours, float32"] == Figure("x plain", 2.0, 1.5)
    assert first["otpr, ours, float32"] == Figure("of idql's rate", 0.8, 0.85)
    assert not any(
        contender.precision not in iterations.PRECISIONS for group in iterations.GROUPS for contender in group
    )
    overrides = contenders.iteration_settings("otpr", 5)  # of 500 chunks
    settings = learning.resolve_settings("otpr", learning.TASK, "published", overrides)
    idql = learning.resolve_settings("idql", learning.TASK, "published", {})
    assert all(getattr(settings, key) == getattr(idql, key) for key in contenders.EQUAL)
    assert settings.replay_capacity == idql.replay_capacity // 100
    assert contenders.iteration_settings("dppo", 5) == {}


def test_a_clock_counts_the_outer_part() -> None:
    class Work:
        def inner(self) -> int:
            return 1

        def outer(self) -> int:
            return self.inner()

    work, clock = Work(), Clock()
    clock.time(work, "inner", "a")
    clock.time(work, "outer", "b")
    clock.time(work, "absent", "c")
    assert work.outer() == 1
    assert clock.take("b") > 0 == clock.take("a")
    assert work.inner() == 1
    assert clock.take("a") > 0 == clock.take("a")


@pytest.mark.parametrize("name", ["otpr", "dppo"])
def test_profile_says_where_the_time_goes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def resolved(method: str, task: Any, protocol: str, overrides: dict[str, Any]) -> Any:
        quick = {"batch_size": 100}
        if method == "otpr":
            quick = {"replay_ratio": 10.0, "batch_size": 64, "transport_block_size": 32, "transport_first_steps": 3}
        return learning.resolve_settings(method, task, protocol, overrides | quick)

    monkeypatch.setattr(profile, "resolve_settings", resolved)
    row = profile_of(get_task("kitchen-local"), name, TINY, threads=1)
    assert_measured([row], 1)
    shares = {figure.name: figure.value for figure in row.figures}
    own = {"otpr": {"% transport", "% replay"}, "dppo": set()}[name]
    common = {"% stepping", "% sampling", "% optimiser", "% matrix products", "% activations", "% rest"}
    assert shares.keys() == own | common
    assert sum(shares.values()) == pytest.approx(100)


def test_profiled_chunks_make_whole_minibatches() -> None:
    task = get_task("kitchen-local")
    loop = published_loop(task)
    assert (loop.n_envs, loop.n_steps) == (40, 70)
    settings = learning.resolve_settings("dppo", task, "published", {})
    assert short_chunks(settings, loop, 6) == 14
    assert short_chunks(learning.resolve_settings("idql", task, "published", {}), loop, 6) == 6


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
    compiled = Contender("dppo", plain=True, compiled=True)  # which takes part with --compiled alone
    monkeypatch.setattr(iterations, "GROUPS", ((Contender("dppo"), compiled),))
    path = tmp_path / "new" / "speed.json"
    arguments = command.Arguments(parts=("matmul", "iteration"), threads=1, json=path)
    assert command.main(arguments) == 0
    content: dict[str, Any] = json.loads(path.read_text())
    assert content.keys() == {"format", "full", "machine", "seconds", "rows"}
    assert {"cpu", "cores", "threads", "packages", "git"} <= content["machine"].keys()
    assert [row["part"] for row in content["rows"]] == ["iteration", "iteration", "matmul"]
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
        (
            command.Arguments(parts=("physics",), compiled=True),
            "--compiled is an option of the part iteration, got --parts physics",
        ),
        (command.Arguments(json=Path("Makefile/speed.json")), "output Makefile: Makefile is not a directory"),
        (command.Arguments(json=Path(".")), ". is a directory"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    arguments: command.Arguments, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(arguments) == 2
    assert capsys.readouterr().err == f"error: {error}\n"
