"""Evaluating a checkpoint alone: the run's own figures to the last digit, one line for bad input; films of episodes."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

from benchmark import evaluate, video
from benchmark.envs import VectorEnv, drawing, make_env
from benchmark.envs.toy import GOAL, ToyEnv
from benchmark.evaluation import Diverged
from benchmark.finetune import Trainer
from benchmark.launch.execute import execute
from benchmark.policies import Normalizer
from benchmark.spec import make_spec
from otpr.method import ActionChunk

ROOT = Path(__file__).parents[1]
COLUMNS = ("episodes", "return_mean", "return_std", "success_rate", "score")


def call(capsys, **fields) -> dict[str, str]:
    """What `benchmark.evaluate` prints as a table."""
    capsys.readouterr()
    assert evaluate.main(evaluate.Arguments(**fields)) == 0
    lines = capsys.readouterr().out.splitlines()
    return dict(line.split() for line in lines if line.startswith("  "))


def last_row(path: Path, **where: str) -> dict[str, str]:
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if where.items() <= row.items()]
    return {name: rows[-1][name] for name in COLUMNS}


@pytest.mark.parametrize("method", ["frozen", "dppo", "idql", "otpr"])
def test_a_run_gives_the_last_row_of_its_curve(method: str, prepared, capsys) -> None:
    run = prepared(method, loop={"iterations": 4, "evaluate_rules": True})
    assert execute(run.paths.root) == "done"
    row = call(capsys, run=run.paths.root)
    assert row == last_row(run.paths.curve)
    if run.paths.evaluations.exists():
        other = call(capsys, run=run.paths.root, rule="best_q")
        assert other == last_row(run.paths.evaluations, rule="best_q")
    assert call(capsys, run=run.paths.root, episodes=3)["episodes"] == "3"
    assert call(capsys, run=run.paths.root, episodes=64) != call(capsys, run=run.paths.root, episodes=64, seed=5)


def test_a_checkpoint_of_before_the_first_iteration_gives_row_0(prepared, capsys) -> None:
    run = prepared("idql")
    trainer = Trainer(run.spec)
    trainer.advance()
    trainer.save(run.paths)
    trainer.close()
    row = call(capsys, run=run.paths.root)
    assert row == {name: str(trainer.curve[0][name]) for name in COLUMNS}


@pytest.mark.parametrize("ddim_steps", [None, 4])
def test_a_task_gives_row_0_of_its_runs(ddim_steps: int | None, capsys) -> None:
    sampler = {} if ddim_steps is None else {"kind": "ddim", "ddim_steps": ddim_steps}
    trainer = Trainer(make_spec("toy", "frozen", 0, "embedded", TINY, sampler, {}, threads=1, device="cpu"))
    trainer.advance()
    trainer.close()
    row = call(capsys, task="toy", episodes=8, ddim_steps=ddim_steps)
    assert row == {name: str(trainer.curve[0][name]) for name in COLUMNS}
    assert call(capsys, task="toy")["episodes"] == "128"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, ["--run", "--task"]),
        ({"task": "toy", "run": Path("somewhere")}, ["--run", "--task"]),
        ({"task": "ant"}, ["ant", "toy"]),
        ({"task": "toy", "episodes": 0}, ["--episodes", "0"]),
        ({"task": "toy", "seed": -1}, ["--seed", "-1"]),
        ({"task": "toy", "ddim_steps": 30}, ["ddim_steps", "1..20", "30"]),
        ({"task": "toy", "ddim_steps": 11}, ["ddim_steps", "divide the 20", "11"]),
        ({"run": Path("somewhere"), "ddim_steps": 5}, ["--ddim-steps 5", "--task"]),
        ({"run": Path("somewhere"), "threads": 3}, ["--threads 3", "--task"]),
        ({"task": "toy", "rule": "best_q"}, ["best_q", "own"]),
        ({"task": "toy", "video": Path("film.avi")}, [".mp4", ".gif", "film.avi"]),
        ({"run": Path("nowhere")}, ["nowhere", "spec.json"]),
    ],
)
def test_bad_arguments_are_one_line_and_exit_2(fields: dict, words: list[str], capsys) -> None:
    assert evaluate.main(evaluate.Arguments(**fields)) == 2
    check_error(capsys, words)


def check_error(capsys, words: list[str]) -> None:
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert all(word in error for word in words), error


@pytest.mark.parametrize("damage", ["missing", "truncated", "foreign"])
def test_unusable_checkpoints_are_one_line_and_exit_2(damage: str, prepared, capsys) -> None:
    run = prepared("frozen")
    if damage == "truncated":
        execute(run.paths.root)
        run.paths.checkpoint.write_bytes(run.paths.checkpoint.read_bytes()[:1000])
    elif damage == "foreign":
        torch.save({"digest": "of another run"}, run.paths.checkpoint)
    assert evaluate.main(evaluate.Arguments(run=run.paths.root)) == 2
    check_error(capsys, [str(run.paths.root), "checkpoint"])


def test_a_missing_encoder_is_named_before_anything_runs(monkeypatch, capsys) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert evaluate.main(evaluate.Arguments(task="toy", video=Path("film.mp4"))) == 2
    check_error(capsys, ["imageio-ffmpeg", ".gif"])


# Films

UNIT = Normalizer(*(np.full(2, bound, dtype=np.float32) for bound in (-1, 1, -1, 1)))


def straight_on(observations: torch.Tensor) -> ActionChunk:
    """Three actions aside, then on towards the goal: a chunk of 4, past the disc."""
    aside = torch.tensor([1.0, 0.0]) if float(observations[0, 1]) < -0.5 else torch.tensor([0.0, 1.0])
    return ActionChunk(aside.repeat(1, 4, 1))


def test_a_film_has_the_start_and_a_picture_after_every_action() -> None:
    env, reference = ToyEnv(1, action_horizon=1), ToyEnv(1, action_horizon=4)
    pictures = list(video.film_episode(env, straight_on, UNIT, seed=3, device="cpu"))
    index, steps = np.zeros(1, dtype=np.int64), 0
    observations, ended = reference.reset(index, np.array([3])), False
    np.testing.assert_array_equal(pictures[0], reference.render(0))
    while not ended:
        chunk = straight_on(torch.from_numpy(UNIT.normalize_observations(observations))).actions
        step = reference.step(index, UNIT.denormalize_actions(chunk.numpy()))
        observations, ended = step.observations, bool(step.terminated[0] or step.truncated[0])
        steps += int(step.steps[0])
        np.testing.assert_array_equal(pictures[steps], reference.render(0))
    assert len(pictures) == steps + 1 > 6


def test_the_toy_picture_shows_where_things_are() -> None:
    env = ToyEnv(2)
    env.reset(np.arange(2), np.array([0, 1]))
    picture = env.render(1, width=200, height=100)
    assert picture.shape == (100, 200, 3) and picture.dtype == np.uint8
    colours = {name: tuple(picture[row(y), column(x)]) for name, (x, y) in {
        "goal": tuple(GOAL), "disc": (0.0, 0.0), "point": tuple(env.state_dict()["position"][1]), "free": (0.9, 0.9),
    }.items()}  # fmt: skip
    assert len(set(colours.values())) == 4 and colours["free"] == (255, 255, 255)
    with pytest.raises(ValueError, match="index 2"):
        env.render(2)


def row(y: float) -> int:
    return int((1 - y) / 2 * 100)


def column(x: float) -> int:
    return int((x + 1) / 2 * 200)


def moving(count: int) -> Iterator[np.ndarray]:
    for i in range(count):
        picture = np.zeros((32, 48, 3), dtype=np.uint8)
        picture[:, i % 48] = 255
        yield picture


def test_gifs_hold_every_picture(tmp_path: Path) -> None:
    video.write_film(tmp_path / "new" / "film.gif", moving(20))
    with Image.open(tmp_path / "new" / "film.gif") as film:
        assert getattr(film, "n_frames", 1) == 20 and film.size == (48, 32)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["film.gif"]


def test_mp4s_hold_every_picture(tmp_path: Path) -> None:
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="the encoder of .mp4 files")
    video.write_film(tmp_path / "film.mp4", moving(20))
    frames = imageio_ffmpeg.read_frames(str(tmp_path / "film.mp4"))
    assert next(frames)["size"] == (48, 32)
    assert len(list(frames)) == 20


@pytest.mark.parametrize("name", ["film.gif", "film.mp4"])
def test_an_interrupted_film_leaves_nothing(name: str, tmp_path: Path) -> None:
    if name.endswith("mp4"):
        pytest.importorskip("imageio_ffmpeg", reason="the encoder of .mp4 files")

    def failing() -> Iterator[np.ndarray]:
        yield from moving(3)
        raise Diverged("the policy's actions are not finite")

    with pytest.raises(Diverged):
        video.write_film(tmp_path / name, failing())
    assert not list(tmp_path.iterdir())


def test_a_film_of_a_run(prepared, tmp_path: Path, capsys) -> None:
    run = prepared("frozen", loop={"iterations": 2})
    execute(run.paths.root)
    row = call(capsys, run=run.paths.root, video=tmp_path / "film.gif")
    assert row == last_row(run.paths.curve)
    with Image.open(tmp_path / "film.gif") as film:
        assert 2 <= getattr(film, "n_frames", 1) <= 49 and film.size == (480, 480)


# Drawing with MuJoCo


@pytest.fixture
def graphics() -> None:
    env = make_env("hopper", 1)
    try:
        env.reset(np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64))
        env.render(0, 16, 16)
    except ValueError as error:
        pytest.skip(f"no OpenGL here: {error}")
    finally:
        env.close()


@pytest.mark.parametrize("name", ["hopper", "walker2d", "halfcheetah"])
def test_drawing_changes_no_bit_of_the_physics(name: str, graphics) -> None:
    drawn, plain = make_env(name, 2), make_env(name, 2)
    everyone, rng = np.arange(2), np.random.default_rng(0)
    starts = [env.reset(everyone, everyone + 5) for env in (drawn, plain)]
    np.testing.assert_array_equal(*starts)
    first = drawn.render(1, 64, 48)
    assert first.shape == (48, 64, 3) and first.dtype == np.uint8 and first.std() > 10
    for _ in range(5):
        actions = rng.uniform(-0.3, 0.3, (2, 4, drawn.action_dim)).astype(np.float32)
        drawn.render(0, 64, 48)
        steps = [env.step(everyone, actions) for env in (drawn, plain)]
        np.testing.assert_array_equal(steps[0].observations, steps[1].observations)
    assert (drawn.render(1, 64, 48) != first).any()
    for env in (drawn, plain):
        env.close()


def test_what_cannot_be_drawn_is_one_line_with_advice(monkeypatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no\nOpenGL platform")

    monkeypatch.setattr("mujoco.Renderer", broken)
    monkeypatch.setattr(drawing, "_failures", [])
    env = make_env("hopper", 1)
    env.reset(np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64))
    with pytest.raises(ValueError) as raised:
        video.draw(env)
    assert "\n" not in str(raised.value) and "libegl1" in str(raised.value) and "MUJOCO_GL" in str(raised.value)


def test_an_environment_without_pictures_says_so_without_advice() -> None:
    class Plain(ToyEnv):
        render = VectorEnv.render

    with pytest.raises(ValueError, match=r"Plain cannot be rendered$"):
        video.draw(Plain(1))


def test_a_chosen_way_to_draw_is_left_alone(monkeypatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    monkeypatch.setattr("subprocess.run", lambda *a, **k: pytest.fail("nothing to try"))
    drawing.choose_graphics()
    assert os.environ["MUJOCO_GL"] == "glfw"


def without_display(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Python code on a machine without a screen."""
    hidden = {"MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY", "PYOPENGL_PLATFORM"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden} | variables
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_what_could_not_be_drawn_is_not_tried_again_which_would_end_the_process() -> None:
    code = """import numpy as np
from benchmark.envs import make_env
for _ in range(2):
    env = make_env("hopper", 1)
    env.reset(np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64))
    try:
        env.render(0)
    except ValueError as error:
        print(error)"""
    done = without_display(code, MUJOCO_GL="glfw")
    first, second = done.stdout.splitlines()
    assert done.returncode == 0 and first == second and first.startswith("cannot render: ")


