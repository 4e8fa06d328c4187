"""Networks of the diffusion policy and the critics, in the shapes and under the parameter names of DPPO's checkpoints.

All are initialised from a passed generator with PyTorch's default bounds, U(-1/sqrt(fan_in), 1/sqrt(fan_in)).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from otpr.hidden import affine, hidden_layer, output_layer
from otpr.precision import float32_products, product_type

NoiseAt = Callable[[Tensor, int], Tensor]  # noisy chunks (B, H, A) and a step's number in its chain -> (B, H, A)
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "mish": nn.Mish, "silu": nn.SiLU, "tanh": nn.Tanh}


def linear(in_features: int, out_features: int, generator: torch.Generator) -> nn.Linear:
    """A linear layer initialised from `generator`."""
    layer = nn.Linear(in_features, out_features)  # whose own initial values are overwritten
    bound = 1.0 / math.sqrt(in_features)
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        layer.bias.uniform_(-bound, bound, generator=generator)
    return layer


def float32_layer(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A network's first or last layer, in float32 whatever the precision of the others: (..., in) to (..., out)."""
    with float32_products(x.device.type):
        return layer(x.float())


def network_generator(generator: torch.Generator) -> torch.Generator:
    """A CPU generator seeded by one draw from `generator`: networks start the same on every device type."""
    seed = torch.randint(2**62, (), generator=generator, device=generator.device)
    return torch.Generator().manual_seed(int(seed))


def activation(name: str) -> nn.Module:
    """The activation module called `name`.

    Raises:
        ValueError: unknown name.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; valid: {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]()


class Layer(NamedTuple):
    """A layer: weight (out, in) and bias (out,), or those of G networks, (G, out, in) and (G, out)."""

    weight: Tensor
    bias: Tensor
    activation: nn.Module | None = None  # none of the last one


def through_layers(layers: Sequence[Layer], x: Tensor) -> Tensor:
    """Apply a plain network to (..., in), or G of them to (G, B, in), the first and last layer in float32."""
    *before, last = layers
    for i, (weight, bias, act) in enumerate(before):
        assert act is not None
        if i < len(before) - 1:
            evaluate = partial(hidden_layer, result=product_type(x.device.type))
        else:
            start = last.bias.unsqueeze(-2).expand(*x.shape[:-1], -1)
            evaluate = partial(output_layer, matrix=last.weight, start=start)
        evaluate = partial(evaluate, weight=weight, bias=bias, activation=act)
        x = evaluate(x) if i else float32_layer(evaluate, x)
    return x if before else float32_layer(partial(affine, weight=last.weight, bias=last.bias), x)


class MLP(nn.Module):
    """Linear layers with an activation between them and none after the last. Keys ``moduleList.{i}.linear_1``."""

    def __init__(self, dims: Sequence[int], activation_name: str, generator: torch.Generator) -> None:
        super().__init__()
        self.moduleList = nn.ModuleList()
        for i, (n_in, n_out) in enumerate(pairwise(dims)):
            block = nn.Sequential()
            block.add_module("linear_1", linear(n_in, n_out, generator))
            if i < len(dims) - 2:
                block.add_module("act_1", activation(activation_name))
            self.moduleList.append(block)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., dims[0]) to (..., dims[-1])."""
        return through_layers(self.as_layers(), x)

    def as_layers(self) -> list[Layer]:
        """The layers, first to last."""
        layers = []
        for block in self.moduleList:
            layer, *act = block.children()
            assert isinstance(layer, nn.Linear)
            layers.append(Layer(layer.weight, layer.bias, *act))
        return layers


