"""One training, many models: members of a family beside uniform-bit models that were each trained on their own.

    python benchmarks/family.py [--tasks sst2 mrpc]      train and measure what is not there yet
    python benchmarks/family.py --report                 only write benchmarks/family.md and its pictures again

MiniLM on SST-2 and MRPC. For each task: the uniform models; the family and its tables; a member for the size of each
uniform model, for sizes in between, and for a latency that needs a block left out. One JSON a task under
``benchmarks/results/family``, rewritten after every row; a run that was stopped goes on. Train is trained on, rows held
out of train choose, dev is reported.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import origin, say

from kdlsq_fx import data, family_picture, family_report, job, metrics, opening
from kdlsq_fx.evaluation import evaluate
from kdlsq_fx.family_job import Job, Plan, widths_of
from kdlsq_fx.family_search import Tables
from kdlsq_fx.family_tables import output_distance
from kdlsq_fx.files import read_json, write_json, write_text

HERE = Path(__file__).resolve().parent
RESULTS, REPORT = HERE / "results" / "family", HERE / "family.md"
TASKS = ("sst2", "mrpc")
SEED = 42
WIDTHS = (2, 3, 4, 6, 8)
BETWEEN = {"6MiB": 6.0, "7MiB": 7.0, "9.5MiB": 9.5, "13.5MiB": 13.5}

# Small enough for two CPU cores: one cap on the steps of a training, the family has the steps of two and a half.
ROWS = {"sst2": 16_000, "mrpc": None}  # of train, besides those held out
HELD_OUT = {"sst2": 1000, "mrpc": 500}  # 128 of them make the tables, the others choose
FP32: dict[str, dict[str, Any]] = {
    "sst2": {"epochs": 1, "lr": 5e-5, "batch_size": 32, "precision": "bf16"},
    "mrpc": {"epochs": 3, "lr": 1e-4, "batch_size": 32, "precision": "bf16"},
}
BATCH = {"sst2": 32, "mrpc": 16}
STEPS, FAMILY_STEPS = 200, 500
LR = {2: 2e-4, 3: 1e-4, 4: 1e-4, 6: 5e-5, 8: 5e-5}  # of the uniform models; the family has that of the narrowest


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, default=HERE.parents[1] / "shared" / "data", help="folder with the tasks")
    p.add_argument("--runs", type=Path, default=HERE.parent / "runs" / "family", help="weights and checkpoints")
    p.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    p.add_argument("--report", action="store_true", help="only write family.md")
    args = p.parse_args()
    if not args.report:
        for task in args.tasks:
            Bench(task, args.data, args.runs).run()
            write_report()
    write_report()
    return 0


class Bench:
    """One task: its data, its float model, and the rows measured so far."""

    def __init__(self, task: str, folder: Path, runs: Path) -> None:
        self.name, self.out, self.path = task, runs / f"{task}-s{SEED}", RESULTS / f"{task}-s{SEED}.json"
        source = opening.model_source("minilm")
        self.tokenizer = opening.load_tokenizer(source)
        whole = data.load(folder / task, self.tokenizer)
        self.dataset, self.held_out = data.held_out(whole, HELD_OUT[task], seed=SEED, limit=ROWS[task])
        settings = job.Settings(seed=SEED, warmup=0.1, clip=1.0, **FP32[task])
        self.start = job.fine_tune(source, self.dataset, self.tokenizer, out=self.out, settings=settings)
        self.found: dict[str, Any] = read_json(self.path) if self.path.exists() else {"rows": {}, "seconds": {}}
        recipe = {"rows": len(self.dataset.train), "steps": STEPS, "family_steps": FAMILY_STEPS, "lr": LR}
        self.found |= {"task": task, "format": 1, "recipe": recipe | {"batch": BATCH[task]}, **origin()}
        self.teacher = evaluate(self.start, self.dataset.dev)

    def run(self) -> None:
        if "fp32" not in self.found["rows"]:
            self.keep("fp32", self.start, size=job.weight_bytes(self.out / "fp32"))
        for bits in WIDTHS:
            self.uniform(bits)
        task, tables = self.family()
        for bits in WIDTHS:
            name, member = f"family W{bits}", task.family.uniform(bits)
            if name not in self.found["rows"]:
                self.keep(name, task.family.member(member, self.start), size=int(tables.cost("bytes", member)))
        budgets = {f"size of W{bits}": self.found["rows"][f"own W{bits}"]["size"] for bits in WIDTHS}
        budgets |= {name: size * 2**20 for name, size in BETWEEN.items()}
        for name, size in sorted(budgets.items(), key=lambda item: item[1]):
            self.member(task, tables, name, {"bytes": size})
        whole, blocks = tables.fixed["ms"], tables.per_block["ms"]
        self.found["latency"] = {"whole": whole, "block": float(blocks.max())}
        self.member(task, tables, "a block's time less", {"ms": whole - 0.9 * float(blocks.max())})

    def family(self) -> tuple[Job, Tables]:
        """The trained family and its tables; what took how long is kept."""
        plan = Plan(
            steps=FAMILY_STEPS,
            lr=LR[2],
            batch_size=BATCH[self.name],
            seed=SEED,
            precision="bf16",
            leave_out=1,
            rounds=1,
        )
        task = Job(self.start, self.dataset, self.held_out, plan, self.out / "family")
        self.spent("family, training", task.train())
        began = time.monotonic()
        tables = task.tables(with_latency=True)
        self.spent("family, tables", time.monotonic() - began)
        family_report.write_sensitivity(task)
        write_text(HERE / f"family_{self.name}_sensitivity.svg", (task.out / "sensitivity.svg").read_text("utf-8"))
        order = np.argsort(-tables.loss[:, 0])
        self.found["sensitivity"] = {tables.names[i]: tables.loss[i].tolist() for i in order}
        return task, tables

    def spent(self, what: str, seconds: float) -> None:
        """The longest is kept: what is only loaded takes no time."""
        self.found["seconds"][what] = max(seconds, self.found["seconds"].get(what, 0.0))

    def member(self, task: Job, tables: Tables, name: str, limits: dict[str, float]) -> None:
        if name in self.found["rows"]:
            return
        began = time.monotonic()
        try:
            member, seen = task.choose(tables, limits)
        finally:  # a search that is stopped took its time too
            spent = self.found["seconds"].get("family, search", 0.0)
            self.found["seconds"]["family, search"] = spent + time.monotonic() - began
            write_json(self.path, self.found)
        folder, qat = task.write(member, name.replace(" ", "-").replace("'", ""), self.tokenizer)
        more = {
            "budget": limits.get("bytes"),
            "ms": tables.cost("ms", member),
            "expected": tables.cost("bytes", member),
            "widths": {str(b): share for b, share in widths_of(task.family, member).items()},
            "left_out": list(member.left_out),
            "held_out": seen,
        }
        self.keep(name, qat, size=job.weight_bytes(folder / "int"), **more)

    def uniform(self, bits: int) -> None:
        """A model of one width, trained on its own."""
        name, preset = f"own W{bits}", f"W{bits}E{bits}A8"
        if name in self.found["rows"]:
            return
        rows = len(self.dataset.train.order(batch_size=BATCH[self.name], seed=SEED, epoch=0))
        settings = job.Settings(
            epochs=STEPS / rows, lr=LR[bits], batch_size=BATCH[self.name], seed=SEED, precision="bf16"
        )
        recipe = job.Recipe(settings=settings, dropout=0.0)
        qat, done = job.student(
            self.start, self.start, self.dataset, self.tokenizer, preset, out=self.out, recipe=recipe
        )
        if done is not None:
            self.spent(name, done.seconds)
        job.integer(qat, out=self.out, preset=preset)
        self.keep(name, qat, size=job.weight_bytes(self.out / preset / "int"))

    def keep(self, name: str, model: Any, *, size: int, **more: Any) -> None:
        """Measure on dev, and note predictions, distance to the teacher, and paired differences to what is there."""
        logits = evaluate(model, self.dataset.dev)
        labels = self.dataset.dev.labels
        guess = metrics.predictions(self.dataset.task, logits)
        row = {"size": size, "scores": metrics.score(self.dataset.task, guess, labels), **more}
        row["kl"] = float(output_distance(torch.from_numpy(logits), torch.from_numpy(self.teacher)))
        row["predictions"] = guess.tolist()
        row["versus"] = {
            other: metrics.difference(self.dataset.task, guess, np.asarray(known["predictions"]), labels)
            for other, known in self.found["rows"].items()
            if other == "fp32" or other.startswith("own ")
        }
        self.found["rows"][name] = row
        RESULTS.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.found)
        say(f"{self.name} {name}: {size / 2**20:.2f} MiB, {row['scores']['headline']:.2f}, KL {row['kl']:.4f}")


# --- the page


def write_report() -> None:
    runs = [json.loads(p.read_text()) for p in sorted(RESULTS.glob("*.json"), reverse=True)]
    lines = [
        "# One training, many models",
        "",
        "Written by `benchmarks/family.py`. MiniLM; each uniform model is trained on its own for its width, the",
        "family once for all widths and with at most one block left out. Points on all of dev ± standard error",
        "(SST-2: accuracy; MRPC: mean of accuracy and F1); KL: of the outputs to the fp32 teacher's on dev, in nats.",
        "Members are chosen on rows held out of train, in one round of search. Differences are paired, ± a bootstrap",
        "error; one seed. A row of a member is for a budget; two budgets may get the same one.",
    ]
    for run in runs:
        lines += ["", f"## {run['task']}", "", *_table(run), "", *_costs(run), "", *_sensitivity(run)]
        _draw(run)
    if runs:
        first = runs[0]
        known = {"machine": f"{first['machine']}, {first['cores']} cores", "date": first["date"]}
        known |= {"commit": first["commit"], **first["versions"]}
        lines += ["", "; ".join(f"{k} {v}" for k, v in known.items()) + "."]
    REPORT.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _table(run: dict[str, Any]) -> list[str]:
    recipe, rows = run["recipe"], run["rows"]
    out = [
        f"{recipe['rows']} rows of train, batches of {recipe['batch']}; {recipe['steps']} steps for each uniform",
        f"model, {recipe['family_steps']} for the family.",
        "",
        "| model | MiB | widths (share of elements) | left out | dev | KL | less the uniform model of that size |",
        "|---" * 7 + "|",
    ]
    for name in sorted(rows, key=lambda n: (rows[n]["size"], not n.startswith("own"))):
        row = rows[name]
        widths = ", ".join(f"{b}: {100 * s:.0f} %" for b, s in row.get("widths", {}).items() if s >= 0.005)
        gone = ", ".join(map(str, row.get("left_out", [])))
        score = f"{row['scores']['headline']:.1f} ± {row['scores']['headline_se']:.1f}"
        rival = _rival(name, rows)
        gap = ""
        if rival in row["versus"] and not name.startswith("own"):
            gap = "{:+.1f} ± {:.1f} ({})".format(*row["versus"][rival], rival.removeprefix("own "))
        title = name if name == "fp32" or name.startswith(("own", "family")) else f"member, {name}"
        out.append(f"| {title} | {row['size'] / 2**20:.2f} | {widths} | {gone} | {score} | {row['kl']:.4f} | {gap} |")
    return out


def _rival(name: str, rows: dict[str, Any]) -> str:
    """The largest uniform model that is no larger."""
    limit = max(rows[name]["size"], rows[name].get("budget") or 0) + 64  # headers differ by the levels of codes
    fits = [n for n, r in rows.items() if n.startswith("own") and r["size"] <= limit]
    return max(fits, key=lambda n: rows[n]["size"], default="")


def _costs(run: dict[str, Any]) -> list[str]:
    spent = run["seconds"]
    own = {k: v for k, v in spent.items() if k.startswith("own")}
    family = {k: v for k, v in spent.items() if k.startswith("family")}
    parts = ", ".join(f"{k.removeprefix('family, ')} {v / 60:.1f}" for k, v in family.items())
    whole, alone = sum(family.values()) / 60, sum(own.values()) / 60
    return [
        f"Minutes, on one core while the other was busy too: the family {whole:.1f} ({parts}); training",
        f"{len(own)} uniform models {alone:.1f}. For these sizes the family costs {whole / alone:.1f} times as much.",
    ]


def _sensitivity(run: dict[str, Any]) -> list[str]:
    """Which weights keep the mixed models from being smaller."""
    found: dict[str, list[float]] = run.get("sensitivity", {})
    if not found:
        return []
    costs = {name: max(by_width[0], 0.0) for name, by_width in found.items()}
    first, time = list(costs)[:5], run["latency"]
    return [
        f"![sensitivity](family_{run['task']}_sensitivity.svg)",
        "",
        f"At 2 bits alone, all others at 8, these five of {len(found)} weights cost most (in nats), together",
        f"{100 * sum(costs[n] for n in first) / sum(costs.values()):.0f} % of what all cost one by one:",
        "",
        *(f"* {name.removesuffix('.weight')} {costs[name]:.4f}" for name in first),
        "",
        f"The largest takes {time['whole']:.1f} ms for 128 tokens, {time['block']:.2f} less without a block.",
    ]


def _draw(run: dict[str, Any]) -> None:
    """The points of a task: benchmarks/family_<task>.svg."""

    def at(keep: Any) -> list[tuple[float, float, float]]:
        rows = sorted((r for n, r in run["rows"].items() if keep(n)), key=lambda r: r["size"])
        return [(r["size"] / 2**20, r["kl"], 0.0) for r in rows]

    series = [
        family_picture.Points("uniform, each trained on its own", at(lambda n: n.startswith("own"))),
        family_picture.Points("members of the family", at(lambda n: "MiB" in n or n.startswith(("size", "a block")))),
        family_picture.Points("the family at one width", at(lambda n: n.startswith("family"))),
    ]
    series = [s for s in series if s.at]
    if series:
        title = f"{run['task']}: distance to the teacher on dev"
        text = family_picture.scatter(series, title=title, x="MiB of constants.safetensors", y="KL (nats)")
        family_picture.write(text, HERE / f"family_{run['task']}.svg")


if __name__ == "__main__":
    sys.exit(main())
