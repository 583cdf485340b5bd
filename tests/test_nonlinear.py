"""The integer non-linear primitives against Python's exact integers, written again here from the specification.

Nothing below reads a helper or a constant of the ops: docs/integer_primitives.md is the only source. The references
assert the bounds that page states, so a case that reaches one shows both that it holds and that 64 bits do not wrap.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kdlsq_fx.errors import InputError
from kdlsq_fx.ops.fixed_point import dyadic, numpy_round_divide, numpy_round_shift, round_divide, round_shift
from kdlsq_fx.ops.int_gelu import gelu_constants, int_gelu, numpy_int_gelu
from kdlsq_fx.ops.int_mean import int_mean, mean_constants, numpy_int_mean
from kdlsq_fx.ops.int_norm import i_sqrt, int_layer_norm, norm_constants, numpy_i_sqrt, numpy_int_layer_norm
from kdlsq_fx.ops.int_softmax import exp_table, int_softmax, numpy_int_softmax, prob_divider, score_grid

torch.set_num_threads(1)

INT8, UINT8, INT16, INT22 = (-128, 127), (0, 255), (-(2**15), 2**15 - 1), (-(2**21), 2**21 - 1)
INT32_LOW, INT32_HIGH = -(2**31), 2**31 - 1
ends = st.sampled_from([INT8, UINT8, INT16, INT22])
seeds = st.integers(0, 2**32 - 1)
steps = st.floats(2.0**-24, 2.0**6)


def shifted(value: int, n: int) -> int:
    """round_shift: Python's round of a Fraction is exact and half to even."""
    assert abs(value) < 2**62 and 1 <= n <= 62
    return round(Fraction(value, 2**n))


def divided(n: int, d: int) -> int:
    assert abs(n) < 2**61 and 0 < d < 2**61
    return round(Fraction(n, d))


def clamped(value: int, zero_point: int, ends: tuple[int, int]) -> int:
    return min(max(value + zero_point, ends[0]), ends[1])


def same(torch_form: Any, numpy_form: Any, arrays: Sequence[np.ndarray | None], ints: Sequence[int], want: Any) -> None:
    """Both forms give exactly ``want``, in one dtype, and leave their operands alone."""
    before = [None if a is None else a.copy() for a in arrays]
    got = torch_form(*(None if a is None else torch.from_numpy(a) for a in arrays), *ints)
    other = numpy_form(*arrays, *ints)
    assert str(got.dtype) == f"torch.{other.dtype}"
    np.testing.assert_array_equal(other, want)
    np.testing.assert_array_equal(got.numpy(), want)
    for a, b in zip(arrays, before):
        np.testing.assert_array_equal(a, b)


# ---- rounding


@given(st.integers(-(2**61) + 1, 2**61 - 1), st.integers(1, 2**61 - 1))
@example(2**61 - 1, 2**61 - 1)
@example(-(2**61) + 1, 2**61 - 1)
@example(2**61 - 1, 1)
@example(-(2**61) + 1, 2)
def test_round_divide_is_half_to_even(n: int, d: int) -> None:
    want = divided(n, d)
    assert int(round_divide(torch.tensor([n]), d)) == want
    assert int(round_divide(torch.tensor([n]), torch.tensor([d]))) == want
    assert int(numpy_round_divide(np.array([n]), d)[0]) == want
    assert int(numpy_round_divide(np.array([n]), np.array([d]))[0]) == want


@given(st.integers(-(2**30), 2**30), st.integers(1, 2**29), st.integers(-1, 1))
def test_round_divide_around_ties(floor: int, half: int, off: int) -> None:
    n, d = floor * 2 * half + half + off, 2 * half
    want = divided(n, d)
    assert int(round_divide(torch.tensor([n]), d)) == want
    assert int(numpy_round_divide(np.array([n]), d)[0]) == want


def test_round_divide_of_every_small_pair() -> None:
    n, d = np.arange(-300, 301)[:, None], np.arange(1, 130)[None]
    want = [[divided(int(a), int(b)) for b in d[0]] for a in n[:, 0]]
    assert numpy_round_divide(n, d).tolist() == want
    assert round_divide(torch.from_numpy(n), torch.from_numpy(d)).tolist() == want


