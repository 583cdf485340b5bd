"""First scales against their rules, and what calibration remembers of a stream."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdlsq_fx.errors import CalibrationError
from kdlsq_fx.lsq import make_quantizer
from kdlsq_fx.observer import CAPACITY, TAIL, Observer
from kdlsq_fx.qconfig import QSpec


def step(x, *, init, bits=4, quantizer="lsq", axis=None, role="weight", signed=None):
    q = make_quantizer(
        QSpec(bits=bits, init=init, quantizer=quantizer, axis=axis, signed=signed),
        role=role,
        channels=x.shape[0],
        numel=x.numel(),
    ).to(x.dtype)
    q.init_from(x)
    return q.scale.numpy()


@pytest.fixture
def x():
    return torch.tensor(np.random.default_rng(0).normal(size=(6, 400)))


@pytest.mark.parametrize("axis", [None, 0])
def test_rules(x, axis):
    rows = x.numpy() if axis == 0 else x.numpy().reshape(1, -1)
    mean = [2 * np.abs(r).mean() / np.sqrt(7) for r in rows]
    np.testing.assert_allclose(step(x, init="mean", axis=axis), np.squeeze(mean))
    quantile = []
    for r in rows:
        ordered, cut = np.sort(r), round(0.05 * r.size / 2)
        quantile.append(max(abs(ordered[cut]), abs(ordered[r.size - cut])) / 7)
    np.testing.assert_allclose(step(x, init="quantile", axis=axis), np.squeeze(quantile))
    widest = [np.abs(r).max() / 7 for r in rows]
    np.testing.assert_allclose(step(x, init="minmax", axis=axis, quantizer="kdlsq"), np.squeeze(widest))


def test_quantile_of_tiny_tensors_stays_inside():
    for n in (1, 2, 3, 19):
        assert step(torch.arange(1.0, n + 1)[None], init="quantile", bits=2, quantizer="kdlsq").item() == n


@pytest.mark.parametrize("quantizer", ["lsq", "kdlsq"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("signed", [None, False])
def test_mse_search_is_near_the_best_of_a_dense_grid(quantizer, bits, signed):
    x = torch.tensor(np.random.default_rng(1).standard_t(4, size=(1, 3000)))
    q = make_quantizer(QSpec(bits=bits, quantizer=quantizer, init="mse", signed=signed), role="weight").double()
    q.init_from(x)

    def error(s):
        return float(((torch.clamp(torch.round(x / s), q.qmin, q.qmax) * s - x) ** 2).sum())

    widest = float(x.abs().max()) / q.qmax
    best = min(error(widest * share) for share in np.geomspace(0.01, 1, 2000))
    assert error(q.scale) <= 1.02 * best


def test_a_few_outliers_are_not_missed():
    """A plain sample of a long tensor would not see five large values, which hold most of the error at 8 bits."""
    x = torch.randn(1, 2_000_000, generator=torch.Generator().manual_seed(0))
    x[0, [5, 77, 999, 12345, 1_999_999]] = 60.0
    mse, widest = step(x, init="mse", bits=8), step(x, init="minmax", bits=8)

    def error(s):
        return float(((torch.clamp(torch.round(x / float(s)), -128, 127) * float(s) - x) ** 2).sum())

    assert error(mse) <= error(widest)
    for role in ("weight", "act"):
        assert step(x, init="mse", bits=8, role=role) == pytest.approx(float(mse), rel=0.2)


def test_lsq_plus_uses_the_range_of_skewed_activations():
    x = torch.rand(64, 100, generator=torch.Generator().manual_seed(0)) * 5 - 0.5
    q = make_quantizer(QSpec(bits=4, quantizer="lsq+"), role="act")
    plain = make_quantizer(QSpec(bits=4, quantizer="lsq"), role="act")
    for m in (q, plain):
        m.init_from(x)
    assert q.zero_point in (-7, -6)
    with torch.no_grad():
        assert (q(x) - x).square().mean() < 0.5 * (plain(x) - x).square().mean()
    for init in ("minmax", "quantile", "mean"):
        other = make_quantizer(QSpec(bits=4, quantizer="lsq+", init=init), role="act")
        other.init_from(x)
        assert other.scale > 0 and -8 <= other.zero_point <= 7


def test_zeros_get_a_defined_scale():
    assert step(torch.zeros(2, 3), init="mse").item() == 1
    x = torch.zeros(3, 4)
    x[0], x[1] = 7.0, 14.0
    for init in ("mean", "quantile", "mse", "minmax"):
        s = step(x, init=init, axis=0, quantizer="kdlsq")
        assert s[2] == pytest.approx(s[:2].mean()) and (s > 0).all()
    act = make_quantizer(QSpec(bits=8, quantizer="lsq+"), role="act")
    act.init_from(torch.zeros(2, 3))
    assert act.scale > 0 and act(torch.zeros(2)).tolist() == [0, 0]


def test_streamed_figures_equal_those_of_the_whole():
    batches = [torch.randn(4, 30_000 + i, generator=torch.Generator().manual_seed(i)) * (i + 1) for i in range(5)]
    seen = Observer()
    for b in batches:
        seen.add(b)
    whole = torch.cat([b.reshape(-1) for b in batches])
    assert seen.count == whole.numel() and seen.rows == 20 and seen.batches == 5
    assert (seen.low, seen.high) == (float(whole.min()), float(whole.max()))
    assert seen.mean_abs == pytest.approx(float(whole.abs().double().mean()), rel=1e-6)
    assert seen.features == whole.numel() / 20
    assert CAPACITY // 4 < seen.values().numel() <= CAPACITY and seen.is_sampled
    assert float(seen.values().std()) == pytest.approx(float(whole.std()), rel=0.02)
    assert torch.equal(seen.tail.abs().sort().values, whole.abs().topk(TAIL).values.sort().values)
    again = Observer()
    for b in batches:
        again.add(b)
    assert torch.equal(again.values(), seen.values())


@pytest.mark.parametrize("n", [1, 10, TAIL, 2 * TAIL + 1, 300_000])
def test_the_tail_is_exact(n):
    x = torch.randn(n, generator=torch.Generator().manual_seed(n))
    seen = Observer()
    seen.add(x)
    seen.add(x[:1])
    both = torch.cat([x, x[:1]])
    want = both.abs().topk(min(TAIL, n + 1)).values.sort().values
    assert torch.equal(seen.tail.abs().sort().values, want)
    sparse = torch.zeros(n)
    sparse[-1] = 3.0
    other = Observer()
    other.add(sparse)
    assert other.tail.max() == 3


def test_nan_is_refused_and_nothing_is_no_batch():
    seen = Observer()
    seen.add(torch.empty(0, 4))
    assert seen.count == seen.batches == 0
    with pytest.raises(CalibrationError, match="here"):
        seen.add(torch.tensor([1.0, float("nan")]), where="here")
