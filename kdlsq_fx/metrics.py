"""GLUE's own metrics, each with its standard error.

A task scored by accuracy alone has the binomial standard error sqrt(p (1 - p) / n). All others (F1, Matthews, Pearson,
Spearman, and the tasks scored by two figures) have the bootstrap one: the standard deviation over ``RESAMPLES``
resamples of the rows, drawn with a fixed seed.
All figures are in points, 0 to 100 (correlations -100 to 100).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from kdlsq_fx.data import Task
from kdlsq_fx.errors import InputError

RESAMPLES = 1000
Metric = Callable[[np.ndarray, np.ndarray], float]


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    return float((predicted == labels).mean())


def f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """F1 of class 1, as GLUE reports it for MRPC and QQP; 0 where nothing is predicted or present."""
    right, wrong = ((predicted == 1) & (labels == 1)).sum(), ((predicted == 1) != (labels == 1)).sum()
    return float(2 * right / (2 * right + wrong)) if right else 0.0


def matthews(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Matthews correlation of any number of classes, -1 to 1; 0 where one side is constant.

    The correlation of the two one-hot matrices: cov(p, l) / sqrt(cov(p, p) cov(l, l)), scikit-learn's definition.
    """
    classes = int(max(predicted.max(), labels.max())) + 1
    table = np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes).astype(float)
    n, of_label, of_guess = table.sum(), table.sum(1), table.sum(0)
    both = (n**2 - of_guess @ of_guess) * (n**2 - of_label @ of_label)
    return float((n * np.trace(table) - of_guess @ of_label) / np.sqrt(both)) if both > 0 else 0.0


def pearson(predicted: np.ndarray, labels: np.ndarray) -> float:
    """0 where one side is constant."""
    from scipy.stats import pearsonr

    return _correlation(pearsonr, predicted, labels)


def spearman(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Ties get mean ranks; 0 where one side is constant."""
    from scipy.stats import spearmanr

    return _correlation(spearmanr, predicted, labels)


def _correlation(of: Any, predicted: np.ndarray, labels: np.ndarray) -> float:
    if np.ptp(predicted) == 0 or np.ptp(labels) == 0:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # near-constant input: the figure itself shows it
        return float(of(predicted.astype(np.float64), labels.astype(np.float64)).statistic)


# headline name -> the figures it is the mean of
HEADLINES: dict[str, dict[str, Metric]] = {
    "accuracy": {"accuracy": accuracy},
    "matthews": {"matthews": matthews},
    "accuracy_f1": {"accuracy": accuracy, "f1": f1},
    "pearson_spearman": {"pearson": pearson, "spearman": spearman},
}


def predictions(task: Task, logits: np.ndarray) -> np.ndarray:
    """Logits [rows, outputs] to classes int64 [rows], or to scores float [rows] for regression. InputError for a model
    of another task."""
    check_width(task, logits)
    return logits.reshape(len(logits), -1)[:, 0] if task.regression else logits.argmax(-1)


def check_width(task: Task, logits: np.ndarray) -> None:
    """InputError for logits [rows, outputs] of a model of another task."""
    width = logits.reshape(len(logits), -1).shape[1]
    if width != task.outputs:
        do = "evaluate a model on the task it was trained for"
        raise InputError(f"the model has {width} outputs, {task.name} needs {task.outputs}", do=do)


def score(task: Task, predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """All figures of the task and their standard errors: ``{"accuracy": 91.2, "accuracy_se": 1.4, ..., "headline":
    ..., "headline_se": ...}``. The headline is the mean of the task's figures (MRPC, QQP: accuracy and F1; STS-B:
    Pearson and Spearman; CoLA: Matthews; else accuracy)."""
    _check(predicted, labels)
    parts = HEADLINES[task.metric]
    values = np.array([of(predicted, labels) for of in parts.values()])
    if list(parts) == ["accuracy"]:
        errors = np.sqrt(values * (1 - values) / len(labels))
        whole = errors[0]
    else:
        draws = bootstrap(list(parts.values()), predicted, labels)
        errors, whole = draws.std(axis=1, ddof=1), draws.mean(axis=0).std(ddof=1)
    out: dict[str, float] = {}
    for name, value, error in (*zip(parts, values, errors), ("headline", values.mean(), whole)):
        out[name], out[f"{name}_se"] = 100 * float(value), 100 * float(error)
    return out


def headline(task: Task) -> Metric:
    parts = list(HEADLINES[task.metric].values())
    return lambda predicted, labels: float(np.mean([of(predicted, labels) for of in parts]))


def difference(task: Task, a: np.ndarray, b: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Headline of ``a`` less headline of ``b`` on the same rows, in points, and its standard error by a paired
    bootstrap: smaller than the errors of the two figures, because both models see the same rows."""
    _check(a, labels)
    _check(b, labels)
    of = headline(task)
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(RESAMPLES):
        rows = rng.integers(0, len(labels), len(labels))
        draws.append(of(a[rows], labels[rows]) - of(b[rows], labels[rows]))
    return 100 * (of(a, labels) - of(b, labels)), 100 * float(np.std(draws, ddof=1))


def bootstrap(metrics: list[Metric], predicted: np.ndarray, labels: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Each metric on resampled rows: float64 [metrics, RESAMPLES]."""
    rng = np.random.default_rng(seed)
    draws = np.empty((len(metrics), RESAMPLES))
    for k in range(RESAMPLES):
        rows = rng.integers(0, len(labels), len(labels))
        draws[:, k] = [of(predicted[rows], labels[rows]) for of in metrics]
    return draws


def _check(predicted: np.ndarray, labels: np.ndarray) -> None:
    if len(predicted) != len(labels) or not len(labels):
        do = "score one prediction per row"
        raise InputError(f"{len(predicted)} predictions for {len(labels)} labels", do=do)
    if not np.isfinite(np.asarray(predicted, dtype=np.float64)).all():
        raise InputError(
            "predictions hold NaN or infinity", do="look at the model's outputs; training may have diverged"
        )