def test_a_picture_too_large_says_nothing_about_the_machine(graphics) -> None:
    env = make_env("hopper", 1)
    env.reset(np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64))
    with pytest.raises(ValueError, match="Image width 99999 > framebuffer width"):
        env.render(0, 99_999, 10)
    assert env.render(0, 16, 16).shape == (16, 16, 3)
    env.close()


@pytest.mark.robosuite
def test_robosuite_does_not_choose_how_to_draw() -> None:
    code = """import os, mujoco
from benchmark.envs.robosuite_simulator import load_robosuite
load_robosuite()
print(os.environ.get("MUJOCO_GL"))"""
    assert [without_display(code).stdout, without_display(code, MUJOCO_GL="glx").stdout] == ["None\n", "glx\n"]


@pytest.mark.parametrize("first", ["", "import mujoco; ", "import mujoco, os; os.environ['MUJOCO_GL'] = 'egl'; "])
def test_without_a_display_something_that_draws_is_chosen(first: str, graphics) -> None:
    code = f"""{first.replace("egl", os.environ.get("MUJOCO_GL") or "egl")}import os
from benchmark.envs import drawing
drawing.choose_graphics()
import mujoco
mujoco.Renderer(mujoco.MjModel.from_xml_string("<mujoco/>"), 16, 16).render()
print(os.environ["MUJOCO_GL"])"""
    done = without_display(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("egl", "osmesa")
