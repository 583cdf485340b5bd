"""Training without a teacher: seconds a step, bytes an example, and scores against training with one.

    python benchmarks/teacher_free.py                                      seconds and bytes; writes teacher_free.md
    python benchmarks/teacher_free.py --accuracy --tasks mrpc rte --seeds 42 43 44      scores, one JSON a run
    python benchmarks/teacher_free.py --report                             writes teacher_free.md from the JSONs

Seconds are of random weights: what they depend on is the sizes. Two students: MiniLM's size, of a teacher as large as
BERT-base and of one of its own size. Each pair of rows does the same optimizer steps on the same batches; with the
teacher it runs at every step, without it the targets are read from a cache. Rows alternate, so that what else the
machine does falls on both; the median counts.

Scores: MiniLM fine-tuned on a task teaches a student of its own size at a preset, the same recipe and seed with the
running teacher and with a cache of it. Jobs that are done are skipped: several processes may share the folder, each
with its own tasks or seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import origin, say

import kdlsq_fx as kq
from kdlsq_fx import data, job, opening
from kdlsq_fx.files import write_json

HERE = Path(__file__).resolve().parent
RESULTS, REPORT = HERE / "results" / "teacher_free", HERE / "teacher_free.md"
PAPER = "1l_10t_0.1h"
SEPARATOR = 102
MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
SIZES: dict[str, dict[str, int]] = {"MiniLM": MINILM, "BERT-base": {}}
LR = {"W8E8A8": 2e-5, "W4E4A8": 5e-5, "W2E2A8": 1e-4}


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--threads", type=int, default=2, help="CPU threads of the timings")
    p.add_argument("--steps", type=int, default=12, help="timed steps of each row, after two that are not")
    p.add_argument("--batch-size", type=int, default=32)
    p.add_argument("--length", type=int, default=64, help="tokens of the longest row; rows are 1/2 to all of it")
    p.add_argument("--device", default="auto", help="cpu, cuda or auto: of the scores; timings are of the CPU")
    p.add_argument("--accuracy", action="store_true", help="compare scores in place of seconds")
    p.add_argument("--tasks", nargs="+", default=["mrpc", "rte"])
    p.add_argument("--seeds", nargs="+", type=int, default=[42])
    p.add_argument("--preset", default="W4E4A8")
    p.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="of the products in students' training"
    )
    p.add_argument("--epochs", type=float, default=3)
    p.add_argument("--loss", default="hsk")
    p.add_argument("--compress", default=PAPER)
    p.add_argument("--schedule", default="joint", choices=("joint", "two-stage"))
    p.add_argument("--data", type=Path, default=HERE.parents[1] / "shared" / "data", help="folder of task folders")
    p.add_argument("--runs", type=Path, default=HERE.parent / "runs" / "teacher_free")
    p.add_argument("--report", action="store_true")
    args = p.parse_args()
    if args.accuracy:
        for task in args.tasks:
            for seed in args.seeds:
                scores(task, seed, args)
    elif not args.report:
        timings(args)
    write_report()
    return 0


def busy_origin() -> dict[str, Any]:
    """Where the figures were made, and how busy the machine was."""
    return origin() | {"load": round(os.getloadavg()[0], 1)}


# --- seconds and bytes


def random_rows(rows: int, longest: int) -> data.Encoded:
    """Rows of random ids, half to all of ``longest`` tokens, each ending in [SEP]."""
    rng = np.random.default_rng(0)
    starts = np.concatenate([[0], np.cumsum(rng.integers(longest // 2, longest + 1, rows))])
    ids = rng.integers(1000, 30000, starts[-1]).astype(np.int32)
    ids[starts[:-1]], ids[starts[1:] - 1] = 101, SEPARATOR
    return data.Encoded(ids, np.zeros_like(ids), starts, rng.integers(0, 2, rows))


def model(size: str, seed: int) -> torch.nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    return BertForSequenceClassification(BertConfig(**SIZES[size])).eval()  # type: ignore[no-untyped-call]


def timings(args: argparse.Namespace) -> None:
    """One JSON for each pair of student and teacher."""
    torch.set_num_threads(args.threads)
    rows = random_rows(args.batch_size * 8, args.length)
    batches = rows.order(batch_size=args.batch_size, seed=0, epoch=0)
    for student, teacher in (("MiniLM", "BERT-base"), ("MiniLM", "MiniLM")):
        made = measure(student, teacher, rows, batches, args)
        out = {
            "student": student,
            "teacher": teacher,
            **made,
            "origin": busy_origin(),
        }
        out |= {k: vars(args)[k] for k in ("threads", "steps", "batch_size", "length", "preset", "loss", "compress")}
        RESULTS.mkdir(parents=True, exist_ok=True)
        write_json(RESULTS / f"seconds-{student}-of-{teacher}.json", out)
        say(f"{student} of {teacher}: {made['with']:.3f} s a step with, {made['without']:.3f} s without the teacher")


def measure(
    student: str, teacher: str, rows: data.Encoded, batches: list[np.ndarray], args: argparse.Namespace
) -> dict[str, Any]:
    qat = kq.prepare_qat(model(student, 0), args.preset)
    kq.calibrate(qat, rows.sample(2, batch_size=args.batch_size, seed=0), progress=False)
    compress = kq.Compression.parse(args.compress, separator=SEPARATOR)
    live = kq.distill(qat, model(teacher, 1), loss=args.loss, compress=compress, schedule="joint")
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        cache = kq.build_cache(live, rows, folder, batch_size=args.batch_size)
        build = time.perf_counter() - began
        free = kq.distill(qat, cache=cache)
        sources: dict[str, tuple[Any, Any]] = {"with": (live, rows), "without": (free, cache.source(rows))}
        optimizers = {k: torch.optim.AdamW(kq.param_groups(kd, lr=1e-5), fused=True) for k, (kd, _) in sources.items()}
        seconds: dict[str, list[float]] = {"with": [], "without": [], "teacher alone": []}
        for step in range(args.steps + 2):
            at = batches[step % len(batches)]
            for kind, (kd, source) in sources.items():
                began = time.perf_counter()
                kd.train()
                optimizers[kind].zero_grad(set_to_none=True)
                kd(**source.batch(at)).loss.backward()
                optimizers[kind].step()
                seconds[kind].append(time.perf_counter() - began)
            inputs = rows.batch(at, labels=False)
            began = time.perf_counter()
            live.targets.wanted(inputs, inputs)
            seconds["teacher alone"].append(time.perf_counter() - began)
        medians = {k: statistics.median(v[2:]) for k, v in seconds.items()}
        return {**medians, "build_seconds": build, "rows": len(rows), "bytes_per_example": cache.bytes_per_example}


# --- scores


def scores(task: str, seed: int, args: argparse.Namespace) -> None:
    """One JSON: the fp32 teacher's score, and the students' that learned from it and from a cache of it."""
    name = f"{task}-{args.preset}-{args.loss}-{args.compress}-{args.schedule}-s{seed}"
    path = RESULTS / f"scores-{name}.json"
    if path.exists():
        return
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    source = opening.model_source("minilm")
    tokenizer = opening.load_tokenizer(source)
    dataset = data.load(args.data / task, tokenizer)
    dataset = replace(dataset, device=device)
    out = args.runs / f"{task}-s{seed}"
    fp32 = job.Settings(epochs=5, lr=5e-5, seed=seed, warmup=0.1, clip=1.0)
    teacher = job.fine_tune(source, dataset, tokenizer, out=out, settings=fp32)
    compress = None
    if args.compress != "whole":
        compress = kq.Compression.parse(args.compress, separator=tokenizer.sep_token_id)
    distil = {"loss": args.loss, "compress": compress, "schedule": args.schedule}
    settings = job.Settings(epochs=args.epochs, lr=LR[args.preset.partition("-")[0]], seed=seed)
    settings = replace(settings, precision=args.precision)
    began = time.perf_counter()
    plan = kq.distill(kq.prepare_qat(teacher, args.preset), teacher, **distil).to(device)
    cache = kq.build_cache(plan, dataset.train, out / f"cache-{name}", tokenizer=tokenizer)
    build = time.perf_counter() - began
    del plan
    recipes = {
        "with": job.Recipe(settings=settings, distil=distil, dropout=0.0),
        "without": job.Recipe(settings=settings, cache=str(cache.folder), dropout=0.0),
    }
    rows = {"fp32": job.measure("fp32", "fp32", teacher, dataset).scores}
    curves = {}
    for kind, recipe in recipes.items():
        where = out / f"{name}-{kind}"
        qat, _ = job.student(teacher, teacher, dataset, tokenizer, args.preset, out=where, recipe=recipe)
        rows[kind] = job.measure(kind, args.preset, qat, dataset).scores
        lines = (where / args.preset / "run" / "log.tsv").read_text().splitlines()[1:]
        curves[kind] = {"loss": [float(x.split("\t")[1]) for x in lines], "seconds": float(lines[-1].split("\t")[3])}
        say(
            f"{task} seed {seed} {kind} the teacher: {rows[kind]['headline']:.2f} (fp32 {rows['fp32']['headline']:.2f})"
        )
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_json(path, {
        "task": task, "seed": seed, "preset": args.preset, "distil": {"loss": args.loss, "compress": args.compress,
        "schedule": args.schedule}, "settings": asdict(settings), "scores": rows, "curves": curves, "device": device,
        "bytes_per_example": cache.bytes_per_example, "build_seconds": build, "origin": busy_origin(),
    })  # fmt: skip


# --- the page


def write_report() -> None:
    """benchmarks/teacher_free.md from the JSONs that are there."""
    found = {p.name: json.loads(p.read_text()) for p in sorted(RESULTS.glob("*.json"))}
    seconds = [r for n, r in found.items() if n.startswith("seconds")]
    scored = [r for n, r in found.items() if n.startswith("scores")]
    if not found:
        return
    lines = ["# Training without a teacher", "", "Written by `benchmarks/teacher_free.py`, which says how."]
    if seconds:
        columns = ("student", "teacher", "s a step, with", "without", "ratio", "teacher alone", "bytes an example")
        lines += ["", f"| {' | '.join(columns)} | s to build |", "|---" * 8 + "|"]
        lines += [second_line(r) for r in seconds]
        lines += ["", *(where(r, f"{r['threads']} threads, {r['batch_size']} rows of up to {r['length']} tokens, "
                                 f"{r['preset']}, {r['loss']} {r['compress']}") for r in seconds[:1])]  # fmt: skip
    if scored:
        lines += [
            "",
            "| task | preset | loss | seeds | fp32 | with the teacher | without | difference |",
            "|---" * 8 + "|",
        ]
        lines += score_lines(scored)
        lines += ["", where(scored[0], f"headline score of all of dev, last step, mean ± spread over the seeds; "
                        f"students trained with {scored[0]['settings']['precision']} products")]  # fmt: skip
    REPORT.write_text("\n".join(lines) + "\n", encoding="utf-8")


def second_line(r: dict[str, Any]) -> str:
    return (
        f"| {r['student']} | {r['teacher']} | {r['with']:.3f} | {r['without']:.3f} | {r['with'] / r['without']:.2f} "
        f"| {r['teacher alone']:.3f} | {r['bytes_per_example']:.0f} | {r['build_seconds']:.1f} ({r['rows']} rows) |"
    )


def score_lines(runs: list[dict[str, Any]]) -> list[str]:
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for r in runs:
        d = r["distil"]
        key = (r["task"], r["preset"], f"{d['loss']} {d['compress']} {d['schedule']}")
        groups.setdefault(key, []).append(r)
    lines = []
    for key, group in groups.items():
        got = {k: np.array([r["scores"][k]["headline"] for r in group]) for k in ("fp32", "with", "without")}
        gap = got["without"] - got["with"]
        cells = [spread(v) for v in (*got.values(), gap)]
        lines.append(f"| {' | '.join(key)} | {', '.join(str(r['seed']) for r in group)} | {' | '.join(cells)} |")
    return lines


def spread(values: np.ndarray) -> str:
    more = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
    return f"{values.mean():.1f}{more}"


def where(r: dict[str, Any], what: str) -> str:
    o = r["origin"]
    versions = ", ".join(f"{k} {v}" for k, v in o["versions"].items())
    machine = f"{o['machine'] or 'CPU'}, {o['cores']} cores, load {o['load']}"
    return f"{what}; {machine}; {versions}; commit {o['commit']}; {o['date']}."


if __name__ == "__main__":
    sys.exit(main())
