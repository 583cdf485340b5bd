"""Runs the integer program of a folder with NumPy alone: the reference for everyone who ports it to something else.

    program = run_int.load("int")                     # program.json and constants.safetensors
    outputs = program(input_ids=..., attention_mask=..., token_type_ids=...)      # {"logits": float32 array}

    python run_int.py int --input inputs.npz --output outputs.npz [--sites sites.npz] [--show] [--exact]

This file imports nothing but the standard library and NumPy, so it can be copied anywhere; ``save_pretrained`` puts it
beside the program. It was written from docs/integer_primitives.md and docs/integer_format.md, apart from the compiler.

For whoever reads it with C in mind: all arithmetic is int64 (``>>`` is an arithmetic shift and ``//`` rounds towards
minus infinity, where C rounds towards 0), codes are stored in the smallest type that holds them, and the only float
numbers are those of ``dequantize``, the last step. ``[..., n]`` in a comment is an array whose last dimension is n.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import struct
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 3  # of program.json
INT32_MAX = 2**31 - 1
Array = Any  # a NumPy array
SiteHook = Callable[[str, Array], Any]


class ProgramError(Exception):
    """The folder or the inputs cannot be used; the text says what, where and why."""


# ---------------------------------------------------------------------------------------------------------------------
# 1. The two roundings, and how codes are stored


def round_shift(v: Array, n: Any) -> Array:
    """v / 2**n, half to even."""
    floor = v >> n
    rest, half = v - (floor << n), np.int64(1) << (np.int64(n) - 1)
    return floor + ((rest > half) | ((rest == half) & (floor & 1 == 1)))


def round_divide(n: Array, d: Array) -> Array:
    """n / d, half to even; d > 0."""
    floor = n // d
    twice_rest = 2 * (n - floor * d)
    return floor + ((twice_rest > d) | ((twice_rest == d) & (floor & 1 == 1)))


def as_codes(q: Array, zero_point: int, qmin: int, qmax: int) -> Array:
    """Move to the zero point, saturate, and store in the first of these types that holds qmin...qmax."""
    q = np.clip(q + zero_point, qmin, qmax)
    for dtype in (np.int8, np.uint8, np.int16):
        if np.iinfo(dtype).min <= qmin and qmax <= np.iinfo(dtype).max:
            return q.astype(dtype)
    return q.astype(np.int32)


def wide(x: Array, zero_point: int = 0) -> Array:
    return np.asarray(x).astype(np.int64) - zero_point


def along(v: Any, rank: int, axis: int) -> Any:
    """A vector [channels] made to run along one axis of an array of ``rank`` dimensions; a number stays as it is."""
    if np.ndim(v) != 1:
        return v
    shape = [1] * rank
    shape[axis] = -1
    return v.reshape(shape)


# ---------------------------------------------------------------------------------------------------------------------
# 2. Products, sums, look-ups


def product(a: Array, b: Array, bound: int, exact: bool) -> Array:
    """a @ b for int64 a, b, when no partial sum, in whatever order, passes ``bound``.

    A double holds every integer below 2**53. With the bound below that, each product and each partial sum is such an
    integer, so no step of a float64 BLAS rounds: the result is exact, and much faster than NumPy's integer loops. The
    bounds in a program all fit 32 bits: a port uses int8 x int8 -> int32.
    """
    if exact or bound >= 2**53:
        return np.matmul(a, b)
    return np.matmul(a.astype(np.float64), b.astype(np.float64)).astype(np.int64)


def int_linear(
    x: Array, w: Array, bias: Array = None, x_zero_point: int = 0, bound: int = INT32_MAX, exact: bool = False
) -> Array:
    acc = product(wide(x, x_zero_point), wide(w).T, bound, exact)
    return (acc if bias is None else acc + bias).astype(np.int32)


def int_matmul(
    a: Array, b: Array, a_zero_point: int = 0, b_zero_point: int = 0, a_max: int = 255, b_max: int = 255,
    exact: bool = False,
) -> Array:  # fmt: skip
    bound = a.shape[-1] * a_max * b_max
    if bound > INT32_MAX:
        raise ProgramError(f"an inner product of {a.shape[-1]} codes can overflow 32 bits: use shorter sequences")
    return product(wide(a, a_zero_point), wide(b, b_zero_point), bound, exact).astype(np.int32)


def int_conv1d(
    x: Array, w: Array, bias: Array = None, stride: Sequence[int] = (1,), padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,), groups: int = 1, x_zero_point: int = 0, bound: int = INT32_MAX, exact: bool = False,
) -> Array:  # fmt: skip
    """x [n, in, length], w [out, in / groups, taps] -> [n, out, length']. Padding is real zero."""
    (out, per_group, taps), step = w.shape, stride[0]
    x = np.pad(wide(x, x_zero_point), ((0, 0), (0, 0), (padding[0], padding[0])))
    length = (x.shape[2] - (taps - 1) * dilation[0] - 1) // step + 1
    acc = np.zeros((x.shape[0], out, length), np.int64)
    for g in range(groups):
        rows, channels = slice(g * out // groups, (g + 1) * out // groups), slice(g * per_group, (g + 1) * per_group)
        for tap in range(taps):
            first = tap * dilation[0]
            window = x[:, channels, first : first + (length - 1) * step + 1 : step]
            acc[:, rows] += product(wide(w[rows, :, tap]), window, bound, exact)
    return (acc if bias is None else acc + bias[:, None]).astype(np.int32)


def int_mul(a: Array, b: Array, a_zero_point: int = 0, b_zero_point: int = 0) -> Array:
    """Element by element, with broadcasting; the product fits 32 bits."""
    return (wide(a, a_zero_point) * wide(b, b_zero_point)).astype(np.int32)


def int_embedding(table: Array, ids: Array) -> Array:
    if ids.size and (ids.min() < 0 or ids.max() >= len(table)):
        raise ProgramError(f"ids run from {ids.min()} to {ids.max()}, the table has {len(table)} rows")
    return table[ids]


def lookup(codes: Array, table: Array, first: int) -> Array:
    return table[wide(codes, first)]


def requantize(acc: Array, multiplier: Any, shift: Any, zero_point: int, qmin: int, qmax: int, axis: int = -1) -> Array:
    m, n = along(multiplier, acc.ndim, axis), along(shift, acc.ndim, axis)
    return as_codes(round_shift(wide(acc) * m, n), zero_point, qmin, qmax)


def int_add(
    terms: Sequence[Array], multipliers: Sequence[Any], zero_points: Sequence[int], shift: int,
    zero_point: int, qmin: int, qmax: int, axis: int = -1,
) -> Array:  # fmt: skip
    """Every term is brought to one fixed point; their sum is rounded once."""
    scaled = [wide(t, z) * along(m, np.ndim(t), axis) for t, m, z in zip(terms, multipliers, zero_points, strict=True)]
    total = scaled[0]
    for term in scaled[1:]:
        total = total + term
    return as_codes(round_shift(total, shift), zero_point, qmin, qmax)


# ---------------------------------------------------------------------------------------------------------------------
# 3. Softmax, LayerNorm, GELU and the mean of a sentence


def bits(n: Array) -> Array:
    """How many binary digits n >= 0 has; 0 for 0. In C: 64 - clz."""
    n, count = np.array(n), np.zeros(np.shape(n), np.int64)
    for step in (32, 16, 8, 4, 2, 1):
        big = n >= np.int64(1) << step
        count, n = count + step * big, np.where(big, n >> step, n)
    return count + (n > 0)


def i_sqrt(n: Array) -> Array:
    """floor(sqrt(n)) for 0 <= n < 2**32, by Newton's steps from above."""
    x = np.int64(1) << ((bits(n) + 1) // 2)
    for _ in range(6):
        x = np.minimum(x, (x + n // np.maximum(x, 1)) // 2)
    return x


EXP_A, EXP_B, EXP_C = round(0.35815147 * 2**15), round(0.96963238 / 0.35815147 * 2**14), round(2**28 / 0.35815147)
LN2 = 11357  # ln(2) * 2**14, rounded


def i_exp(d: Array) -> Array:
    """About exp(-d * 2**-14) * 2**15 for 0 <= d < 2**18: a parabola on (-ln 2, 0], then a shift for each halving."""
    z = d // LN2
    p = z * LN2 - d
    parabola = p * (p + EXP_B) + EXP_C
    return ((parabola >> z) * EXP_A) >> 28


def int_softmax(
    x: Array, keep: Array, table: Array, multiplier: int, shift: int, limit: int, divider: int,
    zero_point: int, qmin: int, qmax: int,
) -> Array:  # fmt: skip
    """Over the last dimension. ``keep`` (True: the key is there) may be None; ``table`` None asks for i_exp."""
    x = wide(x)
    keep = np.ones(x.shape, bool) if keep is None else np.broadcast_to(keep, x.shape)
    last = 2**18 - 1 if table is None else len(table) - 1
    largest = np.max(np.where(keep, x, -(2**31)), axis=-1, keepdims=True)
    behind = np.where(keep, np.minimum(largest - x, limit), 0)
    d = np.minimum(round_shift(behind * multiplier, shift), last)
    e = np.where(keep, i_exp(d) if table is None else wide(table)[d], 0)
    total = np.maximum(e.sum(axis=-1, keepdims=True), 1)  # 0 in a row without a kept key: 0 / 1 is its probability
    return as_codes(round_divide(e * divider, total << 22), zero_point, qmin, qmax)


def int_layer_norm(
    x: Array, gain: Array, offset: Array, fraction: int, eps: int, shift: int, zero_point: int, qmin: int, qmax: int
) -> Array:
    """Over the last dimension. All but the two roundings of t and q is about keeping as many bits as 64 allow."""
    x = wide(x) << fraction
    y = x - round_divide(x.sum(axis=-1, keepdims=True), np.int64(x.shape[-1]))
    v = np.sum(y * y, axis=-1, keepdims=True) + eps
    h = -((32 - bits(v)) // 2)  # an even shift 2h leaves v with 31 or 32 bits: the most that i_sqrt takes
    r = i_sqrt(np.where(h >= 0, v >> np.maximum(2 * h, 0), v << np.maximum(-2 * h, 0)))
    t = round_shift(y * (2**46 // r), 22 + h)  # y / sqrt(v) in steps of 2**-24
    return as_codes(round_shift(t * gain + offset, shift), zero_point, qmin, qmax)


GELU_B, GELU_C = round(1.769 * 2**12), round(2**24 / 0.2888)


def int_gelu(
    x: Array, x_zero_point: int, multiplier: int, shift: int, out_multiplier: int, out_shift: int,
    zero_point: int, qmin: int, qmax: int,
) -> Array:  # fmt: skip
    """x / 2 * (1 + erf(x / sqrt(2))) with erf as one parabola on each side of 0."""
    x = wide(x, x_zero_point)
    t = round_shift(x * multiplier, shift)  # x / sqrt(2) in steps of 2**-12
    s = np.minimum(np.abs(t), GELU_B) - GELU_B
    w = np.sign(t) * (GELU_C - s * s) + GELU_C
    return as_codes(round_shift(x * round_shift(w, 12) * out_multiplier, out_shift), zero_point, qmin, qmax)


def int_mean(
    x: Array, keep: Array, x_zero_point: int, multiplier: int, shift: int, zero_point: int, qmin: int, qmax: int
) -> Array:
    """x [batch, length, width], keep [batch, length] -> [batch, width]: the mean of the tokens that are there."""
    kept = np.where(np.asarray(keep, bool)[..., None], wide(x, x_zero_point), 0)
    n = np.maximum(np.sum(np.asarray(keep, bool), axis=1, dtype=np.int64), 1)[:, None]
    return as_codes(round_divide(kept.sum(axis=1) * multiplier, n << shift), zero_point, qmin, qmax)


def dequantize(codes: Array, scale: Array, zero_point: int = 0, axis: Any = None) -> Array:
    """The end: real = (code - zero_point) * scale, both steps in the type of the scale (float32)."""
    shaped = scale if axis is None else along(scale, codes.ndim, axis)
    return (codes.astype(scale.dtype) - scale.dtype.type(zero_point)) * shaped


# ---------------------------------------------------------------------------------------------------------------------
# 4. What moves codes, counts sizes and makes masks. Nothing here rounds.


def squeeze(x: Array, dims: Any = None) -> Array:
    named = range(x.ndim) if dims is None else [dims] if isinstance(dims, int) else dims
    return np.squeeze(x, axis=tuple(d for d in named if x.shape[d] == 1))


def expand(x: Array, size: Sequence[int], implicit: bool = False) -> Array:
    """-1 keeps a dimension; new ones come in front."""
    old = [1] * (len(size) - x.ndim) + list(x.shape)
    return np.broadcast_to(x, [o if s == -1 else s for o, s in zip(old, size)])


def flatten(x: Array, start: int = 0, end: int = -1) -> Array:
    start, end = start % x.ndim, end % x.ndim
    return x.reshape(x.shape[:start] + (-1,) + x.shape[end + 1 :])


def unflatten(x: Array, dim: int, sizes: Sequence[int]) -> Array:
    dim %= x.ndim
    return x.reshape(x.shape[:dim] + tuple(sizes) + x.shape[dim + 1 :])


def split(x: Array, sizes: Any, dim: int = 0) -> list[Array]:
    """``sizes``: the lengths of the parts, or one length for all (the last may be shorter)."""
    if isinstance(sizes, int):
        sizes = [min(sizes, x.shape[dim] - at) for at in range(0, x.shape[dim], sizes)]
    return np.split(x, np.cumsum(sizes)[:-1], axis=dim)


def index(x: Array, indices: Sequence[Any]) -> Array:
    return x[tuple(slice(None) if i is None else i for i in indices)]


def gather(x: Array, dim: int, where: Array, sparse_grad: bool = False) -> Array:
    """out[i][j] = x[i][where[i][j]] for dim 1."""
    part = tuple(slice(None) if d == dim % x.ndim else slice(n) for d, n in enumerate(where.shape))
    return np.take_along_axis(x[part], where, axis=dim)


def unfold(x: Array, dim: int, size: int, step: int) -> Array:
    """Every window of ``size`` along ``dim``, ``step`` apart, as a new last dimension."""
    dim %= x.ndim
    starts = range(0, x.shape[dim] - size + 1, step)
    return np.stack([np.moveaxis(np.take(x, range(s, s + size), axis=dim), dim, -1) for s in starts], axis=dim)


def take_slice(x: Array, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Array:
    return np.moveaxis(np.moveaxis(x, dim, 0)[start:end:step], 0, dim)


def pad(x: Array, widths: Sequence[int], mode: str = "constant", value: Any = None) -> Array:
    """``widths``: (before, after) of the last dimension, then of the one in front of it ...; below 0 they crop."""
    if mode != "constant":
        raise ProgramError(f"padding in mode {mode!r}: a program pads with a constant only")
    for at in range(0, len(widths), 2):
        axis, (before, after) = x.ndim - 1 - at // 2, widths[at : at + 2]
        x = take_slice(x, axis, max(-before, 0), x.shape[axis] - max(-after, 0))
        grow = [(max(before, 0), max(after, 0)) if d == axis else (0, 0) for d in range(x.ndim)]
        x = np.pad(x, grow, constant_values=value or 0)
    return x


ARITHMETIC: dict[str, Callable[..., Any]] = {
    "int_linear": int_linear, "int_matmul": int_matmul, "int_conv1d": int_conv1d, "int_mul": int_mul,
    "int_embedding": int_embedding, "lookup": lookup, "requantize": requantize, "int_add": int_add,
    "int_softmax": int_softmax, "int_layer_norm": int_layer_norm,
    "int_gelu": int_gelu, "int_mean": int_mean, "dequantize": dequantize,
}  # fmt: skip
PRODUCTS = ("int_linear", "int_matmul", "int_conv1d")
ROUNDING = ("requantize", "int_add", "lookup", "int_softmax", "int_layer_norm", "int_gelu", "int_mean")
MOVERS: dict[str, Callable[..., Any]] = {
    "view": np.reshape, "reshape": np.reshape, "flatten": flatten, "unflatten": unflatten,
    "transpose": np.swapaxes, "swapaxes": np.swapaxes, "permute": np.transpose, "t": np.transpose,
    "numpy_T": np.transpose, "select": lambda x, dim, i: np.take(x, i, axis=dim), "slice": take_slice, "expand": expand,
    "contiguous": lambda x, memory_format=None: x, "unsqueeze": np.expand_dims,
    "squeeze": squeeze, "squeeze_all": squeeze, "squeeze_dims": squeeze, "repeat": np.tile, "unfold": unfold,
    "unbind": lambda x, dim=0: list(np.moveaxis(x, dim, 0)),
    "chunk": lambda x, n, dim=0: split(x, -(-x.shape[dim] // n), dim), "split": split, "split_with_sizes": split,
    "getitem": lambda parts, i: parts[i], "cat": lambda parts, dim=0: np.concatenate(parts, axis=dim),
    "stack": lambda parts, dim=0: np.stack(parts, axis=dim), "index": index,
    "index_select": lambda x, dim, i: np.take(x, i, axis=dim), "gather": gather, "pad": pad,
}  # fmt: skip
SIZES: dict[str, Callable[..., Any]] = {
    "sym_size": lambda x, dim: x.shape[dim], "size_add": lambda a, b: a + b, "size_sub": lambda a, b: a - b,
    "size_mul": lambda a, b: a * b, "size_floordiv": lambda a, b: a // b, "size_mod": lambda a, b: a % b,
    "arange": lambda like, start, end, step, dtype: np.arange(start, end, step, dtype=dtype),
    "full": lambda like, shape, value, dtype: np.full(shape, value, dtype=dtype),
}  # fmt: skip
MASKS: dict[str, Callable[..., Any]] = {
    **{name + kind: function for kind in ("", "_tensor") for name, function in (
        ("eq", np.equal), ("ne", np.not_equal), ("lt", np.less), ("le", np.less_equal), ("gt", np.greater),
        ("ge", np.greater_equal))},
    "and": np.bitwise_and, "or": np.bitwise_or, "bitwise_and": np.bitwise_and, "bitwise_or": np.bitwise_or,
    "bitwise_not": np.bitwise_not, "logical_and": np.logical_and, "logical_or": np.logical_or,
    "logical_not": np.logical_not, "where": np.where, "where_scalar_other": np.where, "where_scalar_self": np.where,
    "where_scalars": np.where, "masked_fill": lambda x, mask, value: np.where(mask, value, x),
    "masked_fill_tensor": lambda x, mask, value: np.where(mask, value, x),
    "to": lambda x, dtype, *rest: x.astype(dtype), "type_as": lambda x, other: x.astype(other.dtype),
    "add": lambda a, b, alpha=1: a + b * alpha, "sub": lambda a, b, alpha=1: a - b * alpha, "mul": np.multiply,
    "rsub": lambda a, b, alpha=1: b - a * alpha, "neg": np.negative, "abs": np.abs,
    "sign": np.sign, "clamp": lambda x, min=None, max=None: np.clip(x, min, max),
    "min": np.minimum, "minimum": np.minimum, "max": np.maximum, "maximum": np.maximum,
    "cumsum": lambda x, dim, dtype=None: np.cumsum(x, axis=dim, dtype=np.int64),
}  # fmt: skip
OPS = {**ARITHMETIC, **MOVERS, **SIZES, **MASKS}


# ---------------------------------------------------------------------------------------------------------------------
# 5. The files

DTYPES = {
    "BOOL": "?", "I8": "i1", "U8": "u1", "I16": "<i2", "I32": "<i4", "I64": "<i8", "F32": "<f4", "F64": "<f8",
}  # fmt: skip


MOST_LEVELS = 128  # codes that span more than 7 bits are stored as they are
BLOCK = 1 << 16  # words that stay in the cache while they are spread


def five_a_byte(data: Array) -> Array:
    """[n] bytes below 243 -> [5 * n] digits in base 3; the first code is the lowest digit."""
    digits = np.arange(243)[:, None] // 3 ** np.arange(5) % 3
    return digits.astype(np.uint8)[data].reshape(-1)


def bits_a_code(data: Array, width: int) -> Array:
    """[n] bytes, a stream of ``width``-bit codes that starts at the lowest bit of the first -> a byte for each code.

    Eight codes take ``width`` bytes: those become one word of 64 bits, which is spread in three steps (halves,
    quarters, single codes): in each, the upper half of what still stands together moves up to where it belongs.
    """
    groups = -(-len(data) // width)
    data = np.pad(data, (0, groups * width - len(data))) if len(data) % width else data
    words = np.zeros(groups, "<u8")
    for at in range(0, groups, BLOCK):
        word = words[at : at + BLOCK]
        word.view(np.uint8).reshape(-1, 8)[:, :width] = data[at * width : (at + BLOCK) * width].reshape(-1, width)
        for codes in (4, 2, 1):
            keep = np.uint64(sum(((1 << codes * width) - 1) << 16 * codes * k for k in range(4 // codes)))
            upper = word >> np.uint64(codes * width) & keep
            word &= keep
            word |= upper << np.uint64(8 * codes)
    return words.view(np.uint8)


def unpack(data: Array, key: str, dtype: str, shape: Sequence[int], first: int, levels: int) -> Array:
    """The bytes of a packed tensor -> its codes, which lie in first ... first + levels - 1."""
    count, width = math.prod(shape), (levels - 1).bit_length()
    limits = np.iinfo({"int8": np.int8, "uint8": np.uint8}[dtype])
    if not (2 <= levels <= MOST_LEVELS and limits.min <= first and first + levels - 1 <= limits.max):
        raise ProgramError(f"{key} is packed as {levels} levels from {first}, which {dtype} cannot be")
    size = -(-count // 5) if levels == 3 else -(-count * width // 8)
    if data.dtype != np.uint8 or data.shape != (size,):
        raise ProgramError(f"{key}: {count} codes of {levels} levels take {size} bytes, not {data.dtype}{data.shape}")
    if levels == 3 and (bad := data.max(initial=0)) > 242:
        raise ProgramError(f"{key} is damaged: byte {np.argmax(data > 242)} is {bad}, five ternary codes reach 242")
    codes = five_a_byte(data) if levels == 3 else bits_a_code(data, width)
    if (bad := codes.max(initial=0)) >= levels:
        raise ProgramError(f"{key} is damaged: code {np.argmax(codes >= levels)} is {bad} of {levels} levels")
    if codes[count:].any():
        raise ProgramError(f"{key} is damaged: the bits behind its last code are not zero")
    codes = codes[:count]
    codes += np.uint8(first % 256)  # wraps, as two's complement does
    return codes.view(dtype).reshape(shape)


def read_safetensors(data: bytes, name: str) -> dict[str, Array]:
    """8 bytes: length n of the header; n bytes: JSON; then the tensors, little-endian, at offsets from there."""
    if len(data) < 8 or (size := struct.unpack("<Q", data[:8])[0]) > len(data) - 8:
        raise ProgramError(f"{name} is truncated: its header does not fit into {len(data)} bytes")
    try:
        header = json.loads(data[8 : 8 + size])
        layout = json.loads(header.pop("__metadata__", {}).get("layout", "{}"))
        rows = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        body, at, tensors = data[8 + size :], 0, {}
        for key, row in rows:
            dtype, (begin, end) = np.dtype(DTYPES[row["dtype"]]), row["data_offsets"]
            count = int(np.prod(row["shape"], dtype=np.int64))
            if begin != at or end - begin != count * dtype.itemsize or end > len(body):
                raise ProgramError(f"{name} is truncated or damaged: bytes {begin} to {end} cannot hold {key}")
            tensors[key] = np.frombuffer(body, dtype, count, begin).reshape(row["shape"])
            at = end
        for key, row in layout.get("packed", {}).items():
            tensors[key] = unpack(tensors[key], f"{name}: {key}", **row)
        tensors.update({alias: tensors[source] for alias, source in layout.get("aliases", {}).items()})
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise ProgramError(f"{name} is no safetensors file of integers: {err!r}") from None
    if at != len(body):
        raise ProgramError(f"{name} is damaged: {len(body) - at} bytes belong to no tensor")
    return tensors


def load(folder: str | Path, exact: bool = False) -> Program:
    """Read and check a folder. ``exact``: products in plain int64 in place of float64, for checking this file."""
    path = Path(folder) / "program.json"
    try:
        program = json.loads(path.read_text(encoding="utf-8"))
        version, wanted, name = program["format"], program["constants"]["sha256"], program["constants"]["file"]
        if Path(name).name != name:  # a file of this folder and no other
            raise ValueError(f"{name!r} is no plain file name")
        data = (Path(folder) / name).read_bytes()
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise ProgramError(f"{path} and its constants cannot be read: {err!r}") from None
    if version != FORMAT:
        raise ProgramError(f"{path} has format {version}, this runner reads {FORMAT}: use the runner beside it")
    tensors = read_safetensors(data, name)
    if hashlib.sha256(data).hexdigest() != wanted:
        raise ProgramError(f"{name} is not the file that {path} was written with: copy the folder again")
    try:
        return Program(program, tensors, exact)
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise ProgramError(f"{path} is damaged: {err!r}") from None


# ---------------------------------------------------------------------------------------------------------------------
# 6. The program


def names_in(arg: Any) -> Iterator[str]:
    """The nodes an argument reads."""
    if isinstance(arg, list):
        for part in arg:
            yield from names_in(part)
    elif isinstance(arg, dict) and "node" in arg:
        yield arg["node"]
    elif isinstance(arg, dict):
        yield from names_in([*arg["dict"].values()] if "dict" in arg else [*arg.values()])


def decode(arg: Any, values: dict[str, Any]) -> Any:
    """An argument as it stands in the JSON -> what the op takes."""
    if isinstance(arg, list):
        return [decode(part, values) for part in arg]
    if not isinstance(arg, dict):
        return arg
    ((tag, inner),) = arg.items()
    if tag == "node":
        return values[inner]
    if tag == "dict":
        return {key: decode(part, values) for key, part in inner.items()}
    if tag == "dtype":
        return np.dtype(inner)
    if tag == "slice":
        return slice(*decode(inner, values))
    raise ProgramError(f"an argument is written as {arg}, which no integer op takes")


def refuse_floats(node: dict[str, Any], ends: set[str]) -> None:
    """Everything but the dequantize of an output must be a known op with an integer result."""
    where = f"op {node['op']!r} at {node['site']!r}"
    if node["op"] not in OPS:
        raise ProgramError(f"{where} has no integer meaning here: the program is not integer-only, or of a later kind")
    is_float = "float" in json.dumps([node.get("dtype"), node.get("parts")])
    if is_float and not (node["op"] == "dequantize" and node["name"] in ends):
        raise ProgramError(f"{where} makes floats in the middle: the program is not integer-only")


class Program:
    """A checked program. ``inputs`` and ``outputs`` are the rows of program.json: names, dtypes, shapes, scales."""

    def __init__(self, program: dict[str, Any], tensors: dict[str, Array], exact: bool) -> None:
        self.inputs, self.outputs, self.exact = program["inputs"], program["outputs"], exact
        for site, op, reason in program["islands"][:1]:
            raise ProgramError(f"the program is not integer-only: op {op!r} at {site!r} stays float: {reason}")
        self.constants: dict[str, Array] = {}
        self.steps: list[dict[str, Any]] = []
        known = {row["node"] for row in self.inputs}
        ends = {row["value"]["node"] for row in self.outputs}
        for node in program["nodes"]:
            if "constant" in node:
                if node["constant"] not in tensors:
                    raise ProgramError(f"the constant {node['constant']!r} is missing")
                self.constants[node["name"]] = tensors[node["constant"]]
            elif "op" in node:
                refuse_floats(node, ends)
                self._demand(names_in([node["args"], node.get("kwargs", [])]), known, node["site"])
                self.steps.append(node)
            known.add(node["name"])
        self._demand(names_in([[row["value"], row["codes"]] for row in self.outputs]), known, "outputs")
        self._frees = self._last_uses()

    @staticmethod
    def _demand(names: Iterator[str], known: set[str], site: str) -> None:
        for name in names:
            if name not in known:
                raise ProgramError(f"{site!r} reads {name!r}, which nothing before it makes")

    def _last_uses(self) -> list[list[str]]:
        """Per step: the values that no later step reads."""
        read = set(names_in([[row["value"], row["codes"]] for row in self.outputs])) | set(self.constants)
        frees: list[list[str]] = []
        for step in reversed(self.steps):
            last = set(names_in([step["args"], step.get("kwargs", [])])) - read
            frees.append(sorted(last))
            read |= last
        return frees[::-1]

    def __call__(self, sites: SiteHook | None = None, codes: bool = False, **inputs: Array) -> dict[str, Array]:
        """Run. ``sites(site, codes)`` is shown the result of every op that rounds, in order (``sites=dict.__setitem__``
        of a dict collects them). ``codes``: the outputs as integers, without their ``dequantize``."""
        values = {**self.constants, **self._checked(inputs)}
        for step, frees in zip(self.steps, self._frees):
            values[step["name"]] = result = self._run(step, values)
            if sites is not None and step["op"] in ROUNDING:
                sites(step["site"], result)
            for name in frees:
                del values[name]
        return {row["name"]: decode(row["codes" if codes else "value"], values) for row in self.outputs}

    def _run(self, step: dict[str, Any], values: dict[str, Any]) -> Any:
        kwargs = decode(step.get("kwargs", {"dict": {}}), values)
        if step["op"] in PRODUCTS:
            kwargs["exact"] = self.exact
        try:
            result = OPS[step["op"]](*decode(step["args"], values), **kwargs)
        except (TypeError, ValueError, IndexError, OverflowError, ProgramError) as err:
            raise ProgramError(f"op {step['op']!r} at {step['site']!r}: {err}") from err
        # The arithmetic above fixes its own types. Masks and sizes are computed in NumPy's and stored as written.
        return result.astype(step["dtype"], copy=False) if step["op"] in MASKS else result

    def _checked(self, inputs: dict[str, Array]) -> dict[str, Array]:
        wanted = [row["name"] for row in self.inputs]
        if sorted(inputs) != sorted(wanted):
            raise ProgramError(f"the program takes the inputs {', '.join(wanted)}, not {', '.join(inputs) or 'none'}")
        sizes: dict[str, int] = {}
        values = {}
        for row in self.inputs:
            x = np.asarray(inputs[row["name"]])
            fits = x.ndim == len(row["shape"]) and x.dtype.kind in "iub"
            if not fits or any(n != sizes.setdefault(s, n) if isinstance(s, str) else n != s
                               for s, n in zip(row["shape"], x.shape)):  # fmt: skip
                raise ProgramError(f"{row['name']} is {x.dtype}{list(x.shape)}, not {row['dtype']}{row['shape']}")
            values[row["node"]] = x.astype(row["dtype"])
        return values

    def show(self) -> str:
        """A table of inputs, outputs, and ops with their counts."""
        lines = [f"input   {row['name']}: {row['dtype']} {row['shape']}  {row['meaning']}" for row in self.inputs]
        lines += [f"output  {row['name']}: {row['dtype']} {row['shape']}  {row['meaning']}" for row in self.outputs]
        counts = Counter(step["op"] for step in self.steps)
        for title, table in (("arithmetic", ARITHMETIC), ("moves", MOVERS), ("sizes", SIZES), ("masks", MASKS)):
            found = [f"{name} {counts[name]}" for name in table if counts[name]]
            lines.append(f"{title:10}  {', '.join(found) or '-'}")
        size = sum(c.nbytes for c in {id(c): c for c in self.constants.values()}.values())
        return "\n".join([*lines, f"constants   {len(self.constants)}, {size / 1e6:.1f} MB"])


def save(path: Path, arrays: dict[str, Array]) -> None:
    """Write an .npz file as a whole: an interrupted run leaves the old one."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        np.savez(file, **arrays)
    part.replace(path)


def summary(name: str, x: Array) -> str:
    """One line about an output: type, shape, extremes, first values."""
    values = ", ".join(f"{float(v):.6g}" for v in x.ravel()[:6])
    more = ", ..." if x.size > 6 else ""
    extremes = f"from {float(x.min()):.6g} to {float(x.max()):.6g}" if x.size else "empty"
    return f"{name}: {x.dtype}{list(x.shape)}, {extremes}: {values}{more}"


def run(program: Program, options: argparse.Namespace) -> None:
    """Run the program on the arrays of ``--input``, write what was asked for, print what came out."""
    seen: dict[str, Array] = {}
    with np.load(options.input) as file:
        outputs = program(sites=seen.__setitem__ if options.sites else None, **dict(file))
    for name, array in outputs.items():
        print(summary(name, array))
    for path, arrays in ((options.output, outputs), (options.sites, seen)):
        if path:
            save(Path(path), arrays)
            print(f"written to {path}: {len(arrays)} arrays")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", help="a folder with program.json and constants.safetensors")
    parser.add_argument("--input", help=".npz file with one array per input")
    parser.add_argument("--output", help=".npz file to write the outputs to; a summary is printed anyway")
    parser.add_argument("--sites", help=".npz file to write the codes of every rounding op to, by site")
    parser.add_argument("--show", action="store_true", help="print inputs, outputs, ops (done without --input)")
    parser.add_argument("--exact", action="store_true", help="products in plain int64 (slow)")
    options = parser.parse_args(argv)
    if (options.output or options.sites) and not options.input:
        parser.error("there is nothing to write without --input FILE.npz")
    try:
        program = load(options.folder, options.exact)
        if options.show or not options.input:
            print(program.show())
        if options.input:
            run(program, options)
        else:
            print("nothing was run: give --input FILE.npz with one array per input, by the names above")
    except (ProgramError, OSError, ValueError, zipfile.BadZipFile) as err:
        print(f"run_int: {err}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
