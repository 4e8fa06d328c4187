"""The diffusion policy that every method fine-tunes: noise schedule, denoising chain, log-probability, cloning loss.

DDPM (Ho et al. 2020) with the cosine schedule of Nichol and Dhariwal 2021, predicting the noise; DDIM (Song et al.
2021) as the faster sampler.
Conventions, floors and clips are those of DPPO (Ren et al. 2024), whose checkpoints load unchanged.
``k`` counts denoising steps, K-1 (noisiest) to 0.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from otpr.denoisers import DenoisingMLP, TwoStageMLP
from otpr.networks import per_sample_mse


@dataclass(frozen=True)
class SamplerSettings:
    """How chunks are sampled; the defaults are those of DPPO."""

    kind: Literal["ddpm", "ddim"] = "ddpm"
    denoising_steps: int = 20  # K of the noise schedule
    ddim_steps: int = 5  # steps taken when kind is "ddim"
    exploration_std_floor: float = 0.1  # least standard deviation of a step while collecting
    logprob_std_floor: float = 0.1  # the same inside the log-probability
    evaluation_std_floor: float = 1e-3  # the same in evaluation, whose last step adds no noise; DDIM then adds none
    noise_clip: float = 3.0  # standard normal draws of the steps are clipped to +- this
    x0_clip: float = 1.0  # the prediction of the clean chunk is clipped to +- this

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: a value outside its range.
        """
        if self.kind not in ("ddpm", "ddim"):
            raise ValueError(f"unknown sampler kind {self.kind!r}; valid: ddpm, ddim")
        if not 1 <= self.ddim_steps <= self.denoising_steps:
            raise ValueError(f"ddim_steps must be in 1..{self.denoising_steps}, got {self.ddim_steps}")
        if self.kind == "ddim" and self.denoising_steps % self.ddim_steps:
            # else the chain would begin below its noisiest steps, with draws that are too noisy for it
            raise ValueError(
                f"ddim_steps must divide the {self.denoising_steps} denoising steps, got {self.ddim_steps}"
            )
        for name in ("exploration_std_floor", "logprob_std_floor", "evaluation_std_floor", "noise_clip", "x0_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


def cosine_betas(steps: int, offset: float = 0.008) -> Tensor:
    """Noise rates beta_k of the cosine schedule, (K,) float64, at most 0.999.

    The grid is DPPO's: steps + 1 points on [0, steps + 1], so that its checkpoints keep their meaning.
    """
    grid = torch.linspace(0, steps + 1, steps + 1, dtype=torch.float64)
    signal = torch.cos((grid / (steps + 1) + offset) / (1 + offset) * math.pi / 2) ** 2
    return (1 - signal[1:] / signal[:-1]).clamp(0, 0.999)


class NoiseSchedule(nn.Module):
    """Coefficients of the forward process q(x_k | x_0) and the posterior q(x_{k-1} | x_k, x_0), each (K,) float32."""

    betas: Tensor
    alphas_cumprod: Tensor
    ddpm_var: Tensor
    ddpm_mu_coef1: Tensor
    ddpm_mu_coef2: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    sqrt_recip_alphas_cumprod: Tensor
    sqrt_recipm1_alphas_cumprod: Tensor

    def __init__(self, steps: int) -> None:
        super().__init__()
        betas = cosine_betas(steps).float()  # all else in float32 too, so that the bits are DPPO's
        alphas = 1 - betas
        signal = alphas.cumprod(0)  # abar_k
        previous = torch.cat([torch.ones(1), signal[:-1]])  # abar_{k-1}
        tables = {
            "betas": betas,
            "alphas_cumprod": signal,
            "ddpm_var": betas * (1 - previous) / (1 - signal),
            "ddpm_mu_coef1": betas * previous.sqrt() / (1 - signal),
            "ddpm_mu_coef2": (1 - previous) * alphas.sqrt() / (1 - signal),
            "sqrt_alphas_cumprod": signal.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - signal).sqrt(),
            "sqrt_recip_alphas_cumprod": (1 / signal).sqrt(),
            "sqrt_recipm1_alphas_cumprod": (1 / signal - 1).sqrt(),
        }
        for name, values in tables.items():
            self.register_buffer(name, values, persistent=False)


@dataclass(frozen=True)
class ReverseSteps:
    """The steps that a sampler takes, first to last: mean x0_coef * x0 + x_coef * x, standard deviation std.

    Attributes:
        timesteps: (S,) int64, the k of each step, descending.
        x0_coef, x_coef, std: (S,) float32.
    """

    timesteps: Tensor
    x0_coef: Tensor
    x_coef: Tensor
    std: Tensor


def ddpm_steps(schedule: NoiseSchedule) -> ReverseSteps:
    """All K ancestral steps, with the posterior mean and standard deviation (Ho et al. 2020, eq. 7)."""
    timesteps = torch.arange(len(schedule.betas) - 1, -1, -1, device=schedule.betas.device)
    std = schedule.ddpm_var.clamp(min=1e-20).sqrt()
    return ReverseSteps(timesteps, *(t.flip(0) for t in (schedule.ddpm_mu_coef1, schedule.ddpm_mu_coef2, std)))


