"""Rounding and integer arithmetic against exact rational arithmetic, over full ranges, ties and saturation."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlsq_fx import ops  # noqa: F401  (fills the op table)
from kdlsq_fx.errors import InputError, LoweringError
from kdlsq_fx.op import BY_NAME
from kdlsq_fx.ops.fixed_point import (
    dyadic,
    int_add,
    numpy_int_add,
    numpy_requantize,
    numpy_round_shift,
    requantize,
    round_shift,
)
from kdlsq_fx.ops.integer import (
    int_conv1d,
    int_embedding,
    int_linear,
    int_matmul,
    lookup,
    numpy_int_conv1d,
    numpy_int_embedding,
    numpy_int_linear,
    numpy_int_matmul,
    numpy_lookup,
)
from kdlsq_fx.ops.qdq import container, dequantize, numpy_dequantize, numpy_quantize, quantize
from kdlsq_fx.ranges import INT32_MAX, demand_int32, dot_bound, gemm_dtype

INT_OPS = [
    "quantize",
    "dequantize",
    "requantize",
    "int_add",
    "int_linear",
    "int_matmul",
    "int_conv1d",
    "int_embedding",
    "lookup",
]
int32s = st.integers(-(2**31), 2**31 - 1)
ratios = st.floats(2.0**-40, 2.0**29, allow_nan=False)
RANGES = [(-128, 127), (-127, 127), (0, 255), (-1, 1), (-2, 1), (-(2**15), 2**15 - 1), (-(2**21), 2**21 - 1)]
ranges = st.sampled_from(RANGES)


def rounded(value: Fraction, zero_point: int, low: int, high: int) -> int:
    """Python's round of a Fraction is exact and half to even."""
    return min(max(round(value) + zero_point, low), high)


