"""What training runs in place of the integer primitives: the same numbers before the last rounding, exact gradients."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from kdlsq_fx.ops.gelu import numpy_polynomial_gelu, polynomial_gelu
from kdlsq_fx.ops.int_gelu import gelu_constants, int_gelu
from kdlsq_fx.ops.int_norm import int_layer_norm, norm_constants
from kdlsq_fx.ops.int_softmax import exp_table, int_softmax, prob_divider, score_grid
from kdlsq_fx.ops.norm import integer_layer_norm, numpy_integer_layer_norm
from kdlsq_fx.ops.softmax import masked_softmax, numpy_masked_softmax

torch.set_num_threads(1)

INT16, INT22, INT32 = (-(2**15), 2**15 - 1), (-(2**21), 2**21 - 1), (-(2**31), 2**31 - 1)
PRECISIONS = [torch.float32, torch.float64]


def randint(low: int, high: int, *shape: int) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.int32)


def keys(*shape: int) -> torch.Tensor:
    """Some keys away; in the first text one is left, in the second none."""
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.7
    keep[0], keep[1] = False, False
    keep[0, ..., 3] = True
    return keep


# ---- softmax


def int_probabilities(scores: torch.Tensor, scale: float, keep: torch.Tensor | None, exp: str) -> torch.Tensor:
    table = exp_table() if exp == "table" else None
    grid = score_grid(scale, table=exp == "table")
    codes = int_softmax(scores, keep, table, *grid, prob_divider(2.0**-23), 0, 0, 2**23)
    return codes.double() * 2.0**-23


@pytest.mark.parametrize("exp", ["table", "polynomial"])
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("masked", [True, False])
def test_masked_softmax_has_the_integers_numbers(exp: str, dtype: torch.dtype, masked: bool) -> None:
    """A step of 2**-12 is exact in floats, so no score lies on another side of a tie than in the integers."""
    scores = randint(-(2**16), 2**16, 4, 3, 20, 64)
    keep = keys(4, 1, 1, 64) if masked else None
    got = masked_softmax(scores.to(dtype) * 2.0**-12, keep, -1, exp)
    want = int_probabilities(scores, 2.0**-12, keep, exp)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=2.0**-24)  # half a step of the integers' result
    if keep is not None:
        assert not got.masked_select(~keep).any() and not got[1].any()
        assert (got[0].sum(-1) == 1).all()


@pytest.mark.parametrize("exp", ["table", "polynomial"])
def test_masked_softmax_on_any_grid(exp: str) -> None:
    """Scores that float32 rounds may land one step aside at a tie: then they are one step apart, and seldom."""
    scale = 0.00137
    scores = randint(-4000, 4000, 4, 3, 20, 64)
    want = int_probabilities(scores, scale, None, exp)
    in64 = masked_softmax(scores.double() * scale, None, -1, exp)
    torch.testing.assert_close(in64, want, rtol=1e-6, atol=2.0**-24)
    in32 = masked_softmax(scores.float() * np.float32(scale), None, -1, exp).double()
    step = 2.0**-10 if exp == "table" else 2.0**-14
    apart = (in32 - want).abs() > 2e-6 * want + 2.0**-23
    assert apart.double().mean() < 0.05
    torch.testing.assert_close(in32, want, rtol=1.5 * step + 1e-6, atol=2.0**-14)  # + a step of a small exponential


def test_masked_softmax_takes_the_tables_own_integers() -> None:
    d = torch.arange(2**14, dtype=torch.float32)
    rows = torch.stack([torch.zeros_like(d), -d / 1024], -1)
    want = exp_table().double() / (2**15 + exp_table().double())
    torch.testing.assert_close(masked_softmax(rows, None, -1)[:, 1].double(), want, rtol=2e-7, atol=0)


@pytest.mark.parametrize("low", [-math.inf, torch.finfo(torch.float32).min, -1e4])
def test_masked_softmax_behind_an_additive_mask(low: float) -> None:
    scores, keep = randint(-(2**13), 2**13, 4, 2, 5, 16).float() / 1024, keys(4, 1, 1, 16)
    added = scores + torch.where(keep, 0.0, low)
    assert torch.equal(masked_softmax(added, keep, -1), masked_softmax(scores, keep, -1))


def test_masked_softmax_over_another_dimension() -> None:
    scores = randint(-(2**13), 2**13, 3, 8, 5).float() / 1024
    assert torch.equal(masked_softmax(scores, None, 1), masked_softmax(scores.mT, None, -1).mT)


def test_masked_softmax_shows_a_broken_score() -> None:
    for bad in (math.nan, math.inf):
        x = torch.tensor([[0.0, bad, 1.0], [0.0, 1.0, 2.0]])
        p = masked_softmax(x, None, -1)
        assert p[0].isnan().all() and not p[1].isnan().any()
    with pytest.raises(ValueError, match="polynomial"):
        masked_softmax(torch.zeros(2, 2), None, -1, "spline")


@pytest.mark.parametrize("exp", ["table", "polynomial"])
def test_masked_softmax_has_softmaxs_gradient(exp: str) -> None:
    """At its own probabilities exactly (softmax of their logarithms is they), at the scores nearly."""
    x = (randint(-(2**13), 2**13, 4, 2, 5, 16).double() / 1024).requires_grad_()
    keep, grad = keys(4, 1, 1, 16), torch.randn(4, 2, 5, 16, dtype=torch.float64)
    p = masked_softmax(x, keep, -1, exp)
    p.backward(grad)
    logits = p.detach().clamp(min=1e-300).log().requires_grad_()
    exact = torch.softmax(logits[[0, 2, 3]], -1)
    exact.backward(grad[[0, 2, 3]])
    torch.testing.assert_close(x.grad[[0, 2, 3]], logits.grad[[0, 2, 3]], rtol=1e-10, atol=1e-10)
    assert not x.grad[1].any()  # no key, no gradient
    whole = x.detach().requires_grad_()
    torch.softmax(whole.masked_fill(~keep, -1e9), -1).backward(grad)
    torch.testing.assert_close(x.grad[[0, 2, 3]], whole.grad[[0, 2, 3]], rtol=0, atol=5e-3)


@pytest.mark.parametrize("exp", ["table", "polynomial"])
def test_numpy_masked_softmax_agrees(exp: str) -> None:
    x, keep = randint(-(2**13), 2**13, 4, 2, 5, 16).float() / 1024, keys(4, 1, 1, 16)
    for k in (keep, None):
        got = numpy_masked_softmax(x.numpy(), None if k is None else k.numpy(), -1, exp)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, masked_softmax(x, k, -1, exp).numpy(), rtol=1e-6)


# ---- layer norm


def norm_rows(n: int) -> torch.Tensor:
    x = randint(*INT22, 7, n)
    x[1], x[2] = 5, torch.arange(n) % 2
    x[3] = torch.where(torch.arange(n) == 1, *INT22)
    x[4] //= 2**18
    return x


@pytest.mark.parametrize("n", [2, 32, 768])
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("eps", [1e-12, 1e-5])
@pytest.mark.parametrize("affine", [True, False])
def test_integer_layer_norm_has_the_integers_numbers(n: int, dtype: torch.dtype, eps: float, affine: bool) -> None:
    codes, scale = norm_rows(n), torch.tensor(1.3e-5)
    weight, bias = (torch.linspace(-1.5, 2, n), torch.linspace(1, -2, n)) if affine else (None, None)
    c = norm_constants(weight, bias, n, float(scale), 2.0**-24, eps, *INT22)
    integers = int_layer_norm(codes, c.gain, c.offset, c.fraction, c.eps, c.shift, 0, *INT32).double() * 2.0**-24
    x = (codes.float() * scale).to(dtype)
    w, b = (None, None) if weight is None or bias is None else (weight.to(dtype), bias.to(dtype))
    got = integer_layer_norm(x, [n], w, b, eps, scale.to(dtype), *INT22)
    assert got.dtype == dtype
    # the integer op rounds y / sqrt(v) to 2**-24, which is sqrt(n) * 2**-25 of the result's unit
    size = 1 if weight is None else 2
    torch.testing.assert_close(got.double(), integers, rtol=1e-6, atol=size * math.sqrt(n) * 2.0**-24 + 2.0**-22)


def test_integer_layer_norm_uses_the_integer_root() -> None:
    """The rows whose root floors most differ from float layer norm by that much, so it is not float layer norm."""
    codes = torch.zeros(1, 1024, dtype=torch.int32)
    codes[0, 3] = 2**15 + 9
    x, one = codes.double(), torch.tensor(1.0, dtype=torch.float64)
    got = integer_layer_norm(x, [1024], None, None, 1e-12, one, *INT22)[0, 3]
    real = F.layer_norm(x, [1024], eps=1e-12)[0, 3]
    assert 1e-7 < float(got / real - 1) < 2.0**-15 + 2.0**-29


def test_integer_layer_norm_has_layer_norms_gradient() -> None:
    scale = torch.tensor(1e-4, dtype=torch.float64, requires_grad=True)
    x = (norm_rows(48)[[0, 4, 5, 6]].double() * 1e-4).reshape(2, 2, 48)
    grad = torch.randn(2, 2, 48, dtype=torch.float64)
    found = []
    for form in ("integer", "float"):
        given = [
            t.clone().requires_grad_()
            for t in (x, torch.linspace(-1, 2, 48).double(), torch.linspace(1, 3, 48).double())
        ]
        if form == "integer":
            out = integer_layer_norm(given[0], [48], given[1], given[2], 1e-5, scale, *INT22)
        else:
            out = F.layer_norm(given[0], [48], given[1], given[2], 1e-5)
        out.backward(grad)
        found.append([t.grad for t in given])
    for mine, exact in zip(*found):
        torch.testing.assert_close(mine, exact, rtol=1e-10, atol=1e-10)
    assert scale.grad is None
    plain = x.clone().requires_grad_()
    integer_layer_norm(plain, [48], None, None, 1e-5, scale, *INT22).backward(grad)
    exact_input = x.clone().requires_grad_()
    F.layer_norm(exact_input, [48], eps=1e-5).backward(grad)
    torch.testing.assert_close(plain.grad, exact_input.grad, rtol=1e-10, atol=1e-10)


def test_integer_layer_norm_leaves_its_operands_alone() -> None:
    x, w, b, scale = norm_rows(16).float() * 2.0**-10, torch.ones(16), torch.ones(16), torch.tensor(2.0**-10)
    before = [t.clone() for t in (x, w, b, scale)]
    integer_layer_norm(x, [16], w, b, 1e-12, scale, *INT22)
    assert all(torch.equal(t, u) for t, u in zip((x, w, b, scale), before))
    with pytest.raises(ValueError, match="one dimension"):
        integer_layer_norm(x, [7, 16], w, b, 1e-12, scale, *INT22)
    with pytest.raises(ValueError, match="input"):
        integer_layer_norm(x, [16], w, b, 1e-12, torch.tensor(0.0), *INT22)


@pytest.mark.parametrize("n", [2, 384])
def test_numpy_integer_layer_norm_agrees(n: int) -> None:
    x, scale = norm_rows(n).float() * 2.0**-16, torch.tensor(2.0**-16)
    w, b = torch.linspace(-1, 2, n), torch.linspace(1, 3, n)
    for args in ((w, b), (None, None)):
        want = integer_layer_norm(x, [n], *args, 1e-12, scale, *INT22).numpy()
        arrays: list[Any] = [None if a is None else a.numpy() for a in args]
        got = numpy_integer_layer_norm(x.numpy(), [n], *arrays, 1e-12, scale.numpy(), *INT22)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


# ---- GELU


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_polynomial_gelu_has_the_integers_numbers(dtype: torch.dtype) -> None:
    """All 16-bit codes; those whose ``t`` lies within float32's error of a tie may take the neighbouring step."""
    codes, scale = torch.arange(*INT16, dtype=torch.int32), 2.0**-12
    constants = gelu_constants(scale, 2.0**-20)
    integers = int_gelu(codes, 0, *constants, 0, *INT32).double() * 2.0**-20
    got = polynomial_gelu(codes.to(dtype) * scale)
    assert got.dtype == dtype
    t = codes.double() * scale / math.sqrt(2) * 2**12
    near = (t - t.floor() - 0.5).abs() < (2.0**-9 if dtype == torch.float32 else 2.0**-20)
    assert near.double().mean() < 0.01
    torch.testing.assert_close(got.double()[~near], integers[~near], rtol=1e-6, atol=2.0**-20)
    torch.testing.assert_close(got.double(), integers, rtol=1e-6, atol=2.0**-10)


def test_polynomial_gelu_has_gelus_gradient() -> None:
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64).requires_grad_()
    grad = torch.randn(1001, dtype=torch.float64)
    polynomial_gelu(x).backward(grad)
    exact = x.detach().requires_grad_()
    F.gelu(exact).backward(grad)
    torch.testing.assert_close(x.grad, exact.grad, rtol=1e-10, atol=1e-10)


def test_polynomial_gelu_far_out() -> None:
    x = torch.tensor([1e30, -1e30, math.inf, math.nan, 0.0])
    got = polynomial_gelu(x)
    assert got[2] == math.inf and got[3].isnan() and got[4] == 0
    assert abs(float(got[0]) / 1e30 - 1) < 1e-4  # the polynomial's own plateau: 2 C in steps of 2**-12
    np.testing.assert_allclose(numpy_polynomial_gelu(x.numpy()), got.numpy(), rtol=1e-6)
