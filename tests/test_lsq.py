"""LSQ, LSQ+, KDLSQ and the baselines against the papers' formulas, written here a second time in NumPy, float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlsq_fx.errors import CalibrationError, ConfigError
from kdlsq_fx.lsq import QUANTIZERS, BiasGrid, make_quantizer
from kdlsq_fx.qconfig import QUANTIZER_NAMES, QSpec
from kdlsq_fx.quantizer import FLOOR

CLOSE = {"atol": 1e-10, "rtol": 1e-10}


def lsq_paper(v, s, grad, *, q_n, q_p, n):
    """Esser et al. 2020: value, gradient to v, gradient to s (scaled by g = 1/sqrt(N * Q_P))."""
    ratio = v / s
    out = np.rint(np.clip(ratio, -q_n, q_p)) * s
    inside = (ratio > -q_n) & (ratio < q_p)
    slope = np.where(ratio <= -q_n, -q_n, np.where(ratio >= q_p, q_p, np.rint(ratio) - ratio))
    return out, grad * inside, (grad * slope).sum() / np.sqrt(n * q_p)


def lsq_plus_paper(x, s, beta, grad, *, low, high, n):
    """Bhalgat et al. 2020, with the offset already a whole number of steps."""
    ratio = (x - beta) / s
    out = np.rint(np.clip(ratio, low, high)) * s + beta
    inside = (ratio > low) & (ratio < high)
    slope = np.where(ratio <= low, low, np.where(ratio >= high, high, np.rint(ratio) - ratio))
    g = 1 / np.sqrt(n * high)
    return out, grad * inside, (grad * slope).sum() * g, (grad * ~inside).sum() * g


def kdlsq_release(x, alpha, grad, *, bits, act):
    """The released code's quantizer: signed, n = 2**(b-1) - 1 levels a side."""
    n = 2 ** (bits - 1) - 1
    out = alpha * np.rint(np.clip(x / alpha, -1, 1) * n) / n
    beyond = np.abs(x) > alpha
    slope = np.where(beyond, np.sign(x), (out - x) / alpha)
    return out, grad * ~beyond if act else grad, (grad * slope).sum()


def made(spec, role="weight", *, raw=None, numel=0, channels=None):
    q = make_quantizer(spec, role=role, numel=numel, channels=channels).double()
    if raw is not None:
        q._set_raw(torch.as_tensor(raw, dtype=torch.float64))
    return q


def run(q, x, grad):
    """The module's value and gradients for upstream ``grad``."""
    leaf = torch.tensor(x, requires_grad=True)
    out = q(leaf)
    out.backward(torch.tensor(grad))
    return out.detach().numpy(), leaf.grad.numpy(), q.raw.grad.numpy() if q.raw.grad is not None else None


