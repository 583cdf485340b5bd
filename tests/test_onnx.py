"""ONNX files against the graphs they were written from, under ONNX Runtime with and without its optimizer."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from families import FAMILIES, batch, for_model, tiny
from sketch import Sketch, Values
from torch import fx

from kdlsq_fx.api import export_onnx, freeze_qat, prepare_qat
from kdlsq_fx.backends.onnx import export, metadata_of
from kdlsq_fx.backends.onnx_codes import OnnxCodes
from kdlsq_fx.backends.onnx_runtime import OnnxModel, int8_saturates, kernel_report, run_onnx
from kdlsq_fx.calibration import calibrate
from kdlsq_fx.capture import capture
from kdlsq_fx.comparison import compare, in_float64
from kdlsq_fx.errors import CheckpointError, ConfigError, InputError, LoweringError
from kdlsq_fx.ops.qdq import dequantize, quantize

torch.set_num_threads(1)
BOTH = pytest.mark.parametrize("optimize", [False, True], ids=["plain", "optimized"])
aten = torch.ops.aten
TIE = 2e-4  # in steps: the rounding error of a float32 sum of some hundred 8-bit products


def near_ties_only(gm: fx.GraphModule, feed: dict[str, torch.Tensor], optimize: bool, target: str = "ort-cpu") -> None:
    """Each site fed the same codes: at most one step apart, and only where x / scale is halfway between two codes."""
    exact = in_float64(gm)
    values = Values(exact)
    doubles = {k: v.double() if v.is_floating_point() else v for k, v in feed.items()}
    with torch.no_grad():
        values.run(*doubles.values())
    wanted = {n.meta["site"]: v.numpy() for n, v in values.seen.items() if n.target is quantize}
    onnx_codes = OnnxCodes(gm, target=target, optimize=optimize, threads=1)
    _, found = onnx_codes.forced(feed, wanted)
    assert found.keys() == wanted.keys()
    for site, steps in values.steps().items():
        off = np.abs(found[site] - wanted[site].astype(np.int64))
        assert off.max(initial=0) <= 1, site
        tie = np.abs(np.abs(steps - np.floor(steps)) - 0.5)
        assert np.all(tie[off > 0] < TIE), (site, tie[off > 0].max())


def span(bits: int, signed: bool) -> tuple[int, int]:
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


GRIDS = [(bits, signed, zp) for bits, signed in itertools.product(range(2, 9), (True, False)) for zp in (0, 1)]


@BOTH
@pytest.mark.parametrize("target", ["ort-cpu", "spec"])
@pytest.mark.parametrize("bits", [2, 3, 5, 7, 8, 12, 16, 22])
def test_quantize_is_exact(bits: int, target: str, optimize: bool, tmp_path: Path) -> None:
    """Ties, the ends of the range and what lies beyond it; narrow ranges and offsets. The scale is a power of two."""
    for signed, zero_point, narrow in itertools.product((True, False), (0, 1, 3), (0, 1)):
        low, high = span(bits, signed)
        low += narrow
        edge = torch.tensor([low, high], dtype=torch.float32)
        x = torch.cat([torch.arange(-40, 41) / 2, edge + 0.5, edge - 0.5, edge * 3, edge, torch.tensor([1e9, -1e9])])
        x = (x / 8).reshape(1, -1)
        sketch = Sketch(x=x)
        scale = sketch.const("s", torch.tensor(0.125))
        codes = sketch.call(quantize, sketch.nodes["x"], scale, zero_point, low, high, None)
        gm = sketch.done(sketch.call(dequantize, codes, scale, zero_point, None))
        export(gm, tmp_path / "q.onnx", target=target)
        found = run_onnx(tmp_path / "q.onnx", {"x": x.numpy()}, optimize)["output_0"]
        np.testing.assert_array_equal(found, gm(x)[0].numpy(), err_msg=f"{signed} {zero_point} {narrow}")


@BOTH
@pytest.mark.parametrize("axis", [0, 1])
def test_a_scale_per_channel(axis: int, optimize: bool, tmp_path: Path) -> None:
    x = torch.linspace(-2, 2, 12).reshape(3, 4)
    sketch = Sketch(x=x)
    scale = sketch.const("s", torch.tensor([0.5, 0.25, 0.125, 0.0625][: x.shape[axis]]))
    gm = sketch.done(
        sketch.call(dequantize, sketch.call(quantize, sketch.nodes["x"], scale, 0, -7, 7, axis), scale, 0, axis)
    )
    export(gm, tmp_path / "q.onnx")
    np.testing.assert_array_equal(run_onnx(tmp_path / "q.onnx", {"x": x.numpy()}, optimize)["output_0"], gm(x)[0])


def dense_net(bits: int, signed: bool, zero_point: int, shape: tuple[int, ...], per_channel: bool) -> Any:
    """Two quantized dense layers with a Relu between: bias on its grid as floats, then as int32 codes."""
    generator = torch.Generator().manual_seed(bits)
    low, high = span(bits, signed)
    x = torch.randn(*shape, 32, generator=generator)
    x = x if signed else x.abs()
    sketch, size, value = Sketch(x=x), 3.0 / high, None
    scale = torch.rand(24, generator=generator) * 0.01 + 0.001 if per_channel else torch.tensor(0.01)
    value = sketch.act(sketch.nodes["x"], "x", size, zero_point, low, high)
    codes = torch.randint(*span(bits, True), (24, 32), generator=generator)
    weight = sketch.weight("w", codes.to(torch.int8), scale)
    bias = torch.randint(-500, 500, (24,), generator=generator, dtype=torch.int32) * (torch.tensor(size) * scale)
    value = sketch.call(aten.linear.default, value, weight, sketch.const("b", bias))
    value = sketch.act(sketch.call(aten.relu.default, value), "h", float(scale.max()) * 40 / 2**bits, 0, 0, 2**bits - 1)
    codes = torch.randint(-3, 4, (5, 24), generator=generator, dtype=torch.int8)
    weight = sketch.weight("w2", codes, torch.tensor(0.02))
    b2 = sketch.const("b2", torch.tensor([7, -9, 0, 100000, 3], dtype=torch.int32))
    s2 = sketch.const("b2_scale", sketch.root.get_buffer("h_scale") * 0.02)
    bias2 = sketch.call(dequantize, b2, s2, 0, None)
    value = sketch.call(aten.linear.default, value, weight, bias2)
    return sketch.done(sketch.act(value, "y", 0.05, 0, -128, 127)), {"x": x}


@BOTH
@pytest.mark.parametrize("bits,signed,zero_point", GRIDS)
def test_dense_layers_at_every_width(bits: int, signed: bool, zero_point: int, optimize: bool) -> None:
    gm, feed = dense_net(bits, signed, zero_point, (2, 6), per_channel=bits % 2 == 0)
    near_ties_only(gm, feed, optimize)
    # ONNX Runtime 1.32 cannot optimize a signed Gemm of static sizes at opset 25: it turns the zero point of the
    # QuantizeLinear that it puts behind a Reshape into uint8 and leaves output_dtype at int8 (docs/targets.md).
    near_ties_only(gm, feed, optimize and not signed, "spec")


@pytest.mark.parametrize("shape", [(6,), (2, 6)])
def test_dense_layers_run_in_int8(shape: tuple[int, ...], tmp_path: Path) -> None:
    """Static sizes and a Relu are where ONNX Runtime falls back to fp32 if the file is written naively."""
    gm, _ = dense_net(8, True, 0, shape, per_channel=True)
    export(gm, tmp_path / "net.onnx")
    report = kernel_report(tmp_path / "net.onnx")
    assert (report.integer, report.floating) == (2, 0), report


@functools.cache
def prepared(family: str, preset: str, head: str = "ForSequenceClassification") -> Any:
    model = tiny(family, head).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(3)  # tiny random models hardly react to their inputs
    qat = prepare_qat(model, preset)
    calibrate(qat, [for_model(model, batch(8, 13, seed=i)) for i in range(3)])
    return qat.eval(), model


@pytest.mark.parametrize("family", FAMILIES)
def test_float_models_of_every_family(family: str, tmp_path: Path) -> None:
    model = tiny(family).eval()
    captured = capture(model)
    gm = captured.gm.eval()
    file = tmp_path / "float.onnx"
    export(gm, file, input_names=captured.inputs, output_names=captured.outputs)
    for optimize, (rows, length) in itertools.product((False, True), ((4, 9), (1, 5), (3, 14))):
        data = for_model(model, batch(rows, length))
        with torch.no_grad():
            wanted = gm(*(data[k] for k in captured.inputs))[0].numpy()
        found = run_onnx(file, {k: v.numpy() for k, v in data.items()}, optimize)["logits"]
        np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize(
    "family,preset",
    [
        ("bert", "W8E8A8"),
        ("bert", "W2E2A8"),
        ("bert", "W4E3A4-lsq+"),
        ("bert", "W8E8A8-int"),
        ("albert", "W4E4A8-int"),
        ("deberta-v2", "W8E8A8"),
        ("modernbert", "W8E8A8"),
    ],
)
def test_quantized_models(family: str, preset: str) -> None:
    """Each site fed the codes of the qdq graph: at most one step apart, on few outputs; end to end the same answer."""
    qat, model = prepared(family, preset)
    qdq, data = freeze_qat(qat), for_model(model, batch(6, 11, seed=7))
    for optimize in (False, True):
        seen = compare(qdq, OnnxCodes(qdq, optimize=optimize, threads=1), data, exact=False)
        assert seen.sites and seen.unmatched == ()
        assert seen.max_steps <= 1
        bytes_only = [s for s in seen.sites.values() if not s.site.endswith("/w")]
        assert max(s.share for s in bytes_only) <= 1e-3, seen
        assert seen.outputs[0].max_abs <= 0.05 * seen.outputs[0].largest  # one step travels
        assert seen.outputs[0].agree == seen.outputs[0].rows


@BOTH
def test_bert_codes_differ_at_near_ties_only(optimize: bool) -> None:
    qat, model = prepared("bert", "W8E8A8")
    qdq = freeze_qat(qat)
    near_ties_only(qdq.gm, for_model(model, batch(16, 12, seed=3)), optimize)


def test_compare_sees_a_wrong_scale() -> None:
    """What the comparison says is not empty: one scale changed in one of the two shows at that site."""
    qat, model = prepared("bert", "W8E8A8")
    qdq = freeze_qat(qat)
    other = OnnxCodes(qdq, threads=1)
    name = next(n for n, _ in qdq.gm.named_buffers() if "0.attention.self.key" in n and "linear" in n and "scale" in n)
    with torch.no_grad():
        qdq.gm.get_buffer(name).mul_(1.1)
    seen = compare(qdq, other, for_model(model, batch()))
    wrong = [s.site for s in seen.sites.values() if s.share > 0.01]
    assert wrong[0].startswith("bert.encoder.layer.0.attention.self.key")


@pytest.mark.parametrize("family", ["bert", "distilbert", "deberta-v2", "modernbert"])
def test_every_quantized_product_runs_in_int8(family: str, tmp_path: Path) -> None:
    """The classifier is float by the paper's placement; QK and PV of every layer are int8 like the dense layers."""
    qat, _ = prepared(family, "W8E8A8")
    export_onnx(qat, tmp_path / "q.onnx")
    report = kernel_report(tmp_path / "q.onnx")
    floats = [s for s, k in report.sites.items() if k in ("MatMul", "Gemm", "FusedMatMul", "FusedGemm", "?")]
    assert len(floats) == 1 and "classifier" in floats[0], report
    assert report.integer >= 12 and report.floating == 1
    assert "in int8 kernels" in str(report)
    assert ("saturate" in str(report)) == int8_saturates()


