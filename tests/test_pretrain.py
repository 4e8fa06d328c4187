"""Pre-training is reproducible and cached; policy files load only where they are what they claim to be."""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmark import cloning, policies, pretrain, run
from benchmark.data.episodes import Dataset, Episodes
from benchmark.envs.toy import toy_demonstrations
from benchmark.policies import Normalizer, load_pretrained, policy_path, unpack
from benchmark.store import load_checkpoint, read_json, write_bytes, write_json
from benchmark.tasks import TASKS, PretrainSettings, Task
from otpr.diffusion import DiffusionPolicy, SamplerSettings

SHIPPED = sorted(path.stem for path in policies.FOLDER.glob("*.json"))
TOY = dataclasses.replace(TASKS["toy"], pretraining=PretrainSettings(gradient_steps=40, ema_start=10, batch_size=32))


@pytest.fixture(autouse=True)
def _one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("OTPR_BENCH_CACHE", str(tmp_path / "cache"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    episodes = Episodes(**toy_demonstrations(np.random.default_rng(0), 30))
    return Dataset(episodes, {}, episodes.content_digest())


def trained(dataset: Dataset, task: Task = TOY, seed: int = 0) -> dict[str, Any]:
    return cloning.train(task, dataset.episodes, dataset.digest, torch.Generator().manual_seed(seed)).contents


def saved(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def test_normalizer_inverts_itself_and_spans_the_data() -> None:
    rng = np.random.default_rng(0)
    low, high = rng.uniform(-3, -1, size=5).astype(np.float32), rng.uniform(1, 3, size=5).astype(np.float32)
    normalizer = Normalizer(low, high, low, high)
    actions = rng.uniform(low, high, size=(7, 4, 5)).astype(np.float32)
    normalized = normalizer.normalize_actions(actions)
    assert normalized.dtype == np.float32
    np.testing.assert_allclose(normalizer.denormalize_actions(normalized), actions, atol=2e-6)
    np.testing.assert_array_equal(normalizer.denormalize_actions(np.full((1, 1, 5), 7.0))[0, 0], high)
    np.testing.assert_array_equal(normalizer.denormalize_actions(np.full((1, 1, 5), -7.0))[0, 0], low)
    np.testing.assert_allclose(normalizer.normalize_observations(np.stack([low, high])), [[-1] * 5, [1] * 5], atol=1e-6)
    assert normalizer.normalize_observations(high[None].astype(np.float64) + 10).min() > 1  # not clipped
    clipping = dataclasses.replace(normalizer, observation_clip=1.5)
    assert clipping.normalize_observations(np.stack([low - 10, high + 10])).tolist() == [[-1.5] * 5, [1.5] * 5]
    inside = rng.uniform(low, high, size=(7, 5))
    np.testing.assert_array_equal(clipping.normalize_observations(inside), normalizer.normalize_observations(inside))


def test_the_kitchen_sees_knobs_that_its_data_never_touch_within_bounds() -> None:
    local, published = (TASKS[name] for name in ("kitchen-local", "kitchen-complete-v0"))
    assert load_pretrained(local).normalizer.observation_clip == local.observation_clip == 5
    assert published.observation_clip == math.inf


def test_a_constant_dimension_stays_finite() -> None:
    constant = np.full(1, 0.1, dtype=np.float32)
    normalizer = Normalizer(constant, constant, constant, constant)
    assert normalizer.normalize_observations(constant[None].astype(np.float64))[0, 0] == -1
    for value in (-1.0 / 3, 0.7, 1.7):  # of which float32 holds none
        constant = np.full(1, value, dtype=np.float32)
        normalizer = Normalizer(constant, constant, constant, constant)
        assert normalizer.normalize_observations(np.full((1, 1), value))[0, 0] == -1


def test_windows_hold_consecutive_steps_of_one_episode(dataset: Dataset) -> None:
    episodes = dataset.episodes
    normalizer = cloning.fit_normalizer(episodes)
    windows = cloning.Windows(episodes, normalizer, 4)
    episode = np.repeat(np.arange(len(episodes.lengths)), episodes.lengths)
    starts = windows.starts.numpy()
    assert len(starts) == (episodes.lengths - 3).sum()
    assert (episode[starts] == episode[starts + 3]).all()
    actions, observations = windows.batch(200, torch.Generator().manual_seed(0))
    rows = windows.starts[torch.randint(len(starts), (200,), generator=torch.Generator().manual_seed(0))].numpy()
    np.testing.assert_array_equal(observations, normalizer.normalize_observations(episodes.observations[rows]))
    for offset in range(4):
        np.testing.assert_array_equal(actions[:, offset], normalizer.normalize_actions(episodes.actions[rows + offset]))


def test_the_papers_gym_tasks_leave_out_episodes_without_a_positive_return(dataset: Dataset) -> None:
    assert [name for name, task in TASKS.items() if task.pretraining.positive_returns] == [
        "hopper-medium-v2", "walker2d-medium-v2", "halfcheetah-medium-v2",
    ]  # fmt: skip
    episodes = dataset.episodes
    good = episodes.returns > 0
    assert 0 < good.sum() < len(good)
    kept = episodes.of_positive_return()
    np.testing.assert_array_equal(kept.lengths, episodes.lengths[good])
    np.testing.assert_array_equal(kept.returns, episodes.returns[good])
    settings = dataclasses.replace(TOY.pretraining, positive_returns=True)
    weights = trained(dataset, dataclasses.replace(TOY, pretraining=settings))
    assert saved(weights) == saved(trained(dataclasses.replace(dataset, episodes=kept)))
    worst = dataclasses.replace(episodes, rewards=-episodes.rewards)
    with pytest.raises(ValueError, match="none of 30 episodes has a return above 0"):
        worst.of_positive_return()


def test_learning_rate_falls_along_a_cosine() -> None:
    settings = PretrainSettings(gradient_steps=100)
    rates = [cloning.cosine_rate(settings, step) for step in range(100)]
    assert rates[0] == settings.learning_rate
    assert all(a > b for a, b in itertools.pairwise(rates))
    assert rates[50] == pytest.approx((settings.learning_rate + settings.final_learning_rate) / 2)
    assert settings.final_learning_rate < rates[-1] < 1.01 * settings.final_learning_rate


def test_same_seed_same_bits(dataset: Dataset) -> None:
    first, second, other = trained(dataset), trained(dataset), trained(dataset, seed=1)
    assert saved(first) == saved(second)
    assert all(torch.equal(first["ema"][name], second["ema"][name]) for name in first["ema"])
    assert any(not torch.equal(first["ema"][name], other["ema"][name]) for name in first["ema"])


def test_an_interrupted_training_goes_on_to_the_same_bits(dataset: Dataset, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(cloning, "CHECKPOINT_SECONDS", 0.0)
    place, reports = tmp_path / "part.pt", []
    ends: list[int] = []  # numbers of reports at which attempts are interrupted
    losses = []  # one for each gradient step that was taken
    take = DiffusionPolicy.bc_losses
    monkeypatch.setattr(DiffusionPolicy, "bc_losses", lambda *arguments: losses.append(0) or take(*arguments))

    def note(step: int, loss: float) -> None:
        reports.append((step, loss))
        if ends and len(reports) == ends[0]:
            raise KeyboardInterrupt

    spent: list[float] = []  # seconds of a training that came to its end

    def attempt(checkpoint: Path | None = place) -> dict[int, Any]:
        reports.clear()
        losses.clear()
        generator = torch.Generator().manual_seed(0)
        trained = cloning.train(TOY, dataset.episodes, dataset.digest, generator, note, checkpoint, 3)
        spent.append(trained.seconds)
        return trained.averages

    whole = attempt(None)
    assert list(whole) == [13, 26, 40]
    ends += [7, 15]
    for steps in (14, 17):  # of which the last is taken again
        with pytest.raises(KeyboardInterrupt):
            attempt()
        assert len(losses) == steps
        ends.pop(0)
    earlier = load_checkpoint(place)["seconds"]
    assert saved(attempt()) == saved(whole) and len(losses) == 11
    assert spent[-1] > earlier > 0
    assert [step for step, _ in reports] == list(range(2, 41, 2))  # those of earlier attempts too
    place.write_bytes(b"damaged")
    assert saved(attempt()) == saved(whole) and len(losses) == 40
    monkeypatch.setattr(torch, "__version__", "another")  # which may round otherwise
    assert saved(attempt()) == saved(whole) and len(losses) == 40


def test_what_is_kept_of_a_training_goes_with_its_end(dataset: Dataset, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(cloning, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(pretrain, "EVALUATION_EPISODES", 4)

    def interrupt(step: int, loss: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain.make_policy(TOY, dataset, 0, interrupt)
    (kept,) = (tmp_path / "cache" / "policies").glob("*.pt")
    path, _ = pretrain.make_policy(TOY, dataset, 0)
    assert kept.name == f"{path.stem}.unfinished.pt" and not kept.exists()


def test_the_average_is_the_model_until_it_starts_and_lags_afterwards(dataset: Dataset) -> None:
    def weights(ema_start: int, ema_decay: float) -> torch.Tensor:
        settings = dataclasses.replace(TOY.pretraining, ema_start=ema_start, ema_decay=ema_decay)
        return trained(dataset, dataclasses.replace(TOY, pretraining=settings))["ema"]["network.mlp_mean.layers.0.bias"]

    assert torch.equal(weights(1000, 0.9), weights(1000, 0.5))
    assert torch.equal(weights(0, 0.0), weights(1000, 0.9))
    assert not torch.equal(weights(10, 0.9), weights(1000, 0.9))


def test_training_lowers_the_loss(dataset: Dataset) -> None:
    settings = dataclasses.replace(TOY.pretraining, gradient_steps=400)
    losses: list[float] = []
    task = dataclasses.replace(TOY, pretraining=settings)
    generator = torch.Generator().manual_seed(0)
    cloning.train(task, dataset.episodes, dataset.digest, generator, lambda _, loss: losses.append(loss))
    assert len(losses) == 20
    assert losses[-1] < 0.5 * losses[0]


def test_second_call_comes_from_the_cache(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "EVALUATION_EPISODES", 4)
    path, cached = pretrain.make_policy(TOY, dataset, 0)
    assert not cached
    first = path.read_bytes()
    monkeypatch.setattr(pretrain, "train", lambda *_: pytest.fail("trained again"))
    assert pretrain.make_policy(TOY, dataset, 0) == (path, True)
    assert path.read_bytes() == first
    assert set(read_json(path.with_suffix(".json"))["start_return"]) == set(pretrain.SAMPLERS)
    other = dataclasses.replace(TOY, pretraining=dataclasses.replace(TOY.pretraining, batch_size=31))
    keys = [pretrain.training_key(task, digest, seed) for task, digest, seed in
            ((TOY, "a", 0), (TOY, "a", 1), (TOY, "b", 0), (other, "a", 0))]  # fmt: skip
    assert len(set(keys)) == 4


def test_a_task_of_the_papers_starts_from_the_average_nearest_their_start(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain, "CHECKPOINTS", 4)
    monkeypatch.setattr(pretrain, "EVALUATION_EPISODES", 4)
    trained = cloning.train(TOY, dataset.episodes, dataset.digest, torch.Generator().manual_seed(0), averages=4)
    assert list(trained.averages) == [10, 20, 30, 40]
    assert pretrain.choose_checkpoint(TOY, trained) == (40, {})
    assert not torch.equal(*(trained.averages[step]["network.mlp_mean.layers.0.bias"] for step in (10, 20)))
    assert trained.at(10)["ema"] is trained.averages[10] and trained.at(40) == trained.contents

    returns = iter([0.1, 0.5, 0.3, 0.9] * 2)
    task, played = dataclasses.replace(TOY, published_start=0.35), []

    def evaluate_start(task: Task, pretrained: Any, *_: Any) -> Any:
        played.append(pretrained.digest)
        mean = next(returns, 0.0)
        return SimpleNamespace(row=lambda *_: {"return_mean": mean, "success_rate": mean, "episodes": 4},
                               returns=np.array([mean]))  # fmt: skip

    monkeypatch.setattr(pretrain, "evaluate_start", evaluate_start)
    assert pretrain.choose_checkpoint(task, trained) == (30, {"10": 0.1, "20": 0.5, "30": 0.3, "40": 0.9})
    assert len(set(played)) == 4
    path, _ = pretrain.make_policy(task, dataset, 0)
    card = read_json(path.with_suffix(".json"))
    assert (card["checkpoint"], card["published_start"], card["checkpoint_starts"]["30"]) == (30, 0.35, 0.3)
    kept = load_pretrained(task, path=path).policy.state_dict()
    path, _ = pretrain.make_policy(TOY, dataset, 0)
    last = load_pretrained(TOY, path=path).policy.state_dict()
    assert any(not torch.equal(kept[name], last[name]) for name in last)


def test_evaluation_repeats_itself(dataset: Dataset) -> None:
    pretrained = load_pretrained(TASKS["toy"])
    arguments = (TASKS["toy"], pretrained, 64, SamplerSettings(kind="ddim"))
    first, second = pretrain.evaluate_start(*arguments).returns, pretrain.evaluate_start(*arguments).returns
    np.testing.assert_array_equal(first, second)
    assert 0.1 < first.mean() < 0.7


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_policies_match_their_cards(name: str) -> None:
    task = TASKS[name]
    pretrained = load_pretrained(task)
    card = read_json(policy_path(task).with_suffix(".json"))
    assert policy_path(task).stat().st_size <= 2_500_000
    assert card["data_digest"] == pretrained.data_digest
    assert dataclasses.asdict(task.pretraining) | card["settings"] == dataclasses.asdict(task.pretraining)
    chunk = pretrained.policy.sample(torch.zeros(3, task.observation_dim), False, torch.Generator().manual_seed(0))
    assert chunk.shape == (3, task.action_horizon, task.action_dim)


def install(path: Path, content: bytes, digest: str | None = None) -> Path:
    write_bytes(path, content)
    write_json(path.with_suffix(".json"), {"sha256": digest or policies.hashlib.sha256(content).hexdigest()})
    return path


def refused(path: Path, message: str, task: Task = TOY) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_pretrained(task, path=path)
    assert "\n" not in str(caught.value)


def test_loader_refuses_what_is_not_the_file_of_its_card(dataset: Dataset, tmp_path: Path) -> None:
    content = saved(trained(dataset))
    refused(tmp_path / "missing.pt", "no pre-trained policy")
    assert load_pretrained(TOY, path=install(tmp_path / "good.pt", content)).data_digest == dataset.digest
    refused(install(tmp_path / "other.pt", content, "0" * 64), "not the file that its card describes")
    install(tmp_path / "bare.pt", content).with_suffix(".json").unlink()
    refused(tmp_path / "bare.pt", "unreadable")
    refused(install(tmp_path / "truncated.pt", content[: len(content) // 2]), "unreadable policy file")
    refused(install(tmp_path / "empty.pt", b""), "unreadable policy file")
    refused(install(tmp_path / "task.pt", content), "is a policy of task 'toy', not of 'hopper", TASKS["hopper-local"])


class Payload:
    """Creates a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("pack", [saved, lambda state: pickle.dumps(state, protocol=2)], ids=["zip", "pickle"])
def test_loader_executes_nothing(tmp_path: Path, pack: Callable[[Any], bytes]) -> None:
    content = pack({"format": 1, "task": "toy", "ema": Payload(tmp_path / "executed")})
    refused(install(tmp_path / "payload.pt", content), "unreadable policy file")
    assert not (tmp_path / "executed").exists()


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "format": (lambda s: s.update(format=2), "not a policy file of format 1"),
    "task": (lambda s: s.update(task="lift"), "is a policy of task 'lift', not of 'toy'"),
    "steps": (lambda s: s.update(denoising_steps=10), "trained with 10 denoising steps, asked for 20"),
    "no-weights": (lambda s: s.pop("ema"), "its weights are not those"),
    "weight-missing": (lambda s: s["ema"].pop("network.mlp_mean.layers.0.bias"), "its weights are not those"),
    "weight-shape": (
        lambda s: s["ema"].update({"network.mlp_mean.layers.0.bias": torch.zeros(7)}),
        r"layers.0.bias must be torch.float32 \(64,\), got torch.float32 \(7,\)",
    ),
    "weight-nan": (lambda s: s["ema"]["network.mlp_mean.layers.0.bias"].fill_(torch.nan), "not finite"),
    "weight-type": (lambda s: s["ema"].update({"network.mlp_mean.layers.0.bias": 3}), "got int"),
    "statistics": (lambda s: s["normalization"].pop("action_min"), "its normalisation must hold"),
    "statistics-type": (
        lambda s: s["normalization"].update(action_min=torch.zeros(2, dtype=torch.float64)),
        "action_min must be torch.float32",
    ),
    "data": (lambda s: s.pop("data_digest"), "holds no data digest"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_loader_refuses_contents_that_do_not_fit(dataset: Dataset, kind: str) -> None:
    state, (change, message) = trained(dataset), CHANGES[kind]
    change(state)
    with pytest.raises(ValueError, match=message) as caught:
        unpack(TOY, saved(state), SamplerSettings(), "policy.pt")
    assert "\n" not in str(caught.value)


def test_expert_pairs_that_are_missing_beside_a_policy_are_made(tmp_path: Path, monkeypatch, capsys) -> None:
    task, shipped = TASKS["toy"], policies.FOLDER
    for name in ("toy.pt", "toy.json"):
        (tmp_path / name).write_bytes((shipped / name).read_bytes())
    monkeypatch.setattr(policies, "FOLDER", tmp_path)
    suite = {"suite": "smoke", "methods": ("otpr",), "out": tmp_path / "out"}
    assert run.main(run.Arguments(**suite, dry_run=True)) == 0
    assert "its expert pairs are chosen first" in capsys.readouterr().out
    pretrain.ensure_policy(task)
    assert (tmp_path / "toy-expert.pt").read_bytes() == (shipped / "toy-expert.pt").read_bytes()
    assert (tmp_path / "toy.pt").read_bytes() == (shipped / "toy.pt").read_bytes()
    assert run.main(run.Arguments(**suite, dry_run=True)) == 0
    assert "chosen first" not in capsys.readouterr().out


def test_a_policy_that_another_command_installed_meanwhile_stays(dataset: Dataset, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(pretrain, "EVALUATION_EPISODES", 4)
    monkeypatch.setenv("OTPR_BENCH_CACHE", str(tmp_path))
    path, _ = pretrain.make_policy(TOY, dataset, 0)
    installed = policies.installed_path(TOY)
    assert pretrain.install_missing(TOY, dataset, path)
    assert installed.read_bytes() == path.read_bytes()
    before = installed.stat().st_ino
    assert not pretrain.install_missing(TOY, dataset, path) and installed.stat().st_ino == before


def test_command_line_installs_and_reports(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pretrain, "EVALUATION_EPISODES", 4)
    monkeypatch.setitem(TASKS, "toy", TOY)
    out = tmp_path / "out" / "toy.pt"
    assert pretrain.main("toy", out=out) == 0
    assert load_pretrained(TOY, path=out).digest == read_json(out.with_suffix(".json"))["sha256"]
    assert "start return" in capsys.readouterr().out
    assert pretrain.main("toy", out=out) == 0
    assert "from the cache" in capsys.readouterr().out
    (tmp_path / "bad.hdf5").write_bytes(b"no data")
    for arguments in ({"task": "nope"}, {"task": "toy", "threads": 0}, {"task": "toy", "data": tmp_path / "bad.hdf5"}):
        assert pretrain.main(**arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
