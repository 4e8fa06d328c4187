"""Compiled passes over the rows of matrices, on the threads of PyTorch's own OpenMP library.

A pass does in one sweep over memory what PyTorch does in several. numba compiles it, so that no compiler is needed on
the user's machine. Threads of numba's would wake and wait beside PyTorch's: that takes as long as a pass. Hence
`GOMP_parallel` of the library that PyTorch computes with (GNU's, or LLVM's and Intel's under the same name) runs it on
the team that has just finished a product. Where there is none a pass takes one thread. Every element is computed by
itself, and every partial sum over rows that do not depend on the threads, so that their number changes no bit.

All that is compiled stands in this file: by its content alone numba knows whether what it kept on disk is outdated.
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

Row = Callable[..., None]  # of bias and sums (n,) and a row (n,) of three matrices; sums and rows may be None

# products and sums may be fused, all else is as written
OPTIONS: Any = {"fastmath": {"contract"}, "error_model": "numpy"}

LEAST_FOR_THREADS = 32_768  # elements; fewer take less time than waking threads does
KINDS = (torch.float32, torch.bfloat16)  # types of matrices
FLOAT32 = KINDS[:1]
# as compiled functions see them
_ELEMENTS: dict[torch.dtype | None, Any] = {torch.float32: np.float32, torch.bfloat16: np.uint16}
PART_ROWS = 32  # of one matrix, which one thread does, adding them to one partial sum
# next part, parts, parts a thread takes, rows, columns, rows that share one of the base, inputs, outputs; addresses of
# bias, sums, matrices, what enters and by what weights, by what weights values leave and where to
_CALL = ctypes.c_int64 * 17
_ENTRY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)  # of a compiled pass
_f, _u32 = np.float32, np.uint32
_LOG2E, _LN2_HIGH, _LN2_LOW = _f(1.44269504), _f(0.693359375), _f(-2.12194440e-4)  # ln 2 in two parts: no cancellation
_LEAST, _MOST = _f(-87.0), _f(20.0)  # of the exponent: float32 has no normal numbers below; Mish is x above
# exp(r) = 1 + r + r^2 p(r) for |r| <= ln(2) / 2: Cephes' minimax polynomial, highest power first
_P5, _P4, _P3, _P2, _P1, _P0 = map(
    _f, (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
)
_inner, _builtin = register_jitable(**OPTIONS), cast(Any, intrinsic)  # which is typed as if called with its context


def _row(matrix, i) -> Any:
    """Row i of a matrix; None of None."""


def _place(value, z) -> Any:
    """The row for a value: z's where there is none."""


def _read(row, j) -> Any:
    """row[j] as float32; bfloat16 comes as its bits, uint16. Of None -0, which changes nothing it is added to."""


def _write(row, j, value):
    """A float32 value into row[j], rounded to the nearest bfloat16, ties to even, where it holds those."""


def _add(row, j, value):
    """Add a value to row[j], of float32; nothing where there is no row."""


@overload(_row, jit_options=OPTIONS)
def _row_of(matrix, i):
    return (lambda matrix, i: None) if isinstance(matrix, types.NoneType) else lambda matrix, i: matrix[i]


@overload(_place, jit_options=OPTIONS)
def _place_of(value, z):
    return (lambda value, z: z) if isinstance(value, types.NoneType) else lambda value, z: value


@overload(_read, jit_options=OPTIONS)
def _read_as(row, j):
    if isinstance(row, types.NoneType):
        return lambda row, j: _f(-0.0)
    if row.dtype == numba.uint16:
        return lambda row, j: _u32(_u32(row[j]) << _u32(16)).view(np.float32)
    return lambda row, j: row[j]


@overload(_write, jit_options=OPTIONS)
def _write_as(row, j, value):
    def rounded(row, j, value):
        bits = np.float32(value).view(np.uint32)
        row[j] = np.uint16(_u32(bits + _u32(0x7FFF) + ((bits >> _u32(16)) & _u32(1))) >> _u32(16))

    def whole(row, j, value):
        row[j] = value

    return rounded if row.dtype == numba.uint16 else whole


@overload(_add, jit_options=OPTIONS)
def _add_to(row, j, value):
    def added(row, j, value):
        row[j] += value

    return (lambda row, j, value: None) if isinstance(row, types.NoneType) else added


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
def relu(bias, _sums, z, value, base):
    """ReLU of z + bias + base into `value`, or in place."""
    place = _place(value, z)
    for j in range(bias.size):
        _write(place, j, _rectified(_read(z, j) + bias[j] + _read(base, j)))


@_inner
def mish(bias, _sums, z, value, base):
    """Mish of z + bias + base into `value`, or in place."""
    place = _place(value, z)
    for j in range(bias.size):
        x = _read(z, j) + bias[j] + _read(base, j)
        _write(place, j, x * _gate(x)[0])


