"""Compiled functions that need no compiler on the user's machine: numba's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def compiled(function: Callable[..., None], **options: Any) -> Any:
    """`function` compiled to release the GIL, kept on disk where any cache folder is writable.

    Args:
        function: on NumPy arrays and plain values.
        options: further ones of `numba.njit`.
    """
    options = {"nogil": True, "error_model": "numpy", **options}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # numba finds no writable cache folder: compile in this process
        return numba.njit(**options)(function)
