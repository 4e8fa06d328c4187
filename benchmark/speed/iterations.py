"""Whole iterations, collecting and learning with published settings: ours beside plain ones, and OTPR beside IDQL.

Every contender has a process of its own, with its own threads, and waits there while another is timed; a turn is one
iteration of each. Fewer chunks than the published ones are collected, and the gradient steps are in proportion; what
an iteration does once however long it is, OTPR's transport with its cost block, is done whole. A rate is that of the
published iteration, put together from the parts' measured seconds: those of collecting and of gradient steps times how
many more the published iteration has of each, and those of the transport once.

An iteration before the first turn makes OTPR's first fit and counts floating-point operations (of matrix products, as
torch counts them); it is not timed. Before it the replay is filled: it holds as many times an iteration's chunks as
the published one, so that what OTPR computes once per stored pair is in proportion too. Warm-ups of the methods are
off. Policies are freshly initialised, observations are not normalised, and actions are kept weak so that a hopper
stands for a while.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median

import torch

from benchmark.methods import resolve_settings
from benchmark.speed.contenders import Contender, Iteration, Parts, Seat, iteration_settings
from benchmark.speed.learning import PROTOCOL, TASK, multiply
from benchmark.speed.measuring import Figure, Row, Sizes, measure, ratio
from otpr.precision import PRECISIONS

ITERATION_RATE, ITERATION_GIB = 1500, 2.0  # aims of a whole DPPO iteration on 2 cores: env steps/s, peak memory
PRODUCTS = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # element types of the matrix products beside them


def _plain(method: str) -> tuple[Contender, Contender]:
    """The plain one as it comes, then with its networks compiled."""
    return Contender(method, plain=True), Contender(method, plain=True, compiled=True)


# Those of one group take turns with each other. OTPR stands beside IDQL, from which it was made.
GROUPS: tuple[tuple[Contender, ...], ...] = (
    (*_plain("dppo"), *(Contender("dppo", precision=p) for p in PRECISIONS)),
    (
        *_plain("idql"),
        *(Contender(method, precision=p) for p in PRECISIONS for method in ("idql", "otpr")),
    ),
    (*_plain("dql"), *(Contender("dql", precision=p) for p in PRECISIONS)),
)
AIMS = {  # least ratio to the reference, by method and precision
    ("dppo", "float32"): 2.0,
    ("dppo", "bfloat16"): 3.0,
    ("idql", "float32"): 1.5,
    ("idql", "bfloat16"): 3.0,
    ("dql", "float32"): 1.5,
    ("dql", "bfloat16"): 3.0,
    ("otpr", "float32"): 0.85,
    ("otpr", "bfloat16"): 0.85,
}


@dataclass(frozen=True)
class Outcome:
    """A contender's turns, in terms of the published iteration."""

    contender: Contender
    seconds: list[Parts]
    operations: float
    env_steps: int
    turns: list[Iteration]

    @property
    def rates(self) -> list[float]:
        """Environment steps per second, by turn."""
        return [self.env_steps / parts.total for parts in self.seconds]

    @property
    def speeds(self) -> list[float]:
        """GFLOP/s of matrix products, by turn."""
        return [self.operations / parts.total / 1e9 for parts in self.seconds]


def outcome(seat: Seat, envs: int, chunks: int) -> Outcome:
    """What a seat's turns come to at the published number of chunks."""
    method = seat.contender.method
    settings = resolve_settings(method, TASK, PROTOCOL, iteration_settings(method, chunks))
    published = TASK.loop(PROTOCOL).n_steps
    collect_factor = learn_factor = published / chunks
    if hasattr(settings, "replay_ratio"):  # whose gradient steps are a whole number, also in a short iteration
        learn_factor = published * envs * settings.replay_ratio / settings.batch_size / seat.counted.gradient_steps
    seconds = [turn.seconds.published(collect_factor, learn_factor) for turn in seat.turns]
    operations = seat.counted.operations.published(collect_factor, learn_factor).total
    return Outcome(seat.contender, seconds, operations, envs * published * TASK.action_horizon, seat.turns)


