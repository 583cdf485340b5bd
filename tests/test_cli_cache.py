"""``kdlsq-fx cache`` and ``train --cache`` on a tiny model and data set."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_glue import WORDS, bert, write_model, write_sst

import kdlsq_fx as kq
from kdlsq_fx import cli_learning, job
from kdlsq_fx.cli import main
from kdlsq_fx.compression import FEATURES, TOKENS
from kdlsq_fx.kd_cache import Cache
from kdlsq_fx.kd_named import LOSSES

QUICK = ["--qconfig", "W8E8A8", "--epochs", "2", "--lr", "1e-3", "--batch-size", "16"]


def test_the_names_are_those_of_the_library() -> None:
    assert (tuple(LOSSES), TOKENS, FEATURES) == (cli_learning.LOSSES, cli_learning.TOKENS, cli_learning.FEATURES)


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
    first = capsys.readouterr()
    assert "96 examples" in first.out and "complete already" not in first.err
    assert main(build) == 0 and "complete already" in capsys.readouterr().err
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

    index = tmp_path / "cache" / "cache.json"
    kept = index.read_text()
    index.write_text(json.dumps(json.loads(kept) | {"teacher": "another"}))  # the same folder, other targets
    assert main([*start, "--out", str(tmp_path / "cached"), "--cache", str(tmp_path / "cache")]) == 1
    assert "another recipe.cache" in capsys.readouterr().err
    index.write_text(kept)
    other = write_sst(tmp_path / "other" / "sst2", seed=1)
    capsys.readouterr()
    argv = ["train", "--data", str(other), "--model", str(model), *QUICK, "--out", str(tmp_path / "x")]
    assert main([*argv, "--cache", str(tmp_path / "cache")]) == 1
    assert "another data set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--no-teacher"], "takes the place of the teacher"),
        (["--loss", "hsk"], "has its plan"),
        (["--compress", "1l"], "loss and compression"),
        (["--layer-map", "top"], "has its plan"),
        (["--plan", "plan.json"], "has its plan"),
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


def test_a_cache_for_another_width_is_told_before_any_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, model = write_sst(tmp_path / "sst2", train=16), write_model(tmp_path / "bert")
    wide = write_model(tmp_path / "wide", hidden_size=32)
    build = ["cache", "--data", str(folder), "--teacher", str(model), "--out", str(tmp_path / "cache")]
    assert main([*build, "--compress", "1l_4t_0.5h"]) == 0
    for name in ("fit", "calibrated"):
        monkeypatch.delattr(job, name)
    argv = ["train", "--data", str(folder), "--model", str(wide), "--fp32-epochs", "1", "--out", str(tmp_path / "out")]
    assert main([*argv, "--cache", str(tmp_path / "cache")]) == 1
    assert "the cache was made for one 16 wide" in capsys.readouterr().err


def test_tokenizers_that_prepare_texts_differently_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = write_model(tmp_path / "one"), write_model(tmp_path / "two")
    cli_learning.shared_tokenizer(str(one), str(two))
    assert not capsys.readouterr().err
    file = two / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "normalizer": {"type": "Lowercase"}}))
    cli_learning.shared_tokenizer(str(one), str(two))
    assert "prepare texts differently" in capsys.readouterr().err


def test_a_teacher_of_its_own_has_a_row_and_the_plan_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A deeper teacher with a padded token table and no tokenizer; the map is part of what the folder remembers."""
    folder, model, out = write_sst(tmp_path / "sst2", train=32), write_model(tmp_path / "bert"), tmp_path / "out"
    bert(num_hidden_layers=3, vocab_size=len(WORDS) + 8).save_pretrained(tmp_path / "deep")
    argv = ["train", "--data", str(folder), "--model", str(model), "--teacher", str(tmp_path / "deep"), *QUICK]
    argv += ["--epochs", "1", "--fp32-epochs", "1", "--out", str(out)]
    assert main([*argv, "--layer-map", "top"]) == 0
    said = capsys.readouterr()
    assert "layers: 0<-0  1<-2  2<-3" in said.err and "is taken to read the student's ids" in said.err
    rows = {r["model"]: r for r in json.loads((out / "table.json").read_text())["rows"]}
    assert list(rows) == ["teacher", "fp32", "min-max PTQ", "student (qat)", "integer", "ONNX"]
    assert "| teacher | fp32 |" in (out / "table.md").read_text()
    weights = {name: job.weight_bytes(path) for name, path in (("teacher", tmp_path / "deep"), ("fp32", out / "fp32"))}
    assert {name: rows[name]["size"] for name in weights} == weights and weights["teacher"] > weights["fp32"] > 0
    assert main([*argv, "--layer-map", "skip"]) == 1
    assert "another recipe.distil.plan.layer_map ('top' there, 'skip' here)" in capsys.readouterr().err


def test_a_plan_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, model = write_sst(tmp_path / "sst2", train=16), write_model(tmp_path / "bert")
    plan = kq.plan_taps(bert(), bert(), layer_map={1: 2}, kinds=["hidden"])
    options = ["--data", str(folder), "--plan", str(plan.save(tmp_path / "plan.json"))]
    compress = ["--compress", "1l_4t_0.5h"]
    assert main(["cache", *options, "--teacher", str(model), "--out", str(tmp_path / "cache"), *compress]) == 0
    assert Cache.open(tmp_path / "cache").plan.layers() == {1: (2,)} and "1<-2" in capsys.readouterr().err
    out = tmp_path / "out"
    argv = ["train", *options, "--model", str(model), "--out", str(out), *QUICK, "--epochs", "1"]
    assert main(argv) == 0
    terms = (out / "W8E8A8" / "run" / "log.tsv").read_text().splitlines()[1]
    assert "hidden=" in terms and "attention=" not in terms
    plan.with_taps(()).save(tmp_path / "plan.json")
    assert main(argv) == 1 and "recipe.distil.plan.taps" in capsys.readouterr().err