def as_numpy(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(as_numpy(v) for v in value)
    return value.numpy() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("name", INT_OPS)
def test_torch_and_numpy_agree_bit_for_bit(name: str) -> None:
    op = BY_NAME[name]
    assert op.sample is not None and op.numpy is not None
    args, kwargs = op.sample()
    got, other = op.target(*args, **kwargs), op.numpy(*as_numpy(args), **kwargs)
    assert got.numpy().dtype == other.dtype
    np.testing.assert_array_equal(got.numpy(), other)


@given(ratios)
def test_dyadic_keeps_31_bits(ratio: float) -> None:
    multiplier, shift = dyadic(ratio)
    assert 0 <= multiplier < 2**31 and 1 <= shift <= 62
    error = abs(Fraction(multiplier, 2**shift) - Fraction(ratio))
    assert error <= max(Fraction(ratio) / 2**31, Fraction(1, 2**63))


def test_dyadic_at_its_ends() -> None:
    assert dyadic(0.5) == (2**30, 31)
    assert dyadic(1 - 2.0**-40) == (2**30, 30)  # rounds up to the next power of two
    assert dyadic(2.0**-70)[0] == 0  # takes every int32 to 0, as exact arithmetic does
    for bad in (0.0, -1.0, float("nan"), float("inf"), 2.0**30, 2.0**30 - 2.0**-20):
        with pytest.raises(ValueError):
            dyadic(bad)


@given(st.integers(-(2**62), 2**62), st.integers(1, 62))
def test_round_shift_is_half_to_even(value: int, shift: int) -> None:
    want = round(Fraction(value, 2**shift))
    assert int(round_shift(torch.tensor([value]), shift)) == want
    assert int(round_shift(torch.tensor([value]), torch.tensor([shift]))) == want
    assert int(numpy_round_shift(np.array([value]), shift)[0]) == want


@given(st.integers(-(2**20), 2**20), st.integers(1, 40), st.integers(-1, 1))
def test_round_shift_around_ties(floor: int, shift: int, off: int) -> None:
    value = (floor << shift) + (1 << (shift - 1)) + off
    want = round(Fraction(value, 2**shift))
    assert int(round_shift(torch.tensor([value]), shift)) == want
    assert int(numpy_round_shift(np.array([value]), shift)[0]) == want


@given(st.lists(int32s, min_size=1, max_size=20), ratios, st.integers(-300, 300), ranges)
def test_requantize_equals_rational_arithmetic(accs: list[int], ratio: float, zero: int, ends: tuple[int, int]) -> None:
    multiplier, shift = dyadic(ratio)
    want = [rounded(Fraction(a * multiplier, 2**shift), zero, *ends) for a in accs]
    got = requantize(torch.tensor(accs, dtype=torch.int32), multiplier, shift, zero, *ends)
    other = numpy_requantize(np.array(accs, dtype=np.int32), multiplier, shift, zero, *ends)
    assert got.tolist() == want == other.tolist()
    assert str(got.dtype) == f"torch.{container(*ends)}" and other.dtype == container(*ends)


@given(st.lists(st.tuples(int32s, ratios), min_size=1, max_size=12), ranges)
def test_requantize_per_channel(pairs: list[tuple[int, float]], ends: tuple[int, int]) -> None:
    accs, dyads = [a for a, _ in pairs], [dyadic(r) for _, r in pairs]
    want = [rounded(Fraction(a * m, 2**s), 0, *ends) for a, (m, s) in zip(accs, dyads)]
    m, s = (torch.tensor([d[i] for d in dyads]) for i in (0, 1))
    acc = torch.tensor([accs, accs], dtype=torch.int32)
    assert requantize(acc, m, s, 0, *ends).tolist() == [want, want]
    assert numpy_requantize(acc.numpy(), m.numpy(), s.numpy(), 0, *ends).tolist() == [want, want]
    assert requantize(acc.T, m, s, 0, *ends, axis=0).tolist() == [[w, w] for w in want]


terms = st.lists(st.tuples(int32s, st.integers(0, 2**28), st.integers(-200, 200)), min_size=1, max_size=4)


@given(terms, st.integers(1, 50), st.integers(-9, 9), ranges)
def test_int_add_rounds_once(terms: list[tuple[int, int, int]], shift: int, zero: int, ends: tuple[int, int]) -> None:
    exact = sum(Fraction((t - z) * m, 2**shift) for t, m, z in terms)
    want = rounded(exact, zero, *ends)  # type: ignore[arg-type]
    tensors = [torch.tensor([t], dtype=torch.int32) for t, _, _ in terms]
    multipliers, zeros = [m for _, m, _ in terms], [z for _, _, z in terms]
    assert int(int_add(tensors, multipliers, zeros, shift, zero, *ends)) == want
    assert int(numpy_int_add([t.numpy() for t in tensors], multipliers, zeros, shift, zero, *ends)[0]) == want


def test_int_add_takes_channels_and_rows() -> None:
    torch.manual_seed(0)
    a, b = (torch.randint(-128, 128, (2, 3, 4), dtype=torch.int8) for _ in range(2))
    channels, rows = torch.tensor([1, 2, 3, 4]) << 20, torch.randint(1, 9, (2, 3, 1)) << 20
    want = ((a.long() - 3) * channels + b.long() * rows) / 2**21
    got = int_add([a, b], [channels, rows], [3, 0], 21, 0, -(2**15), 2**15 - 1)
    assert torch.equal(got.double(), want.round())
    other = numpy_int_add([a.numpy(), b.numpy()], [channels.numpy(), rows.numpy()], [3, 0], 21, 0, -(2**15), 2**15 - 1)
    np.testing.assert_array_equal(got.numpy(), other)


floats = st.floats(-1e6, 1e6, width=32)


@given(st.lists(floats, min_size=1, max_size=20), st.floats(2.0**-20, 2.0**10, width=32), ranges, st.integers(-9, 9))
def test_quantize_rounds_the_float32_quotient(xs: list[float], scale: float, ends: tuple[int, int], zero: int) -> None:
    zero = min(max(zero, ends[0]), ends[1])
    quotients = np.array(xs, dtype=np.float32) / np.float32(scale)
    want = [rounded(Fraction(float(q)), zero, *ends) for q in quotients]
    codes = quantize(torch.tensor(xs), torch.tensor(scale), zero, *ends)
    assert codes.tolist() == want
    other = numpy_quantize(np.array(xs, np.float32), np.array(scale, np.float32), zero, *ends)
    assert other.tolist() == want and str(codes.dtype) == f"torch.{other.dtype}"
    real = dequantize(codes, torch.tensor(scale), zero)
    np.testing.assert_array_equal(real.numpy(), numpy_dequantize(other, np.array(scale, np.float32), zero))


def test_quantize_at_ties_and_at_the_ends_of_int32() -> None:
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 1e30, -1e30])
    one = torch.tensor(1.0)
    assert quantize(x, one, 0, -128, 127).tolist() == [-2, -2, 0, 0, 2, 2, 127, -128]
    wide = quantize(x, one, 0, -(2**31), 2**31 - 1)
    assert wide.tolist()[-2:] == [2**31 - 1, -(2**31)]
    assert numpy_quantize(x.numpy(), one.numpy(), 0, -(2**31), 2**31 - 1).tolist() == wide.tolist()
    per_row = quantize(torch.ones(2, 3), torch.tensor([0.5, 0.25]), 0, -128, 127, 0)
    assert per_row.tolist() == [[2, 2, 2], [4, 4, 4]]


def test_containers() -> None:
    assert [container(*r) for r in RANGES] == ["int8", "int8", "uint8", "int8", "int8", "int16", "int32"]
    assert container(0, 15) == "int8" and container(0, 2**16) == "int32"
    with pytest.raises(ValueError, match="32-bit"):
        container(-(2**31), 2**31)


def oracle_linear(x: Any, w: Any, bias: Any, zero: int) -> Any:
    return (x.astype(np.int64) - zero) @ w.astype(np.int64).T + bias


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.sampled_from([1, 7, 64, 300]), st.integers(2, 8), st.integers(-128, 127))
def test_int_linear_equals_int64(seed: int, width: int, bits: int, zero: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.integers(-128, 128, (3, 2, width), dtype=np.int8)
    w = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, width), dtype=np.int8)
    bias = rng.integers(-(2**20), 2**20, 5, dtype=np.int32)
    bound = dot_bound(w, max(abs(-128 - zero), abs(127 - zero)), bias)
    want = oracle_linear(x, w, bias, zero)
    assert np.abs(want).max() <= bound
    got = int_linear(torch.from_numpy(x), torch.from_numpy(w), torch.from_numpy(bias), zero, bound)
    np.testing.assert_array_equal(got.numpy(), want)
    np.testing.assert_array_equal(numpy_int_linear(x, w, bias, zero, bound), want)


