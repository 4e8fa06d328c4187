"""Every layout is read into the same episodes: ours, and those of D4RL, robomimic and Minari as published."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from data_cases import (
    LENGTHS,
    observation_widths,
    random_demonstrations,
    random_episodes,
    write_published_d4rl,
    write_published_minari,
    write_published_robomimic,
)

from benchmark.data import registry
from benchmark.data.access import load_data, missing_data_message, read_task_data, verify_data
from benchmark.data.d4rl import read_d4rl, write_d4rl
from benchmark.data.episodes import COLUMNS, Episodes
from benchmark.data.files import digests_path, recorded_digest
from benchmark.data.minari import read_minari
from benchmark.data.obtain import import_file
from benchmark.data.registry import DATASETS, LocalData, PublishedData, dataset_path
from benchmark.data.robomimic import Demonstration, read_robomimic, write_robomimic
from benchmark.envs import ROBOSUITE
from benchmark.envs.robosuite import OBSERVATION_KEYS, default_arguments
from benchmark.tasks import get_task

PUBLISHED = [name for name, data in DATASETS.items() if isinstance(data, PublishedData)]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTPR_BENCH_CACHE", str(tmp_path / "cache"))


def assert_same(found: Episodes, expected: Episodes) -> None:
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), strict=True)


def joined(demonstrations: list[Demonstration], keys: tuple[str, ...]) -> Episodes:
    """What a reader must make of the demonstrations."""
    stops = np.cumsum([len(demonstration.actions) for demonstration in demonstrations])
    timeouts = np.zeros(stops[-1], dtype=bool)
    timeouts[stops - 1] = True
    rows = [np.concatenate([d.observations[key] for key in keys], axis=1) for d in demonstrations]
    return Episodes(
        observations=np.concatenate(rows).astype(np.float32),
        actions=np.concatenate([d.actions for d in demonstrations]),
        rewards=np.concatenate([d.rewards for d in demonstrations]).astype(np.float32),
        terminals=np.zeros_like(timeouts),
        timeouts=timeouts,
    )


def make_published(name: str, path: Path) -> Episodes:
    """A small file in the exact layout that the registered address serves, and what it holds."""
    task = get_task(name)
    if task.environment in ROBOSUITE:
        demonstrations = random_demonstrations(observation_widths(name), task.action_dim, (4, 6, 5))
        write_published_robomimic(path, demonstrations, default_arguments(name))
        return joined(demonstrations, OBSERVATION_KEYS[name])
    kitchen = name.startswith("kitchen")
    timed_out = () if kitchen else (1,)
    episodes = random_episodes(LENGTHS, timed_out, not kitchen, task.observation_dim, task.action_dim)
    write_published_d4rl(path, episodes, kitchen)
    return episodes


def accept_small_files(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drop the registered counts and digest, which only the real file has."""
    data = dataclasses.replace(DATASETS[name], episodes=None, steps=None, sha256=None)
    monkeypatch.setitem(registry.DATASETS, name, data)


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_published_layout_is_read_with_its_widths(name: str, tmp_path: Path) -> None:
    path = tmp_path / "file.hdf5"
    expected = make_published(name, path)
    dataset = read_task_data(name, path)
    assert_same(dataset.episodes, expected)
    task = get_task(name)
    assert dataset.episodes.observations.shape[1] == task.observation_dim
    assert dataset.episodes.actions.shape[1] == task.action_dim
    assert dataset.digest == expected.content_digest()
    if task.environment in ROBOSUITE:
        assert json.loads(str(dataset.attributes["env_args"])) == default_arguments(name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_published_dataset_is_imported_known_again_and_loaded(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept_small_files(name, monkeypatch)
    expected = make_published(name, tmp_path / "file.hdf5")
    import_file(name, tmp_path / "file.hdf5")
    assert_same(load_data(name).episodes, expected)
    assert set(os.listdir(dataset_path(name).parent)) == {f"{name}.hdf5", "digests.json", "digests.lock"}
    with h5py.File(dataset_path(name), "a") as file:  # a change that no check of the contents can notice
        file.attrs["note"] = 1
    with pytest.raises(ValueError, match=r"SHA-256 \w{12}... instead of \w{12}... as recorded in .*digests.json"):
        load_data(name)
    with pytest.raises(ValueError, match="as recorded in"):
        import_file(name, dataset_path(name))


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_files_themselves_are_asked_for(name: str, tmp_path: Path) -> None:
    make_published(name, tmp_path / "file.hdf5")
    data = DATASETS[name]
    assert isinstance(data, PublishedData)
    expected = "instead of .* as registered" if data.sha256 else "3 episodes instead of 300"
    with pytest.raises(ValueError, match=expected):
        import_file(name, tmp_path / "file.hdf5")
    assert not dataset_path(name).exists()
    assert recorded_digest(name) is None


def test_kitchen_files_may_have_timeouts_and_others_must(tmp_path: Path) -> None:
    episodes = random_episodes(observation_dim=60, action_dim=9)
    write_published_d4rl(tmp_path / "with.hdf5", episodes)
    assert_same(read_task_data("kitchen-complete-v0", tmp_path / "with.hdf5").episodes, episodes)
    episodes = random_episodes(observation_dim=11, action_dim=3)
    write_published_d4rl(tmp_path / "without.hdf5", episodes, kitchen=True)
    with pytest.raises(ValueError, match="lacks 'timeouts'"):
        read_task_data("hopper-medium-v2", tmp_path / "without.hdf5")


def test_counts_that_differ_are_named_with_the_expected_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "hopper-medium-v2"
    make_published(name, tmp_path / "file.hdf5")
    monkeypatch.setitem(registry.DATASETS, name, dataclasses.replace(DATASETS[name], sha256=None))
    with pytest.raises(ValueError, match="3 episodes instead of 2187, 17 steps instead of 1000000"):
        verify_data(name, tmp_path / "file.hdf5")


def test_a_file_of_another_task_is_refused(tmp_path: Path) -> None:
    make_published("walker2d-medium-v2", tmp_path / "walker.hdf5")
    make_published("lift", tmp_path / "lift.hdf5")
    make_published("can", tmp_path / "can.hdf5")
    for name, file, message in (
        ("hopper-medium-v2", "walker.hdf5", "'observations' must have width 11, got 17"),
        ("hopper-medium-v2", "lift.hdf5", "layout of robomimic cannot hold data of 'hopper-medium-v2'"),
        ("lift", "walker.hdf5", "layout of d4rl cannot hold data of 'lift'"),
        ("lift", "can.hdf5", "observations must have width 19, got 23"),
        ("transport", "can.hdf5", "lacks 'data/demo_0/obs/robot1_eef_pos'|width 14, got 7"),
    ):
        with pytest.raises(ValueError, match=message):
            read_task_data(name, tmp_path / file)


def test_every_dataset_has_a_task_and_every_address_is_http() -> None:
    for name, data in DATASETS.items():
        assert get_task(name).name == data.task == name
        if isinstance(data, PublishedData):
            assert data.address.startswith("http://")
            assert data.licence and data.size > 0
            assert data.sha256 is None or len(bytes.fromhex(data.sha256)) == 32
        elif data.layout == "robomimic":
            assert data.environment in ROBOSUITE
    assert sum(isinstance(data, LocalData) for data in DATASETS.values()) == 8


@pytest.mark.parametrize("cut", [False, True])
def test_round_trip(tmp_path: Path, cut: bool) -> None:
    path, episodes = tmp_path / "a" / "data.hdf5", random_episodes(cut=cut)
    write_d4rl(path, episodes, {"seed": 3, "data_digest": "abc"})
    dataset = read_d4rl(path, 4, 2)
    assert_same(dataset.episodes, episodes)
    assert dataset.digest == "abc"
    assert dataset.attributes["seed"] == 3
    assert dataset.episodes.lengths.tolist() == [5, 3, 9]
    np.testing.assert_allclose(dataset.episodes.returns[1], episodes.rewards[5:8].sum(dtype=np.float64), rtol=1e-6)
    assert os.listdir(path.parent) == ["data.hdf5"]


def test_small_excess_of_an_action_is_accepted(tmp_path: Path) -> None:
    episodes = random_episodes()
    episodes.actions[3, 0] = 1.000005
    write_d4rl(tmp_path / "data.hdf5", episodes, {})
    read_d4rl(tmp_path / "data.hdf5")


def test_window_starts_never_cross_an_episode() -> None:
    episodes = random_episodes((5, 3, 9, 4))
    edges = episodes.boundaries
    for size in (1, 3, 4, 9):
        expected = [s for a, b in itertools.pairwise(edges) for s in range(a, b - size + 1)]
        assert episodes.window_starts(size).tolist() == expected
    for size in (0, 10):
        with pytest.raises(ValueError, match=r"window size|no episode has 10 steps; the longest has 9"):
            episodes.window_starts(size)


def test_robomimic_round_trip(tmp_path: Path) -> None:
    widths, path = {"object": 10, "robot0_eef_pos": 3}, tmp_path / "data.hdf5"
    demonstrations = random_demonstrations(widths, 7, [3] * 12)  # demo_10 comes after demo_9, not after demo_1
    write_robomimic(path, iter(demonstrations), {"env_name": "Lift"}, {"data_digest": "abc", "seed": 2})
    for keys in (("object", "robot0_eef_pos"), ("robot0_eef_pos", "object"), ("object",)):
        assert_same(read_robomimic(path, keys, 7).episodes, joined(demonstrations, keys))
    dataset = read_robomimic(path, ("object",))
    assert dataset.digest == "abc"
    assert dataset.attributes["seed"] == 2
    assert json.loads(str(dataset.attributes["env_args"])) == {"env_name": "Lift"}
    with h5py.File(path) as file:
        assert file["mask/train"][()].tolist() == [b"demo_%d" % i for i in (*range(9), 10, 11)]
        assert file["mask/valid"][()].tolist() == [b"demo_9"]
        assert file["data"].attrs["total"] == 36
        np.testing.assert_array_equal(file["data/demo_3/states"], demonstrations[3].states)
        np.testing.assert_array_equal(
            file["data/demo_3/next_obs/object"][:2], demonstrations[3].observations["object"][1:]
        )


@pytest.mark.robosuite
def test_robomimics_own_reader_accepts_what_is_written(tmp_path: Path) -> None:
    reader = pytest.importorskip("robomimic.utils.dataset", reason="robomimic and tqdm are optional")
    pytest.importorskip("robomimic.utils.obs_utils").initialize_obs_utils_with_obs_specs(
        {"obs": {"low_dim": ["object", "robot0_eef_pos"]}}
    )
    widths = {"object": 10, "robot0_eef_pos": 3}
    demonstrations = random_demonstrations(widths, 7, [4] * 11)
    write_robomimic(tmp_path / "data.hdf5", demonstrations, default_arguments("lift"), {})
    for mask, numbers in ((None, range(11)), ("valid", [9])):
        dataset = reader.SequenceDataset(
            hdf5_path=str(tmp_path / "data.hdf5"),
            obs_keys=tuple(widths),
            dataset_keys=("actions", "rewards", "dones"),
            seq_length=2,
            hdf5_cache_mode="low_dim",
            filter_by_attribute=mask,
            load_next_obs=True,
        )
        assert dataset.n_demos == len(numbers)
        assert len(dataset) == 4 * len(numbers)
        chosen = demonstrations[numbers[-1]]
        window = dataset[len(dataset) - 4]
        np.testing.assert_array_equal(window["actions"], chosen.actions[:2])
        np.testing.assert_array_equal(window["obs"]["object"], chosen.observations["object"][:2])
        np.testing.assert_array_equal(window["next_obs"]["object"], chosen.observations["object"][1:3])


def test_minari_layout_is_read(tmp_path: Path) -> None:
    episodes = random_episodes()
    write_published_minari(tmp_path / "set", episodes)
    for place in (tmp_path / "set", tmp_path / "set" / "data"):
        assert_same(read_minari(place, 4, 2).episodes, episodes)


def test_a_minari_episode_without_an_end_was_stopped_there(tmp_path: Path) -> None:
    write_published_minari(tmp_path / "set", random_episodes(cut=True))
    assert read_minari(tmp_path / "set").episodes.timeouts[-1]


def test_minari_import_becomes_a_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, episodes = "hopper-medium-v2", random_episodes(observation_dim=11, action_dim=3)
    write_published_minari(tmp_path / "set", episodes)
    with pytest.raises(ValueError, match="3 episodes instead of 2187"):
        import_file(name, tmp_path / "set")
    data = dataclasses.replace(DATASETS[name], episodes=3, steps=17)  # the digest stays that of D4RL's own file
    monkeypatch.setitem(registry.DATASETS, name, data)
    import_file(name, tmp_path / "set")
    assert_same(load_data(name).episodes, episodes)
    assert json.loads(digests_path().read_text())[name]["origin"] == str(tmp_path / "set")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Minari misses an author and the like
def test_what_minari_writes_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    minari = pytest.importorskip("minari", reason="the minari package is optional")
    import gymnasium

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    box = gymnasium.spaces.Box(-1, 1, (3,))
    episodes = random_episodes(observation_dim=3, action_dim=3)
    buffers = [
        minari.data_collector.EpisodeBuffer(
            id=i,
            observations=np.concatenate([episodes.observations[a:b], episodes.observations[:1]]),
            actions=episodes.actions[a:b],
            rewards=episodes.rewards[a:b],
            terminations=episodes.terminals[a:b],
            truncations=episodes.timeouts[a:b],
        )
        for i, (a, b) in enumerate(itertools.pairwise(episodes.boundaries))
    ]
    minari.create_dataset_from_buffers("ours/hopper-v0", buffers, observation_space=box, action_space=box)
    assert_same(read_minari(tmp_path / "ours" / "hopper-v0").episodes, episodes)


def test_missing_data_is_one_message_with_all_there_is_to_do() -> None:
    message = missing_data_message(["hopper-medium-v2", "lift", "toy", "mine"])
    for part in ("hopper-medium-v2: 152.8 MB, http://rail.eecs", "lift: about 46 MB, http://downloads.cs.stanford.edu",
                 str(dataset_path("lift")), "data get hopper-medium-v2 lift", "run --suite local", "data make toy",
                 "mine: not a dataset"):  # fmt: skip
        assert part in message
    with pytest.raises(ValueError, match="data get lift") as caught:
        load_data("lift")
    assert "\n" not in str(caught.value)


def test_a_million_steps_are_read_in_seconds(tmp_path: Path) -> None:
    path = tmp_path / "data.hdf5"
    write_published_d4rl(path, random_episodes([1000] * 1000, range(1000), False, 11, 3))
    started = time.perf_counter()
    assert len(read_task_data("hopper-medium-v2", path).episodes.lengths) == 1000
    assert time.perf_counter() - started < 10.0  # 1.3 s alone on one core


def test_three_hundred_demonstrations_are_read_in_a_second(tmp_path: Path) -> None:
    path, widths = tmp_path / "data.hdf5", observation_widths("can")
    write_published_robomimic(path, random_demonstrations(widths, 7, [200] * 300), {})
    started = time.perf_counter()
    assert len(read_robomimic(path, tuple(widths), 7).episodes.lengths) == 300
    assert time.perf_counter() - started < 10.0  # 0.6 s alone on one core
