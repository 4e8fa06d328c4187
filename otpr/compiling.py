"""Compiled functions that need no compiler on the user's machine: numba's."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import llvmlite
import numba
from llvmlite.binding import get_host_cpu_features, get_host_cpu_name


def _use_whole_vectors() -> None:
    """Have numba use vectors of 512 bits where the processor has them and the user has not named its features.

    LLVM prefers 256 bits, for the clock of older processors, on which wider vectors lowered it.
    """
    config: Any = numba.config
    features = get_host_cpu_features()
    if config.ENABLE_AVX and config.CPU_FEATURES is None and features.get("avx512f"):
        config.CPU_FEATURES = f"{features.flatten()},-prefer-256-bit"


_use_whole_vectors()  # numba takes its settings over once, with the first function that it is given


def kept_on_disk(compile_with: Callable[..., Any], function: Callable[..., None], variant: str = "") -> Any:
    """`compile_with(cache=True)(function)`, without the cache where no folder for it is writable.

    numba keeps an index of what was made of each qualified name, to which processes write without a lock: of two that
    add to one index at once, one's entry may lead to the other's code. So what differs has a name of its own here,
    and all who write to an index write the same.

    Args:
        compile_with: one of numba's decorators with its other options.
        function: what to compile; its qualified name is changed.
        variant: tells apart what is made of the same lines of source.
    """
    config: Any = numba.config
    name, source = function.__qualname__, Path(function.__code__.co_filename)
    processor = (get_host_cpu_name(), get_host_cpu_features().flatten(), config.CPU_NAME, config.CPU_FEATURES)
    made_of = (variant, numba.__version__, llvmlite.__version__, *processor)
    content = "\n".join(map(str, made_of)).encode() + (source.read_bytes() if source.exists() else b"")
    function.__qualname__ = f"{name}_{hashlib.sha256(content).hexdigest()[:16]}"
    try:
        return compile_with(cache=True)(function)
    except RuntimeError:  # numba finds no writable cache folder: compile in this process
        return compile_with()(function)


def compiled(function: Callable[..., None]) -> Any:
    """`function`, on NumPy arrays and plain values, compiled to release the GIL, see `kept_on_disk`."""
    return kept_on_disk(partial(numba.njit, nogil=True, error_model="numpy"), function)
