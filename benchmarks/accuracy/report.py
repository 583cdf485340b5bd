"""accuracy.md and its pictures from the JSONs under results/, and the labels of dev, which stay outside."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import run
import trial
from common import POINTS
from intervals import DRAWS, Resamples, headlines

from kdlsq_fx import data, rows
from kdlsq_fx.qconfig import resolve

DOCS = run.HERE.parents[1] / "docs"
PAIRS = (
    ("kdlsq-lsq", "lsq"),
    ("kdlsq", "clip"),
    ("kdlsq-lsq", "ternarybert"),
    ("kdlsq", "ternarybert"),
    ("kdlsq-lsq", "kdlsq"),
    ("kdlsq-lsq-gold", "kdlsq-lsq"),
    ("kdlsq-gold", "kdlsq"),
    ("best", "kdlsq-lsq"),
)
BEST = "KDLSQ, LSQ step, other tasks' texts, 2.5 x steps"

WATCHED = (0, POINTS // 2 - 1, POINTS - 1)  # parts of a run whose loss is told
SURE = 3  # seeds from which on a difference is called better or worse without naming how many there are

Key = tuple[str, str, int, int]  # task, row, bits, seed


def write(folder: Path) -> None:
    """The page and the pictures. ``folder``: where the task folders are."""
    runs = {(r["task"], r["row"], r["bits"], r["seed"]): r for r in _read() if not r["swept"]}
    labels = {task: _labels(folder, task) for task in sorted({k[0] for k in runs} - {"squad"})}
    labels |= {k[0]: np.zeros(len(r["predictions"])) for k, r in runs.items() if k[0] == "squad"}
    drawn = Resamples(runs, labels)
    text = [
        "# KDLSQ, LSQ, Q8BERT and TernaryBERT on MiniLM",
        "",
        "Written by `benchmarks/accuracy/run.py`; README.md beside it tells how the figures are made.",
        f"Every student starts from the fp32 model of its seed and trains {run.STEPS} steps of {run.BATCH} rows;",
        "the last row of 2 bits, our best recipe, trains longer and is no part of the comparison.",
        "Points on dev, the mean over the seeds that are whole for every compared row of a table (else of each",
        "row), ± the standard error of the dev sample. Dev of SST-2 and STS-B is one half of the official one.",
        "Levels: how many values a weight can take.",
    ]
    for bits in (8, 4, 2):
        text += _table(runs, labels, drawn, bits)
    sections = (_pairs(drawn), _by_task(drawn), _why(runs), _missing(), _rates(), _origin(runs.values()))
    text += [line for section in sections for line in ("", *section)]
    (run.HERE / "accuracy.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    _draw(runs)


def _read() -> list[dict[str, Any]]:
    found = []
    for path in sorted(run.RESULTS.glob("*.json")):
        found.append(json.loads(path.read_text(encoding="utf-8")) | {"swept": "-lr" in path.stem})
    return found


def _labels(folder: Path, task: str) -> np.ndarray:
    path = folder / task
    return data.targets(rows.read_file(rows.find_split(path, "dev")), data.GLUE[task])


def _seeds(runs: dict[Key, Any], names: Iterable[tuple[str, int]], tasks: Iterable[str]) -> list[int]:
    """Seeds for which every task has every one of the rows."""
    return [s for s in run.SEEDS if all((t, n, b, s) in runs for n, b in names for t in tasks)]


def _table(runs: dict[Key, Any], labels: dict[str, np.ndarray], drawn: Resamples, bits: int) -> list[str]:
    tasks = [t for t in trial.TASKS if any(k[0] == t and k[2] == bits for k in runs)]
    names = [n for n in (*trial.ROWS, "best") if any(k[1] == n and k[2] == bits for k in runs)]
    if not names:
        return []
    out = ["", f"## W{bits}E{bits}A8", ""]
    out += [f"| method | levels | {' | '.join(tasks)} | mean | by seed | vs fp32 |", "|---" * (5 + len(tasks)) + "|"]
    constant = [_constant(t, labels[t]) for t in tasks]
    out.append(f"| one answer to all | | {' | '.join(f'{c:.1f}' for c in constant)} | {np.mean(constant):.2f} | | |")
    whole = _seeds(runs, [("fp32", 32), *((n, bits) for n in names if n != "best")], tasks)
    for name, b in (("fp32", 32), *((n, bits) for n in names)):
        seeds = _seeds(runs, [(name, b), ("fp32", 32)], tasks)
        seeds = [s for s in whole if s in seeds] or seeds
        cells = [_cell([runs[k] for s in seeds or run.SEEDS if (k := (t, name, b, s)) in runs]) for t in tasks]
        mean = versus = "–"
        by_seed = {s: np.mean([runs[t, name, b, s]["score"]["headline"] for t in tasks]) for s in seeds}
        if seeds:
            mean = f"{np.mean(list(by_seed.values())):.2f}"
            if name != "fp32":
                versus = _interval(*drawn.difference((name, b), ("fp32", 32), dict.fromkeys(tasks, seeds)))
        told = ", ".join(f"{s}: {mean:.2f}" for s, mean in by_seed.items()) or "not whole"
        out.append(f"| {_title(name)} | {_levels(name, b)} | {' | '.join(cells)} | {mean} | {told} | {versus} |")
    return out


def _constant(task: str, labels: np.ndarray) -> float:
    """Points of the one answer that scores most."""
    answers = np.unique(labels) if task != "squad" else np.zeros(1)
    once = np.ones((1, len(labels)))
    return 100 * max(float(headlines(task, np.full(len(labels), a), labels, once)[0]) for a in answers)


def _levels(name: str, bits: int) -> str:
    if name == "fp32":
        return ""
    rules = resolve(trial.row_of(name).preset(bits)).rules
    spec = next(rule.weight for rule in rules if rule.op == "linear" and rule.weight is not None)
    return str(spec.qmax - spec.qmin + 1)


def _cell(found: list[dict[str, Any]]) -> str:
    if not found:
        return "–"
    error = np.mean([r["score"]["headline_se"] for r in found])  # the same rows of dev: seeds do not shrink it
    match = f", EM {np.mean([r['score']['EM'] for r in found]):.1f}" if "EM" in found[0]["score"] else ""
    return f"{np.mean([r['score']['headline'] for r in found]):.1f} ± {error:.1f}{match}"


def _interval(point: float, low: float, high: float) -> str:
    return f"{point:+.2f} [{low:+.2f}, {high:+.2f}]"


def _pairs(drawn: Resamples) -> list[str]:
    out = [
        "## Differences",
        "",
        f"Mean over {', '.join(run.CORE)}, of each all seeds that it has for both (the table below names them);",
        f"95 % interval of a paired bootstrap over the rows of dev and the seeds, {DRAWS:,} draws. An interval that",
        f"holds 0 is a tie. With fewer than {SURE} seeds it is too short by what seeds differ; so many pairs side by",
        "side would need wider ones besides.",
        "",
        "| | levels at 2 bits | W4E4A8 | W2E2A8 |",
        "|---|---|---|---|",
    ]
    for a, b in PAIRS:
        cells = []
        for bits in (4, 2):
            seeds = {t: _seeds(drawn.runs, [(a, bits), (b, bits)], [t]) for t in run.CORE}
            cells.append(_verdict(drawn.difference((a, bits), (b, bits), seeds), seeds) if all(seeds.values()) else "–")
        levels = f"{_levels(a, 2)} − {_levels(b, 2)}"
        out.append(f"| {_title(a)} − {_title(b)} | {levels} | {' | '.join(cells)} |")
    return out


def _by_task(drawn: Resamples) -> list[str]:
    """The same differences of 2 bits for each task alone."""
    out = ["The same at W2E2A8 by task, and the seeds:", "", f"| | {' | '.join(run.CORE)} |"]
    out += ["|---" * (1 + len(run.CORE)) + "|"]
    for a, b in PAIRS:
        cells = []
        for task in run.CORE:
            seeds = _seeds(drawn.runs, [(a, 2), (b, 2)], [task])
            got = drawn.difference((a, 2), (b, 2), {task: seeds}) if seeds else None
            cells.append(f"{_interval(*got)} ({', '.join(map(str, seeds))})" if got else "–")
        out.append(f"| {_title(a)} − {_title(b)} | {' | '.join(cells)} |")
    return out


def _verdict(got: tuple[float, float, float], seeds: dict[str, list[int]]) -> str:
    """The difference, its interval and what it says; of few seeds how many."""
    _, low, high = got
    word = "tie" if low <= 0 <= high else "better" if low > 0 else "worse"
    few = min(map(len, seeds.values()))
    on = f" on {few} seed{'s' * (few > 1)}" if few < SURE and word != "tie" else ""
    return f"{_interval(*got)} ({word}{on})"


def _why(runs: dict[Key, Any]) -> list[str]:
    """How the students without a teacher learn, and what of the teacher it is that helps."""
    width = run.STEPS // POINTS
    ends = [f"{i * width + 1}-{(i + 1) * width}" for i in WATCHED]
    out = [
        "## Where the teacher helps, and what of it",
        "",
        f"Students at W2E2A8 with LSQ's step and gold labels, no teacher: mean loss of {width} steps (cross",
        "entropy in nats; of stsb the squared error), and points on dev beside the student with a teacher and the fp32",
        "model; means over the seeds named.",
        "",
        f"| task | seeds | loss, steps {' | '.join(ends)} | dev | with a teacher | fp32 |",
        "|---" * (5 + len(ends)) + "|",
    ]
    for task in run.CORE:
        seeds = _seeds(runs, [("lsq", 2), ("kdlsq-lsq", 2), ("fp32", 32)], [task])
        if not seeds:
            continue
        curves = np.array([runs[task, "lsq", 2, s]["curves"]["loss"] for s in seeds])
        scores = [_mean_score(runs, task, *row, seeds) for row in (("lsq", 2), ("kdlsq-lsq", 2), ("fp32", 32))]
        cells = [", ".join(map(str, seeds)), *(f"{x:.2f}" for x in curves.mean(axis=0)[list(WATCHED)])]
        out.append(f"| {task} | {' | '.join(cells + [f'{x:.1f}' for x in scores])} |")
    return out + _ablation()


def _ablation() -> list[str]:
    tasks, seed = run.RATE_TASKS, run.ABLATION_SEED
    ours = [r for r in _read() if r["task"] in tasks and r["seed"] == seed and r["bits"] == 2]
    some = {(r["task"], r["row"], r["lr_used"]): r for r in ours}
    if not any(row in trial.ABLATION for _, row, _ in some):
        return []
    out = [
        "",
        f"The student with LSQ's step at W2E2A8, by what it learns from, on one seed ({seed}), which cannot decide",
        "what lies within a few points; in brackets the learning rate.",
        "",
        f"| learns from | {' | '.join(tasks)} |",
        "|---" * (1 + len(tasks)) + "|",
    ]
    told = {"labels, no teacher": "lsq", "all of the teacher": "kdlsq-lsq", "all of it, and labels": "kdlsq-lsq-gold"}
    told |= {row.title: name for name, row in trial.ABLATION.items()}
    for title, name in told.items():
        for lr in sorted({rate for _, row, rate in some if row == name}):
            found = [some.get((t, name, lr)) for t in tasks]
            out.append(f"| {title} ({lr:g}) | {' | '.join(_cell([r] if r else []) for r in found)} |")
    return out


def _mean_score(runs: dict[Key, Any], task: str, name: str, bits: int, seeds: list[int]) -> float:
    return float(np.mean([runs[task, name, bits, s]["score"]["headline"] for s in seeds]))


def _missing() -> list[str]:
    """What the full table has and the results have not."""
    there = Counter[tuple[str, int, int]]()
    whole = Counter[tuple[str, int, int]]()
    for job in run.jobs_of("full"):
        key = (job["task"], job["bits"], job["seed"])
        whole[key] += 1
        there[key] += run.path_of(job).exists()
    out = ["## What is there and what is missing", "", "Rows trained of those that the table has, by seed."]
    out += ["", "| task | W8E8A8 | W4E4A8 | W2E2A8 |", "|---|---|---|---|"]
    for task in trial.TASKS:
        cells = []
        for bits in (8, 4, 2):
            counts = [
                f"{s}: {there[task, bits, s]} of {whole[task, bits, s]}" for s in run.SEEDS if there[task, bits, s]
            ]
            cells.append(", ".join(counts) or "none")
        out.append(f"| {task} | {' | '.join(cells)} |")
    return out


def _title(name: str) -> str:
    return {"fp32": "fp32", "best": BEST}.get(name) or trial.ROWS[name].title


def _rates() -> list[str]:
    out = [
        "## Learning rates at 2 bits",
        "",
        f"Chosen by the mean dev score of {' and '.join(run.RATE_TASKS)} at seed {run.RATE_SEED} (in no table)",
        f"after {run.RATE_STEPS} steps, in bold. At 4 and 8 bits every method has {run.LR[4]:g} and {run.LR[8]:g}.",
        "A rate at an edge of the grid may not be a method's best: no wider grid was tried.",
        "",
        f"| method | {' | '.join(f'{lr:g}' for lr in run.RATES)} |",
        "|---" * (1 + len(run.RATES)) + "|",
    ]
    swept = {
        (r["row"], r["lr_used"], r["task"]): r["score"]["headline"]
        for r in _read()
        if r["swept"] and r["seed"] == run.RATE_SEED
    }
    for name in dict.fromkeys(k[0] for k in swept):
        cells = []
        for lr in run.RATES:
            got = [swept.get((name, lr, t)) for t in run.RATE_TASKS]
            told = " / ".join("–" if g is None else f"{g:.1f}" for g in got)
            cells.append(f"**{told}**" if lr == run.best_rate(name) else told)
        out.append(f"| {trial.ROWS[name].title} | {' | '.join(cells)} |")
    return out


def _origin(runs: Collection[dict[str, Any]]) -> list[str]:
    seen: dict[str, set[str]] = {}
    for r in runs:
        for key, value in (*((k, r[k]) for k in ("machine", "date", "commit")), *r["versions"].items()):
            seen.setdefault(key, set()).add(value)
    kinds: dict[str, set[str]] = {}
    for r in runs:
        if r["row"] != "fp32" and trial.row_of(r["row"]).trained:
            kinds.setdefault(_precision(r), set()).add(f"{r['task']} {r['seed']}")
    told = [f"{kind}: {', '.join(sorted(names))}" for kind, names in sorted(kinds.items())]
    return [
        f"Matrix products while students trained, by task and seed: {'; '.join(told)}. Scores are measured in float32.",
        "",
        "; ".join(f"{key} {', '.join(sorted(v))}" for key, v in seen.items()) + ".",
    ]


def _precision(r: dict[str, Any]) -> str:
    if r.get("precision") == "bf16":
        return "bfloat16"
    return "TF32 on a GPU (ten bits)" if "NVIDIA" in str(r["machine"]) else "float32"


# --- pictures


def _draw(runs: dict[Key, Any]) -> None:
    """docs/learning_curves.png and docs/scale_trajectories.png, of the first seed; nothing without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    watched = {k: r for k, r in runs.items() if r["curves"].get("at") and k[3] == run.SEEDS[0]}
    if watched:
        _curves(watched)
        _scales(watched)


