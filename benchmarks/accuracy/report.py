"""accuracy.md and its pictures from the JSONs under results/, and the labels of dev, which stay outside."""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import run
import trial

from kdlsq_fx import data, metrics, rows

DOCS = run.HERE.parents[1] / "docs"
DRAWS = 400
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

Key = tuple[str, str, int, int]  # task, row, bits, seed


def write(folder: Path) -> None:
    """The page and the pictures. ``folder``: where the task folders are."""
    runs = {(r["task"], r["row"], r["bits"], r["seed"]): r for r in _read() if not r["swept"]}
    labels = {task: _labels(folder, task) for task in sorted({k[0] for k in runs} - {"squad"})}
    labels |= {k[0]: np.zeros(len(r["predictions"])) for k, r in runs.items() if k[0] == "squad"}
    text = [
        "# KDLSQ, LSQ, Q8BERT and TernaryBERT on MiniLM",
        "",
        "Written by `benchmarks/accuracy/run.py`; README.md beside it tells how the figures are made.",
        f"Every student starts from the fp32 model of its seed and trains {run.STEPS} steps of {run.BATCH} rows;",
        "the last row of 2 bits, our best recipe, trains longer and is no part of the comparison.",
        "Points on dev, the mean over the seeds that are whole for every row of a table (else of each row), ± the",
        "standard error of the dev sample. Dev of SST-2 and STS-B is one half of the official one.",
    ]
    for bits in (8, 4, 2):
        text += _table(runs, labels, bits)
    text += ["", *_pairs(runs, labels), "", *_by_task(runs, labels), "", *_rates(), "", *_origin(runs.values())]
    (run.HERE / "accuracy.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    _draw(runs)


def _read() -> list[dict[str, Any]]:
    found = []
    for path in sorted(run.RESULTS.glob("*.json")):
        found.append(json.loads(path.read_text(encoding="utf-8")) | {"swept": "-lr" in path.stem})
    return found


def _headline(task: str) -> metrics.Metric:
    """Of SQuAD the mean: its predictions are kept as the questions' F1, and need no labels."""
    return (lambda guess, _: float(guess.mean())) if task == "squad" else metrics.headline(data.GLUE[task])


def _labels(folder: Path, task: str) -> np.ndarray:
    path = folder / task
    return data.targets(rows.read_file(rows.find_split(path, "dev")), data.GLUE[task])


def _seeds(runs: dict[Key, Any], names: Iterable[tuple[str, int]], tasks: Iterable[str]) -> list[int]:
    """Seeds for which every task has every one of the rows."""
    return [s for s in run.SEEDS if all((t, n, b, s) in runs for n, b in names for t in tasks)]


def _table(runs: dict[Key, Any], labels: dict[str, np.ndarray], bits: int) -> list[str]:
    tasks = [t for t in trial.TASKS if any(k[0] == t and k[2] == bits for k in runs)]
    names = [n for n in (*trial.ROWS, "best") if any(k[1] == n and k[2] == bits for k in runs)]
    if not names:
        return []
    out = ["", f"## W{bits}E{bits}A8", "", f"| method | {' | '.join(tasks)} | mean | vs fp32 | seeds |"]
    out += ["|---" * (4 + len(tasks)) + "|"]
    whole = _seeds(runs, [("fp32", 32), *((n, bits) for n in names)], tasks)
    for name, b in (("fp32", 32), *((n, bits) for n in names)):
        seeds = whole or _seeds(runs, [(name, b), ("fp32", 32)], tasks)
        cells = [_cell([runs[k] for s in seeds or run.SEEDS if (k := (t, name, b, s)) in runs]) for t in tasks]
        mean = versus = "–"
        if seeds:
            scores = [np.mean([runs[t, name, b, s]["score"]["headline"] for s in seeds]) for t in tasks]
            mean = f"{np.mean(scores):.2f}"
            if name != "fp32":
                versus = _interval(*_difference(runs, labels, (name, b), ("fp32", 32), tasks, seeds))
        counts = ", ".join(map(str, seeds)) or "not whole"
        out.append(f"| {_title(name)} | {' | '.join(cells)} | {mean} | {versus} | {counts} |")
    return out


def _cell(found: list[dict[str, Any]]) -> str:
    if not found:
        return "–"
    error = np.mean([r["score"]["headline_se"] for r in found])  # the same rows of dev: seeds do not shrink it
    match = f", EM {np.mean([r['score']['EM'] for r in found]):.1f}" if "EM" in found[0]["score"] else ""
    return f"{np.mean([r['score']['headline'] for r in found]):.1f} ± {error:.1f}{match}"


def _difference(
    runs: dict[Key, Any], labels: dict[str, np.ndarray], a: tuple[str, int], b: tuple[str, int], tasks: Iterable[str],
    seeds: list[int],
) -> tuple[float, float, float]:  # fmt: skip
    """Mean over tasks and seeds of score(a) - score(b), and the ends of its 95 % interval: a paired bootstrap that
    draws rows of dev (the same for both models and all seeds) and seeds."""
    points, draws = [], []
    for task in tasks:
        guesses = ([np.array(runs[task, *x, s]["predictions"]) for s in seeds] for x in (a, b))
        gap = functools.partial(_gap, task, labels[task], *guesses)
        count, rng = len(labels[task]), np.random.default_rng(0)
        points.append(gap(np.arange(count), np.arange(len(seeds))))
        drawn = ((rng.integers(count, size=count), rng.integers(len(seeds), size=len(seeds))) for _ in range(DRAWS))
        draws.append([gap(*d) for d in drawn])
    low, high = np.quantile(np.mean(draws, axis=0), (0.025, 0.975))
    return float(np.mean(points)), float(low), float(high)


def _gap(
    task: str, truth: np.ndarray, a: list[np.ndarray], b: list[np.ndarray], rows: np.ndarray, seeds: np.ndarray
) -> float:
    """Points of ``a`` less points of ``b`` on these rows, the mean over these seeds."""
    of = _headline(task)
    return float(np.mean([100 * (of(a[s][rows], truth[rows]) - of(b[s][rows], truth[rows])) for s in seeds]))


def _interval(point: float, low: float, high: float) -> str:
    return f"{point:+.2f} [{low:+.2f}, {high:+.2f}]"


def _pairs(runs: dict[Key, Any], labels: dict[str, np.ndarray]) -> list[str]:
    out = [
        "## Differences",
        "",
        f"Mean over {', '.join(run.CORE)}; 95 % interval of a paired bootstrap over the rows of dev and the seeds that",
        "are whole. An interval that holds 0 is a tie.",
        "",
        "| | W4E4A8 | W2E2A8 |",
        "|---|---|---|",
    ]
    for a, b in PAIRS:
        cells = []
        for bits in (4, 2):
            seeds = _seeds(runs, [(a, bits), (b, bits)], run.CORE)
            got = _difference(runs, labels, (a, bits), (b, bits), run.CORE, seeds) if seeds else None
            cells.append(f"{_interval(*got)} ({_verdict(got)})" if got else "–")
        out.append(f"| {_title(a)} − {_title(b)} | {' | '.join(cells)} |")
    return out


def _by_task(runs: dict[Key, Any], labels: dict[str, np.ndarray]) -> list[str]:
    """The same differences of 2 bits for each task alone, over the seeds that this task has."""
    out = [
        "The same at W2E2A8 by task, over all seeds that the task has for both:",
        "",
        f"| | {' | '.join(run.CORE)} |",
    ]
    out += ["|---" * (1 + len(run.CORE)) + "|"]
    for a, b in PAIRS:
        cells = []
        for task in run.CORE:
            seeds = _seeds(runs, [(a, 2), (b, 2)], [task])
            got = _difference(runs, labels, (a, 2), (b, 2), [task], seeds) if seeds else None
            cells.append(f"{_interval(*got)} ({', '.join(map(str, seeds))})" if got else "–")
        out.append(f"| {_title(a)} − {_title(b)} | {' | '.join(cells)} |")
    return out


def _title(name: str) -> str:
    return {"fp32": "fp32", "best": BEST}.get(name) or trial.ROWS[name].title


def _verdict(got: tuple[float, float, float]) -> str:
    _, low, high = got
    return "tie" if low <= 0 <= high else "better" if low > 0 else "worse"


def _rates() -> list[str]:
    out = [
        "## Learning rates at 2 bits",
        "",
        f"Chosen by the mean dev score of {' and '.join(run.RATE_TASKS)} at seed {run.RATE_SEED} (in no table)",
        f"after {run.RATE_STEPS} steps. At 4 and 8 bits every method has {run.LR[4]:g} and {run.LR[8]:g}.",
        "",
        f"| method | {' | '.join(f'{lr:g}' for lr in run.RATES)} |",
        "|---" * (1 + len(run.RATES)) + "|",
    ]
    swept = {(r["row"], r["lr_used"], r["task"]): r["score"]["headline"] for r in _read() if r["swept"]}
    for name in dict.fromkeys(k[0] for k in swept):
        cells = []
        for lr in run.RATES:
            got = [swept.get((name, lr, t)) for t in run.RATE_TASKS]
            cells.append(" / ".join("–" if g is None else f"{g:.1f}" for g in got))
        out.append(f"| {trial.ROWS[name].title} | {' | '.join(cells)} |")
    return out


def _origin(runs: Collection[dict[str, Any]]) -> list[str]:
    seen: dict[str, set[str]] = {}
    for r in runs:
        for key, value in (*((k, r[k]) for k in ("machine", "date", "commit")), *r["versions"].items()):
            seen.setdefault(key, set()).add(value)
    narrow = sorted({f"{r['task']} seed {r['seed']}" for r in runs if r.get("precision") == "bf16"})
    told = [f"Matrix products in bfloat16 while students trained (all others float32): {', '.join(narrow)}.", ""]
    return told * bool(narrow) + ["; ".join(f"{key} {', '.join(sorted(v))}" for key, v in seen.items()) + "."]


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
