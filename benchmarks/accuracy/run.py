"""KDLSQ beside LSQ, Q8BERT, TernaryBERT and min-max on MiniLM: one JSON a run under results/, one table of them.

    python benchmarks/accuracy/run.py --table core      # SST-2, MRPC, RTE, STS-B at W4 and W2, three seeds
    python benchmarks/accuracy/run.py --table full      # CoLA, QNLI, SQuAD and W8 too
    python benchmarks/accuracy/run.py --table ablation  # what of the teacher helps at 2 bits
    python benchmarks/accuracy/run.py --report          # only accuracy.md and its pictures, from the JSONs

First the learning rate of each method is chosen on two tasks with a seed of its own (``--table rates``, done first).
A run that is done is skipped; ``--minutes`` starts nothing new after that time. ``--device cuda --workers 16`` shares
a GPU between processes.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread a process: there are as many processes as cores

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/common.py

import numpy as np
import pool
import torch
import trial
from common import origin, with_more

from kdlsq_fx import data, opening
from kdlsq_fx.errors import ConfigError
from kdlsq_fx.files import write_json

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
CORE, BATCH, STEPS = ("mrpc", "rte", "stsb", "sst2"), 32, 400
SEEDS, RATE_SEED = (42, 43, 44), 1  # the rates are chosen with a seed that is not in the table
RATES, RATE_TASKS, RATE_STEPS = (1e-4, 2e-4, 4e-4), ("mrpc", "stsb"), 300
ABLATION_SEED = 44
LR = {8: 5e-5, 4: 1e-4}  # every method the same; at 2 bits by the sweep
BEST_SHARE = 2.5  # steps of the best recipe, as a multiple of the cap


def jobs_of(table: str) -> list[pool.Job]:
    """What a table needs, in the order in which it is worth having."""
    if table == "rates":
        swept = [n for n, r in trial.ROWS.items() if r.trained and not n.endswith("-gold")]
        return [_job(t, RATE_SEED, n, 2, steps=RATE_STEPS, lr=lr) for t in RATE_TASKS for n in swept for lr in RATES]
    if table == "ablation":
        rows = trial.ABLATION.items()
        return [_job(t, ABLATION_SEED, n, 2, lr=lr) for t in RATE_TASKS for n, row in rows for lr in row.rates]
    bits = (2, 4) if table == "core" else (2, 4, 8)
    tasks = CORE if table == "core" else (*CORE, "cola", "qnli", "squad")
    jobs = []
    for seed in SEEDS:
        for task in tasks:
            for b in bits:
                jobs += [_job(task, seed, name, b) for name, row in trial.ROWS.items() if b in row.bits]
            jobs.append(_job(task, seed, "best", 2, steps=int(BEST_SHARE * STEPS)))
    return jobs


def _job(task: str, seed: int, row: str, bits: int, *, steps: int = STEPS, lr: float = 0.0) -> pool.Job:
    return {"task": task, "seed": seed, "row": row, "bits": bits, "steps": steps, "lr": lr}


def path_of(job: pool.Job) -> Path:
    if job["row"] == "fp32":
        return RESULTS / f"{job['task']}-fp32-s{job['seed']}.json"
    rate = f"-lr{job['lr']:g}" if job["lr"] else ""
    return RESULTS / f"{job['task']}-{job['row']}-w{job['bits']}-s{job['seed']}{rate}.json"


def best_rate(row: str) -> float:
    """The learning rate with the highest mean dev score over the sweep's tasks; at 2 bits only."""
    mean: dict[float, float] = {}
    for lr in RATES:
        paths = [path_of(_job(t, RATE_SEED, _swept(row), 2, lr=lr)) for t in RATE_TASKS]
        mean[lr] = sum(json.loads(p.read_text())["score"]["headline"] for p in paths if p.exists())
    return max(mean, key=lambda lr: mean[lr])


def _swept(row: str) -> str:
    """The row whose sweep decides: labels in the loss, or more texts, change nothing about the rate."""
    return "kdlsq-lsq" if row == "best" else row.removesuffix("-gold")


def work(job: pool.Job) -> str:
    """One run in a process of its own; its JSON is written when all of it is there."""
    where = Path(job["runs"])
    torch.set_num_threads(1)
    dataset = _dataset(job["data"], job["task"], job["device"])
    torch.set_float32_matmul_precision("high")  # of training on a GPU; scores are measured in float32 proper
    model = trial.teacher_of(dataset, _tokenizer(), job["seed"], where / f"{job['task']}-s{job['seed']}")
    model.to(dataset.device)
    if job["row"] == "fp32":
        return _keep(job, dataset, model, {}, None)
    row = trial.row_of(job["row"])
    lr = job["lr"] or LR.get(job["bits"]) or (best_rate(job["row"]) if row.trained else 0.0)
    train = with_more(dataset, Path(job["data"]), _tokenizer()) if job["row"] == "best" else dataset
    out = where / path_of(job).stem
    _, guess, logits = _measured(model, dataset)
    _check_teacher(job, guess)
    student, curves = trial.train_row(
        train, model.cpu(), row, job["bits"], seed=job["seed"], steps=job["steps"], lr=lr, batch_size=BATCH,
        precision=job["precision"], out=out,
        watch=job["seed"] == SEEDS[0] and not dataset.task.spans,  # SQuAD's dev takes as long as the training
    )  # fmt: skip
    shutil.rmtree(out, ignore_errors=True)
    return _keep(job | {"lr_used": lr}, dataset, student, curves, logits)


