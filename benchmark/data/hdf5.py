"""Reading HDF5 files of strangers: plain numbers and short texts that lie in the file itself, and nothing else.

A dataset's or attribute's declared size is checked before its contents are read, so that a small file cannot ask for
much memory; links, external storage, virtual datasets, references, objects and filters from plug-ins are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from benchmark.data.episodes import block_problem
from benchmark.store import write_bytes

MAX_NUMBERS = 500_000_000  # per file; hopper-medium-v2 holds 16 million that are read
MAX_TEXT = 1 << 24  # bytes of a text attribute; robosuite's models have some 10^5
_CHUNK_BYTES = 1 << 26  # largest chunk, and the cache of chunks: each is decompressed once
_FILTERS = {1: "deflate", 2: "shuffle", 3: "fletcher32", 4: "szip", 5: "nbit", 6: "scaleoffset", 32000: "lzf"}
_FREE_BYTES, _EXPANSION = 1 << 24, 500  # a larger array must take at least 1 / _EXPANSION of its size in the file
_BLOCK = 65_536  # steps read and checked at a time


@contextmanager
def open_hdf5(path: Path) -> Iterator[h5py.File]:
    """Open a file for reading.

    Raises:
        ValueError: in one line, whatever HDF5 finds unreadable inside the block.
    """
    try:
        with h5py.File(path, "r", rdcc_nbytes=_CHUNK_BYTES) as file:
            yield file
    except (OSError, RuntimeError, KeyError, TypeError) as error:  # what HDF5 raises for a damaged file
        raise ValueError(f"{path}: unreadable HDF5 file ({' '.join(str(error).split())})") from error


@contextmanager
def writing_hdf5(path: Path) -> Iterator[h5py.File]:
    """Compose a file in memory and write it whole, through a temporary name.

    HDF5 itself cannot stand a full disk: it reports the failure late, many times over, and may crash on closing.

    Raises:
        OSError: in one line, as the file system says; the old file, or none, is then left.
    """
    with h5py.File(str(path), "w", driver="core", backing_store=False, block_size=1 << 20) as file:
        yield file
        file.flush()
        image = file.id.get_file_image()
    try:
        write_bytes(path, image)
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror})") from error


def child_group(parent: h5py.Group, name: str, path: Path) -> h5py.Group:
    """The group `name`, provided that it lies in this very file.

    Raises:
        ValueError: missing, linked from elsewhere, or no group.
    """
    if name not in parent:
        raise ValueError(f"{path}: lacks the group {_label(parent, name)!r}")
    group = parent[name] if isinstance(parent.get(name, getlink=True), h5py.HardLink) else None
    if not isinstance(group, h5py.Group):
        raise ValueError(f"{path}: {_label(parent, name)!r} must be a group stored in the file itself")
    return group


def numbered_groups(parent: h5py.Group, prefix: str, path: Path) -> list[h5py.Group]:
    """The groups prefix_0, prefix_1, ... in the order of their numbers, whichever numbers there are.

    Raises:
        ValueError: none, or one that is linked from elsewhere or no group.
    """
    names = [str(name) for name in parent]
    names = [name for name in names if re.fullmatch(rf"{prefix}_\d{{1,9}}", name)]
    if not names:
        raise ValueError(f"{path}: holds no {prefix}_0, {prefix}_1, ...")
    names.sort(key=lambda name: int(name.rpartition("_")[2]))
    return [child_group(parent, name, path) for name in names]


def child_array(parent: h5py.Group, name: str, path: Path, dimensions: int, width: int | None = None) -> h5py.Dataset:
    """The array of numbers `name`, with its declared size checked and nothing of it read.

    Args:
        dimensions: 1 for (M,), where (M, 1) is accepted too as D4RL's own reader does; 2 for (M, width).
        width: the width asked for; by default any.

    Raises:
        ValueError: missing, not stored as plain numbers in this very file, another shape, or too large.
    """
    label = _label(parent, name)
    if name not in parent:
        raise ValueError(f"{path}: lacks {label!r}")
    array = parent[name] if isinstance(parent.get(name, getlink=True), h5py.HardLink) else None
    if not isinstance(array, h5py.Dataset) or array.external or array.is_virtual:
        raise ValueError(f"{path}: {label!r} must be an array stored in the file itself")
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{path}: {label!r} must hold numbers, got {array.dtype}")
    shape = array.shape
    if len(shape) != dimensions and not (dimensions == 1 and len(shape) == 2 and shape[1] == 1):
        raise ValueError(f"{path}: {label!r} must have {dimensions} dimensions, got shape {shape}")
    if dimensions == 2 and width not in (None, shape[1]):
        raise ValueError(f"{path}: {label!r} must have width {width}, got {shape[1]}")
    if not 1 <= math.prod(shape) <= MAX_NUMBERS:
        raise ValueError(f"{path}: {label!r} must hold 1 to {MAX_NUMBERS} numbers, got shape {shape}")
    _check_storage(array, label, path)
    return array


def _check_storage(array: h5py.Dataset, label: str, path: Path) -> None:
    settings = array.id.get_create_plist()
    filters = [settings.get_filter(i)[0] for i in range(settings.get_nfilters())]
    if set(filters) - set(_FILTERS):
        raise ValueError(f"{path}: {label!r} has HDF5 filters {filters}; accepted: {', '.join(_FILTERS.values())}")
    chunk = math.prod(array.chunks or (1,)) * array.dtype.itemsize
    if chunk > _CHUNK_BYTES:
        raise ValueError(f"{path}: {label!r} has chunks of {chunk} bytes; at most {_CHUNK_BYTES} are accepted")
    declared, stored = math.prod(array.shape) * array.dtype.itemsize, array.id.get_storage_size()
    if declared > max(_FREE_BYTES, _EXPANSION * stored):
        raise ValueError(f"{path}: {label!r} would expand {stored} bytes in the file to {declared}")


def read_array(array: h5py.Dataset, kind: str, path: Path, out: NDArray) -> None:
    """Read the first rows of an array into `out` (N, ...), checking block by block; see `block_problem` for `kind`.

    Raises:
        ValueError: a bad value, with its place.
    """
    for start in range(0, len(out), _BLOCK):
        stop = min(start + _BLOCK, len(out))
        block = np.asarray(array[start:stop])
        problem = block_problem(block, kind)
        if problem is not None:
            raise ValueError(f"{path}: {str(array.name)[1:]!r} at step {start + problem[0]}: {problem[1]}")
        out[start:stop] = block.reshape(stop - start, *out.shape[1:])


def check_lengths(arrays: dict[str, h5py.Dataset], path: Path) -> int:
    """The number of steps, which all arrays must share.

    Raises:
        ValueError: lengths differ.
    """
    steps = {name: array.shape[0] for name, array in arrays.items()}
    if len(set(steps.values())) != 1:
        raise ValueError(f"{path}: lengths differ: {', '.join(f'{name} {count}' for name, count in steps.items())}")
    return next(iter(steps.values()))


def check_total(arrays: Iterable[h5py.Dataset], path: Path) -> None:
    """Refuse arrays that would together take too much memory.

    Raises:
        ValueError: more than `MAX_NUMBERS` numbers.
    """
    numbers = sum(math.prod(array.shape) for array in arrays)
    if numbers > MAX_NUMBERS:
        raise ValueError(f"{path}: holds {numbers} numbers; at most {MAX_NUMBERS} are read")


def read_attribute(owner: h5py.Group, name: str, path: Path) -> str | int | float | None:
    """An attribute that is one text or one number; None where there is none.

    Raises:
        ValueError: an array, any other type, or a text longer than `MAX_TEXT` bytes.
    """
    if name not in owner.attrs:
        return None
    label, held = f"attribute {name!r} of {owner.name!r}", owner.attrs.get_id(name)
    if held.shape != () or not _is_plain(held.dtype):
        raise ValueError(f"{path}: {label} must be one text or number, got {held.dtype} of shape {held.shape}")
    if held.dtype.itemsize > MAX_TEXT:
        raise ValueError(f"{path}: {label} has {held.dtype.itemsize} bytes; at most {MAX_TEXT} are accepted")
    value: Any = owner.attrs[name]
    if isinstance(value, bytes):
        value = value.decode()
    if isinstance(value, str) and len(value) > MAX_TEXT:
        raise ValueError(f"{path}: {label} has {len(value)} characters; at most {MAX_TEXT} are accepted")
    return value.item() if isinstance(value, np.generic) else value


def read_attributes(owner: h5py.Group, path: Path) -> dict[str, str | int | float]:
    """All attributes that are one text or number; others are passed over unread."""
    values: dict[str, str | int | float] = {}
    for name in owner.attrs:
        held = owner.attrs.get_id(name)
        value = read_attribute(owner, name, path) if held.shape == () and _is_plain(held.dtype) else None
        if value is not None:
            values[str(name)] = value
    return values


def _is_plain(dtype: np.dtype) -> bool:
    return dtype.kind in "biufS" or h5py.check_string_dtype(dtype) is not None


def _label(parent: h5py.Group, name: str) -> str:
    return f"{parent.name}/{name}".lstrip("/")
