"""How much is measured, how, and what a measurement is."""

from __future__ import annotations

import dataclasses
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmark.tables import number


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    repeats: int = 5  # turns
    envs: int = 40
    physics_chunks: int = 60  # per environment and turn
    async_tasks: tuple[str, ...] = ("hopper",)  # on which AsyncVectorEnv takes part
    kitchen_envs: int = 8
    kitchen_chunks: int = 70  # the same in the kitchen: a whole episode
    robosuite_chunks: int = 10  # of one environment per turn
    sampling_calls: int = 20  # per turn
    update_chunks: int = 125  # per environment in the rollout that DPPO learns from: one minibatch an epoch
    replay_chunks: int = 6  # the same for the methods with a replay: 30 gradient steps of IDQL, 3 of DQL
    iteration_turns: int = 5
    iteration_chunks: int = 125  # per environment, of DPPO: a multiple of this, so that minibatches are whole
    replay_iteration_chunks: int = 6  # the same of the methods with a replay
    compiled: bool = False  # whether plain methods take part with torch.compile too, which takes minutes to translate
    profile_envs: int = 50  # at most so many
    matmul_size: int = 2048
    growth_turns: int = 3  # processor seconds need few
    growth_doublings: int = 2  # of each size
    growth_iterations: int = 12  # over which memory is watched


@dataclass(frozen=True)
class Figure:
    """A number derived from a row's measurement; `aim` is its least (or, with `at_most`, largest) desired value."""

    name: str
    value: float
    aim: float | None = None
    at_most: bool = False

    def __str__(self) -> str:
        text = f"{number(self.value)} {self.name}"
        if self.aim is None:
            return text
        reached = self.value <= self.aim if self.at_most else self.value >= self.aim
        return f"{text} (aim {'<=' if self.at_most else '>='} {self.aim:g}: {'reached' if reached else 'missed'})"


@dataclass(frozen=True)
class Row:
    """One line of the result: a rate, measured `len(samples)` times; no samples and a note where it could not be."""

    part: str
    name: str
    unit: str
    samples: Sequence[float]
    figures: tuple[Figure, ...] = ()
    note: str = ""

    @property
    def rate(self) -> float | None:
        """The median of the samples."""
        return median(self.samples) if self.samples else None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**dataclasses.asdict(self), "median": self.rate}


class OperationCounter(TorchDispatchMode):
    """Counts the floating-point operations of matrix products while it is active, by torch's own formulas.

    `torch.utils.flop_counter.FlopCounterMode` does so by module as well, whose hooks fail on ours without gradients.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call and count."""
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def measure(functions: Mapping[str, Callable[[], int]], repeats: int) -> dict[str, list[float]]:
    """Call all functions in turns, `repeats` times each.

    Args:
        functions: each does some work and returns how many units of it.

    Returns:
        Units per second of every call, by the function's name.
    """
    rates: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            started = time.perf_counter()
            units = function()
            rates[name].append(units / (time.perf_counter() - started))
    return rates


def ratio(rates: Sequence[float], reference: Sequence[float]) -> float:
    """The median over turns of one rate divided by another."""
    return median(a / b for a, b in zip(rates, reference, strict=True))


def resident_memory(peak: bool = False) -> int:
    """Resident memory of this process in bytes, now or at its peak; the peak too where the system does not tell more.

    Linux's own record comes first: its getrusage also counts the process that this one was forked from.
    """
    name = "VmHWM" if peak else "VmRSS"
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