@pytest.mark.parametrize("family,preset", [("bert", "W8E8A8"), ("electra", "W4E4A8-lsq+"), ("distilbert", "W8E8A8")])
def test_the_factor_of_the_scores_is_in_a_scale(family: str, preset: str, tmp_path: Path) -> None:
    """`ort-cpu` multiplies no scores: a scale in front of their product holds the number."""
    qat, model = prepared(family, preset)
    behind = {}
    for target in ("ort-cpu", "spec"):
        export_onnx(qat, tmp_path / f"{target}.onnx", target=target)
        nodes = onnx.load(tmp_path / f"{target}.onnx").graph.node
        behind[target] = sum(n.op_type in ("Mul", "Div") and "attention" in n.name for n in nodes)
    layers = getattr(model.config, "num_hidden_layers", 2)
    assert behind == {"ort-cpu": 0, "spec": layers}
    near_ties_only(freeze_qat(qat).gm, for_model(model, batch(8, 12, seed=3)), optimize=True)


def test_the_file(tmp_path: Path) -> None:
    """Names, dynamic sizes, metadata, and the trained scales: as many quantizers as the graph has, at its scales."""
    qat, model = prepared("bert", "W4E4A8")
    qdq = freeze_qat(qat)
    report = export_onnx(qat, tmp_path / "q.onnx")
    graph = onnx.load(str(tmp_path / "q.onnx")).graph
    assert [i.name for i in graph.input] == ["input_ids", "attention_mask", "token_type_ids"]
    dims = [[d.dim_param for d in i.type.tensor_type.shape.dim] for i in graph.input]
    assert dims == [["batch_size", "sequence_length"]] * 3
    assert all(i.type.tensor_type.elem_type == onnx.TensorProto.INT64 for i in graph.input)
    assert [o.name for o in graph.output] == ["logits"]
    names = [n.name for n in graph.node]
    assert len(set(names)) == len(names)
    assert "bert.encoder.layer.0.attention.self.query/linear/MatMul" in names
    meta = metadata_of(tmp_path / "q.onnx")
    assert meta["stage"] == "qdq" and meta["target"] == "ort-cpu" and "W4E4A8" in meta["qconfig"]
    trained = [n for n in qdq.gm.graph.nodes if n.target is quantize]
    stored = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    written = [n for n in graph.node if n.op_type == "QuantizeLinear"]
    assert len(written) == len(trained) == report.quantizers
    scales = sorted(float(qdq.gm.get_buffer(str(n.args[1].target))) for n in trained)
    assert scales == sorted(float(stored[n.input[1]]) for n in written)
    assert str(report).startswith(str(tmp_path))