def reference_of(contender: Contender) -> Contender | None:
    """What it is compared with: the plain method; our IDQL for OTPR."""
    if contender.plain and not contender.compiled:
        return None
    if contender.method == "otpr":
        return dataclasses.replace(contender, method="idql")
    return Contender(contender.method, plain=True)


def figures_of(one: Outcome, others: dict[Contender, Outcome], products: dict[str, list[float]]) -> tuple[Figure, ...]:
    """The ratio to the reference first, then how near the machine's matrix product it is, and what it took."""
    contender, figures = one.contender, []
    reference = reference_of(contender)
    if reference in others:
        name = "x plain" if others[reference].contender.plain else f"of {reference.method}'s rate"
        aim = None if contender.plain else AIMS.get((contender.method, contender.precision))
        figures.append(Figure(name, ratio(one.rates, others[reference].rates), aim))
    if contender == Contender("dppo"):
        figures.append(Figure(f"of {ITERATION_RATE:,} env steps/s", median(one.rates) / ITERATION_RATE, 1.0))
    gib, limit = max(turn.memory for turn in one.turns) / 2**30, ITERATION_GIB if contender.method == "dppo" else None
    figures += [
        Figure("GFLOP/s", median(one.speeds)),
        Figure("of the matrix product's GFLOP/s", ratio(one.speeds, products[contender.precision])),
        Figure("GiB peak memory without workers", gib)
        if contender.plain
        else Figure("GiB peak memory", gib, limit, at_most=True),
    ]
    parts = {"collecting": "collect", "in gradient steps": "learn", "fitting the transport": "fit"}
    for words, name in parts.items():
        seconds = median(getattr(turn, name) for turn in one.seconds)
        if seconds:
            figures.append(Figure(f"s {words}", seconds))
    return tuple(figures)


def measure_group(contenders: Sequence[Contender], sizes: Sizes, threads: int) -> list[Row]:
    """Turns of one group, with the machine's matrix product in every turn.

    Raises:
        BrokenProcessPool: a process died.
    """
    on_policy = contenders[0].method == "dppo"
    chunks = sizes.iteration_chunks if on_policy else sizes.replay_iteration_chunks
    seats: list[Seat] = []
    missing: list[Row] = []
    with ExitStack() as stack:
        for contender in contenders:
            try:
                if contender.lacking:
                    raise ValueError(contender.lacking)
                seats.append(Seat(contender, sizes.envs, chunks, threads))
                stack.callback(seats[-1].close)
            except (ImportError, ValueError) as error:
                missing.append(Row("iteration", contender.label, "env steps/s", [], note=f"not available: {error}"))
        products: dict[str, list[float]] = {seat.contender.precision: [] for seat in seats}
        for _ in range(sizes.iteration_turns):
            for seat in seats:
                seat.turn()
            for precision, rates in products.items():
                rates += measure_product(sizes.matmul_size, precision)
    outcomes = {seat.contender: outcome(seat, sizes.envs, chunks) for seat in seats}
    rows = []
    for contender, one in outcomes.items():
        label = f"{contender.label}, {sizes.envs} x {TASK.loop(PROTOCOL).n_steps} chunks (from {chunks})"
        rows.append(Row("iteration", label, "env steps/s", one.rates, figures_of(one, outcomes, products)))
    for precision, rates in products.items():
        label = f"matrix product between {contenders[0].method}'s turns, {precision}, {sizes.matmul_size} x same"
        rows.append(Row("iteration", label, "GFLOP/s", rates))
    return rows + missing


def measure_product(size: int, precision: str) -> list[float]:
    """GFLOP/s of one matrix product in that precision."""
    product = multiply(size, PRODUCTS[precision])
    product()
    return [rate / 1e9 for rate in measure({"product": product}, 1)["product"]]


def iteration(sizes: Sizes, threads: int) -> list[Row]:
    """Whole iterations of every group."""
    groups = ([one for one in group if sizes.compiled or not one.compiled] for group in GROUPS)
    return [row for contenders in groups for row in measure_group(contenders, sizes, threads)]