@_inner
def mish_and_slope(bias, _sums, z, value, base):
    """Mish of z + bias + base into `value`, its derivative in place of z."""
    for j in range(bias.size):
        x = _read(z, j) + bias[j] + _read(base, j)
        gate, change = _gate(x)
        _write(value, j, x * gate)
        _write(z, j, gate + x * change)


@_inner
def through(_bias, sums, gradient, slope, product):
    """gradient * slope into `product`, and added to `sums`."""
    for j in range(product.size):
        value = _read(gradient, j) * _read(slope, j)
        _write(product, j, value)
        _add(sums, j, value)


@_inner
def through_relu(_bias, sums, gradient, value, product):
    """The gradient where ReLU's value is positive, else 0, into `product`, and added to `sums`."""
    for j in range(product.size):
        incoming = _read(gradient, j)
        passed = _f(0.0) if _read(value, j) <= 0 else incoming  # NaN lets it through
        _write(product, j, passed)
        _add(sums, j, passed)


@_inner
def _multiply(inputs, weights, product):
    """inputs (k,) times weights (k, n) into `product` (n,), four rows of weights at a time."""
    for j in range(product.size):
        product[j] = _f(0.0)
    for k in range(0, inputs.size - 3, 4):
        a, b, c, d = inputs[k], inputs[k + 1], inputs[k + 2], inputs[k + 3]
        for j in range(product.size):
            product[j] += a * weights[k, j] + b * weights[k + 1, j] + c * weights[k + 2, j] + d * weights[k + 3, j]
    for k in range(inputs.size - inputs.size % 4, inputs.size):
        a = inputs[k]
        for j in range(product.size):
            product[j] += a * weights[k, j]


