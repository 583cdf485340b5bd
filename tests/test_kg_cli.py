"""Knowledge graphs on the command line: the whole job on a tiny graph, by every form of the model, and its errors."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_glue import bert, tokenizer
from tiny_graph import write_graph

from kdlsq_fx import kg_ranking
from kdlsq_fx.cli import main

QUICK = [
    "--fp32-epochs",
    "12",
    "--fp32-lr",
    "3e-3",
    "--batch-size",
    "8",
    "--epochs",
    "1",
    "--lr",
    "1e-3",
    "--qconfig",
    "W8E8A8",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("kg")
    write_graph(made / "graph", labelled=True)
    bert().bert.save_pretrained(made / "model")  # the encoder alone: its head is trained
    tokenizer().save_pretrained(made / "model")
    return made


def train(home: Path, task: str, *more: str) -> int:
    out = str(home / task)
    where = ["--data", str(home / "graph"), "--model", str(home / "model"), "--out", out]
    return main(["train", "--task", task, *where, *QUICK, *more])


def test_links_by_every_form(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(home, "kg-links", "--forms", "qat", "int", "onnx") == 0
    table = capsys.readouterr().out
    assert "| MR | MRR | Hits@1 | Hits@3 | Hits@10 |" in table
    rows = {r["model"]: r for r in json.loads((home / "kg-links" / "table.json").read_text())["rows"]}
    assert set(rows) == {"fp32", "student (qat)", "integer", "ONNX"}
    assert rows["fp32"]["scores"]["MR"] < 5  # chance is 6.5 and more: 10 candidates or more are false
    for form in ("integer", "ONNX"):
        assert abs(rows[form]["scores"]["MR"] - rows["student (qat)"]["scores"]["MR"]) < 0.3
    assert len(list((home / "kg-links" / "ranking").iterdir())) == 4
    (home / "kg-links" / "table.md").unlink()
    assert train(home, "kg-links", "--forms", "qat", "int", "onnx") == 0  # all of it is there: the same table
    without_seconds = [
        [line.rsplit("|", 2)[0] for line in text.splitlines()] for text in (table, capsys.readouterr().out)
    ]
    assert without_seconds[0] == without_seconds[1]
    out = home / "eval.json"
    for path in ("fp32", "W8E8A8/qat", "W8E8A8/int", "W8E8A8/model.onnx"):
        args = ["eval", str(home / "kg-links" / path), "--task", "kg-links", "--data", str(home / "graph")]
        assert main([*args, "--out", str(out), "--split", "test"]) == 0
        assert capsys.readouterr().out.startswith("MR\t") and len(json.loads(out.read_text())["predictions"]) == 40
    assert not list(home.glob("eval.json.ranks"))


@pytest.mark.parametrize("task", ["kg-triples", "kg-relations"])
def test_other_tasks(home: Path, task: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(home, task, "--forms", "qat", "onnx") == 0
    rows = json.loads((home / task / "table.json").read_text())["rows"]
    assert [r["model"] for r in rows] == ["fp32", "student (qat)", "ONNX"]
    assert rows[0]["scores"]["accuracy" if task == "kg-triples" else "Hits@1"] > 60
    model = str(home / task / "W8E8A8" / "qat")
    assert main(["eval", model, "--task", task, "--data", str(home / "graph")]) == 0
    name = "accuracy" if task == "kg-triples" else "Hits@1"
    assert f"{name}\t{rows[1]['scores'][name]:.2f}" in capsys.readouterr().out


def test_an_eval_that_is_stopped_goes_on_without_out(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its state stands under runs/ in the current folder, by the model's weights, until all is ranked."""
    for name, bias in (("a", 0.0), ("b", 0.1)):
        model = bert()
        torch.nn.init.constant_(model.classifier.bias, bias)
        model.save_pretrained(tmp_path / name / "model")
        tokenizer().save_pretrained(tmp_path / name / "model")
    seen, stop_at = 0, 0
    score = kg_ranking.score

    def counted(run: Any, data: Any, rows: Any) -> Any:
        nonlocal seen
        seen += len(rows)
        if seen == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        return score(run, data, rows)

    def ranked(name: str, *, stop: int = 0) -> tuple[int, int, str]:
        """Exit code, sequences scored, stdout or what the stop says."""
        nonlocal seen, stop_at
        seen, stop_at = 0, stop
        where = [str(tmp_path / name / "model"), "--data", str(home / "graph")]
        code = main(["eval", *where, "--task", "kg-links", "--batch-size", "16"])
        told = capsys.readouterr()
        return code, seen, told.err if code else told.out

    monkeypatch.setattr(kg_ranking, "score", counted)
    monkeypatch.chdir(tmp_path)
    _, total, whole = ranked("a")
    assert not (tmp_path / "runs").exists()  # a ranking that is not stopped leaves nothing
    code, part, told = ranked("a", stop=48)
    (state,) = (tmp_path / "runs" / "ranking").iterdir()
    assert f"stopped at 48 of {total} sequences; saved in runs/ranking/{state.name}" in told
    assert (code, part) == (130, 48)
    assert ranked("b")[:2] == (0, total)  # of the same name, but other weights
    assert ranked("a") == (0, total - 48, whole)
    assert not state.parent.exists() and ranked("a")[1] == total
    (tmp_path / "runs").write_text("no folder")
    code, _, told = ranked("a", stop=16)
    assert code == 130 and "a ranking that is stopped will be lost (--out FILE" in told and "nothing was kept" in told


def test_bad_calls(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = write_graph(home / "bad")
    with (bad / "dev.tsv").open("a") as file:
        file.write("good0\tvery\tghost\n")
    assert main(["train", "--task", "kg-links", "--data", str(bad), "--model", str(home / "model"),
                 "--out", str(home / "bad-out")]) == 1  # fmt: skip
    assert "unknown entity 'ghost' [at" in capsys.readouterr().err
    where = ["--data", str(home / "graph"), "--model", str(home / "model"), "--out", str(home / "bad-out")]
    assert main(["train", "--task", "kg-links", *where, "--device", "nonsense"]) == 1
    assert "--device nonsense" in capsys.readouterr().err
    assert main(["eval", str(home / "model"), "--data", str(home / "graph"), "--split", "test"]) == 1
    assert "only graphs" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "--task", "kg-nothing", *where])
