"""Committed demonstrators load safely, match their cards and act within range; training runs and is reproducible."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmark.data import demonstrator

CARDS = sorted((Path(demonstrator.__file__).parent / "demonstrators").glob("*.json"))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # networks this small are many times slower on several threads
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.stem)
def test_committed_weights_match_their_card(card: Path) -> None:
    weights = card.with_suffix(".pt")
    assert weights.stat().st_size <= 200_000
    facts = json.loads(card.read_text())
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == facts["sha256"]
    tensors = torch.load(weights, weights_only=True)
    assert type(tensors) is dict
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in tensors.values())
    assert demonstrator.TARGETS[card.stem].met_by(facts["stopping_evaluation"])
    assert facts["stochastic"]["episodes"] == 100


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.stem)
def test_actions_are_bounded_seeded_and_stochastic(card: Path) -> None:
    policy = demonstrator.load_demonstrator(card.with_suffix(".pt"))
    observations = np.random.default_rng(0).normal(size=(64, policy.body[0].in_features))
    first, second, other = (policy.act(observations, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert first.dtype == np.float32
    assert first.shape == (64, policy.body[4].out_features // 2)
    assert np.abs(first).max() <= 1.0
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, other)
    modes = [policy.act(observations, torch.Generator().manual_seed(seed), noise=0.0) for seed in (3, 4)]
    np.testing.assert_array_equal(*modes)


def test_log_density_is_that_of_a_squashed_gaussian() -> None:
    generator = torch.Generator().manual_seed(0)
    policy = demonstrator.Demonstrator(11, 3, 16, generator)
    observations = torch.randn(8, 11, generator=generator)
    actions, density = policy.sample(observations, generator)
    mean, log_std = policy(observations)
    squashed = torch.distributions.TransformedDistribution(
        torch.distributions.Normal(mean, log_std.exp()), torch.distributions.transforms.TanhTransform()
    )
    torch.testing.assert_close(density, squashed.log_prob(actions).sum(-1), rtol=1e-3, atol=1e-3)


def test_short_training_is_finite_reproducible_and_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    always = demonstrator.Target("Hopper-v4", (-np.inf, np.inf), (0.0, np.inf), -np.inf)
    monkeypatch.setitem(demonstrator.TARGETS, "hopper", always)
    settings = demonstrator.Settings(start_steps=150, max_steps=300, evaluate_every=300, evaluation_episodes=2)
    runs = [demonstrator.train("hopper", 7, settings)[0].state_dict() for _ in range(2)]
    for name, value in runs[0].items():
        assert value.isfinite().all()
        torch.testing.assert_close(value, runs[1][name], rtol=0.0, atol=0.0)
    policy, steps = demonstrator.train("hopper", 8, settings)
    assert steps == 300
    assert not torch.equal(policy.state_dict()["body.0.weight"], runs[0]["body.0.weight"])
    demonstrator.save_demonstrator(policy, tmp_path / "hopper.pt", {"seed": 8})
    loaded = demonstrator.load_demonstrator(tmp_path / "hopper.pt").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in policy.state_dict().items())


def test_training_gives_up_in_one_line() -> None:
    settings = demonstrator.Settings(start_steps=100, max_steps=100, evaluate_every=100, evaluation_episodes=2)
    with pytest.raises(RuntimeError, match="try another --seed"):
        demonstrator.train("hopper", 0, settings)
