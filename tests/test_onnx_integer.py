"""Integer ONNX files of whole models against the NumPy reference: equal bit for bit at every site."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from calibrated import calibrated, converted, livelier, per_channel
from families import batch, for_model, tiny
from sketch import Sketch

from kdlsq_fx import cli
from kdlsq_fx.api import convert, export_onnx, prepare_qat
from kdlsq_fx.backends import onnx_dialects
from kdlsq_fx.backends.onnx import metadata_of, qconfig_of
from kdlsq_fx.backends.onnx_integer import OnnxIntegerCodes, export_integer, integer_only
from kdlsq_fx.backends.onnx_runtime import OnnxModel
from kdlsq_fx.calibration import calibrate
from kdlsq_fx.comparison import compare
from kdlsq_fx.errors import ConfigError, InputError, LoweringError

torch.set_num_threads(1)
BOTH = pytest.mark.parametrize("optimize", [False, True], ids=["plain", "optimized"])


def shapes(model: Any) -> list[dict[str, torch.Tensor]]:
    """Lengths 1, 7 and 33, one row and four, padded, and one row without a single key."""
    found = []
    for rows, length in itertools.product((1, 4), (1, 7, 33)):
        data = batch(rows, length, seed=length)
        if rows > 1:
            data["attention_mask"][2] = 0
        found.append({k: v for k, v in data.items() if k in model.input_names})
    return found


def equal_at_every_site(model: Any, optimize: bool) -> int:
    """The file and the reference: the same sites, codes, containers and outputs. Returns the number of sites."""
    file = OnnxIntegerCodes(model, optimize=optimize, threads=1)
    for data in shapes(model):
        wanted: dict[str, np.ndarray] = {}

        def keep(site: str, codes: Any, wanted: dict[str, np.ndarray] = wanted) -> Any:
            wanted[site] = codes
            return codes

        outputs = model.reference.run(model.split(**data)[1], keep)
        found, codes = file.free(data)
        assert codes.keys() == wanted.keys()
        for site, array in wanted.items():
            assert codes[site].dtype == array.dtype, site
            np.testing.assert_array_equal(codes[site], array, err_msg=site)
        for f, w in zip(found, outputs, strict=True):
            assert f.dtype == w.dtype
            np.testing.assert_array_equal(f, w)
    return len(file.cuts)


@BOTH
@pytest.mark.parametrize("config", ["W8E8A8-int", "W4E4A4-lsq+-int", "W2E2A8-int", "W2-channels-int"])
def test_whole_models_equal_the_reference(config: str, optimize: bool) -> None:
    assert equal_at_every_site(converted(config, "reference"), optimize) == 27


@BOTH
@pytest.mark.parametrize(
    "family,head",
    [
        ("bert", "ForQuestionAnswering"),
        ("bert", "ForMaskedLM"),
        ("bert", "Model"),
        ("roberta", "ForSequenceClassification"),
        ("distilbert", "ForTokenClassification"),
        ("electra", "ForSequenceClassification"),
        ("albert", "ForSequenceClassification"),
        ("squeezebert", "ForSequenceClassification"),
    ],
)
def test_families_and_heads_equal_the_reference(family: str, head: str, optimize: bool) -> None:
    assert equal_at_every_site(convert(calibrated("W8E8A8-int", family, head)), optimize) > 20


def test_a_wide_model_with_channels_equals_the_reference(tmp_path: Path) -> None:
    """Sizes beyond the tiny ones: rows of 96, sums of 384, weights per channel, 4 bits."""
    changes = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 1}
    model = livelier(tiny("bert", seed=3, **changes))
    qat = prepare_qat(model, per_channel("W4E4A8-lsq-int", 4, "lsq"))
    calibrate(qat, [for_model(model, batch(rows=6, seed=s)) for s in range(2)])
    assert equal_at_every_site(convert(qat.eval()), True) > 10


def test_compare_takes_the_file_and_sees_a_wrong_multiplier() -> None:
    model = convert(calibrated("W8E8A8-int"))
    file, data = OnnxIntegerCodes(model, threads=1), batch(4, 9)
    seen = compare(model, file, data)
    assert len(seen.sites) == 27 and seen.unmatched == () and seen.max_steps == 0
    assert seen.outputs[0].max_abs == 0
    step = next(s for s in model.reference.steps if s.op == "requantize" and "layer.1" in s.site)
    position = model.reference.steps.index(step)
    args = (step.args[0], step.args[1] * 2 // 3, *step.args[2:])
    model.reference.steps[position] = replace(step, args=args)
    seen = compare(model, file, data)
    assert [s for s, d in seen.sites.items() if d.max_steps][0] == step.site


INTEGER_OPS = {
    *("MatMulInteger", "ConvInteger", "MatMul", "Gather", "GatherND", "Add", "Sub", "Mul", "Div", "Mod", "Min", "Max"),
    *("Abs", "Sign", "Clip", "BitShift", "BitwiseAnd", "BitwiseXor", "Cast", "ReduceSum", "ReduceMax", "Where"),
    *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Not", "Range", "CumSum"),
    *("Shape", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Concat", "Expand", "Split", "Identity"),
}


def test_the_file_holds_integers_only(tmp_path: Path) -> None:
    qat, file = calibrated("W8E8A8-int"), tmp_path / "sub" / "int.onnx"
    report = export_onnx(qat, file, target="integer")
    assert integer_only(file) == []
    assert (report.target, report.opset, report.quantizers, report.cuts) == ("integer", 18, 27, ())
    assert report.bytes == file.stat().st_size and "integer, opset 18" in str(report)
    model = onnx.load(str(file))
    onnx.checker.check_model(model, full_check=True)
    assert {n.op_type for n in model.graph.node} <= INTEGER_OPS
    assert {n.domain for n in model.graph.node} == {""} and [o.version for o in model.opset_import] == [18]
    floats = [t for t in model.graph.initializer if t.data_type in (1, 10, 11)]
    assert [t.dims for t in floats] == [[]]  # the scale of the logits
    names = {n.name for n in model.graph.node}
    assert "bert.encoder.layer.0.attention.self.query/linear/MatMulInteger" in names
    sizes = [d.dim_param for d in model.graph.input[0].type.tensor_type.shape.dim]
    assert sizes == ["batch_size", "sequence_length"]
    assert [v.name for v in model.graph.output] == ["logits"]
    assert qconfig_of(file) == qat.qconfig.to_dict()
    known = metadata_of(file)
    assert (known["stage"], known["target"], known["model_class"]) == (
        "int",
        "integer",
        "BertForSequenceClassification",
    )


@pytest.mark.parametrize("preset,bits,opset", [("W2E2A8-int", 2, 25), ("W4E4A8-int", 4, 21), ("W8E8A8-int", 8, 18)])
def test_narrow_constants_are_stored_narrow(preset: str, bits: int, opset: int, tmp_path: Path) -> None:
    """The file of a wide model is about as large as its codes; what runs on it is compared bit for bit above."""
    qat = prepare_qat(livelier(tiny("bert")), preset)
    calibrate(qat, [batch(8, 13)], progress=False)
    qat.eval()
    report = export_onnx(qat, tmp_path / "int.onnx", target="integer")
    file = onnx.load(tmp_path / "int.onnx")
    names = {2: "INT2", 4: "INT4", 8: "INT8"}
    types = {onnx.TensorProto.DataType.Name(i.data_type) for i in file.graph.initializer if len(i.dims) == 2}
    assert report.opset == opset == file.opset_import[0].version
    assert names[bits] in types and ("INT8" in types) == (bits == 8)
    equal_at_every_site(convert(qat), optimize=True)


def test_integer_only_finds_floats(tmp_path: Path) -> None:
    """A qdq file is full of them; one float detour in an integer file is named; a result that goes on is no result."""
    qat = calibrated("W8E8A8-int")
    export_onnx(calibrated("W8E8A8"), tmp_path / "qdq.onnx")
    assert any("QuantizeLinear" in name for name in integer_only(tmp_path / "qdq.onnx"))
    export_onnx(qat, tmp_path / "int.onnx", target="integer")
    model = onnx.load(str(tmp_path / "int.onnx"))
    nodes = model.graph.node
    at = next(i for i, n in enumerate(nodes) if n.op_type == "BitwiseXor")
    source, kind = nodes[at].output[0], onnx.TensorProto
    nodes[at].output[0] = "before"
    there = onnx.helper.make_node("Cast", ["before"], ["real"], name="there", to=kind.DOUBLE)
    back = onnx.helper.make_node("Cast", ["real"], [source], name="back", to=kind.INT64)
    for node in (back, there):
        nodes.insert(at + 1, node)
    onnx.save(model, str(tmp_path / "detour.onnx"))
    assert integer_only(tmp_path / "detour.onnx") == ["there", "back"]

    model = onnx.load(str(tmp_path / "int.onnx"))
    model.graph.node.append(onnx.helper.make_node("Cast", ["logits"], ["codes"], name="again", to=kind.INT32))
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info("codes"))
    onnx.save(onnx.shape_inference.infer_shapes(model), str(tmp_path / "again.onnx"))
    assert "again" in integer_only(tmp_path / "again.onnx")


def test_refusals_name_the_islands(tmp_path: Path) -> None:
    file = tmp_path / "x.onnx"
    with pytest.raises(
        LoweringError, match=r"(?s)stay in floats.*integer file holds none.*layer_norm.*more.*-int preset"
    ):
        export_onnx(calibrated("W8E8A8"), file, target="integer")
    with pytest.raises(ConfigError, match="ort-cpu, openvino, tensorrt, spec, integer"):
        export_onnx(calibrated("W8E8A8-int"), file, target="tpu")
    sketch = Sketch(x=torch.ones(2, 3))
    odd = sketch.done(sketch.nodes["x"], stage="float")
    with pytest.raises(ConfigError, match="export an int graph"):
        export_integer(odd, file)
    assert not file.exists()


@pytest.mark.parametrize("bad", [-1, 99])
@pytest.mark.parametrize("optimize", [True, False])
def test_ids_outside_a_table_are_refused_as_everywhere(bad: int, optimize: bool, tmp_path: Path) -> None:
    export_onnx(calibrated("W8E8A8-int"), tmp_path / "int.onnx", target="integer")
    given = {k: v.numpy() for k, v in batch(rows=2, length=5).items()}
    run = OnnxModel(tmp_path / "int.onnx", optimize=optimize)
    run(given)
    given["input_ids"][1, 2] = bad
    with pytest.raises(InputError):
        run(given)


def test_a_converted_model_is_written_as_it_is(tmp_path: Path) -> None:
    qat, model = calibrated("W8E8A8-int"), converted("W8E8A8-int", "torch")
    export_onnx(qat, tmp_path / "a.onnx", target="integer")
    export_onnx(model, tmp_path / "b.onnx", target="integer")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_the_command_line_writes_integers(tmp_path: Path) -> None:
    assert cli.TARGETS == onnx_dialects.TARGETS
    qat, file = calibrated("W8E8A8-int"), tmp_path / "int.onnx"
    qat.save_pretrained(tmp_path / "qat")
    assert cli.main(["export", str(tmp_path / "qat"), str(file), "--target", "integer"]) == 0
    export_onnx(qat, tmp_path / "own.onnx", target="integer")
    assert integer_only(file) == [] and file.read_bytes() == (tmp_path / "own.onnx").read_bytes()
    converted("W8E8A8-int", "torch").save_pretrained(tmp_path / "int")
    assert cli.main(["export", str(tmp_path / "int"), str(tmp_path / "x.onnx"), "--target", "integer"]) == 1
    assert not (tmp_path / "x.onnx").exists()
