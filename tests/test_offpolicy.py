"""IDQL and DQL: reference numbers, warm-up, selection, resume, settings."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from parity_cases import CASES, CHAIN, FOLDER, Case
from torch import Tensor

from baselines import dql, idql
from otpr.diffusion import SamplerSettings
from otpr.method import Rollout, TaskShape
from otpr.offpolicy import OffPolicy, sample_candidates
from otpr.replay import Batch

by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
METHODS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "idql": (idql.IDQL, idql.Settings, {"candidates": 3}),
    "dql": (dql.DQL, dql.Settings, {}),
    "dql-dppo": (dql.DQL, dql.Settings, {"bc_on": "policy"}),
}
by_method = pytest.mark.parametrize("name", METHODS)


def make(name: str, case: Case = CASES[0], **values) -> Any:
    method, settings, defaults = METHODS[name]
    small = {"critic_hidden_dims": (32, 32, 32), "batch_size": 16, "replay_ratio": 2.0, "replay_capacity": 40}
    shape = TaskShape(case.observation_dim, case.action_dim, 4, n_envs=4, n_steps=6)
    made = settings(**{**small, **defaults, **values})
    return method(made, case.policy(), shape, torch.Generator().manual_seed(0))


def collect(method: OffPolicy, case: Case, generator: torch.Generator) -> Rollout:
    """A rollout through random observations with the method's own actions."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) * 2 - 1

    observations = uniform(6, 4, case.observation_dim)
    actions = torch.stack([method.act(seen, True, generator).actions for seen in observations])
    ended = uniform(6, 4)
    return Rollout(observations, actions, uniform(6, 4), ended > 0.8, ended < -0.8, uniform(6, 4, case.observation_dim))


def weights(module: torch.nn.Module) -> Tensor:
    return torch.nn.utils.parameters_to_vector(module.parameters()).detach().clone()


def reference_dql(case: Case) -> tuple[dql.DQL, dict[str, Tensor], Batch]:
    method, arrays = make("dql", case), case.arrays("dql")
    state = torch.load(FOLDER / case.name / "critics.pt", weights_only=True)
    method.critic.load_state_dict(state["critic_q"])
    method.target_critic.load_state_dict(state["target_q"])
    columns = [arrays[name] for name in ("obs", "actions", "rewards", "terminated", "next_obs")]
    batch = Batch(*columns, torch.arange(len(columns[0])))
    return method, arrays, batch


@by_case
def test_dql_losses_equal_reference(case: Case) -> None:
    method, arrays, batch = reference_dql(case)
    next_actions = method.actor.sample_chain(batch.next_observations, arrays["critic_noise"], True, keep=0)[:, -1]
    torch.testing.assert_close(method.critic_loss(batch, next_actions.detach())[0], arrays["loss_critic"], **CHAIN)
    actions = method.actor.sample_chain(batch.observations, arrays["actor_noise"], True, keep=0)[:, -1]
    torch.testing.assert_close(actions, arrays["actor_actions"], **CHAIN)
    q1, q2 = method.critic(batch.observations, actions)
    torch.testing.assert_close(dql.normalised_q_loss(q1, q2), arrays["q_loss_using_q1"], **CHAIN)
    torch.testing.assert_close(dql.normalised_q_loss(q2, q1), arrays["q_loss_using_q2"], **CHAIN)


def test_dql_actor_loss_climbs_each_head_half_of_the_time() -> None:
    method, _, batch = reference_dql(CASES[0])
    method.generator.manual_seed(0)
    first = 0
    for _ in range(40):
        before = method.generator.get_state()
        q_loss = method.actor_loss(batch)[1]["actor/q_loss"]
        method.generator.set_state(before)
        actions = method.actor.sample(batch.observations, True, method.generator)
        q1, q2 = method.critic(batch.observations, actions)
        uses_first = torch.equal(q_loss, dql.normalised_q_loss(q1, q2))
        assert uses_first or torch.equal(q_loss, dql.normalised_q_loss(q2, q1))
        first += uses_first
    assert 8 <= first <= 32


def test_dql_gradient_flows_through_the_whole_chain() -> None:
    method, arrays, batch = reference_dql(CASES[0])
    noise = arrays["actor_noise"].clone().requires_grad_(True)
    actions = method.actor.sample_chain(batch.observations, noise, True, keep=0)[:, -1]
    dql.normalised_q_loss(*method.critic(batch.observations, actions)).backward()
    assert noise.grad is not None
    assert (noise.grad.abs().flatten(1).sum(1) > 0).all()  # the first draw and every step's