def tricky(s, low, high, rng):
    """Values inside, outside, at ties and exactly at the ends of ``low..high`` (in steps)."""
    steps = np.concatenate([np.arange(low - 2, high + 3), np.arange(low - 2, high + 2) + 0.5])
    return np.concatenate([steps * s, rng.normal(size=200) * s * max(high, 1), [0.0, -0.0]])


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("role", ["weight", "act"])
@pytest.mark.parametrize("s", [0.25, 0.0371])  # 0.25: ties and ends are exact
def test_lsq_is_the_paper(bits, signed, role, s):
    rng = np.random.default_rng(bits)
    q = made(QSpec(bits=bits, signed=signed, quantizer="lsq"), role, raw=s, numel=777)
    q_n, q_p = (2 ** (bits - 1), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    assert (q.qmin, q.qmax) == (-q_n, q_p)
    x = tricky(s, -q_n, q_p, rng)
    grad = rng.normal(size=x.shape)
    for got, want in zip(run(q, x, grad), lsq_paper(x, s, grad, q_n=q_n, q_p=q_p, n=777)):
        np.testing.assert_allclose(got, want, **CLOSE)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("zero", [-3, 0, 1, 200])
def test_lsq_plus_is_the_paper_with_a_whole_offset(bits, signed, zero):
    rng = np.random.default_rng(bits)
    s = 0.125
    q = made(QSpec(bits=bits, signed=signed, quantizer="lsq+"), "act", raw=s, numel=50)
    zero = int(np.clip(zero, q.qmin, q.qmax))
    q.offset.data.fill_(-zero * s + 0.3 * s if q.qmin < zero < q.qmax else -zero * s)  # rounds to zero steps
    assert q.zero_point == zero
    x = tricky(s, q.qmin - zero, q.qmax - zero, rng)
    x = x[np.abs(x / s % 1 - 0.5) > 1e-6]  # at ties the papers round x/s + zp, we round x/s: a code apart for odd zp
    grad = rng.normal(size=x.shape)
    out, grad_x, grad_s = run(q, x, grad)
    want = lsq_plus_paper(x, s, -zero * s, grad, low=q.qmin, high=q.qmax, n=50)
    for got, expected in zip((out, grad_x, grad_s, q.offset.grad.numpy()), want):
        np.testing.assert_allclose(got, expected, **CLOSE)


def test_lsq_plus_rounds_ties_before_the_zero_point():
    q = made(QSpec(bits=4, quantizer="lsq+"), "act", raw=1.0, numel=1)
    q.offset.data.fill_(-3.0)
    assert q.zero_point == 3
    assert q.codes(torch.tensor([0.5, 1.5, -0.5])).tolist() == [3, 5, 3]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("role", ["weight", "act"])
@pytest.mark.parametrize("alpha", [1.75, 0.31])
def test_kdlsq_is_the_released_code(bits, role, alpha):
    rng = np.random.default_rng(bits)
    q = made(QSpec(bits=bits), role, raw=alpha)
    n = 2 ** (bits - 1) - 1
    x = tricky(alpha / n, -n, n, rng)
    x = np.concatenate([x[np.abs(np.abs(x / (alpha / n)) % 1 - 0.5) > 1e-9], [alpha, -alpha]])
    grad = rng.normal(size=x.shape)
    for got, want in zip(run(q, x, grad), kdlsq_release(x, alpha, grad, bits=bits, act=role == "act")):
        np.testing.assert_allclose(got, want, **CLOSE)


def test_kdlsq_is_ternary_at_two_bits_and_unsigned_for_probabilities():
    q = made(QSpec(bits=2), raw=2.0)
    assert q(torch.tensor([-9, -1.01, -0.99, 0, 0.99, 1.01, 9.0]).double()).tolist() == [-2, -2, 0, 0, 0, 2, 2]
    p = made(QSpec(bits=8).for_kind("prob"), "act", raw=0.5)
    assert (p.qmin, p.qmax) == (0, 255) and p.scale.item() == 0.5 / 255
    x = np.array([-0.25, 0.0, 0.1234, 0.5, 0.75])
    out, grad_x, grad_alpha = run(p, x, np.ones(5))
    want = np.rint(np.clip(x / 0.5, 0, 1) * 255) * 0.5 / 255
    np.testing.assert_allclose(out, want, **CLOSE)
    assert grad_x.tolist() == [0, 1, 1, 1, 0]
    np.testing.assert_allclose(grad_alpha, (0 + 0 + (want[2] - x[2]) / 0.5 + 0 + 1), **CLOSE)


@pytest.mark.parametrize("name", ["lsq", "kdlsq"])
def test_one_scale_per_channel_is_the_formula_on_every_row(name):
    rng = np.random.default_rng(0)
    x, grad = rng.normal(size=(5, 7, 3)), rng.normal(size=(5, 7, 3))
    raw = rng.uniform(0.1, 0.6, size=5)
    q = made(QSpec(bits=4, axis=0, quantizer=name), raw=raw, channels=5, numel=x.size)
    out, grad_x, grad_raw = run(q, x, grad)
    for row in range(5):
        if name == "lsq":  # g keeps the whole layer's N
            want = lsq_paper(x[row], raw[row], grad[row], q_n=8, q_p=7, n=x.size)
        else:
            want = kdlsq_release(x[row], raw[row], grad[row], bits=4, act=False)
        for got, expected in zip((out[row], grad_x[row], grad_raw[row]), want):
            np.testing.assert_allclose(got, expected, **CLOSE)


@pytest.mark.parametrize("name", ["lsq", "lsq+", "kdlsq"])
def test_gradients_outside_the_steps_agree_with_differences(name):
    """Where all is clipped the quantizer is smooth in its scale: the straight-through slope is the true one."""
    q = made(QSpec(bits=3, quantizer=name), "act", raw=0.5, numel=1)
    q.features.fill_(1)  # g = 1/sqrt(qmax)
    x = np.array([7.0, -9.0, 30.0])
    grad = run(q, x, np.array([1.0, 2.0, -0.5]))[2]
    low, high = (-3, 3) if name == "kdlsq" else (-4, 3)
    per = 3 if name == "kdlsq" else 3**0.5
    np.testing.assert_allclose(grad, (high * 1 + low * 2 - high * 0.5) / per, **CLOSE)


finite = st.floats(-1e4, 1e4, allow_nan=False, width=32)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(finite, min_size=1, max_size=40),
    bits=st.integers(2, 8),
    name=st.sampled_from(["lsq", "lsq+", "kdlsq", "minmax", "ema"]),
    signed=st.booleans(),
    init=st.sampled_from(["", "mean", "quantile", "mse", "minmax"]),
    role=st.sampled_from(["weight", "act"]),
    training=st.booleans(),
)
def test_codes_and_scale_say_all_of_the_forward(values, bits, name, signed, init, role, training):
    q = make_quantizer(QSpec(bits=bits, signed=signed, quantizer=name, init=init), role=role, numel=len(values))
    x = torch.tensor(values)
    q.init_from(x)
    q.train(training)
    out = q(x).detach()
    codes = q.codes(x)
    assert codes.dtype == torch.int32 and codes.min() >= q.qmin and codes.max() <= q.qmax
    assert q.scale > 0 and torch.isfinite(q.scale) and q.qmin <= q.zero_point <= q.qmax
    assert torch.equal((codes.float() - q.zero_point) * q.scale, out)
    once = torch.clamp(torch.round(x / q.scale) + q.zero_point, q.qmin, q.qmax)
    assert torch.equal(codes, once.int())
    q.eval()
    assert torch.equal(q(out).detach(), q(q(out)).detach()) or name == "ema"  # what is on the grid stays on the grid


