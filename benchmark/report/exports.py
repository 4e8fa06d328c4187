"""The evaluations in the formats of other tools, below DIR/report; packages beyond the harness's are an extra."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any
from urllib.parse import quote

from benchmark.report.longform import DATA_COLUMNS
from benchmark.report.records import Evaluation, Run
from benchmark.store import write_text
from benchmark.tables import csv_number, csv_table

_SCALARS = ("score", "return_mean", "success_rate", "return_std", "episodes", "gradient_steps")
# Columns as Open RL Benchmark names them for runs of CleanRL.
_OPENRL = {
    "env_id": "task",
    "exp_name": "method",
    "seed": "seed",
    "global_step": "env_steps",
    "_runtime": "wall_seconds",
    "charts/episodic_return": "return_mean",
    "charts/success_rate": "success_rate",
    "charts/score": "score",
}
_WORDS = ("task", "method", "state", "offline_data", "source")
_COUNTS = ("seed", "env_steps", "iteration")


@dataclass(frozen=True)
class Export:
    """A format: the package that it needs ("" for none) and how to write the runs into a folder."""

    package: str
    write: Callable[[Sequence[Run], Path], None]


def _value(run: Run, row: Evaluation, name: str) -> Any:
    return getattr(row, name) if hasattr(row, name) else getattr(run, name)


def _parquet(runs: Sequence[Run], folder: Path) -> None:
    """The long table as Parquet: words, counts and floats, NaN where blank; reads back with `pandas.read_parquet`."""
    import pandas as pd

    pairs = [(run, row) for run in runs for row in run.evaluations]
    columns = {name: [_value(run, row, name) for run, row in pairs] for name in DATA_COLUMNS}
    frame = pd.DataFrame(columns)
    kinds = {name: "int64" if name in _COUNTS else "str" if name in _WORDS else "float64" for name in DATA_COLUMNS}
    temporary = folder / ".data.parquet.tmp"
    frame.astype(kinds).to_parquet(temporary, index=False)
    temporary.replace(folder / "data.parquet")


def _openrlbenchmark(runs: Sequence[Run], folder: Path) -> None:
    """One CSV of all runs with the columns of CleanRL's runs in Open RL Benchmark."""
    rows = []
    for run in runs:
        for row in run.evaluations:
            values = {column: _value(run, row, name) for column, name in _OPENRL.items()}
            rows.append(
                {name: value if isinstance(value, str) else csv_number(value) for name, value in values.items()}
            )
    write_text(folder / "openrlbenchmark.csv", csv_table(tuple(_OPENRL), rows))


def _scalars(row: Evaluation) -> dict[str, float]:
    return {f"evaluation/{name}": value for name in _SCALARS if math.isfinite(value := getattr(row, name))}


def _safe(name: str) -> str:
    """A name fit for a folder: never a path, never too long, different for different names."""
    safe = quote(name, safe="").replace(".", "%2E")
    return safe if len(safe) <= 100 else f"{safe[:80]}-{_digest(name)}"


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _tensorboard(runs: Sequence[Run], folder: Path) -> None:
    """One event file a run below `folder`/tensorboard, over environment steps; an earlier export is replaced."""
    from torch.utils.tensorboard import SummaryWriter

    root = folder / "tensorboard"
    rmtree(root, ignore_errors=True)
    for run in runs:
        with SummaryWriter(str(root / _safe(run.task) / _safe(run.method) / f"seed-{run.seed}")) as writer:
            for row in run.evaluations:
                for name, value in _scalars(row).items():
                    writer.add_scalar(name, value, row.env_steps, walltime=_seconds(row))


def _seconds(row: Evaluation) -> float:
    return row.wall_seconds if math.isfinite(row.wall_seconds) else 0.0


def _wandb(runs: Sequence[Run], folder: Path) -> None:
    """One offline run a run below `folder`/wandb, which `wandb sync` uploads; nothing goes over the network here.

    An earlier export is replaced. A run keeps its identifier, so that a second upload does not double it.
    """
    wandb = importlib.import_module("wandb")
    rmtree(folder / "wandb", ignore_errors=True)
    for run in runs:
        config = {"task": run.task, "method": run.method, "seed": run.seed, "state": run.state, "spec": dict(run.spec)}
        group = f"{run.task}/{run.method}"[:120]
        session = wandb.init(
            project="otpr-bench",
            dir=str(folder),
            mode="offline",
            id=_digest(run.name),
            group=group,
            name=run.name[:120],
            config=config,
            settings=wandb.Settings(silent=True, console="off"),
        )
        session.define_metric("env_steps")
        session.define_metric("evaluation/*", step_metric="env_steps")
        for row in run.evaluations:
            session.log({"env_steps": row.env_steps, **_scalars(row)})
        session.finish()


EXPORTS = {
    "parquet": Export("pyarrow", _parquet),
    "tensorboard": Export("tensorboard", _tensorboard),
    "wandb": Export("wandb", _wandb),
    "openrlbenchmark": Export("", _openrlbenchmark),
}


def check_exports(names: Sequence[str]) -> None:
    """Raise ValueError, in one line, where a format is unknown or its package is not installed."""
    for name in names:
        if name not in EXPORTS:
            raise ValueError(f"unknown export {name!r}; valid: {', '.join(EXPORTS)}")
        package = EXPORTS[name].package
        if package and importlib.util.find_spec(package) is None:
            raise ValueError(f'the export {name!r} needs {package}: pip install "otpr-bench[export]"')
