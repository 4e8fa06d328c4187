"""What the plans look like: maps of the plane, and a cost matrix beside its plan.

Colours are safe for any common colour blindness: Okabe and Ito's eight for the sectors of the source, perceptually
even maps for matrices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from benchmark.toy_transport.problems import EXTENT, STREAMS, Problem
from benchmark.toy_transport.sampling import barycentric, train_sampler
from benchmark.toy_transport.solve import Case, Solved, smooth_cases, solve_case
from otpr.duality import interaction
from otpr.exact import exact_plan
from otpr.potentials import TransportSettings

SHOWN = 800  # points in a panel
SMALL_BLOCK = 32  # states and chunks of the matrix figure
SECTORS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#000000")
RC: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "pdf.fonttype": 42,
}
TITLES = {"8gaussians": "8 Gaussians", "swiss-roll": "Swiss roll"}


@dataclass(frozen=True)
class Panels:
    """What one problem of the plane shows: states (n, 2), targets (n, 2) and where both maps send the states (n, 2)."""

    problem: Problem
    states: Tensor
    targets: Tensor
    barycentric: Tensor
    samples: Tensor


def plane_panels(case: Case, solved: Solved, steps: int) -> Panels:
    """Send new states through the barycentric map and a diffusion model trained for `steps` steps."""
    problem, generator = case.problem, STREAMS.torch("shown-points")
    states, targets = problem.states(SHOWN, generator), problem.chunks(SHOWN, generator)
    sent = barycentric(solved.transport, problem, states, targets)
    policy = train_sampler(solved.transport, problem, steps)
    with torch.no_grad():
        samples = policy.sample(states, False, generator)
    return Panels(problem, states, targets.flatten(1), sent, samples.flatten(1))


def sector_colours(states: Tensor) -> list[str]:
    """One of eight colours by the angle of each state (n, 2), the first sector centred on angle 0."""
    angles = torch.atan2(states[:, 1], states[:, 0])
    return [SECTORS[i] for i in ((angles / (math.pi / 4)).round().long() % 8).tolist()]


def _scatter(axes: Axes, points: Tensor, colours: Sequence[str] | str, title: str) -> None:
    """Points (n, 2) on the common square."""
    axes.scatter(points[:, 0].numpy(), points[:, 1].numpy(), s=5, c=colours, linewidths=0, zorder=3)
    axes.set_title(title)
    limits, ticks = (-EXTENT, EXTENT), (-2, 0, 2)
    axes.set(xlim=limits, ylim=limits, aspect="equal", xticks=ticks, yticks=ticks)


def _pairs(axes: Axes, problem: Problem) -> None:
    """The keypoint pairs as lines from state to chunk."""
    if problem.keypoints is None:
        return
    starts, ends = problem.keypoints.observations, problem.keypoints.flat
    for start, end, colour in zip(starts, ends, sector_colours(starts), strict=True):
        axes.plot(*torch.stack([start, end], 1).numpy(), color=colour, linewidth=1.2, zorder=4)
        axes.plot(*end.numpy(), marker="s", markersize=5, color=colour, markeredgecolor="white", zorder=5)


def plane_figure(rows: Sequence[tuple[Panels, Panels]]) -> Figure:
    """A row a target: the source with its pairs, then both maps without and both with the pairs."""
    with mpl.rc_context(RC):
        figure = Figure(figsize=(11.5, 2.45 * len(rows) + 0.5), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(len(rows), 5, squeeze=False, sharex=True, sharey=True)
        for line, (free, paired) in zip(grid, rows, strict=True):
            colours = sector_colours(free.states)
            _scatter(line[0], free.targets, "#BBBBBB", "source, target (grey), pairs")
            _scatter(line[0], free.states, colours, line[0].get_title())
            _pairs(line[0], paired.problem)
            line[0].set_ylabel(TITLES[free.problem.name])
            for axes, panels, label in ((line[1:3], free, "squared distance"), (line[3:5], paired, "pairs")):
                for one, points, kind in zip(
                    axes, (panels.barycentric, panels.samples), ("barycentric", "diffusion"), strict=True
                ):
                    _scatter(one, panels.targets, "#DDDDDD", f"{label}: {kind}")
                    _scatter(one, points, sector_colours(panels.states), one.get_title())
    return figure


def matrix_figure(settings: TransportSettings) -> Figure:
    """Q of a small block, its plan by networks fitted to that block, and the exact plan, all in one order."""
    case = smooth_cases(replace(settings, block_size=SMALL_BLOCK))[2]  # scale 1, offset 0
    solved = solve_case(case)
    density, cost = solved.transport.plan(solved.observations, solved.chunks, case.problem.cost)
    exact = exact_plan(cost.double().numpy(), settings.epsilon, settings.regulariser).density
    # The leading singular vectors put like states, and like chunks, side by side.
    left, _, right = np.linalg.svd(interaction(cost).numpy())
    order = np.ix_(np.argsort(left[:, 0]), np.argsort(right[0]))
    top = float(max(density.max().item(), exact.max()))
    shown = (
        ((cost.mean() - cost).numpy(), "Q (centred, standardised)", "cividis", None, None),
        (density.numpy(), "H, neural potentials", "magma_r", 0.0, top),
        (exact, "H, exact (POT)", "magma_r", 0.0, top),
    )
    with mpl.rc_context(RC):
        figure = Figure(figsize=(10.5, 3.2), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, (matrix, title, colours, low, high) in zip(figure.subplots(1, 3), shown, strict=True):
            image = axes.imshow(matrix[order], cmap=colours, vmin=low, vmax=high, interpolation="nearest")
            axes.set(title=title, xlabel="action chunk", ylabel="state", xticks=(), yticks=())
            figure.colorbar(image, ax=axes, shrink=0.9)
    return figure
