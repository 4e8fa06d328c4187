"""Compiled passes over the rows of matrices, on the threads of PyTorch's own OpenMP library.

A pass does in one sweep over memory what PyTorch does in several. numba compiles it, so that no compiler is needed on
the user's machine. Threads of numba's would wake and wait beside PyTorch's: that takes as long as a pass. Hence
`GOMP_parallel` of the library that PyTorch computes with (GNU's, or LLVM's and Intel's under the same name) runs it on
the team that has just finished a product. Where there is none a pass takes one thread. Every element is computed by
itself, and every partial sum over rows that do not depend on the threads, so that their number changes no bit.
"""

# ruff: noqa: ANN001, ANN201, ANN202 - numba infers the types of compiled functions

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import numba
import numpy as np
import torch
from numba import carray, types
from numba.extending import intrinsic, overload, register_jitable
from torch import Tensor

from otpr.compiling import kept_on_disk

Row = Callable[..., None]  # of bias and sums (n,), three matrices and a row's index; sums and matrices may be None

# products and sums may be fused, all else is as written
OPTIONS: Any = {"fastmath": {"contract"}, "error_model": "numpy"}

LEAST_FOR_THREADS = 32_768  # elements; fewer take less time than waking threads does
KINDS = (torch.float32, torch.bfloat16)  # types of matrices
# as compiled functions see them
_ELEMENTS: dict[torch.dtype | None, Any] = {torch.float32: np.float32, torch.bfloat16: np.uint16}
PART_ROWS = 32  # of one matrix, which one thread does, adding them to one partial sum
# next part, parts, parts a thread takes, rows, columns, outputs, then addresses: bias, sums, matrices, weights, outputs
_CALL = ctypes.c_int64 * 13
_ENTRY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)  # of a compiled pass
_f, _u32 = np.float32, np.uint32
_LOG2E, _LN2_HIGH, _LN2_LOW = _f(1.44269504), _f(0.693359375), _f(-2.12194440e-4)  # ln 2 in two parts: no cancellation
_LEAST, _MOST = _f(-87.0), _f(20.0)  # of the exponent: float32 has no normal numbers below; Mish is x above
# exp(r) = 1 + r + r^2 p(r) for |r| <= ln(2) / 2: Cephes' minimax polynomial, highest power first
_P5, _P4, _P3, _P2, _P1, _P0 = map(
    _f, (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
)
_inner, _builtin = register_jitable(**OPTIONS), cast(Any, intrinsic)  # which is typed as if called with its context


def _read(array, i, j) -> Any:
    """array[i, j] as float32; bfloat16 comes as its bits, uint16. Of None -0, which changes nothing it is added to."""


def _write(array, i, j, value):
    """A float32 value into array[i, j], rounded to the nearest bfloat16, ties to even, where it holds those."""


def _add(array, j, value):
    """Add a value to array[j], of float32; nothing where there is no array."""


@overload(_read, jit_options=OPTIONS)
def _read_as(array, i, j):
    if isinstance(array, types.NoneType):
        return lambda array, i, j: _f(-0.0)
    if array.dtype == numba.uint16:
        return lambda array, i, j: _u32(_u32(array[i, j]) << _u32(16)).view(np.float32)
    return lambda array, i, j: array[i, j]


@overload(_write, jit_options=OPTIONS)
def _write_as(array, i, j, value):
    def rounded(array, i, j, value):
        bits = np.float32(value).view(np.uint32)
        array[i, j] = np.uint16(_u32(bits + _u32(0x7FFF) + ((bits >> _u32(16)) & _u32(1))) >> _u32(16))

    def whole(array, i, j, value):
        array[i, j] = value

    return rounded if array.dtype == numba.uint16 else whole


@overload(_add, jit_options=OPTIONS)
def _add_to(array, j, value):
    def added(array, j, value):
        array[j] += value

    return (lambda array, j, value: None) if isinstance(array, types.NoneType) else added


@_inner
def _exp(z):
    """exp(z) of a float32 z in [-87, 87], to 1e-7; written out, since LLVM turns no call of exp into vector code."""
    whole = np.floor(z * _LOG2E + _f(0.5))
    r = z - whole * _LN2_HIGH - whole * _LN2_LOW
    p = ((((_P5 * r + _P4) * r + _P3) * r + _P2) * r + _P1) * r + _P0
    power = np.int32((np.int32(whole) + np.int32(127)) << np.int32(23))  # the bits of 2^whole
    return (p * r * r + r + _f(1.0)) * power.view(np.float32)


@_inner
def _gate(x):
    """tanh(log(1 + e^x)) and its derivative."""
    w = _exp(min(max(x, _LEAST), _MOST))
    n = w * (w + _f(2.0))
    inverse = _f(1.0) / (n + _f(2.0))
    return n * inverse, _f(4.0) * w * (_f(1.0) + w) * (inverse * inverse)


@_inner
def _rectified(x):
    return x if not x < 0 else _f(0.0)  # NaN stays


@_inner
def relu(bias, _sums, z, base, _three, i):
    """ReLU of z + bias + base, in place."""
    for j in range(bias.size):
        _write(z, i, j, _rectified(_read(z, i, j) + bias[j] + _read(base, i, j)))


@_inner
def relu_of(bias, _sums, x, value, base, i):
    """ReLU of x + bias + base into `value`."""
    for j in range(bias.size):
        _write(value, i, j, _rectified(_read(x, i, j) + bias[j] + _read(base, i, j)))


@_inner
def mish(bias, _sums, z, base, _three, i):
    """Mish of z + bias + base, in place."""
    for j in range(bias.size):
        x = _read(z, i, j) + bias[j] + _read(base, i, j)
        _write(z, i, j, x * _gate(x)[0])


@_inner
def mish_of(bias, _sums, x, value, base, i):
    """Mish of x + bias + base into `value`."""
    for j in range(bias.size):
        y = _read(x, i, j) + bias[j] + _read(base, i, j)
        _write(value, i, j, y * _gate(y)[0])


@_inner
def mish_and_slope(bias, _sums, z, value, base, i):
    """Mish of z + bias + base into `value`, its derivative in place of z."""
    for j in range(bias.size):
        x = _read(z, i, j) + bias[j] + _read(base, i, j)
        gate, change = _gate(x)
        _write(value, i, j, x * gate)
        _write(z, i, j, gate + x * change)


@register_jitable(**OPTIONS | {"fastmath": {"contract", "reassoc"}})  # sums in any order: vector code
def _project(value, weights, first, count, outputs, i):
    """Add to outputs[i] the products of value[i] with the `count` rows of `weights` from `first` on, four at a time."""
    for k in range(0, count - 3, 4):
        a = b = c = d = _f(0.0)
        for j in range(value.shape[1]):
            x = value[i, j]
            a += x * weights[first + k, j]
            b += x * weights[first + k + 1, j]
            c += x * weights[first + k + 2, j]
            d += x * weights[first + k + 3, j]
        outputs[i, k] += a
        outputs[i, k + 1] += b
        outputs[i, k + 2] += c
        outputs[i, k + 3] += d
    for k in range(count - count % 4, count):
        a = _f(0.0)
        for j in range(value.shape[1]):
            a += value[i, j] * weights[first + k, j]
        outputs[i, k] += a


@_inner
def through(_bias, sums, gradient, slope, product, i):
    """gradient * slope into `product`, and added to `sums`."""
    for j in range(gradient.shape[1]):
        value = _read(gradient, i, j) * _read(slope, i, j)
        _write(product, i, j, value)
        _add(sums, j, value)


@_inner
def through_relu(_bias, sums, gradient, value, product, i):
    """The gradient where ReLU's value is positive, else 0, into `product`, and added to `sums`."""
    for j in range(gradient.shape[1]):
        passed = _f(0.0) if _read(value, i, j) <= 0 else _read(gradient, i, j)  # NaN lets it through
        _write(product, i, j, passed)
        _add(sums, j, passed)


@_builtin
def _pointer(typing_context, address) -> Any:
    """An address as a pointer."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


@_builtin
def _take(typing_context, counter, amount) -> Any:
    """The number that `counter` points to, which grows by `amount`, whatever other threads do at the time."""

    def generate(context, builder, signature, arguments):
        return builder.atomic_rmw("add", *arguments, "seq_cst")

    return types.int64(types.CPointer(types.int64), types.int64), generate


@cache
def _compiled(row: Row, summed: bool, projected: bool, *kinds: torch.dtype | None) -> Any:
    """What every thread runs, for three matrices of these types, None for none: parts of them until none is left.

    Matrices of a stack lie behind each other.
    """
    first, second, third = map(_ELEMENTS.get, kinds)
    in_place = row in (relu, mish)

    def run(call):
        parts, rows, columns, count = call[1], call[3], call[4], call[5]
        of_matrix = (rows + PART_ROWS - 1) // PART_ROWS
        stack = parts // max(of_matrix, 1)
        shape = (stack * rows, columns)
        bias = carray(_pointer(call[6]), (stack, columns), np.float32)
        sums = carray(_pointer(call[7]), (parts, columns), np.float32)
        one = carray(_pointer(call[8]), shape, first)
        two = None if second is None else carray(_pointer(call[9]), shape, second)
        three = None if third is None else carray(_pointer(call[10]), shape, third)
        weights = carray(_pointer(call[11]), (stack * count, columns), np.float32)
        outputs = carray(_pointer(call[12]), (stack * rows, count), np.float32)
        while True:
            start = _take(call, call[2])
            if start >= parts:
                break
            for part in range(start, min(start + call[2], parts)):
                matrix = part // of_matrix
                top, end = matrix * rows + part % of_matrix * PART_ROWS, (matrix + 1) * rows
                for i in range(top, min(top + PART_ROWS, end)):
                    row(bias[matrix], sums[part] if summed else None, one, two, three, i)
                    if projected:  # while the row is in the core's nearest cache
                        _project(one if in_place else two, weights, matrix * count, count, outputs, i)

    signature = types.void(types.CPointer(types.int64))
    return kept_on_disk(partial(numba.cfunc, signature, **OPTIONS), run)


@cache
def _openmp() -> Any:
    """`GOMP_parallel` of the OpenMP library that PyTorch is linked with, None where there is none."""
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        try:
            parallel = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        parallel.argtypes, parallel.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
        return parallel
    return None


def partial_sums(matrices: Tensor) -> Tensor:
    """Zeros to which a pass adds the rows of matrices (..., m, n): (..., m / `PART_ROWS` rounded up, n) float32."""
    return torch.zeros(_sums_shape(matrices))


def _sums_shape(matrices: Tensor) -> tuple[int, ...]:
    *stack, rows, columns = matrices.shape
    return *stack, -(-rows // PART_ROWS), columns


def run_pass(
    row: Row,
    bias: Tensor | None,
    *matrices: Tensor | None,
    sums: Tensor | None = None,
    projection: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Do one of the passes above to up to three matrices, or stacks of them, float32 or bfloat16, on the CPU.

    Args:
        row: `relu` and those after it.
        bias: float32 (..., n); None for a pass that takes none.
        matrices: (..., m, n), those that the pass names, none twice; a base alone may be None.
        sums: see `partial_sums`, for a pass that names them.
        projection: weights (..., k, n) and outputs (..., m, k), float32: to the latter the pass adds its value, float32
            too, times weights'.

    Raises:
        ValueError: another type or shape, or not contiguous.
    """
    given = (*matrices, *[None] * (3 - len(matrices)))
    z = given[0]
    assert z is not None
    *stack, rows, columns = shape = z.shape
    for matrix in matrices:
        _check(matrix, shape, KINDS)
    _check(bias, (*stack, columns), KINDS[:1])
    if sums is not None:
        _check(sums, _sums_shape(z), KINDS[:1])
    weights, outputs = projection or (None, None)
    count = 0 if weights is None else weights.shape[-2]
    if projection is not None:
        _check(weights, (*stack, count, columns), KINDS[:1])
        _check(outputs, (*stack, rows, count), KINDS[:1])
        _check(given[0 if row in (relu, mish) else 1], shape, KINDS[:1])
    kinds = (None if part is None else part.dtype for part in given)
    entry, parallel = _compiled(row, sums is not None, projection is not None, *kinds), _openmp()
    # all of PyTorch's threads or one: a smaller team would end the others, to be started again in the next product
    threads = torch.get_num_threads() if parallel and z.numel() >= LEAST_FOR_THREADS else 1
    parts = math.prod(stack) * -(-rows // PART_ROWS)
    # as many each, of rows that lie together, like those of a product: they need not move from one core to another
    addresses = (0 if part is None else part.data_ptr() for part in (bias, sums, *given, weights, outputs))
    call = _CALL(0, parts, -(-parts // threads), rows, columns, count, *addresses)
    if threads == 1:
        _ENTRY(entry.address)(ctypes.addressof(call))
    else:
        parallel(entry.address, ctypes.addressof(call), threads, 0)


def _check(tensor: Tensor | None, shape: tuple[int, ...], kinds: tuple[torch.dtype, ...]) -> None:
    if tensor is not None and (tensor.shape != shape or tensor.dtype not in kinds or not tensor.is_contiguous()):
        found = f"{tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}"
        raise ValueError(f"a pass takes contiguous {', '.join(map(str, kinds))} {tuple(shape)}, got {found}")