def ddim_steps(schedule: NoiseSchedule, steps: int, eta: float) -> ReverseSteps:
    """`steps` evenly spaced DDIM steps (Song et al. 2021, eq. 12 and 16), written as affine in (x0, x).

    mean = sqrt(abar') x0 + sqrt(1 - abar' - sigma^2) (x - sqrt(abar) x0) / sqrt(1 - abar), sigma proportional to `eta`.
    """
    ratio = len(schedule.betas) // steps
    timesteps = torch.arange(steps, device=schedule.betas.device) * ratio
    signal = schedule.alphas_cumprod.double()[timesteps]
    previous = torch.cat([torch.ones_like(signal[:1]), signal[:-1]])
    std = eta * ((1 - previous) / (1 - signal) * (1 - signal / previous)).clamp(min=0).sqrt()
    direction = (1 - previous - std**2).clamp(min=0).sqrt() / (1 - signal).sqrt()
    x0_coef = previous.sqrt() - direction * signal.sqrt()
    return ReverseSteps(timesteps.flip(0), *(t.flip(0).float() for t in (x0_coef, direction, std)))


def normal_log_density(standardised: Tensor, std: Tensor) -> Tensor:
    """log N(x; mean, std^2) of (x - mean) / std; shapes that broadcast."""
    return -0.5 * standardised**2 - std.log() - 0.5 * math.log(2 * math.pi)


