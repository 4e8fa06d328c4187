"""Whole networks on the compiled passes: residual and plain ones, twin critics and denoising chains, layer by layer."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from test_hidden import gradients, normal
from torch import Tensor

from benchmark.speed.measuring import OperationCounter
from otpr.denoisers import DenoisingMLP
from otpr.networks import MLP, ResidualMLP, TwinQ
from otpr.precision import backward, precision_context

pytestmark = pytest.mark.usefixtures("one_thread")


def test_half_of_the_hidden_products_of_one_block() -> None:
    """W_o W_2 and W_o W are products of matrices, whatever the batch; W x has few columns, W_o W_2 u is in a pass."""
    net = ResidualMLP([2, 256, 256, 256, 3], "relu", torch.Generator().manual_seed(0))
    counter, x = OperationCounter(), normal(4096, 2)
    with counter:
        net(x).sum().backward()
    assert 3 <= counter.total / (2 * 4096 * 256**2) < 3.2  # 6 layer by layer


@pytest.mark.parametrize("hidden_layers", [1, 3, 5])
@pytest.mark.parametrize(("precision", "error"), [("float32", 2e-6), ("bfloat16", 2e-2)])
def test_residual_networks_of_any_depth(hidden_layers: int, precision: str, error: float) -> None:
    net = ResidualMLP([7, *[32] * hidden_layers, 3], "mish", torch.Generator().manual_seed(0))
    exact = copy.deepcopy(net).double()

    def layer_by_layer(x: Tensor) -> Tensor:
        first, *blocks, last = exact.layers
        x = first(x)
        for block in blocks:
            x = x + block.l2(F.mish(block.l1(F.mish(x))))
        return last(x)

    with precision_context(precision, "cpu"):
        found = gradients(net, normal(50, 7), net.parameters())
    reference = gradients(layer_by_layer, normal(50, 7).double(), exact.parameters())
    for one, other in zip(found, reference, strict=True):
        assert (one - other).norm() <= error * other.norm()


@pytest.mark.parametrize("hidden", [(), (8,), (8, 6)])
def test_plain_networks_of_any_depth(hidden: tuple[int, ...]) -> None:
    net, x = MLP([4, *hidden, 3], "relu", torch.Generator().manual_seed(0)), normal(5, 4)
    expected = x
    for block in net.moduleList:
        expected = block(expected)
    torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize("residual", [False, True])
def test_both_q_of_a_twin_are_what_each_is_alone(residual: bool) -> None:
    critic = TwinQ(5, 6, (64, 64, 64), residual, torch.Generator().manual_seed(0))
    observations, actions = normal(70, 5), normal(70, 2, 3)
    features = torch.cat([observations, actions.flatten(1)], 1)
    parameters = list(critic.parameters())
    together, alone = (
        gradients(function, features, parameters)
        for function in (
            lambda x: torch.stack(critic(x[:, :5], x[:, 5:].unflatten(1, (2, 3)))),
            lambda x: torch.stack([critic.Q1(x)[:, 0], critic.Q2(x)[:, 0]]),
        )
    )
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_chains_weights_are_rounded_once_their_gradients_never() -> None:
    net = DenoisingMLP(5, 3, 4, torch.Generator().manual_seed(0), hidden_dims=(32, 32, 32))
    weight = net.mlp_mean.block.l1.weight

    def chain() -> Tensor:
        noise_at, x = net.along_chain(torch.tensor([2, 1, 0]), normal(9, 5)), normal(9, 4, 3)
        for step in range(3):
            x = noise_at(x, step)
        return x

    with precision_context("bfloat16", "cpu"):
        with torch.no_grad(), torch.profiler.profile(record_shapes=True) as profile:
            chain()
        backward([chain().square().sum()])
    events = profile.key_averages(group_by_input_shape=True)
    assert [e.count for e in events if e.key == "aten::_to_copy" and e.input_shapes[0] == [32, 32]] == [1]
    assert weight.grad is not None
    assert not torch.equal(weight.grad, weight.grad.bfloat16().float())