def test_dql_and_dql_dppo_differ_only_in_the_actions_cloned() -> None:
    case, results = CASES[0], {}
    batch = reference_dql(case)[2]
    for name in ("dql", "dql-dppo"):
        method = make(name, case)
        critic_metrics = method.critic_step(batch)
        loss, metrics = method.actor_loss(batch)
        results[name] = (critic_metrics | metrics, method, loss)
    ours, released = (results[name][0] for name in ("dql", "dql-dppo"))
    assert ours.keys() == released.keys()
    assert {key for key in ours if not torch.equal(ours[key], released[key])} == {"actor/bc_loss"}
    replayed, fresh = batch, replace(batch, actions=torch.zeros_like(batch.actions))  # other replay actions
    for name, depends in (("dql", True), ("dql-dppo", False)):
        losses = [make(name, case).actor_loss(data)[1]["actor/bc_loss"] for data in (replayed, fresh)]
        assert torch.equal(*losses) is not depends


def test_idql_explores_by_weights_and_evaluates_greedily() -> None:
    method, generator = make("idql"), torch.Generator().manual_seed(0)
    observations = torch.randn(1, 11, generator=generator)
    candidates = sample_candidates(method.actor, observations, 3, True, generator)
    q = torch.tensor([[1.0, -1.0, 2.0]])
    method.critic.candidate_q = lambda obs, _: q.expand(len(obs), -1)
    method.critic.value = lambda obs: torch.zeros(len(obs))
    many, chunks = observations.expand(20_000, -1), candidates.expand(20_000, -1, -1, -1)
    frequency = torch.bincount(method.choose(many, chunks, True, generator), minlength=3) / 20_000
    torch.testing.assert_close(frequency, torch.tensor([0.7, 0.3, 0.7]) / 1.7, atol=0.015, rtol=0)
    assert (method.choose(many, chunks, False, generator) == 2).all()


def test_idql_executes_the_candidate_that_it_chose() -> None:
    method = make("idql", candidates=5)
    observations = torch.randn(7, 11, generator=torch.Generator().manual_seed(1))
    chunk = method.act(observations, False, torch.Generator().manual_seed(2)).actions
    candidates = sample_candidates(method.actor, observations, 5, False, torch.Generator().manual_seed(2))
    best = method.critic.candidate_q(observations, candidates).argmax(1)
    assert candidates.shape == (7, 5, 4, 3)
    assert torch.equal(chunk, torch.stack([candidates[i, best[i]] for i in range(7)]))


def test_candidates_belong_to_their_observation() -> None:
    policy = replace_sampler(CASES[0])
    observations = torch.randn(4, 11, generator=torch.Generator().manual_seed(1))
    candidates = sample_candidates(policy, observations, 3, False, torch.Generator().manual_seed(2))
    noise = policy.draw_noise(12, torch.Generator().manual_seed(2)).unflatten(1, (4, 3))
    for i in range(4):
        alone = policy.sample_chain(observations[i].expand(3, -1), noise[:, i], False, keep=0)[:, -1]
        torch.testing.assert_close(candidates[i], alone, **CHAIN)


def replace_sampler(case: Case):
    policy = case.policy()
    policy.sampler = SamplerSettings(kind="ddim")
    return policy


@by_method
def test_warm_up_trains_the_critic_alone(name: str) -> None:
    method, generator = make(name, critic_warmup_iterations=2), torch.Generator().manual_seed(1)
    networks = {"idql": lambda: method.critic.q}.get(name, lambda: method.critic)
    for iteration in range(3):
        actor, critic = weights(method.actor), weights(networks())
        metrics = method.update(collect(method, CASES[0], generator))
        assert torch.equal(weights(method.actor), actor) is (iteration < 2)
        assert ("actor/bc_loss" in metrics) is (iteration == 2)
        assert not torch.equal(weights(networks()), critic)
        assert method.gradient_steps == 3 * (iteration + 1)  # 6 chunks x 4 environments x ratio 2 / batch 16


@by_method
def test_update_returns_finite_floats_and_leaves_the_given_policy_alone(name: str) -> None:
    case, method = CASES[1], make(name, CASES[1], critic_warmup_iterations=0)
    before = weights(case.policy())
    metrics = method.update(collect(method, case, torch.Generator().manual_seed(1)))
    assert all(isinstance(value, float) and abs(value) < 1e6 for value in metrics.values())
    assert {"critic/q_loss", "critic/q", "actor/bc_loss"} <= metrics.keys()
    assert torch.equal(weights(case.policy()), before)
    assert not torch.equal(weights(method.actor), before)


@by_method
def test_a_diverged_loss_shows_in_the_metrics(name: str) -> None:
    method = make(name, critic_warmup_iterations=0)
    rollout = collect(method, CASES[0], torch.Generator().manual_seed(1))
    rollout.rewards[:] = float("inf")
    assert not torch.tensor(method.update(rollout)["critic/q_loss"]).isfinite()