@pytest.mark.parametrize("width", [1000, 1040, 1100, 60000])
def test_codes_that_reach_the_bound_stay_exact(width: int) -> None:
    """Signs aligned, every code at its end: the accumulator equals its bound, on both sides of 2**24."""
    w = np.where(np.arange(width) % 2, -127, 127).astype(np.int8)[None]
    x = np.where(np.arange(width) % 2, -128, 127).astype(np.int8)[None]
    x[0, 0] = 126  # an odd sum: float32 would round it beyond 2**24
    bound = dot_bound(w, 128)
    want = oracle_linear(x, w, 0, 0)
    assert gemm_dtype(bound) == ("float32" if bound < 2**24 else "float64")
    assert int_linear(torch.from_numpy(x), torch.from_numpy(w), None, 0, bound).tolist() == want.tolist()
    assert numpy_int_linear(x, w, None, 0, bound).tolist() == want.tolist()
    ends = np.where(w > 0, -128, 128)
    assert abs(int((ends * w.astype(np.int64)).sum())) == bound


def test_bounds() -> None:
    w = np.array([[1, -2, 3], [0, 0, 0]])
    assert dot_bound(w, 10) == 60 and dot_bound(w, 10, np.array([-5, 100])) == 100
    assert demand_int32(INT32_MAX, "a/linear") == INT32_MAX
    with pytest.raises(LoweringError, match=r"2147483648.*\[at a/linear\]"):
        demand_int32(INT32_MAX + 1, "a/linear")
    with pytest.raises(ValueError):
        gemm_dtype(2**53)


def test_int_matmul_equals_int64_and_refuses_what_may_overflow() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (2, 3, 4, 50), dtype=np.uint8), rng.integers(-128, 128, (2, 3, 50, 6), dtype=np.int8)
    want = (a.astype(np.int64) - 7) @ (b.astype(np.int64) + 9)
    got = int_matmul(torch.from_numpy(a), torch.from_numpy(b), 7, -9, 248, 137)
    np.testing.assert_array_equal(got.numpy(), want)
    np.testing.assert_array_equal(numpy_int_matmul(a, b, 7, -9, 248, 137), want)
    with pytest.raises(InputError, match="at most 1"):
        int_matmul(torch.from_numpy(a), torch.from_numpy(b), 0, 0, 2**15, 2**15)
    with pytest.raises(InputError, match="at most 1"):
        numpy_int_matmul(a, b, 0, 0, 2**15, 2**15)


@pytest.mark.parametrize(("stride", "padding", "dilation", "groups"), [(1, 0, 1, 1), (2, 3, 2, 1), (1, 1, 1, 6)])
def test_int_conv1d_equals_int64(stride: int, padding: int, dilation: int, groups: int) -> None:
    torch.manual_seed(0)
    x, w = torch.randint(-128, 128, (2, 6, 15)), torch.randint(-8, 8, (6, 6 // groups, 3))
    bias = torch.randint(-999, 999, (6,), dtype=torch.int32)
    args = ([stride], [padding], [dilation], groups)
    zero = 11
    padded = torch.nn.functional.pad(x - zero, (padding, padding))
    windows = padded.unfold(2, 2 * dilation + 1, stride)[..., ::dilation]
    per = 6 // groups
    want = torch.stack(
        [(windows[:, (o // (6 // groups)) * per :][:, :per] * w[o, :, None]).sum((1, 3)) for o in range(6)], 1
    )
    want = want + bias[:, None]
    small, kernel = x.to(torch.int8), w.to(torch.int8)
    assert torch.equal(int_conv1d(small, kernel, bias, *args, zero).long(), want)
    other = numpy_int_conv1d(small.numpy(), kernel.numpy(), bias.numpy(), *args, zero)
    np.testing.assert_array_equal(other, want.numpy())


def test_embedding_and_lookup() -> None:
    table = torch.arange(-10, 10, dtype=torch.int8).reshape(5, 4)
    ids = torch.tensor([[4, 0], [1, 1]])
    assert torch.equal(int_embedding(table, ids), table[ids])
    np.testing.assert_array_equal(numpy_int_embedding(table.numpy(), ids.numpy()), table[ids].numpy())
    for bad in (-1, 5):
        with pytest.raises(InputError, match="5 rows"):
            numpy_int_embedding(table.numpy(), np.array([bad]))
    codes = torch.arange(-128, 128, dtype=torch.int8)
    square = (torch.arange(-128, 128) ** 2 // 64).to(torch.int16)
    assert torch.equal(lookup(codes, square, -128), square)
    np.testing.assert_array_equal(numpy_lookup(codes.numpy(), square.numpy(), -128), square.numpy())
