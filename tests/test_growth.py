"""Growth of cost with work: rows of every method and size, which really change, and memory over time, at tiny sizes."""

from __future__ import annotations

import math

import pytest
import torch

from benchmark.methods import ARMS, Arm
from benchmark.speed import __main__ as command
from benchmark.speed import growth
from benchmark.speed.growth import METHODS, PROPORTIONAL, Loop, Work, growth_of, memory_over_time, method_settings
from benchmark.speed.measuring import Row, Sizes

BASE = Work(chunks=2, envs=2, batch_size=4, candidates=2, denoising_steps=2)
TINY = Sizes(growth_turns=1, growth_doublings=1, growth_iterations=1)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", METHODS)
def test_rows_of_every_method_have_its_sizes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "memory_of", lambda name, base, sizes: Row("growth", f"{name}, memory", "GiB", [1.0]))
    *rows, memory = growth.method_growth(name, BASE, TINY)
    axes = [axis for axis in PROPORTIONAL if axis != "candidates" or name in ("idql", "otpr")]
    assert [row.name for row in rows] == [
        f"{name}, {phase}, {axis}" for axis in axes for phase in ("collect", "update")
    ]
    assert memory.name == f"{name}, memory"
    for row in rows:
        assert len(row.samples) == TINY.growth_turns and row.unit == "x/doubling"
        assert all(math.isfinite(value) and value > 0 for value in row.samples)
        assert [figure.name for figure in row.figures] == ["if proportional", "ms at 1x", "ms at 2x"]


def test_growth_is_that_of_one_doubling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs that grow with the square of the chunks, and not at all: 4 a doubling, 1 a doubling, also over several."""

    def iterate(loop: Loop) -> tuple[float, float]:
        return float(loop.collector.n_steps) ** 2, 3.0

    monkeypatch.setattr(Loop, "iterate", iterate)
    collect, update = growth_of("dppo", "chunks", BASE, Sizes(growth_turns=2, growth_doublings=3))
    assert collect.samples == pytest.approx([4.0, 4.0]) and update.samples == pytest.approx([1.0, 1.0])
    assert [figure.value for figure in collect.figures] == pytest.approx([2.0, 4000.0, 256_000.0])


def test_sizes_reach_the_method() -> None:
    work = Work(chunks=3, envs=2, batch_size=5, candidates=7, denoising_steps=6)
    settings = method_settings("otpr", work)
    assert (settings.batch_size, settings.candidates, settings.replay_capacity) == (5, 7, 6)
    loop = Loop("dppo", work)
    rollout = loop.collector.collect(loop.method.act)
    assert rollout.actions.shape[:2] == (3, 2)
    assert loop.method.act(rollout.observations[0], True, torch.Generator()).extras["chain"].shape[1] == 6
    loop.env.close()


def test_memory_is_that_of_every_iteration_in_a_process_of_its_own() -> None:
    assert all(2**20 < memory < 2**40 for memory in memory_over_time("idql", BASE, 3))
    row = growth.memory_of("dppo", BASE, TINY)
    assert row.name == "dppo, memory after iteration 1" and row.rate is not None and 0.01 < row.rate < 100
    assert (row.figures[0].value, row.figures[0].at_most) == (1.0, True)


def test_what_is_missing_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    assert command.PARTS["growth"] is growth.growth
    monkeypatch.setattr(growth, "METHODS", ("absent",))
    monkeypatch.setitem(ARMS, "absent", Arm("baselines.absent", "Absent"))
    threads = torch.get_num_threads()
    (row,) = growth.growth(TINY, threads)
    assert (row.name, row.rate, row.note) == ("absent", None, "not available: No module named 'baselines.absent'")
    assert torch.get_num_threads() == threads
