"""The diffusion policy against DPPO's reference numbers, and its own invariants."""

from __future__ import annotations

import pytest
import torch
from parity_cases import CASES, CHAIN, EXACT, FOLDER, Case

from benchmark.dppo_files import dppo_network_state
from otpr.denoisers import MOST_STEPS, DenoisingMLP, TwoStageMLP
from otpr.diffusion import DiffusionPolicy, SamplerSettings

by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@by_case
def test_schedule_equals_reference(case: Case) -> None:
    arrays, schedule = case.arrays("forward"), case.policy().schedule
    for ours, theirs in [
        ("betas", "schedule_betas"),
        ("alphas_cumprod", "schedule_alphas_cumprod"),
        ("ddpm_var", "schedule_ddpm_var"),
        ("ddpm_mu_coef1", "schedule_mu_coef1"),
        ("ddpm_mu_coef2", "schedule_mu_coef2"),
    ]:
        torch.testing.assert_close(getattr(schedule, ours), arrays[theirs], **EXACT)


@by_case
def test_network_and_cloning_loss_equal_reference(case: Case) -> None:
    arrays, policy = case.arrays("forward"), case.policy()
    predicted = policy.network(arrays["x_noisy"], arrays["t"], arrays["obs"])
    torch.testing.assert_close(predicted, arrays["eps_pred"], **EXACT)
    losses = policy.denoising_losses(arrays["bc_actions"], arrays["obs"], arrays["t"], arrays["bc_noise"])
    torch.testing.assert_close(losses.mean(), arrays["bc_loss"], **EXACT)


@by_case
def test_along_a_chain_the_network_predicts_what_it_does_step_by_step(case: Case) -> None:
    generator = torch.Generator().manual_seed(0)
    network, other = case.policy().network, case.network()
    both = TwoStageMLP(other, network, late_steps=2)
    x = torch.randn(8, 4, case.action_dim, generator=generator)
    observations = torch.randn(8, case.observation_dim, generator=generator)
    timesteps = torch.tensor([5, 2, 1, 0])
    for one in (network, both):
        noise_at = one.along_chain(timesteps, observations)
        for step in range(4):
            expected = one(x, timesteps[step : step + 1], observations)
            torch.testing.assert_close(noise_at(x, step), expected, rtol=1e-4, atol=1e-5)
            parts = [network.mlp_mean.first.weight, network.mlp_mean.last.weight, network.mlp_mean.layers[1].l2.weight]
            found, reference = (
                torch.autograd.grad((value * x).sum(), parts, retain_graph=True, materialize_grads=True)
                for value in (noise_at(x, step), expected)
            )
            torch.testing.assert_close(found, reference, rtol=1e-3, atol=1e-4)
    # where reading a step would wait for the device both stages are evaluated; "meta" stands for any such device
    elsewhere = both.to("meta").along_chain(timesteps.to("meta"), observations.to("meta"))
    assert elsewhere(x.to("meta"), 1).shape == x.shape


@pytest.mark.parametrize("hidden_layers", [1, 3, 5])
def test_chains_of_networks_of_any_depth(hidden_layers: int) -> None:
    generator = torch.Generator().manual_seed(0)
    network = DenoisingMLP(5, 3, 4, generator, hidden_dims=(32,) * hidden_layers)
    x, observations = torch.randn(8, 4, 3, generator=generator), torch.randn(8, 5, generator=generator)
    timesteps = torch.tensor([5, 2])
    values = network.along_chain(timesteps, observations)(x, 1), network(x, timesteps[1:], observations)
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5)
    found, reference = (
        torch.autograd.grad((value * x).sum(), [*network.parameters()], materialize_grads=True) for value in values
    )
    torch.testing.assert_close(found, reference, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("hidden_layers", [1, 3, 5])
@pytest.mark.parametrize("kind", ["relu", "tanh"])
@pytest.mark.parametrize("recorded", [True, False])
def test_chunks_that_share_an_observation(hidden_layers: int, kind: str, recorded: bool) -> None:
    generator, hidden_dims = torch.Generator().manual_seed(0), (32,) * hidden_layers
    early, late = (DenoisingMLP(5, 3, 4, generator, hidden_dims, kind, cond_mlp_dims=(8, 6)) for _ in range(2))
    x, observations = torch.randn(6, 4, 3, generator=generator), torch.randn(2, 5, generator=generator)
    timesteps = torch.tensor([5, 0])
    for network in (late, TwoStageMLP(early, late, late_steps=2)):
        with torch.set_grad_enabled(recorded):
            shared = network.along_chain(timesteps, observations, 3)
            alone = network.along_chain(timesteps, observations.repeat_interleave(3, 0))
            values = [torch.stack([noise_at(x, 0), noise_at(x, 1)]) for noise_at in (shared, alone)]
        torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5)
        if recorded:
            parameters = [*late.parameters()]
            found, reference = (
                torch.autograd.grad(v.square().sum(), parameters, materialize_grads=True) for v in values
            )
            torch.testing.assert_close(found, reference, rtol=1e-3, atol=1e-4)


