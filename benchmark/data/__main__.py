"""Datasets: what there is, generate the local ones, check a file."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
import tyro

from benchmark.data.d4rl import Episodes, read_dataset
from benchmark.data.make import make_dataset, verify_dataset
from benchmark.data.registry import DATASETS, dataset_path, get_dataset


def show(episodes: Episodes) -> None:
    """Print a table of the episodes' lengths and returns."""
    ended = f"{int(episodes.terminals.sum())} terminated, {int(episodes.timeouts.sum())} timed out"
    print(f"  episodes {len(episodes.lengths)} ({ended}), steps {len(episodes.rewards)}")
    print(f"  {'':8}{'mean':>10}{'std':>10}{'min':>10}{'median':>10}{'max':>10}")
    for name, values in (("length", episodes.lengths), ("return", episodes.returns)):
        row = (values.mean(), values.std(), values.min(), float(np.median(values)), values.max())
        print(f"  {name:8}" + "".join(f"{value:10.2f}" for value in row))


def list_datasets() -> None:
    """List the datasets, and which of them are in the cache.

    Example: python -m benchmark.data list
    """
    for name, data in DATASETS.items():
        path = dataset_path(name)
        place = str(path) if path.exists() else f"not made yet: python -m benchmark.data make {name}"
        print(f"{name:16} {data.episodes} episodes of {data.description}\n{'':16} {place}")


def make(name: tyro.conf.Positional[str], out: Path | None = None, threads: int = 1) -> None:
    """Generate a local dataset.

    Example: python -m benchmark.data make hopper-local --threads 2

    Args:
        name: the dataset.
        out: the file to write, by default one in the cache.
        threads: threads of the physics; they never change a result.
    """
    if threads < 1:
        raise ValueError(f"--threads must be at least 1, got {threads}")
    started = time.perf_counter()
    path = make_dataset(get_dataset(name), out, threads)
    print(f"{path}: {name}, {path.stat().st_size / 1e6:.1f} MB, made in {time.perf_counter() - started:.0f} s")
    show(read_dataset(path).episodes)


def verify(name: tyro.conf.Positional[str], file: Path | None = None) -> None:
    """Check that a file holds a dataset as it is made today.

    Example: python -m benchmark.data verify toy

    Args:
        name: the dataset.
        file: the file to check, by default the one in the cache.
    """
    path = file or dataset_path(get_dataset(name).task)
    dataset = verify_dataset(get_dataset(name), path)
    print(f"{path}: {name}, data digest {dataset.digest}")
    show(dataset.episodes)


def main() -> int:
    """Run the command line; returns the exit status."""
    torch.set_num_threads(1)  # the demonstrators are too small for more
    commands = {"list": list_datasets, "make": make, "verify": verify}
    try:
        tyro.extras.subcommand_cli_from_dict(commands, prog="python -m benchmark.data", description=__doc__)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
