"""A small conditional diffusion model that learns a plan: its samples at a state are where the plan sends it."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmark.toy_transport.problems import EXTENT, STREAMS, Problem
from otpr.denoisers import DenoisingMLP
from otpr.diffusion import DiffusionPolicy, SamplerSettings
from otpr.transport import Transport

POOL = 2048  # states, and chunks, that training pairs come from
PARTNERS = 64  # chunks drawn for each state
BATCH = 256
LEARNING_RATE = 1e-3  # its start; a cosine takes it to 0
WIDTH = 256


@torch.no_grad()
def barycentric(transport: Transport, problem: Problem, states: Tensor, chunks: Tensor) -> Tensor:
    """E_a[a H(s, a)] / E_a[H(s, a)] over chunks (m, 1, 2) at states (n, 2); (n, 2)."""
    density = transport.plan(states, chunks, problem.cost)[0]
    return density @ chunks.flatten(1) / density.sum(1, keepdim=True).clamp_min(1e-12)


def resample(density: Tensor, draws: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices of states (n',) and, for each, of `draws` chunks (n', draws) in proportion to H (n, m).

    A state that H gives no chunk is left out, as OTCS does.
    """
    states = (density.sum(1) > 0).nonzero()[:, 0]
    return states, torch.multinomial(density[states], draws, replacement=True, generator=generator)


def train_sampler(transport: Transport, problem: Problem, steps: int) -> DiffusionPolicy:
    """Denoise pairs drawn independently and resampled by their compatibility.

    Weights H on the loss have the same optimum; most of them are 0 here, and resampling wastes no pair.
    """
    generator = STREAMS.torch("diffusion")
    network = DenoisingMLP(2, 2, 1, STREAMS.torch("denoiser"), hidden_dims=(WIDTH,) * 3, activation_name="mish")
    policy = DiffusionPolicy(network, SamplerSettings(x0_clip=EXTENT))
    optimizer = torch.optim.Adam(policy.parameters(), lr=LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    states, chunks = problem.states(POOL, generator), problem.chunks(POOL, generator)
    density = transport.plan(states, chunks, problem.cost)[0]
    kept, partners = resample(density, PARTNERS, generator)
    for _ in range(steps):
        rows = torch.randint(len(kept), (BATCH,), generator=generator)
        columns = torch.randint(PARTNERS, (BATCH,), generator=generator)
        loss = policy.bc_losses(chunks[partners[rows, columns]], states[kept[rows]], generator).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return policy