def _check_teacher(job: pool.Job, guess: np.ndarray) -> None:
    """ConfigError where the fp32 weights are not those whose scores the task and seed have: rows of two teachers would
    stand in one table. Predictions of one model on two machines may differ at near-ties."""
    path = path_of(job | {"row": "fp32"})
    known = np.array(json.loads(path.read_text())["predictions"])
    if np.mean(np.abs(known - guess) > 0.01) > 0.01:
        do = f"remove results/{job['task']}-*-s{job['seed']}.json to train all rows of this seed anew"
        raise ConfigError(f"the fp32 model in {job['runs']} is not that of {path.name}", where=path.stem, do=do)


def _measured(model: Any, dataset: data.Dataset) -> Any:
    torch.set_float32_matmul_precision("highest")
    try:
        return trial.score(model, dataset)
    finally:
        torch.set_float32_matmul_precision("high")


def _keep(job: pool.Job, dataset: data.Dataset, model: Any, curves: dict[str, Any], teacher: Any) -> str:
    scores, guess, logits = _measured(model, dataset)
    keys = ("task", "seed", "row", "bits", "steps", "lr_used", "precision")
    found = {k: job[k] for k in keys if k in job} | {"batch_size": BATCH, "score": scores}
    if teacher is not None:
        found["distance"] = trial.distance(dataset, logits, teacher)
    found |= {"predictions": [round(float(g), 5) for g in guess], "curves": curves, **origin(job["device"])}
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_json(path_of(job), found)
    return f"{path_of(job).stem}: {scores['headline']:.2f} ± {scores['headline_se']:.2f}"


@functools.lru_cache(None)
def _tokenizer() -> Any:
    return opening.load_tokenizer(opening.model_source("minilm"))


@functools.lru_cache(None)
def _dataset(folder: str, task: str, device: str) -> data.Dataset:
    return trial.load(Path(folder), task, _tokenizer(), device)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--table", choices=("rates", "ablation", "core", "full"), default="core")
    p.add_argument("--tasks", nargs="+", choices=trial.TASKS, help="only these")
    p.add_argument("--bits", nargs="+", type=int, choices=(2, 4, 8), default=(2, 4, 8), help="only these")
    p.add_argument("--seeds", nargs="+", type=int, default=(*SEEDS, RATE_SEED), help="only these")
    names = (*trial.ROWS, *trial.ABLATION, "best")
    p.add_argument("--rows", nargs="+", choices=names, default=names, help="only these")
    p.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="of the matrix products in a student's training"
    )
    p.add_argument(
        "--data", type=Path, default=HERE.parents[2] / "shared" / "data", help="folder with the task folders"
    )
    p.add_argument("--runs", type=Path, default=HERE.parents[1] / "runs" / "accuracy", help="weights and checkpoints")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--workers", type=int, default=1, help="trainings at the same time")
    p.add_argument("--minutes", type=float, default=1e9, help="start nothing new after so many")
    p.add_argument("--report", action="store_true", help="train nothing")
    args = p.parse_args()
    left = 0
    if not args.report:
        common = {"data": str(args.data.resolve()), "runs": str(args.runs.resolve()), "device": args.device}
        common |= {"precision": args.precision}
        args.runs.mkdir(parents=True, exist_ok=True)
        wanted = jobs_of("rates") + (jobs_of(args.table) if args.table != "rates" else [])
        wanted = [j for j in wanted if j["task"] in (args.tasks or trial.TASKS)]
        wanted = [j for j in wanted if j["bits"] in args.bits and j["seed"] in args.seeds]
        wanted = [j for j in wanted if j["row"] in args.rows or j["seed"] == RATE_SEED]
        first = {(j["task"], j["seed"]): _job(j["task"], j["seed"], "fp32", 32, steps=0) for j in wanted}
        jobs = [j | common for j in (*first.values(), *wanted) if not path_of(j).exists()]
        ready = functools.partial(_ready, runs=args.runs)
        waiting = pool.run(jobs, work, ready, workers=args.workers, minutes=args.minutes)
        left = len(waiting)
        for task, seed in dict.fromkeys((j["task"], j["seed"]) for j in waiting if not ready(j)):
            why = f"{task} seed {seed} waits for its fp32 weights in {args.runs} or for the sweep of its method's rate"
            do = f"without the weights remove results/{task}-*-s{seed}.json, and all rows are trained anew"
            print(f"{why}; {do}", file=sys.stderr)
        print(f"{len(jobs) - left} runs done, {left} left", file=sys.stderr)
    if args.data.is_dir():
        import report

        report.write(args.data)
    return 1 if left else 0


def _ready(job: pool.Job, *, runs: Path) -> bool:
    """A student waits for its fp32 model; one at 2 bits in the table waits for the sweep of its method."""
    if job["row"] == "fp32":
        return True
    if job["bits"] == 2 and not job["lr"] and trial.ROWS[_swept(job["row"])].trained:
        sweep = [_job(t, RATE_SEED, _swept(job["row"]), 2, lr=lr) for t in RATE_TASKS for lr in RATES]
        if not all(path_of(j).exists() for j in sweep):
            return False
    return (runs / f"{job['task']}-s{job['seed']}" / "fp32" / "model.safetensors").exists()


if __name__ == "__main__":
    sys.exit(main())
