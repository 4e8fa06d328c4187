"""What may be compared: which seeds, at which environment step, and by which evaluation a run counts.

The score of a run is its evaluation at the largest number of environment steps common to all methods of its task. A run
counts when it has that evaluation, whatever became of it later: leaving out runs that broke afterwards would favour
methods that break.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmark.report.records import Evaluation, Run
from benchmark.seeding import TUNING_SEED

FROZEN = "frozen"
# Seeds from here on are for tuning.
# Runs in these states say nothing about how far their method will get.
_BROKEN = ("failed", "diverged")


def select_seeds(runs: list[Run]) -> tuple[list[Run], str]:
    """Keep the runs with seeds below `TUNING_SEED`, or all where there is no other; and the line that says so.

    The convention is ours: runs from elsewhere stay, whatever their seed.
    """
    tuning = [run for run in runs if run.seed >= TUNING_SEED and not run.source]
    if not tuning:
        return runs, ""
    if len(tuning) == len(runs):
        return runs, f"All seeds are {TUNING_SEED} or more: these are tuning runs, not results to publish."
    kept = [run for run in runs if run.seed < TUNING_SEED or run.source]
    return kept, f"{len(tuning)} tuning run(s) (seeds {TUNING_SEED} and up) left out; they are never mixed with others."


def _voters(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs of one task that decide the common step, by method.

    Finished runs speak for their method; where there is none, those under way or interrupted that have got past the
    first evaluation do. Broken runs and the frozen policy (the same at every step) have a say only if nobody else has.
    """
    methods: dict[str, list[Run]] = {}
    for run in runs:
        if run.evaluations:
            methods.setdefault(run.method, []).append(run)
    voters = []
    for method, members in methods.items():
        done = [run for run in members if run.state == "done"]
        under_way = [run for run in members if run.state not in _BROKEN and run.last_step > 0]
        if method != FROZEN and (done or under_way):
            voters.append(done or under_way)
    return voters or list(methods.values())


def common_step(runs: Sequence[Run]) -> tuple[int | None, bool]:
    """The environment steps at which the methods of one task are compared.

    Returns:
        The largest env_steps at which every method's deciding runs have an evaluation, and True. Where their
        evaluations never meet after step 0, the largest budget that all of them reached, and False: then the score is
        the last evaluation within it. (None, True) where there is no evaluation at all.
    """
    voters = [run for method in _voters(runs) for run in method]
    if not voters:
        return None, True
    shared = set.intersection(*({e.env_steps for e in run.evaluations} for run in voters))
    reached = min(run.last_step for run in voters)
    if shared and (max(shared) > 0 or reached <= 0):
        return max(shared), True
    return reached, False


def score_at(run: Run, env_steps: int | None, exact: bool) -> Evaluation | None:
    """The evaluation by which `run` counts, given what `common_step` returned; None where it does not count."""
    if env_steps is None or not run.evaluations:
        return None
    if run.method == FROZEN:
        # Never updated: what it scored at any step it scores at this one.
        return run.before(env_steps) or run.evaluations[0]
    if exact:
        return run.at(env_steps)
    return run.before(env_steps) if run.last_step >= env_steps else None
