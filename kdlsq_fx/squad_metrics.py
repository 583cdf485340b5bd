"""SQuAD 1.1's exact match and F1 (Rajpurkar et al. 2016, as its official evaluation of version 1.1 computes them).

Both compare normalised texts: lower case, without ASCII punctuation, without the words a, an and the, single blanks.
A prediction gets the best figure over the answers that count as right; the mean over questions is the score.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

from kdlsq_fx.errors import InputError

FIGURES = ("EM", "F1")
HEADLINE = "F1"

ARTICLES = re.compile(r"\b(?:a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> str:
    """Lower case, then punctuation goes, then articles, then runs of blanks become one: in this order, so that
    ``"the-rapist"`` stays a word and ``"A. Smith"`` loses its A."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(NO_PUNCTUATION)).split())


def exact(predicted: str, answer: str) -> float:
    return float(normalized(predicted) == normalized(answer))


def f1(predicted: str, answer: str) -> float:
    """F1 of the two bags of words, 0 to 1; 0 where they share none, two empty ones among them."""
    ours, theirs = normalized(predicted).split(), normalized(answer).split()
    shared = (Counter(ours) & Counter(theirs)).total()
    return 2 * shared / (len(ours) + len(theirs)) if shared else 0.0


def per_question(predicted: Sequence[str], answers: Sequence[Sequence[str]]) -> np.ndarray:
    """EM and F1 of every question, best over its answers: float64 [questions, 2], 0 to 1."""
    if len(predicted) != len(answers) or not len(answers):
        do = "give one prediction, perhaps empty, for each question"
        raise InputError(f"{len(predicted)} predictions for {len(answers)} questions", do=do)
    best = [[max(of(guess, a) for a in right) for of in (exact, f1)] for guess, right in zip(predicted, answers)]
    return np.array(best, dtype=np.float64)


def squad_scores(figures: np.ndarray) -> dict[str, float]:
    """Means of :func:`per_question` in points, with their standard errors over questions: ``{"EM": 79.1, "EM_se": 0.5,
    "F1": 87.0, "F1_se": 0.4, "headline": 87.0, "headline_se": 0.4}``; F1 is the headline."""
    means, count = 100 * figures.mean(axis=0), len(figures)
    errors = 100 * figures.std(axis=0, ddof=1) / np.sqrt(count) if count > 1 else np.zeros(2)
    out = {}
    for name, mean, error in zip(FIGURES, means, errors):
        out[name], out[f"{name}_se"] = float(mean), float(error)
    return out | {"headline": out[HEADLINE], "headline_se": out[f"{HEADLINE}_se"]}
