"""What does the compatibility H say about a run's last checkpoint, if the transport is solved well, badly or relaxed?

    python -m benchmark.diagnose --run runs/otpr-check/hopper-local/idql/seed-0 --out diagnosis.csv

Actor, critic and replay of the checkpoint stay as they are. For every bound on the action marginal the unmasked
transport with cost -Q is solved anew, by networks and exactly (POT, extended by the conditions of optimality), and the
policy that draws among the actor's candidates in proportion to H plays the run's evaluation episodes. Beside it: the
actor alone (a uniform draw) and the candidate of largest Q.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from benchmark.command_line import refuse_repeated
from benchmark.evaluation import Diverged
from benchmark.finetune import Trainer
from benchmark.launch.execute import numeric_settings
from benchmark.methods import resolve_settings
from benchmark.plan import check_writable
from benchmark.spec import RunSpec, load_spec
from benchmark.store import RunPaths, write_rows
from benchmark.tasks import get_task
from otpr.agent import OTPR, SELECTION_FLOOR, Settings
from otpr.duality import marginal_errors
from otpr.exact import ExactTransport
from otpr.implicit_q import ImplicitQ
from otpr.method import ActionChunk, Rule
from otpr.offpolicy import pick, sample_candidates

Compatibility = Callable[[Tensor, Tensor, Tensor], Tensor]  # observations, chunks, cost terms -> H (B, S)

FITS = 10  # fits on fresh points before the neural potentials are judged
STATES = 256  # replayed states at which H is compared with the advantage
SOLVERS = ("neural", "conditional", "exact")
COLUMNS = ("task", "method", "seed", "env_steps", "rule", "solver", "action_bound", "epsilon", "episodes")


def agent_settings(spec: RunSpec, action_bound: float, epsilon: float) -> Settings:
    """Settings of the unmasked arm on the run's task.

    Raises:
        ValueError: out of range.
    """
    return resolve_settings(
        "otpr-u", get_task(spec.task), spec.protocol, {"action_bound": action_bound, "epsilon": epsilon}
    )


def load_checkpoint_into(trainer: Trainer, paths: RunPaths, action_bound: float, epsilon: float) -> OTPR:
    """An unmasked OTPR agent with these settings around the actor, critic and replay of a run's checkpoint.

    Raises:
        ValueError: the checkpoint is unusable, its method has no implicit Q-learning critic, or a setting out of range.
    """
    trainer.restore(paths)
    source = trainer.method
    if not isinstance(source, ImplicitQ):
        raise ValueError(f"{trainer.spec.method!r} has no critic with Q and V; valid: idql and the arms of otpr")
    settings = agent_settings(trainer.spec, action_bound, epsilon)
    agent = OTPR(settings, source.actor, trainer.shape, trainer.streams.torch("diagnosis", trainer.spec.device))
    agent.critic, agent.replay, agent.iteration = source.critic, source.replay, source.iteration
    return agent


def drawing_rule(agent: OTPR, compatibility: Compatibility) -> Rule:
    """Act by a draw among candidates in proportion to `compatibility`."""

    @torch.no_grad()
    def rule(observations: Tensor, generator: torch.Generator) -> ActionChunk:
        count = agent.settings.candidates
        candidates = sample_candidates(agent.actor, observations, count, False, generator)
        h = compatibility(observations, candidates, agent.cost(observations, candidates))
        return ActionChunk(pick(candidates, agent.resample(h, False, generator)))

    return rule


@torch.no_grad()
def signal(agent: OTPR, compatibility: Compatibility) -> dict[str, float]:
    """How H relates to the advantage over the actor's candidates at replayed states.

    Returns:
        correlation: of H and Q - V within states; entropy: of the draw, as a share of its maximum; empty: share of
        states where H is zero for all; gain: the expected gain in Q of the draw over the actor, as a share of what the
        best candidate gains.
    """
    generator = torch.Generator(agent.generator.device).manual_seed(0)
    observations = agent.replay.sample(STATES, generator).observations
    candidates = sample_candidates(agent.actor, observations, agent.settings.candidates, False, generator)
    terms = agent.cost(observations, candidates)
    h = compatibility(observations, candidates, terms)
    advantage = -(terms[..., 0] - terms[..., 0].mean(1, keepdim=True))
    share = (h + SELECTION_FLOOR) / (h + SELECTION_FLOOR).sum(1, keepdim=True)
    centred = h - h.mean(1, keepdim=True)
    entropy = -torch.xlogy(share, share).sum(1).mean() / torch.tensor(float(h.shape[1])).log()
    return {
        "correlation": ((centred * advantage).sum() / (centred.norm() * advantage.norm()).clamp_min(1e-12)).item(),
        "entropy": entropy.item(),
        "empty": (h.sum(1) == 0).float().mean().item(),
        "gain": ((share * advantage).sum(1).mean() / advantage.max(1).values.mean()).item(),
    }


def solve(agent: OTPR, solver: str) -> tuple[Compatibility, dict[str, float]]:
    """H by one of `SOLVERS`, and the seconds and marginal error (on the fitted points) that it took."""
    started = time.perf_counter()
    metrics: dict[str, float] = {}
    for _ in range(FITS):  # the exact solution borrows the unit of the cost from the last of these
        metrics = agent.fit_transport()
    if solver == "neural":
        error = max(metrics["transport/row_marginal_error"], metrics["transport/column_marginal_error"])
        return agent.transport.compatibility, {"marginal_error": error, "seconds": time.perf_counter() - started}
    if solver == "conditional":
        return agent.transport.conditional, {"seconds": time.perf_counter() - started}

    def cost(observations: Tensor, chunks: Tensor) -> Tensor:
        return agent.transport.standardised(agent.cost(observations, chunks))[..., None]

    started = time.perf_counter()
    settings = agent.transport.settings
    bound = settings.action_bound
    exact = ExactTransport(*agent.transport_points(), cost, settings.epsilon, settings.regulariser, bound)
    error = max(marginal_errors(torch.from_numpy(exact.plan.density), bound)).item()

    def compatibility(observations: Tensor, chunks: Tensor, terms: Tensor) -> Tensor:
        return exact.compatibility(observations, chunks, agent.transport.standardised(terms)[..., None])

    return compatibility, {"marginal_error": error, "seconds": time.perf_counter() - started}


@dataclass(frozen=True)
class Arguments:
    """Command line of `benchmark.diagnose`."""

    run: Path
    """Directory of a finished run, with its checkpoint."""
    out: Path
    """CSV file to write."""
    bounds: tuple[float, ...] = (1.0, 2.0, 4.0, 1e9)
    """Bounds on the action marginal; 1 is transport, a very large one drops its potential."""
    epsilons: tuple[float, ...] = (0.1,)
    """Strengths of the regulariser, in units of the cost."""
    solvers: tuple[str, ...] = SOLVERS
    """neural, exact, or conditional: neural v, and u(s) with which H of a state's candidates has mean 1."""


