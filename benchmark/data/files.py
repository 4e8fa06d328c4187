"""Data files of strangers in the cache: which layout a file has, and the digests by which it is known again."""

from __future__ import annotations

import fcntl
import hashlib
from pathlib import Path

from benchmark.data.hdf5 import open_hdf5
from benchmark.data.registry import PublishedData, cache_dir, dataset_path, get_dataset
from benchmark.store import read_json, write_json

MINARI_FILE = "main_data.hdf5"
_BLOCK = 1 << 20


def layout_of(path: Path) -> str:
    """The layout of a file or directory by what is in it: "d4rl", "robomimic" or "minari".

    Raises:
        ValueError: missing, unreadable, or none of the three.
    """
    if path.is_dir():
        if any((path / place / MINARI_FILE).is_file() for place in ("", "data")):
            return "minari"
        raise ValueError(f"{path}: a directory without {MINARI_FILE}, so not a Minari dataset")
    with open_hdf5(path) as file:
        names = set(file)
    if "observations" in names or "actions" in names:
        return "d4rl"
    if "data" in names:
        return "robomimic"
    if "episode_0" in names:
        raise ValueError(f"{path}: part of a Minari dataset; name the directory that holds it")
    found = ", ".join(sorted(names)[:5]) or "nothing"
    raise ValueError(f"{path}: neither D4RL's layout (observations, ...) nor robomimic's (data), but {found}")


def file_digest(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        ValueError: unreadable file.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        raise ValueError(f"{path}: unreadable ({error.strerror})") from error
    return digest.hexdigest()


def digests_path() -> Path:
    """The record of the digests of published files, a JSON object by dataset."""
    return cache_dir() / "data" / "digests.json"


def recorded_digest(name: str) -> str | None:
    """The SHA-256 recorded for a published dataset; None where there was no file of it yet.

    Raises:
        ValueError: the record is damaged.
    """
    path = digests_path()
    entry = read_json(path).get(name) if path.exists() else None
    if entry is None:
        return None
    if not isinstance(entry, dict) or not isinstance(entry.get("sha256"), str):
        raise ValueError(f"{path}: no digest in the entry of {name!r}; delete it to accept the file that is there")
    return entry["sha256"]


def check_digest(name: str, digest: str, path: Path) -> None:
    """Refuse a file of a published dataset that is not the one recorded or, with no record, the one registered.

    Raises:
        ValueError: another digest.
    """
    recorded, data = recorded_digest(name), get_dataset(name)
    known = recorded or (data.sha256 if isinstance(data, PublishedData) else None)
    if known not in (None, digest):
        origin = f"recorded in {digests_path()} (delete its entry to accept another)" if recorded else "registered"
        raise ValueError(f"{path}: not {name!r}: SHA-256 {digest[:12]}... instead of {str(known)[:12]}... as {origin}")


def record_digest(name: str, origin: str, replace: bool = False) -> None:
    """Record the digest of a published dataset's file in the cache, unless there is one already.

    Args:
        origin: the address or path that it came from.
        replace: record it instead of the one that there may be.

    Raises:
        ValueError: the record is damaged.
        OSError: the record cannot be written.
    """
    record, path = digests_path(), dataset_path(name)
    with record.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if replace or recorded_digest(name) is None:
            entry = {"sha256": file_digest(path), "bytes": path.stat().st_size, "origin": origin}
            write_json(record, {**(read_json(record) if record.exists() else {}), name: entry})
