"""Compiled functions that need no compiler on the user's machine: numba's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numba
from llvmlite.binding import get_host_cpu_features


def _use_whole_vectors() -> None:
    """Have numba use vectors of 512 bits where the processor has them and the user has not named its features.

    LLVM prefers 256 bits, for the clock of older processors, on which wider vectors lowered it.
    """
    config: Any = numba.config
    features = get_host_cpu_features()
    if config.ENABLE_AVX and config.CPU_FEATURES is None and features.get("avx512f"):
        config.CPU_FEATURES = f"{features.flatten()},-prefer-256-bit"


_use_whole_vectors()  # numba takes its settings over once, with the first function that it is given


def kept_on_disk(compile_with: Callable[..., Any], function: Callable[..., None]) -> Any:
    """`compile_with(cache=True)(function)`, without the cache where no folder for it is writable.

    Args:
        compile_with: one of numba's decorators with its other options.
        function: what to compile.
    """
    try:
        return compile_with(cache=True)(function)
    except RuntimeError:  # numba finds no writable cache folder: compile in this process
        return compile_with()(function)


def compiled(function: Callable[..., None]) -> Any:
    """`function`, on NumPy arrays and plain values, compiled to release the GIL, see `kept_on_disk`."""
    return kept_on_disk(partial(numba.njit, nogil=True, error_model="numpy"), function)
