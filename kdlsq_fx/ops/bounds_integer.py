"""What products, look-ups, sums and requantization can reach: the ``bounds`` rules of their ops.

A rule takes the op's own arguments with an Interval for every tensor (None for floats) and computes in Python's
integers, which have no width of their own. docs/integer_primitives.md states the limits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from kdlsq_fx.ranges import INT32_MAX, Bound, Bounds, Interval

Ends = tuple[int, int]
SHIFTABLE = 2**62 - 1  # round_shift takes |v| < 2**62
DIVISIBLE = 2**61 - 1  # round_divide takes |n| and d < 2**61
MAX_SHIFT = 62


def rounded(n: int, d: int) -> int:
    """``n / d`` rounded half to even, for ``d > 0``."""
    floor, rest = divmod(n, d)
    return floor + (2 * rest > d or (2 * rest == d and floor % 2 == 1))


def times(a: Ends, b: Ends) -> Ends:
    """The products of two intervals."""
    corners = [x * y for x in a for y in b]
    return min(corners), max(corners)


def hull(parts: Iterable[Ends]) -> Ends:
    """The smallest interval around all of them."""
    lows, highs = zip(*parts)
    return min(lows), max(highs)


def shifted(v: Ends, shift: Ends) -> Ends:
    """``v / 2**shift``, rounded; a shift that is out of all range (and reported) counts as the nearest that is not."""
    units = [1 << min(max(s, 0), MAX_SHIFT) for s in shift]
    return hull((rounded(v[0], unit), rounded(v[1], unit)) for unit in units)


def channels(value: int | Interval) -> list[Ends]:
    """A multiplier or a shift as one interval, or as one a channel where it is a constant vector."""
    if isinstance(value, int):
        return [(value, value)]
    if value.values is None or value.values.ndim != 1:
        return [(value.lo, value.hi)]
    return [(v, v) for v in value.values.tolist()]


def aligned(*vectors: list[Ends]) -> list[tuple[Ends, ...]]:
    """Channel by channel; a vector of one serves all channels. ValueError where the numbers of channels differ."""
    count = max(len(v) for v in vectors)
    return list(zip(*(v * count if len(v) == 1 else v for v in vectors), strict=True))


def moved(x: Interval, zero_point: int) -> Ends:
    """The codes less their zero point."""
    return x.lo - zero_point, x.hi - zero_point


def on_grid(q: Ends, zero_point: int, qmin: int, qmax: int, inside: Sequence[Bound]) -> Bounds:
    """Codes: the zero point added, saturated."""
    lo, hi = (min(max(v + zero_point, qmin), qmax) for v in q)
    return Bounds(lo, hi, tuple(inside))


def of_shift(shift: Ends, name: str = "shift") -> Bound:
    """A shift must be one that round_shift takes."""
    return Bound(name, *shift, limit=MAX_SHIFT, least=1)


# Products of matrices


def linear_bounds(
    x: Interval, w: Interval, bias: Interval | None = None, x_zero_point: int = 0, bound: int = INT32_MAX
) -> Bounds:
    """From the actual codes of every row: its result, and what its partial sums reach in any order of the additions."""
    return _product_bounds(moved(x, x_zero_point), w, bias, bound)


def conv1d_bounds(
    x: Interval,
    w: Interval,
    bias: Interval | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
    x_zero_point: int = 0,
    bound: int = INT32_MAX,
) -> Bounds:
    """As :func:`linear_bounds`; where there is padding, its zeros are among what a window can hold."""
    ends = moved(x, x_zero_point)
    return _product_bounds(hull((ends, (0, 0))) if any(padding) else ends, w, bias, bound)


def _product_bounds(x: Ends, w: Interval, bias: Interval | None, bound: int) -> Bounds:
    if w.values is None:
        raise ValueError("its weight is no constant: nothing bounds its sums")
    rows = w.values.astype(np.int64).reshape(w.values.shape[0], -1)
    ups, downs = (part.sum(axis=1).tolist() for part in (np.maximum(rows, 0), np.minimum(rows, 0)))
    biases = [(0, 0)] if bias is None else channels(bias)
    results, partials = [(0, 0)] if not ups else [], [(0, 0)]
    for (up, _), (down, _), (b_low, b_high) in aligned(_points(ups), _points(downs), biases) if ups else ():
        results.append((up * x[0] + down * x[1] + b_low, up * x[1] + down * x[0] + b_high))
        # A partial sum leaves terms out: of every term, what lies on the other side of 0 may be missing.
        below, above = min(x[0], 0), max(x[1], 0)
        low, high = up * below + down * above, up * above + down * below
        partials.append((low + min(b_low, 0), high + max(b_high, 0)))
    reach = hull([*partials, *results])
    accumulator = Bound("accumulator", *reach, limit=INT32_MAX)
    stated = Bound("stated bound", bound, bound, limit=INT32_MAX, least=accumulator.largest)
    return Bounds(*hull(results), (accumulator, stated))


def _points(values: list[int]) -> list[Ends]:
    return [(v, v) for v in values]


def matmul_bounds(
    a: Interval, b: Interval, a_zero_point: int = 0, b_zero_point: int = 0, a_max: int = 255, b_max: int = 255
) -> Bounds:
    """The longest inner product: what its shape allows, or what the op itself lets pass when it runs."""
    left, right = moved(a, a_zero_point), moved(b, b_zero_point)
    longest = INT32_MAX // max(a_max * b_max, 1)
    known = a.sizes[-1] if a.sizes else None
    length = longest if known is None else min(known, longest)
    low, high = times(left, right)
    reach = min(length * low, 0), max(length * high, 0)
    inside = (
        Bound("accumulator", *reach, limit=INT32_MAX),
        Bound("a_max", a_max, a_max, limit=INT32_MAX, least=max(map(abs, left))),
        Bound("b_max", b_max, b_max, limit=INT32_MAX, least=max(map(abs, right))),
        Bound("longest inner product", longest, longest, limit=INT32_MAX, least=1),
    )
    return Bounds(*reach, inside)


def mul_bounds(a: Interval, b: Interval, a_zero_point: int = 0, b_zero_point: int = 0) -> Bounds:
    """One product of two codes, less their zero points."""
    product = times(moved(a, a_zero_point), moved(b, b_zero_point))
    return Bounds(*product, (Bound("product", *product, limit=INT32_MAX),))


# Look-ups


def embedding_bounds(table: Interval, ids: Interval | None) -> Bounds:
    """The entries of the table; whether an id lies in it is checked when the op runs."""
    return Bounds(table.lo, table.hi)


def lookup_bounds(codes: Interval, table: Interval, first: int) -> Bounds:
    """The entries that the codes reach."""
    low, high = moved(codes, first)
    entries = table.sizes[0] if table.sizes else None
    if entries is None:
        raise ValueError("its table has no known length")
    index = Bound("index", low, high, limit=entries - 1, least=0)
    if table.values is None or not index.fits:
        return Bounds(table.lo, table.hi, (index,))
    reached = table.values[low : high + 1]
    return Bounds(int(reached.min()), int(reached.max()), (index,))


# Fixed point


def requantize_bounds(
    acc: Interval,
    multiplier: int | Interval,
    shift: int | Interval,
    zero_point: int,
    qmin: int,
    qmax: int,
    axis: int = -1,
) -> Bounds:
    """Channel by channel, as multipliers and shifts belong together."""
    factors, shifts = channels(multiplier), channels(shift)
    products = [times((acc.lo, acc.hi), m) for m in factors]
    inside = (
        Bound("acc * multiplier", *hull(products), limit=SHIFTABLE),
        Bound("multiplier", *hull(factors), limit=INT32_MAX, least=0),
        of_shift(hull(shifts)),
    )
    return on_grid(hull(shifted(p, s) for p, s in aligned(products, shifts)), zero_point, qmin, qmax, inside)


def add_bounds(
    terms: Sequence[Interval],
    multipliers: Sequence[int | Interval],
    zero_points: Sequence[int],
    shift: int,
    zero_point: int,
    qmin: int,
    qmax: int,
    axis: int = -1,
) -> Bounds:
    """The sum channel by channel, and its partial sums in any order."""
    scaled = [
        [times(moved(t, z), m) for m in channels(factor)]
        for t, factor, z in zip(terms, multipliers, zero_points, strict=True)
    ]
    sums = [_sum(parts) for parts in aligned(*scaled)]
    partials = hull(_sum([(min(low, 0), max(high, 0)) for low, high in parts]) for parts in aligned(*scaled))
    each = [Bound(f"term {i} * multiplier", *hull(parts), limit=SHIFTABLE) for i, parts in enumerate(scaled)]
    inside = (*each, Bound("sum", *partials, limit=SHIFTABLE), of_shift((shift, shift)))
    return on_grid(shifted(hull(sums), (shift, shift)), zero_point, qmin, qmax, inside)


def _sum(parts: Iterable[Ends]) -> Ends:
    lows, highs = zip(*parts)
    return sum(lows), sum(highs)


def quantize_bounds(x: Any, scale: Any, zero_point: int, qmin: int, qmax: int, axis: int | None = None) -> Bounds:
    """Floats enter: all codes of the grid."""
    return Bounds(qmin, qmax)
