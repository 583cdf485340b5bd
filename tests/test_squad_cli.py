"""``kdlsq-fx train --task squad`` on a tiny model: every form, again, from a cache, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_glue import bert, tokenizer, write_model, write_sst
from tiny_squad import write_squad

from kdlsq_fx.cli import main
from kdlsq_fx.squad import read_squad
from kdlsq_fx.squad_metrics import per_question, squad_scores

SIZES = ["--max-length", "24", "--doc-stride", "6", "--batch-size", "16"]
QUICK = ["--fp32-epochs", "8", "--fp32-lr", "1e-2", "--epochs", "2", "--lr", "1e-3", "--qconfig", "W8E8A8"]
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("squad")
    write_squad(made / "data", train=192)
    bert(**STILL).bert.save_pretrained(made / "model")  # the encoder alone: its head is trained
    tokenizer().save_pretrained(made / "model")
    return made


def squad_args(home: Path, command: str, *more: str) -> list[str]:
    return [command, "--task", "squad", "--data", str(home / "data"), *SIZES, *more]


def parts(folder: Path) -> list[dict[str, float]]:
    """The terms of the loss at every step of a run."""
    lines = (folder / "run" / "log.tsv").read_text().splitlines()[1:]
    cells = [[cell.split("=") for cell in line.split("\t")[4].split()] for line in lines]
    return [{k: float(v) for k, v in row} for row in cells]


def test_every_form_and_the_cache(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = home / "out"
    train = squad_args(home, "train", "--model", str(home / "model"), "--out", str(out), *QUICK)
    assert main(train) == 0
    said = capsys.readouterr()
    assert "| model | preset | EM | F1 | same as student |" in said.out and "192 questions in" in said.err
    rows = {r["model"]: r for r in json.loads((out / "table.json").read_text())["rows"]}
    assert list(rows) == ["fp32", "min-max PTQ", "student (qat)", "integer", "ONNX"]
    assert rows["fp32"]["scores"]["EM"] > 50  # chance is below 10
    assert rows["student (qat)"]["scores"]["F1"] > rows["fp32"]["scores"]["F1"] - 10
    texts = [r["predictions"] for r in rows.values()]
    assert np.mean([a == b for a, b in zip(texts[2], texts[3])]) > 0.9  # near-ties
    assert np.mean([a == b for a, b in zip(texts[2], texts[4])]) > 0.9
    run = parts(out / "W8E8A8")
    assert all(set(p) == {"hidden", "attention", "logits"} and min(p.values()) > 0 for p in run)

    assert main(train) == 0 and capsys.readouterr().out.count("W8E8A8") == 4  # all of it is there
    dev = read_squad(home / "data" / "dev-v1.1.json")
    for path, name in (("fp32", "fp32"), ("W8E8A8/int", "integer"), ("W8E8A8/model.onnx", "ONNX")):
        file = home / "eval.json"
        assert main(squad_args(home, "eval", str(out / path), "--out", str(file))) == 0
        assert capsys.readouterr().out.startswith(f"EM\t{rows[name]['scores']['EM']:.2f} ± ")
        given = json.loads(file.read_text())["predictions"]
        figures = per_question([given[q.id] for q in dev.questions], [q.answers for q in dev.questions])
        assert squad_scores(figures) == pytest.approx(rows[name]["scores"])

    cache = ["--out", str(home / "cache"), "--loss", "hsk", "--compress", "1l_4t_0.5h", "--store", "fp32"]
    assert main(squad_args(home, "cache", "--teacher", str(out / "fp32"), "--qconfig", "W8E8A8", *cache)) == 0
    assert "start_logits     float32  length" in capsys.readouterr().out
    few = [
        "--forms",
        "qat",
        *QUICK[4:],
        "--epochs",
        "0.4",
    ]  # 1e-7 of a target grow as soon as a rounding falls otherwise
    learn = squad_args(home, "train", "--model", str(out / "fp32"), *few)
    assert main([*learn, "--out", str(home / "cached"), "--cache", str(home / "cache")]) == 0
    assert main([*learn, "--out", str(home / "live"), "--loss", "hsk", "--compress", "1l_4t_0.5h"]) == 0
    ours, theirs = (parts(home / kind / "W8E8A8") for kind in ("cached", "live"))
    for a, b in zip(ours, theirs):
        assert a == pytest.approx(b, rel=1e-4)
    assert {"hidden"} == set(ours[0]) and {"logits"} == set(ours[-1])  # its two stages


def test_a_model_of_another_task(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classifier = write_model(tmp_path / "classifier")
    argv = squad_args(home, "train", "--model", str(classifier), "--out", str(tmp_path / "out"))
    assert main(argv) == 1
    assert "a classifier with 2 outputs, squad needs two marks a token" in capsys.readouterr().err
    assert main(squad_args(home, "eval", str(classifier))) == 1
    assert "no model that marks spans" in capsys.readouterr().err
    assert main(squad_args(home, "cache", "--teacher", str(home / "model"), "--out", str(tmp_path / "c"))) == 1
    assert "no model of squad" in capsys.readouterr().err
    from transformers import BertForQuestionAnswering

    BertForQuestionAnswering(bert().config).save_pretrained(tmp_path / "spans")
    tokenizer().save_pretrained(tmp_path / "spans")
    sst = ["--data", str(write_sst(tmp_path / "sst2")), "--model", str(tmp_path / "spans")]
    assert main(["train", *sst, "--out", str(tmp_path / "other")]) == 1
    assert "a model that marks spans, sst2 needs 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("train-v1.1.json", "", "the file is empty"),
        ("dev-v1.1.json", '{"data": [{"title": "x"}]}', "no 'paragraphs' (it has 'title') [at"),
        ("dev-v1.1.json", "sentence\tlabel\n", "no JSON"),
    ],
)
def test_bad_folders(
    home: Path, file: str, text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_squad(tmp_path / "data", train=4, dev=4)
    (tmp_path / "data" / file).write_text(text)
    assert main(squad_args(tmp_path, "train", "--model", str(home / "model"), "--out", str(tmp_path / "out"))) == 1
    said = capsys.readouterr().err
    assert says in said and "Traceback" not in said
    assert main(squad_args(home, "eval", str(home / "model"), "--split", "test")) == 1
    assert "only graphs" in capsys.readouterr().err
