"""Keypoints: relation vectors, their divergence and the guide."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from otpr.keypoints import Keypoints, jensen_shannon, relation

OBSERVATION_DIM, HORIZON, ACTION_DIM, COUNT = 3, 2, 2, 6
LOG_2 = math.log(2)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def distributions(count: int, seed: int = 0) -> Tensor:
    return (4 * uniform(count, COUNT, seed=seed)).softmax(-1)


def make(temperature: float = 0.1, unit: float = 1.0) -> Keypoints:
    return Keypoints(
        unit * uniform(COUNT, OBSERVATION_DIM), unit * uniform(COUNT, HORIZON, ACTION_DIM, seed=1), temperature
    )


def test_a_distribution_does_not_diverge_from_itself():
    p = distributions(50)
    assert jensen_shannon(p, p).abs().max().item() < 1e-6


def test_divergence_is_symmetric_and_bounded_by_log_two():
    p, q = distributions(200), distributions(200, seed=1)
    divergence = jensen_shannon(p, q)
    assert divergence.shape == (200,)
    torch.testing.assert_close(divergence, jensen_shannon(q, p))
    assert divergence.min().item() > 1e-3
    assert divergence.max().item() < LOG_2


def test_disjoint_distributions_diverge_by_log_two():
    p, q = torch.tensor([0.3, 0.7, 0.0, 0.0]), torch.tensor([0.0, 0.0, 0.5, 0.5])
    assert jensen_shannon(p, q).item() == pytest.approx(LOG_2)
    assert jensen_shannon(torch.eye(3)[0], torch.eye(3)[1]).item() == pytest.approx(LOG_2)


def test_divergence_of_a_known_pair():
    p, q = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5])
    expected = (math.log(4 / 3) + 0.5 * math.log(2 / 3) + 0.5 * math.log(2)) / 2
    assert jensen_shannon(p, q).item() == pytest.approx(expected)


def test_divergence_broadcasts():
    p, q = distributions(4)[:, None], distributions(5, seed=1)
    table = jensen_shannon(p, q)
    assert table.shape == (4, 5)
    assert table[2, 3].item() == pytest.approx(jensen_shannon(p[2, 0], q[3]).item())


@pytest.mark.parametrize("temperature", [1e-3, 0.1, 10.0])
def test_relations_are_distributions_over_the_keypoints(temperature):
    points, keypoints = uniform(4, 7, OBSERVATION_DIM), uniform(COUNT, OBSERVATION_DIM, seed=1)
    vectors = relation(points, keypoints, torch.tensor(2.0), temperature)
    assert vectors.shape == (4, 7, COUNT)
    assert vectors.min().item() >= 0
    torch.testing.assert_close(vectors.sum(-1), torch.ones(4, 7))


def test_relation_is_the_softmax_of_squared_distances():
    points, keypoints = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    expected = torch.tensor([[-1.0, -4.0]]).div(2.0 * 0.5).softmax(-1)
    torch.testing.assert_close(relation(points, keypoints, torch.tensor(2.0), 0.5), expected)


def test_the_temperature_goes_from_the_nearest_keypoint_to_none():
    keypoints = uniform(COUNT, OBSERVATION_DIM)
    points = keypoints + 0.01
    unit = torch.tensor(1.0)
    torch.testing.assert_close(relation(points, keypoints, unit, 1e-4), torch.eye(COUNT))
    torch.testing.assert_close(
        relation(points, keypoints, unit, 1e6), torch.full((COUNT, COUNT), 1 / COUNT), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("count", [2, 6, 40])
def test_guide_is_small_on_keypoint_pairs_and_large_on_mismatched_ones(count):
    points = Keypoints(uniform(count, OBSERVATION_DIM), uniform(count, HORIZON, ACTION_DIM, seed=1), 0.01)
    table = points.guide(points.observations, points.chunks.expand(count, -1, -1, -1))
    matched = table.diagonal()
    mismatched = table[~torch.eye(count, dtype=torch.bool)]
    assert matched.mean().item() < 0.25 * mismatched.mean().item()
    assert (matched < table.sum(1).sub(matched).div(count - 1)).all()
    if count == 2:  # both pairs are as far apart as the unit
        assert matched.max().item() < 1e-6
        assert mismatched.min().item() == pytest.approx(LOG_2, abs=1e-6)


def test_guide_is_exactly_small_where_states_and_chunks_are_alike():
    """Chunks that are the states themselves relate to the keypoints in the same way."""
    states = uniform(COUNT, HORIZON * ACTION_DIM)
    points = Keypoints(states, states.view(COUNT, HORIZON, ACTION_DIM), 0.1)
    other = uniform(30, HORIZON * ACTION_DIM, seed=2)
    table = points.guide(other, other.view(30, HORIZON, ACTION_DIM).expand(30, -1, -1, -1))
    assert table.diagonal().max().item() < 1e-5
    assert table.mean().item() > 0.05


def test_guide_has_a_value_per_candidate_within_its_range():
    table = make().guide(uniform(5, OBSERVATION_DIM, seed=2), 3 * uniform(5, 4, HORIZON, ACTION_DIM, seed=3))
    assert table.shape == (5, 4)
    assert table.min().item() >= 0
    assert table.max().item() <= LOG_2 + 1e-6


def test_each_candidate_is_guided_by_its_own_state():
    observations, chunks = uniform(5, OBSERVATION_DIM, seed=2), uniform(5, 4, HORIZON, ACTION_DIM, seed=3)
    table = make().guide(observations, chunks)
    alone = make().guide(observations[3:4], chunks[3:4, 2:3])
    assert table[3, 2].item() == pytest.approx(alone.item(), abs=1e-6)


def test_guide_does_not_depend_on_the_unit_of_states_and_chunks():
    observations, chunks = uniform(5, OBSERVATION_DIM, seed=2), uniform(5, 4, HORIZON, ACTION_DIM, seed=3)
    expected = make().guide(observations, chunks)
    torch.testing.assert_close(make(unit=50.0).guide(50 * observations, 50 * chunks), expected, atol=1e-4, rtol=1e-3)


def test_guide_does_not_depend_on_the_order_of_the_keypoints():
    points, order = make(), torch.tensor([3, 1, 5, 0, 2, 4])
    shuffled = Keypoints(points.observations[order], points.chunks[order], 0.1)
    candidates = uniform(5, OBSERVATION_DIM, seed=2), uniform(5, 4, HORIZON, ACTION_DIM, seed=3)
    torch.testing.assert_close(shuffled.guide(*candidates), points.guide(*candidates))


def test_points_far_from_all_keypoints_get_a_finite_guide():
    table = make(1e-3).guide(1e6 * uniform(5, OBSERVATION_DIM), 1e6 * uniform(5, 4, HORIZON, ACTION_DIM))
    assert table.isfinite().all()


@pytest.mark.parametrize("count", [1, 3])
def test_keypoints_that_coincide_guide_nothing(count):
    points = Keypoints(torch.zeros(count, OBSERVATION_DIM), torch.zeros(count, HORIZON, ACTION_DIM), 0.1)
    table = points.guide(uniform(5, OBSERVATION_DIM), uniform(5, 4, HORIZON, ACTION_DIM))
    assert len(points) == count
    assert table.max().item() < 1e-6
