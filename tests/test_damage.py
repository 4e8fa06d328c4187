"""Damaged and hostile data files are refused in one line, at little cost, and nothing half-written is left."""

from __future__ import annotations

import json
import os
import pickle
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from data_cases import random_demonstrations, random_episodes, write_published_minari

from benchmark.data.access import load_data, read_task_data
from benchmark.data.d4rl import read_d4rl, write_d4rl
from benchmark.data.files import digests_path, layout_of, record_digest
from benchmark.data.make import make_dataset
from benchmark.data.minari import read_minari
from benchmark.data.obtain import import_file
from benchmark.data.registry import dataset_path, get_dataset
from benchmark.data.robomimic import Demonstration, read_robomimic, write_robomimic

WIDTHS = {"object": 10, "robot0_eef_pos": 3}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTPR_BENCH_CACHE", str(tmp_path / "cache"))


def refused(message: str, read: Callable[..., Any], *arguments: Any) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read(*arguments)
    assert "\n" not in str(caught.value)


def replaced(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[h5py.File], None]:
    def damage(file: h5py.File) -> None:
        values = file[name][...]
        del file[name]
        file.attrs.pop("content_sha256", None)
        file[name] = change(values)

    return damage


def put(index: tuple[int, ...] | int, value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        changed = values.astype(np.float64)
        changed[index] = value
        return changed

    return change


def instead(name: str, build: Callable[[h5py.File, str], Any]) -> Callable[[h5py.File], None]:
    def damage(file: h5py.File) -> None:
        del file[name]
        build(file, name)

    return damage


def link(target: Any) -> Callable[[h5py.File, str], None]:
    return lambda file, name: file.__setitem__(name, target)


def declared(*shape: int, **options: Any) -> Callable[[h5py.File, str], None]:
    """An array of which nothing is ever written."""
    return lambda file, name: file.create_dataset(name, shape=shape, dtype="f4", **options)


def virtual(file: h5py.File, name: str) -> None:
    layout = h5py.VirtualLayout(shape=(17,), dtype="f4")
    layout[:] = h5py.VirtualSource("other.hdf5", "rewards", shape=(17,))
    file.create_virtual_dataset(name, layout)


def references(file: h5py.File, name: str) -> None:
    file.create_dataset(name, data=[file["actions"].ref] * 17, dtype=h5py.ref_dtype)


def alter(file: h5py.File) -> None:
    file["rewards"][2] = 0.25


D4RL = {
    "missing": (lambda file: file.__delitem__("timeouts"), "lacks 'timeouts'"),
    "group": (instead("actions", lambda file, name: file.create_group(name)), "must be an array"),
    "external-link": (instead("rewards", link(h5py.ExternalLink("x.hdf5", "/rewards"))), "stored in the file itself"),
    "soft-link": (instead("rewards", link(h5py.SoftLink("/observations"))), "stored in the file itself"),
    "external-storage": (instead("rewards", declared(17, external=[("/etc/hostname", 0, 68)])), "in the file itself"),
    "virtual": (instead("rewards", virtual), "stored in the file itself"),
    "references": (instead("rewards", references), "must hold numbers"),
    "opaque": (replaced("rewards", lambda v: np.array([pickle.dumps(x)[:8] for x in v], dtype="V8")), "hold numbers"),
    "flat": (replaced("observations", lambda v: v[:, 0]), "'observations' must have 2 dimensions"),
    "rewards-2d": (replaced("rewards", lambda v: np.stack([v, v], 1)), "'rewards' must have 1 dimensions"),
    "width": (replaced("observations", lambda v: v[:, :3]), "'observations' must have width 4, got 3"),
    "short": (replaced("rewards", lambda v: v[:-1]), "lengths differ: .*rewards 16"),
    "empty": (replaced("rewards", lambda v: v[:0]), "must hold 1 to"),
    "text": (replaced("rewards", lambda v: v.astype("S8")), "must hold numbers"),
    "objects": (replaced("rewards", lambda v: np.full(v.shape, "x", dtype=h5py.string_dtype())), "must hold numbers"),
    "complex": (replaced("rewards", lambda v: v.astype(np.complex64)), "must hold numbers"),
    "compound": (replaced("rewards", lambda v: np.zeros(17, dtype=[("a", "f4"), ("b", "f4")])), "must hold numbers"),
    "nan": (replaced("observations", put((4, 1), np.nan)), "'observations' at step 4: nan is not a finite float32"),
    "infinite": (replaced("rewards", put(7, -np.inf)), "'rewards' at step 7: -inf is not"),
    "too-large": (replaced("rewards", put(7, 1e300)), "'rewards' at step 7: 1e\\+300 is not"),
    "action": (replaced("actions", put((3, 0), 1.0001)), "'actions' at step 3: 1.0001 is outside \\[-1, 1\\]"),
    "action-nan": (replaced("actions", put((3, 0), np.nan)), "'actions' at step 3: nan is not"),
    "flag": (replaced("terminals", put(2, 2.0)), "'terminals' at step 2: must be 0 or 1"),
    "huge": (instead("actions", declared(10**12, 2, chunks=(1000, 2))), "'actions' must hold 1 to"),
    "bomb": (instead("actions", declared(10**8, 2, chunks=(10**6, 2))), "would expand 0 bytes in the file to 8"),
    "large-chunk": (instead("rewards", declared(17, maxshape=(None,), chunks=(10**8,))), "chunks of 400000000 bytes"),
    "altered": (alter, "not those that it was written with"),
}  # fmt: skip


@pytest.mark.parametrize("kind", D4RL)
def test_damage_to_d4rls_layout(tmp_path: Path, kind: str) -> None:
    path, (damage, message) = tmp_path / "data.hdf5", D4RL[kind]
    write_d4rl(path, random_episodes(), {})
    with h5py.File(path, "a") as file:
        damage(file)
    refused(message, read_d4rl, path, 4, 2)


def attribute(place: str, name: str, value: Any) -> Callable[[h5py.File], None]:
    return lambda file: file[place].attrs.__setitem__(name, value)


ROBOMIMIC = {
    "no-data": (lambda file: file.__delitem__("data"), "lacks the group 'data'"),
    "no-demonstration": (instead("data", lambda file, name: file.create_group(name)), "holds no demo_0, demo_1"),
    "no-key": (lambda file: file.__delitem__("data/demo_1/obs/object"), "lacks 'data/demo_1/obs/object'"),
    "no-actions": (lambda file: file.__delitem__("data/demo_0/actions"), "lacks 'data/demo_0/actions'"),
    "no-rewards": (lambda file: file.__delitem__("data/demo_2/rewards"), "lacks 'data/demo_2/rewards'"),
    "no-obs": (lambda file: file.__delitem__("data/demo_2/obs"), "lacks the group 'data/demo_2/obs'"),
    "linked": (instead("data/demo_1", link(h5py.ExternalLink("other.hdf5", "/data"))), "'data/demo_1' must be a group"),
    "loop": (instead("data/demo_1", link(h5py.SoftLink("/data"))), "'data/demo_1' must be a group"),
    "array": (instead("data/demo_1", lambda file, name: file.create_dataset(name, data=[1.0])), "must be a group"),
    "width": (replaced("data/demo_2/actions", lambda v: v[:, :6]), "'data/demo_2/actions' must have width 7, got 6"),
    "key-width": (replaced("data/demo_1/obs/object", lambda v: v[:, :9]), "demo_1/obs/object' must have width 10"),
    "short": (replaced("data/demo_1/obs/object", lambda v: v[:-1]), "lengths differ: .*obs/object 2"),
    "samples": (attribute("data/demo_1", "num_samples", 4), "'data/demo_1' announces 4 steps but holds 3"),
    "total": (attribute("data", "total", 18), "'data' announces 18 steps but holds 17"),
    "nan": (replaced("data/demo_1/obs/object", put((2, 3), np.nan)), "'data/demo_1/obs/object' at step 2: nan"),
    "action": (replaced("data/demo_2/actions", put((8, 0), -1.5)), "'data/demo_2/actions' at step 8: -1.5 is outside"),
    "objects": (replaced("data/demo_0/actions", lambda v: np.full(v.shape, b"x", object).astype("S1")), "hold numbers"),
    "bomb": (instead("data/demo_1/actions", declared(10**8, 1, chunks=(10**6, 1))), "would expand|must have width"),
    "array-attribute": (attribute("data/demo_1", "num_samples", np.zeros(1000)), "must be one text or number"),
    "array-of-texts": (attribute("data", "env_args", ["{}"] * 1000), "attribute 'env_args' of '/data' must be"),
    "void-attribute": (attribute("data", "env_args", np.void(pickle.dumps([1]))), "must be one text or number"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ROBOMIMIC)
def test_damage_to_robomimics_layout(tmp_path: Path, kind: str) -> None:
    path, (damage, message) = tmp_path / "data.hdf5", ROBOMIMIC[kind]
    write_robomimic(path, random_demonstrations(WIDTHS, 7), {}, {})
    with h5py.File(path, "a") as file:
        damage(file)
    refused(message, read_robomimic, path, tuple(WIDTHS), 7)


def metadata(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        values = json.loads((folder / "metadata.json").read_text())
        (folder / "metadata.json").write_text(json.dumps(values | changes))

    return damage


def inside(damage: Callable[[h5py.File], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        with h5py.File(folder / "main_data.hdf5", "a") as file:
            damage(file)

    return apply


MINARI = {
    "no-metadata": (lambda folder: (folder / "metadata.json").unlink(), "metadata.json: unreadable"),
    "metadata": (lambda folder: (folder / "metadata.json").write_bytes(pickle.dumps([1])), "metadata.json: unreadable"),
    "arrow": (metadata(data_format="arrow"), "in format 'arrow'; only 'hdf5'"),
    "episodes": (metadata(total_episodes=4), "announces 4 episodes but it holds 3"),
    "steps": (metadata(total_steps=18), "announces 18 steps but it holds 17"),
    "none": (inside(lambda file: [file.__delitem__(name) for name in list(file)]), "holds no episode_0"),
    "dictionary": (inside(instead("episode_1/observations", lambda file, name: file.create_group(name))), "an array"),
    "no-last": (inside(replaced("episode_1/observations", lambda v: v[:-1])), "has 3 observations for 3 steps"),
    "short": (inside(replaced("episode_1/truncations", lambda v: v[:-1])), "lengths differ"),
    "nan": (inside(replaced("episode_0/observations", put((4, 1), np.nan))), "'episode_0/observations' at step 4: nan"),
    "action": (inside(replaced("episode_2/actions", put((0, 1), 2.0))), "'episode_2/actions' at step 0: 2.0 is"),
    "goes-on": (inside(replaced("episode_2/terminations", put(3, 1.0))), "'episode_2' goes on after its end"),
    "linked": (inside(instead("episode_1", link(h5py.ExternalLink("x", "/")))), "'episode_1' must be a group"),
    "truncated": (lambda folder: os.truncate(folder / "main_data.hdf5", 3000), "unreadable HDF5 file"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MINARI)
def test_damage_to_minaris_layout(tmp_path: Path, kind: str) -> None:
    damage, message = MINARI[kind]
    write_published_minari(tmp_path / "set", random_episodes())
    damage(tmp_path / "set" / "data")
    refused(message, read_minari, tmp_path / "set", 4, 2)


@pytest.mark.parametrize("content", ["truncated", "pickle", "empty", "missing", "folder"])
def test_what_is_no_hdf5_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "data.hdf5"
    write_d4rl(path, random_episodes((4000, 3000)), {})
    whole = path.read_bytes()
    path.unlink()
    if content == "folder":
        path.mkdir()
    elif content != "missing":
        path.write_bytes({"truncated": whole[: len(whole) // 2], "pickle": pickle.dumps([1]), "empty": b""}[content])
    refused("unreadable HDF5 file", read_d4rl, path)
    refused("unreadable HDF5 file|a directory without main_data.hdf5", read_task_data, "toy", path)


def test_what_has_none_of_the_layouts(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "other.hdf5", "w") as file:
        file["x"] = 1
    refused("neither D4RL's layout .* but x", layout_of, tmp_path / "other.hdf5")
    write_published_minari(tmp_path / "set", random_episodes())
    refused("name the directory that holds it", layout_of, tmp_path / "set" / "data" / "main_data.hdf5")


@pytest.mark.parametrize("layout", ["d4rl", "robomimic"])
def test_flipped_bytes_never_pass_as_other_numbers(tmp_path: Path, layout: str) -> None:
    path, rng = tmp_path / "data.hdf5", np.random.default_rng(0)
    if layout == "d4rl":
        write_d4rl(path, random_episodes((400, 300)), {})
    else:
        write_robomimic(path, random_demonstrations(WIDTHS, 7, (40, 30)), {}, {})

    def digest() -> str:
        dataset = read_d4rl(path) if layout == "d4rl" else read_robomimic(path, tuple(WIDTHS))
        return dataset.episodes.content_digest()

    whole, expected = path.read_bytes(), digest()
    for _ in range(60):
        damaged = bytearray(whole)
        for position in rng.integers(len(whole), size=3):
            damaged[position] ^= 1 << rng.integers(8)
        path.write_bytes(bytes(damaged))
        try:
            assert digest() == expected
        except ValueError as error:
            assert "\n" not in str(error)


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file grows beyond `size` bytes."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "out" / "data.hdf5"
    write_d4rl(path, random_episodes(), {})
    whole = path.read_bytes()
    long = random_demonstrations(WIDTHS, 7, [2000] * 4)
    for write in (
        lambda: write_d4rl(path, random_episodes((4000,)), {}),
        lambda: write_robomimic(path, long, {}, {}),
        lambda: make_dataset(get_dataset("toy"), path),
        lambda: make_dataset(get_dataset("toy")),
    ):
        with full_disk(20_000), pytest.raises(OSError, match=r"cannot be written \(File too large\)") as caught:
            write()
        assert "\n" not in str(caught.value)
        assert os.listdir(path.parent) == ["data.hdf5"]
        assert path.read_bytes() == whole
    assert not list((tmp_path / "cache").rglob("*.*"))


def test_an_import_that_fails_leaves_nothing(tmp_path: Path) -> None:
    source = make_dataset(get_dataset("toy"), tmp_path / "toy.hdf5")
    with full_disk(20_000), pytest.raises(OSError, match="too large"):
        import_file("toy", source)
    write_d4rl(tmp_path / "other.hdf5", random_episodes(observation_dim=2), {})
    refused(f"{tmp_path}/other.hdf5: not 'toy' as made today", import_file, "toy", tmp_path / "other.hdf5")
    refused("unreadable HDF5 file", import_file, "toy", tmp_path / "missing.hdf5")
    assert not os.listdir(dataset_path("toy").parent)
    import_file("toy", source)
    assert os.listdir(dataset_path("toy").parent) == ["toy.hdf5"]


def test_a_demonstration_that_is_wrong_is_never_written(tmp_path: Path) -> None:
    good = random_demonstrations(WIDTHS, 7)[0]

    def bad(**changes: Any) -> list[Demonstration]:
        return [good, Demonstration(**(vars(good) | changes))]

    for demonstrations, message in (
        ([], "no demonstration"),
        (bad(rewards=good.rewards[:-1]), "data/demo_1/rewards must have 5 steps, at least 1, got 4"),
        (bad(actions=good.actions * 3), "data/demo_1/actions at step .* outside"),
        (bad(states=good.states * np.nan), "data/demo_1/states at step 0: nan"),
        (bad(dones=good.dones * 2), "data/demo_1/dones at step 4: must be 0 or 1"),
    ):
        refused(message, write_robomimic, tmp_path / "data.hdf5", demonstrations, {}, {})
    with pytest.raises(TypeError):
        write_d4rl(tmp_path / "data.hdf5", random_episodes(), {"bad": object()})
    assert not os.listdir(tmp_path)


def test_a_damaged_record_of_digests(tmp_path: Path) -> None:
    path = dataset_path("lift")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    for content, message in (
        (b"\x80\x04", "unreadable"),
        (b"[]", "not a JSON object"),
        (b'{"lift": 3}', "no digest in"),
    ):
        digests_path().write_bytes(content)
        refused(f"digests.json: {message}", load_data, "lift")
        refused(f"digests.json: {message}", record_digest, "lift", "here")
