"""ONNX forms of the integer primitives: products, sums, look-ups, and the two roundings. No float takes part.

docs/integer_primitives.md is the specification. ``g`` is the writer (backends/onnx_builder.py); everything *wide* is
int64. ONNX shifts unsigned integers only, so a signed shift goes by way of uint64: Cast between the two keeps the bits
(ONNX, Cast: two's complement). Opset 18 is the first that has all of it (BitwiseAnd, BitwiseXor).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .qdq import torch_container

Array = NDArray[Any]
Constant = Callable[[Array], Any]  # a number, or one per channel or row -> a value that broadcasts
BYTES = (torch.int8, torch.uint8)
BIT64 = torch.uint64


def whole(g: Any, number: Any) -> Any:
    """An int64 constant."""
    return g.constant(np.asarray(number, np.int64))


def wide(g: Any, x: Any) -> Any:
    """An operand of an op as int64."""
    return g.cast(x, torch.int64)


def known(g: Any, value: Any, what: str) -> Array:
    """The number, or the constant tensor, of an operand that must be known when the file is written."""
    if isinstance(value, int):
        return np.asarray(value, np.int64)
    if value.const_value is None:
        g.refuse(f"{what} that is no constant")
    found: Array = value.const_value.numpy()
    return found


def along(array: Array, rank: int, axis: int) -> Array:
    """One number per channel, to broadcast along ``axis`` of a value of ``rank`` dimensions."""
    if array.ndim != 1:
        return array
    shape = [1] * rank
    shape[axis] = -1
    return array.reshape(shape)


def shift_right(g: Any, v: Any, amount: Any) -> Any:
    """``v >> amount`` of int64 that are not negative; ``amount`` uint64."""
    return g.cast(g.BitShift(g.cast(v, BIT64), amount, direction="RIGHT"), torch.int64)


def round_shift(g: Any, v: Any, shift: Array, constant: Constant) -> Any:
    """``v / 2**shift`` rounded half to even: int64 ``|v| < 2**62``, ``1 <= shift <= 62`` -> int64.

    Half is added and the sum shifted; a logical shift leaves bit ``63 - shift`` in the place of the sign, which the
    xor and the subtraction carry to the top. That rounds half up; where the sum ends in a one and ``shift`` zeros, v
    was a tie and the result came out odd, one too large.
    """
    shift = np.asarray(shift, np.int64)
    unit, sign = np.left_shift(np.int64(1), shift), np.left_shift(np.int64(1), 63 - shift)
    raised = g.Add(v, constant(unit >> 1))
    shifted = shift_right(g, raised, constant(shift.astype(np.uint64)))
    half_up = g.Sub(g.BitwiseXor(shifted, constant(sign)), constant(sign))
    odd_tie = g.Equal(g.BitwiseAnd(raised, constant(unit + (unit - 1))), constant(unit))
    return g.Sub(half_up, g.cast(odd_tie, torch.int64))


def round_divide(g: Any, n: Any, d: Any) -> Any:
    """``n / d`` rounded half to even: int64 ``|n| < 2**61``, ``0 < d < 2**61`` -> int64.

    Mod takes the sign of the divisor, so what Div gets divides exactly and its truncation does nothing.
    """
    rest = g.Mod(n, d)
    floor = g.Div(g.Sub(n, rest), d)
    odd = g.BitwiseAnd(floor, whole(g, 1))
    rounds_up = g.Greater(g.Add(g.Add(rest, rest), odd), d)
    return g.Add(floor, g.cast(rounds_up, torch.int64))


def to_codes(g: Any, q: Any, zero_point: int, qmin: int, qmax: int) -> Any:
    """``clamp(q + zero_point)`` in the smallest container."""
    moved = g.Add(q, whole(g, zero_point)) if zero_point else q
    return g.cast(g.Clip(moved, whole(g, qmin), whole(g, qmax)), torch_container(qmin, qmax))


def emit_requantize(
    g: Any, acc: Any, multiplier: Any, shift: Any, zero_point: int, qmin: int, qmax: int, axis: int = -1
) -> Any:
    rank = g.rank(acc)
    m, s = (along(known(g, v, "a multiplier or shift"), rank, axis) for v in (multiplier, shift))
    q = round_shift(g, g.Mul(wide(g, acc), g.constant(m)), s, g.constant)
    return to_codes(g, q, zero_point, qmin, qmax)


def emit_add(
    g: Any,
    terms: Sequence[Any],
    multipliers: Sequence[Any],
    zero_points: Sequence[int],
    shift: int,
    zero_point: int,
    qmin: int,
    qmax: int,
    axis: int = -1,
) -> Any:
    total: Any = None
    for term, multiplier, term_zero in zip(terms, multipliers, zero_points, strict=True):
        real = g.Sub(wide(g, term), whole(g, term_zero)) if term_zero else wide(g, term)
        scaled = g.Mul(real, _factor(g, multiplier, g.rank(term), axis))
        total = scaled if total is None else g.Add(total, scaled)
    return to_codes(g, round_shift(g, total, np.asarray(shift), g.constant), zero_point, qmin, qmax)


def _factor(g: Any, multiplier: Any, rank: int, axis: int) -> Any:
    """A multiplier of a sum; one that was gathered row by row broadcasts as it is."""
    if isinstance(multiplier, int) or g.rank(multiplier) == 1:
        return g.constant(along(known(g, multiplier, "a multiplier"), rank, axis))
    return multiplier


def emit_lookup(g: Any, codes: Any, table: Any, first: int) -> Any:
    return g.Gather(table, g.Sub(wide(g, codes), whole(g, first)), axis=0)


def emit_embedding(g: Any, table: Any, ids: Any) -> Any:
    """Gather counts an id below 0 from the end; moved behind the table, it is refused like any other outside it."""
    rows = g.constant(np.asarray(g.dims(table)[0], g.numpy_dtype(g.types[ids])))
    below = g.Less(ids, g.constant(np.asarray(0, g.numpy_dtype(g.types[ids]))))
    return g.Gather(table, g.Where(below, rows, ids), axis=0)


def emit_linear(
    g: Any, x: Any, w: Any, bias: Any = None, x_zero_point: int = 0, bound: int = 0
) -> Any:  # the bound is proved: it needs no operator
    acc = _product(g, x, g.transposed(w), x_zero_point, 0)
    return acc if bias is None else g.Add(acc, bias)


def emit_matmul(
    g: Any, a: Any, b: Any, a_zero_point: int = 0, b_zero_point: int = 0, a_max: int = 255, b_max: int = 255
) -> Any:
    return _product(g, a, b, a_zero_point, b_zero_point)


def emit_mul(g: Any, a: Any, b: Any, a_zero_point: int = 0, b_zero_point: int = 0) -> Any:
    return g.Mul(_real(g, a, a_zero_point), _real(g, b, b_zero_point))


def _product(g: Any, a: Any, b: Any, a_zero: int, b_zero: int) -> Any:
    """``(a - a_zero) @ (b - b_zero)`` in int32. MatMulInteger takes bytes; wider codes go through MatMul of int32,
    exact as every partial sum was proved to fit."""
    if _is_byte(g, a, a_zero) and _is_byte(g, b, b_zero):
        left, zero = _unsigned(g, a, a_zero)
        right, right_zero = (b, _zero(g, b, b_zero)) if _never_saturates(b) else _unsigned(g, b, b_zero)
        return g.MatMulInteger(left, right, zero, right_zero)
    return g.MatMul(_real(g, a, a_zero), _real(g, b, b_zero))


def _is_byte(g: Any, x: Any, zero_point: int) -> bool:
    """MatMulInteger and ConvInteger take 8 bits, and the zero point in the dtype of the codes."""
    dtype = g.types[x]
    return dtype in BYTES and torch.iinfo(dtype).min <= zero_point <= torch.iinfo(dtype).max


def _zero(g: Any, x: Any, zero_point: int) -> Any:
    return g.constant(np.asarray(zero_point, g.numpy_dtype(g.types[x])))


def _unsigned(g: Any, x: Any, zero_point: int) -> tuple[Any, Any]:
    """Byte codes and their zero point as uint8: int8 codes with their sign bit turned, which adds 128.

    ONNX Runtime has a fast kernel for uint8 on the left only (40 times as fast, where it was measured), and on x86
    without VNNI it loses large sums of uint8 by int8 (backends/onnx_runtime.py, ``int8_saturates``), of uint8 by uint8
    never.
    """
    if g.types[x] == torch.uint8:
        return x, _zero(g, x, zero_point)
    zero = g.constant(np.asarray(zero_point + 128, np.uint8))
    if x.const_value is None:
        turned = g.BitwiseXor(g.cast(x, torch.uint8), g.constant(np.asarray(128, np.uint8)))
        return turned, zero
    name = f"{x.name}/unsigned"  # one constant, however many products read it
    known_one = g.initializers.get(name)
    return known_one or g.constant(x.const_value.numpy().view(np.uint8) ^ np.uint8(128), name), zero


def _never_saturates(b: Any) -> bool:
    """Constants of 7 bits: two products by 255 stay in the 16 bits that a kernel without VNNI adds in."""
    codes = None if b.const_value is None else b.const_value.numpy()
    return codes is not None and codes.dtype == np.int8 and codes.min(initial=0) >= -64 and codes.max(initial=0) <= 63


def _real(g: Any, x: Any, zero_point: int) -> Any:
    codes = g.cast(x, torch.int32)
    return g.Sub(codes, g.constant(np.asarray(zero_point, np.int32))) if zero_point else codes


def emit_conv1d(
    g: Any,
    x: Any,
    w: Any,
    bias: Any = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
    x_zero_point: int = 0,
    bound: int = 0,
) -> Any:
    """ConvInteger pads with the zero point, which is real zero."""
    if not (_is_byte(g, x, x_zero_point) and _is_byte(g, w, 0)):
        g.refuse(f"a convolution of {g.types[x]} codes by {g.types[w]} codes")
    (codes, zero), (weights, weight_zero) = _unsigned(g, x, x_zero_point), _unsigned(g, w, 0)
    sizes = {"strides": list(stride), "pads": [*padding, *padding], "dilations": list(dilation)}
    acc = g.ConvInteger(codes, weights, zero, weight_zero, group=groups, **sizes)
    return acc if bias is None else g.Add(acc, g.constant(known(g, bias, "a bias")[:, None]))
