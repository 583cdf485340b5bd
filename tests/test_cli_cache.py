"""``kdlsq-fx cache`` and ``train --cache`` on a tiny model and data set."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_glue import write_model, write_sst

from kdlsq_fx import cli_cache
from kdlsq_fx.cli import main
from kdlsq_fx.compression import FEATURES, TOKENS
from kdlsq_fx.kd_cache import Cache
from kdlsq_fx.kd_named import LOSSES

QUICK = ["--qconfig", "W8E8A8", "--epochs", "2", "--lr", "1e-3", "--batch-size", "16"]


def test_the_names_are_those_of_the_library() -> None:
    assert (tuple(LOSSES), TOKENS, FEATURES) == (cli_cache.LOSSES, cli_cache.TOKENS, cli_cache.FEATURES)


def test_a_student_trained_on_a_cache_is_the_one_trained_with_the_teacher(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_sst(tmp_path / "sst2")
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = write_model(tmp_path / "bert", **still)
    what = ["--data", str(folder)]
    loss = ["--loss", "hsk", "--compress", "2l_4t_0.5h"]
    build = ["cache", *what, "--teacher", str(model), "--out", str(tmp_path / "cache"), *loss, "--store", "fp32"]
    assert main(build) == 0
    assert "96 examples" in capsys.readouterr().out
    assert main(build) == 0  # nothing is left to do
    assert main([*build, "--mask", "both"]) == 1 and "another loss" in capsys.readouterr().err
    start = ["train", *what, "--model", str(model), *QUICK]
    assert main([*start, "--out", str(tmp_path / "live"), *loss]) == 0
    assert main([*start, "--out", str(tmp_path / "cached"), "--cache", str(tmp_path / "cache")]) == 0
    curves = []
    for kind in ("live", "cached"):
        lines = (tmp_path / kind / "W8E8A8" / "run" / "log.tsv").read_text().splitlines()[1:]
        curves.append([float(line.split("\t")[1]) for line in lines])
    assert len(curves[0]) == 12
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-3)
    rows = [json.loads((tmp_path / k / "table.json").read_text())["rows"][2] for k in ("live", "cached")]
    assert rows[0]["model"] == "student (qat)" and rows[0]["scores"] == rows[1]["scores"]
    assert Cache.open(tmp_path / "cache").index["tokenizer"]

    other = write_sst(tmp_path / "other" / "sst2", seed=1)
    capsys.readouterr()
    argv = ["train", "--data", str(other), "--model", str(model), *QUICK, "--out", str(tmp_path / "x")]
    assert main([*argv, "--cache", str(tmp_path / "cache")]) == 1
    assert "another data set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--no-teacher"], "takes the place of the teacher"),
        (["--loss", "hsk"], "has its loss"),
        (["--compress", "1l"], "has its loss"),
    ],
)
def test_options_that_contradict_a_cache(
    more: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, model = write_sst(tmp_path / "sst2"), write_model(tmp_path / "bert")
    argv = ["train", "--data", str(folder), "--model", str(model), "--out", str(tmp_path / "out"), *QUICK]
    assert main([*argv, "--cache", str(tmp_path / "cache"), *more]) == 1
    assert says in capsys.readouterr().err


def test_a_teacher_of_no_task_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, model = write_sst(tmp_path / "sst2"), write_model(tmp_path / "bert")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    assert main(["cache", "--data", str(folder), "--teacher", str(model), "--out", str(tmp_path / "c")]) == 1
    assert "no model of sst2" in capsys.readouterr().err
