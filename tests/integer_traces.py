"""The integer primitives in Python's own integers, with everything they compute inside laid open.

Written from docs/integer_primitives.md. Arrays of dtype object hold Python integers, which never wrap. Every function
takes an op's own arguments (NumPy arrays) and returns (result, {name of an intermediate: its values}).
"""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt
from typing import Any

import numpy as np

Trace = tuple[Any, dict[str, Any]]
isqrts = np.frompyfunc(isqrt, 1, 1)
bit_lengths = np.frompyfunc(lambda v: v.bit_length(), 1, 1)


def wide(x: Any, zero_point: int = 0) -> Any:
    return np.asarray(x).astype(object) - zero_point


def half_even(n: Any, d: Any) -> Any:
    floor = n // d
    twice = 2 * (n - floor * d)
    return floor + np.where((twice > d) | ((twice == d) & (floor % 2 == 1)), 1, 0)


def codes(q: Any, zero_point: int, qmin: int, qmax: int) -> Any:
    return np.clip(q + zero_point, qmin, qmax)


def along(v: Any, rank: int, axis: int) -> Any:
    v = np.asarray(v).astype(object)
    return np.moveaxis(v.reshape(v.shape + (1,) * (rank - 1)), 0, axis) if v.ndim == 1 else v


def sums(terms: Any, bias: Any = 0) -> Trace:
    """Over the last axis; partial sums in the order given, and with the terms of either sign first."""
    ups, downs = (np.where(keep, terms, 0).sum(-1) for keep in (terms > 0, terms < 0))
    b = np.asarray(bias).astype(object)
    partial = [np.cumsum(terms, axis=-1), ups + np.maximum(b, 0), downs + np.minimum(b, 0)]
    return terms.sum(-1) + b, {"accumulator": np.concatenate([np.ravel(p) for p in partial])}


def int_linear(x: Any, w: Any, bias: Any = None, x_zero_point: int = 0, bound: int = 0) -> Trace:
    return sums(wide(x, x_zero_point)[..., None, :] * wide(w), 0 if bias is None else bias)


def int_matmul(a: Any, b: Any, a_zero_point: int = 0, b_zero_point: int = 0, a_max: int = 0, b_max: int = 0) -> Trace:
    return sums(wide(a, a_zero_point)[..., :, None, :] * np.swapaxes(wide(b, b_zero_point), -1, -2)[..., None, :, :])


def int_conv1d(
    x: Any, w: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: int, x_zero_point: int, bound: int = 0
) -> Trace:
    (out, per_group, taps), side = w.shape, padding[0]
    x = np.pad(wide(x, x_zero_point), ((0, 0), (0, 0), (side, side)))
    starts = range(0, x.shape[2] - (taps - 1) * dilation[0], stride[0])
    rows = []
    for o in range(out):
        first = o // (out // groups) * per_group
        windows = [x[:, first : first + per_group, s : s + (taps - 1) * dilation[0] + 1 : dilation[0]] for s in starts]
        rows.append(np.stack([(window * wide(w[o])).reshape(len(x), -1) for window in windows], axis=1))
    terms = np.stack(rows, axis=1)  # [n, out, length, terms]
    return sums(terms, 0 if bias is None else np.asarray(bias)[:, None])


def int_mul(a: Any, b: Any, a_zero_point: int = 0, b_zero_point: int = 0) -> Trace:
    product = wide(a, a_zero_point) * wide(b, b_zero_point)
    return product, {"product": product}


def int_embedding(table: Any, ids: Any) -> Trace:
    return wide(table)[ids], {}


def lookup(x: Any, table: Any, first: int) -> Trace:
    index = wide(x, first)
    return wide(table)[index.astype(np.int64)], {"index": index}


def requantize(acc: Any, multiplier: Any, shift: Any, zero_point: int, qmin: int, qmax: int, axis: int = -1) -> Trace:
    m, n = (along(v, np.ndim(acc), axis) for v in (multiplier, shift))
    product = wide(acc) * m
    return codes(half_even(product, 2**n), zero_point, qmin, qmax), {"acc * multiplier": product}


