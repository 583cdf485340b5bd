"""The fused quantizers and squares against the plain versions: values bit for bit, gradients to the last few places."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from kdlsq_fx import fused
from kdlsq_fx.kd_losses import row_squares
from kdlsq_fx.lsq import BiasGrid, make_quantizer
from kdlsq_fx.qconfig import QSpec

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]
NAMES = ["lsq", "lsq+", "kdlsq"]


@pytest.fixture(autouse=True)
def on_again() -> Iterator[None]:
    yield
    fused.use(True)


def quantizer(name, *, bits=4, signed=True, role="act", axis=None, shape=(8, 6), dtype=torch.float32, device="cpu"):
    spec = QSpec(bits=bits, signed=signed, quantizer=name, axis=axis)
    q = make_quantizer(spec, role=role, channels=shape[0], numel=24 if role == "weight" else 0)
    gen = torch.Generator().manual_seed(bits)
    q.init_from(torch.randn(shape, generator=gen) * 2 + (0.5 if not signed else 0))
    return q.to(dtype).to(device).train()


def both(q, x, grad):
    """(value, gradient of x, of raw, of the offset) fused and plain."""
    found = []
    for on in (True, False):
        fused.use(on)
        own = copy.deepcopy(q)
        leaf = x.detach().clone().requires_grad_()  # clone keeps the strides
        out = own(leaf)
        kind = type(out.grad_fn).__name__
        assert ("FakeQuantize" in kind) == on, kind  # else nothing is compared
        out.backward(grad.to(out.dtype))
        offset = getattr(own, "offset", None)
        found.append((out.detach(), leaf.grad, own.raw.grad, None if offset is None else offset.grad, own.raw.detach()))
    return found


def agree(found, *, tight):
    (out, grad_x, grad_raw, grad_offset, raw), (out2, grad_x2, grad_raw2, grad_offset2, raw2) = found
    assert torch.equal(out, out2) and torch.equal(grad_x, grad_x2) and torch.equal(raw, raw2)
    close = {"rtol": 1e-10, "atol": 1e-10} if tight else {"rtol": 2e-4, "atol": 2e-3}
    torch.testing.assert_close(grad_raw, grad_raw2, **close)
    assert (grad_offset is None) == (grad_offset2 is None)
    if grad_offset is not None:
        torch.testing.assert_close(grad_offset, grad_offset2, **close)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bits", [2, 3, 8, 16, 22])
@pytest.mark.parametrize("signed", [True, False])
def test_values_and_gradients(name, bits, signed, device):
    if bits > 8 and not signed:
        pytest.skip("wide sums are signed")
    q = quantizer(name, bits=bits, signed=signed, device=device)
    gen = torch.Generator().manual_seed(1)
    for shape in [(7,), (3, 50), (2, 5, 4099), (5, 1, 3, 2)]:
        x = torch.randn(shape, generator=gen).to(device) * 3
        flat = x.view(-1)
        ties = torch.arange(-3, 4, device=device) * 0.5 * q.scale  # ties, ends of the range, zero
        flat[: min(7, flat.numel())] = ties[: flat.numel()]
        agree(both(q, x, torch.randn(shape, generator=gen).to(device)), tight=False)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("role", ["weight", "act"])
def test_float64_to_ten_places(name, axis, role):
    if role == "act" and axis == 0:
        return
    q = quantizer(name, role=role, axis=axis, shape=(6, 40), dtype=torch.float64)
    x, grad = torch.randn(2, 6, 40, dtype=torch.float64).unbind()
    agree(both(q, x * 3, grad), tight=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_one_scale_per_row(name, device):
    q = quantizer(name, role="weight", axis=0, shape=(5, 4, 700), device=device)
    x, grad = torch.randn(2, 5, 4, 700).to(device).unbind()
    agree(both(q, x * 2, grad), tight=False)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_any_order_of_dimensions(name, device):
    q = quantizer(name, device=device)
    base = torch.randn(3, 40, 6, 16).to(device) * 2
    grad = torch.randn(3, 6, 40, 16).to(device)
    heads, keys = base.transpose(1, 2), base.permute(0, 2, 3, 1)
    for x, up in ((heads, grad), (heads, grad.transpose(1, 2).contiguous().transpose(1, 2)), (heads, grad[..., :1])):
        agree(both(q, x, up.expand(x.shape)), tight=False)
    gaps = torch.randn(4, 3, 64).to(device)[:, :2, ::2]
    for x in (keys, gaps):  # not all kernels take these: the values must hold all the same
        outs = []
        for on in (True, False):
            fused.use(on)
            outs.append(q(x).detach())
        assert torch.equal(*outs)


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_enters_and_its_gradient_leaves(device):
    q = quantizer("lsq", bits=8, device=device)
    x, grad = (torch.randn(2, 9, 700) * 2).to(device).to(torch.bfloat16).unbind()
    agree(both(q, x, grad), tight=False)


@pytest.mark.parametrize("device", DEVICES)
def test_a_scale_below_its_floor_and_nan(device):
    for name in NAMES:
        q = quantizer(name, device=device)
        q.raw.data.fill_(-3.0)
        x = torch.tensor([1.0, 2.0, -1.0, 0.0], device=device)
        for grad in ([-1.0, -1.0, 1.0, 1.0], [1.0, 1.0, -1.0, 1.0]):
            agree(both(q, x, torch.tensor(grad, device=device)), tight=False)
        q = quantizer(name, device=device)
        (out, *_), _ = both(q, torch.tensor([float("nan"), float("inf"), 1.0], device=device), torch.ones(3).to(device))
        assert out.isnan().tolist() == [True, False, False]


@pytest.mark.parametrize("device", DEVICES)
def test_an_offset_that_drifted_comes_back(device):
    """No zero point is beyond the ends: an offset that goes on out there would take long to come back."""
    left = []
    for on in (True, False):
        fused.use(on)
        q = quantizer("lsq+", device=device)
        q.offset.data.fill_(-50 * float(q.scale))
        q(torch.ones(9, device=device))
        q(torch.ones(9, device=device)).sum().backward()  # twice in a step
        left.append(q.offset.detach() / q.scale)
    assert left[0].item() == left[1].item() == -q.qmax


def test_sums_do_not_depend_on_the_number_of_threads():
    q = quantizer("lsq")
    x, grad = torch.randn(2, 300, 999).unbind()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(both(q, x, grad)[0][2])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("name", NAMES)
def test_bias_grid(name, axis, device):
    x, w = quantizer(name, device=device), quantizer(name, role="weight", axis=axis, shape=(70, 6), device=device)
    bias = torch.randn(70).to(device).requires_grad_()
    out = BiasGrid().between(bias, x, w)
    assert torch.equal(out, BiasGrid()(bias, x.scale, w.scale))
    out.sum().backward()
    assert torch.equal(bias.grad, torch.ones_like(bias))


def squares_formula(a, b, keep, floor):
    a, b = a.double(), b.double()
    if floor is not None:
        a, b = (torch.where(t <= floor, 0.0, t) for t in (a, b))
    d = (a - b) if keep is None else (a - b) * keep
    return d.square().flatten(1).sum(1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("on", [True, False])
def test_row_squares_are_the_formula(on, device):
    fused.use(on)
    gen = torch.Generator().manual_seed(0)
    weight = (torch.rand(3, 9, generator=gen) > 0.4).float()
    square = weight.view(3, 1, 9, 1) * weight.view(3, 1, 1, 9)
    for shape, keep, floor in [
        ((3, 9, 20), weight.view(3, 9, 1), None), ((3, 4, 9, 9), square, -100.0), ((3, 4, 9, 9), None, -100.0),
        ((3, 7), None, None), ((3, 200, 400), None, None), ((3, 9, 2, 2, 2), None, None),
    ]:  # fmt: skip
        a, b = torch.randn(2, *shape, generator=gen).unbind()
        if floor is not None:
            a[..., -3:] -= 1e4
            b[..., -2:] = torch.finfo(torch.float32).min
        a, b, k = a.to(device), b.to(device), None if keep is None else keep.to(device)
        leaf, exact = a.clone().requires_grad_(), a.double().requires_grad_()
        got, want = row_squares(leaf, b, k, floor), squares_formula(exact, b, k, floor)
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)  # float sums
        up = torch.tensor([0.5, -2.0, 1.0], device=device)
        kind = type(got.grad_fn).__name__
        assert ("Fused" in kind) == (on and device == "cpu" and len(shape) < 5), kind
        got.backward(up)
        want.backward(up.double())
        torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


RUN = """
import warnings, torch
from kdlsq_fx.lsq import make_quantizer
from kdlsq_fx.qconfig import QSpec
q = make_quantizer(QSpec(bits=4), role="act").train()
q.init_from(torch.randn(9))
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(2):
        out = q(torch.randn(9, requires_grad=True))
print(type(out.grad_fn).__name__, [str(w.message) for w in seen])
"""


@pytest.mark.parametrize(
    ("extra", "kind", "said"),
    [({"KDLSQ_FUSED": "0"}, "_Kdlsq", "[]"), ({"CXX": "no-such-compiler"}, "_Kdlsq", "no C++ compiler")],
)
def test_switch_and_missing_compiler(extra, kind, said):
    env = {**os.environ, **extra}
    done = subprocess.run([sys.executable, "-c", RUN], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(kind) and said in done.stdout and done.stdout.count("C++") <= 1