class ResidualBlock(nn.Module):
    """Two pre-activation layers and a skip connection, x + l2(act(l1(act(x))))."""

    def __init__(self, dim: int, activation_name: str, generator: torch.Generator) -> None:
        super().__init__()
        self.l1 = linear(dim, dim, generator)
        self.l2 = linear(dim, dim, generator)
        self.act = activation(activation_name)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., dim) to (..., dim)."""
        hidden = hidden_layer(self.act(x), self.l1.weight, self.l1.bias, self.act)
        return x + F.linear(hidden, self.l2.weight).to(x.dtype) + self.l2.bias  # biases are never rounded


class ResidualMLP(nn.Module):
    """Input layer, one residual block per two further hidden layers, output layer. Keys ``layers.{i}``.

    With one block there are only sums between its second layer and the output layer, and between the input layer and
    the skip connection: with u = act(W_1 act(W x + b) + b_1),

        W_o (W x + b + W_2 u + b_2) + b_o = (W_o W_2) u + (W_o W) x + W_o (b + b_2) + b_o

    The right side is evaluated, forward and backward: half of the products of hidden width. It is the same function of
    the same parameters, rounded elsewhere.

    Raises:
        ValueError: hidden layers not all of one width, or their number not odd.
    """

    def __init__(self, dims: Sequence[int], activation_name: str, generator: torch.Generator) -> None:
        super().__init__()
        hidden = list(dims[1:-1])
        if len(set(hidden)) != 1 or len(hidden) % 2 == 0:
            raise ValueError(f"a residual MLP needs an odd number of equally wide hidden layers, got {hidden}")
        blocks = [ResidualBlock(hidden[0], activation_name, generator) for _ in range(len(hidden) // 2)]
        self.layers = nn.ModuleList(
            [linear(dims[0], hidden[0], generator), *blocks, linear(hidden[0], dims[-1], generator)]
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., dims[0]) to (..., dims[-1])."""
        if not self.single:
            return self.after_first(float32_layer(self.first, x))
        kind, (matrix, offset) = product_type(x.device.type), self.output()
        with float32_products(x.device.type):
            x = x.float()
            hidden = hidden_layer(x, self.first.weight, self.first.bias, self.block.act, result=kind)
            skip_bias = F.linear(self.first.bias, self.last.weight, offset)
            skip = F.linear(x, self.last.weight @ self.first.weight, skip_bias)
        return self.after_activation(hidden, skip, matrix)

    @property
    def first(self) -> nn.Linear:
        """The input layer."""
        return cast(nn.Linear, self.layers[0])

    @property
    def last(self) -> nn.Linear:
        """The output layer."""
        return cast(nn.Linear, self.layers[-1])

    @property
    def single(self) -> bool:
        """Whether there is one block."""
        return len(self.layers) == 3

    @property
    def block(self) -> ResidualBlock:
        """The first block."""
        return cast(ResidualBlock, self.layers[1])

    def output(self) -> tuple[Tensor, Tensor]:
        """W_o W_2 (dims[-1], hidden) and W_o b_2 + b_o (dims[-1],) of a single block, in float32."""
        inner, last = self.block.l2, self.last
        with float32_products(last.weight.device.type):
            return last.weight @ inner.weight, F.linear(inner.bias, last.weight, last.bias)

    def after_activation(
        self, hidden: Tensor, skip: Tensor, matrix: Tensor, inner_weight: Tensor | None = None
    ) -> Tensor:
        """All that follows the first activation of a single block.

        Args:
            hidden: (B, hidden), act(W x + b).
            skip: (B, dims[-1]), what reaches the output beside the block.
            matrix: W_o W_2, see `output`.
            inner_weight: W_1 (hidden, hidden), if it has been rounded already.

        Returns:
            (B, dims[-1]).
        """
        weight = self.block.l1.weight if inner_weight is None else inner_weight
        return output_layer(hidden, weight, self.block.l1.bias, self.block.act, matrix, skip)

    def after_first(self, x: Tensor) -> Tensor:
        """All layers but the first, one by one, (..., dims[1]) to (..., dims[-1])."""
        for layer in self.layers[1:-1]:
            x = layer(x)
        return float32_layer(self.last, x)


