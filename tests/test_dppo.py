"""DPPO against the reference's numbers, and the decisions that this implementation makes."""

from __future__ import annotations

import io

import pytest
import torch
from parity_cases import CASES, EXACT, FOLDER, Case

from baselines.dppo import DPPO, RewardScaler, Settings, generalised_advantages
from benchmark.dppo_files import dppo_network_state
from otpr.method import Rollout, TaskShape
from otpr.networks import ValueNet

by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def make(case: Case, reset_at_iteration: bool = False, **values) -> DPPO:
    settings = Settings(clip_base=case.clip_base, critic_hidden_dims=(32, 32, 32), **values)
    shape = TaskShape(case.observation_dim, case.action_dim, 4, 4, 6, reset_at_iteration)
    return DPPO(settings, case.policy(), shape, torch.Generator().manual_seed(0))


def fine_tuned(case: Case) -> DPPO:
    method, file = make(case), FOLDER / case.name / "ppo_state_10.pt"
    method.actor.network.load_state_dict(dppo_network_state(file, "actor_ft"))
    state = torch.load(file, weights_only=True)["model"]
    method.critic.load_state_dict({k[7:]: v for k, v in state.items() if k.startswith("critic.")})
    return method


@by_case
def test_losses_and_gradients_equal_reference(case: Case) -> None:
    arrays, method = case.arrays("dppo"), fine_tuned(case)
    rows, index = arrays["batch_index"], arrays["denoising_index"]
    chain = arrays["sample_train_chain"]
    old = arrays["logprob_old"].clamp(-5, 2).flatten(1).mean(1).view(16, 10)[rows, index]
    weighted = method.weight_advantages(arrays["advantages"][rows], index)
    minibatch = (arrays["obs"][rows], chain[rows, index], chain[rows, index + 1], index)
    loss, metrics = method.policy_loss(*minibatch, weighted, old)
    loss.backward()
    torch.testing.assert_close(loss, arrays["pg_loss"], **EXACT)
    torch.testing.assert_close(metrics["actor/clip_fraction"].double(), arrays["clip_fraction"], **EXACT)
    torch.testing.assert_close(metrics["actor/ratio"].double(), arrays["ratio_mean"], **EXACT)
    # a mean of float32 differences of numbers near 1: its own rounding is some 1e-8
    torch.testing.assert_close(metrics["actor/approx_kl"].double(), arrays["approx_kl"], rtol=1e-5, atol=2e-8)
    norm = torch.nn.utils.get_total_norm([p.grad for p in method.actor.parameters() if p.grad is not None])
    torch.testing.assert_close(norm, arrays["actor_grad_norm"], **EXACT)
    torch.testing.assert_close(method.critic(arrays["obs"]), arrays["values"], **EXACT)


@by_case
def test_value_step_equals_reference(case: Case) -> None:
    arrays, method = case.arrays("dppo"), fine_tuned(case)
    metrics = method.value_step(arrays["obs"], arrays["returns"], arrays["batch_index"])
    torch.testing.assert_close(metrics["critic/value_loss"], arrays["v_loss"], **EXACT)
    norm = torch.nn.utils.get_total_norm([p.grad for p in method.critic.parameters() if p.grad is not None])
    torch.testing.assert_close(norm, arrays["critic_grad_norm"], **EXACT)


@by_case
def test_log_probabilities_from_the_draws_are_those_of_the_chain(case: Case) -> None:
    method, generator = fine_tuned(case), torch.Generator().manual_seed(2)
    chunk = method.act(torch.randn(8, case.observation_dim, generator=generator), True, generator)
    observations = torch.randn(8, case.observation_dim, generator=torch.Generator().manual_seed(2))
    chain, steps = chunk.extras["chain"], method.settings.ft_denoising_steps
    for step in range(steps):
        index = torch.full((8,), step)
        expected = method.log_probability(observations, chain[:, step], chain[:, step + 1], index)
        torch.testing.assert_close(chunk.extras["log_probability"][:, step], expected, rtol=1e-4, atol=1e-5)