def test_a_scale_that_fell_comes_back():
    q = made(QSpec(bits=4, quantizer="lsq"), raw=0.5, numel=4)
    floor = 0.5 * FLOOR
    q.raw.data.fill_(-3.0)  # an optimizer overshot
    assert q.scale.item() == floor  # positive at once, in eval too
    assert q.raw.item() == -3.0
    x = np.array([1.0, 2.0, -1.0])
    run(q, x, np.array([-1.0, -1.0, 1.0]))  # all beyond the range: wants a wider one
    assert q.raw.item() == floor and q.raw.grad.item() < 0
    q.raw.grad = None
    run(q, x, np.array([1.0, 1.0, -1.0]))  # wants a narrower one: not below the floor
    assert q.raw.grad.item() > 0
    q.raw.data.sub_(q.raw.grad)
    run(q, x, np.array([1.0, 1.0, -1.0]))
    assert q.raw.item() == floor


def test_at_the_floor_too_the_gradients_of_parts_add_up():
    q = made(QSpec(bits=4, quantizer="lsq"), raw=0.5, numel=4)
    q.raw.data.fill_(0.5 * FLOOR)
    parts = [(np.array([1.0, 2.0]), np.array([-1.0, -1.0])), (np.array([3.0, -1.0]), np.array([4.0, 4.0]))]
    for x, grad in parts:  # one wants a wider scale, the other a narrower one
        run(q, x, grad)
    sums = q.raw.grad.clone()
    q.raw.grad = None
    run(q, *(np.concatenate(both) for both in zip(*parts)))
    torch.testing.assert_close(sums, q.raw.grad)