def test_chains_whose_chunks_share_an_observation() -> None:
    policy, early = CASES[0].policy(), DiffusionPolicy(CASES[0].network())
    observations = torch.randn(2, CASES[0].observation_dim, generator=torch.Generator().manual_seed(1))
    noise = policy.draw_noise(6, torch.Generator().manual_seed(2))
    shared, alone = (
        policy.sample_chain(part, noise, explore=True, keep=3, early=early)
        for part in (observations, observations.repeat_interleave(3, 0))
    )
    torch.testing.assert_close(shared, alone, **CHAIN)
    assert policy.sample(observations[:0], True, torch.Generator(), 3).shape == (0, 4, CASES[0].action_dim)


def test_losses_embed_each_step_once() -> None:
    policy, generator = CASES[0].policy(), torch.Generator().manual_seed(0)
    rows: list[int] = []
    policy.network.time_embedding[0].register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    actions, observations = torch.zeros(50, 4, CASES[0].action_dim), torch.zeros(50, CASES[0].observation_dim)
    policy.bc_losses(actions, observations, generator)
    policy.log_probability(actions, actions, observations, torch.zeros(50, dtype=torch.long))
    assert rows == [policy.denoising_steps, policy.sampling_steps]


@pytest.mark.parametrize("hidden_layers", [1, 3])
@pytest.mark.parametrize("count", [3, MOST_STEPS, MOST_STEPS + 1])
def test_each_step_is_embedded_once(hidden_layers: int, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    early, late = (DenoisingMLP(5, 3, 4, generator, hidden_dims=(32,) * hidden_layers) for _ in range(2))
    x, observations = torch.randn(9, 4, 3, generator=generator), torch.randn(9, 5, generator=generator)
    timesteps = torch.arange(count).flip(0)
    index = torch.randint(count, (9,), generator=generator)
    for network in (late, TwoStageMLP(early, late, late_steps=2)):
        parameters = [*network.parameters()]
        values = network.at_steps(x, index, timesteps, observations), network(x, timesteps[index], observations)
        torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5)
        found, reference = (torch.autograd.grad((v * x).sum(), parameters, materialize_grads=True) for v in values)
        torch.testing.assert_close(found, reference, rtol=1e-3, atol=1e-4)
    rows: list[int] = []
    late.time_embedding[0].register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    late.at_steps(x, index, timesteps, observations)
    assert rows == [count if count <= MOST_STEPS else 9]


@by_case
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_sampled_chain_equals_reference(case: Case, mode: str) -> None:
    arrays, policy = case.arrays("dppo"), case.policy()
    noise = arrays[f"sample_{mode}_noise"]
    chain = policy.sample_chain(arrays["obs"], noise, explore=mode == "train", keep=10, early=policy)
    torch.testing.assert_close(chain, arrays[f"sample_{mode}_chain"], **CHAIN)
    torch.testing.assert_close(chain[:, -1], arrays[f"sample_{mode}_actions"], **CHAIN)


@by_case
def test_log_probability_equals_reference(case: Case) -> None:
    arrays, policy = case.arrays("dppo"), case.policy()
    chain, count = arrays["sample_train_chain"], len(arrays["obs"])
    before, after = chain[:, :-1].flatten(0, 1), chain[:, 1:].flatten(0, 1)  # (160, H, A)
    observations = arrays["obs"].repeat_interleave(10, 0)
    index = (torch.arange(10) + 10).repeat(count)
    old = policy.log_probability(before, after, observations, index)
    torch.testing.assert_close(old, arrays["logprob_old"], rtol=1e-5, atol=5e-6)
    policy.network.load_state_dict(dppo_network_state(FOLDER / case.name / "ppo_state_10.pt", "actor_ft"))
    new = policy.log_probability(before, after, observations, index)
    torch.testing.assert_close(new, arrays["logprob_new"], rtol=1e-5, atol=5e-6)


@by_case
def test_ddim_with_all_steps_and_eta_one_has_the_ddpm_moments(case: Case) -> None:
    ddpm = case.policy()
    ddim = DiffusionPolicy(ddpm.network, SamplerSettings(kind="ddim", ddim_steps=20))
    ours, theirs = ddim.reverse_steps(explore=True), ddpm.reverse_steps(explore=True)
    for name in ("timesteps", "x0_coef", "x_coef", "std"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=1e-5)


def test_ddim_evaluation_is_a_function_of_the_first_draw() -> None:
    policy = DiffusionPolicy(CASES[0].network(), SamplerSettings(kind="ddim", ddim_steps=5))
    noise = policy.draw_noise(3, torch.Generator().manual_seed(1))
    other = noise.clone()
    other[1:] += 1
    observations = torch.zeros(3, 11)
    first, second = (policy.sample_chain(observations, n, explore=False, keep=0) for n in (noise, other))
    assert torch.equal(first, second)
    assert not torch.equal(first, policy.sample_chain(observations, noise, explore=True, keep=0))


@pytest.mark.parametrize(
    "values",
    [
        {"kind": "flow"},
        {"ddim_steps": 0},
        {"ddim_steps": 21},
        {"kind": "ddim", "ddim_steps": 7},
        {"noise_clip": 0.0},
        {"x0_clip": -1.0},
    ],
)
def test_bad_sampler_settings_are_refused(values: dict) -> None:
    with pytest.raises(ValueError):
        SamplerSettings(**values)


def test_truncated_checkpoint_is_one_clear_error(tmp_path) -> None:
    whole = (FOLDER / "hopper_like" / "state_200.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a DPPO checkpoint"):
        dppo_network_state(tmp_path / "cut.pt", "ema")