@register_jitable(**OPTIONS | {"fastmath": {"contract", "reassoc"}})  # sums in any order: vector code
def _project(value, weights, outputs):
    """Add to outputs (k,) the products of value (n,) with the rows of weights (k, n), four at a time."""
    for k in range(0, outputs.size - 3, 4):
        a = b = c = d = _f(0.0)
        for j in range(value.size):
            x = value[j]
            a += x * weights[k, j]
            b += x * weights[k + 1, j]
            c += x * weights[k + 2, j]
            d += x * weights[k + 3, j]
        outputs[k] += a
        outputs[k + 1] += b
        outputs[k + 2] += c
        outputs[k + 3] += d
    for k in range(outputs.size - outputs.size % 4, outputs.size):
        a = _f(0.0)
        for j in range(value.size):
            a += value[j] * weights[k, j]
        outputs[k] += a


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
def _compiled(row: Row, features: tuple[bool, ...], *kinds: torch.dtype | None) -> Any:
    """What every thread runs, for three matrices of these types, None for none: parts of them until none is left.

    Matrices of a stack lie behind each other. A first matrix that is entered, and a second one that is projected, need
    not be kept: then a row of each stays in the core's nearest cache.
    """
    in_place, summed, entered, projected = features
    first, second, third = map(_ELEMENTS.get, kinds)

    def run(call):
        parts, rows, columns, shared, ins, outs = call[1], call[3], call[4], call[5], call[6], call[7]
        of_matrix = (rows + PART_ROWS - 1) // PART_ROWS
        stack = parts // max(of_matrix, 1)
        shape = (stack * rows, columns)
        bias = carray(_pointer(call[8]), (stack, columns), np.float32)
        sums = carray(_pointer(call[9]), (parts, columns), np.float32) if summed else None
        one = np.empty((1, columns), np.float32) if first is None else carray(_pointer(call[10]), shape, first)
        if in_place:
            two = None
        elif second is None:
            two = np.empty((1, columns), np.float32)
        else:
            two = carray(_pointer(call[11]), shape, second)
        three = None if third is None else carray(_pointer(call[12]), (stack * rows // shared, columns), third)
        inputs = carray(_pointer(call[13]), (stack * rows, ins), np.float32)
        entering = carray(_pointer(call[14]), (stack * ins, columns), np.float32)
        leaving = carray(_pointer(call[15]), (stack * outs, columns), np.float32)
        outputs = carray(_pointer(call[16]), (stack * rows, outs), np.float32)
        while True:
            start = _take(call, call[2])
            if start >= parts:
                break
            for part in range(start, min(start + call[2], parts)):
                matrix = part // of_matrix
                top, end = matrix * rows + part % of_matrix * PART_ROWS, (matrix + 1) * rows
                for i in range(top, min(top + PART_ROWS, end)):
                    z = one[0 if first is None else i]
                    value = _row(two, 0 if second is None else i)
                    if entered:
                        _multiply(inputs[i], entering[matrix * ins : (matrix + 1) * ins], z)
                    row(bias[matrix], _row(sums, part), z, value, _row(three, i // shared))
                    if projected:
                        _project(_place(value, z), leaving[matrix * outs : (matrix + 1) * outs], outputs[i])

    signature = types.void(types.CPointer(types.int64))
    variant = " ".join(map(str, (row.__name__, *features, *kinds)))
    return kept_on_disk(partial(numba.cfunc, signature, **OPTIONS), run, variant)


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
    *stack, rows, columns = matrices.shape
    return torch.zeros(*stack, -(-rows // PART_ROWS), columns)


def run_pass(
    row: Row,
    bias: Tensor | None,
    *matrices: Tensor | None,
    sums: Tensor | None = None,
    entrance: tuple[Tensor, Tensor] | None = None,
    projection: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Do one of the passes above to three matrices, or stacks of them, float32 or bfloat16, on the CPU.

    Args:
        row: `relu` and those after it.
        bias: float32 (..., n); None for a pass that takes none.
        matrices: (..., m, n), those that the pass names. A value of `relu` or `mish` may be z itself. Rows that follow
            each other may share one of a base, or there is none: None. First matrices and values may be None as below.
        sums: see `partial_sums`, for a pass that names them.
        entrance: inputs (..., m, k) and weights (..., k, n), float32, whose product is the first matrix, overwritten
            where it is given, of float32, and not kept where it is None.
        projection: weights (..., k, n) and outputs (..., m, k), float32: to the latter the pass adds its value, float32
            too, times weights'. Without a matrix for the value it is not kept.

    Raises:
        ValueError: another type or shape, not contiguous, or a matrix missing.
    """
    one, two, three = matrices
    based = row not in (through, through_relu)
    if two is None and not (based and projection):
        raise ValueError(f"{row.__name__} needs a second matrix")
    (inputs, entering), (leaving, outputs) = entrance or (None, None), projection or (None, None)
    *stack, rows, columns = _product_shape(one, inputs, entering)
    ins = 0 if entering is None else entering.shape[-2]
    outs = 0 if leaving is None else leaving.shape[-2]
    held = math.prod(three.shape[-2:-1]) if three is not None else rows
    shared = rows // held if based and rows and held and rows % held == 0 else 1
    _check(bias, (*stack, columns), FLOAT32)
    _check(sums, (*stack, -(-rows // PART_ROWS), columns), FLOAT32)
    _check(one, (*stack, rows, columns), KINDS if entrance is None else FLOAT32)
    _check(two, (*stack, rows, columns), KINDS if projection is None else FLOAT32)
    _check(three, (*stack, rows // shared, columns), KINDS)
    _check(inputs, (*stack, rows, ins), FLOAT32)
    _check(entering, (*stack, ins, columns), FLOAT32)
    _check(leaving, (*stack, outs, columns), FLOAT32)
    _check(outputs, (*stack, rows, outs), FLOAT32)
    features = based and two is one, sums is not None, entrance is not None, projection is not None
    entry, parallel = _compiled(row, features, *(None if m is None else m.dtype for m in matrices)), _openmp()
    # all of PyTorch's threads or one: a smaller team would end the others, to be started again in the next product
    many = math.prod(stack) * rows * columns >= LEAST_FOR_THREADS
    threads = torch.get_num_threads() if parallel and many else 1
    parts = math.prod(stack) * -(-rows // PART_ROWS)
    tensors = (bias, sums, *matrices, inputs, entering, leaving, outputs)
    addresses = (0 if tensor is None else tensor.data_ptr() for tensor in tensors)
    # as many parts each, of rows that lie together, like those of a product: they need not move between cores
    call = _CALL(0, parts, -(-parts // threads), rows, columns, shared, ins, outs, *addresses)
    if threads == 1:
        _ENTRY(entry.address)(ctypes.addressof(call))
    else:
        parallel(entry.address, ctypes.addressof(call), threads, 0)


def _product_shape(one: Tensor | None, inputs: Tensor | None, entering: Tensor | None) -> tuple[int, ...]:
    """That of the first matrix, or of the product which takes its place."""
    if inputs is not None and entering is not None:
        return *inputs.shape[:-1], entering.shape[-1]
    assert one is not None
    return one.shape


def _check(tensor: Tensor | None, shape: tuple[int, ...], kinds: tuple[torch.dtype, ...]) -> None:
    if tensor is None:
        return
    known = tensor.dtype in kinds and tensor.device.type == "cpu"
    if tensor.shape != shape or not known or not tensor.is_contiguous():
        found = f"{tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"
        raise ValueError(f"a pass takes contiguous {', '.join(map(str, kinds))} {tuple(shape)}, got {found}")