def test_gradient_of_the_step_does_not_depend_on_the_split_of_a_batch():
    q = make_quantizer(QSpec(bits=8, quantizer="lsq"), role="act").double()
    x = torch.randn(8, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q.init_from(x)
    assert q.features.item() == 30
    q(x).square().sum().backward()
    whole = q.raw.grad.clone()
    q.raw.grad = None
    for part in x.split(2):
        q(part).square().sum().backward()
    torch.testing.assert_close(q.raw.grad, whole, **CLOSE)


def test_twn_is_ternaryberts_and_ema_is_q8berts():
    w = np.random.default_rng(0).normal(size=(6, 50))
    w[2] = 0
    for axis in (None, 0):
        q = made(QSpec(bits=2, axis=axis, quantizer="twn"), channels=6)
        q.init_from(torch.tensor(w))
        rows = w if axis == 0 else w.reshape(1, -1)
        want = np.zeros_like(rows)
        for i, row in enumerate(rows):
            large = np.abs(row) > 0.7 * np.abs(row).mean()
            want[i] = np.where(large, np.sign(row) * (np.abs(row)[large].mean() if large.any() else 1), 0)
        out, grad, _ = run(q, w, np.ones_like(w))
        np.testing.assert_allclose(out, want.reshape(w.shape), **CLOSE)
        assert (grad == 1).all() and set(q.codes(torch.tensor(w)).unique().tolist()) == {-1, 0, 1}
    q = make_quantizer(QSpec(bits=8, quantizer="ema"), role="act")
    q.observing = True
    for peak in (1.0, 3.0):
        q(torch.tensor([[peak, -0.5]]))
    q.finish()
    assert q.scale.item() * 127 == pytest.approx(2.0)
    q.eval()(torch.tensor([[80.0]]))
    assert q.scale.item() * 127 == pytest.approx(2.0)
    q.train()(torch.tensor([[-8.0]]))
    assert q.scale.item() * 127 == pytest.approx(4.0)  # the mean of three peaks
    w = make_quantizer(QSpec(bits=8, quantizer="ema"), role="weight", numel=2)
    w.init_from(torch.tensor([1.0, -2.0]))
    w(torch.tensor([1.0, -4.0]))
    assert w.scale.item() * 127 == pytest.approx(4.0)


@pytest.mark.parametrize("w_scale", [torch.tensor(0.03), torch.tensor([0.03, 0.2, 1e-12])])
def test_bias_grid(w_scale):
    bias = torch.tensor([0.1234, -5.0, 1.0], requires_grad=True)
    x_scale = torch.tensor(0.011)
    grid = BiasGrid()
    out = grid(bias, x_scale, w_scale)
    codes = grid.codes(bias, x_scale, w_scale)
    assert codes.dtype == torch.int32 and codes.abs().max() <= 2**31 - 128
    assert torch.equal(codes.float() * (x_scale * w_scale), out.detach())
    out.sum().backward()
    assert bias.grad.tolist() == [1, 1, 1]


def test_refusals():
    assert set(QUANTIZERS) == set(QUANTIZER_NAMES)
    fresh = make_quantizer(QSpec(bits=8), role="act", site="a/b")
    with pytest.raises(CalibrationError, match="calibrate first"):
        fresh(torch.ones(2))
    with pytest.raises(CalibrationError, match="a/b"):
        fresh.codes(torch.ones(2))
    for bad in (float("nan"), float("inf")):
        with pytest.raises(CalibrationError, match="NaN or infinity"):
            make_quantizer(QSpec(bits=8), role="weight", numel=2).init_from(torch.tensor([1.0, bad]), where="w")
        with pytest.raises(CalibrationError, match="NaN or infinity"):
            fresh.init_from(torch.tensor([1.0, bad]))
    for spec, role, channels in (
        (QSpec(bits=8, axis=0), "act", 3),
        (QSpec(bits=8, axis=0), "weight", None),
        (QSpec(bits=2, quantizer="twn"), "act", None),
        (QSpec(bits=8), "bias", None),
    ):
        with pytest.raises(ConfigError):
            make_quantizer(spec, role=role, channels=channels)


@pytest.mark.parametrize("other", [QSpec(bits=2), QSpec(bits=4, quantizer="lsq"), QSpec(bits=8)])
def test_a_state_for_another_range_is_refused(other):
    """W4's scales in a W2 model would compute nonsense and say nothing."""
    a, b = make_quantizer(QSpec(bits=4), role="act"), make_quantizer(other, role="act")
    for q in (a, b):
        q.init_from(torch.randn(4, 8))
    before = b.scale.clone()
    with pytest.raises(
        RuntimeError, match=r"is for 15 codes, this quantizer has \d+: prepare the model with the qconfig"
    ):
        b.load_state_dict(a.state_dict())
    assert torch.equal(b.scale, before)


def test_state_dict_carries_all_and_readiness():
    x = torch.randn(4, 8)
    for name in ("lsq", "lsq+", "kdlsq", "minmax", "ema"):
        a, b = (make_quantizer(QSpec(bits=4, quantizer=name), role="act") for _ in range(2))
        a.init_from(x)
        b.load_state_dict(a.state_dict())
        assert torch.equal(a.eval()(x), b.eval()(x)) and torch.equal(a.features, b.features)
        b.load_state_dict(make_quantizer(QSpec(bits=4, quantizer=name), role="act").state_dict())
        with pytest.raises(CalibrationError):
            b(x)