@pytest.mark.parametrize("n", [1, 2, 31, 61, 62])
def test_round_shift_at_its_ends(n: int) -> None:
    values = [s * (2**k + o) for s in (-1, 1) for k in (0, n - 1, min(n, 61), 61) for o in (-1, 0, 1)]
    values = [v for v in (*values, 2**62 - 1, 1 - 2**62, 0) if abs(v) < 2**62]
    want = [shifted(v, n) for v in values]
    assert round_shift(torch.tensor(values), n).tolist() == want
    assert round_shift(torch.tensor(values), torch.tensor([n])).tolist() == want
    assert numpy_round_shift(np.array(values), n).tolist() == want


@given(st.floats(2.0**-70, 2.0**9), st.integers(12, 31), st.integers(20, 62))
def test_dyadic_of_fewer_bits(ratio: float, bits: int, max_shift: int) -> None:
    multiplier, shift = dyadic(ratio, bits, max_shift)
    assert 0 <= multiplier < 2**bits and 1 <= shift <= max_shift
    error = abs(Fraction(multiplier, 2**shift) - Fraction(ratio))
    assert error <= max(Fraction(ratio) / 2**bits, Fraction(1, 2 ** (max_shift + 1)))


# ---- i_sqrt


def test_i_sqrt_around_every_square() -> None:
    """All n < 2**32 follow: with one start (one bit length) a step is monotone in n and in x, so between two squares
    the largest n is the last to arrive, and Newton's steps from above never pass floor(sqrt(n))."""
    k = np.arange(1, 2**16, dtype=np.int64)
    lengths = 2 ** np.arange(33, dtype=np.int64)
    n = np.concatenate([k * k - 1, k * k, k * k + 1, [2**32 - 1, 2**32 - 2], lengths - 1, lengths[:-1]])
    want = np.concatenate([k - 1, k, np.where(k == 0, 1, k), [2**16 - 1] * 2])
    want = np.concatenate([want, [math.isqrt(int(v)) for v in (*(lengths - 1), *lengths[:-1])]])
    np.testing.assert_array_equal(i_sqrt(torch.from_numpy(n)).numpy(), want)
    np.testing.assert_array_equal(numpy_i_sqrt(n), want)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
def test_i_sqrt_anywhere(n: list[int]) -> None:
    want = [math.isqrt(v) for v in n]
    assert i_sqrt(torch.tensor(n)).tolist() == want == numpy_i_sqrt(np.array(n)).tolist()


# ---- softmax


@functools.cache
def decimal_table() -> list[int]:
    with localcontext() as context:
        context.prec = 30
        return [round((Decimal(-d) / 1024).exp() * 2**15) for d in range(2**14)]


@functools.cache
def polynomial_constants() -> list[int]:
    with localcontext() as context:
        context.prec = 30
        a, b = Decimal("0.35815147"), Decimal("0.96963238")
        return [round(v) for v in (Decimal(2).ln() * 2**14, b / a * 2**14, 2**28 / a, a * 2**15)]


def exp_polynomial(d: int) -> int:
    ln2, big_b, big_c, big_a = polynomial_constants()
    z = d // ln2
    p = z * ln2 - d
    assert -ln2 < p <= 0 and z <= 23
    return (((p * (p + big_b) + big_c) >> z) * big_a) >> 28


def softmax_row(row: list[int], keep: list[bool], use_table: bool, ints: Sequence[int]) -> list[int]:
    multiplier, shift, limit, divider, zero_point, *qrange = ints
    last = 2**14 - 1 if use_table else 2**18 - 1
    kept = [x for x, k in zip(row, keep) if k]
    exps = []
    for x, k in zip(row, keep):
        if not k:
            exps.append(0)
            continue
        u = min(max(kept) - x, limit)
        assert u >= 0 and u * multiplier < 2**60
        d = min(shifted(u * multiplier, shift), last)
        exps.append(decimal_table()[d] if use_table else exp_polynomial(d))
    total = sum(exps)
    if not kept:
        return [clamped(0, zero_point, tuple(qrange))] * len(row)  # type: ignore[arg-type]
    return [clamped(divided(e * divider, total * 2**22), zero_point, tuple(qrange)) for e in exps]  # type: ignore[arg-type]


def check_softmax(x: np.ndarray, keep: np.ndarray | None, use_table: bool, ints: Sequence[int]) -> np.ndarray:
    there = np.ones_like(x, dtype=bool) if keep is None else np.broadcast_to(keep, x.shape)
    rows = zip(x.reshape(-1, x.shape[-1]).tolist(), there.reshape(-1, x.shape[-1]).tolist())
    want = np.array([softmax_row(r, k, use_table, ints) for r, k in rows]).reshape(x.shape)
    table = exp_table().numpy() if use_table else None
    same(int_softmax, numpy_int_softmax, [x, keep, table], ints, want)
    return want


