"""bfloat16 products: where they are and where not, that they see new weights, and that runs keep their promises."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import toy_spec

from baselines.dppo import DPPO
from benchmark.finetune import Trainer
from benchmark.launch.execute import numeric_settings
from benchmark.spec import RunSpec
from benchmark.store import run_paths, write_json
from otpr.denoisers import DenoisingMLP
from otpr.networks import TwinQ
from otpr.potentials import Potentials, TransportSettings
from otpr.precision import precision_context
from otpr.released import cosine_relation


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("residual", [False, True])
def test_hidden_products_are_rounded_and_outputs_are_float32(residual: bool) -> None:
    critic = TwinQ(5, 6, (64, 64, 64), residual, generator())
    observations, chunks = torch.randn(32, 5, generator=generator()), torch.randn(32, 2, 3, generator=generator())
    exact = critic(observations, chunks)[0]
    with precision_context("bfloat16", "cpu"):
        rounded = critic(observations, chunks)[0]
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0.02)
    assert not torch.equal(rounded, rounded.bfloat16().float())  # finer than bfloat16 could tell apart


def test_potentials_stay_float32() -> None:
    potentials = Potentials(5, 6, TransportSettings(), generator())
    points = torch.randn(8, 5, generator=generator()), torch.randn(8, 2, 3, generator=generator())
    exact = potentials(*points)
    with precision_context("bfloat16", "cpu"):
        assert all(map(torch.equal, potentials(*points), exact))


def test_the_released_relations_stay_float32() -> None:
    points = torch.randn(8, 5, generator=generator())
    exact = cosine_relation(points, points[:4], 0.1)
    with precision_context("bfloat16", "cpu"):
        assert torch.equal(cosine_relation(points, points[:4], 0.1), exact)


def test_dppos_ratio_before_any_step_is_near_one() -> None:
    method = Trainer(toy_spec("dppo", ft_denoising_steps=3)).method
    assert isinstance(method, DPPO)
    observations = torch.rand(256, 2, generator=generator()) * 2 - 1
    for precision, largest in (("float32", 1e-5), ("bfloat16", 2e-3)):
        with precision_context(precision, "cpu"), torch.no_grad():
            extras = method.act(observations, True, generator()).extras
            for step in range(3):
                before, after = extras["chain"][:, step], extras["chain"][:, step + 1]
                new = method.log_probability(observations, before, after, torch.full((256,), step))
                off = (new - extras["log_probability"][:, step]).exp() - 1
                assert off.abs().max() < largest and off.std() < largest / 4


def test_products_see_the_weights_of_the_last_gradient_step() -> None:
    network = DenoisingMLP(3, 2, 2, generator())
    arguments = torch.ones(4, 2, 2), torch.zeros(4, dtype=torch.int64), torch.ones(4, 3)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    with precision_context("bfloat16", "cpu"):
        network(*arguments).sum().backward()
        optimizer.step()
        within = network(*arguments)
    with precision_context("bfloat16", "cpu"):
        assert torch.equal(network(*arguments), within)


def test_a_specification_without_precision_is_float32() -> None:
    content = toy_spec("idql").as_dict()
    assert content["precision"] == "float32"
    half = dataclasses.replace(toy_spec("idql"), precision="bfloat16")
    assert half.digest != content["digest"] and RunSpec.from_dict(half.as_dict()) == half
    with pytest.raises(ValueError, match="unknown precision 'float16'; valid: float32, bfloat16"):
        dataclasses.replace(half, precision="float16")


@pytest.mark.parametrize("method", ["dppo", "idql", "dql", "otpr"])
def test_a_resumed_run_has_the_same_bits(method: str, tmp_path: Path) -> None:
    spec = dataclasses.replace(toy_spec(method), precision="bfloat16")
    paths = run_paths(tmp_path, spec.task, spec.method, spec.seed)
    write_json(paths.spec, spec.as_dict())
    with numeric_settings(spec):
        whole, first = Trainer(spec), Trainer(spec)
        for _ in range(6):
            whole.advance()
        for _ in range(3):
            first.advance()
        first.save(paths)
        second = Trainer(spec)
        second.restore(paths)
        for _ in range(3):
            second.advance()
    exact = Trainer(dataclasses.replace(spec, precision="float32"))
    for _ in range(6):
        exact.advance()
    losses = {name: [r.metrics[-1][name] for r in (whole, second, exact)] for name in whole.metrics[-1] if "/" in name}
    kept = {name: values for name, values in losses.items() if not name.startswith("time/")}
    assert all(values[0] == values[1] for values in kept.values())
    assert any(values[0] != values[2] for values in kept.values())
