"""A careless user: each mistake is told before any work, with where it is and a hint that is right."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from families import tiny
from tiny_glue import WORDS, bert, tokenizer, write_model, write_sst

import kdlsq_fx as kq
from kdlsq_fx import cli_learning, cli_parts, cli_train, hub, job, opening
from kdlsq_fx.cli import main
from kdlsq_fx.compression import Compression
from kdlsq_fx.data import load
from kdlsq_fx.errors import CheckpointError, ConfigError
from kdlsq_fx.files import check_file, check_folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, a classifier, an encoder, a run with qat/ and int/, an ONNX file, and things of a wrong kind."""
    at = tmp_path_factory.mktemp("careless")
    data = write_sst(at / "sst2", train=32, dev=8)
    write_model(at / "clf")
    config = json.loads((write_model(at / "enc") / "config.json").read_text())
    (at / "enc" / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    qat = kq.prepare_qat(bert().eval(), "W8E8A8")
    kq.calibrate(qat, load(data, tokenizer()).train.sample(2, batch_size=8, seed=0), progress=False)
    qat.eval().save_pretrained(at / "run" / "qat", tokenizer())
    kq.convert(qat).save_pretrained(at / "run" / "int", tokenizer())
    for name in ("m.onnx", "notes.txt"):
        (at / name).write_text("no model")
    for name, text in (("one", "sentence\tlabel\ngood\t1\nfine\t1\n"), ("comma", "sentence,label\ngood,1\nbad,0\n")):
        write_sst(at / name, train=2, dev=2)
        (at / name / "train.tsv").write_text(text)
    shutil.copytree(at / "run" / "int", at / "half")
    (at / "half" / "kdlsq.json").unlink()
    (at / "csv").mkdir()
    (at / "csv" / "train.csv").write_text("sentence,label\ngood,1\nbad,0\n")
    (at / "empty").mkdir()
    tiny("modernbert", vocab_size=len(WORDS) + 5).save_pretrained(at / "modern")
    tokenizer().save_pretrained(at / "modern")
    shutil.copytree(at / "clf", at / "other")  # as many words, two of them in each other's place
    words = (at / "other" / "tokenizer.json").read_text()
    words = words.replace('"good"', '"?"').replace('"bad"', '"good"').replace('"?"', '"bad"')
    (at / "other" / "tokenizer.json").write_text(words)
    for name, changes in (("small", {"vocab_size": 9}), ("three", {"num_labels": 3}), ("score", {"num_labels": 1})):
        bert(**changes).save_pretrained(at / name)  # without a tokenizer
    kq.plan_taps(bert(), bert()).save(at / "plan.json")
    kq.plan_taps(bert(), bert(), same_tokenizer=False).save(at / "own.json")
    for name in ("a", "b"):
        (at / name).mkdir()
        (at / name / "mine.json").write_text(kq.preset("W8E8A8").to_json())
    return at


TRAIN = ["train", "--out", "o", "--data", "sst2", "--model", "enc"]
CACHE = ["cache", "--out", "o", "--data", "sst2", "--teacher", "clf"]


@pytest.mark.parametrize(
    ("argv", "says", "do"),
    [
        (["convert", "c", "run/qat"], "wrong way round", "kdlsq-fx convert run/qat c"),
        (["convert", "clf", "c"], "a model without quantizers", "kdlsq-fx train --model"),
        (["convert", "m.onnx", "c"], "is a file, not a folder", "save_pretrained"),
        (["convert", "run", "c"], "no qat or int folder itself", "give run/qat or run/int"),
        (["convert", "empty", "c"], "has no kdlsq.json", "save_pretrained"),
        (["convert", "half", "c"], "half has lost its kdlsq.json", "copy the folder again"),
        (["convert", "run/int", "c"], "converted already", "the qat model it was made from"),
        (["convert", "run/qat", "run/qat"], "a qat model stands in", "name another folder"),
        (["convert", "run/qat", "clf"], "a float model stands in", "name another folder"),
        (["convert", "run/qat", "notes.txt/x"], "cannot write to notes.txt/x", "another folder"),
        (["export", "m.onnx", "run/qat"], "wrong way round", "kdlsq-fx export run/qat m.onnx"),
        (["export", "run/qat", "empty"], "does not end in .onnx", "empty/model.onnx"),
        (["export", "run/qat", "model"], "does not end in .onnx", "model.onnx"),
        (["export", "run/qat", "no/m.onnx"], "cannot write no/m.onnx", "make no first"),
        (["eval", "run/qat", "--data", "csv"], "no train file", "write train.csv as train.tsv"),
        (["eval", "run/qat", "--data", "comma"], "columns are 'sentence,label'", "by tabs, not by commas"),
        (["eval", "run/qat", "--data", "sst2/train.tsv"], "a file, not a folder", "give its folder: sst2"),
        (["eval", "run", "--data", "sst2"], "no qat or int folder itself", "give run/qat or run/int"),
        (["eval", "notes.txt", "--data", "sst2"], "neither a folder nor an ONNX file", ".onnx file"),
        (
            ["eval", "run/qat", "--data", "sst2", "--backend", "native"],
            "for an int folder only",
            "leave --backend away",
        ),
        (["eval", "run/qat", "--data", "sst2", "--out", "no/x.json"], "cannot write no/x.json", "make no first"),
        (["eval", "run/qat", "--data", "sst2", "--tokenizer", "m.onnx"], "not the folder of a tokenizer", "a folder"),
        (["bench", "run/int", "--fp32", "clf", "--shapes", "1x41"], "40 positions, 1x41 has more", "such as 1x40"),
        (["inspect", "run"], "no qat or int folder itself", "give run/qat or run/int"),
        (["inspect", "m.onnx"], "not the folder of a model", "give a folder"),
        (
            [*TRAIN[:-1], "run/qat"],
            "a model of stage qat, this needs a float one",
            "the float model that it was made from",
        ),
        ([*TRAIN[:-1], "run/int"], "a model of stage int, this needs a float one", "the float model"),
        ([*TRAIN[:-1], "empty"], "no config.json", "the folder of a Hugging Face model"),
        (
            [*TRAIN, "--teacher", "enc"],
            "no model of sst2: it has no head, sst2 needs a head of 2",
            "fine-tune one first",
        ),
        ([*TRAIN, "--teacher", "three"], "it has a head of 3 classes, sst2 needs a head of 2", "fine-tune one first"),
        ([*TRAIN, "--teacher", "score"], "it has a head of one output (regression), sst2", "fine-tune one first"),
        ([*TRAIN, "--teacher", "other"], "different tokenizers, those of enc and other", "kdlsq_fx.data.Paired"),
        ([*TRAIN, "--teacher", "small"], "the teacher small has a vocabulary of 9", "belong together"),
        ([*TRAIN, "--micro-batches", "99"], "99 micro-batches of 32 rows in 1 processes", "of one row at least"),
        ([*TRAIN, "--layer-map", "hsk"], "there is no layer map 'hsk' [at --layer-map]", "--plan FILE for another"),
        ([*TRAIN, "--layer-map", "hsk:3"], "names layer 3 of the teacher, which has layers 0 to 2", "use 'uniform'"),
        ([*TRAIN, "--plan", "nosuch.json"], "there is no plan in nosuch.json", "plan_taps(...).save(path)"),
        ([*TRAIN, "--plan", "own.json"], "reads tokens of its own", "teacher_inputs as shared"),
        ([*TRAIN, "--no-teacher", "--layer-map", "top"], "nothing that --layer-map could mean", "leave --layer-map"),
        ([*CACHE, "--model", "other"], "different tokenizers, those of other and clf", "kdlsq_fx.data.Paired"),
        ([*CACHE, "--out", "clf"], "a model stands in clf (config.json)", "name another folder"),
        ([*CACHE, "--out", "run/int"], "a model stands in run/int (kdlsq.json)", "name another folder"),
        ([*CACHE, "--teacher", "x", "--compress", "foo"], "'foo' cannot be read [at --compress foo]", "1l_10t_0.1h"),
        ([*CACHE, "--teacher", "x", "--compress", "0l_4t"], "depth=0 [at --compress 0l_4t]", "keep at least one"),
        (
            [*CACHE, "--teacher", "x", "--tokens", "left", "--compress", "whole"],
            "everything of the hidden states is kept",
            "leave it away",
        ),
        ([*CACHE, "--loss", "hsk-release"], "padded positions count in it", "--loss hsk, or learn with the teacher"),
        ([*CACHE, "--features", "magnitude-batch"], "depends on the batch", "give --features magnitude, which"),
        ([*TRAIN, "--cache", "nocache"], "no distillation cache there", "kdlsq-fx cache --out nocache"),
        ([*TRAIN, "--no-teacher", "--loss", "hsk"], "nothing that --loss could mean", "leave --loss away, or --no-t"),
        ([*TRAIN, "--no-teacher", "--compress", "1l"], "nothing that --compress could mean", "leave --compress away"),
        ([*TRAIN, "--no-teacher", "--teacher", "clf"], "nothing that --teacher could mean", "--model names the start"),
        ([*TRAIN, "--no-teacher", "--tokens", "cls"], "nothing that --tokens could mean", "leave --tokens away"),
        ([*TRAIN, "--tokens", "cls"], "everything of the hidden states is kept", "say with --compress how much"),
        ([*TRAIN, "--span", "3"], "--task (none) does not read it", "give --task squad"),
        ([*TRAIN, "--negatives", "3"], "does not read it", "give --task kg-triples or kg-links"),
        (["eval", "run/qat", "--data", "sst2", "--doc-stride", "9"], "does not read it", "give --task squad"),
        ([*TRAIN, "--more", "nosuch.tsv"], "cannot be read", "check that"),
        ([*TRAIN, "--fp32-epochs", "0"], "enc has no head of sst2 yet", "leave it away"),
        ([*TRAIN, "--qconfig", "a/mine.json", "b/mine.json"], "two are called mine", "names of their own"),
        (
            [*TRAIN[:-1], "modern", "--qconfig", "W8E8A8-int"],
            "ops stay in floats, and this qconfig promises integers only",
            "use a preset without -int",
        ),
        ([*TRAIN, "--target", "tensorrt"], "codes 0 to 255", "signed=True"),
        ([*TRAIN, "--data", "one"], "all 2 rows are of one class, '1'", "rows of another class"),
        ([*TRAIN, "--out", "notes.txt/x"], "cannot write to notes.txt/x", "another folder"),
    ],
)
def test_a_mistake_is_told_first(
    argv: list[str],
    says: str,
    do: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    for name in ("fit", "calibrated"):  # the check came first, or these would have to run
        monkeypatch.delattr(job, name)
    before = {p: p.stat().st_mtime_ns for p in place.rglob("*") if p.is_file()}
    assert main(argv) == 1
    said = capsys.readouterr().err
    assert says in said and do in said.split("->")[1] and "Traceback" not in said, said
    assert before == {p: p.stat().st_mtime_ns for p in place.rglob("*") if p.is_file()}  # nothing written or lost
    shutil.rmtree(place / "o", ignore_errors=True)


def test_what_cannot_be_written_is_known_before(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "a.json", tmp_path / "file"):
        check_file(path)
    check_folder(tmp_path / "new" / "deep")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    for check, path in ((check_file, "no/a"), (check_file, "."), (check_folder, "file"), (check_folder, "file/x")):
        with pytest.raises(CheckpointError, match="cannot write"):
            check(tmp_path / path)


def test_epochs_of_a_ready_classifier(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = load(place / "sst2", tokenizer()).task
    for model, asked, epochs, said in (
        ("clf", None, 0.0, "taken as it is"),
        ("clf", 0.5, 0.5, ""),
        ("clf", 0.0, 0.0, ""),
        ("enc", None, 3.0, ""),
        ("enc", 1.0, 1.0, ""),
    ):
        options = argparse.Namespace(fp32_epochs=asked)
        assert cli_parts.fp32_epochs(options, str(place / model), task) == epochs
        heard = capsys.readouterr().err
        assert said in heard and bool(heard) == bool(said)


def test_without_epochs_the_classifier_stays(place: Path) -> None:
    data = load(place / "sst2", tokenizer())
    settings = job.Settings(epochs=0)
    kept = job.start_model(str(place / "clf"), data, tokenizer(), out=place / "none", settings=settings)
    assert all(torch.equal(a, b) for a, b in zip(kept.state_dict().values(), bert().state_dict().values()))
    assert not (place / "none").exists()


def test_classes_in_another_order_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_sst(tmp_path / "mine", train=8, dev=8)
    for split in ("train", "dev"):
        text = (data / f"{split}.tsv").read_text().replace("\t0", "\tminus").replace("\t1", "\tplus")
        (data / f"{split}.tsv").write_text(text)
    for first, second, code in (("plus", "minus", 1), ("Minus", "plus", 0), ("no", "yes", 0)):
        write_model(tmp_path / "clf", id2label={0: first, 1: second}, label2id={first: 0, second: 1})
        assert main(["eval", str(tmp_path / "clf"), "--data", str(data)]) == code
        assert ("its classes are plus, minus, those of mine minus, plus" in capsys.readouterr().err) == bool(code)


# Names on the hub


CACHED = """
import sys
from kdlsq_fx.cli import main
sys.exit(main(["inspect", "me/clf"]) or main(["eval", "me/clf", "--data", sys.argv[1]]))
"""


def test_a_hub_name_is_a_model(place: Path, tmp_path: Path) -> None:
    """What was downloaded before, in the hub's own layout of its cache."""
    home = tmp_path / "models--me--clf"
    shutil.copytree(place / "clf", home / "snapshots" / ("0" * 40))
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0" * 40)
    own = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-c", CACHED, str(place / "sst2")]
    done = subprocess.run(run, env=own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "bert.encoder.layer.1" in done.stdout and "accuracy\t" in done.stdout


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does to the first request of a download."""

    answers = {"known/model": (200, ""), "busy/model": (429, ""), "bare/model": (404, "EntryNotFound")}

    def do_HEAD(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        status, code = self.answers.get(self.path.strip("/").partition("/resolve")[0], (404, "RepoNotFound"))
        self.send_response(status)
        for key, value in (
            ("X-Repo-Commit", "0" * 40),
            ("ETag", '"1"'),
            ("Content-Length", "0"),
            ("X-Error-Code", code),
        ):
            self.send_header(key, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def point_at(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []  # type: ignore[attr-defined]
    Thread(target=server.serve_forever, daemon=True).start()
    point_at(f"http://127.0.0.1:{server.server_port}", monkeypatch)
    yield server.asked  # type: ignore[attr-defined]
    server.shutdown()


def test_a_hub_is_asked_once(asked: list[str]) -> None:
    for name in ("known/model", "busy/model"):  # what is busy is left to the download
        hub.check_hub_name(name)
    hub.check_hub_name("bare/model", what="tokenizer")
    assert len(asked) == 3
    for name, says in (("nosuch/model", "no such model on the hub"), ("bare/model", "without a config.json")):
        with pytest.raises(ConfigError, match=says):
            hub.check_hub_name(name)
    assert len(asked) == 5
    for name, says in (("a/b/c", "no hub name"), ("./x", "no such folder"), (__file__, "a file, not the folder")):
        with pytest.raises(ConfigError, match=says):
            hub.check_hub_name(name)
    assert len(asked) == 5


def test_a_hub_out_of_reach_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    point_at("http://hub.invalid", monkeypatch)  # a name that never resolves
    assert main(["inspect", "nosuch/model"]) == 1
    said = capsys.readouterr().err
    assert (
        "the hub cannot be reached (" in said and "offline, give the folder" in said and "Retrying" not in caplog.text
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["inspect", "nosuch/model"]) == 1
    said = capsys.readouterr().err
    assert "HF_HUB_OFFLINE is set" in said and "cannot be reached" not in said


def test_ctrl_c_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kdlsq_fx.demo.load_corpus", stopped)
    monkeypatch.setattr("kdlsq_fx.opening.model_source", stopped)
    for argv in (["demo"], ["train", "--data", "x"]):
        assert main([*argv, "--out", str(tmp_path)]) == 130
        said = capsys.readouterr().err
        assert f"kept in {tmp_path}" in said and "again to go on" in said


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    """transformers draws what it does not find at random, and here that would be all of the encoder."""
    folder = write_model(tmp_path / "bert")
    config = json.loads((folder / "config.json").read_text())
    for architectures in ([], ["DistilBertModel"]):
        changed = {**config, "model_type": "distilbert", "architectures": architectures}
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ConfigError, match="weights of DistilBertModel are not in the file"):
            opening.open_hub_model(str(folder))


def test_only_what_will_be_made_is_rehearsed() -> None:
    asked = kq.preset("W8E8A8-int")
    cli_train._rehearse("no model", None, asked, "tensorrt", skip=("integer", "ONNX"))
    with pytest.raises(AttributeError):  # for want of a data set: there it begins
        cli_train._rehearse("no model", None, asked, "ort-cpu", skip=("ONNX",))


def test_help_tells_the_defaults_of_a_compression() -> None:
    assert {name: getattr(Compression.parse("1l"), name) for name in cli_learning.CHOSEN} == cli_learning.CHOSEN
