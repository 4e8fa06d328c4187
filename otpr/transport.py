"""Neural dual potentials of regularised transport between states and action chunks, fitted to a moving cost.

The problem and its dual are in `otpr.duality`. u(s) and v(a) are networks; H(s, a) = density(u(s) + v(a) - c(s, a)) is
the compatibility. The mean of H is no test of convergence: it is 1 long before its marginals are.

Masked transport (Gu et al. 2022; OTCS 2023) matches K keypoint pairs of a block of b points with each other and with
nothing else. Its dual falls into two parts: H is b on a keypoint pair, in closed form, and 0 on the rest of its row and
column; all other points solve the unmasked problem among themselves, with b means that count the zeros. The networks
are fitted to that second part alone, which is the same optimum as fitting them to both: a smooth u could not reach the
values that the keypoints ask for without spoiling those of their neighbours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from otpr.duality import REGULARISERS, effective_share, marginal_errors, standardise_cost, zero_share
from otpr.potentials import Potentials, TransportSettings
from otpr.precision import backward

Cost = Callable[[Tensor, Tensor], Tensor]  # observations (B, O), chunks (B, S, H, A) -> cost terms (B, S, C)

PAIRS_PER_CALL = 16_384  # cost evaluations in one call: bounds the memory of a cross block
CHECK_EVERY = 20  # gradient steps between two looks at the marginal errors


@dataclass
class _Block:
    """The n = b - K points that are no keypoints, and what is left of the keypoints in the dual.

    Attributes:
        states, chunks: (n, O), (n, H, A).
        cost: (n, n) standardised, or (n, n, C) raw terms.
        keypoint_cost: (K,) or (K, C), the cost of each keypoint pair.
    """

    states: Tensor
    chunks: Tensor
    cost: Tensor
    keypoint_cost: Tensor


@torch.no_grad()
def cross_cost(states: Tensor, chunks: Tensor, cost: Cost) -> Tensor:
    """Cost terms (n, m, C) of every state (n, O) with every chunk (m, H, A)."""
    rows = max(1, PAIRS_PER_CALL // len(chunks))
    return torch.cat([cost(part, chunks.expand(len(part), *chunks.shape)) for part in states.split(rows)])


class Transport:
    """Potentials fitted again and again to a moving cost, warm-started every time.

    The cost is a sum of C terms with fixed shares (Q alone; Q and a guide), each in units of its own deviation on the
    block at hand. Each fit measures these units and the center; until the next fit every compatibility uses them. As
    the potentials live in units of the standardised cost, a Q that grows or shifts keeps the plan it had, and only a
    change of its shape is left to learn. The center is solved for, before and after the gradient steps, so that H has a
    mean of 1: the mean cost of a block varies from draw to draw by enough to undo a warm start.
    """

    def __init__(
        self,
        settings: TransportSettings,
        observation_dim: int,
        chunk_dim: int,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
        shares: Sequence[float] = (1.0,),
    ) -> None:
        """`chunk_dim` is H * A; `generator` (CPU) initialises the networks; `shares` weighs the C terms of the cost."""
        self.settings, self.regulariser = settings, REGULARISERS[settings.regulariser]
        self.potentials = Potentials(observation_dim, chunk_dim, settings, generator).to(device)
        self.optimizer = torch.optim.Adam(self.potentials.parameters(), lr=settings.learning_rate, fused=True)
        self.shares = torch.tensor(shares, device=device)
        # standardised cost = (terms - origins) @ factors - center
        self.factors, self.origins = self.shares.clone(), torch.zeros_like(self.shares)
        self.center = torch.zeros((), device=device)
        self.fits = 0  # completed fits; before the first one H means nothing

    def fit(self, observations: Tensor, chunks: Tensor, cost: Cost, keypoints: int = 0) -> dict[str, float]:
        """Ascend the dual on a cross block of independent draws of states and chunks.

        Every state is paired with every chunk, so the caller may pass those of the same transitions in the same order.

        Args:
            observations: (b, O), b = settings.block_size.
            chunks: (b, H, A).
            cost: terms of c(s, a) of observations (B, O) and chunks (B, S, H, A), (B, S, C), called without gradients.
            keypoints: so many first states and chunks are keypoint pairs.

        Returns:
            Metrics of `diagnose` after the fit; "transport/fresh_..." the marginal errors before it, those of the
            previous potentials on points and a cost that they have not seen (absent in the first fit);
            "transport/steps" and "time/transport", the seconds spent.

        Raises:
            ValueError: b differs from settings.block_size, or keypoints leave nothing to transport.
        """
        started = time.perf_counter()
        terms = self._block(observations, chunks, cost, keypoints)
        block = self._standardise(terms)
        block = self._level(block)
        metrics: dict[str, Tensor] = {}
        if self.fits:
            density = self._full(self._density(block), keypoints)
            rows, columns = marginal_errors(density, self.settings.action_bound)
            metrics = {"fresh_row_marginal_error": rows, "fresh_column_marginal_error": columns}
        steps = self._ascend(block, self.settings.warm_steps if self.fits else self.settings.first_steps)
        block = self._level(block)
        self.fits += 1
        metrics |= self._metrics(block, terms)
        return _to_floats(metrics) | {"transport/steps": steps, "time/transport": time.perf_counter() - started}

    def diagnose(self, observations: Tensor, chunks: Tensor, cost: Cost, keypoints: int = 0) -> dict[str, float]:
        """Metrics of the current potentials on given points (arguments as in `fit`), changing nothing.

        Returns:
            "transport/..." row_marginal_error, column_marginal_error (`otpr.duality.marginal_errors`),
            column_deviation (mean |E_s[H] - 1| whatever the bound), mean_h, dual_value (standardised units), zero_share
            and effective_share (of pairs without keypoints), cost_scale (deviation that is the unit of the first term),
            max_abs_cost (largest absolute first term).
        """
        terms = self._block(observations, chunks, cost, keypoints)
        return _to_floats(self._metrics(self._with_cost(terms, self.standardised), terms))

    @torch.no_grad()
    def compatibility(self, observations: Tensor, chunks: Tensor, terms: Tensor) -> Tensor:
        """H of observations (B, O) with chunks (B, S, H, A) of cost terms (B, S, C), as in `fit`; (B, S)."""
        u, v = self.potentials(observations, chunks)  # (B,), (B, S)
        return self.regulariser.density(u[:, None] + v - self.standardised(terms), self.settings.epsilon)

    @torch.no_grad()
    def conditional(self, observations: Tensor, chunks: Tensor, terms: Tensor) -> Tensor:
        """H whose u(s) solves the row condition over the chunks given, E_a[H(s, a)] = 1; arguments as `compatibility`.

        It is the plan where a state may go only to these chunks, for instance to its own candidates.
        """
        gap = self.potentials(observations, chunks)[1] - self.standardised(terms)
        u = self.regulariser.level(gap, self.settings.epsilon)
        return self.regulariser.density(u[:, None] + gap, self.settings.epsilon)

    @torch.no_grad()
    def plan(self, observations: Tensor, chunks: Tensor, cost: Cost, keypoints: int = 0) -> tuple[Tensor, Tensor]:
        """H and the standardised cost (b, b) of a block (arguments as in `fit`, of any size without keypoints)."""
        standardised = self.standardised(cross_cost(observations, chunks, cost))
        states, actions = observations[keypoints:], chunks[keypoints:]
        block = _Block(states, actions, standardised[keypoints:, keypoints:], standardised.diagonal()[:keypoints])
        return self._full(self._density(block), keypoints), standardised

    def state_dict(self) -> dict[str, Any]:
        """Potentials, optimiser, unit of the cost and the number of fits."""
        return {
            "potentials": self.potentials.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "factors": self.factors,
            "origins": self.origins,
            "center": self.center,
            "fits": self.fits,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self.potentials.load_state_dict(state["potentials"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in ("factors", "origins", "center"):
            setattr(self, name, state[name].to(getattr(self, name)))
        self.fits = state["fits"]

    @torch.no_grad()
    def _block(self, observations: Tensor, chunks: Tensor, cost: Cost, keypoints: int) -> _Block:
        """The points that the networks transport, with raw cost terms (n, n, C)."""
        size = self.settings.block_size
        if not len(observations) == len(chunks) == size:
            raise ValueError(f"need {size} points, got {len(observations)} states, {len(chunks)} chunks")
        if not 0 <= keypoints < size:
            raise ValueError(f"keypoints must be at least 0 and fewer than the {size} points, got {keypoints}")
        pairs = cost(observations[:keypoints], chunks[:keypoints, None])[:, 0]  # (K, C)
        states, chunks = observations[keypoints:], chunks[keypoints:]
        return _Block(states, chunks, cross_cost(states, chunks, cost), pairs)

    def _standardise(self, terms: _Block) -> _Block:
        """Measure the unit of every term and of their sum; returns the block in these units."""
        cost, centers, scales = zip(*(standardise_cost(term) for term in terms.cost.unbind(-1)), strict=True)
        _, shift, scale = standardise_cost((torch.stack(cost, -1) * self.shares).sum(-1))
        self.factors = self.shares / (torch.stack(scales) * scale)
        self.origins, self.center = torch.stack(centers), shift / scale
        return self._with_cost(terms, self.standardised)

    def _with_cost(self, block: _Block, change: Callable[[Tensor], Tensor]) -> _Block:
        """The block with both costs changed."""
        return _Block(block.states, block.chunks, change(block.cost), change(block.keypoint_cost))

    def standardised(self, terms: Tensor) -> Tensor:
        """Cost (...) of terms (..., C) in the units of the last fit, centred as there."""
        return ((terms - self.origins) * self.factors).sum(-1) - self.center

    def _mean(self, block: _Block) -> float:
        """The mean that H of the block has, b / (b - K): each row of b means counts K zeros."""
        return self.settings.block_size / len(block.states)

    @torch.no_grad()
    def _density(self, block: _Block) -> Tensor:
        """H (n, n)."""
        u, v = self.potentials(block.states, block.chunks)
        return self.regulariser.density(u[:, None] + v[None, :] - block.cost, self.settings.epsilon)

    @torch.no_grad()
    def _level(self, block: _Block) -> _Block:
        """Move the center so that H of the block has its mean; returns the block with the moved cost."""
        u, v = self.potentials(block.states, block.chunks)
        gap = (u[:, None] + v[None, :] - block.cost).flatten()
        level = self.regulariser.level(gap, self.settings.epsilon, self._mean(block))
        self.center = self.center + level
        return self._with_cost(block, lambda cost: cost - level)

    def _full(self, density: Tensor, keypoints: int) -> Tensor:
        """H of the whole block (b, b) from that of its other points (n, n)."""
        size = len(density) + keypoints
        return torch.block_diag(size * torch.eye(keypoints, device=density.device), density)

    def _ascend(self, block: _Block, steps: int) -> int:
        """Take at most `steps` Adam steps on the dual; returns how many.

        The gradient of the dual in u(s) is (1 - E_a[H(s, a)]) / n, in v(a) (w - E_s[H(s, a)]) / n, whatever the
        regularisation: it is handed to the networks directly, so that nothing is differentiated on the n^2 pairs.
        """
        settings, size = self.settings, len(block.states)
        for step in range(steps):
            u, v = self.potentials(block.states, block.chunks)
            with torch.no_grad():
                density = self.regulariser.density(u[:, None] + v[None, :] - block.cost, settings.epsilon)
                density = density / self._mean(block)
                if settings.tolerance and step % CHECK_EVERY == 0:
                    errors = torch.stack(marginal_errors(density, settings.action_bound))
                    if errors.max().item() <= settings.tolerance:
                        return step
                gradients = [(density.mean(1) - 1) / size, (density.mean(0) - settings.action_bound) / size]
            self.optimizer.zero_grad(set_to_none=True)
            backward([u, v][: 1 + settings.uses_v], gradients[: 1 + settings.uses_v])
            self.optimizer.step()
        return steps

    @torch.no_grad()
    def _metrics(self, block: _Block, terms: _Block) -> dict[str, Tensor]:
        """What `diagnose` lists, as scalars on the device."""
        settings, size = self.settings, self.settings.block_size
        u, v = self.potentials(block.states, block.chunks)
        density = self.regulariser.density(u[:, None] + v[None, :] - block.cost, settings.epsilon)
        full = self._full(density, len(block.keypoint_cost))
        rows, columns = marginal_errors(full, settings.action_bound)
        # The sum of both potentials at a keypoint pair is what gives H = b there; its v is 0 where v is a multiplier.
        matched = self.regulariser.gap(torch.full_like(block.keypoint_cost, size), settings.epsilon)
        linear = u.sum() + (matched + block.keypoint_cost).sum()
        if settings.uses_v:
            linear = linear + settings.action_bound * v.sum()
        return {
            "row_marginal_error": rows,
            "column_marginal_error": columns,
            "column_deviation": marginal_errors(full)[1],
            "mean_h": full.mean(),
            "dual_value": linear / size - self.regulariser.dual_penalty(full, settings.epsilon),
            "zero_share": zero_share(density),
            "effective_share": effective_share(density),
            "cost_scale": self.shares[0] / self.factors[0].clamp_min(1e-30),
            "max_abs_cost": terms.cost[..., 0].abs().max(),
        }


def _to_floats(metrics: dict[str, Tensor]) -> dict[str, float]:
    """Prefix the names with "transport/" and bring all values to the host in one transfer."""
    values = torch.stack(list(metrics.values())).tolist()
    return {f"transport/{name}": value for name, value in zip(metrics, values, strict=True)}
