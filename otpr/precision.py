"""The precision of matrix products: float32, or bfloat16 by autocast, where the processor has instructions for it.

In bfloat16 weights, optimisers, losses, first and last layers, keypoints and transport stay float32; only the products
between hidden layers, forward and backward, take bfloat16 factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

PRECISIONS = ("float32", "bfloat16")


def precision_context(precision: str, device_type: str) -> AbstractContextManager[object]:
    """Where products have that precision.

    Raises:
        ValueError: unknown precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; valid: {', '.join(PRECISIONS)}")
    if precision == "float32":
        return nullcontext()
    # no cache: it holds the weights' casts for as long as the context lasts, here over gradient steps that change them
    return torch.autocast(device_type, torch.bfloat16, cache_enabled=False)


def _rounds(device_type: str) -> bool:
    """Whether autocast is on for the device type, if there is such a thing."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def float32_products(device_type: str) -> AbstractContextManager[object]:
    """Where products have float32 factors whatever the precision around: inputs must be float32."""
    return torch.autocast(device_type, enabled=False) if _rounds(device_type) else nullcontext()


def product_type(device_type: str) -> torch.dtype:
    """The type of factors of products here."""
    return torch.get_autocast_dtype(device_type) if _rounds(device_type) else torch.float32


def backward(tensors: Sequence[Tensor], gradients: Sequence[Tensor] | None = None) -> None:
    """`torch.autograd.backward` whose products have the types of the forward ones.

    Inside autocast it would round the float32 factors of first and last layers.
    """
    with float32_products(tensors[0].device.type):
        torch.autograd.backward(tensors, gradients)
