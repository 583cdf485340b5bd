"""Paired bootstrap of a task's headline: resamples of dev's rows, the same for every run of the task, and of seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kdlsq_fx import data, metrics

DRAWS = 10_000  # an end of a 95 % interval then moves by 0.02 standard errors of a draw from one stream to another
Array = np.ndarray[Any, Any]
Run = tuple[str, str, int, int]  # task, row, bits, seed


class Resamples:
    """Headlines, in points, of runs on ``DRAWS`` resamples of dev. ``labels``: of each task; SQuAD's are not read: its
    predictions are the questions' F1."""

    def __init__(self, runs: Mapping[Run, Mapping[str, Any]], labels: Mapping[str, Array]) -> None:
        self.runs, self.labels = runs, labels
        self._counts: dict[str, Array] = {}
        self._drawn: dict[Run, Array] = {}

    def difference(
        self, a: tuple[str, int], b: tuple[str, int], seeds: Mapping[str, Sequence[int]]
    ) -> tuple[float, float, float]:
        """Score of ``a`` (row, bits) less that of ``b``, the mean over tasks of the mean over each task's ``seeds``,
        and the ends of its 95 % interval. Tasks draw rows and seeds independently of each other."""
        points, draws = [], []
        for task, own in seeds.items():
            gaps = np.array([self._of((task, *a, s)) - self._of((task, *b, s)) for s in own])  # [seeds, 1 + DRAWS]
            points.append(gaps[:, 0].mean())
            chosen = _stream("seeds", task).integers(len(own), size=(len(own), DRAWS))
            draws.append(np.take_along_axis(gaps[:, 1:], chosen, 0).mean(0))
        low, high = np.quantile(np.mean(draws, axis=0), (0.025, 0.975))
        return float(np.mean(points)), float(low), float(high)

    def _of(self, run: Run) -> Array:
        """The headline on dev itself, then on each resample: [1 + DRAWS]."""
        if run not in self._drawn:
            guess = np.array(self.runs[run]["predictions"])
            self._drawn[run] = 100 * headlines(run[0], guess, self.labels[run[0]], self._rows(run[0]))
        return self._drawn[run]

    def _rows(self, task: str) -> Array:
        """How often each row of dev stands in dev itself (once) and in each resample: [1 + DRAWS, rows]."""
        if task not in self._counts:
            n = len(self.labels[task])
            drawn = _stream("rows", task).multinomial(n, np.full(n, 1 / n), size=DRAWS)
            self._counts[task] = np.concatenate([np.ones((1, n)), drawn])
        return self._counts[task]


def headlines(task: str, guess: Array, labels: Array, counts: Array) -> Array:
    """The task's headline where row i stands ``counts[:, i]`` times, 0 to 1: what :func:`kdlsq_fx.metrics.headline`
    says of the rows repeated so often."""
    if task == "squad":
        return np.asarray(counts @ guess / counts.sum(1))
    parts = metrics.HEADLINES[data.GLUE[task].metric]
    return np.asarray(np.mean([COUNTED[name](counts, guess, labels) for name in parts], axis=0))


def _accuracy(counts: Array, guess: Array, labels: Array) -> Array:
    return np.asarray(counts @ (guess == labels) / counts.sum(1))


def _f1(counts: Array, guess: Array, labels: Array) -> Array:
    right = counts @ ((guess == 1) & (labels == 1))
    wrong = counts @ ((guess == 1) != (labels == 1))
    return np.asarray(np.where(right > 0, 2 * right / np.maximum(2 * right + wrong, 1), 0.0))


def _correlation(counts: Array, x: Array, y: Array) -> Array:
    """Pearson's, of values [rows] or [draws, rows]; 0 where one side is constant."""
    n = counts.sum(1, keepdims=True)
    x, y = (v - (counts * v).sum(1, keepdims=True) / n for v in (x, y))
    both, of_x, of_y = ((counts * a * b).sum(1) for a, b in ((x, y), (x, x), (y, y)))
    return np.asarray(np.where((of_x > 1e-12) & (of_y > 1e-12), both / np.sqrt(np.maximum(of_x * of_y, 1e-30)), 0.0))


def _spearman(counts: Array, guess: Array, labels: Array) -> Array:
    return _correlation(counts, _ranks(counts, guess), _ranks(counts, labels))


def _ranks(counts: Array, values: Array) -> Array:
    """The mean rank of each row among the repeated ones: [draws, rows]."""
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    starts = np.cumsum(sizes) - sizes
    members = np.add.reduceat(counts[:, np.argsort(group, kind="stable")], starts, axis=1)
    return np.asarray((np.cumsum(members, axis=1) - members + (members + 1) / 2)[:, group])


COUNTED = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _correlation,  # of two classes it is Pearson's
    "pearson": _correlation,
    "spearman": _spearman,
}


def _stream(what: str, task: str) -> np.random.Generator:
    return np.random.default_rng([*what.encode(), *task.encode()])
