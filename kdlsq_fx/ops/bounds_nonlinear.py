"""What softmax, layer norm, GELU and the mean can reach inside: the ``bounds`` rules of their ops.

As in bounds_integer.py. The names of the intermediates are those of docs/integer_primitives.md. Constants that belong
to an op come in by keyword, from where the op is declared.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from kdlsq_fx.ops.bounds_integer import (
    DIVISIBLE,
    SHIFTABLE,
    Ends,
    aligned,
    channels,
    hull,
    moved,
    of_shift,
    on_grid,
    rounded,
    shifted,
    times,
)
from kdlsq_fx.ranges import INT32_MAX, Array, Bound, Bounds, Interval

INT64_MAX = 2**63 - 1
EXP_ONE = 2**15  # about exp(0)
DIVIDER_MAX = 2**46 - 1
OUT_MULTIPLIER_MAX = 2**24 - 1


def softmax_bounds(
    x: Interval,
    keep: Interval | None,
    table: Interval | None,
    multiplier: int,
    shift: int,
    limit: int,
    divider: int,
    zero_point: int,
    qmin: int,
    qmax: int,
    *,
    i_exp: Callable[[Array], Array],
    lasts: tuple[int, int],
    longest: int,
) -> Bounds:
    """``lasts``: the last step of the table and of ``i_exp``; ``longest``: the row length the op itself lets pass."""
    length = longest if not x.sizes or x.sizes[-1] is None else min(x.sizes[-1], longest)
    u = 0, min(x.hi - x.lo, limit)
    product = times(u, (multiplier, multiplier))
    last = lasts[1] if table is None else lasts[0]
    reach = shifted(product, (shift, shift))
    d = min(max(reach[0], 0), last), min(max(reach[1], 0), last)
    e = _exponentials(table, d, i_exp)
    total = 1, max(length * e[1], 1)  # a row without a kept key is divided by 1
    entries = last + 1 if table is None or not table.sizes else table.sizes[0] or 0
    inside = (
        Bound("u", *u, limit=2**32),
        Bound("u * multiplier", *product, limit=SHIFTABLE),
        Bound("multiplier", multiplier, multiplier, limit=INT32_MAX, least=0),
        of_shift((shift, shift)),
        Bound("entries of the table", entries, entries, limit=last + 1, least=last + 1),
        Bound("e", *e, limit=EXP_ONE, least=0),
        Bound("e * divider", *times(e, (divider, divider)), limit=DIVISIBLE),
        Bound("divider", divider, divider, limit=DIVIDER_MAX, least=1),
        Bound("sum(e) * 2**22", total[0] << 22, total[1] << 22, limit=DIVISIBLE),
    )
    # e is one of the terms of the sum, so p is largest where it is the only one: e * divider / (e * 2**22).
    return on_grid((0, rounded(divider, 2**22)), zero_point, qmin, qmax, inside)


def _exponentials(table: Interval | None, d: Ends, i_exp: Callable[[Array], Array]) -> Ends:
    """What e can be for the steps ``d``, and 0 for a masked key."""
    if table is not None:
        reached = np.empty(0) if table.values is None else table.values[d[0] : d[1] + 1]
        return hull(((0, 0), (int(reached.min()), int(reached.max())) if reached.size else (table.lo, table.hi)))
    return hull(((0, 0), _of_polynomial(i_exp, d)))


@functools.cache
def _of_polynomial(i_exp: Callable[[Array], Array], d: Ends) -> Ends:
    """Every value of the polynomial, so nothing is assumed of its shape."""
    values = i_exp(np.arange(d[0], d[1] + 1, dtype=np.int64))
    return int(values.min()), int(values.max())


def layer_norm_bounds(
    x: Interval,
    gain: Interval,
    offset: Interval,
    fraction: int,
    eps: int,
    shift: int,
    zero_point: int,
    qmin: int,
    qmax: int,
    *,
    t_max: int,
    squares: Callable[[int, int, int, int], int],
) -> Bounds:
    """``t_max``: bound of ``|t|``; ``squares(n, lo, hi, fraction)``: bound of ``sum(y * y)``."""
    n = gain.sizes[-1] if gain.sizes else None
    if n is None:
        raise ValueError("its gain has no known length")
    total = (n * x.lo) << fraction, (n * x.hi) << fraction
    # y is largest where one code lies at one end and all others at the other end.
    top = (x.hi << fraction) - rounded(((n - 1) * x.lo + x.hi) << fraction, n)
    bottom = (x.lo << fraction) - rounded(((n - 1) * x.hi + x.lo) << fraction, n)
    v = eps, squares(n, x.lo, x.hi, fraction) + eps
    factor = 2**31  # 2**46 // r with r >= 2**15
    halves = [-((32 - max(e, 1).bit_length()) // 2) for e in v]
    scaled = [times((-t_max, t_max), g) for g in channels(gain)]
    sums = [(low + o[0], high + o[1]) for (low, high), o in aligned(scaled, channels(offset))]
    inside = (
        Bound("sum(x) << fraction", *total, limit=DIVISIBLE),
        Bound("fraction", fraction, fraction, limit=8, least=0),
        Bound("v", *v, limit=SHIFTABLE),
        Bound("eps", eps, eps, limit=SHIFTABLE, least=1),
        Bound("y * f", bottom * factor, top * factor, limit=SHIFTABLE),
        of_shift((22 + halves[0], 22 + halves[1]), "shift of y * f"),
        Bound("t * gain", *hull(scaled), limit=DIVISIBLE),
        Bound("t * gain + offset", *hull(sums), limit=DIVISIBLE),
        of_shift((shift, shift)),
    )
    return on_grid(hull(shifted(s, (shift, shift)) for s in sums), zero_point, qmin, qmax, inside)


def gelu_bounds(
    x: Interval,
    x_zero_point: int,
    multiplier: int,
    shift: int,
    out_multiplier: int,
    out_shift: int,
    zero_point: int,
    qmin: int,
    qmax: int,
    *,
    knee: int,
    height: int,
    fraction: int,
) -> Bounds:
    """``knee``: where the parabola ends (B); ``height``: C; ``fraction``: bits of ``t``.

    Left of the knee w is 0, so only codes between there and 0 count for the low end; it is up to 7 times as low as
    what GELU really reaches (0.17). The high end is reached.
    """
    real = moved(x, x_zero_point)
    product = times(real, (multiplier, multiplier))
    half = rounded(2 * height, 1 << fraction)
    left = -(((knee + 1) << max(shift, 0)) // max(multiplier, 1)) - 1  # below it t <= -knee, hence w = 0
    low, high = max(min(real[0], 0), left) * rounded(height, 1 << fraction), max(real[1], 0) * half
    out = times((low, high), (out_multiplier, out_multiplier))
    inside = (
        Bound("x * multiplier", *product, limit=SHIFTABLE),
        Bound("multiplier", multiplier, multiplier, limit=INT32_MAX, least=0),
        of_shift((shift, shift)),
        Bound("w", 0, 2 * height, limit=SHIFTABLE),
        Bound("x * w * out_multiplier", *out, limit=SHIFTABLE),
        Bound("out_multiplier", out_multiplier, out_multiplier, limit=OUT_MULTIPLIER_MAX, least=0),
        of_shift((out_shift, out_shift), "out_shift"),
    )
    return on_grid(shifted(out, (out_shift, out_shift)), zero_point, qmin, qmax, inside)


def mean_bounds(
    x: Interval,
    keep: Any,
    x_zero_point: int,
    multiplier: int,
    shift: int,
    zero_point: int,
    qmin: int,
    qmax: int,
    *,
    longest: int,
) -> Bounds:
    """``longest``: the number of tokens that the op itself lets pass."""
    known = x.sizes[1] if len(x.sizes) > 1 else None
    length = longest if known is None else min(known, longest)
    real = moved(x, x_zero_point)
    total = min(length * real[0], 0), max(length * real[1], 0)
    count = 1 << max(shift, 0), max(length, 1) << max(shift, 0)
    one = (multiplier, multiplier)
    inside = (
        Bound("s * multiplier", *times(total, one), limit=DIVISIBLE),
        Bound("multiplier", multiplier, multiplier, limit=INT32_MAX, least=0),
        Bound("n << shift", *count, limit=DIVISIBLE),
        of_shift((shift, shift)),
    )
    mean = hull(((0, 0), shifted(times(real, one), (shift, shift))))  # 0: no token is there
    return on_grid(mean, zero_point, qmin, qmax, inside)
