"""OTPR: each of the released code's defects D1 to D16 by name, the arms, and bad settings."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import numpy as np
import pytest
import torch
from parity_cases import CASES, Case
from test_offpolicy import collect, weights
from torch import Tensor

from benchmark.methods import ARMS, resolve_settings
from benchmark.tasks import TASKS
from otpr import agent, released
from otpr.critic import expectile_choice
from otpr.duality import interaction
from otpr.exact import exact_plan
from otpr.method import Demonstrations, TaskShape
from otpr.networks import ResidualMLP
from otpr.offpolicy import sample_candidates
from otpr.replay import Batch
from otpr.transport import cross_cost

SMALL = {
    "critic_hidden_dims": (32, 32, 32),
    "batch_size": 16,
    "replay_ratio": 2.0,
    "replay_capacity": 60,
    "critic_warmup_iterations": 1,
    "candidates": 3,
    "transport_block_size": 16,
    "transport_first_steps": 40,
    "transport_warm_steps": 10,
}
MASKED = {"keypoints": 4, "guide_weight": 0.5, "expert_fraction": 0.25}
CASE = CASES[0]


def pairs(case: Case = CASE, count: int = 50) -> Demonstrations:
    generator = torch.Generator().manual_seed(5)
    observations = torch.rand(count, case.observation_dim, generator=generator) * 2 - 1
    actions = torch.rand(count, 4, case.action_dim, generator=generator) * 2 - 1
    return Demonstrations(observations, actions, torch.linspace(0.005, 0.25, count))


def make(name: type[agent.OTPR] = agent.OTPR, demonstrations: Demonstrations | None = None, **values) -> Any:
    shape = TaskShape(CASE.observation_dim, CASE.action_dim, 4, n_envs=4, n_steps=6)
    module, lacking = (released, released.LACKING) if name is released.ReleasedOTPR else (agent, ())
    settings = module.Settings(**{name: value for name, value in (SMALL | values).items() if name not in lacking})
    return name(settings, CASE.policy(), shape, torch.Generator().manual_seed(0), demonstrations or pairs())


def trained(iterations: int = 3, **values) -> Any:
    method, generator = make(**values), torch.Generator().manual_seed(1)
    for _ in range(iterations):
        method.update(collect(method, CASE, generator))
    return method


def batch_of(method: agent.OTPR) -> Batch:
    return method.replay.sample(16, torch.Generator().manual_seed(3))


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
    torch.testing.assert_close(plans[0], plans[1], atol=0.05, rtol=0.05)


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


def batch_of_any(method: agent.OTPR) -> Batch:
    zeros = torch.zeros(16, CASE.observation_dim)
    return Batch(zeros, torch.zeros(16, 4, CASE.action_dim), torch.zeros(16), torch.zeros(16), zeros, torch.arange(16))


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


def test_d16_epsilon_is_a_setting_in_units_of_the_cost() -> None:
    assert make().transport.settings.epsilon == agent.Settings().epsilon == 0.1
    for bad in (0.0, -1.0):
        with pytest.raises(ValueError, match="epsilon"):
            agent.Settings(epsilon=bad)


def test_before_the_actor_learns_the_draw_is_that_of_idql() -> None:
    method = make(candidates=4)
    observations = torch.randn(9, CASE.observation_dim, generator=torch.Generator().manual_seed(2))
    chunk = method.act(observations, True, torch.Generator().manual_seed(3)).actions
    generator = torch.Generator().manual_seed(3)
    candidates = sample_candidates(method.actor, observations, 4, True, generator)
    q, value = method.candidate_q(observations, candidates), method.critic.value(observations)
    index = expectile_choice(q, value, 0.7, generator)
    assert torch.equal(chunk, candidates[torch.arange(9), index])


@pytest.mark.parametrize(("guidance", "shift"), [("q", 0.0), ("advantage", 1.0)])
def test_guidance_q_and_advantage_weigh_by_their_positive_part(guidance: str, shift: float) -> None:
    method = trained(guidance=guidance)
    assert method.transport.fits == 0
    batch = batch_of(method)
    chunks = batch.actions[:, None]
    q = method.candidate_q(batch.observations, chunks)
    expected = (q - shift * method.critic.value(batch.observations)[:, None]).relu()
    assert torch.equal(method.guidance(batch.observations, chunks), expected)


def test_the_advantage_as_transport_cost_has_the_plan_of_q() -> None:
    method = trained()
    batch = batch_of(method)

    def minus_q(observations: Tensor, chunks: Tensor) -> Tensor:
        return -method.candidate_q(observations, chunks)[..., None]

    costs = [cross_cost(batch.observations, batch.actions, c)[..., 0].double() for c in (minus_q, method.cost)]
    assert (costs[0] - costs[1]).std() > 0.01
    epsilon = 0.1 * interaction(costs[0]).std().item()
    plans = [exact_plan(cost.numpy(), epsilon).density for cost in costs]
    np.testing.assert_allclose(plans[0], plans[1], atol=1e-3)


def test_weighting_alone_acts_with_one_sample_and_selection_alone_clones_evenly() -> None:
    method = trained(selection=False)
    observations = torch.zeros(3, CASE.observation_dim)
    chunk = method.act(observations, False, torch.Generator().manual_seed(0)).actions
    alone = method.actor.sample(observations, False, torch.Generator().manual_seed(0))
    assert torch.equal(chunk, alone)


def test_other_rules_are_the_actor_alone_and_its_candidate_of_largest_q() -> None:
    method, generator = trained(), torch.Generator
    rules, observations = method.other_rules(), torch.zeros(3, CASE.observation_dim)
    assert set(rules) == {"actor", "best_q"}
    alone = method.actor.sample(observations, False, generator().manual_seed(0))
    assert torch.equal(rules["actor"](observations, generator().manual_seed(0)).actions, alone)
    candidates = sample_candidates(method.actor, observations, 3, False, generator().manual_seed(0))
    best = candidates[torch.arange(3), method.candidate_q(observations, candidates).argmax(1)]
    assert torch.equal(rules["best_q"](observations, generator().manual_seed(0)).actions, best)


def test_the_released_arm_keeps_the_released_behaviour() -> None:
    method, generator = make(released.ReleasedOTPR, **MASKED), torch.Generator().manual_seed(1)
    fitted = []
    for _ in range(3):
        method.update(collect(method, CASE, generator))
        fitted.append(weights(method.transport.potentials))
    assert not method.settings.weighting and method.settings.guide_weight == 1.0
    assert released.Settings().transport_learning_rate == 1e-5
    observations = torch.zeros(3, CASE.observation_dim)
    alone = method.actor.sample(observations, False, torch.Generator().manual_seed(0))
    assert torch.equal(method.act(observations, False, torch.Generator().manual_seed(0)).actions, alone)
    batch = batch_of(method)
    u, v = method.transport.potentials(batch.observations, batch.actions)
    h = (u + v + method.candidate_q(batch.observations, batch.actions[:, None])[:, 0]).relu() / 0.2
    torch.testing.assert_close(method.guidance(batch.observations, batch.actions[:, None])[:, 0], h)


@pytest.mark.parametrize(("name", "value"), [("guidance", "q"), ("transport_tolerance", 0.5), ("guide_weight", 0.5)])
def test_the_released_arm_refuses_what_it_lacks(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}.* got {value!r}$"):
        released.Settings(**{name: value})


def test_expert_pairs_are_those_of_the_best_episodes() -> None:
    method = make(expert_share=0.1, **MASKED)
    assert method.expert.ranks.max() <= 0.1 < pairs().ranks.max()
    observations, actions = method.actor_pairs(batch_of_any(method))
    assert (observations[4:] == 0).all() and (actions[4:] == 0).all() and (observations[:4] != 0).all()


@pytest.mark.parametrize("values", [{}, MASKED])
def test_stored_pairs_are_judged_once_where_they_are_drawn_more_often(values: dict[str, Any], monkeypatch) -> None:
    method = trained(weighting=True, **values)
    batch = batch_of(method)
    stored = len(method.replay)
    assert method.guidance_ahead(stored - 1) is None
    monkeypatch.setattr(agent, "GUIDANCE_ROWS", 10)
    generator = method.generator.get_state()
    direct = method.weights(method.batch_guidance(*method.actor_pairs(batch), batch.places))
    method.generator.set_state(generator)
    method.replay_guidance = method.guidance_ahead(stored)
    assert method.replay_guidance is not None and method.replay_guidance.shape == (stored,)
    ahead = method.weights(method.batch_guidance(*method.actor_pairs(batch), batch.places))
    torch.testing.assert_close(ahead, direct)
    assert direct.std() > 0 and trained(weighting=True, **values).replay_guidance is None


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"epsilon": 0.0}, "epsilon"),
        ({"guidance": "value"}, "guidance.*value.*advantage"),
        ({"regulariser": "l1"}, "regulariser.*l1.*entropic"),
        ({"action_bound": 0.5}, "action_bound.*0.5"),
        ({"keypoints": 16}, "keypoints.*16"),
        ({"keypoints": -1}, "keypoints.*-1"),
        ({"guide_weight": 0.5}, "guide_weight.*needs keypoints"),
        ({"guide_weight": 1.5, "keypoints": 4}, "guide_weight.*1.5"),
        ({"relation_temperature": 0.0, "keypoints": 4}, "relation_temperature"),
        ({"weighting": False, "selection": False}, "weighting and selection"),
        ({"expert_fraction": -0.1}, "expert_fraction"),
        ({"policy_share": 2.0}, "policy_share"),
    ],
)
def test_bad_settings_are_refused_in_one_line(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        agent.Settings(**{**SMALL, **values})
    assert "\n" not in str(error.value)


def test_more_keypoints_than_pairs_and_a_larger_share_than_held_are_refused() -> None:
    with pytest.raises(ValueError, match="at most the 3 expert pairs, got 4"):
        make(demonstrations=pairs(count=3), expert_share=0.25, **MASKED)
    with pytest.raises(ValueError, match=r"expert_share .* got 0.9"):
        make(expert_share=0.9, **MASKED)
    shape = TaskShape(CASE.observation_dim, CASE.action_dim, 4, n_envs=4, n_steps=6)
    with pytest.raises(ValueError, match="need demonstrations"):
        agent.OTPR(agent.Settings(**SMALL, **MASKED), CASE.policy(), shape, torch.Generator())


def test_off_policy_arms_of_a_budget_take_equal_gradient_steps_and_the_relaxed_arm_differs_in_its_bound_alone() -> None:
    for task in (TASKS["hopper-local"], TASKS["lift-local"], TASKS["toy"]):
        names = [name for name in ARMS if name.startswith("otpr")] + ["idql", "dql"]
        made = {name: resolve_settings(name, task, "embedded", {}) for name in names}
        assert len({(s.batch_size, s.replay_ratio, s.critic_warmup_iterations) for s in made.values()}) == 1
        changed = {
            name: {k for k, v in dataclasses.asdict(made[name]).items() if v != getattr(made["otpr"], k)}
            for name in ("otpr-m", "otpr-relaxed", "otpr-u", "otpr-q", "otpr-weighting")
        }
        assert changed == {
            "otpr-m": set(),
            "otpr-relaxed": {"action_bound"},
            "otpr-u": {"keypoints", "guide_weight", "expert_fraction"},
            "otpr-q": {"guidance"},
            "otpr-weighting": {"selection"},
        }
