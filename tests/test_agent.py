"""OTPR: each of the released code's defects D1 to D16 by name."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from agent_cases import CASE, MASKED, SMALL, batch_of, batch_of_any, make, pairs, trained
from test_offpolicy import collect, weights
from torch import Tensor

from otpr import agent, released
from otpr.method import TaskShape
from otpr.networks import ResidualMLP
from otpr.offpolicy import sample_candidates


def test_d1_the_modules_import_and_evaluation_takes_as_many_candidates_as_set(monkeypatch) -> None:
    method, seen = trained(candidates=5), []

    def spy(policy, observations, candidates, explore, generator) -> Tensor:
        seen.append(candidates)
        return sample_candidates(policy, observations, candidates, explore, generator)

    monkeypatch.setattr(agent, "sample_candidates", spy)
    for explore in (True, False):
        method.act(torch.zeros(2, CASE.observation_dim), explore, torch.Generator().manual_seed(0))
    assert seen == [5, 5]


@pytest.mark.parametrize("weighting", [True, False])
def test_d2_the_actor_loss_is_weighted_by_compatibility(weighting: bool) -> None:
    method = trained(weighting=weighting)
    batch = batch_of(method)
    state = method.generator.get_state()
    loss, metrics = method.actor_loss(batch)
    method.generator.set_state(state)
    losses = method.actor.bc_losses(batch.actions, batch.observations, method.generator)
    terms = method.cost(batch.observations, batch.actions[:, None])
    h = method.transport.compatibility(batch.observations, batch.actions[:, None], terms)[:, 0]
    weighted = ((h / h.mean()).clamp(max=10.0) * losses).mean()
    assert not torch.allclose(weighted, losses.mean(), rtol=1e-3)
    torch.testing.assert_close(loss, weighted if weighting else losses.mean())
    assert ("actor/weight_effective_share" in metrics) is weighting


def test_d3_compatibility_is_read_at_the_clean_chunk_and_the_state(monkeypatch) -> None:
    method, seen = trained(), []
    compatibility = method.transport.compatibility

    def spy(observations: Tensor, chunks: Tensor, terms: Tensor) -> Tensor:
        seen.append((observations, chunks))
        return compatibility(observations, chunks, terms)

    monkeypatch.setattr(method.transport, "compatibility", spy)
    batch = batch_of(method)
    method.actor_loss(batch)
    ((observations, chunks),) = seen
    assert torch.equal(observations, batch.observations)
    assert torch.equal(chunks[:, 0], batch.actions)


@pytest.mark.parametrize("explore", [True, False])
def test_d4_candidates_are_drawn_in_proportion_to_h_in_evaluation_too(explore: bool) -> None:
    method, many = trained(), 20_000
    h = torch.tensor([[0.0, 1.0, 3.0]]).expand(many, -1)
    method.transport.compatibility = lambda *_: h
    observations = torch.zeros(many, CASE.observation_dim)
    candidates = torch.tensor([0.1, 0.2, 0.3])[None, :, None, None].expand(many, 3, 4, CASE.action_dim)
    guidance = method.guidance(observations[:8], candidates[:8])
    index = method.resample(guidance[:1].expand(many, -1), explore, torch.Generator().manual_seed(0))
    frequency = torch.bincount(index, minlength=3) / many
    torch.testing.assert_close(frequency, torch.tensor([0.0, 0.25, 0.75]), atol=0.015, rtol=0)


def test_d5_potentials_go_on_from_the_previous_iteration_and_costs_are_standardised() -> None:
    method, generator = make(), torch.Generator().manual_seed(1)
    steps = [method.update(collect(method, CASE, generator)).get("transport/steps") for _ in range(3)]
    assert steps == [None, 40, 10]
    batch, plans = batch_of(method), []
    for unit, offset in ((1.0, 0.0), (30.0, 500.0)):
        other = make().transport

        def cost(states: Tensor, actions: Tensor, unit: float = unit, offset: float = offset) -> Tensor:
            return method.cost(states, actions) * unit + offset

        other.fit(batch.observations, batch.actions, cost)
        plans.append(other.plan(batch.observations, batch.actions, cost)[0])
    assert (plans[0] - plans[1]).norm() <= 0.05 * plans[0].norm()


def test_d6_fit_and_use_see_one_cost_whose_guide_share_is_guide_weight(monkeypatch) -> None:
    method = trained(**MASKED)
    calls = []
    fit = method.transport.fit

    def spy(observations: Tensor, chunks: Tensor, cost: Any, keypoints: int) -> dict[str, float]:
        calls.append((cost, keypoints))
        return fit(observations, chunks, cost, keypoints)

    monkeypatch.setattr(method.transport, "fit", spy)
    method.fit_transport()
    assert calls == [(method.cost, 4)]
    batch = batch_of(method)
    terms = method.cost(batch.observations, batch.actions[:, None])
    assert terms.shape == (16, 1, 2)
    expected = method.transport.compatibility(batch.observations, batch.actions[:, None], terms)
    assert torch.equal(method.guidance(batch.observations, batch.actions[:, None]), expected)
    for weight, idle in ((0.0, 1), (1.0, 0)):
        other = trained(**{**MASKED, "guide_weight": weight})
        assert other.transport.factors[idle] == 0 and other.transport.factors[1 - idle] > 0


def test_d7_keypoints_and_expert_pairs_are_drawn_from_all_of_them() -> None:
    method, held = make(expert_share=0.25, **MASKED), pairs()
    rows = [(held.observations == point).all(1).nonzero().item() for point in method.keypoints.observations]
    assert rows != sorted(rows)[:4] and max(rows) > 10
    drawn = torch.cat([method.actor_pairs(batch_of_any(method))[0][:4] for _ in range(60)])
    assert len(drawn.unique(dim=0)) > 40


def untimed(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith("time/")}


def test_d8_all_of_it_runs_where_the_generator_is() -> None:
    method = trained(**MASKED)
    tensors = [*method.transport.potentials.parameters(), method.transport.center, method.keypoints.observations]
    assert {tensor.device for tensor in tensors} == {method.generator.device} == {torch.device("cpu")}


@pytest.mark.parametrize("name", [agent.OTPR, released.ReleasedOTPR])
def test_d9_a_resumed_method_acts_and_learns_as_one_never_stopped(name: type[agent.OTPR]) -> None:
    straight, generator = make(name, **MASKED), torch.Generator().manual_seed(1)
    for _ in range(3):
        straight.update(collect(straight, CASE, generator))
    file = io.BytesIO()
    torch.save(straight.state_dict(), file)
    file.seek(0)
    resumed = make(name, **MASKED)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    other = torch.Generator()
    other.set_state(generator.get_state())
    for _ in range(2):
        first = straight.update(collect(straight, CASE, generator))
        second = resumed.update(collect(resumed, CASE, other))
        assert untimed(first) == untimed(second)
    assert torch.equal(weights(straight.actor), weights(resumed.actor))
    assert torch.equal(weights(straight.transport.potentials), weights(resumed.transport.potentials))


def test_d10_chunks_of_the_fit_are_partly_the_actors_own_at_its_states_and_the_largest_q_is_logged(monkeypatch) -> None:
    method = trained()
    fits = []
    monkeypatch.setattr(method.transport, "fit", lambda states, chunks, *_: fits.append((states, chunks)) or {})
    method.fit_transport()
    ((states, chunks),) = fits
    replayed = method.replay.contents().actions
    known = (chunks[:, None] == replayed[None]).flatten(2).all(-1).any(1)
    assert known.tolist() == [False] * 8 + [True] * 8
    assert states.shape == (16, CASE.observation_dim)
    generator = torch.Generator().manual_seed(1)
    assert trained().update(collect(method, CASE, generator))["transport/max_abs_cost"] > 0


def test_d11_a_fit_reads_one_block_of_the_replay(monkeypatch) -> None:
    method, sizes = trained(), []
    sample = method.replay.sample
    monkeypatch.setattr(method.replay, "sample", lambda size, g: sizes.append(size) or sample(size, g))
    method.fit_transport()
    assert sizes == [16]


def test_d12_the_last_transition_of_an_episode_keeps_its_own_final_observation() -> None:
    method = make()
    rollout = collect(method, CASE, torch.Generator().manual_seed(1))
    method.replay.add(rollout, 1.0)
    ended = (rollout.terminated | rollout.truncated).flatten()
    stored = method.replay.contents().next_observations
    assert ended.any()
    assert torch.equal(stored[ended], rollout.next_observations.flatten(0, 1)[ended])


@pytest.mark.parametrize("residual", [True, False])
def test_d13_the_setting_of_a_residual_q_reaches_the_network(residual: bool) -> None:
    assert isinstance(make(q_residual=residual).critic.q.Q1, ResidualMLP) is residual


def test_d14_a_policy_whose_chunk_is_not_executed_whole_is_refused() -> None:
    shape = TaskShape(CASE.observation_dim, CASE.action_dim, 2, n_envs=4, n_steps=6)
    with pytest.raises(ValueError, match="action_horizon"):
        agent.OTPR(agent.Settings(**SMALL), CASE.policy(), shape, torch.Generator())


def test_d15_where_no_candidate_is_compatible_the_draw_is_uniform_and_counted() -> None:
    method = trained()
    method.selections.clear()
    weights = torch.zeros(6000, 3)
    weights[:3000, 2] = 1.0
    index = method.resample(weights, True, torch.Generator().manual_seed(0))
    assert (index[:3000] == 2).all()
    frequency = torch.bincount(index[3000:], minlength=3) / 3000
    torch.testing.assert_close(frequency, torch.full((3,), 1 / 3), atol=0.04, rtol=0)
    assert method.selections[0]["actor/selection_empty"] == 0.5
    torch.testing.assert_close(method.selections[0]["actor/selection_entropy"], torch.tensor(0.5), atol=1e-3, rtol=0)


def test_a_draw_among_values_that_are_not_finite_leaves_it_to_losses_and_actions_to_say_so() -> None:
    weights = torch.tensor([[1.0, float("nan"), 0.0], [1.0, float("inf"), 0.0]]).repeat(300, 1)  # (600, 3)
    method = trained()
    index = method.resample(weights, True, torch.Generator().manual_seed(0))
    assert index.unique().tolist() == [0, 1, 2]
    assert not method.selections[-1]["actor/selection_entropy"].isfinite()


def test_d16_epsilon_is_a_setting_in_units_of_the_cost() -> None:
    assert make().transport.settings.epsilon == agent.Settings().epsilon == 0.1
    for bad in (0.0, -1.0):
        with pytest.raises(ValueError, match="epsilon"):
            agent.Settings(epsilon=bad)
