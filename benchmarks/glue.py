"""MiniLM on five GLUE tasks: fp32, min-max PTQ, and students at several presets with their integer and ONNX forms.

    python benchmarks/glue.py --tasks rte mrpc --presets W4E4A8      train and measure what is not there yet
    python benchmarks/glue.py --evaluate                             only fill in rows of students that are trained
    python benchmarks/glue.py --report                               only write benchmarks/glue.md again

One JSON per (task, preset, seed) under ``benchmarks/results/glue``; weights and checkpoints under ``--runs``. Jobs run
one after another; a job that is done is skipped, one that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from common import curve, origin, say, with_more

from kdlsq_fx import data, job, metrics, opening
from kdlsq_fx.comparison import exactly
from kdlsq_fx.errors import KdlsqError
from kdlsq_fx.files import INFO, write_json

HERE = Path(__file__).resolve().parent
RESULTS, REPORT = HERE / "results" / "glue", HERE / "glue.md"
TASKS = ("rte", "mrpc", "cola", "stsb", "sst2")
PRESETS = ("W2E2A8", "W4E4A8", "W8E8A8")  # hardest first: it decides whether the recipe is right
EXACT = "student in float64"
ROWS = ("min-max PTQ", "student (qat)", EXACT, "integer", "ONNX")
ROWS_OF_INT = ("student (qat)", EXACT, "integer")  # their integer ONNX file equals the last in every bit: not scored

# Chosen for two CPU cores; README.md tells how.
FP32: dict[str, dict[str, Any]] = {
    "sst2": {"epochs": 1, "lr": 5e-5, "batch_size": 64, "precision": "bf16"},
    "cola": {"epochs": 3, "lr": 5e-5, "batch_size": 32, "precision": "fp32"},
    "stsb": {"epochs": 3, "lr": 1e-4, "batch_size": 32, "precision": "fp32"},
    "mrpc": {"epochs": 3, "lr": 1e-4, "batch_size": 32, "precision": "fp32"},
    "rte": {"epochs": 5, "lr": 5e-5, "batch_size": 32, "precision": "bf16"},
}
EPOCHS: dict[str, dict[str, float]] = {
    "W8E8A8": {"sst2": 0.1, "cola": 0.5, "stsb": 0.5, "mrpc": 0.5, "rte": 0.5},
    "W4E4A8": {"sst2": 0.4, "cola": 2, "stsb": 1, "mrpc": 1.5, "rte": 1.5},
    "W2E2A8": {"sst2": 1, "cola": 2.5, "stsb": 2.5, "mrpc": 2, "rte": 1.1},  # of their own texts and those of MORE
}
LR = {"W8E8A8": 2e-5, "W4E4A8": 5e-5, "W2E2A8": 2e-4}
BATCH = {"sst2": 64}
# An integer-only student starts from the student of the same bits and trains a part as long.
INTEGER_SHARE = {"W8E8A8": 0.25, "W4E4A8": 0.25, "W2E2A8": 0.1}


def recipe(task: str, preset: str, seed: int) -> job.Recipe:
    """How the student of a task is trained at a preset."""
    base, _, form = preset.partition("-")
    epochs = EPOCHS[base][task] * (INTEGER_SHARE[base] if form == "int" else 1)
    settings = job.Settings(epochs=epochs, lr=LR[base], batch_size=BATCH.get(task, 32), seed=seed, precision="bf16")
    # no dropout: the teacher has none either, and its values are the target
    return job.Recipe(settings=settings, dropout=0.0, begin_with=base if form == "int" else "")


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--data", type=Path, default=HERE.parents[1] / "shared" / "data", help="folder with the task folders"
    )
    p.add_argument("--runs", type=Path, default=HERE.parent / "runs" / "glue", help="weights and checkpoints")
    p.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    p.add_argument("--presets", nargs="*", default=list(PRESETS))
    p.add_argument("--seed", type=int, default=42)
    p.add_argument("--device", default="cpu", help="where training runs, such as cuda; rows are measured on the CPU")
    p.add_argument("--evaluate", action="store_true", help="train nothing; measure rows that are missing")
    p.add_argument("--report", action="store_true", help="only write glue.md")
    args = p.parse_args()
    if not args.report:
        for preset in ("fp32", *args.presets):
            for task in args.tasks:
                run(task, preset, args)
                write_report(args.seed)
    write_report(args.seed)
    return 0


def run(task: str, preset: str, args: argparse.Namespace) -> None:
    """One job; its JSON is rewritten after every row, and rows that are there are not measured again."""
    path = RESULTS / f"{task}-{preset}-s{args.seed}.json"
    found = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    wanted = ("fp32",) if preset == "fp32" else rows_of(preset)
    if set(found["rows"]) >= set(wanted):
        return
    out = args.runs / f"{task}-s{args.seed}"
    ready = out / "fp32" / "model.safetensors" if preset == "fp32" else out / preset / "qat" / INFO
    if args.evaluate and not ready.exists():
        say(f"{task} {preset}: not trained yet")
        return
    source = opening.model_source("minilm")
    tokenizer = opening.load_tokenizer(source)
    dataset = replace(data.load(args.data / task, tokenizer), device=args.device)
    settings = job.Settings(seed=args.seed, warmup=0.1, clip=1.0, **FP32[task])
    teacher = job.fine_tune(source, dataset, tokenizer, out=out, settings=settings)
    chosen = recipe(task, preset, args.seed) if preset != "fp32" else None
    learned = with_more(dataset, args.data, tokenizer) if preset == "W2E2A8" else dataset
    named = {"task": task, "preset": preset, "seed": args.seed, "recipe": asdict(chosen or settings)}
    base = {**named, **origin(args.device), "rows": found["rows"]}

    def keep(row: job.Row) -> None:
        base["rows"][row.model] = public(row, task, args.seed)
        folder = out / ("fp32-run" if preset == "fp32" else f"{preset}/run")
        base["training"] = curve(folder)
        RESULTS.mkdir(parents=True, exist_ok=True)
        write_json(path, base)
        say(f"{task} {preset} {row.model}: {row.scores['headline']:.2f} ± {row.scores['headline_se']:.2f}")

    if chosen is None:
        keep(on_cpu("fp32", "fp32", teacher, dataset, size=job.weight_bytes(out / "fp32")))
        return
    try:
        skip = {*found["rows"], *(set(ROWS) - set(wanted))}
        made = job.preset_rows(
            teacher, teacher, learned, tokenizer, preset, out=out, recipe=chosen, skip=skip, measure=on_cpu
        )
        for row in made:
            keep(row)
        if EXACT not in found["rows"]:
            keep(on_cpu(EXACT, preset, exactly(job.trained(out, preset)), dataset))
    except (KdlsqError, ImportError, NotImplementedError) as e:  # the student is safe; --evaluate fills in the rest
        say(f"{task} {preset}: stopped ({type(e).__name__}: {e})")


def on_cpu(name: str, preset: str, model: Any, dataset: data.Dataset, *, size: int = 0) -> job.Row:
    """Every row is measured on the CPU, wherever its model was trained."""
    return job.measure(name, preset, model, replace(dataset, device="cpu"), size=size)


def rows_of(preset: str) -> tuple[str, ...]:
    """The rows of a preset, in the order in which they are measured."""
    return ROWS_OF_INT if preset.endswith("-int") else ROWS


def write_report(seed: int) -> None:
    """benchmarks/glue.md from the JSONs of a seed."""
    runs = [json.loads(p.read_text()) for p in sorted(RESULTS.glob(f"*-s{seed}.json"))]
    rows = {(r["task"], row["preset"], name): row for r in runs for name, row in r["rows"].items()}
    lines = [
        "# MiniLM on GLUE",
        "",
        "Written by `benchmarks/glue.py`. Points on dev (of SST-2, CoLA and STS-B one half of the official one),",
        "± standard error. By task: accuracy (RTE, SST-2),",
        "mean of accuracy and F1 (MRPC), Matthews (CoLA), mean of Pearson and Spearman (STS-B).",
        f"`vs fp32`: difference of the means, ± a paired bootstrap error. Seed {seed}.",
        "",
        f"| model | preset | {' | '.join(TASKS)} | mean | vs fp32 |",
        "|---" * (4 + len(TASKS)) + "|",
    ]
    keys = [("fp32", "fp32")]
    for preset in sorted({p for _, p, n in rows if n == "student (qat)"}, key=_order):
        names = rows_of(preset)
        keys += [(n, preset.partition("-")[0] + "-minmax") for n in names if n == "min-max PTQ"]
        keys += [(n, preset) for n in names if n != "min-max PTQ"]
    lines += [line_of(name, preset, rows) for name, preset in keys]
    lines += ["", *agreement_lines(rows), "", *origin_lines(runs)]
    REPORT.write_text("\n".join(lines) + "\n", encoding="utf-8")


def line_of(name: str, preset: str, rows: dict[Any, Any]) -> str:
    got = {t: rows.get((t, preset, name)) for t in TASKS}
    cells = [f"{r['scores']['headline']:.1f} ± {r['scores']['headline_se']:.1f}" if r else "–" for r in got.values()]
    mean = versus = "–"
    if all(got.values()):
        scores = [r["scores"] for r in got.values() if r]
        error = np.sqrt(sum(s["headline_se"] ** 2 for s in scores)) / len(TASKS)
        mean = f"{np.mean([s['headline'] for s in scores]):.2f} ± {error:.2f}"
        base = {t: rows.get((t, "fp32", "fp32")) for t in TASKS}
        if name != "fp32" and all(base.values()):
            gaps = [r["vs_fp32"] for r in got.values() if r and "vs_fp32" in r]
            if len(gaps) == len(TASKS):
                error = np.sqrt(sum(e**2 for _, e in gaps)) / len(TASKS)
                versus = f"{np.mean([g for g, _ in gaps]):+.2f} ± {error:.2f}"
    return f"| {name} | {preset} | {' | '.join(cells)} | {mean} | {versus} |"


def public(row: job.Row, task: str, seed: int) -> dict[str, Any]:
    """A row without the data set's labels, which stay out of the repository; with its paired difference to fp32."""
    kept = asdict(row)
    labels = np.asarray(kept.pop("labels"))
    path = RESULTS / f"{task}-fp32-s{seed}.json"
    if row.model != "fp32" and path.exists():
        base = np.asarray(json.loads(path.read_text())["rows"]["fp32"]["predictions"])
        kept["vs_fp32"] = metrics.difference(data.GLUE[task], np.asarray(row.predictions), base, labels)
    return kept


