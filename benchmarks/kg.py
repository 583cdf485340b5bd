"""KG-BERT's tasks with MiniLM: UMLS link prediction and WN11 triple classification, fp32 and students at three presets.

    python benchmarks/kg.py                                     train and measure what is not there yet
    python benchmarks/kg.py --tasks umls --presets W4E4A8       one job (the fp32 model is trained first if need be)
    python benchmarks/kg.py --speed                             time ranking, fp32 against int8, in ONNX Runtime
    python benchmarks/kg.py --report                            only write benchmarks/kg.md again (reads UMLS, if there)

One JSON per (task, preset, seed) under ``benchmarks/results/kg``; weights and states under ``--runs``. A job that is
done is skipped, one that was stopped goes on, a ranking at the batch where it stopped. Jobs of different presets may
run at the same time once the fp32 model of their task is there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from common import curve, origin, say

from kdlsq_fx import job, kg_job, opening
from kdlsq_fx.cli_parts import device_of
from kdlsq_fx.evaluation import onnx_runner
from kdlsq_fx.files import write_json, write_text
from kdlsq_fx.kg_cli import FORMS
from kdlsq_fx.kg_graph import read_graph
from kdlsq_fx.kg_metrics import rank_difference
from kdlsq_fx.kg_ranking import Plan, score

HERE = Path(__file__).resolve().parent
RESULTS, REPORT = HERE / "results" / "kg", HERE / "kg.md"
TASKS = {"umls": ("kg_umls", "kg-links"), "wn11": ("kg_wn11", "kg-triples")}
PRESETS = ("W8E8A8", "W4E4A8", "W2E2A8")
FIGURES = {"umls": ("MR", "MRR", "Hits@1", "Hits@3", "Hits@10"), "wn11": ("accuracy",)}
# BERT-base, uncased; on the test splits. UMLS 5 epochs, WN11 3 epochs, batch 32, 5e-5.
UMLS_TEST = 661  # triples of its test split, which the data here lacks
PAPER = {"umls": {"MR": "1.47", "Hits@10": "99.0"}, "wn11": {"accuracy": "93.5"}}

FP32: dict[str, dict[str, Any]] = {
    "umls": {"epochs": 3, "lr": 1e-4, "batch_size": 32},  # 978 steps an epoch
    "wn11": {"epochs": 1, "lr": 1e-4, "batch_size": 64},  # 3,449 steps an epoch
}
EPOCHS = {
    "W8E8A8": {"umls": 0.5, "wn11": 0.1},
    "W4E4A8": {"umls": 1, "wn11": 0.25},
    "W2E2A8": {"umls": 2.5, "wn11": 0.6},
}
LR = {"W8E8A8": 2e-5, "W4E4A8": 5e-5, "W2E2A8": 2e-4}
BATCH = 64  # of a student


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--data", type=Path, default=HERE.parents[1] / "shared" / "data", help="folder with kg_umls, kg_wn11"
    )
    p.add_argument("--runs", type=Path, default=HERE.parent / "runs" / "kg", help="weights and states")
    p.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSONs")
    p.add_argument("--model", default="minilm", help="encoder to start from")
    p.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    p.add_argument("--presets", nargs="+", default=list(PRESETS), help="`fp32`: the teacher alone")
    p.add_argument("--forms", nargs="+", default=["qat", "onnx"], choices=tuple(FORMS), help="what is measured")
    p.add_argument("--device", default="auto")
    p.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the matrix products in training")
    p.add_argument("--seed", type=int, default=42)
    p.add_argument("--scale", type=float, default=1.0, help="part of the epochs, for a trial")
    p.add_argument("--triples", type=int, help="measure only the first of dev, for a trial")
    p.add_argument("--speed", action="store_true", help="only time the ranking")
    p.add_argument("--chunks", type=int, default=12, help="chunks of about 8,000 sequences to time (12: all)")
    p.add_argument("--threads", type=int, default=1, help="of ONNX Runtime, in --speed")
    p.add_argument("--report", action="store_true", help="only write kg.md")
    args = p.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    if args.speed:
        speed(args)
    elif not args.report:
        for task in args.tasks:
            for preset in dict.fromkeys(("fp32", *args.presets)):
                run(task, preset, args)
    if args.results == RESULTS:
        write_report(args)
    return 0


def load(task: str, args: argparse.Namespace) -> tuple[str, Any, kg_job.KgDataset]:
    folder, kind = TASKS[task]
    source = opening.model_source(args.model)
    tokenizer = opening.load_tokenizer(source)
    device = device_of(args.device)
    batch = 1024 if device != "cpu" else 256
    states = args.runs / f"{task}-s{args.seed}" / "ranking"
    fields = {"seed": args.seed, "device": device, "batch_size": batch, "states": states}
    dataset = kg_job.load(args.data / folder, tokenizer, kind, **fields)
    if args.triples:
        measured = replace(dataset.measured, rows=dataset.measured.rows[: args.triples])
        dataset = replace(dataset, measured=measured, dev=dataset.dev.head(args.triples), states=None)
    return source, tokenizer, dataset


def recipe(task: str, preset: str, args: argparse.Namespace) -> job.Recipe:
    epochs = EPOCHS[preset.partition("-")[0]][task] * args.scale
    shared = {"batch_size": BATCH, "seed": args.seed, "precision": args.precision}
    settings = job.Settings(epochs=epochs, lr=LR[preset.partition("-")[0]], **shared)
    return job.Recipe(settings=settings, dropout=0.0)  # the teacher has none either, and its values are the target


def run(task: str, preset: str, args: argparse.Namespace) -> None:
    """One job; its JSON is rewritten after every row, and rows that are there are not measured again."""
    path = args.results / f"{task}-{preset}-s{args.seed}.json"
    found = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    wanted = ["fp32"] if preset == "fp32" else [FORMS[form] for form in args.forms]
    if set(found["rows"]) >= set(wanted):
        return
    source, tokenizer, dataset = load(task, args)
    out = args.runs / f"{task}-s{args.seed}"
    base = FP32[task] | {"epochs": FP32[task]["epochs"] * args.scale}
    settings = job.Settings(seed=args.seed, warmup=0.1, clip=1.0, precision=args.precision, **base)
    teacher = job.fine_tune(source, dataset, tokenizer, out=out, settings=settings)
    chosen = None if preset == "fp32" else recipe(task, preset, args)
    record = described(task, preset, args) | {"recipe": asdict(chosen or settings), "rows": found["rows"]}

    def keep(row: job.Row) -> None:
        kept = asdict(row)
        kept.pop("labels")  # the data set's own; they stay out of the repository
        record["rows"][row.model] = kept
        record["training"] = curve(out / ("fp32-run" if preset == "fp32" else f"{preset}/run"))
        write_json(path, record)
        say(f"{task} {preset} {row.model}: {row.scores['headline']:.2f} in {row.seconds:.0f} s")

    if chosen is None:
        keep(kg_job.measure("fp32", "fp32", teacher, dataset, size=job.weight_bytes(out / "fp32")))
        return
    above = json.loads((args.results / f"{task}-fp32-s{args.seed}.json").read_text())
    spent = {k: above["training"].get(k) for k in ("steps", "seconds")}
    record["teacher"] = above["rows"]["fp32"] | {"training": spent}  # what differences are to
    skip = {*found["rows"], *(set(FORMS.values()) - set(wanted))}
    made = job.preset_rows(
        teacher, teacher, dataset, tokenizer, preset, out=out, recipe=chosen, skip=skip, measure=kg_job.measure
    )
    for row in made:
        keep(row)


def described(task: str, preset: str, args: argparse.Namespace) -> dict[str, Any]:
    """What was run, and where."""
    device = device_of(args.device)
    told = {"task": task, "preset": preset, "seed": args.seed, "measured": args.triples or "all", "device": device}
    return {**told, **origin(device)}


# --- time


def speed(args: argparse.Namespace) -> None:
    """Both files score the same chunks in turn, so that what else the machine does hits both alike."""
    from kdlsq_fx.api import export_onnx, from_pretrained, prepare_qat
    from kdlsq_fx.files import INFO

    source, tokenizer, dataset = load("umls", args)
    out, base = args.runs / f"umls-s{args.seed}", args.runs / "speed"
    base.mkdir(parents=True, exist_ok=True)
    fp32 = out / "fp32" if (out / "fp32" / "model.safetensors").is_file() else Path(source)
    model = opening.load_task_model(str(fp32), dataset.task, seed=args.seed).eval()
    export_onnx(prepare_qat(model, "W8E8A8", fuel=0).eval(), base / "fp32.onnx")  # no quantizer: plain float ONNX
    trained = (out / "W8E8A8" / "qat" / INFO).is_file()
    settings = job.Settings(seed=args.seed)
    qat = from_pretrained(out / "W8E8A8" / "qat") if trained else job.calibrated(model, dataset, "W8E8A8", settings)
    export_onnx(qat, base / "int8.onnx")
    runs = {name: onnx_runner(base / f"{name}.onnx", threads=args.threads) for name in ("fp32", "int8")}
    plan = Plan(dataset.measured.rows, dataset.graph.facts())
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    sequences = []
    for chunk in [None, *plan.chunks()[: args.chunks]]:  # the first once more: it warms both up
        rows = np.concatenate([plan.question(i).rows for i in chunk or plan.chunks()[0]])
        data = dataset.texts.triples(rows)
        for name, scorer in runs.items():
            began = time.monotonic()
            for batch in data.sorted_batches(args_batch := 128):
                score(scorer, data, batch)
            if chunk is not None:
                seconds[name].append(time.monotonic() - began)
        if chunk is not None:
            sequences.append(len(data))
            say(f"{len(data)} sequences: " + ", ".join(f"{n} {s[-1]:.1f} s" for n, s in seconds.items()))
    total = sum(plan.size(i) for i in range(len(plan)))
    result = described("umls", "speed", args) | {
        "device": "cpu", "threads": args.threads, "batch": args_batch, "trained": trained, "sequences": sequences,
        "seconds": seconds, "total": total, "naive": 2 * len(plan.triples) * plan.facts.entities,
    }  # fmt: skip
    write_json(args.results / f"speed-umls-s{args.seed}.json", result)


# --- the page


def write_report(args: argparse.Namespace) -> None:
    found = [json.loads(p.read_text()) for p in sorted(RESULTS.glob(f"*-s{args.seed}.json"))]
    runs = {(r["task"], r["preset"]): r for r in found if "rows" in r}
    lines = [
        "# KG-BERT's tasks with MiniLM",
        "",
        "Written by `benchmarks/kg.py`; [knowledge_graphs.md](../docs/knowledge_graphs.md) tells what is computed.",
        "all-MiniLM-L6-v2 (22.7 M parameters) on dev, beside the paper's BERT-base (110 M) on test, which was not at",
        "hand. Rows `student (qat)` are the student as it is trained: floats, with quantization simulated. Integers",
        "were measured only where a row says `integer` or `ONNX`. ± is the standard error over triples, or of an",
        "accuracy; `vs fp32` is the figure less that of fp32 on the same triples, ± the paired error. Models of",
        "the last step; one seed.",
    ]
    umls, wn11 = "UMLS, link prediction (filtered, both sides)", "WN11, triple classification (one half of dev)"
    lines += ["", f"## {umls}", "", *table("umls", runs), "", *beside_paper(runs, args.data / TASKS["umls"][0])]
    lines += ["", f"## {wn11}", "", *table("wn11", runs)]
    timed = [r for r in found if r["preset"] == "speed"]
    lines += [line for r in timed for line in ("", "## Time of a ranking", "", *speed_lines(r))]
    lines += ["", *origins(found)]
    write_text(REPORT, "\n".join(lines) + "\n")


def table(task: str, runs: dict[Any, Any]) -> list[str]:
    names = FIGURES[task]
    lines = [
        f"| model | preset | {' | '.join(names)} | {names[-1]} vs fp32 | steps | training s | measuring s |",
        "|---" * (6 + len(names)) + "|",
        "| KG-BERT, BERT-base | fp32 | " + " | ".join(PAPER[task].get(n, "–") for n in names) + " | – | – | – | – |",
    ]
    fp32 = runs.get((task, "fp32"), {"rows": {}})["rows"].get("fp32")
    for preset in ("fp32", *PRESETS):
        run = runs.get((task, preset), {"rows": {}, "training": {}})
        teacher = run.get("teacher", fp32)
        rows = list(run["rows"].items())
        if teacher is not None and fp32 is not None and teacher["scores"] != fp32["scores"]:
            rows.insert(0, ("fp32 of this student", teacher))  # trained anew, on the student's machine
        for name, row in rows:
            cells = [f"{row['scores'][n]:.2f} ± {row['scores'][n + '_se']:.2f}" for n in names]
            spent = row.get("training", run["training"])
            cells += [versus(task, row, teacher), str(spent.get("steps", "–")), f"{spent.get('seconds', 0):.0f}"]
            lines.append(
                f"| {name} | {'fp32' if row is teacher else preset} | {' | '.join(cells)} | {row['seconds']:.0f} |"
            )
    return lines


def versus(task: str, row: dict[str, Any], fp32: dict[str, Any] | None) -> str:
    """Hits@10 or accuracy less that of fp32 on the same triples, with the paired error."""
    if fp32 is None or row is fp32 or len(row["predictions"]) != len(fp32["predictions"]):  # a trial on fewer triples
        return "–"
    a, b = (np.asarray(r["predictions"]) for r in (row, fp32))
    if task == "wn11":
        gap = row["scores"]["accuracy"] - fp32["scores"]["accuracy"]
        return f"{gap:+.2f} ± {accuracy_error(a, b, gap):.2f} ({100 * (a == b).mean():.1f} % predicted alike)"
    gap, error = rank_difference(a.reshape(-1, 2), b.reshape(-1, 2), "Hits@10")
    return f"{gap:+.2f} ± {error:.2f}"


def accuracy_error(a: np.ndarray, b: np.ndarray, gap: float) -> float:
    """The paired standard error of a difference ``gap`` of two accuracies, in points, from the predictions 0 or 1 of
    both on the same rows. It needs no labels: where two of two classes differ, exactly one is right."""
    return 100 * float(np.sqrt(((a != b).mean() - (gap / 100) ** 2) / len(a)))


def beside_paper(runs: dict[Any, Any], folder: Path) -> list[str]:
    """How UMLS's figures stand to the paper's; with a size of the bias where the folder of the data is there."""
    fp32 = runs.get(("umls", "fp32"), {"rows": {}})["rows"].get("fp32")
    if fp32 is None:
        return []
    mr, paper = fp32["scores"]["MR"], PAPER["umls"]["MR"]
    lines = [
        f"{mr:.2f} and the paper's {paper} are not the same measure. The UMLS data here has no test.tsv, so true",
        "answers of the test split are not filtered and count as rivals: MR is higher, MRR and Hits are lower than",
        "with the paper's filter.",
    ]
    if folder.is_dir():
        others = other_answers(read_graph(folder).splits["dev"].true)
        bias = others * UMLS_TEST / (len(fp32["predictions"]) / 2 - 1) / 2
        lines += [
            f"How much: dev itself holds {others:.1f} other true answers to a question of dev, and test is as large",
            f"({UMLS_TEST} triples). If the splits are random, a model that saw neither puts half of test's above the",
            f"answer: about {bias:.1f} of the MR. About {mr - bias:.1f} would then stand against {paper}.",
        ]
    return [*lines, "Our own rows all have the same rivals, so their differences are fair."]


def other_answers(rows: np.ndarray) -> float:
    """How many other triples of int64 [n, 3] answer the question of a triple, mean over triples and both sides."""
    sides = [np.unique(rows[:, kept], axis=0, return_counts=True)[1] for kept in ([1, 2], [0, 1])]
    return float(np.mean([(counts**2).sum() / len(rows) - 1 for counts in sides]))


def speed_lines(r: dict[str, Any]) -> list[str]:
    rate = {n: 1000 * np.sum(s) / np.sum(r["sequences"]) for n, s in r["seconds"].items()}
    ratios = np.array(r["seconds"]["fp32"]) / np.array(r["seconds"]["int8"])
    weights = "trained" if r["trained"] else "calibrated, not trained (the time is the same)"
    lines = [
        f"ONNX Runtime, {r['threads']} thread(s), batches of {r['batch']}, {np.sum(r['sequences']):,} of UMLS dev's",
        f"{r['total']:,} sequences in {len(r['sequences'])} chunks, fp32 and int8 in turn on each. Without sharing the",
        f"questions it would be {r['naive']:,}. int8: W8E8A8, {weights}.",
        "",
        "| file | ms a sequence | all of UMLS dev by that rate, s | without sharing, s |",
        "|---|---|---|---|",
    ]
    for name, ms in rate.items():
        lines.append(f"| {name} | {ms:.2f} | {ms * r['total'] / 1000:.0f} | {ms * r['naive'] / 1000:.0f} |")
    spread = f"{ratios.min():.2f} to {ratios.max():.2f} over the chunks"
    return [*lines, "", f"int8 is {np.median(ratios):.2f} times as fast ({spread})."]


def origins(found: list[dict[str, Any]]) -> list[str]:
    """Where and with what the figures were made."""
    lines = []
    for r in found:
        known = ", ".join(f"{n} {v}" for n, v in r["versions"].items())
        part = f"{len(r['sequences'])} chunks" if r["preset"] == "speed" else r["measured"]
        where = f"{r['device']}, {r['cores']} cores, {r['machine']}"
        recipe = r.get("recipe", {})
        trained = " trained in bf16," if recipe.get("settings", recipe).get("precision") == "bf16" else ""
        lines.append(
            f"* {r['task']} {r['preset']}:{trained} {part} of dev; {where}; {known}; {r['commit']}, {r['date']}"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