@by_case
def test_micro_batches_do_not_change_the_gradient(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays, gradients = case.arrays("dppo"), []
    for size in (4096, 7):
        method = fine_tuned(case)
        monkeypatch.setattr("baselines.dppo.MICRO_BATCH", size)
        rows, index, chain = arrays["batch_index"], arrays["denoising_index"], arrays["sample_train_chain"]
        minibatch = (arrays["obs"][rows], chain[rows, index], chain[rows, index + 1], index)
        method.policy_step(minibatch, arrays["advantages"][rows], torch.zeros(len(rows)), True)
        gradients.append([p.grad.clone() for p in method.actor.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


@by_case
def test_reward_scaling_equals_reference(case: Case) -> None:
    arrays = case.arrays("reward_scaling")
    scaler, first = RewardScaler(8), arrays["first"].T.bool()
    for scale, name in ((1.0, "scaled_first_call"), (3.0, "scaled_second_call_of_3x")):
        scaled = scaler(scale * arrays["reward"].T, first)
        torch.testing.assert_close(scaled.double(), arrays[name].T, **EXACT)


def test_advantages_by_hand() -> None:
    rewards, values = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[0.5], [1.0], [1.5]])
    next_values = torch.tensor([[1.0], [0.0], [4.0]])
    ended = torch.tensor([[False], [True], [False]])
    result = generalised_advantages(rewards, values, next_values, ended, 0.9, 0.5)
    third = 3 + 0.9 * 4 - 1.5
    second = 2 - 1.0  # nothing flows back across the end
    assert result.flatten().tolist() == pytest.approx([1 + 0.9 - 0.5 + 0.45 * second, second, third])


def rollout(case: Case, method: DPPO) -> Rollout:
    generator = torch.Generator().manual_seed(3)
    observations = torch.randn(6, 4, case.observation_dim, generator=generator)
    chunk = method.act(observations.flatten(0, 1), True, generator)
    flags = torch.zeros(6, 4, dtype=torch.bool)
    truncated = flags.clone()
    truncated[2] = True
    return Rollout(
        observations,
        chunk.actions.unflatten(0, (6, 4)),
        torch.rand(6, 4, generator=generator),
        flags,
        truncated,
        torch.randn(6, 4, case.observation_dim, generator=generator),
        {name: values.unflatten(0, (6, 4)) for name, values in chunk.extras.items()},
    )


def test_time_limits_bootstrap_from_the_final_observation() -> None:
    case, results = CASES[0], {}
    for rule in ("bootstrap", "terminal", "ignore"):
        method = make(case, time_limit=rule, gae_lambda=0.0, reward_scaling=False)
        data = rollout(case, method)
        advantages, _ = method.estimate_advantages(data)
        results[rule] = advantages.view(6, 4)[2]
        value = method.critic(data.observations)[2]
    after = {"bootstrap": method.critic(data.next_observations[2]), "ignore": method.critic(data.observations[3])}
    for rule, advantage in results.items():
        expected = data.rewards[2] + 0.99 * after.get(rule, 0.0) - value
        torch.testing.assert_close(advantage, expected)


def test_ignored_time_limits_bootstrap_an_iterations_last_chunk_from_the_episodes_own_last_state() -> None:
    case = CASES[0]
    method = make(case, time_limit="ignore", gae_lambda=0.0, reward_scaling=False)
    data = rollout(case, method)
    data.truncated[5] = True
    advantages, _ = method.estimate_advantages(data)
    expected = data.rewards[5] + 0.99 * method.critic(data.next_observations[5]) - method.critic(data.observations[5])
    torch.testing.assert_close(advantages.view(6, 4)[5], expected)


@pytest.mark.parametrize("reset", [False, True])
def test_the_return_that_scales_rewards_starts_anew_with_an_iteration_of_new_episodes(reset: bool) -> None:
    method = make(CASES[0], reset_at_iteration=reset)
    data = rollout(CASES[0], method)
    for _ in range(2):
        method.estimate_advantages(data)
    assert method.first.tolist() == [reset] * 4  # no environment is at an end after the last chunk
    again = make(CASES[0], reset_at_iteration=not reset)
    for _ in range(2):
        again.estimate_advantages(data)
    assert method.reward_scaler.state_dict()["moments"] != again.reward_scaler.state_dict()["moments"]


def test_warm_up_freezes_the_actor_alone() -> None:
    method = make(CASES[0], critic_warmup_iterations=1, batch_size=60)
    data, before = rollout(CASES[0], method), [p.clone() for p in method.actor.parameters()]
    value = [p.clone() for p in method.critic.parameters()]
    method.update(data)
    assert all(torch.equal(a, b) for a, b in zip(before, method.actor.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(value, method.critic.parameters(), strict=True))
    method.update(data)
    assert not all(torch.equal(a, b) for a, b in zip(before, method.actor.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(case_weights(), method.frozen.parameters(), strict=True))


def case_weights() -> list[torch.Tensor]:
    return list(CASES[0].policy().parameters())


def test_resume_is_bit_equal() -> None:
    straight = make(CASES[0], batch_size=60)
    data = rollout(CASES[0], straight)
    straight.update(data)
    file = io.BytesIO()
    torch.save(straight.state_dict(), file)
    file.seek(0)
    resumed = make(CASES[0], batch_size=60)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert straight.update(data) == resumed.update(data)
    for ours, theirs in zip(straight.actor.parameters(), resumed.actor.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_clip_width_grows_from_base_to_coefficient() -> None:
    width = make(CASES[1]).clip_width(torch.arange(10))
    assert width[0].item() == pytest.approx(0.001) and width[-1].item() == pytest.approx(0.01)
    assert (width.diff() > 0).all()


@pytest.mark.parametrize("values", [{"discount": 1.5}, {"batch_size": 1}, {"clip_rate": 0.0}, {"time_limit": "never"}])
def test_bad_settings_are_refused(values: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        Settings(**values)


def test_value_network_has_the_checkpoint_names() -> None:
    keys = ValueNet(11, (32, 32, 32), torch.Generator()).state_dict()
    assert "Q1.layers.1.l1.weight" in keys
