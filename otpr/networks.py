"""Layers, plain and residual networks and critics, in the shapes and under the parameter names of DPPO's checkpoints.

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

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Map (..., dims[0]) to (..., dims[-1]).

        Args:
            x: (..., dims[0]).
            weight: (dims[1], in), of the first layer instead of its own, for x (..., in).
        """
        weight = self.first.weight if weight is None else weight
        if not self.single:
            return self.after_first(float32_layer(partial(affine, weight=weight, bias=self.first.bias), x))
        kind, (matrix, offset) = product_type(x.device.type), self.output()
        with float32_products(x.device.type):
            x = x.float()
            hidden = hidden_layer(x, weight, self.first.bias, self.block.act, result=kind)
            skip_bias = F.linear(self.first.bias, self.last.weight, offset)
            skip = F.linear(x, self.last.weight @ weight, skip_bias)
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