def test_shared_parameters_are_stored_once(tmp_path: Path) -> None:
    """ALBERT's layers are one module; a masked-LM decoder is the embedding table."""
    qat, model = prepared("albert", "W8E8A8")
    one = export_onnx(qat, tmp_path / "albert.onnx").bytes
    assert one < 1.5 * sum(p.numel() for p in model.parameters()) + 200_000
    qat, model = prepared("bert", "W8E8A8", "ForMaskedLM")
    export_onnx(qat, tmp_path / "mlm.onnx")
    stored = onnx.load(str(tmp_path / "mlm.onnx")).graph.initializer
    assert sum(1 for i in stored if sorted(i.dims) == [32, 99]) == 1
    data = for_model(model, batch())
    found = run_onnx(tmp_path / "mlm.onnx", {k: v.numpy() for k, v in data.items()})["logits"]
    np.testing.assert_allclose(found, freeze_qat(qat)(**data).logits.detach().numpy(), atol=1e-4)


def test_errors(tmp_path: Path) -> None:
    gm, feed = dense_net(8, True, 0, (6,), per_channel=False)
    with pytest.raises(ConfigError, match="unknown export target 'tpu'"):
        export(gm, tmp_path / "x.onnx", target="tpu")
    with pytest.raises(ConfigError, match="2 input names for 1 inputs"):
        export(gm, tmp_path / "x.onnx", input_names=["a", "b"])
    with pytest.raises(ConfigError, match="output names"):
        export(gm, tmp_path / "x.onnx", output_names=["a", "b"])
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CheckpointError, match="cannot write"):
        export(gm, tmp_path / "file" / "x.onnx")
    with pytest.raises(CheckpointError, match="it is a folder"):
        export(gm, tmp_path)
    with pytest.raises(CheckpointError, match="cannot load"):
        OnnxModel(tmp_path / "file")
    with pytest.raises(CheckpointError, match="no ONNX file"):
        metadata_of(tmp_path / "file")
    export(gm, tmp_path / "ok.onnx")
    with pytest.raises(InputError, match="needs x"):
        run_onnx(tmp_path / "ok.onnx", {})
    with pytest.raises(InputError, match="refuses the batch"):
        run_onnx(tmp_path / "ok.onnx", {"x": np.zeros((1, 2, 3, 4), np.float32)})
    gm.meta["stage"] = "int"
    with pytest.raises(ConfigError, match="no ONNX form"):
        export(gm, tmp_path / "x.onnx")
    with pytest.raises(ConfigError, match="shows no codes"):
        OnnxCodes(gm)
    sketch = Sketch(x=torch.arange(6.0).reshape(2, 3))
    index = sketch.const("i", torch.tensor([0, 1]))
    odd = sketch.done(sketch.call(aten.index.Tensor, sketch.nodes["x"], [None, index, index][:2]), stage="float")
    export(odd, tmp_path / "ok.onnx")
    sketch = Sketch(x=torch.arange(24.0).reshape(2, 3, 4))
    index = sketch.const("i", torch.tensor([0, 1]))
    odd = sketch.done(sketch.call(aten.index.Tensor, sketch.nodes["x"], [None, index, index]), stage="float")
    with pytest.raises(LoweringError, match="no ONNX form for indexing"):
        export(odd, tmp_path / "x.onnx")
    assert not (tmp_path / "x.onnx").exists()
