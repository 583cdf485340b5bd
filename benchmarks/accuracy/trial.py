"""One training of the comparison: a task, a seed, a row of the table, bits; returns what its JSON holds."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import POINTS, curve
from torch import nn

import kdlsq_fx as kq
from kdlsq_fx import data, job, metrics, opening, rows, squad_job
from kdlsq_fx.evaluation import evaluate, evaluate_tokens
from kdlsq_fx.family_tables import output_distance
from kdlsq_fx.squad_answers import texts_of
from kdlsq_fx.squad_metrics import per_question, squad_scores
from kdlsq_fx.train import fit


@dataclass(frozen=True, kw_only=True)
class Row:
    """A method: the quantizer's suffix in a preset's name, whether a teacher is there, whether labels join the loss.
    ``distil``: keywords of ``kq.distill`` where not all of the teacher counts, ``rates``: learning rates then."""

    title: str
    quantizer: str
    teacher: bool = False
    gold: bool = False
    trained: bool = True
    bits: tuple[int, ...] = (8, 4, 2)
    distil: dict[str, Any] = field(default_factory=dict)
    rates: tuple[float, ...] = ()

    def preset(self, bits: int) -> str:
        return f"W{bits}E{bits}A8{self.quantizer}"


ROWS = {
    "minmax": Row(title="min-max PTQ", quantizer="-minmax", trained=False),
    "q8bert": Row(title="Q8BERT", quantizer="-ema", gold=True),
    "lsq": Row(title="LSQ, no teacher", quantizer="-lsq", gold=True),
    "clip": Row(title="learned clip, no teacher", quantizer="", gold=True),
    "ternarybert": Row(title="TernaryBERT", quantizer="-twn", teacher=True, bits=(2,)),
    "kdlsq-lsq": Row(title="KDLSQ, LSQ step", quantizer="-lsq", teacher=True),
    "kdlsq": Row(title="KDLSQ, learned clip", quantizer="", teacher=True),
    "kdlsq-lsq-gold": Row(title="KDLSQ, LSQ step, gold", quantizer="-lsq", teacher=True, gold=True),
    "kdlsq-gold": Row(title="KDLSQ, learned clip, gold", quantizer="", teacher=True, gold=True),
}

# What of the teacher it is that helps; no rows of the comparison.
ABLATION = {
    "kdlsq-lsq-logits": Row(
        title="its logits alone",
        quantizer="-lsq",
        teacher=True,
        bits=(2,),
        distil={"hidden": 0.0, "attention": 0.0},
        rates=(2e-4, 4e-4),
    ),
    "kdlsq-lsq-layers": Row(
        title="its hidden states and attention alone",
        quantizer="-lsq",
        teacher=True,
        bits=(2,),
        distil={"logits": 0.0},
        rates=(4e-4,),
    ),
}


def row_of(name: str) -> Row:
    """A row by its name; our best recipe has the quantizer and the loss of ``kdlsq-lsq``."""
    return (ROWS | ABLATION)["kdlsq-lsq" if name == "best" else name]


# The fp32 models that every row starts from and learns from.
FP32: dict[str, dict[str, Any]] = {
    "sst2": {"epochs": 2, "lr": 5e-5, "batch_size": 64},
    "mrpc": {"epochs": 4, "lr": 1e-4, "batch_size": 32},
    "rte": {"epochs": 6, "lr": 5e-5, "batch_size": 32},
    "cola": {"epochs": 4, "lr": 5e-5, "batch_size": 32},
    "stsb": {"epochs": 4, "lr": 1e-4, "batch_size": 32},
    "qnli": {"epochs": 2, "lr": 5e-5, "batch_size": 32},
    "squad": {"epochs": 2, "lr": 5e-5, "batch_size": 32},
}
TASKS = tuple(FP32)
SPAN = 100.0  # weight of start and end among the teacher's terms: KDLSQ's release, against their mean over positions


def load(folder: Path, task: str, tokenizer: Any, device: str) -> data.Dataset:
    """Train and dev of a task, dev never trained on. QNLI's train is the derived one, which has its own file name."""
    if task == "squad":
        return squad_job.load(folder / task, tokenizer, device=device)
    if task != "qnli":
        return replace(data.load(folder / task, tokenizer), device=device)
    kind = data.GLUE["qnli"]
    files = ("train_derived.tsv.gz", "dev.tsv")
    train, dev = (data.encode(rows.read_file(folder / task / name), kind, tokenizer) for name in files)
    return data.Dataset(kind, train, dev, device)


