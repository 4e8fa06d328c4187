"""Small files that would take much memory, or load code, are refused before they do."""

from __future__ import annotations

import re
import resource
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pytest
from data_cases import random_demonstrations, random_episodes

from benchmark.data import hdf5
from benchmark.data.d4rl import read_d4rl, write_d4rl
from benchmark.data.robomimic import read_robomimic, write_robomimic

WIDTHS = {"object": 10}


@contextmanager
def little_memory(megabytes: int) -> Iterator[None]:
    """Fails where NumPy or Python ask for more, or the process grows by more."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < megabytes << 20
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < megabytes << 10
    finally:
        tracemalloc.stop()


def test_a_bomb_of_compressed_zeros_costs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "data.hdf5"
    write_d4rl(path, random_episodes(), {})
    with h5py.File(path, "a") as file:
        del file["observations"]
        file.create_dataset("observations", data=np.zeros((1 << 20, 60), np.float32), compression="gzip",
                            chunks=(1 << 16, 60))  # fmt: skip
    assert path.stat().st_size < 1 << 20
    with little_memory(40), pytest.raises(ValueError, match=r"'observations' would expand"):
        read_d4rl(path)


def test_a_bomb_of_an_attribute_costs_nothing(tmp_path: Path) -> None:
    """A thousand texts of 16 MB each, all of them one and the same place in the file."""
    path = tmp_path / "data.hdf5"
    write_robomimic(path, random_demonstrations(WIDTHS, 7), {}, {})
    with h5py.File(path, "a") as file:
        text = "x" * 16_000_123
        file["data"].attrs["env_args"] = [text, *["y"] * 999]
    content = bytearray(path.read_bytes())
    # A text is 16 bytes in the attribute: its length, and where in the file's heap it lies.
    length, next_length = (number.to_bytes(4, "little") for number in (len(text), 1))
    starts = [match.start() for match in re.finditer(re.escape(length) + b".{12}" + next_length, content, re.DOTALL)]
    assert len(starts) == 1
    content[starts[0] : starts[0] + 16_000] = content[starts[0] : starts[0] + 16] * 1000
    path.write_bytes(bytes(content))
    with h5py.File(path) as file:
        assert file["data"].attrs.get_id("env_args").shape == (1000,)
    with little_memory(60), pytest.raises(ValueError, match=r"'env_args' of '/data' must be one text"):
        read_robomimic(path, tuple(WIDTHS))


def test_attributes_that_are_not_needed_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "data.hdf5"
    with h5py.File(path, "w") as file:
        file.attrs["texts"] = ["a", "b"]
        file.attrs["table"] = np.zeros(8000)
        file.attrs["seed"] = 3
    with h5py.File(path) as file:
        assert hdf5.read_attributes(file, path) == {"seed": 3}


def test_a_text_attribute_that_is_too_long(tmp_path: Path) -> None:
    path = tmp_path / "data.hdf5"
    for text in (np.bytes_(b"x" * (hdf5.MAX_TEXT + 1)), "x" * (hdf5.MAX_TEXT + 1)):
        with h5py.File(path, "w", libver="latest") as file:
            file.attrs["long"] = text
        message = r"attribute 'long' .* at most 16777216 are accepted"
        with h5py.File(path) as file, pytest.raises(ValueError, match=message):
            hdf5.read_attributes(file, path)


def test_a_filter_from_a_plugin_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.hdf5"
    write_d4rl(path, random_episodes(), {})
    content = path.read_bytes()
    lzf = (32000).to_bytes(2, "little")
    found = [i for i in range(len(content)) if content[i : i + 2] == lzf and b"lzf" in content[i : i + 24]]
    assert found
    for i in found:
        content = content[:i] + (32015).to_bytes(2, "little") + content[i + 2 :]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"has HDF5 filters .*32015"):
        read_d4rl(path)