def test_exp_table_is_correctly_rounded() -> None:
    assert exp_table().dtype == torch.int32
    assert exp_table().tolist() == decimal_table()


scales = st.one_of(st.floats(2.0**-50, 2.0**12), st.floats(2.0**-20, 2.0**-4))
wide_scales = st.floats(2.0**-29, 2.0**-23)  # here the product of difference and multiplier is largest
lengths = st.one_of(st.integers(1, 12), st.sampled_from([64, 511, 512]))


fine_steps = st.one_of(st.sampled_from([1 / 255, 1 / 127, 2.0**-15, 2.0**-22]), st.floats(2.0**-16, 1.0))


@settings(deadline=None)
@given(seeds, lengths, scales, st.booleans(), fine_steps, st.integers(-3, 130), ends)
def test_int_softmax_equals_python(
    seed: int, n: int, scale: float, table: bool, scale_p: float, zero_point: int, qrange: tuple[int, int]
) -> None:
    rng = np.random.default_rng(seed)
    spread = int(rng.choice([1, 50, 2**12, 2**20, 2**31 - 1]))
    x = rng.integers(-spread, spread, (2, 3, n), endpoint=True).astype(np.int32)
    keep = [None, rng.random((2, 1, n)) < 0.7, rng.random((n,)) < 0.5][int(rng.integers(3))]
    check_softmax(x, keep, table, [*score_grid(scale, table=table), prob_divider(scale_p), zero_point, *qrange])


@pytest.mark.parametrize("table", [True, False])
def test_int_softmax_at_every_step(table: bool) -> None:
    """Rows of two keys, d steps apart: the result tells the exponential of d."""
    fraction, steps = (10, 2**14) if table else (14, 2**18)
    d = np.arange(steps + 3)
    exps = [decimal_table()[min(k, steps - 1)] if table else exp_polynomial(min(k, steps - 1)) for k in d.tolist()]
    x = np.stack([d, np.zeros_like(d)], 1).astype(np.int32)
    divider = 2**38
    want = [[round(Fraction(e * divider, (exps[0] + other) << 22)) for e in (exps[0], other)] for other in exps]
    ints = [*score_grid(2.0**-fraction, table=table), divider, 0, 0, 2**31 - 1]
    same(int_softmax, numpy_int_softmax, [x, None, exp_table().numpy() if table else None], ints, want)