def check(arguments: Arguments) -> RunSpec:
    """The run's specification, after all that is asked for was checked.

    Raises:
        ValueError: no such run or checkpoint, nothing to solve, an unknown solver, a bound below 1, an epsilon of 0 or
            less, or a place that cannot be written to.
    """
    for name in ("bounds", "epsilons", "solvers"):
        if not getattr(arguments, name):
            raise ValueError(f"--{name} needs at least one value")
    unknown = [name for name in arguments.solvers if name not in SOLVERS]
    if unknown:
        raise ValueError(f"unknown solver {unknown[0]!r}; valid: {', '.join(SOLVERS)}")
    check_writable(arguments.out.parent)
    if arguments.out.is_dir():
        raise ValueError(f"--out must be a file, got the directory {arguments.out}")
    paths = RunPaths(arguments.run)
    spec = load_spec(paths.spec)
    if not paths.has_checkpoint:
        raise ValueError(f"{paths.root} has no checkpoint.pt; run it first")
    for bound, epsilon in itertools.product(arguments.bounds, arguments.epsilons):
        agent_settings(spec, bound, epsilon)
    return spec


def diagnose(arguments: Arguments) -> Iterator[dict[str, Any]]:
    """The rows of the table, one after the other.

    Raises:
        ValueError: see `check`, or the run's method has no implicit Q-learning critic.
        RuntimeError: the exact solver fails.
        Diverged: an action is not finite.
    """
    spec = check(arguments)
    with numeric_settings(spec):
        trainer = Trainer(spec)
        try:
            yield from diagnose_checkpoint(trainer, arguments)
        finally:
            trainer.close()


def diagnose_checkpoint(trainer: Trainer, arguments: Arguments) -> Iterator[dict[str, Any]]:
    """The rows of `diagnose`, played with `trainer`."""
    spec, paths = trainer.spec, RunPaths(arguments.run)
    agent = load_checkpoint_into(trainer, paths, arguments.bounds[0], arguments.epsilons[0])
    identity = {"task": spec.task, "method": spec.method, "seed": spec.seed, "env_steps": trainer.env_steps}

    def played(rule: Rule) -> dict[str, Any]:
        result = trainer.play(rule)
        return {name: result[name] for name in ("episodes", "return_mean", "return_std", "score")}

    for name, rule in agent.other_rules().items():
        yield identity | {"rule": name} | played(rule)
    for bound, epsilon, solver in itertools.product(arguments.bounds, arguments.epsilons, arguments.solvers):
        agent = load_checkpoint_into(trainer, paths, bound, epsilon)
        compatibility, effort = solve(agent, solver)
        values = {"rule": "sample_h", "solver": solver, "action_bound": bound, "epsilon": epsilon}
        values |= signal(agent, compatibility) | effort
        yield identity | values | played(drawing_rule(agent, compatibility))


def main(arguments: Arguments) -> int:
    """Diagnose, print each row and write the table so far after it; returns the exit status."""
    rows: list[dict[str, Any]] = []
    try:
        for row in diagnose(arguments):
            print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
            rows.append(row)
            write_rows(arguments.out, rows, COLUMNS)
    except (ValueError, OSError, RuntimeError, Diverged) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    refuse_repeated(sys.argv[1:], ("--bounds", "--epsilons", "--solvers"))
    sys.exit(main(tyro.cli(Arguments, description=__doc__, prog="python -m benchmark.diagnose")))