def int_add(
    terms: Any, multipliers: Any, zero_points: Any, shift: int, zero_point: int, qmin: int, qmax: int, axis: int = -1
) -> Trace:
    scaled = [wide(t, z) * along(m, np.ndim(t), axis) for t, m, z in zip(terms, multipliers, zero_points)]
    total, partials = sums(np.stack(np.broadcast_arrays(*scaled), axis=-1))
    inside = {f"term {i} * multiplier": t for i, t in enumerate(scaled)} | {"sum": partials["accumulator"]}
    return codes(half_even(total, 2**shift), zero_point, qmin, qmax), inside


LN2, A, B, C = 11357, 11736, 44357, 749502595  # of the specification's i-exp


def exponentials(d: Any, table: Any) -> Any:
    if table is not None:
        return wide(table)[d.astype(np.int64)]
    z = d // LN2
    p = z * LN2 - d
    return ((p * (p + B) + C) // 2**z * A) // 2**28


def int_softmax(
    x: Any, keep: Any, table: Any, multiplier: int, shift: int, limit: int, divider: int, zp: int, qmin: int, qmax: int
) -> Trace:
    keep = np.broadcast_to(True if keep is None else keep, np.shape(x))
    x = wide(x)
    largest = np.where(keep, x, -(2**31)).max(-1, keepdims=True)
    u = np.where(keep, np.minimum(largest - x, limit), 0)
    last = 2**18 - 1 if table is None else 2**14 - 1
    e = np.where(keep, exponentials(np.minimum(half_even(u * multiplier, 2**shift), last), table), 0)
    total = np.maximum(e.sum(-1, keepdims=True), 1) * 2**22
    inside = {"u": u, "u * multiplier": u * multiplier, "e": e, "e * divider": e * divider, "sum(e) * 2**22": total}
    return codes(half_even(e * divider, total), zp, qmin, qmax), inside


def int_layer_norm(
    x: Any, gain: Any, offset: Any, fraction: int, eps: int, shift: int, zero_point: int, qmin: int, qmax: int
) -> Trace:
    gain, offset = wide(gain), wide(offset)
    total = wide(x).sum(-1, keepdims=True) * 2**fraction
    y = wide(x) * 2**fraction - half_even(total, np.shape(x)[-1])
    v = (y * y).sum(-1, keepdims=True) + eps
    h = -((32 - bit_lengths(v)) // 2)
    f = 2**46 // isqrts(v * 4 ** np.maximum(-h, 0) // 4 ** np.maximum(h, 0))
    t = half_even(y * f, 2 ** (22 + h))
    inside = {"sum(x) << fraction": total, "y": y, "v": v, "y * f": y * f, "shift of y * f": 22 + h}
    inside |= {"t * gain": t * gain, "t * gain + offset": t * gain + offset}
    return codes(half_even(t * gain + offset, 2**shift), zero_point, qmin, qmax), inside


def int_gelu(
    x: Any, x_zp: int, multiplier: int, shift: int, out_multiplier: int, out_shift: int, zp: int, qmin: int, qmax: int
) -> Trace:
    knee, height = 7246, 58092853  # rint(1.769 * 2**12), rint(2**24 / 0.2888)
    x = wide(x, x_zp)
    t = half_even(x * multiplier, 2**shift)
    s = np.minimum(np.abs(t), knee) - knee
    w = np.sign(t) * (height - s * s) + height
    out = x * half_even(w, 2**12) * out_multiplier
    inside = {"x * multiplier": x * multiplier, "w": w, "x * w * out_multiplier": out}
    return codes(half_even(out, 2**out_shift), zp, qmin, qmax), inside


def int_mean(
    x: Any, keep: Any, x_zero_point: int, multiplier: int, shift: int, zero_point: int, qmin: int, qmax: int
) -> Trace:
    s = np.where(keep[:, :, None], wide(x, x_zero_point), 0).sum(1)
    n = np.maximum(keep.sum(1).astype(object), 1)[:, None] * 2**shift
    q = codes(half_even(s * multiplier, n), zero_point, qmin, qmax)
    return q, {"s * multiplier": s * multiplier, "n << shift": n}


TRACES: dict[str, Callable[..., Trace]] = {
    f.__name__: f
    for f in (
        int_linear,
        int_matmul,
        int_conv1d,
        int_mul,
        int_embedding,
        lookup,
        requantize,
        int_add,
        int_softmax,
        int_layer_norm,
        int_gelu,
        int_mean,
    )
}