@pytest.mark.parametrize("table", [True, False])
@pytest.mark.parametrize("n", [1, 2, 512])
def test_int_softmax_of_special_rows(table: bool, n: int) -> None:
    ints = [*score_grid(1e-3, table=table), prob_divider(1 / 255), 0, *UINT8]
    x = np.random.default_rng(n).integers(INT32_LOW, INT32_HIGH, (1, n), endpoint=True).astype(np.int32)
    none, one = np.zeros((1, n), bool), np.eye(1, n, n // 2, dtype=bool)
    assert not check_softmax(x, none, table, ints).any()
    np.testing.assert_array_equal(check_softmax(x, one, table, ints), one * 255)
    assert (check_softmax(np.full((1, n), -7, np.int32), None, table, ints) == round(Fraction(255, n))).all()
    low_kept = np.full((1, n), INT32_HIGH, np.int32)  # masked keys above every kept one
    low_kept[0, 0] = INT32_LOW
    assert check_softmax(low_kept, np.eye(1, n, dtype=bool), table, ints)[0, 0] == 255


@pytest.mark.parametrize("table", [True, False])
def test_int_softmax_at_its_bounds(table: bool) -> None:
    """The widest difference of scores, the largest multiplier, the largest shift, the largest divider."""
    x = np.array([[INT32_LOW, INT32_HIGH, 0, -1, INT32_HIGH - 1], [INT32_LOW] * 4 + [INT32_LOW + 1]], np.int32)
    reached = 0
    for scale in (2.0**-50, 2.0**-31, 2.0**-27, 2.0**-26, 2.0**-24 * (1 - 2.0**-31), 2.0**-18, 1.0, 2.0**14, 2.0**-60):
        multiplier, shift, limit = score_grid(scale, table=table)
        reached = max(reached, min(2**32 - 1, limit) * multiplier)
        check_softmax(x, None, table, [multiplier, shift, limit, 2**46 - 1, 0, INT32_LOW, INT32_HIGH])
    assert reached > 2 ** (57 if table else 58)


def test_int_softmax_of_too_long_rows() -> None:
    row = torch.zeros(1, dtype=torch.int32).expand(2**20 + 1)
    for form, x in ((int_softmax, row), (numpy_int_softmax, row.numpy())):
        with pytest.raises(InputError, match="keys"):
            form(x, None, None, *score_grid(1.0, table=False), 255 << 22, 0, 0, 255)  # type: ignore[operator]


@given(st.one_of(scales, wide_scales), st.booleans())
def test_score_grid_holds_its_bounds(scale: float, table: bool) -> None:
    multiplier, shift, limit = score_grid(scale, table=table)
    fraction, last = (10, 2**14 - 1) if table else (14, 2**18 - 1)
    ratio = Fraction(scale) * 2**fraction
    assert shift <= 44 and 0 <= multiplier < 2**31 and limit <= 2**32
    assert abs(Fraction(multiplier, 2**shift) - ratio) <= max(ratio / 2**31, Fraction(1, 2 ** (45 if table else 42)))
    assert limit * multiplier < 2**60
    assert limit == 2**32 or shifted(limit * multiplier, shift) > last  # cutting there changes no exponential


def test_constants_refuse_what_does_not_fit() -> None:
    for bad in (0.0, -1.0, math.nan, math.inf):
        for make in (lambda s: score_grid(s, table=True), prob_divider, lambda s: gelu_constants(s, 1.0)):
            with pytest.raises(ValueError):
                make(bad)
    for scale_p in (2.0**-24, 2.0**23):
        with pytest.raises(ValueError, match="step of probabilities"):
            prob_divider(scale_p)
    with pytest.raises(ValueError, match="bits for its multiplier"):
        mean_constants(1.0, 1.0, 2**20, 2**31)


@pytest.mark.parametrize("table", [True, False])
def test_int_softmax_is_a_softmax(table: bool) -> None:
    x = np.random.default_rng(0).normal(0, 4, (200, 64)) / 1e-3
    real = torch.softmax(torch.from_numpy(np.rint(x) * 1e-3), -1).numpy()
    grid, ints = score_grid(1e-3, table=table), (0, *UINT8)
    table_or_none = exp_table() if table else None
    codes = int_softmax(torch.from_numpy(np.rint(x).astype(np.int32)), None, table_or_none, *grid, 255 << 22, *ints)
    assert np.abs(codes.numpy() - real * 255).max() < (0.7 if table else 1.0)  # half a code is the last rounding


# ---- layer norm


def norm_row(row: list[int], gain: list[int], offset: list[int], ints: Sequence[int]) -> list[int]:
    fraction, eps, shift, zero_point, *qrange = ints
    mean = divided(sum(row) << fraction, len(row))
    y = [(x << fraction) - mean for x in row]
    v = sum(a * a for a in y) + eps
    assert 1 <= v < 2**62
    h = math.ceil((v.bit_length() - 32) / 2)
    r = math.isqrt(v >> 2 * h if h >= 0 else v << -2 * h)
    assert 2**15 <= r < 2**16
    f = 2**46 // r
    out = []
    for a, g, o in zip(y, gain, offset):
        t = shifted(a * f, 46 + h - 24)
        assert abs(t) <= 2**24 + 2**10 and abs(t * g) + abs(o) < 2**61
        out.append(clamped(shifted(t * g + o, shift), zero_point, tuple(qrange)))  # type: ignore[arg-type]
    return out


def check_norm(x: np.ndarray, gain: np.ndarray, offset: np.ndarray, ints: Sequence[int]) -> np.ndarray:
    want = np.array([norm_row(r, gain.tolist(), offset.tolist(), ints) for r in x.tolist()])
    same(int_layer_norm, numpy_int_layer_norm, [x, gain, offset], ints, want)
    return want


def norm_rows(rng: np.random.Generator, n: int, low: int, high: int) -> np.ndarray:
    """Spread over the whole range, at its ends, narrow, one outlier, one code apart, equal."""
    middle = int(rng.integers(low + 1, high))
    rows = rng.integers(low, high, (6, n), endpoint=True)
    rows[1] = rng.choice([low, high], n)
    rows[2] = np.clip(middle + rng.integers(-2, 3, n), low, high)
    rows[3:] = middle
    rows[3, int(rng.integers(n))] = rng.choice([low, high])
    rows[4, int(rng.integers(n))] += 1
    return rows.astype(np.int32)


widths = st.one_of(st.integers(1, 9), st.sampled_from([32, 384, 768, 1000, 1024]))


@settings(deadline=None, max_examples=60)
@given(
    seeds,
    widths,
    st.sampled_from([INT8, (0, 200), INT16, INT22]),
    steps,
    steps,
    st.sampled_from([0.0, 1e-12, 1e-5]),
    ends,
)
def test_int_layer_norm_equals_python(
    seed: int, n: int, codes: tuple[int, int], scale_x: float, scale_out: float, eps: float, qrange: tuple[int, int]
) -> None:
    rng = np.random.default_rng(seed)
    gamma = rng.normal(0, 1, n) * rng.choice([0.0, 1e-9, 1.0, 1.0, 1e4], n)
    beta = rng.normal(0, 1, n) * rng.choice([0.0, 1e-6, 1.0, 1e3])
    c = norm_constants(gamma, beta, n, scale_x, scale_out, eps, *codes)
    ints = [c.fraction, c.eps, c.shift, int(rng.integers(-9, 9)), *qrange]
    check_norm(norm_rows(rng, n, *codes), c.gain.numpy(), c.offset.numpy(), ints)


def test_int_layer_norm_at_its_bounds() -> None:
    """Half a row at one end of 22 bits, half at the other: v a hair below 2**62; gain and offset to 2**61."""
    n, (low, high) = 1024, INT22
    x = np.array([[low] * 512 + [high] * 512, [low] * 1023 + [high], [low] + [high] * 1023], np.int32)
    c = norm_constants(torch.full((n,), -3.0), None, n, 1e-5, 0.02, 1e-12, low, high)
    assert c.fraction == 5
    y = (x.astype(object) << 5) - np.array([[divided(int(r.sum()) << 5, n)] for r in x.astype(object)], dtype=object)
    assert 2**62 - 2**43 < (y * y).sum(1).max() < 2**62
    check_norm(x, c.gain.numpy(), c.offset.numpy(), [c.fraction, c.eps, c.shift, 0, *INT8])
    edge = (2**61 - 1) // (2**24 + 2**10)
    gain = np.array([edge, -edge] * 512)
    for shift in (1, 30, 56):
        check_norm(x, gain, np.zeros(n, np.int64), [5, 1, shift, 0, INT32_LOW, INT32_HIGH])
        check_norm(x, np.zeros(n, np.int64), np.array([2**61 - 1, 1 - 2**61] * 512), [5, 1, shift, 0, *INT22])


@pytest.mark.parametrize("bits", range(4, 62))
def test_int_layer_norm_at_every_length_of_v(bits: int) -> None:
    """v = 2**bits - 1, 2**bits, 2**bits + 1: where a length taken from a rounded float would be wrong."""
    k = math.isqrt(2 ** (bits - 3))
    x, gain = np.array([[k, -k]], np.int32), np.array([2**30, 3 * 2**28])
    for v in (2**bits - 1, 2**bits, 2**bits + 1):
        check_norm(x, gain, np.zeros(2, np.int64), [0, v - 2 * k * k, 30, 0, INT32_LOW, INT32_HIGH])


def test_the_largest_t_stays_in_its_bound() -> None:
    """One outlier in a long row makes |y| nearly sqrt(v); roots just below a whole number lose most in their floor."""
    gain, offset = np.full(1024, 2**30), np.zeros(1024, np.int64)
    largest = 0
    for outlier in range(2**15 + 1, 2**15 + 400):
        x = np.zeros((1, 1024), np.int32)
        x[0, 3] = outlier
        found = check_norm(x, gain, offset, [0, 1, 30, 0, INT32_LOW, INT32_HIGH])
        largest = max(largest, int(np.abs(found).max()))
    assert 2**24 * 0.999 < largest <= 2**24 + 2**10


def test_equal_codes_give_the_offset() -> None:
    beta = np.array([1.0, -0.5, 0.0, 3.0])
    c = norm_constants(None, beta, 4, 1e-3, 0.01, 1e-12, *INT22)
    x = np.array([[v] * 4 for v in (*INT22, 0, 12345)], np.int32)
    found = check_norm(x, c.gain.numpy(), c.offset.numpy(), [c.fraction, c.eps, c.shift, 5, *INT16])
    np.testing.assert_array_equal(found, [(beta * 100 + 5).astype(int)] * 4)


@settings(deadline=None)
@given(seeds, widths, st.sampled_from([INT8, INT16, INT22]), steps, steps, st.sampled_from([0.0, 1e-12, 1e-5, 1.0]))
def test_norm_constants_are_the_largest_that_fit(
    seed: int, n: int, codes: tuple[int, int], scale_x: float, scale_out: float, eps: float
) -> None:
    rng = np.random.default_rng(seed)
    gamma, beta = rng.normal(0, 1, n), rng.normal(0, 1, n)
    c = norm_constants(gamma, beta, n, scale_x, scale_out, eps, *codes)
    assert c.gain.dtype == c.offset.dtype == torch.int64

    def fits(shift: int) -> bool:
        g = [round(Fraction(float(v)) * Fraction(math.sqrt(n)) / Fraction(scale_out) * 2**shift / 2**24) for v in gamma]
        o = [round(Fraction(float(v)) / Fraction(scale_out) * 2**shift) for v in beta]
        return all((2**24 + 2**10) * abs(a) + abs(b) < 2**61 for a, b in zip(g, o))

    assert fits(c.shift) and (c.shift == 56 or not fits(c.shift + 1))
    assert abs(c.eps - max(1, eps * n * 4**c.fraction / scale_x**2)) <= 0.5 + 1e-15 * c.eps
    for got, real in ((c.gain, gamma * math.sqrt(n) / 2**24), (c.offset, beta)):
        np.testing.assert_allclose(got.numpy(), real / scale_out * 2.0**c.shift, rtol=1e-15, atol=0.51)
    if c.fraction < 8:  # one more bit, and the widest row would reach 2**62
        span, square = (codes[1] - codes[0]) << (c.fraction + 1), Fraction(eps) * n * 4 ** (c.fraction + 1)
        assert Fraction(n * span * span, 4) + square / Fraction(scale_x) ** 2 + n / 4 + 1 >= 2**62


def test_norm_constants_say_why_not() -> None:
    ok: dict[str, Any] = {"n": 4, "scale_x": 1.0, "scale_out": 1.0, "eps": 1e-12, "x_lo": -128, "x_hi": 127}
    nan = np.array([1.0, math.nan, 0, 0])
    cases = [
        ((nan, None), {}, "NaN"),
        ((None, nan), {}, "NaN"),
        ((None, None), {"scale_out": 0.0}, "result"),
        ((None, None), {"scale_x": math.inf}, "input"),
        ((None, None), {"x_lo": INT32_LOW, "x_hi": INT32_HIGH}, "62 bits"),
        ((None, None), {"eps": 1e20}, "62 bits"),
        ((np.full(4, 1e300), None), {"scale_out": 1e-300}, "no fraction"),
        ((None, np.full(4, 1e20)), {}, "no fraction"),
    ]
    for args, change, why in cases:
        with pytest.raises(ValueError, match=why):
            norm_constants(*args, **{**ok, **change})


def test_int_layer_norm_is_a_layer_norm() -> None:
    rng = np.random.default_rng(1)
    x = rng.integers(*INT22, (50, 384)).astype(np.int32)
    gamma, beta = rng.normal(0, 1, 384), rng.normal(0, 1, 384)
    c = norm_constants(gamma, beta, 384, 1e-5, 0.03, 1e-12, *INT22)
    got = int_layer_norm(torch.from_numpy(x), c.gain, c.offset, c.fraction, c.eps, c.shift, 0, *INT16).numpy()
    weight, bias = torch.from_numpy(gamma), torch.from_numpy(beta)
    real = torch.layer_norm(torch.from_numpy(x).double() * 1e-5, [384], weight, bias, 1e-12).numpy() / 0.03
    assert np.abs(got - real).max() < 0.51


# ---- GELU


def gelu_code(x: int, ints: Sequence[int]) -> int:
    x_zero_point, multiplier, shift, out_multiplier, out_shift, zero_point, *qrange = ints
    big_b, big_c = round(Fraction("1.769") * 2**12), round(2**24 / Fraction("0.2888"))
    x -= x_zero_point
    t = shifted(x * multiplier, shift)
    s = min(abs(t), big_b) - big_b
    assert s * s <= big_b * big_b < big_c
    w = ((t > 0) - (t < 0)) * (big_c - s * s) + big_c
    q = shifted(x * shifted(w, 12) * out_multiplier, out_shift)
    return clamped(q, zero_point, tuple(qrange))  # type: ignore[arg-type]


def check_gelu(x: np.ndarray, ints: Sequence[int]) -> None:
    same(int_gelu, numpy_int_gelu, [x], ints, [gelu_code(int(v), ints) for v in x])


@settings(deadline=None, max_examples=20)
@given(steps, steps, st.integers(-128, 127), st.integers(-20, 20), ends)
def test_int_gelu_of_all_8_bit_codes(sx: float, so: float, zx: int, zo: int, qrange: tuple[int, int]) -> None:
    check_gelu(np.arange(-128, 128).astype(np.int8), [zx, *gelu_constants(sx, so), zo, *qrange])
    check_gelu(np.arange(256).astype(np.uint8), [zx + 128, *gelu_constants(sx, so), zo, *qrange])


@pytest.mark.parametrize("scale", [2e-4, 1e-3])
def test_int_gelu_of_all_16_bit_codes(scale: float) -> None:
    check_gelu(np.arange(-(2**15), 2**15).astype(np.int16), [0, *gelu_constants(scale, scale), 0, *INT16])


@pytest.mark.parametrize("zero_point", [0, *INT22])
def test_int_gelu_at_its_bounds(zero_point: int) -> None:
    """22 bits and the largest multipliers: the last product comes near 2**62, and the smallest shifts nearest."""
    x = np.array([*INT22, -1, 0, 1, 2**20, -(2**20), INT22[1] - 1, INT22[0] + 1], np.int32)
    for shift in (1, 30, 62):
        for out_shift in (1, 39, 62):
            check_gelu(x, [zero_point, 2**31 - 1, shift, 2**24 - 1, out_shift, 0, INT32_LOW, INT32_HIGH])


# ---- mean


def mean_code(column: list[int], keep: list[bool], ints: Sequence[int]) -> int:
    x_zero_point, multiplier, shift, zero_point, *qrange = ints
    s = sum(x - x_zero_point for x, k in zip(column, keep) if k)
    q = divided(s * multiplier, max(sum(keep), 1) << shift)
    return clamped(q, zero_point, tuple(qrange))  # type: ignore[arg-type]


def check_mean(x: np.ndarray, keep: np.ndarray, ints: Sequence[int]) -> np.ndarray:
    want = [[mean_code(c, k, ints) for c in text.T.tolist()] for text, k in zip(x, keep.tolist())]
    same(int_mean, numpy_int_mean, [x, keep], ints, want)
    return np.array(want)


@settings(deadline=None)
@given(seeds, st.integers(1, 40), steps, steps, st.sampled_from([INT8, UINT8, INT16, INT22]), ends)
def test_int_mean_equals_python(
    seed: int, length: int, sx: float, so: float, codes: tuple[int, int], qrange: tuple[int, int]
) -> None:
    rng = np.random.default_rng(seed)
    kind = {INT8: np.int8, UINT8: np.uint8, INT16: np.int16, INT22: np.int32}[codes]
    x = rng.integers(*codes, (3, length, 4), endpoint=True).astype(kind)
    keep = rng.random((3, length)) < rng.choice([0.0, 0.5, 1.0], (3, 1))
    zero_point = int(rng.integers(*codes))
    constants = mean_constants(sx, so, length, codes[1] - codes[0])
    check_mean(x, keep, [zero_point, *constants, int(rng.integers(-9, 9)), *qrange])


def test_int_mean_at_its_bounds() -> None:
    length, magnitude = 2**10 - 1, 2**22 - 1
    multiplier, shift = mean_constants(1 - 2.0**-40, 1.0, length, magnitude)
    x = np.full((2, length, 1), INT22[1], np.int32)
    x[1] = INT22[0]
    for zero_point in INT22:
        found = check_mean(x, np.ones((2, length), bool), [zero_point, multiplier, shift, 0, INT32_LOW, INT32_HIGH])
        assert found.tolist() == [[INT22[1] - zero_point], [INT22[0] - zero_point]]
    largest = (2**61 - 1) // (length * magnitude)
    assert check_mean(x, np.ones((2, length), bool), [INT22[0], largest, 28, 0, INT32_LOW, INT32_HIGH])[0, 0] > 0
    nothing = check_mean(x, np.zeros((2, length), bool), [7, multiplier, shift, 3, *INT8])
    assert nothing.tolist() == [[3], [3]]