def origin_lines(runs: list[dict[str, Any]]) -> list[str]:
    """Where and with what the figures were made."""
    seen: dict[str, set[str]] = {}
    for r in runs:
        known = {"machine": f"{r['machine']}, {r['cores']} cores", "date": r["date"], "commit": r["commit"]}
        for key, value in (*known.items(), *r["versions"].items()):
            seen.setdefault(key, set()).add(value)
    return ["; ".join(f"{key} {', '.join(sorted(values))}" for key, values in seen.items()) + "."]


def agreement_lines(rows: dict[Any, Any]) -> list[str]:
    """On how many rows two executions of one student predict the same."""
    out = [
        "Predictions that are equal (STS-B: within 0.05 of its 0 to 5), all dev sets together. The student in float64",
        "is the same graph, its sums without float32's rounding; in float32 it differs from itself at near-ties.",
        "",
        "| preset | integer, float64 | integer, float32 | ONNX, float32 | float32, float64 |",
        "|---|---|---|---|---|",
    ]
    pairs = (("integer", EXACT), ("integer", "student (qat)"), ("ONNX", "student (qat)"), ("student (qat)", EXACT))
    for preset in sorted({p for _, p, n in rows if n == "student (qat)"}, key=_order):
        out.append(f"| {preset} | " + " | ".join(_equal(rows, preset, a, b) for a, b in pairs) + " |")
    return out


def _equal(rows: dict[Any, Any], preset: str, left: str, right: str) -> str:
    same = total = 0
    for task in TASKS:
        a, b = rows.get((task, preset, left)), rows.get((task, preset, right))
        if a and b:
            x, y = np.asarray(a["predictions"]), np.asarray(b["predictions"])
            equal = np.abs(x - y) <= (0.05 if data.GLUE[task].regression else 0)
            same, total = same + int(equal.sum()), total + len(x)
    return f"{same} of {total} ({100 * same / total:.2f} %)" if total else "–"


def _order(preset: str) -> tuple[int, str]:
    base = preset.partition("-")[0]
    return (-int(base[1]), preset)


if __name__ == "__main__":
    sys.exit(main())
