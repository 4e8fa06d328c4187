"""Datasets: what there is, download or generate them, check a file, bring one in from elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from benchmark.data.access import read_task_data, verify_data
from benchmark.data.episodes import Episodes
from benchmark.data.make import make_dataset
from benchmark.data.obtain import fetch, import_file
from benchmark.data.registry import DATASETS, LocalData, PublishedData, dataset_path, get_dataset
from benchmark.dppo_files import export_policy_command, import_policy_command
from benchmark.tasks import get_task

_REPORT_EVERY = 0.5  # seconds between two lines of progress on a terminal; elsewhere one a tenth of the file


def show(episodes: Episodes) -> None:
    """Print a table of the episodes' lengths and returns."""
    ended = f"{int(episodes.terminals.sum())} terminated, {int(episodes.timeouts.sum())} timed out"
    print(f"  episodes {len(episodes.lengths)} ({ended}), steps {len(episodes.rewards)}")
    print(f"  {'':8}{'mean':>10}{'std':>10}{'min':>10}{'median':>10}{'max':>10}")
    for name, values in (("length", episodes.lengths), ("return", episodes.returns)):
        row = (values.mean(), values.std(), values.min(), float(np.median(values)), values.max())
        print(f"  {name:8}" + "".join(f"{value:10.2f}" for value in row))


def list_datasets(cache: Path | None = None) -> None:
    """List the datasets, and which of them are in the cache.

    Example: python -m benchmark.data list

    Args:
        cache: directory of the data and policies, by default OTPR_BENCH_CACHE or ~/.cache/otpr-bench.
    """
    _use_cache(cache)
    for name, data in DATASETS.items():
        path, task = dataset_path(name), get_task(name)
        if isinstance(data, LocalData):
            about = f"generated: {data.episodes} episodes of {data.description}"
            absent = f"not made yet: python -m benchmark.data make {name}"
        else:
            about = f"{data.licence}; {data.size_text}; {data.layout} file from {data.address}"
            absent = f"missing: python -m benchmark.data get {name}"
        state = f"there: {path}, {path.stat().st_size / 1e6:.1f} MB" if path.exists() else absent
        widths = f"task {name}: observations {task.observation_dim}, actions {task.action_dim}"
        print(f"{name:22} {about}\n{'':22} {widths}\n{'':22} {state}")


def get(names: tyro.conf.Positional[tuple[str, ...]], cache: Path | None = None) -> int:
    """Download published datasets; an interrupted download continues where it stopped.

    Example: python -m benchmark.data get hopper-medium-v2 lift

    Args:
        names: the datasets, or all.
        cache: directory of the data and policies, by default OTPR_BENCH_CACHE or ~/.cache/otpr-bench.
    """
    _use_cache(cache)
    if not names:
        raise ValueError("name the datasets to download, or all")
    published = [name for name, data in DATASETS.items() if isinstance(data, PublishedData)]
    wanted = published if names == ("all",) else names
    for name in wanted:
        if name not in published:
            kind = "generated: use make" if name in DATASETS else "unknown"
            raise ValueError(f"cannot download {name!r} ({kind}); valid: all, {', '.join(published)}")
    failed = 0
    for name in wanted:
        try:
            path = fetch(name, _Progress(name))
            print(f"{path}: {name}, {path.stat().st_size / 1e6:.1f} MB, checked")
        except (ValueError, OSError) as error:
            print(_line(error), file=sys.stderr)
            failed += 1
    return 1 if failed else 0


def make(name: tyro.conf.Positional[str], out: Path | None = None, threads: int = 1, cache: Path | None = None) -> None:
    """Generate a local dataset.

    Example: python -m benchmark.data make hopper-local --threads 2

    Args:
        name: the dataset.
        out: the file to write, by default one in the cache.
        threads: threads of the physics, or worker processes of robosuite; they never change a result.
        cache: directory of the data and policies, by default OTPR_BENCH_CACHE or ~/.cache/otpr-bench.
    """
    _use_cache(cache)
    if threads < 1:
        raise ValueError(f"--threads must be at least 1, got {threads}")
    data = get_dataset(name)
    if not isinstance(data, LocalData):
        raise ValueError(f"{name!r} is published, not generated: python -m benchmark.data get {name}")
    started = time.perf_counter()
    path = make_dataset(data, out, threads)
    print(f"{path}: {name}, {path.stat().st_size / 1e6:.1f} MB, made in {time.perf_counter() - started:.0f} s")
    show(read_task_data(name, path).episodes)


def verify(
    name: tyro.conf.Positional[str], file: tyro.conf.Positional[Path | None] = None, cache: Path | None = None
) -> None:
    """Check that a file holds a published dataset as recorded, or a local one as it is made today.

    Example: python -m benchmark.data verify toy

    Args:
        name: the dataset.
        file: the file to check, by default the one in the cache.
        cache: directory of the data and policies, by default OTPR_BENCH_CACHE or ~/.cache/otpr-bench.
    """
    _use_cache(cache)
    dataset = verify_data(name, file)
    print(f"{file or dataset_path(name)}: {name}, data digest {dataset.digest}")
    show(dataset.episodes)


def import_data(file: tyro.conf.Positional[Path], task: str, cache: Path | None = None) -> None:
    """Check a file in D4RL's, robomimic's or Minari's layout and copy it into the cache.

    Example: python -m benchmark.data import hopper_medium-v2.hdf5 --task hopper-medium-v2

    Args:
        file: the file, or the directory of a Minari dataset.
        task: the dataset that it is.
        cache: directory of the data and policies, by default OTPR_BENCH_CACHE or ~/.cache/otpr-bench.
    """
    _use_cache(cache)
    dataset = import_file(task, file)
    print(f"{dataset_path(task)}: {task}, data digest {dataset.digest}")
    show(dataset.episodes)


COMMANDS: dict[str, Callable[..., Any]] = {
    "list": list_datasets,
    "get": get,
    "make": make,
    "verify": verify,
    "import": import_data,
    "import-policy": import_policy_command,
    "export-policy": export_policy_command,
}


class _Progress:
    """Prints how far a download is, on one line where that is a terminal."""

    def __init__(self, name: str) -> None:
        self.name, self.shown, self.tenths = name, 0.0, 0

    def __call__(self, done: int, total: int | None) -> None:
        terminal, now = sys.stderr.isatty(), time.monotonic()
        tenths = done * 10 // total if total else done // 10_000_000
        if now - self.shown < _REPORT_EVERY if terminal and done != total else tenths == self.tenths:
            return
        self.shown, self.tenths = now, tenths
        size = f"{done / 1e6:.1f} of {total / 1e6:.1f} MB" if total else f"{done / 1e6:.1f} MB"
        print(f"\r{self.name}: {size}" if terminal else f"{self.name}: {size}", file=sys.stderr,
              end="" if terminal and done != total else "\n", flush=True)  # fmt: skip


def _use_cache(cache: Path | None) -> None:
    if cache is not None:
        os.environ["OTPR_BENCH_CACHE"] = str(cache)


def _line(error: Exception) -> str:
    return f"error: {' '.join(str(error).split())}"


def main() -> int:
    """Run the command line; returns the exit status: 1 where a download failed, 2 for bad input."""
    torch.set_num_threads(1)  # the demonstrators are too small for more
    try:
        return tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="python -m benchmark.data", description=__doc__) or 0
    except (ValueError, OSError, RuntimeError) as error:  # the last: a simulator's process that died
        print(_line(error), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