def build_mlp(residual: bool) -> Callable[[Sequence[int], str, torch.Generator], nn.Module]:
    """The plain or the residual constructor, both with the same arguments."""
    return ResidualMLP if residual else MLP


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

    def embedding(self, timesteps: Tensor) -> Tensor:
        """Features of the steps k (B,), (B, time_dim), in float32 whatever the precision: they are few and small."""
        features, first, act, last = self.time_embedding
        assert isinstance(first, nn.Linear)
        with float32_products(timesteps.device.type):
            return last(hidden_layer(features(timesteps), first.weight, first.bias, act))

    def condition(self, observations: Tensor) -> Tensor:
        """What the first layer sees of observations (B, O): themselves or their encoding, (B, condition)."""
        return observations if self.cond_mlp is None else self.cond_mlp(observations)

    def along_chain(self, timesteps: Tensor, observations: Tensor) -> NoiseAt:
        """The same prediction for the steps of one denoising chain: what they share is computed once.

        The first layer is W_x x + W_t emb(k) + W_s s + b. Only its first term changes within a step's batch and along
        the chain.

        Args:
            timesteps: (S,) int64, the step k of each step of the chain.
            observations: (B, O).

        Returns:
            A function of noisy chunks (B, H, A) and the number of the step in 0..S-1, to (B, H, A); to be called in
            the same precision and with or without gradients as here.
        """
        net, condition = self.mlp_mean, self.condition(observations)
        x_weight, rest = net.first.weight.tensor_split([self.action_horizon * self.action_dim], dim=1)
        t_weight, s_weight = rest.split([rest.shape[1] - condition.shape[1], condition.shape[1]], dim=1)
        device_type = observations.device.type
        with float32_products(device_type):  # as in `forward`, where one product takes the sum
            of_steps = F.linear(self.embedding(timesteps), t_weight, net.first.bias)  # (S, hidden)
            of_observations = F.linear(condition, s_weight)  # (B, hidden)

        def layer_by_layer(x: Tensor, step: int) -> Tensor:
            with float32_products(device_type):
                hidden = F.linear(x.flatten(1), x_weight, of_steps[step]) + of_observations
            return net.after_first(hidden).view(x.shape)

        if not net.single:
            return layer_by_layer
        matrix, offset = net.output()
        inner_weight = net.block.l1.weight
        if not torch.is_grad_enabled():  # else every step's gradient would be rounded before they are added
            inner_weight = inner_weight.to(product_type(device_type))
        with float32_products(device_type):
            x_skip = net.last.weight @ x_weight  # (H*A, H*A)
            steps_skip = F.linear(of_steps, net.last.weight, offset)  # (S, H*A)
            observations_skip = F.linear(of_observations, net.last.weight)  # (B, H*A)

        def noise_at(x: Tensor, step: int) -> Tensor:
            flat, kind = x.flatten(1), product_type(device_type)
            with float32_products(device_type):
                hidden = hidden_layer(flat, x_weight, of_steps[step], net.block.act, of_observations, kind)
                skip = F.linear(flat, x_skip, steps_skip[step]) + observations_skip
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

    def along_chain(self, timesteps: Tensor, observations: Tensor) -> NoiseAt:
        """As `DenoisingMLP.along_chain`."""
        late, early = (stage.along_chain(timesteps, observations) for stage in (self.late, self.early))
        if timesteps.device.type == "cpu":
            stages = [late if k < self.late_steps else early for k in timesteps.tolist()]
            return lambda x, step: stages[step](x, step)
        is_late = timesteps < self.late_steps  # reading it on a GPU would wait for it: there both stages are evaluated
        return lambda x, step: torch.where(is_late[step], late(x, step), early(x, step))


class TwinQ(nn.Module):
    """Two independent Q(s, chunk) networks with Mish, keys ``Q1`` and ``Q2``."""

    def __init__(
        self,
        observation_dim: int,
        chunk_dim: int,
        hidden_dims: Sequence[int],
        residual: bool,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        build, dims = build_mlp(residual), [observation_dim + chunk_dim, *hidden_dims, 1]
        self.Q1, self.Q2 = (build(dims, "mish", generator) for _ in range(2))

    def forward(self, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Q of observations (B, O) and chunks (B, H, A): two tensors (B,).

        Where gradients are recorded and both networks are plain they share products and passes: half as many calls,
        forward and backward. A loss of one of them then gives the other gradients of zero.
        """
        features = torch.cat([observations, actions.flatten(1)], dim=-1)  # (B, O + H*A)
        if not (torch.is_grad_enabled() and isinstance(self.Q1, MLP) and isinstance(self.Q2, MLP)):
            return self.Q1(features).squeeze(-1), self.Q2(features).squeeze(-1)
        both = [
            Layer(torch.stack([one.weight, two.weight]), torch.stack([one.bias, two.bias]), one.activation)
            for one, two in zip(self.Q1.as_layers(), self.Q2.as_layers(), strict=True)
        ]
        q1, q2 = through_layers(both, features.expand(2, *features.shape)).squeeze(-1)  # (2, B)
        return q1, q2

    def minimum(self, observations: Tensor, actions: Tensor) -> Tensor:
        """The smaller of the two, (B,)."""
        return torch.minimum(*self(observations, actions))

    def per_candidate(self, observations: Tensor, candidates: Tensor) -> Tensor:
        """The smaller of the two for S candidates (N, S, H, A) of each of (N, O) observations, (N, S)."""
        number = candidates.shape[1]
        q = self.minimum(observations.repeat_interleave(number, 0), candidates.flatten(0, 1))
        return q.view(-1, number)


class ValueNet(nn.Module):
    """State value V(s), residual with Mish; its key is ``Q1``, as in DPPO's checkpoints."""

    def __init__(self, observation_dim: int, hidden_dims: Sequence[int], generator: torch.Generator) -> None:
        super().__init__()
        self.Q1 = build_mlp(residual=True)([observation_dim, *hidden_dims, 1], "mish", generator)

    def forward(self, observations: Tensor) -> Tensor:
        """V of observations (B, O): (B,)."""
        return self.Q1(observations).squeeze(-1)


@torch.no_grad()
def polyak_update(target: Sequence[Tensor], source: Sequence[Tensor], tau: float) -> None:
    """target <- (1 - tau) target + tau source, parameter by parameter; `tau` in [0, 1]."""
    torch._foreach_lerp_(tuple(target), tuple(source), tau)


def per_sample_mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error per sample, (B, ...) -> (B,)."""
    return F.mse_loss(prediction, target, reduction="none").flatten(1).mean(1)
