"""Each export target: its own rules on the file, and the file under the runtime it is for."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from calibrated import livelier
from families import batch, for_model, tiny
from onnx.reference import ReferenceEvaluator
from sketch import Sketch

from kdlsq_fx.api import convert, export_onnx, freeze_qat, prepare_qat
from kdlsq_fx.backends import cpu, onnx_checks
from kdlsq_fx.backends.onnx import export
from kdlsq_fx.backends.onnx_dialects import DIALECTS
from kdlsq_fx.backends.onnx_runtime import run_onnx
from kdlsq_fx.calibration import calibrate
from kdlsq_fx.errors import ConfigError, LoweringError
from kdlsq_fx.ops.qdq import dequantize, quantize
from kdlsq_fx.pipeline import graph_pass
from kdlsq_fx.qconfig import QConfig, QSpec, Rule, preset

torch.set_num_threads(1)


def span(bits: int, signed: bool) -> tuple[int, int]:
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def quantizer(signed: bool, bits: int, zero_point: int, narrow: int) -> tuple[Any, torch.Tensor]:
    """A graph that quantizes and dequantizes with scale 1/8, and inputs at ties, at the ends and beyond them."""
    low, high = span(bits, signed)
    low += narrow
    edge = torch.tensor([low, high], dtype=torch.float32)
    x = torch.cat([torch.arange(-40, 41) / 2, edge + 0.5, edge - 0.5, edge * 3, edge, torch.tensor([1e6, -1e6])])
    x = (x / 8).reshape(1, -1)
    sketch = Sketch(x=x)
    scale = sketch.const("s", torch.tensor(0.125))
    codes = sketch.call(quantize, sketch.nodes["x"], scale, zero_point, low, high, None)
    return sketch.done(sketch.call(dequantize, codes, scale, zero_point, None)), x


GRIDS = list(itertools.product((True, False), (2, 4, 7, 8, 16), (0, 3), (0, 1)))


@pytest.mark.parametrize("signed,bits,zero_point,narrow", GRIDS)
def test_openvino_quantizes_exactly(signed: bool, bits: int, zero_point: int, narrow: int, tmp_path: Path) -> None:
    """It adds the zero point before it rounds, so that exact ties fall the other way where that is odd."""
    pytest.importorskip("openvino")
    from kdlsq_fx.backends import openvino_runtime as runtime

    gm, x = quantizer(signed, bits, zero_point, narrow)
    export(gm, tmp_path / "q.onnx", target="openvino")
    found = runtime.OpenVinoModel(tmp_path / "q.onnx")({"x": x.numpy()})["output_0"]
    wanted, tie = gm(x)[0].numpy(), np.abs(x.numpy() * 8 % 1 - 0.5) < 1e-6
    tie = tie & bool(zero_point % 2)
    np.testing.assert_array_equal(found[~tie], wanted[~tie])
    assert np.abs(found - wanted).max() <= 0.125
    np.testing.assert_array_equal(run_onnx(tmp_path / "q.onnx", {"x": x.numpy()})["output_0"], wanted)


@functools.cache
def model_with(qconfig: Any) -> tuple[Any, Any]:
    model = livelier(tiny("bert"))
    qat = prepare_qat(model, qconfig)
    calibrate(qat, [for_model(model, batch(8, 13, seed=i)) for i in range(3)], progress=False)
    return qat.eval(), model


def arrays(graph: onnx.GraphProto) -> dict[str, Any]:
    return {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}


SIGNED = Rule(site="**", op="matmul", act=QSpec(bits=8, signed=True))


@pytest.mark.parametrize("name", ["W8E8A8", "W4E2A8", "W8E8A8-lsq"])
def test_tensorrt_rules(name: str, tmp_path: Path) -> None:
    """int8 and zero point 0 everywhere, pairs side by side, float biases, scales that are constants."""
    qat, model = model_with(preset(name).with_rules(SIGNED))
    export_onnx(qat, tmp_path / "q.onnx", target="tensorrt")
    graph = onnx.load(str(tmp_path / "q.onnx")).graph
    stored = arrays(graph)
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for value in node.input:
            readers.setdefault(value, []).append(node)
    pairs = [n for n in graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert pairs
    for node in pairs:
        scale, zero = stored[node.input[1]], stored[node.input[2]]
        assert scale.dtype == np.float32 and (scale > 0).all()
        assert zero.dtype == np.int8 and not zero.any()
        if node.op_type == "QuantizeLinear":
            assert [r.op_type for r in readers[node.output[0]]] == ["DequantizeLinear"]
            assert scale.ndim == 0
        elif node.input[0] in stored:
            assert stored[node.input[0]].dtype == np.int8
    assert not [i for i in graph.initializer if i.data_type in (onnx.TensorProto.UINT8, onnx.TensorProto.INT32)]
    made = {o: n for n in graph.node for o in n.output}
    for node in graph.node:
        if node.op_type == "Add" and node.name.endswith("linear/Add"):
            bias = next(i for i in node.input if i in stored or made[i].op_type != "MatMul")
            assert stored[bias].dtype == np.float32
    data = for_model(model, batch(4, 9))
    found = run_onnx(tmp_path / "q.onnx", {k: v.numpy() for k, v in data.items()}, False)["logits"]
    np.testing.assert_allclose(found, freeze_qat(qat)(**data).logits.detach().numpy(), atol=2e-2)


def test_tensorrt_refuses_what_it_has_no_type_for(tmp_path: Path) -> None:
    qat, _ = model_with("W8E8A8")
    with pytest.raises(LoweringError, match=r"(?s)codes 0 to 255 .*signed=True"):
        export_onnx(qat, tmp_path / "q.onnx", target="tensorrt")
    qat, _ = model_with(preset("W4E4A8-lsq+").with_rules(SIGNED))
    with pytest.raises(LoweringError, match="(?s)without an offset"):
        export_onnx(qat, tmp_path / "q.onnx", target="tensorrt")
    assert not (tmp_path / "q.onnx").exists()


@pytest.mark.parametrize(
    "name,types", [("W2E2A8", {"INT2"}), ("W4E2A8-lsq", {"INT4", "INT2"}), ("W8E4A8", {"INT8", "INT4"})]
)
def test_spec_stores_weights_in_their_own_type(name: str, types: set[str], tmp_path: Path) -> None:
    """Opset 25, typed weights, and under onnx's own evaluator the logits of the qdq graph."""
    qat, model = model_with(name)
    export_onnx(qat, tmp_path / "q.onnx", target="spec")
    proto = onnx.load(str(tmp_path / "q.onnx"))
    assert [o.version for o in proto.opset_import] == [25] and proto.ir_version == 13
    big = {onnx.TensorProto.DataType.Name(i.data_type) for i in proto.graph.initializer if np.prod(i.dims) >= 512}
    assert types <= big and not (big & {"INT8", "INT4", "INT2"}) - types
    data = for_model(model, batch(4, 9))
    feed = {k: v.numpy() for k, v in data.items()}
    wanted = freeze_qat(qat)(**data).logits.detach().numpy()
    found = ReferenceEvaluator(proto).run(None, feed)[0]
    np.testing.assert_allclose(found, wanted, atol=2e-2 * np.abs(wanted).max())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_spec_weights_hold_the_codes_that_were_trained(bits: int, tmp_path: Path) -> None:
    sketch = Sketch(x=torch.eye(6))
    codes = torch.randint(*span(bits, True), (5, 6), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    codes[0, 0], codes[0, 1] = span(bits, True)
    weight = sketch.weight("w", codes, torch.rand(5) + 0.1)
    gm = sketch.done(sketch.call(torch.ops.aten.linear.default, sketch.nodes["x"], weight))
    export(gm, tmp_path / "w.onnx", target="spec")
    proto = onnx.load(str(tmp_path / "w.onnx"))
    (stored,) = [i for i in proto.graph.initializer if sorted(i.dims) == [5, 6]]
    assert onnx.TensorProto.DataType.Name(stored.data_type) == f"INT{bits}"
    assert len(stored.raw_data) == -(-30 * bits // 8)
    found = ReferenceEvaluator(proto).run(None, {"x": np.eye(6, dtype=np.float32)})[0]
    np.testing.assert_array_equal(found, gm(torch.eye(6))[0].numpy())


@pytest.mark.parametrize("name", ["W8E8A8", "W8E8A8-lsq", "W2E2A4", "W8E8A8-lsq+"])
def test_openvino_runs_every_quantized_product_in_int8(name: str, tmp_path: Path) -> None:
    """Dense layers, Q K^T and P V; read from the compiled model."""
    pytest.importorskip("openvino")
    from kdlsq_fx.backends.openvino_runtime import OpenVinoModel, openvino_report

    qat, model = model_with(name)
    export_onnx(qat, tmp_path / "q.onnx", target="openvino")
    report = openvino_report(tmp_path / "q.onnx")
    assert report.missed == (), report
    assert len(report.quantized) == report.integer == 17
    data = for_model(model, batch(4, 9))
    wanted = freeze_qat(qat)(**data).logits.detach().numpy()
    found = OpenVinoModel(tmp_path / "q.onnx")({k: v.numpy() for k, v in data.items()})["logits"]
    np.testing.assert_allclose(found, wanted, atol=5e-2 * np.abs(wanted).max())


def test_a_cpu_without_vnni_is_warned_about_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "old"
    old.write_text("processor : 0\nmodel name\t: Old CPU @ 2 GHz\nflags\t\t: fpu sse2 avx2 avx512f\n")
    new = tmp_path / "new"
    new.write_text("model name\t: New CPU\nflags\t\t: avx512f avx512_vnni\n")
    (tmp_path / "arm").write_text("Features : asimddp i8mm\n")
    assert cpu.lacks_vnni(old) == "Old CPU @ 2 GHz"
    assert [cpu.lacks_vnni(tmp_path / n) for n in ("new", "arm", "none")] == ["", "", ""]
    monkeypatch.setattr(onnx_checks, "lacks_vnni", lambda: cpu.lacks_vnni(old))
    qat, _ = model_with("W8E8A8")
    with pytest.warns(UserWarning, match="Old CPU @ 2 GHz has no VNNI.*ONNX Runtime may return wrong"):
        export_onnx(qat, tmp_path / "q.onnx")


def test_what_onnxruntime_does_with_typed_weights_is_warned_about(tmp_path: Path) -> None:
    qat, _ = model_with("W2E2A8")
    with pytest.warns(UserWarning, match="int2 weights in floats"):
        export_onnx(qat, tmp_path / "q.onnx", target="spec")
    weights_only = QConfig(rules=(Rule(site="**", op="linear", weight=QSpec(bits=2)),), heads="quantized")
    qat = prepare_qat(livelier(tiny("bert")), weights_only)
    with pytest.warns(UserWarning, match="wrong numbers for the int2 weight of classifier/linear: its 2 outputs"):
        export_onnx(qat, tmp_path / "q.onnx", target="spec")


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("target", ["ort-cpu", "openvino"])
def test_float_activations_that_a_runtime_rounds_are_warned_about(target: str, bits: int, tmp_path: Path) -> None:
    """Both runtimes do so by default where the weight alone is quantized; our sessions do not."""
    if target == "openvino":
        pytest.importorskip("openvino")
    model = livelier(tiny("bert", hidden_size=64))
    weights_only = QConfig(rules=(Rule(site="**", op="linear", weight=QSpec(bits=bits, axis=0)),), heads="quantized")
    qat = prepare_qat(model, weights_only).eval()
    with pytest.warns(
        UserWarning, match="14 products have quantized weights and float activations .*run the file with"
    ):
        report = export_onnx(qat, tmp_path / "q.onnx", target=target)
    assert not report.kernels.int8 and {(r.op, r.where) for r in report.summary.rows} >= {("linear", "float")}
    data = for_model(model, batch(4, 9))
    feed = {k: v.numpy() for k, v in data.items()}
    wanted = freeze_qat(qat)(**data).logits.detach().numpy()
    ours, theirs = _logits(target, tmp_path / "q.onnx", feed)
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(ours, wanted, atol=1e-5 * scale)
    assert np.abs(theirs - wanted).max() > 1e-3 * scale  # else the warning is no longer true


def _logits(target: str, file: Path, feed: dict[str, Any]) -> tuple[Any, Any]:
    """In a session of ours, and in one with the runtime's own settings."""
    if target == "ort-cpu":
        import onnxruntime as ort

        session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        return run_onnx(file, feed)["logits"], session.run(["logits"], feed)[0]
    from kdlsq_fx.backends.openvino_runtime import OpenVinoModel, openvino

    plain = openvino().Core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return OpenVinoModel(file)(feed)["logits"], plain(feed)["logits"]


def test_a_product_that_falls_back_is_warned_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signed int8 activations are what ONNX Runtime does not take: written so, its products stay float."""
    monkeypatch.setitem(DIALECTS, "ort-cpu", replace(DIALECTS["ort-cpu"], unsigned=False))
    qat, _ = model_with("W8E8A8")
    with pytest.warns(UserWarning, match=r"ONNX Runtime runs \d+ quantized products in floats: bert"):
        report = export_onnx(qat, tmp_path / "q.onnx")
    assert report.kernels.missed and "the runtime chose" in str(report)


def test_the_summary_of_an_export(tmp_path: Path) -> None:
    qat, model = model_with("W8E8A8")
    report = export_onnx(qat, tmp_path / "q.onnx")
    assert report.summary.before == 4 * sum(p.numel() for p in model.parameters())
    assert report.summary.after == (tmp_path / "q.onnx").stat().st_size
    rows = {(r.op, r.where): r for r in report.summary.rows}
    assert rows["linear", "int8"].count == 13 and rows["matmul", "int8"].count == 4
    assert rows["linear", "float"].count == 1 and "head" in rows["linear", "float"].why
    assert rows["embedding", "int8"].count == 2
    assert rows["layer_norm", "float"].why and rows["gelu", "float"].count == 2
    assert rows["mul", "none"].count == 2 and ("mul", "float") not in rows  # the factor of the scores
    assert "17 of 17 quantized matrix products in int8 kernels" in str(report)
    assert "kernels not counted: no runtime was asked" in str(export_onnx(qat, tmp_path / "spec.onnx", target="spec"))


def test_passes_that_would_not_run_are_refused(tmp_path: Path) -> None:
    @graph_pass("qdq")
    def look(gm: torch.fx.GraphModule) -> None:
        """x -> x"""

    qat, _ = model_with("W8E8A8")
    with pytest.raises(ConfigError, match="stage qdq is written as it is, pass look would not run"):
        export_onnx(freeze_qat(qat), tmp_path / "q.onnx", passes=[look])
    assert not (tmp_path / "q.onnx").exists()


def test_the_summary_of_a_conversion_has_the_size_on_disk(tmp_path: Path) -> None:
    int_model = convert(model_with("W2E2A8")[0])
    int_model.save_pretrained(tmp_path / "int")
    data = (tmp_path / "int" / "constants.safetensors").read_bytes()
    held = len(data) - 8 - int.from_bytes(data[:8], "little")  # without the header
    assert abs(int_model.summary().after - held) <= 0.02 * held


def test_the_summary_of_a_conversion() -> None:
    qat, model = model_with("W8E8A8")
    summary = convert(qat).summary()
    assert summary.before == 4 * sum(p.numel() for p in model.parameters()) > summary.after
    rows = {(r.op, r.where): r.count for r in summary.rows}
    assert rows["linear", "int"] == 13 and rows["matmul", "int"] == 4
    assert all(r.why for r in summary.rows if r.where == "float")
    assert sum(r.count for r in summary.rows if r.where == "float") == len(convert(qat).islands)
