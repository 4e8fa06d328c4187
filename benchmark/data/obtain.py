"""Bring a dataset into the cache: from its address, or from a file that is already on this machine."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from benchmark.data.access import read_task_data, verify_data
from benchmark.data.d4rl import write_d4rl
from benchmark.data.download import Progress, download
from benchmark.data.episodes import Dataset
from benchmark.data.files import layout_of, record_digest
from benchmark.data.registry import LocalData, PublishedData, dataset_path, get_dataset


def fetch(name: str, progress: Progress | None = None) -> Path:
    """Download a published dataset, check it fully and remember its digest; one that is there is only checked.

    Returns:
        Its place in the cache.

    Raises:
        ValueError: unknown name, a local dataset, a failed download, or a file that is not this dataset.
        OSError: the file cannot be written; what has arrived is kept for a later call.
    """
    data, path = get_dataset(name), dataset_path(name)
    if isinstance(data, LocalData):
        raise ValueError(f"{name!r} is generated, not downloaded: python -m benchmark.data make {name}")
    if path.exists():
        verify_data(name)
    else:
        download(data.address, path, lambda part: _check(name, part), progress)
    record_digest(name, data.address)
    return path


def _check(name: str, path: Path) -> None:
    verify_data(name, path)


def import_file(name: str, source: Path) -> Dataset:
    """Check a file fully and copy it into the cache; a Minari dataset is rewritten in D4RL's layout.

    Raises:
        ValueError: unknown name, or anything wrong with the file; the cache is then as it was.
        OSError: the file cannot be written.
    """
    data, path = get_dataset(name), dataset_path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    rewritten = layout_of(source) == "minari"
    try:
        if rewritten:
            write_d4rl(temporary, read_task_data(name, source).episodes, {"rewritten_from": "minari"})
        else:
            shutil.copyfile(source, temporary)
        dataset = verify_data(name, temporary, rewritten)
        os.replace(temporary, path)
    except ValueError as error:
        raise ValueError(str(error).replace(str(temporary), str(source))) from error
    finally:
        temporary.unlink(missing_ok=True)
    if isinstance(data, PublishedData):
        record_digest(name, str(source), replace=rewritten)
    return dataset
