"""Figures of ranks: mean rank, mean reciprocal rank, Hits@k, each with its standard error over triples.

MRR and Hits are in points, 0 to 100; MR is a rank, 1 at best. Ranks are expected ranks: a tie at the edge of the first
k counts in Hits@k where the expected rank is at most k.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kdlsq_fx.errors import InputError

FIGURES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "MR": lambda ranks: ranks,
    "MRR": lambda ranks: 100 / ranks,
    "Hits@1": lambda ranks: 100.0 * (ranks <= 1),
    "Hits@3": lambda ranks: 100.0 * (ranks <= 3),
    "Hits@10": lambda ranks: 100.0 * (ranks <= 10),
}


def rank_scores(ranks: np.ndarray, headline: str = "Hits@10") -> dict[str, float]:
    """All figures of ranks float64 [triples, sides] and their standard errors: ``{"MR": 2.1, "MR_se": 0.1, ...}``, and
    that of the name ``headline`` again as ``headline``. Both sides of a triple are one draw: their mean enters the
    error."""
    if not len(ranks) or not np.isfinite(ranks).all() or (ranks < 1).any():
        raise InputError("no ranks, or some that are no number of 1 or more", do="rank every triple first")
    out: dict[str, float] = {}
    for name, of in FIGURES.items():
        out[name], out[f"{name}_se"] = _mean(of(ranks).reshape(len(ranks), -1).mean(axis=1))
    return out | {"headline": out[headline], "headline_se": out[f"{headline}_se"]}


def rank_difference(a: np.ndarray, b: np.ndarray, name: str) -> tuple[float, float]:
    """A figure of ranks ``a`` less that of ``b``, of the same triples [triples, sides], and its paired error."""
    of = FIGURES[name]
    return _mean((of(a) - of(b)).reshape(len(a), -1).mean(axis=1))


def _mean(values: np.ndarray) -> tuple[float, float]:
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
    return float(values.mean()), float(error)


def relation_ranks(logits: np.ndarray, rows: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Filtered expected ranks float64 [n, 1] of the true relation of triples int64 [n, 3] among logits [n, relations].
    ``known`` bool [n, relations]: relations that are true between that head and that tail, the own one among them.
    InputError for NaN or infinity, which would rank first."""
    if not np.isfinite(logits).all():
        raise InputError("logits hold NaN or infinity", do="look at the model's outputs; training may have diverged")
    own = np.arange(len(rows)), rows[:, 1]
    others = ~known
    true = logits[own][:, None]
    ranks = 1 + (others & (logits > true)).sum(axis=1) + (others & (logits == true)).sum(axis=1) / 2
    return np.asarray(ranks, dtype=np.float64)[:, None]
