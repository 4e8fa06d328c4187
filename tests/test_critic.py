"""The implicit Q-learning critic against DPPO's reference numbers, and its own decisions."""

from __future__ import annotations

import pytest
import torch
from parity_cases import CASES, EXACT, FOLDER, Case
from torch import Tensor, nn

from otpr import hidden
from otpr.critic import (
    CriticSettings,
    FusedAdamW,
    ImplicitQCritic,
    descend,
    expectile_choice,
    expectile_loss,
    td_target,
)
from otpr.networks import TwinQ, polyak_update
from otpr.precision import PRECISIONS, backward, precision_context
from otpr.replay import Batch

by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def reference_critic(case: Case) -> ImplicitQCritic:
    settings = CriticSettings(hidden_dims=(32, 32, 32))
    generator = torch.Generator().manual_seed(0)
    critic = ImplicitQCritic(settings, case.observation_dim, 4 * case.action_dim, generator)
    state = torch.load(FOLDER / case.name / "critics.pt", weights_only=True)
    critic.q.load_state_dict(state["critic_q"])
    critic.target_q.load_state_dict(state["target_q"])
    critic.value_net.load_state_dict(state["critic_v"])
    return critic


def reference_batch(arrays: dict[str, Tensor]) -> Batch:
    names = ("obs", "actions", "rewards", "terminated", "next_obs")
    return Batch(*(arrays[name] for name in names), torch.arange(len(arrays["obs"])))


@by_case
def test_values_and_losses_equal_reference(case: Case) -> None:
    arrays, critic = case.arrays("idql"), reference_critic(case)
    batch = reference_batch(arrays)
    pairs = zip(("q1", "q2"), critic.q(batch.observations, batch.actions), strict=True)
    targets = zip(("target_q1", "target_q2"), critic.target_q(batch.observations, batch.actions), strict=True)
    for name, values in [*pairs, *targets, ("v", critic.value(batch.observations))]:
        torch.testing.assert_close(values, arrays[name], **EXACT)
    torch.testing.assert_close(critic.value_loss(batch)[0], arrays["loss_v"], **EXACT)
    torch.testing.assert_close(critic.q_loss(batch)[0], arrays["loss_q"], **EXACT)
    smaller = torch.minimum(arrays["target_q1"], arrays["target_q2"])
    torch.testing.assert_close(critic.min_target_q(batch.observations, batch.actions), smaller, **EXACT)


@by_case
def test_target_update_equals_reference(case: Case) -> None:
    critic = reference_critic(case)
    polyak_update(*critic.averaged, 0.005)
    first = next(critic.target_q.Q1.parameters())
    torch.testing.assert_close(first.data, case.arrays("idql")["target_polyak_005_first_weight"], **EXACT)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_descent_is_that_of_accumulated_gradients(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where gradients come transposed, as from PyTorch's own layers, and where a parameter takes no part."""
    monkeypatch.setattr(hidden, "_is_known", lambda *_: False)
    generator, found = torch.Generator().manual_seed(0), []
    observations, actions = torch.randn(9, 5, generator=generator), torch.randn(9, 2, 3, generator=generator)
    for ours in (True, False):
        q, spare = TwinQ(5, 6, (24, 16), False, torch.Generator().manual_seed(1)), nn.Parameter(torch.ones(2))
        optimizer = FusedAdamW([*q.parameters(), spare], 1e-2)
        spare.grad = torch.ones(2)
        for _ in range(3):
            with precision_context(precision, "cpu"):
                loss = torch.stack([*q(observations, actions)]).square().sum()
                if ours:
                    descend(optimizer, loss)
                else:
                    optimizer.zero_grad()
                    backward([loss])
                    optimizer.step()
        found.append([*q.parameters(), spare])
    assert all(map(torch.equal, *found))
    assert spare.tolist() == [1, 1]


def test_update_steps_value_then_q_then_target() -> None:
    case = CASES[0]
    batch = reference_batch(case.arrays("idql"))
    critic, by_hand = reference_critic(case), reference_critic(case)
    critic.update(batch)
    descend(by_hand.value_optimizer, by_hand.value_loss(batch)[0])
    descend(by_hand.q_optimizer, by_hand.q_loss(batch)[0])
    polyak_update(*by_hand.averaged, by_hand.settings.polyak)
    for name in ("q", "target_q", "value_net"):
        for ours, theirs in zip(getattr(critic, name).parameters(), getattr(by_hand, name).parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_termination_cuts_the_value_of_the_next_state() -> None:
    case, critic = CASES[0], reference_critic(CASES[0])
    arrays = case.arrays("idql")
    batch = reference_batch(arrays)
    batch.terminated = torch.tensor([0.0, 1.0]).repeat(8)
    target = td_target(batch, critic.value(batch.next_observations), 0.9)
    following = critic.value(arrays["next_obs"])
    torch.testing.assert_close(target[0::2], (arrays["rewards"] + 0.9 * following)[0::2])
    torch.testing.assert_close(target[1::2], arrays["rewards"][1::2])


def test_expectile_loss_weighs_both_sides() -> None:
    values = torch.randn(4001, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for expectile in (0.5, 0.8, 0.95):
        guess = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        expectile_loss(values - guess, expectile).backward()
        excess = (values - guess).detach()
        above, below = excess.clamp(min=0).mean(), (-excess).clamp(min=0).mean()
        torch.testing.assert_close(guess.grad, 2 * ((1 - expectile) * below - expectile * above))


def test_candidates_are_evaluated_with_their_own_observation() -> None:
    case, critic = CASES[0], reference_critic(CASES[0])
    generator = torch.Generator().manual_seed(1)
    observations = torch.randn(5, case.observation_dim, generator=generator)
    candidates = torch.randn(5, 3, 4, case.action_dim, generator=generator)
    q = critic.candidate_q(observations, candidates)
    for j in range(3):
        torch.testing.assert_close(q[:, j], critic.min_target_q(observations, candidates[:, j]), **EXACT)


def test_choice_has_the_two_level_frequencies() -> None:
    q = torch.tensor([[1.0, -1.0, 2.0, -2.0]]).repeat(40_000, 1)
    index = expectile_choice(q, torch.zeros(40_000), 0.7, torch.Generator().manual_seed(0))
    frequency = torch.bincount(index, minlength=4) / 40_000
    torch.testing.assert_close(frequency, torch.tensor([0.35, 0.15, 0.35, 0.15]), atol=0.01, rtol=0)
    tied = expectile_choice(torch.zeros(40_000, 2), torch.zeros(40_000), 0.7, torch.Generator().manual_seed(0))
    assert abs(tied.float().mean() - 0.5) < 0.01  # Q = V counts as no better, for every candidate alike


def test_targets_receive_no_gradient() -> None:
    critic, batch = reference_critic(CASES[0]), reference_batch(CASES[0].arrays("idql"))
    critic.update(batch)
    assert all(p.grad is None for p in critic.target_q.parameters())