def _curves(watched: dict[Key, Any]) -> None:
    import matplotlib.pyplot as plt

    tasks = [t for t in run.CORE if any(k[0] == t for k in watched)]
    figure, axes = plt.subplots(1, len(tasks), figsize=(4.2 * len(tasks), 3.4), squeeze=False, layout="constrained")
    for axis, task in zip(axes[0], tasks):
        for name in ("lsq", "clip", "ternarybert", "kdlsq", "kdlsq-lsq"):
            r = watched.get((task, name, 2, run.SEEDS[0]))
            if r:
                axis.plot(r["curves"]["at"], r["curves"]["dev"], label=trial.ROWS[name].title)
        axis.set(title=f"{task}, W2E2A8", xlabel="step", ylabel="points on dev")
    axes[0][0].legend(fontsize=7)
    figure.savefig(DOCS / "learning_curves.png", dpi=110)
    plt.close(figure)


def _scales(watched: dict[Key, Any]) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    r = next((watched[k] for k in watched if k[:3] == ("mrpc", "kdlsq-lsq", 2)), next(iter(watched.values())))
    at = [0, *r["curves"]["at"]]
    for axis, kind in zip(axes, ("weights", "tables", "activations")):
        for name, ratio in r["curves"]["scales"].items():
            if _kind(name) == kind:
                axis.plot(at, [1.0, *ratio], linewidth=0.8, color="tab:blue", alpha=0.6)
        axis.set(title=kind, xlabel="step", ylabel="step size / first step size")
    figure.suptitle(f"{r['task']}, {trial.ROWS[r['row']].title}, W{r['bits']}E{r['bits']}A8")
    figure.savefig(DOCS / "scale_trajectories.png", dpi=110)
    plt.close(figure)


def _kind(name: str) -> str:
    if "embeddings" in name and "weight" in name:
        return "tables"
    return "weights" if "weight" in name else "activations"
