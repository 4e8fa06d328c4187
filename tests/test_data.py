"""Datasets survive a round trip, damaged files are refused in one line, and the local ones are made as registered."""

from __future__ import annotations

import itertools
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import benchmark.data.__main__ as command
from benchmark.data import make, registry
from benchmark.data.d4rl import COLUMNS, Episodes, read_dataset, write_dataset
from benchmark.data.demonstrator import Demonstrator, save_demonstrator
from benchmark.envs import make_env
from benchmark.policies import FOLDER


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTPR_BENCH_CACHE", str(tmp_path / "cache"))


def random_episodes(lengths: tuple[int, ...] = (5, 3, 9), timed_out: tuple[int, ...] = (1,), cut: bool = False):
    total, rng = sum(lengths), np.random.default_rng(0)
    terminals, timeouts = np.zeros(total, dtype=bool), np.zeros(total, dtype=bool)
    for i, last in enumerate(np.cumsum(lengths) - 1):
        (timeouts if i in timed_out else terminals)[last] = not (cut and last == total - 1)
    return Episodes(
        observations=rng.normal(size=(total, 4)).astype(np.float32),
        actions=rng.uniform(-1, 1, size=(total, 2)).astype(np.float32),
        rewards=rng.normal(size=total).astype(np.float32),
        terminals=terminals,
        timeouts=timeouts,
    )


@pytest.mark.parametrize("cut", [False, True])
def test_round_trip(tmp_path: Path, cut: bool) -> None:
    path, episodes = tmp_path / "a" / "data.hdf5", random_episodes(cut=cut)
    write_dataset(path, episodes, {"seed": 3, "data_digest": "abc"})
    dataset = read_dataset(path, 4, 2)
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(dataset.episodes, name), getattr(episodes, name), strict=True)
    assert dataset.digest == "abc"
    assert dataset.attributes["seed"] == 3
    assert dataset.episodes.lengths.tolist() == [5, 3, 9]
    np.testing.assert_allclose(dataset.episodes.returns[1], episodes.rewards[5:8].sum(dtype=np.float64), rtol=1e-6)
    assert os.listdir(path.parent) == ["data.hdf5"]


def test_a_foreign_file_is_identified_by_its_contents(tmp_path: Path) -> None:
    episodes = random_episodes()
    with h5py.File(tmp_path / "d4rl.hdf5", "w") as file:
        for name in COLUMNS:
            file[name] = getattr(episodes, name)
        file["rewards"][...] = episodes.rewards
        file["metadata/algorithm"] = "SAC"
        file["next_observations"] = np.full((2, 2), np.nan)  # ignored
    assert read_dataset(tmp_path / "d4rl.hdf5").digest == episodes.content_digest()


def test_window_starts_never_cross_an_episode() -> None:
    episodes = random_episodes((5, 3, 9, 4))
    edges = episodes.boundaries
    for size in (1, 3, 4, 9):
        expected = [s for a, b in itertools.pairwise(edges) for s in range(a, b - size + 1)]
        assert episodes.window_starts(size).tolist() == expected
    for size in (0, 10):
        with pytest.raises(ValueError, match=r"window size|no episode has 10 steps; the longest has 9"):
            episodes.window_starts(size)


def replaced(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[h5py.File], None]:
    def damage(file: h5py.File) -> None:
        values = file[name][...]
        del file[name], file.attrs["content_sha256"]
        file[name] = change(values)

    return damage


