"""OTPR's guidance, arms, expert pairs and bad settings."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from agent_cases import CASE, MASKED, SMALL, batch_of, batch_of_any, make, pairs, trained
from test_offpolicy import collect, weights
from torch import Tensor

from benchmark.methods import ARMS, refuse_idle, resolve_settings
from benchmark.tasks import TASKS
from otpr import agent, released
from otpr.critic import expectile_choice
from otpr.duality import interaction
from otpr.exact import exact_plan
from otpr.keypoints import jensen_shannon
from otpr.method import TaskShape
from otpr.offpolicy import sample_candidates
from otpr.transport import cross_cost


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
    with torch.no_grad():
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


@torch.no_grad()  # where gradients are recorded other passes run, whose last bits may differ
def one_sample(method: agent.OTPR, observations: Tensor) -> Tensor:
    return method.actor.sample(observations, False, torch.Generator().manual_seed(0))


def test_weighting_alone_acts_with_one_sample_and_selection_alone_clones_evenly() -> None:
    method = trained(selection=False)
    observations = torch.zeros(3, CASE.observation_dim)
    chunk = method.act(observations, False, torch.Generator().manual_seed(0)).actions
    alone = one_sample(method, observations)
    assert torch.equal(chunk, alone)


def test_other_rules_are_the_actor_alone_and_its_candidate_of_largest_q() -> None:
    method, generator = trained(), torch.Generator
    rules, observations = method.other_rules(), torch.zeros(3, CASE.observation_dim)
    assert set(rules) == {"actor", "best_q"}
    alone = one_sample(method, observations)
    assert torch.equal(rules["actor"](observations, generator().manual_seed(0)).actions, alone)
    with torch.no_grad():
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
    alone = one_sample(method, observations)
    assert torch.equal(method.act(observations, False, torch.Generator().manual_seed(0)).actions, alone)
    batch = batch_of(method)
    u, v = method.transport.potentials(batch.observations, batch.actions)
    h = (u + v + method.candidate_q(batch.observations, batch.actions[:, None])[:, 0]).relu() / 0.2
    torch.testing.assert_close(method.guidance(batch.observations, batch.actions[:, None])[:, 0], h)


def test_a_released_batch_is_half_keypoints_related_by_cosines(monkeypatch) -> None:
    assert released.Settings().keypoints == released.Settings().transport_block_size == 128
    method, steps = make(released.ReleasedOTPR, keypoints=16, expert_share=0.25), []
    method.update(collect(method, CASE, torch.Generator().manual_seed(1)))
    step = method._masked_step
    monkeypatch.setattr(method, "_masked_step", lambda *args: steps.append(args[1:]) or step(*args))
    method.fit_transport()
    (states, chunks), (later, _) = steps[:2]
    assert len(states) == len(chunks) == 32
    assert torch.equal(states[:16], method.expert.observations[:16])
    assert not torch.equal(later[:16], states[:16])
    numbers = states.numpy().astype(np.float64)
    unit = numbers / np.linalg.norm(numbers, axis=1, keepdims=True)
    shares = np.exp(-(1 - unit @ unit[:16].T) / 0.1)
    expected = shares / shares.sum(1, keepdims=True)
    relation = released.cosine_relation(states, states[:16], 0.1)
    np.testing.assert_allclose(relation.numpy(), expected, atol=1e-5)
    cost, plain = released.floored_jensen_shannon(relation, relation), jensen_shannon(relation[:, None], relation)
    torch.testing.assert_close(cost, plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [("guidance", "q"), ("transport_tolerance", 0.5), ("transport_warm_steps", 5), ("guide_weight", 0.5)],
)
def test_the_released_arm_refuses_what_it_lacks(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}.* got {value!r}$"):
        released.Settings(**{name: value})


def test_expert_pairs_are_those_of_the_best_episodes() -> None:
    method = make(expert_share=0.1, **MASKED)
    assert method.expert.ranks.max() <= 0.1 < pairs().ranks.max()
    observations, actions, _ = method.actor_pairs(batch_of_any(method))
    assert (observations[4:] == 0).all() and (actions[4:] == 0).all() and (observations[:4] != 0).all()


@pytest.mark.parametrize("values", [{}, MASKED, {"keypoints": 4}], ids=["replay", "experts", "experts unseen"])
def test_pairs_are_judged_once_where_they_are_drawn_more_often(values: dict[str, Any], monkeypatch) -> None:
    method = trained(weighting=True, **values)
    batch = batch_of(method)
    pairs = len(method.replay) + (len(method.expert.actions) if "expert_fraction" in values else 0)
    assert method.guidance_ahead(pairs - 1) is None
    generator = method.generator.get_state()
    observations, actions, _ = method.actor_pairs(batch)
    direct = method.weights(method.pair_guidance(observations, actions))
    method.generator.set_state(generator)
    known, (*_, places) = method.guidance_ahead(pairs), method.actor_pairs(batch)
    assert known.shape == (pairs,)
    torch.testing.assert_close(method.weights(known[places]), direct)
    assert direct.std() > 0

    judged: list[int] = []
    guidance = method.guidance
    monkeypatch.setattr(agent, "GUIDANCE_ROWS", 10)
    monkeypatch.setattr(method, "fit_transport", dict)
    monkeypatch.setattr(method, "guidance", lambda *pairs: judged.append(len(pairs[0])) or guidance(*pairs))
    monkeypatch.setattr(type(method), "steps_per_iteration", 1 + pairs // method.settings.batch_size)
    method.learn()
    assert sum(judged) == pairs and max(judged) == 10
    assert method.known_guidance is None


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


OTHER: dict[str, Any] = {
    "regulariser": "entropic", "epsilon": 0.7, "action_bound": 2.0, "row_condition": "candidates", "policy_share": 0.1,
    "guide_weight": 0.9, "transport_block_size": 12, "transport_first_steps": 9, "transport_warm_steps": 3,
    "transport_tolerance": 50.0, "transport_learning_rate": 0.1, "weight_clip": 1.5, "exploration_weight": 0.9,
    "relation_temperature": 3.0, "expert_share": 0.2,
}  # fmt: skip


@pytest.mark.parametrize(
    "values", [MASKED | {"guidance": "q"}, MASKED | {"weighting": False}, MASKED | {"selection": False}, {}]
)
def test_idle_settings_change_nothing_and_are_refused(values: dict[str, Any]) -> None:
    idle = agent.Settings(**values).idle
    assert idle
    method, other = trained(**values), trained(**values | {name: OTHER[name] for name in idle})
    observations, chosen = torch.zeros(5, CASE.observation_dim), []
    for each in (method, other):
        chosen.append(each.act(observations, True, torch.Generator().manual_seed(4)).actions)
    assert torch.equal(weights(method.actor), weights(other.actor)) and torch.equal(*chosen)
    for name in idle:
        with pytest.raises(ValueError, match=f"'otpr-u': {name} changes nothing with "):
            refuse_idle("otpr-u", method.settings, {name})


@pytest.mark.parametrize("name", [name for name in OTHER if name not in ("regulariser", "weight_clip")])
def test_settings_that_are_not_idle_change_something(name: str) -> None:
    assert not agent.Settings(**MASKED).idle
    before, after = trained(**MASKED), trained(**MASKED | {name: OTHER[name]})
    observations = torch.zeros(50, CASE.observation_dim)
    acts = [each.act(observations, True, torch.Generator().manual_seed(4)).actions for each in (before, after)]
    assert not torch.equal(weights(before.actor), weights(after.actor)) or not torch.equal(*acts)
