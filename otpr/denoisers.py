"""Networks that predict the noise in a chunk, in the shapes and under the parameter names of DPPO's checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from otpr.hidden import hidden_layer
from otpr.networks import MLP, ResidualMLP, linear
from otpr.precision import float32_products, product_type

# noisy chunks (B * C, H, A), C for each observation, and a step's number in its chain -> (B * C, H, A)
NoiseAt = Callable[[Tensor, int], Tensor]

MOST_STEPS = 32  # of `at_steps`: as many columns more in the first layer's product cost less than embedding every chunk


class SinusoidalEmbedding(nn.Module):
    """Sine and cosine features of the denoising step, frequencies 10000^(-i / (dim/2 - 1))."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, timesteps: Tensor) -> Tensor:
        """Map (B,) to (B, dim)."""
        half = self.dim // 2
        frequencies = torch.exp(torch.arange(half, device=timesteps.device) * -(math.log(10000.0) / (half - 1)))
        angles = timesteps[:, None] * frequencies[None, :]  # (B, dim / 2)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class DenoisingMLP(nn.Module):
    """Noise prediction eps(x_k, k, s) from the noisy chunk, the step embedding and the (encoded) observation."""

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        action_horizon: int,
        generator: torch.Generator,
        hidden_dims: Sequence[int] = (512, 512, 512),
        activation_name: str = "relu",
        time_dim: int = 16,
        cond_mlp_dims: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.observation_dim, self.action_dim, self.action_horizon = observation_dim, action_dim, action_horizon
        self.time_embedding = nn.Sequential(
            SinusoidalEmbedding(time_dim),
            linear(time_dim, 2 * time_dim, generator),
            nn.Mish(),
            linear(2 * time_dim, time_dim, generator),
        )
        self.cond_mlp: MLP | None = None
        if cond_mlp_dims:
            self.cond_mlp = MLP([observation_dim, *cond_mlp_dims], activation_name, generator)
        condition_dim = cond_mlp_dims[-1] if cond_mlp_dims else observation_dim
        chunk_dim = action_horizon * action_dim
        dims = [chunk_dim + time_dim + condition_dim, *hidden_dims, chunk_dim]
        self.mlp_mean = ResidualMLP(dims, activation_name, generator)

    def forward(self, x: Tensor, timesteps: Tensor, observations: Tensor) -> Tensor:
        """Predict the noise in `x`.

        Args:
            x: (B, H, A) noisy chunks.
            timesteps: (B,) int64 in [0, K), or (1,) for one step shared by the batch.
            observations: (B, O).

        Returns:
            (B, H, A).
        """
        batch = x.shape[0]
        embedding = self.embedding(timesteps).expand(batch, -1)
        features = [x.reshape(batch, -1), embedding, self.condition(observations)]
        return self.mlp_mean(torch.cat(features, dim=-1)).view(x.shape)  # of (B, H*A + time_dim + condition)

    def at_steps(self, x: Tensor, index: Tensor, timesteps: Tensor, observations: Tensor) -> Tensor:
        """The same prediction where each chunk's step is one of few: these are embedded once, not for every chunk.

        With a row of the identity e_i in the place of the embedding of step i the first layer is
        W_x x + (W_t emb') e_i + W_s s + b: no gradient by x and e_i is needed.

        Args:
            x: (B, H, A) noisy chunks.
            index: (B,) int64 in [0, S), which of the steps each chunk is at.
            timesteps: (S,) int64, steps k; more than `MOST_STEPS` are embedded for every chunk.
            observations: (B, O).

        Returns:
            (B, H, A).
        """
        if len(timesteps) > MOST_STEPS:
            return self(x, timesteps[index], observations)
        x_weight, t_weight, s_weight = self.first_weights(condition := self.condition(observations))
        with float32_products(x.device.type):
            of_steps = t_weight @ self.embedding(timesteps).mT  # (hidden, S)
        rows = torch.eye(len(timesteps), device=x.device).index_select(0, index)  # (B, S)
        features = torch.cat([x.flatten(1), rows, condition], dim=1)  # (B, H*A + S + condition)
        return self.mlp_mean(features, torch.cat([x_weight, of_steps, s_weight], dim=1)).view(x.shape)

    def first_weights(self, condition: Tensor) -> tuple[Tensor, ...]:
        """The first layer's weights of chunk, embedding, condition (B, C): (hidden, H*A), (hidden, T), (hidden, C)."""
        sizes = self.action_horizon * self.action_dim, self.mlp_mean.first.in_features - condition.shape[1]
        return self.mlp_mean.first.weight.tensor_split(sizes, dim=1)

    def embedding(self, timesteps: Tensor) -> Tensor:
        """Features of the steps k (B,), (B, time_dim), in float32 whatever the precision: they are few and small."""
        features, first, act, last = self.time_embedding
        assert isinstance(first, nn.Linear)
        with float32_products(timesteps.device.type):
            return last(hidden_layer(features(timesteps), first.weight, first.bias, act))

    def condition(self, observations: Tensor) -> Tensor:
        """What the first layer sees of observations (B, O): themselves or their encoding, (B, condition)."""
        return observations if self.cond_mlp is None else self.cond_mlp(observations)

    def along_chain(self, timesteps: Tensor, observations: Tensor, count: int = 1) -> NoiseAt:
        """The same prediction for the steps of one denoising chain: what they share is computed once.

        The first layer is W_x x + W_t emb(k) + W_s s + b. Only its first term changes within a step's batch and along
        the chain.

        Args:
            timesteps: (S,) int64, the step k of each step of the chain.
            observations: (B, O).
            count: C, chunks for each observation, which follow each other.

        Returns:
            A function of noisy chunks (B * C, H, A) and the number of the step in 0..S-1, to (B * C, H, A); to be
            called in the same precision and with or without gradients as here.
        """
        net, condition = self.mlp_mean, self.condition(observations)
        x_weight, t_weight, s_weight = self.first_weights(condition)
        x_weight = x_weight.mT.contiguous().mT  # the products of every step read it transposed: once for all
        device_type = observations.device.type
        with float32_products(device_type):  # as in `forward`, where one product takes the sum
            of_steps = F.linear(self.embedding(timesteps), t_weight, net.first.bias)  # (S, hidden)
            of_observations = F.linear(condition, s_weight)  # (B, hidden)

        if not net.single:
            of_rows = of_observations.repeat_interleave(count, 0)  # (B * C, hidden)

            def layer_by_layer(x: Tensor, step: int) -> Tensor:
                with float32_products(device_type):
                    hidden = F.linear(x.flatten(1), x_weight, of_steps[step]) + of_rows
                return net.after_first(hidden).view(x.shape)

            return layer_by_layer
        matrix, offset = net.output()
        inner_weight = net.block.l1.weight
        if not torch.is_grad_enabled():  # else every step's gradient would be rounded before they are added
            inner_weight = inner_weight.to(product_type(device_type)).mT.contiguous().mT
        with float32_products(device_type):
            x_skip = net.last.weight @ x_weight  # (H*A, H*A)
            steps_skip = F.linear(of_steps, net.last.weight, offset)  # (S, H*A)
            rows_skip = F.linear(of_observations, net.last.weight).repeat_interleave(count, 0)  # (B * C, H*A)

        def noise_at(x: Tensor, step: int) -> Tensor:
            flat, kind = x.flatten(1), product_type(device_type)
            with float32_products(device_type):
                hidden = hidden_layer(flat, x_weight, of_steps[step], net.block.act, of_observations, kind)
                skip = F.linear(flat, x_skip, steps_skip[step]) + rows_skip
            return net.after_activation(hidden, skip, matrix, inner_weight).view(x.shape)

        return noise_at