def put(index: tuple[int, ...] | int, value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        changed = values.astype(np.float64)
        changed[index] = value
        return changed

    return change


def link_outside(file: h5py.File) -> None:
    del file["rewards"]
    file["rewards"] = h5py.ExternalLink("other.hdf5", "/rewards")


def declare_too_much(file: h5py.File) -> None:
    del file["actions"]
    file.create_dataset("actions", shape=(10**12, 2), dtype="f4", chunks=(1000, 2))


def alter(file: h5py.File) -> None:
    file["rewards"][2] = 0.25


DAMAGE = {
    "missing": (lambda file: file.__delitem__("timeouts"), "lacks 'timeouts'"),
    "group": (lambda file: (file.__delitem__("actions"), file.create_group("actions")), "must be an array"),
    "outside": (link_outside, "stored in the file itself"),
    "flat": (replaced("observations", lambda v: v[:, 0]), "'observations' must have 2 dimensions"),
    "rewards-2d": (replaced("rewards", lambda v: v[:, None]), "'rewards' must have 1 dimensions"),
    "width": (replaced("observations", lambda v: v[:, :3]), "'observations' must have width 4, got 3"),
    "short": (replaced("rewards", lambda v: v[:-1]), "lengths differ"),
    "text": (replaced("rewards", lambda v: v.astype("S8")), "must hold numbers"),
    "objects": (replaced("rewards", lambda v: np.full(v.shape, "x", dtype=h5py.string_dtype())), "must hold numbers"),
    "complex": (replaced("rewards", lambda v: v.astype(np.complex64)), "must hold numbers"),
    "nan": (replaced("observations", put((4, 1), np.nan)), "'observations' at step 4: nan is not a finite float32"),
    "infinite": (replaced("rewards", put(7, -np.inf)), "'rewards' at step 7: -inf is not"),
    "too-large": (replaced("rewards", put(7, 1e300)), "'rewards' at step 7: 1e\\+300 is not"),
    "action": (replaced("actions", put((3, 0), 1.0001)), "'actions' at step 3: 1.0001 is outside \\[-1, 1\\]"),
    "action-nan": (replaced("actions", put((3, 0), np.nan)), "'actions' at step 3: nan is not"),
    "flag": (replaced("terminals", put(2, 2.0)), "'terminals' at step 2: must be 0 or 1"),
    "huge": (declare_too_much, "'actions' must hold 1 to"),
    "altered": (alter, "not those that it was written with"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    path, (damage, message) = tmp_path / "data.hdf5", DAMAGE[kind]
    write_dataset(path, random_episodes(), {})
    with h5py.File(path, "a") as file:
        damage(file)
    with pytest.raises(ValueError, match=message) as caught:
        read_dataset(path, 4, 2)
    assert "\n" not in str(caught.value)


def test_small_excess_of_an_action_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "data.hdf5"
    write_dataset(path, random_episodes(), {})
    with h5py.File(path, "a") as file:
        replaced("actions", put((3, 0), 1.000005))(file)
    read_dataset(path)


@pytest.mark.parametrize("content", ["truncated", "pickle", "empty", "missing", "folder"])
def test_what_is_no_hdf5_file_is_refused_in_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "data.hdf5"
    write_dataset(path, random_episodes((4000, 3000)), {})
    whole = path.read_bytes()
    path.unlink()
    if content == "folder":
        path.mkdir()
    elif content != "missing":
        path.write_bytes({"truncated": whole[: len(whole) // 2], "pickle": pickle.dumps([1]), "empty": b""}[content])
    with pytest.raises(ValueError, match="unreadable HDF5 file") as caught:
        read_dataset(path)
    assert "\n" not in str(caught.value)


def test_flipped_bytes_never_pass_as_other_numbers(tmp_path: Path) -> None:
    path, rng = tmp_path / "data.hdf5", np.random.default_rng(0)
    write_dataset(path, random_episodes((400, 300)), {})
    whole = path.read_bytes()
    expected = read_dataset(path).episodes.content_digest()
    for _ in range(60):
        damaged = bytearray(whole)
        for position in rng.integers(len(whole), size=3):
            damaged[position] ^= 1 << rng.integers(8)
        path.write_bytes(bytes(damaged))
        try:
            assert read_dataset(path).episodes.content_digest() == expected
        except ValueError as error:
            assert "\n" not in str(error)


def test_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "data.hdf5"
    with pytest.raises(TypeError):
        write_dataset(path, random_episodes(), {"bad": object()})  # pyright: ignore[reportArgumentType]
    assert not os.listdir(tmp_path)


def test_toy_is_generated_once_and_verifies(capsys: pytest.CaptureFixture[str]) -> None:
    data = registry.get_dataset("toy")
    first = make.load_dataset(data)
    assert registry.dataset_path("toy").is_relative_to(registry.cache_dir())
    written = registry.dataset_path("toy").stat().st_mtime_ns
    second = make.load_dataset(data)
    assert registry.dataset_path("toy").stat().st_mtime_ns == written
    assert first.digest == second.digest == data.digest()
    assert make.verify_dataset(data, registry.dataset_path("toy")).episodes.content_digest() == (
        make.make_episodes(data).content_digest()
    )
    assert len(first.episodes.lengths) == data.episodes


def test_verify_refuses_another_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = registry.get_dataset("toy")
    path = make.make_dataset(data, tmp_path / "toy.hdf5")
    monkeypatch.setattr(registry, "GENERATOR_VERSION", registry.GENERATOR_VERSION + 1)
    with pytest.raises(ValueError, match="differs in generator_version"):
        make.verify_dataset(data, path)


def test_roll_out_records_whole_episodes(tmp_path: Path) -> None:
    policy = Demonstrator(11, 3, 16, torch.Generator().manual_seed(0))

    def collect() -> Episodes:
        env = make_env("hopper", 6, action_horizon=1)
        return make.roll_out(env, policy, np.arange(6), torch.Generator().manual_seed(1))

    episodes = collect()
    assert len(episodes.lengths) == 6
    assert (episodes.terminals | episodes.timeouts).sum() == 6
    assert np.abs(episodes.actions).max() <= 1
    assert episodes.content_digest() == collect().content_digest()
    env = make_env("hopper", 6, action_horizon=1)  # replay the recorded actions of one episode
    start, stop = episodes.boundaries[2:4]
    observation = env.reset(np.array([2]), np.array([2]))
    for step in range(start, stop):
        np.testing.assert_array_equal(observation[0].astype(np.float32), episodes.observations[step])
        outcome = env.step(np.array([2]), episodes.actions[step][None, None])
        assert np.float32(outcome.rewards[0, 0]) == episodes.rewards[step]
        assert outcome.terminated[0] == episodes.terminals[step]
        observation = outcome.observations


def test_recipe_refuses_a_demonstrator_that_is_not_of_its_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "DEMONSTRATORS", tmp_path)
    data = registry.get_dataset("hopper-local")
    with pytest.raises(ValueError, match="no demonstrator"):
        data.recipe()
    save_demonstrator(Demonstrator(11, 3, 8, torch.Generator()), tmp_path / "hopper.pt", {})
    digest = data.digest()
    save_demonstrator(Demonstrator(11, 3, 8, torch.Generator().manual_seed(5)), tmp_path / "other.pt", {})
    (tmp_path / "other.pt").rename(tmp_path / "hopper.pt")
    with pytest.raises(ValueError, match="not the file that its card describes"):
        data.recipe()
    (tmp_path / "other.json").rename(tmp_path / "hopper.json")
    assert data.digest() != digest


@pytest.mark.parametrize("name", [p.stem for p in FOLDER.glob("*.json")])
def test_every_shipped_policy_has_a_dataset(name: str) -> None:
    assert registry.get_dataset(name).task == name


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["data", *arguments])
    return command.main()


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(monkeypatch, "list") == 0
    assert "not made yet" in capsys.readouterr().out
    assert run_command(monkeypatch, "verify", "toy") == 2
    assert run_command(monkeypatch, "make", "toy") == 0
    assert run_command(monkeypatch, "verify", "toy") == 0
    assert "timed out" in capsys.readouterr().out
    (tmp_path / "file").write_text("x")
    for arguments in (("make", "nope"), ("make", "toy", "--out", str(tmp_path / "file" / "a.hdf5")),
                      ("make", "toy", "--threads", "0")):  # fmt: skip
        assert run_command(monkeypatch, *arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
