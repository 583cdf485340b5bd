"""Latency measurements: shapes, padding, one process per model, and the table. No wall-clock figure is asserted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from calibrated import livelier
from families import batch, for_model, tiny

from kdlsq_fx import cli, cli_bench
from kdlsq_fx.api import export_onnx, prepare_qat
from kdlsq_fx.calibration import calibrate
from kdlsq_fx.errors import CheckpointError, ConfigError
from kdlsq_fx.timing import Shape, in_process, padded, time_calls


def test_shapes_and_padding() -> None:
    assert str(Shape.parse("8x128")) == "8x128"
    for text in ("8", "8x", "0x4", "axb", "1x2x3"):
        with pytest.raises(ConfigError, match="no shape"):
            Shape.parse(text)
    feed = padded(Shape(16, 20), vocab=50)
    lengths = feed["attention_mask"].sum(1)
    assert lengths[0] == 20 and lengths.min() >= 10 and len(set(lengths)) > 1
    assert (feed["input_ids"][feed["attention_mask"] == 0] == 0).all() and feed["input_ids"].max() < 50
    np.testing.assert_array_equal(feed["input_ids"], padded(Shape(16, 20), vocab=50)["input_ids"])
    assert len(time_calls(lambda _: None, feed, seconds=0, least=3)) == 3


def test_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An ONNX file and a qat folder against the float folder beside them, each in a process of its own."""
    model = livelier(tiny("bert"))
    model.save_pretrained(tmp_path / "fp32")
    qat = prepare_qat(model, "W8E8A8")
    calibrate(qat, [for_model(model, batch(8, 13))], progress=False)
    qat.save_pretrained(tmp_path / "run" / "qat")
    export_onnx(qat.eval(), tmp_path / "run" / "q.onnx")
    files = [str(tmp_path / "run" / "q.onnx"), str(tmp_path / "run" / "qat")]
    options = ["--shapes", "2x8", "--rounds", "1", "--seconds", "0", "--threads", "1"]
    assert cli.main(["bench", *files, *options]) == 0
    *lines, told = capsys.readouterr().out.splitlines()
    assert "above a process that has loaded torch" in told
    assert all(float(line.split()[-1]) > 0 for line in lines[2:])  # whatever this process has held before
    assert [line.split("  ")[0] for line in lines[2:]] == ["fp32, ONNX Runtime", "fp32, PyTorch", *files]
    assert all("2x8" in line for line in lines[2:]) and lines[2].split()[-3] == "1.00"


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no float model near"):
        cli_bench.find_float(tmp_path / "x.onnx")
    assert cli.main(["bench", str(tmp_path / "none.onnx")]) == 1
    with pytest.raises(CheckpointError, match="could not be measured"):
        in_process(["python", "-c", "raise SystemExit('broken')"], {"model": "m"}, threads=1)


def test_ratios_are_taken_within_a_round() -> None:
    """A round in which the whole machine was half as fast changes no ratio."""
    fast, slow = ({"load_s": 1.0, "peak_mb": 5.0, "ms": {"1x8": [10.0 * k, 11.0 * k, 12.0 * k]}} for k in (1, 2))
    half = [{**r, "ms": {"1x8": [v / 2 for v in r["ms"]["1x8"]]}} for r in (fast, slow)]
    text = cli_bench.table({"float": [fast, slow], "ours": half}, ["1x8"], base="float")
    assert text.splitlines()[-2].split()[2:] == ["8.2", "5.5", "to", "11.0", "2.00", "1.00", "5"]