class TwoStageMLP(nn.Module):
    """Two denoising networks that share one chain: `late` takes the steps k < `late_steps`, `early` the noisier ones.

    This is what DPPO's fine-tuned policy is (Ren et al. 2024, section 4): the fine-tuned network behind the frozen one.

    Raises:
        ValueError: networks of different sizes, or fewer than one late step.
    """

    def __init__(self, early: DenoisingMLP, late: DenoisingMLP, late_steps: int) -> None:
        super().__init__()
        sizes = [(part.observation_dim, part.action_dim, part.action_horizon) for part in (early, late)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"both stages must have the same (O, A, H), got {sizes[0]} and {sizes[1]}")
        if late_steps < 1:
            raise ValueError(f"late_steps must be at least 1, got {late_steps}")
        self.early, self.late, self.late_steps = early, late, late_steps
        self.observation_dim, self.action_dim, self.action_horizon = sizes[1]

    def forward(self, x: Tensor, timesteps: Tensor, observations: Tensor) -> Tensor:
        """Predict the noise in `x`; arguments as in `DenoisingMLP.forward`."""
        is_late = (timesteps < self.late_steps).view(-1, 1, 1)
        return torch.where(is_late, self.late(x, timesteps, observations), self.early(x, timesteps, observations))

    def at_steps(self, x: Tensor, index: Tensor, timesteps: Tensor, observations: Tensor) -> Tensor:
        """As `DenoisingMLP.at_steps`."""
        is_late = (timesteps < self.late_steps)[index].view(-1, 1, 1)
        late, early = (stage.at_steps(x, index, timesteps, observations) for stage in (self.late, self.early))
        return torch.where(is_late, late, early)

    def along_chain(self, timesteps: Tensor, observations: Tensor, count: int = 1) -> NoiseAt:
        """As `DenoisingMLP.along_chain`."""
        late, early = (stage.along_chain(timesteps, observations, count) for stage in (self.late, self.early))
        if timesteps.device.type == "cpu":
            stages = [late if k < self.late_steps else early for k in timesteps.tolist()]
            return lambda x, step: stages[step](x, step)
        is_late = timesteps < self.late_steps  # reading it on a GPU would wait for it: there both stages are evaluated
        return lambda x, step: torch.where(is_late[step], late(x, step), early(x, step))