def teacher_of(dataset: data.Dataset, tokenizer: Any, seed: int, out: Path) -> nn.Module:
    """The fine-tuned fp32 model of a task and seed, on the CPU; made once."""
    settings = job.Settings(seed=seed, warmup=0.1, clip=1.0, **FP32[dataset.task.name])
    source = opening.model_source("minilm")
    return job.fine_tune(source, dataset, tokenizer, out=out, settings=settings)


def train_row(
    dataset: data.Dataset, teacher: nn.Module, row: Row, bits: int, *, seed: int, steps: int, lr: float,
    batch_size: int, precision: str, out: Path, watch: bool = False,
) -> tuple[Any, dict[str, Any]]:  # fmt: skip
    """The qat student of a row (in eval mode, on the device) and its curves."""
    settings = job.Settings(batch_size=batch_size, seed=seed)
    qat = job.calibrated(teacher, dataset, row.preset(bits), settings)
    if not row.trained:
        return qat, {}
    for module in qat.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # the teacher has none, and its values are the target
    more = row.distil | ({"span": SPAN} if dataset.task.spans else {})
    loop = kq.distill(qat, teacher, gold=float(row.gold), **more) if row.teacher else qat
    loop.to(dataset.device)
    curves = Curves(qat, dataset, steps, watch)
    fit(
        loop, dataset.train, out_dir=out, steps=steps, lr=lr, batch_size=batch_size, seed=seed, precision=precision,
        groups=kq.param_groups(loop, lr=lr), save_seconds=1e9, on_step=curves, title=out.name,
    )  # fmt: skip
    return qat.eval(), curves.found(out)


class Curves:
    """Dev score, and the scales as ratios to their first values, at ``POINTS`` steps of a run."""

    def __init__(self, qat: Any, dataset: data.Dataset, steps: int, watch: bool) -> None:
        self.qat, self.dataset, self.watch = qat, dataset, watch
        self.at = {max(1, round(steps * k / POINTS)) for k in range(1, POINTS + 1)}
        self.scales = {n[:-4]: p for n, p in qat.named_parameters() if n.endswith(".raw")}
        self.first = {n: p.detach().clone() for n, p in self.scales.items()}
        self.steps: list[int] = []
        self.dev: list[float] = []
        self.ratios: dict[str, list[float]] = {n: [] for n in self.scales} if watch else {}

    def __call__(self, step: int, model: nn.Module) -> None:
        if step not in self.at or not self.watch:
            return
        self.steps.append(step)
        self.dev.append(round(score(self.qat, self.dataset)[0]["headline"], 2))
        for name, scale in self.scales.items():
            ratio = scale.detach() / self.first[name]
            self.ratios[name].append(round(float(ratio.mean()), 4))

    def found(self, run: Path) -> dict[str, Any]:
        watched = {"at": self.steps, "dev": self.dev, "scales": self.ratios} if self.watch else {}
        return {**curve(run), **watched}


def score(model: Any, dataset: data.Dataset) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
    """The task's metrics on all of dev, the predictions (of SQuAD each question's F1, 0 to 1), and the logits."""
    if dataset.task.spans:
        logits = evaluate_tokens(model, dataset.dev, batch_size=64)
        figures = per_question(texts_of(dataset.dev, logits), [q.answers for q in dataset.dev.squad.questions])
        return squad_scores(figures), figures[:, 1], logits
    logits = evaluate(model, dataset.dev, batch_size=128)
    guess = metrics.predictions(dataset.task, logits)
    assert dataset.dev.labels is not None
    return metrics.score(dataset.task, guess, dataset.dev.labels), guess, logits


def distance(dataset: data.Dataset, student: np.ndarray, teacher: np.ndarray) -> float:
    """How far the student's outputs are from the teacher's on dev: mean KL in nats of the classes, or of the positions
    of start and end; for a regression the root mean square."""
    a, b = (torch.from_numpy(x.astype(np.float64)) for x in (student, teacher))
    if dataset.task.regression:
        return float(output_distance(a, b).sqrt())
    if dataset.task.spans:
        rows = [slice(*pair) for pair in zip(dataset.dev.starts, dataset.dev.starts[1:])]
        return float(np.mean([output_distance(a[row].T, b[row].T) for row in rows]))
    return float(output_distance(a, b))
