"""ONNX files with weights of 2 and 4 bits: the same kernels and the same bits as with a byte for each weight."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from calibrated import livelier
from families import batch, for_model, tiny

from kdlsq_fx.api import export_onnx, prepare_qat
from kdlsq_fx.backends import onnx_dialects
from kdlsq_fx.backends.onnx_grids import narrowest
from kdlsq_fx.backends.onnx_runtime import kernel_report, run_onnx
from kdlsq_fx.calibration import calibrate
from kdlsq_fx.model import QuantModel

NARROW = {onnx.TensorProto.INT2: 2, onnx.TensorProto.UINT2: 2, onnx.TensorProto.INT4: 4, onnx.TensorProto.UINT4: 4}


def made(preset: str, head: str = "ForSequenceClassification") -> tuple[QuantModel, dict[str, np.ndarray]]:
    model = livelier(tiny("bert", head))
    qat = prepare_qat(model, preset)
    calibrate(qat, [for_model(model, batch(rows=6, seed=s)) for s in range(2)])
    return qat.eval(), {k: v.numpy() for k, v in for_model(model, batch()).items()}


@pytest.mark.parametrize("preset", ["W2E2A8", "W2E2A8-lsq", *(f"W{b}E{b}A8-lsq" for b in range(3, 9)), "W4E4A8-lsq+"])
def test_every_width_runs_as_bytes_do(preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    qat, feed = made(preset)
    export_onnx(qat, tmp_path / "packed.onnx")
    plain = replace(onnx_dialects.DIALECTS["ort-cpu"], packed=0)
    monkeypatch.setitem(onnx_dialects.DIALECTS, "ort-cpu", plain)
    export_onnx(qat, tmp_path / "bytes.onnx")
    for optimize in (False, True):
        packed, whole = (run_onnx(tmp_path / f"{n}.onnx", feed, optimize)["logits"] for n in ("packed", "bytes"))
        np.testing.assert_array_equal(packed, whole)
    assert kernel_report(tmp_path / "packed.onnx") == kernel_report(tmp_path / "bytes.onnx")
    model = onnx.load(str(tmp_path / "packed.onnx"))
    bits = int(preset[1])
    container = 2 if bits == 2 else 4
    narrow = [i for i in model.graph.initializer if i.data_type in NARROW]
    assert {NARROW[i.data_type] for i in narrow} == ({container} if bits <= 4 else set())
    assert all(len(i.raw_data) == -(-np.prod(i.dims) * container // 8) for i in narrow)
    byte = [i for i in model.graph.initializer if i.data_type == onnx.TensorProto.INT8 and len(i.dims) == 2]
    assert bool(byte) == (bits > 4)
    casts = [n for n in model.graph.node if n.op_type == "Cast" and n.input[0] in {i.name for i in narrow}]
    assert len(casts) == len(narrow)  # each is unpacked once, whoever reads it


@pytest.mark.parametrize("preset", ["W2E2A8", "W3E3A8-lsq", "W4E4A8-lsq+", "W5E5A8"])
def test_openvino_takes_four_bits(preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no int2, so 2 bits take 4; the same kernels and the same logits as with bytes."""
    pytest.importorskip("openvino")
    from kdlsq_fx.backends.openvino_runtime import OpenVinoModel, openvino_report

    qat, feed = made(preset)
    export_onnx(qat, tmp_path / "packed.onnx", target="openvino")
    plain = replace(onnx_dialects.DIALECTS["openvino"], packed=0)
    monkeypatch.setitem(onnx_dialects.DIALECTS, "openvino", plain)
    export_onnx(qat, tmp_path / "bytes.onnx", target="openvino")
    packed, whole = (OpenVinoModel(tmp_path / f"{n}.onnx")(feed)["logits"] for n in ("packed", "bytes"))
    np.testing.assert_array_equal(packed, whole)
    assert openvino_report(tmp_path / "packed.onnx") == openvino_report(tmp_path / "bytes.onnx")
    stored = onnx.load(str(tmp_path / "packed.onnx")).graph.initializer
    kinds = {i.data_type for i in stored if len(i.dims) == 2}
    assert kinds & {onnx.TensorProto.INT8, *NARROW} == {
        onnx.TensorProto.INT8 if preset[1] == "5" else onnx.TensorProto.INT4
    }


def test_a_table_that_is_a_decoder_too_is_packed_once(tmp_path: Path) -> None:
    qat, feed = made("W2E2A8", "ForMaskedLM")
    export_onnx(qat, tmp_path / "mlm.onnx")
    stored = [i for i in onnx.load(str(tmp_path / "mlm.onnx")).graph.initializer if sorted(i.dims) == [32, 99]]
    assert [NARROW[i.data_type] for i in stored] == [2]
    fast, plain = (run_onnx(tmp_path / "mlm.onnx", feed, optimize)["logits"] for optimize in (True, False))
    np.testing.assert_allclose(fast, plain, atol=1e-4)


def test_the_narrowest_type() -> None:
    def of(*codes: int, dtype: type = np.int8) -> str:
        return str(narrowest(np.array(codes, dtype)))

    assert (of(-2, 1), of(-1, 1), of(-2, 2), of(-8, 7), of(-8, 8)) == ("int2", "int2", "int4", "int4", "None")
    assert (of(0, 3, dtype=np.uint8), of(15, dtype=np.uint8), of(16, dtype=np.uint8)) == ("uint2", "uint4", "None")
    assert str(narrowest(np.array([-1, 1], np.int8), 4)) == "int4"
    assert of(1, dtype=np.int32) == of() == "None"
