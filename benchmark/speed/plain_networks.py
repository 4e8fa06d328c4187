"""The plain methods' networks, sampler and optimiser: see `plain_methods`."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from otpr.denoisers import DenoisingMLP
from otpr.diffusion import DiffusionPolicy

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "mish": nn.Mish}


class PlainResidualBlock(nn.Module):
    """x + l2(act(l1(act(x)))) with the weights of one of our blocks."""

    def __init__(self, l1: nn.Linear, l2: nn.Linear, activation: str) -> None:
        super().__init__()
        self.l1, self.l2, self.act = plain_linear(l1), plain_linear(l2), ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., dim) to (..., dim)."""
        return x + self.l2(self.act(self.l1(self.act(x))))


class PlainEmbedding(nn.Module):
    """Sine and cosine features (B, dim) of denoising steps (B,)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, timesteps: Tensor) -> Tensor:
        """Frequencies 10000^(-i / (dim/2 - 1))."""
        half = self.dim // 2
        frequencies = torch.exp(torch.arange(half) * -(math.log(10000.0) / (half - 1)))
        angles = timesteps[:, None] * frequencies[None, :]
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


def plain_linear(layer: nn.Linear) -> nn.Linear:
    """A layer with the weights of another."""
    own = nn.Linear(layer.in_features, layer.out_features)
    own.load_state_dict(layer.state_dict())
    return own


def plain_layers(network: nn.Module, activation: str) -> nn.Sequential:
    """The layers of one of our plain or residual MLPs, parameters in the same order."""
    layers: list[nn.Module] = []
    if hasattr(network, "moduleList"):
        for block in network.get_submodule("moduleList").children():
            linear = block.get_submodule("linear_1")
            assert isinstance(linear, nn.Linear)
            layers += [plain_linear(linear), ACTIVATIONS[activation]()]
        return nn.Sequential(*layers[:-1])
    for layer in network.get_submodule("layers").children():
        if isinstance(layer, nn.Linear):
            layers.append(plain_linear(layer))
        else:
            l1, l2 = layer.get_submodule("l1"), layer.get_submodule("l2")
            assert isinstance(l1, nn.Linear)
            assert isinstance(l2, nn.Linear)
            layers.append(PlainResidualBlock(l1, l2, activation))
    return nn.Sequential(*layers)


class PlainDenoiser(nn.Module):
    """Noise prediction for chunks (B, H, A) at denoising steps (B,) and observations (B, O)."""

    def __init__(self, network: DenoisingMLP, activation: str) -> None:
        super().__init__()
        first, last = (module for module in network.time_embedding.children() if isinstance(module, nn.Linear))
        self.time_embedding = nn.Sequential(
            PlainEmbedding(first.in_features), plain_linear(first), nn.Mish(), plain_linear(last)
        )
        self.cond_mlp = None if network.cond_mlp is None else plain_layers(network.cond_mlp, activation)
        self.mlp_mean = plain_layers(network.mlp_mean, activation)

    def forward(self, x: Tensor, timesteps: Tensor, observations: Tensor) -> Tensor:
        """The noise, (B, H, A)."""
        condition = observations if self.cond_mlp is None else self.cond_mlp(observations)
        features = torch.cat([x.flatten(1), self.time_embedding(timesteps), condition], dim=-1)
        return self.mlp_mean(features).view(x.shape)


def extract(table: Tensor, timesteps: Tensor) -> Tensor:
    """Entries of a table (K,) at timesteps (B,), (B, 1, 1)."""
    return table.gather(-1, timesteps).view(-1, 1, 1)


class PlainPolicy(nn.Module):
    """A diffusion policy that samples with all K ancestral steps while exploring.

    Raises:
        ValueError: a policy of two stages, or with another sampler.
    """

    def __init__(self, policy: DiffusionPolicy, activation: str) -> None:
        super().__init__()
        if not isinstance(policy.network, DenoisingMLP) or policy.sampler.kind != "ddpm":
            raise ValueError("plain policies have one network and sample by DDPM")
        self.network = PlainDenoiser(policy.network, activation)
        self.schedule, self.sampler = copy.deepcopy(policy.schedule), policy.sampler
        self.chunk_shape = (policy.action_horizon, policy.action_dim)

    def mean_std(self, x: Tensor, timesteps: Tensor, observations: Tensor, floor: float) -> tuple[Tensor, Tensor]:
        """Mean (B, H, A) and standard deviation (B, 1, 1), at least `floor`, of x_{k-1} given x_k (B, H, A)."""
        table, clip = self.schedule, self.sampler.x0_clip
        noise = self.network(x, timesteps, observations)
        x0 = extract(table.sqrt_recip_alphas_cumprod, timesteps) * x
        x0 = (x0 - extract(table.sqrt_recipm1_alphas_cumprod, timesteps) * noise).clamp(-clip, clip)
        mean = extract(table.ddpm_mu_coef1, timesteps) * x0 + extract(table.ddpm_mu_coef2, timesteps) * x
        return mean, extract(table.ddpm_var, timesteps).clamp(min=1e-20).sqrt().clamp(min=floor)

    def sample_chain(
        self, observations: Tensor, generator: torch.Generator, early: PlainPolicy | None = None, keep: int = 0
    ) -> Tensor:
        """The last `keep` + 1 states of the chain for observations (N, O), (N, keep + 1, H, A).

        `early` takes the steps before those; by default there is one policy.
        """
        count, steps, limit = len(observations), self.sampler.denoising_steps, self.sampler.noise_clip
        draws = torch.randn(steps + 1, count, *self.chunk_shape, generator=generator)
        x = draws[0]
        chain = [x] if keep == steps else []
        for k in reversed(range(steps)):
            policy = self if early is None or k < keep else early
            timesteps = torch.full((count,), k)
            mean, std = policy.mean_std(x, timesteps, observations, self.sampler.exploration_std_floor)
            x = mean + std * draws[steps - k].clamp(-limit, limit)
            if k <= keep:
                chain.append(x)
        return torch.stack(chain, dim=1)

    def sample(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        """Chunks (N, H, A) for observations (N, O)."""
        return self.sample_chain(observations, generator)[:, -1]

    def bc_loss(self, actions: Tensor, observations: Tensor, generator: torch.Generator) -> Tensor:
        """Mean squared error of the noise predicted in chunks (B, H, A) at random steps."""
        timesteps = torch.randint(self.sampler.denoising_steps, (len(actions),), generator=generator)
        noise = torch.randn(actions.shape, generator=generator)
        noisy = extract(self.schedule.sqrt_alphas_cumprod, timesteps) * actions
        noisy = noisy + extract(self.schedule.sqrt_one_minus_alphas_cumprod, timesteps) * noise
        return F.mse_loss(self.network(noisy, timesteps, observations), noise)


def plain_adamw(module: nn.Module, learning_rate: float) -> torch.optim.AdamW:
    """AdamW as it comes, without weight decay."""
    return torch.optim.AdamW(module.parameters(), lr=learning_rate, weight_decay=0.0)


def frozen_twin(module: nn.Module) -> nn.Module:
    """A copy that is not trained by gradients."""
    return copy.deepcopy(module).requires_grad_(False)


def move_target(target: nn.Module, source: nn.Module, tau: float) -> None:
    """target <- (1 - tau) target + tau source."""
    for old, new in zip(target.parameters(), source.parameters(), strict=True):
        old.data.copy_(old.data * (1.0 - tau) + new.data * tau)
