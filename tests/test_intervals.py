"""The bootstrap of benchmarks/accuracy: rows that stand several times, pairs, seeds, what is called a tie."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdlsq_fx import data, metrics

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "benchmarks" / part) for part in ("", "accuracy")]

import intervals  # noqa: E402
import report  # noqa: E402

TASKS = ("rte", "mrpc", "cola", "stsb")
Array = np.ndarray[Any, Any]


def guesses(task: str, rows: int, seed: int) -> tuple[Array, Array]:
    """Labels, and predictions that are right two times of three; STS-B's with ties."""
    rng = np.random.default_rng(seed)
    if task == "stsb":
        labels = rng.integers(0, 11, rows) / 2
        return labels, np.round(labels + rng.normal(0, 1.5, rows), 1)
    labels = rng.integers(0, 2, rows)
    return labels, np.where(rng.random(rows) < 0.67, labels, 1 - labels)


@pytest.mark.parametrize("task", TASKS)
def test_counted_rows_score_as_rows_that_are_repeated(task: str) -> None:
    labels, guess = guesses(task, 40, seed=1)
    rng = np.random.default_rng(2)
    counts = rng.multinomial(40, np.full(40, 1 / 40), size=25).astype(float)
    of = metrics.headline(data.GLUE[task])
    spread = [np.repeat(np.arange(40), c.astype(int)) for c in counts]
    want = [of(guess[rows], labels[rows]) for rows in spread]
    np.testing.assert_allclose(intervals.headlines(task, guess, labels, counts), want, atol=1e-12)
    constant = np.full(40, 1.0 if task == "stsb" else 1)
    np.testing.assert_allclose(
        intervals.headlines(task, constant, labels, counts), [of(constant[r], labels[r]) for r in spread], atol=1e-12
    )


def runs(task: str, scores: dict[tuple[str, int], float], rows: int = 300) -> tuple[dict[Any, Any], Array]:
    """Runs that are right on a share of the rows, (row, seed) -> share; the same rows first."""
    labels = np.arange(rows) % 2
    order = np.random.default_rng(0).permutation(rows)
    found = {}
    for (row, seed), share in scores.items():
        guess = labels.copy()
        guess[order[round(share * rows) :]] ^= 1
        found[task, row, 2, seed] = {"predictions": guess.tolist()}
    return found, labels


def test_a_difference_is_paired() -> None:
    """Two models that differ on 15 of 300 rows: an interval of the 15, not of two models of their own."""
    found, labels = runs("rte", {("a", 42): 0.80, ("b", 42): 0.75})
    point, low, high = intervals.Resamples(found, {"rte": labels}).difference(("a", 2), ("b", 2), {"rte": [42]})
    assert point == pytest.approx(5.0)
    assert high - low == pytest.approx(2 * 1.96 * 100 * (0.05 * 0.95 / 300) ** 0.5, rel=0.06)
    same = intervals.Resamples(found, {"rte": labels}).difference(("a", 2), ("a", 2), {"rte": [42]})
    assert same == (0.0, 0.0, 0.0)


def test_seeds_are_drawn_too_and_tasks_apart() -> None:
    shares = {("a", 42): 0.9, ("a", 43): 0.7, ("b", 42): 0.8, ("b", 43): 0.8}
    found, labels = runs("rte", shares)
    both = intervals.Resamples(found, {"rte": labels}).difference(("a", 2), ("b", 2), {"rte": [42, 43]})
    assert both[0] == pytest.approx(0.0) and both[1] < -9 and both[2] > 9  # both draws of one seed: a quarter each
    more, _ = runs("sst2", shares)
    drawn = intervals.Resamples({**found, **more}, {"rte": labels, "sst2": labels})
    two = drawn.difference(("a", 2), ("b", 2), {"rte": [42], "sst2": [42]})
    one = drawn.difference(("a", 2), ("b", 2), {"rte": [42]})
    assert two[0] == pytest.approx(one[0]) and (two[2] - two[1]) == pytest.approx((one[2] - one[1]) / 2**0.5, rel=0.06)


def test_what_holds_zero_is_a_tie_and_few_seeds_are_named() -> None:
    few, many = {"rte": [42], "sst2": [42, 43]}, {"rte": [42, 43, 44]}
    assert report._verdict((1.0, -0.01, 2.0), few) == "+1.00 [-0.01, +2.00] (tie)"
    assert report._verdict((1.0, 0.1, 2.0), few) == "+1.00 [+0.10, +2.00] (better on 1 seed)"
    assert report._verdict((-1.0, -2.0, -0.1), {"rte": [42, 43]}).endswith("(worse on 2 seeds)")
    assert report._verdict((1.0, 0.1, 2.0), many).endswith("(better)")


def test_the_levels_of_a_weight() -> None:
    found = {name: report._levels(name, 2) for name in ("lsq", "kdlsq", "ternarybert", "minmax", "q8bert", "best")}
    assert found == {"lsq": "4", "kdlsq": "3", "ternarybert": "3", "minmax": "3", "q8bert": "3", "best": "4"}
