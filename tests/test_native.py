"""The native backend: its kernels against the op table's NumPy forms, whole models against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from calibrated import CONFIGS, calibrated, livelier
from families import FAMILIES, batch, for_model, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import kdlsq_fx as kq
from kdlsq_fx.backends import native, native_library, native_onednn
from kdlsq_fx.backends import native_attention as attending
from kdlsq_fx.backends import native_kernels as kernels
from kdlsq_fx.errors import InputError
from kdlsq_fx.ops.fixed_point import dyadic, numpy_int_add, numpy_requantize
from kdlsq_fx.ops.int_norm import norm_constants, numpy_int_layer_norm
from kdlsq_fx.ops.int_softmax import exp_table, numpy_int_softmax, prob_divider, score_grid
from kdlsq_fx.ops.integer import numpy_int_linear, numpy_int_matmul
from kdlsq_fx.ops.qdq import numpy_quantize

torch.set_num_threads(1)

needs_kernels = pytest.mark.skipif(bool(native_library.available()), reason=native_library.available())
CODES = {torch.int8: (-128, 128), torch.uint8: (0, 256)}
seeds = st.integers(0, 2**31)


def codes(generator, *shape, dtype=torch.int8, low=None):
    first, last = CODES[dtype]
    return torch.randint(first if low is None else low, last, shape, generator=generator).to(dtype)


def fixed(generator, channels, bits=8):
    """A requantization of sums of some thousands, one or several multipliers; ratio 1/2 or 1/64 now and then: ties."""
    ratios = torch.rand(channels or 1, generator=generator) * 0.1 + 1e-4
    ratios[torch.rand(ratios.shape, generator=generator) < 0.3] = 1 / 64
    pairs = [dyadic(float(r)) for r in ratios]
    m, s = ([p[i] for p in pairs] for i in range(2))
    top = 2 ** (bits - 1)
    if channels == 0:
        return kernels.Fixed(m[0], s[0], 0, -top + 1, top - 1)
    return kernels.Fixed(torch.tensor(m), torch.tensor(s), 3, 0, 2**bits - 1)


def by_numpy(acc, f):
    m, s = (v if isinstance(v, int) else v.numpy() for v in (f.multiplier, f.shift))
    return numpy_requantize(acc, m, s, f.zero_point, f.qmin, f.qmax)


@needs_kernels
@settings(max_examples=60, deadline=None)
@given(
    seeds,
    st.integers(1, 20),
    st.integers(1, 140),
    st.integers(1, 70),
    st.sampled_from(list(CODES)),
    st.booleans(),
    st.integers(-9, 9),
)
def test_linear_is_the_references(seed, rows, n, k, dtype, per_channel, zero):
    g = torch.Generator().manual_seed(seed)
    x, w = codes(g, 2, rows, k, dtype=dtype), codes(g, n, k, low=-127)
    bias = torch.randint(-5000, 5000, (n,), generator=g, dtype=torch.int32)
    acc = numpy_int_linear(x.numpy(), w.numpy(), bias.numpy(), zero)
    assert np.array_equal(kernels.linear(dtype, w, bias, zero)(x).numpy(), acc)

    f = fixed(g, n if per_channel else 0)
    made = kernels.linear(dtype, w, bias, zero, fixed=f)(x)
    assert made.dtype == f.dtype and np.array_equal(made.numpy(), by_numpy(acc, f))

    table = codes(g, 256)
    looked = kernels.linear(dtype, w, bias, zero, fixed=f, table=table)(x)
    assert np.array_equal(looked.numpy(), table.numpy()[by_numpy(acc, f).astype(np.uint8)])

    scale = torch.rand(n if per_channel else (), generator=g) * 1e-3
    residual = torch.randn(2, rows, n, generator=g)
    real = torch.from_numpy(acc).float() * scale
    assert torch.equal(kernels.linear(dtype, w, bias, zero, scale=scale)(x, residual), real + residual)
    grid = kernels.CodeGrid(0.05, 0, -127, 127)
    plain = kernels.linear(dtype, w, bias, zero, scale=scale, curve="none", grid=grid)(x)
    assert np.array_equal(plain.numpy(), numpy_quantize(real.numpy(), np.float32(0.05), 0, -127, 127))
    gelu = kernels.linear(dtype, w, bias, zero, scale=scale, curve="gelu", grid=grid)(x)
    exact = torch.nn.functional.gelu(real.double()) / 0.05
    assert ((gelu.double() - exact.clamp(-127, 127)).abs() <= 0.5 + 1e-4).all()


@needs_kernels
def test_linear_takes_strided_rows_and_bare_ones():
    g = torch.Generator().manual_seed(0)
    w, x = codes(g, 24, 16), codes(g, 3, 5, 16)
    run = kernels.linear(torch.int8, w, None, 0)
    for rows in (x[:, 0], x[0, 0], x.transpose(0, 1), x[:0]):
        assert np.array_equal(run(rows).numpy(), numpy_int_linear(rows.numpy(), w.numpy()))


@needs_kernels
@settings(max_examples=50, deadline=None)
@given(seeds, st.integers(1, 15), st.integers(1, 70), st.integers(1, 70), st.sampled_from(list(CODES)), st.booleans())
def test_products_are_the_references(seed, n, k, m, dtype, transposed):
    g = torch.Generator().manual_seed(seed)
    a, b = codes(g, 2, 3, n, k, dtype=dtype), codes(g, 2, 3, m, k, dtype=dtype).transpose(2, 3)
    b = b if transposed else b.contiguous()
    for left in (a, a.transpose(0, 1).contiguous().transpose(0, 1)):
        made = attending.product(dtype, dtype, 5, -3)(left, b)
        assert np.array_equal(made.numpy(), numpy_int_matmul(a.numpy(), b.numpy(), 5, -3))


@needs_kernels
@settings(max_examples=80, deadline=None)
@given(seeds, st.integers(1, 70), st.booleans())
def test_requantize_is_exact_at_ties(seed, n, per_channel):
    g = torch.Generator().manual_seed(seed)
    f = fixed(g, n if per_channel else 0)
    acc = torch.randint(-(2**14), 2**14, (5, n), generator=g, dtype=torch.int32)
    acc[0] = torch.randint(-(2**31), 2**31, (n,), generator=g).to(torch.int32)
    assert np.array_equal(kernels.requantize(f)(acc).numpy(), by_numpy(acc.numpy(), f))
    halves = kernels.Fixed(2**30, 31, 0, -128, 127)
    assert np.array_equal(kernels.requantize(halves)(acc).numpy(), by_numpy(acc.numpy(), halves))


@needs_kernels
@settings(max_examples=50, deadline=None)
@given(seeds, st.floats(1e-4, 10), st.integers(-5, 5))
def test_quantize_is_exact_at_ties(seed, step, zero):
    g = torch.Generator().manual_seed(seed)
    scale = np.float32(step)
    near = (torch.arange(-150, 150) + 0.5).float() * float(scale)
    x = torch.cat(
        [near, near.nextafter(torch.tensor(1e9)), torch.randn(77, generator=g) * 90 * step, torch.tensor([1e30, -1e30])]
    )
    made = kernels.quantize(kernels.CodeGrid(float(scale), zero, -127, 127))(x)
    assert np.array_equal(made.numpy(), numpy_quantize(x.numpy(), scale, zero, -127, 127))


@needs_kernels
@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 70), st.booleans())
def test_integer_softmax_is_the_references(seed, n, masked):
    g = torch.Generator().manual_seed(seed)
    multiplier, shift, limit = score_grid(float(torch.rand((), generator=g)) * 1e-2 + 1e-4, table=True)
    divider = prob_divider(1 / 255)
    x = torch.randint(-(2**13), 2**13, (2, 3, 4, n), generator=g, dtype=torch.int32)
    x[0, 0, 0] = torch.randint(-(2**31), 2**31, (n,), generator=g).to(torch.int32)
    keep = torch.rand(2, 1, 1, n, generator=g) < 0.7 if masked else None
    whole = attending.Whole(exp_table(), multiplier, shift, limit, divider)
    made = attending.int_softmax(whole, kernels.CodeGrid(1.0, 0, 0, 255))(x, keep)
    wanted = numpy_int_softmax(
        x.numpy(),
        None if keep is None else keep.numpy(),
        exp_table().numpy(),
        multiplier,
        shift,
        limit,
        divider,
        0,
        0,
        255,
    )
    assert np.array_equal(made.numpy(), wanted)


def norm_of(g, n, low, high):
    gamma, beta = torch.randn(n, generator=g).double(), torch.randn(n, generator=g).double()
    return norm_constants(gamma, beta, n, 1e-5, 0.02, 1e-12, low, high)


@needs_kernels
@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 70))
def test_integer_sums_and_norms_are_the_references(seed, n):
    g = torch.Generator().manual_seed(seed)
    c = norm_of(g, n, -(2**21), 2**21 - 1)
    norm = kernels.NormCodes(c.gain, c.offset, c.fraction, c.eps, c.shift, 3, -128, 127)
    rest = (c.gain.numpy(), c.offset.numpy(), c.fraction, c.eps, c.shift, 3, -128, 127)
    x = torch.randint(-(2**21), 2**21, (2, 3, n), generator=g, dtype=torch.int32)
    x[0, 0] = 7
    assert np.array_equal(kernels.int_layer_norm(norm)(x).numpy(), numpy_int_layer_norm(x.numpy(), *rest))

    terms = [x, codes(g, 2, 3, n), codes(g, n, dtype=torch.uint8)]
    vector = torch.randint(-(2**29), 2**29, (n,), generator=g)
    factors, zeros, ends = [2**20, vector, -(2**27)], [0, 5, 128], (30, 0, -(2**21), 2**21 - 1)
    wanted = numpy_int_add([t.numpy() for t in terms], [2**20, vector.numpy(), -(2**27)], zeros, *ends)
    assert np.array_equal(kernels.int_add(factors, zeros, *ends, torch.int32)(*terms).numpy(), wanted)
    both = kernels.int_add(factors, zeros, *ends, torch.int32, norm)(*terms)
    assert np.array_equal(both.numpy(), numpy_int_layer_norm(wanted, *rest))


@needs_kernels
@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 21), st.integers(1, 70), st.sampled_from([4, 6, 20, 64, 80]), st.sampled_from(list(CODES)))
def test_attention_in_integers_is_the_references(seed, rows, keys, dim, dtype):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (codes(g, 2, length, 3, dim, dtype=dtype).transpose(1, 2) for length in (rows, keys, keys))
    zero, f = (0 if dtype == torch.int8 else 120), fixed(g, 0)
    keep = torch.rand(2, 1, 1, keys, generator=g) < 0.7
    multiplier, shift, limit = score_grid(1e-3, table=True)
    whole = attending.Whole(exp_table(), multiplier, shift, limit, prob_divider(1 / 255))
    side = attending.Side(dtype, zero)
    run = attending.attention(side, side, side, kernels.CodeGrid(1.0, 0, 0, 255), f, whole=whole)
    made = run(q, k.transpose(2, 3), v, keep)
    scores = numpy_int_matmul(q.numpy(), k.transpose(2, 3).numpy(), zero, zero)
    ends = (exp_table().numpy(), multiplier, shift, limit, prob_divider(1 / 255), 0, 0, 255)
    probs = numpy_int_softmax(scores, keep.numpy(), *ends)
    assert np.array_equal(made.numpy(), by_numpy(numpy_int_matmul(probs, v.numpy(), 0, zero), f))


@needs_kernels
@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(1, 21), st.integers(1, 70), st.sampled_from(["none", "keys", "scores"]))
def test_attention_in_floats_is_one_code_away_at_most(seed, rows, keys, mask):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (codes(g, 2, length, 3, 32).transpose(1, 2) for length in (rows, keys, keys))
    shape = {"none": (), "keys": (2, 1, 1, keys), "scores": (2, 3, rows, keys)}[mask]
    added = (torch.rand(shape, generator=g) < 0.4) * torch.finfo(torch.float32).min if shape else None
    side, grid, f = (
        attending.Side(torch.int8, 0),
        kernels.CodeGrid(1 / 255, 0, 0, 255),
        kernels.Fixed(*dyadic(1 / 255), 0, -127, 127),
    )
    made = attending.attention(side, side, side, grid, f, scale=1e-4)(
        q, k.transpose(2, 3), v, *(() if added is None else (added,))
    )
    scores = q.double() @ k.transpose(2, 3).double() * 1e-4 + (0 if added is None else added)
    probs = (scores.softmax(-1) * 255).round()
    wanted = (probs @ v.double() / 255).round()
    assert (made.double() - wanted).abs().max() <= 2  # a probability one code off moves a result by v / 255
    codes_of = attending.softmax(grid)(scores.float())
    assert (codes_of.double() - probs).abs().max() <= 1


@needs_kernels
def test_curves_are_right_to_float32():
    import ctypes

    x = torch.cat([torch.linspace(-12, 12, 100_003), torch.tensor([0.0, -0.0, 1e30, -1e30])])
    lib, out = native_library.library(), torch.empty(100_007)
    for name, where, wanted in (
        ("gelu", x, torch.nn.functional.gelu(x.double())),
        ("exp", -x.abs(), (-x.abs()).double().exp()),
    ):
        getattr(lib, f"kdlsq_{name}")(
            ctypes.c_void_p(where.data_ptr()), ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(where.numel())
        )
        off = (out.double() - wanted).abs() / wanted.abs().clamp(min=1)
        assert off.max() < 8 * 2**-24, name


@pytest.mark.parametrize("preset", CONFIGS)
def test_a_model_gives_the_references_codes(preset, tmp_path):
    qat = calibrated(preset)
    batches = [batch(3, 21), batch(1, 5), batch(2, 16)]
    model, reference = kq.convert(qat, backend="native"), kq.convert(qat)
    model.save_pretrained(tmp_path / "int")
    again = kq.from_pretrained(tmp_path / "int", backend="native")
    seen = kq.compare(reference.gm, model, batches, exact=True)
    assert not seen.unmatched and seen.max_steps <= (0 if preset.endswith("-int") else 1)
    assert seen.max_share < 1e-3
    for data in batches:
        found, wanted = model(**data), reference(**data)
        assert torch.equal(found[0], again(**data)[0])
        if preset.endswith("-int"):
            assert torch.equal(found[0], wanted[0])
        else:
            assert torch.allclose(found[0], wanted[0], atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("preset", ["W8E8A8", "W4E4A8-int"])
def test_every_family_runs(family, preset):
    model = livelier(tiny(family))
    qat = kq.prepare_qat(model, preset)
    data = [for_model(model, batch(3, length, seed=length)) for length in (9, 17)]
    kq.calibrate(qat, data)
    qat.eval()
    native_model = kq.convert(qat, backend="native", allow_islands=True)
    plain = kq.convert(qat, backend="torch", allow_islands=True)
    assert native_model.native.rows
    for one in data:
        found, wanted = native_model(**one)[0], plain(**one)[0]
        if plain.integer_only:
            assert torch.equal(found, wanted)
        else:
            assert (found - wanted).abs().max() <= 0.05 * wanted.abs().max()
    seen = kq.compare(plain.gm, native_model, data, exact=False)
    assert not seen.unmatched and seen.max_steps <= 1 and seen.max_share < 5e-3


@needs_kernels
@pytest.mark.parametrize("preset", ["W8E8A8", "W8E8A8-int"])
def test_fused_kernels_give_what_their_parts_give(preset):
    qat = calibrated(preset)
    model, data = kq.convert(qat, backend="native"), batch(3, 21)
    apart = model.native.run(model.split(**data)[1], lambda site, found: found)
    assert torch.equal(model(**data)[0], apart[0])
    kernel_names = {r.kernel for r in model.native.rows}
    assert "attention" in kernel_names and "attention" in model.native.report()


def test_threads_change_nothing():
    qat = calibrated("W8E8A8-int")
    model, data = kq.convert(qat, backend="native"), batch(5, 23)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            found.append(model(**data)[0])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.parametrize("preset", ["W8E8A8", "W2E2A8-int"])
def test_without_a_compiler_linears_run_in_onednn(preset, monkeypatch):
    qat = calibrated(preset)
    monkeypatch.setattr(native, "available", lambda: "no C++ compiler was found")
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler"):
        model = kq.convert(qat, backend="native")
    data = batch(3, 21)
    if native_onednn.saturates():
        pytest.skip("this CPU's int8 products saturate")
    seen = kq.compare(kq.convert(qat).gm, model, data, exact=True)
    assert seen.max_steps <= 1 and seen.max_share < 1e-2 and not seen.unmatched
    assert "linear + requantize" in {r.kernel for r in model.native.rows}


def test_other_devices_are_refused():
    model = kq.convert(calibrated("W8E8A8"), backend="native")
    with pytest.raises(InputError, match="runs on the CPU"):
        model.native(*(torch.zeros(1, 4, dtype=torch.long, device="meta") for _ in model.input_names))


def test_the_library_says_why_it_is_not_there(monkeypatch, tmp_path):
    build = native_library.library.__wrapped__
    monkeypatch.setenv("KDLSQ_CACHE", str(tmp_path / "open"))
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    for change, text in (
        (lambda: None, "others may write"),
        (lambda: monkeypatch.setenv("CXX", "no-such-compiler"), "no C\\+\\+ compiler"),
        (lambda: monkeypatch.setattr(native_library, "NEEDED", ("no_such_feature",)), "this CPU lacks no_such_feature"),
    ):
        change()
        with pytest.raises(native_library.Unavailable, match=text):
            build()


@needs_kernels
def test_a_broken_compiler_leaves_nothing_behind(monkeypatch, tmp_path):
    compiler = tmp_path / "cxx"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho it broke >&2\nexit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("KDLSQ_CACHE", str(tmp_path / "cache"))
    with pytest.raises(native_library.Unavailable, match="it broke"):
        native_library.library.__wrapped__()
    assert not list((tmp_path / "cache").iterdir())