@by_method
def test_resume_is_bit_for_bit(name: str) -> None:
    method, generator = make(name, critic_warmup_iterations=1), torch.Generator().manual_seed(1)
    for _ in range(2):
        method.update(collect(method, CASES[0], generator))
    file = io.BytesIO()
    torch.save(method.state_dict(), file)
    file.seek(0)
    resumed = make(name, critic_warmup_iterations=1)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    other = torch.Generator()
    other.set_state(generator.get_state())
    for _ in range(2):
        straight = method.update(collect(method, CASES[0], generator))
        again = resumed.update(collect(resumed, CASES[0], other))
        assert straight == again
    assert torch.equal(weights(method.actor), weights(resumed.actor))
    assert torch.equal(method.replay.rows, resumed.replay.rows)
    assert (method.gradient_steps, method.iteration) == (resumed.gradient_steps, resumed.iteration)
    assert torch.equal(method.generator.get_state(), resumed.generator.get_state())


@by_method
def test_acting_leaves_the_methods_own_generator_alone(name: str) -> None:
    method = make(name)
    before = method.generator.get_state()
    chunks = [method.act(torch.zeros(2, 11), True, torch.Generator().manual_seed(s)).actions for s in (0, 0, 1)]
    assert torch.equal(before, method.generator.get_state())
    assert torch.equal(chunks[0], chunks[1])
    assert not torch.equal(chunks[0], chunks[2])


@by_method
@pytest.mark.parametrize("time_limit", ["bootstrap", "terminal"])
def test_time_limit_setting_reaches_the_replay(name: str, time_limit: str) -> None:
    method = make(name, time_limit=time_limit, reward_scale=0.5)
    rollout = collect(method, CASES[0], torch.Generator().manual_seed(1))
    method.update(rollout)
    ended = rollout.terminated | rollout.truncated if time_limit == "terminal" else rollout.terminated
    assert torch.equal(method.replay.contents().terminated, ended.flatten().float())
    assert torch.equal(method.replay.contents().rewards, 0.5 * rollout.rewards.flatten())


def test_published_gradient_steps_per_iteration() -> None:
    gym, lift = TaskShape(11, 3, 4, n_envs=40, n_steps=500), TaskShape(11, 3, 4, n_envs=50, n_steps=300)
    for module, family, shape, expected in [
        (idql, "hopper", gym, 2560),
        (idql, "lift", lift, 1920),
        (dql, "hopper", gym, 320),
        (dql, "lift", lift, 240),
    ]:
        settings = replace(module.Settings(**module.PUBLISHED[family]), replay_capacity=10)
        method = {idql: idql.IDQL, dql: dql.DQL}[module]
        made = method(settings, CASES[0].policy(), shape, torch.Generator().manual_seed(0))
        assert made.steps_per_iteration == expected


def test_short_budgets_take_equal_gradient_steps() -> None:
    for family in ("hopper", "toy"):
        settings = [module.Settings(**module.EMBEDDED[family]) for module in (idql, dql)]
        assert len({(s.batch_size, s.replay_ratio, s.critic_warmup_iterations) for s in settings}) == 1


def test_chunk_length_must_be_the_tasks() -> None:
    shape = TaskShape(11, 3, 2, n_envs=4, n_steps=6)
    with pytest.raises(ValueError, match="action_horizon"):
        idql.IDQL(idql.Settings(), CASES[0].policy(), shape, torch.Generator())


@pytest.mark.parametrize("module", [idql, dql])
def test_published_and_short_settings_are_valid(module) -> None:
    for table in (module.PUBLISHED, module.EMBEDDED):
        for values in table.values():
            module.Settings(**values)


COMMON = {
    "discount": 1.5,
    "replay_ratio": 0.0,
    "batch_size": 0,
    "replay_capacity": -1,
    "actor_learning_rate": float("nan"),
    "critic_learning_rate": float("inf"),
    "reward_scale": -1.0,
    "critic_warmup_iterations": -1,
    "critic_hidden_dims": (256, 0),
    "time_limit": "ignore",
}
OWN = {
    idql: {"candidates": 0, "expectile": 1.0, "exploration_weight": 0.0, "critic_tau": 2.0},
    dql: {"eta": -1.0, "target_ema": -0.1, "bc_on": "expert"},
}
BAD = [(module, name, value) for module in OWN for name, value in {**COMMON, **OWN[module]}.items()]


@pytest.mark.parametrize(("module", "name", "value"), BAD)
def test_bad_settings_are_refused_with_their_name(module, name: str, value) -> None:
    with pytest.raises(ValueError, match=name):
        module.Settings(**{name: value})
