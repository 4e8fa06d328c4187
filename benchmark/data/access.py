"""The data of a task: read a file of it, find or generate it, say what is missing and how to get it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from benchmark.data.d4rl import read_d4rl
from benchmark.data.episodes import Dataset
from benchmark.data.files import check_digest, file_digest, layout_of, record_digest
from benchmark.data.make import make_dataset
from benchmark.data.minari import read_minari
from benchmark.data.registry import DATASETS, LocalData, PublishedData, dataset_path, get_dataset
from benchmark.data.robomimic import read_robomimic
from benchmark.envs import ROBOSUITE
from benchmark.tasks import get_task


def read_task_data(name: str, path: Path) -> Dataset:
    """Read demonstrations of a task, in whichever layout the file has, and check them against the task.

    Args:
        name: the task.
        path: a file in D4RL's or robomimic's layout, or a Minari dataset's directory.

    Raises:
        ValueError: in one line: unknown task, unreadable or damaged file, or widths that are not the task's.
    """
    task, data = get_task(name), DATASETS.get(name)
    layout = layout_of(path)
    if (layout == "robomimic") != (task.environment in ROBOSUITE):
        raise ValueError(f"{path}: a file in the layout of {layout} cannot hold data of {name!r}")
    if layout == "robomimic":
        from benchmark.envs.robosuite import OBSERVATION_KEYS

        dataset = read_robomimic(path, OBSERVATION_KEYS[task.environment], task.action_dim)
        if dataset.episodes.observations.shape[1] != task.observation_dim:
            width = dataset.episodes.observations.shape[1]
            raise ValueError(f"{path}: observations must have width {task.observation_dim}, got {width}")
    elif layout == "minari":
        dataset = read_minari(path, task.observation_dim, task.action_dim)
    else:
        timeouts = data.timeouts if isinstance(data, PublishedData) else True
        dataset = read_d4rl(path, task.observation_dim, task.action_dim, timeouts)
    return dataset


def _check_counts(data: LocalData | PublishedData, dataset: Dataset, path: Path) -> None:
    expected = {"episodes": data.episodes, "steps": data.steps if isinstance(data, PublishedData) else None}
    found = {"episodes": len(dataset.episodes.lengths), "steps": len(dataset.episodes.rewards)}
    wrong = [key for key, count in expected.items() if count not in (None, found[key])]
    if wrong:
        counts = ", ".join(f"{found[key]} {key} instead of {expected[key]}" for key in wrong)
        raise ValueError(f"{path}: not {data.task!r}: it holds {counts}")


def verify_data(name: str, path: Path | None = None, rewritten: bool = False) -> Dataset:
    """Read a file and check that it is this dataset: a published one as recorded, a local one as it is made today.

    Args:
        path: by default the file in the cache.
        rewritten: the file holds a published dataset in another form, so that its digest says nothing.

    Raises:
        ValueError: missing (the message says how to get it) or damaged, other numbers of episodes or steps than
            registered, other contents than recorded, or made by another recipe.
    """
    data = get_dataset(name)
    if path is None:
        path = dataset_path(name)
        if not path.exists():
            raise ValueError(" ".join(missing_data_message([name]).split()))
    if isinstance(data, PublishedData) and not rewritten:
        check_digest(name, file_digest(path), path)
    dataset = read_task_data(name, path)
    if isinstance(data, LocalData) and dataset.digest != data.digest():
        found = {key: dataset.attributes.get(key) for key in data.recipe()}
        other = [key for key, value in data.recipe().items() if found[key] != value]
        raise ValueError(f"{path}: not {name!r} as made today; it differs in {', '.join(other) or 'data_digest'}")
    _check_counts(data, dataset, path)
    return dataset


def load_data(name: str) -> Dataset:
    """A dataset from the cache; a local one is generated first where it is missing or made by an older recipe.

    The first file of a published dataset that passes all checks is remembered by its digest, however it got there.

    Raises:
        ValueError: unknown name, a published dataset that is missing (the message says how to get it), a damaged
            file, or one of other contents than recorded.
        OSError: a file cannot be written.
    """
    data, path = get_dataset(name), dataset_path(name)
    if isinstance(data, LocalData):
        if path.exists():
            dataset = read_task_data(name, path)
            if dataset.digest == data.digest():
                return dataset
        make_dataset(data, path)
    dataset = verify_data(name)
    if isinstance(data, PublishedData):
        record_digest(name, "found in the cache")
    return dataset


def data_present(name: str) -> bool:
    """Whether a task's data can be had without a download: its file is there, or it is generated on this machine."""
    return name in DATASETS and (isinstance(DATASETS[name], LocalData) or dataset_path(name).exists())


def missing_data_message(names: Iterable[str]) -> str:
    """What to do about data that is not there: each file's size, address and place, how to fetch it, what else to run.

    Args:
        names: tasks whose data is wanted; those whose file is there are left out.
    """
    missing = [name for name in names if not dataset_path(name).exists()]
    lines, fetched = [f"data that is not there: {', '.join(missing)}"], []
    for name in missing:
        data = DATASETS.get(name)
        if isinstance(data, PublishedData):
            fetched.append(name)
            lines.append(f"  {name}: {data.size_text}, {data.address} -> {dataset_path(name)}")
        elif data is not None:
            lines.append(f"  {name}: generated by: python -m benchmark.data make {name} -> {dataset_path(name)}")
        else:
            lines.append(f"  {name}: not a dataset of the benchmark; see --data of python -m benchmark.pretrain")
    if fetched:
        lines.append(f"fetch with: python -m benchmark.data get {' '.join(fetched)}")
        lines.append("or bring a file from elsewhere: python -m benchmark.data import FILE --task NAME")
    lines.append("to go on without network: python -m benchmark.run --suite local")
    return "\n".join(lines)