class DiffusionPolicy(nn.Module):
    """A denoising network with its schedule and sampler; state-dict keys are ``network.*``, as in DPPO."""

    def __init__(self, network: DenoisingMLP | TwoStageMLP, sampler: SamplerSettings | None = None) -> None:
        super().__init__()
        self.network = network
        self.sampler = sampler or SamplerSettings()
        self.schedule = NoiseSchedule(self.sampler.denoising_steps)
        self.observation_dim, self.action_dim = network.observation_dim, network.action_dim
        self.action_horizon = network.action_horizon

    @property
    def denoising_steps(self) -> int:
        """K, the length of the noise schedule."""
        return self.sampler.denoising_steps

    @property
    def sampling_steps(self) -> int:
        """The number of steps that the sampler takes: K for DDPM."""
        return self.sampler.ddim_steps if self.sampler.kind == "ddim" else self.sampler.denoising_steps

    def clone(self) -> DiffusionPolicy:
        """An independent copy, on the same device."""
        return copy.deepcopy(self)

    def reverse_steps(self, explore: bool) -> ReverseSteps:
        """The sampler's steps; DDIM takes eta 1 while collecting and 0 in evaluation."""
        if self.sampler.kind == "ddim":
            return ddim_steps(self.schedule, self.sampler.ddim_steps, eta=1.0 if explore else 0.0)
        return ddpm_steps(self.schedule)

    def sampling_std(self, steps: ReverseSteps, explore: bool) -> Tensor:
        """Standard deviation of each step, (S,): floored while collecting; in evaluation DDPM's last step adds none."""
        if explore:
            return steps.std.clamp(min=self.sampler.exploration_std_floor)
        if self.sampler.kind == "ddim":
            return steps.std
        return torch.where(steps.timesteps == 0, 0.0, steps.std.clamp(min=self.sampler.evaluation_std_floor))

    def coefficients(self, steps: ReverseSteps) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Those of each step's mean, see `reverse_mean`, (S,) each."""
        gains = (self.schedule.sqrt_recip_alphas_cumprod, self.schedule.sqrt_recipm1_alphas_cumprod)
        x_gain, noise_gain = (gain[steps.timesteps] for gain in gains)
        return x_gain, noise_gain, steps.x0_coef, steps.x_coef

    def reverse_mean(
        self, x: Tensor, noise: Tensor, x_gain: Tensor, noise_gain: Tensor, x0_coef: Tensor, x_coef: Tensor
    ) -> Tensor:
        """Mean of x_{k-1} given x_k: x0_coef x_0 + x_coef x_k with x_0 = x_gain x_k - noise_gain noise, clipped.

        Args:
            x, noise: (B, H, A), x_k and the noise predicted in it.
            x_gain, noise_gain, x0_coef, x_coef: (B, 1, 1) or scalars, the step's coefficients.
        """
        x0 = (x_gain * x - noise_gain * noise).clamp(-self.sampler.x0_clip, self.sampler.x0_clip)
        return x0_coef * x0 + x_coef * x

    def draw_noise(self, count: int, generator: torch.Generator) -> Tensor:
        """The standard normal draws of one call to `sample_chain`, (S + 1, count, H, A), in call order."""
        shape = (self.sampling_steps + 1, count, self.action_horizon, self.action_dim)
        return torch.randn(shape, generator=generator, device=generator.device)

    def sample_chain(
        self, observations: Tensor, noise: Tensor, explore: bool, keep: int, early: DiffusionPolicy | None = None
    ) -> Tensor:
        """Denoise one or more chunks per observation and return the last `keep` + 1 states of the chain.

        Args:
            observations: (N, O).
            noise: (S + 1, N * C, H, A) standard normal draws: the initial x_K, then one per step (clipped here), for C
                chunks of each observation, which follow each other.
            explore: whether the exploration floor applies.
            keep: number of last steps whose transitions are returned, 0 <= keep <= S.
            early: the policy that takes all steps before those, by default this one.

        Returns:
            (N * C, keep + 1, H, A); the last entry is the chunk to execute.
        """
        steps = self.reverse_steps(explore)
        std = self.sampling_std(steps, explore).view(-1, 1, 1, 1)
        jitter = std * noise[1:].clamp(-self.sampler.noise_clip, self.sampler.noise_clip)  # (S, N * C, H, A)
        x, total = noise[0], len(steps.timesteps)
        chain = [x] if keep == total else []
        inputs = steps.timesteps, observations, len(x) // max(len(observations), 1)
        late = self.network.along_chain(*inputs)
        first = late if early is None or keep == total else early.network.along_chain(*inputs)
        of_steps = (*self.coefficients(steps), jitter)
        for i, (*coefficients, added) in enumerate(zip(*(part.unbind() for part in of_steps), strict=True)):
            predicted = (first if i < total - keep else late)(x, i)
            x = self.reverse_mean(x, predicted, *coefficients) + added
            if i >= total - keep - 1:
                chain.append(x)
        return torch.stack(chain, dim=1)  # (N * C, keep + 1, H, A)

    def sample(self, observations: Tensor, explore: bool, generator: torch.Generator, count: int = 1) -> Tensor:
        """`count` chunks for each of observations (N, O), which follow each other, (N * count, H, A)."""
        noise = self.draw_noise(len(observations) * count, generator)
        return self.sample_chain(observations, noise, explore, keep=0)[:, -1]

    def log_probability(self, before: Tensor, after: Tensor, observations: Tensor, step_index: Tensor) -> Tensor:
        """Log-density of single denoising transitions, per dimension.

        Args:
            before, after: (B, H, A), x_k and x_{k-1}.
            observations: (B, O).
            step_index: (B,) int64, which of the sampler's steps each transition is, 0 the noisiest.

        Returns:
            (B, H, A), log N(after; mean, max(std, logprob_std_floor)^2).
        """
        steps = self.reverse_steps(explore=True)
        columns = (t[step_index].view(-1, 1, 1) for t in self.coefficients(steps))
        noise = self.network.at_steps(before, step_index, steps.timesteps, observations)
        mean = self.reverse_mean(before, noise, *columns)
        std = steps.std.clamp(min=self.sampler.logprob_std_floor)[step_index].view(-1, 1, 1)
        return normal_log_density((after - mean) / std, std)

    def drawn_log_probability(self, noise: Tensor, keep: int) -> Tensor:
        """`log_probability` of the last `keep` transitions of an exploring chain, from the draws that made it.

        A transition is its mean plus a multiple of the draw, hence no network is needed.

        Args:
            noise: (S + 1, N, H, A), what `sample_chain` was given.
            keep: number of transitions, 1 <= keep <= S.

        Returns:
            (N, keep, H, A).
        """
        steps = self.reverse_steps(explore=True)
        std = steps.std.clamp(min=self.sampler.logprob_std_floor)[-keep:].view(-1, 1, 1, 1)
        gain = self.sampling_std(steps, explore=True)[-keep:].view(-1, 1, 1, 1) / std
        draws = noise[-keep:].clamp(-self.sampler.noise_clip, self.sampler.noise_clip)
        return normal_log_density(gain * draws, std).transpose(0, 1)  # (keep, N, H, A) before

    def add_noise(self, actions: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """x_k = sqrt(abar_k) x_0 + sqrt(1 - abar_k) noise, for actions and noise (B, H, A), timesteps (B,)."""
        signal = self.schedule.sqrt_alphas_cumprod[timesteps].view(-1, 1, 1)
        spread = self.schedule.sqrt_one_minus_alphas_cumprod[timesteps].view(-1, 1, 1)
        return signal * actions + spread * noise

    def denoising_losses(self, actions: Tensor, observations: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """Squared noise error averaged over the chunk, one value per sample, (B,)."""
        steps = torch.arange(self.denoising_steps, device=noise.device)
        noisy = self.add_noise(actions, timesteps, noise)
        return per_sample_mse(self.network.at_steps(noisy, timesteps, steps, observations), noise)

    def bc_losses(self, actions: Tensor, observations: Tensor, generator: torch.Generator) -> Tensor:
        """`denoising_losses` at uniformly drawn steps: the behaviour-cloning loss of each sample, (B,)."""
        device = generator.device
        timesteps = torch.randint(self.denoising_steps, (len(actions),), generator=generator, device=device)
        noise = torch.randn(actions.shape, generator=generator, device=device)
        return self.denoising_losses(actions, observations, timesteps, noise)
