"""Integer ops as ONNX against exact rational arithmetic and their NumPy forms: equal bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from sketch import Sketch
from test_ops import one_op

from kdlsq_fx.backends.onnx_grids import GridBuilder
from kdlsq_fx.backends.onnx_integer import OPSET, export_integer, integer_only
from kdlsq_fx.backends.onnx_runtime import run_onnx
from kdlsq_fx.backends.reference import ReferenceModel
from kdlsq_fx.errors import LoweringError
from kdlsq_fx.op import BY_NAME
from kdlsq_fx.ops.emit_integer import round_divide, round_shift
from kdlsq_fx.ops.fixed_point import dyadic, requantize
from kdlsq_fx.ops.int_gelu import gelu_constants, int_gelu
from kdlsq_fx.ops.int_mean import int_mean, mean_constants
from kdlsq_fx.ops.int_norm import int_layer_norm, norm_constants
from kdlsq_fx.ops.int_softmax import exp_table, int_softmax, prob_divider, score_grid
from kdlsq_fx.ops.integer import int_conv1d, int_linear, int_matmul
from kdlsq_fx.ops.qdq import dequantize
from kdlsq_fx.ranges import INT32_MAX

torch.set_num_threads(1)
BOTH = pytest.mark.parametrize("optimize", [False, True], ids=["plain", "optimized"])
END = 2**62


def written(function: Callable[..., Any], file: Path, **inputs: np.ndarray) -> None:
    """A file of what ``function`` emits for int64 inputs."""
    g = GridBuilder()
    values = []
    for name, array in inputs.items():
        value = ir.val(name, ir.DataType.INT64, list(array.shape))
        g.describe(value, torch.int64, list(array.shape))
        values.append(value)
    result = function(g, *values)
    result.type = ir.TensorType(ir.DataType.INT64)
    result.shape = ir.Shape(np.broadcast_shapes(*(a.shape for a in inputs.values())))
    graph = ir.Graph(
        values,
        [result],
        nodes=g.nodes,
        initializers=list(g.initializers.values()),
        opset_imports={"": OPSET},
        name="t",
    )
    model = ir.to_proto(ir.Model(graph, ir_version=10))
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(file))


def shift_cases(shift: int) -> list[int]:
    """The ends, what lies around 0, and values around ties whose floor is even and odd, of both signs."""
    rng = np.random.default_rng(shift)
    ends = [END - 1, 1 - END, END - 2**60, 2**60 - END, 0, 1, -1]
    floors = [-3, -2, -1, 0, 1, 2, *rng.integers(-(2**61), 2**61, 20).tolist()]
    near = [((f >> shift) << shift) + (1 << (shift - 1)) + off for f in floors for off in (-1, 0, 1)]
    near += [(f << shift) + (1 << (shift - 1)) + off for f in range(-3, 3) for off in (-1, 0, 1)]
    found = [*ends, *near, *rng.integers(1 - END, END, 30).tolist()]
    return [min(max(v, 1 - END), END - 1) for v in found]


@BOTH
@pytest.mark.parametrize("dynamic", [False, True])
def test_round_shift_is_half_to_even(dynamic: bool, optimize: bool, tmp_path: Path) -> None:
    """Every shift from 1 to 62: as constants of channels, and picked from a table at run time."""
    shifts = np.arange(1, 63)
    rows = [shift_cases(int(s)) for s in shifts]
    v, at = np.array(rows), np.arange(62)[:, None]

    def emit(g: Any, v: Any, at: Any) -> Any:
        if dynamic:
            return round_shift(g, v, shifts, lambda table: g.Gather(g.constant(table), at, axis=0))
        return g.Add(round_shift(g, v, shifts[:, None], g.constant), g.Sub(at, at))

    written(emit, tmp_path / "f.onnx", v=v, at=at)
    (found,) = run_onnx(tmp_path / "f.onnx", {"v": v, "at": at}, optimize).values()
    wanted = [[round(Fraction(x, 2 ** int(s))) for x in row] for row, s in zip(rows, shifts)]
    np.testing.assert_array_equal(found, wanted)


@BOTH
def test_round_divide_is_half_to_even(optimize: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    d = [1, 2, 3, 4, 7, 768, 2**20, 2**31 - 1, 2**61 - 1, 2**61 - 2, *(int(2**e) for e in rng.uniform(0, 60.9, 50))]
    n = []
    for one in d:
        floors = [q for q in (-3, -2, -1, 0, 1, 2) if abs(q) * one < 2**60]
        ties = [q * one + one // 2 + off for q in floors for off in (-1, 0, 1)]
        row = [*ties, 2**61 - 1, 1 - 2**61, *rng.integers(1 - 2**61, 2**61, 20).tolist()]
        n.append([min(max(v, 1 - 2**61), 2**61 - 1) for v in (row + [0] * 50)[:50]])
    arrays = {"n": np.array(n), "d": np.array(d)[:, None]}
    written(round_divide, tmp_path / "f.onnx", **arrays)
    (found,) = run_onnx(tmp_path / "f.onnx", arrays, optimize).values()
    np.testing.assert_array_equal(found, [[round(Fraction(v, one)) for v in row] for row, one in zip(n, d)])


def same(file: Path, *args: Any, target: Any, optimize: bool, inputs: int = 1, **kwargs: Any) -> np.ndarray:
    """One op on its arguments, the first ``inputs`` tensors as inputs: the file equals the NumPy reference."""
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    feed = {f"x{i}": t for i, t in enumerate(tensors[:inputs])}
    sketch = Sketch(**feed)
    nodes = iter([*sketch.nodes.values(), *(sketch.const(f"c{i}", t) for i, t in enumerate(tensors[inputs:]))])
    placed = [next(nodes) if isinstance(a, torch.Tensor) else a for a in args]
    node = sketch.graph.call_function(target, tuple(placed), kwargs)
    gm = sketch.done(node, stage="int")
    arrays = {k: v.numpy() for k, v in feed.items()}
    (wanted,) = ReferenceModel(gm).run(arrays)
    export_integer(gm, file)
    assert integer_only(file) == []
    (found,) = run_onnx(file, arrays, optimize).values()
    assert found.dtype == wanted.dtype
    np.testing.assert_array_equal(found, wanted)
    return np.asarray(found)


def draw(*shape: int, low: int = -128, high: int = 127, dtype: torch.dtype = torch.int8, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int64).to(dtype)


@BOTH
@pytest.mark.parametrize("ends", [(-128, 127), (0, 255), (-1, 1), (-(2**15), 2**15 - 1), (-(2**21), 2**21 - 1)])
def test_requantize(ends: tuple[int, int], optimize: bool, tmp_path: Path) -> None:
    """Multipliers from 1 to 2**31 - 1 over accumulators up to the ends of int32; one, and one per channel."""
    acc = torch.cat(
        [torch.tensor([-(2**31), 2**31 - 1, 0, 1, -1, 3, 5, -3], dtype=torch.int32), draw(1000, dtype=torch.int32)]
    )
    acc = torch.cat([acc, draw(1000, low=-(2**31), high=2**31 - 1, dtype=torch.int32)]).reshape(-1, 8)
    for multiplier, shift in ((1, 1), (2**30, 31), (2**31 - 1, 62), dyadic(0.0123), dyadic(1e-7), dyadic(300.0)):
        same(tmp_path / "f.onnx", acc, multiplier, shift, 5, *ends, target=requantize, optimize=optimize)
    pairs = [dyadic(10.0**-k) for k in range(8)]
    m, s = (torch.tensor([p[i] for p in pairs]) for i in (0, 1))
    same(tmp_path / "f.onnx", acc, m, s, 0, *ends, target=requantize, optimize=optimize)
    same(tmp_path / "f.onnx", acc.T.contiguous(), m, s, 0, *ends, 0, target=requantize, optimize=optimize)


DTYPES = [(torch.int8, -128, 127), (torch.uint8, 0, 255), (torch.int16, -3000, 3000), (torch.int32, -9000, 9000)]


@BOTH
@pytest.mark.parametrize("right", DTYPES, ids=lambda d: str(d[0])[6:])
@pytest.mark.parametrize("left", DTYPES, ids=lambda d: str(d[0])[6:])
def test_products_of_all_containers(left: Any, right: Any, optimize: bool, tmp_path: Path) -> None:
    """Zero points within the container and outside; the codes reach both ends."""
    for a_zero, b_zero in itertools.product((0, 3, -7, 300), (0, 120, -1)):
        a = draw(2, 3, 5, 17, dtype=left[0], low=left[1], high=left[2])
        b = draw(2, 3, 17, 4, dtype=right[0], low=right[1], high=right[2], seed=1)
        a[0, 0, 0], b[0, 0, :, 0] = left[1], right[2]
        args = (a, b, a_zero, b_zero, 10000, 10000)
        same(tmp_path / "f.onnx", *args, target=int_matmul, inputs=2, optimize=optimize)
    w, bias = draw(6, 17, seed=2), draw(6, low=-(2**28), high=2**28, dtype=torch.int32)
    for x in (a, a[0, 0]):
        same(tmp_path / "f.onnx", x, w, bias, -7, target=int_linear, bound=INT32_MAX, optimize=optimize)
        same(tmp_path / "f.onnx", x, w, None, left[1], target=int_linear, bound=INT32_MAX, optimize=optimize)


@BOTH
@pytest.mark.parametrize("dtype,low,high", DTYPES[:2])
def test_convolutions(dtype: torch.dtype, low: int, high: int, optimize: bool, tmp_path: Path) -> None:
    x, bias = draw(2, 6, 11, dtype=dtype, low=low, high=high), draw(4, dtype=torch.int32)
    for groups, stride, padding, dilation in itertools.product((1, 2), (1, 2), (0, 2), (1, 3)):
        w = draw(4, 6 // groups, 3, seed=groups)
        args = (x, w, bias, [stride], [padding], [dilation], groups)
        same(tmp_path / "f.onnx", *args, 0, target=int_conv1d, bound=INT32_MAX, optimize=optimize)
        same(tmp_path / "f.onnx", *args, 100, target=int_conv1d, bound=INT32_MAX, optimize=optimize)
    with pytest.raises(LoweringError, match="no ONNX form for a convolution of torch.int16"):
        same(
            tmp_path / "f.onnx", x.to(torch.int16), *args[1:], 0, target=int_conv1d, bound=INT32_MAX, optimize=optimize
        )


@BOTH
@pytest.mark.parametrize("table", [True, False], ids=["table", "polynomial"])
def test_softmax(table: bool, optimize: bool, tmp_path: Path) -> None:
    """Scores whose differences end in the table and far outside, up to the ends of int32; rows without a key."""
    keep = torch.ones(4, 1, 1, 9, dtype=torch.bool)
    keep[1, ..., 4:], keep[2], keep[3, ..., 0] = False, False, False
    for scale_x, reach, scale_p in itertools.product((1e-5, 1e-3, 0.7), (300, 10**5, 2**31 - 1), (1 / 255, 1 / 15)):
        x = draw(4, 3, 9, 9, low=-reach - 1, high=reach, dtype=torch.int32)
        x[0, 0, 0] = 7
        constants = (exp_table() if table else None, *score_grid(scale_x, table=table), prob_divider(scale_p))
        for mask in (keep, keep.expand(4, 1, 9, 9).contiguous()):
            args = (x, mask, *constants, 1, 0, 255)
            found = same(tmp_path / "f.onnx", *args, target=int_softmax, inputs=2, optimize=optimize)
            assert (found[2] == 1).all()
        same(tmp_path / "f.onnx", x, None, *constants, 0, 0, 255, target=int_softmax, optimize=optimize)


@BOTH
@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.3])
def test_layer_norm(eps: float, optimize: bool, tmp_path: Path) -> None:
    """Rows from no variance at all to the largest, so that v has from 1 to some 60 bits."""
    reach = 2**21
    rows = [torch.full((48,), 5), torch.tensor([reach - 1] * 24 + [-reach] * 24)]
    rows += [draw(48, low=-(2**k), high=2**k - 1, dtype=torch.int64, seed=k) for k in range(22)]
    one = torch.zeros(48, dtype=torch.int64)
    one[3] = 1
    x = torch.stack([*rows, one])[None].to(torch.int32)
    gamma, beta = torch.linspace(-2, 2, 48).double(), torch.linspace(1, -1, 48).double()
    for scale_out, ends in ((0.02, (-128, 127)), (1e-6, (-(2**21), 2**21 - 1)), (0.5, (-8, 7))):
        c = norm_constants(gamma, beta, 48, 2.0**-17, scale_out, eps, -reach, reach - 1)
        args = (x, c.gain, c.offset, c.fraction, c.eps, c.shift, 3, *ends)
        same(tmp_path / "f.onnx", *args, target=int_layer_norm, optimize=optimize)
        args = (x, c.gain, c.offset, 0, 1, c.shift, 0, *ends)
        same(tmp_path / "f.onnx", *args, target=int_layer_norm, optimize=optimize)


@BOTH
def test_gelu_and_mean(optimize: bool, tmp_path: Path) -> None:
    for dtype, reach, scale in ((torch.int32, 2**21, 1e-5), (torch.int16, 2**15, 3e-4), (torch.int8, 128, 0.05)):
        x = torch.arange(-reach, reach, max(reach // 3000, 1)).to(dtype)
        constants = (*gelu_constants(scale, 0.03), -100, -128, 127)
        same(tmp_path / "f.onnx", x, 5, *constants, target=int_gelu, optimize=optimize)
    keep = torch.ones(4, 9, dtype=torch.bool)
    keep[1, 4:], keep[2], keep[3, 1:] = False, False, False
    for dtype, low, high in DTYPES:
        x = draw(4, 9, 7, dtype=dtype, low=low, high=high)
        constants = (-4, *mean_constants(0.02, 0.015, 9, max(high, 4) + 4), 1, -128, 127)
        same(tmp_path / "f.onnx", x, keep, *constants, target=int_mean, inputs=2, optimize=optimize)


MOVERS = sorted(name for name, op in BY_NAME.items() if op.sig == "same -> same")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.bool])
@pytest.mark.parametrize("name", MOVERS)
def test_codes_are_moved_in_every_container(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    op = BY_NAME[name]
    assert op.sample is not None
    args, kwargs = op.sample()

    def as_codes(v: Any) -> Any:
        if isinstance(v, torch.Tensor):
            return (v % 5 == 0) if dtype == torch.bool else v.to(dtype)
        return [as_codes(p) for p in v] if isinstance(v, list) else v

    cast = tuple(as_codes(a) for a in args)
    gm, feed, _ = one_op(replace(op, sample=lambda: (cast, kwargs)))
    gm.meta["stage"] = "int"
    export_integer(gm, tmp_path / "f.onnx")
    for optimize in (False, True):
        found = run_onnx(tmp_path / "f.onnx", {k: v.numpy() for k, v in feed.items()}, optimize)
        for f, w in zip(found.values(), gm(*feed.values()), strict=True):
            assert f.dtype == w.numpy().dtype
            np.testing.assert_array_equal(f, w.numpy())


@BOTH
def test_results_are_reals_as_the_reference_makes_them(optimize: bool, tmp_path: Path) -> None:
    """Zero points, a scale per channel along either side, and accumulators that float32 rounds."""
    acc = draw(3, 4, low=-(2**31), high=2**31 - 1, dtype=torch.int32)
    codes = draw(3, 4)
    cases = [
        (codes, torch.tensor(0.3), -7, None),
        (acc, torch.tensor(1e-5), 0, None),
        (acc, torch.tensor([0.1, 0.2, 0.3, 0.4]), 0, -1),
        (codes, torch.tensor([0.1, 0.2, 0.3]), 5, 0),
    ]
    for x, scale, zero_point, axis in cases:
        same(tmp_path / "f.onnx", x, scale, zero_point, axis, target=dequantize, optimize=optimize)


def test_products_saturate_on_no_cpu(tmp_path: Path) -> None:
    """On the left uint8 only; on the right int8 only where the constant codes have 7 bits, else uint8."""
    x = draw(2, 3, 8)
    for low, high, wanted in ((-64, 63, "INT8"), (-65, 63, "UINT8"), (-64, 64, "UINT8")):
        w = draw(4, 8, low=low, high=high)
        w[0, :2] = torch.tensor([low, high])
        same(tmp_path / "f.onnx", x, w, None, 3, target=int_linear, bound=INT32_MAX, optimize=True)
        graph = onnx.shape_inference.infer_shapes(onnx.load(str(tmp_path / "f.onnx"))).graph
        (product,) = [n for n in graph.node if n.op_type == "MatMulInteger"]
        dtypes = {v.name: v.type.tensor_type.elem_type for v in graph.value_info}
        dtypes.update({t.name: t.data_type for t in graph.initializer})
        names = [onnx.TensorProto.DataType.Name(dtypes[n]) for n in product.input]
        assert names == ["UINT8", wanted, "UINT8", wanted]
