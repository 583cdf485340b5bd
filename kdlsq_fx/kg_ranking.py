"""Link prediction: the rank of the true entity among all entities, by the logit of class 1 (KG-BERT, section 4.3).

For a triple (h, r, t) two questions are asked, (?, r, t) and (h, r, ?). Other known true answers are filtered out
(Bordes et al. 2013). Triples with the same question share its scores, and known answers that are nobody's target are
not scored at all: UMLS's dev needs 89,666 sequences in place of 176,040, for the same ranks.
A rank is the expected one where scores are equal: 1 + (number greater) + (number of others equal) / 2.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from kdlsq_fx.data import Encoded
from kdlsq_fx.errors import InputError
from kdlsq_fx.evaluation import Run, runner
from kdlsq_fx.kg_graph import HEAD, RELATION, TAIL, Facts
from kdlsq_fx.kg_progress import Progress, identity
from kdlsq_fx.kg_text import Texts
from kdlsq_fx.watching import Interrupted, Stop

CHUNK = 8192  # sequences that are sorted by length together; a chunk holds whole questions
TRUE = 1  # the class whose logit ranks


@dataclass(frozen=True)
class Question:
    """One missing entity. ``rows`` int64 [candidates, 3]: the triples to score. ``answers`` int64 [k]: where in them
    the true ones of this split stand; ``triples`` int64 [k]: the split's row of each. ``side``: HEAD or TAIL."""

    rows: np.ndarray
    answers: np.ndarray
    triples: np.ndarray
    side: int


@dataclass(frozen=True)
class Ranked:
    """``ranks`` float64 [triples, 2]: of the true head, of the true tail. ``seconds`` over all parts of the run."""

    ranks: np.ndarray
    seconds: float
    sequences: int


class Plan:
    """The questions of true triples int64 [n, 3]. ``facts``: every known true triple, these among them."""

    def __init__(self, triples: np.ndarray, facts: Facts) -> None:
        if not len(triples):
            raise InputError("no true triples to rank", do="give a split that holds triples with label 1")
        if not facts.hold(triples).all():
            raise InputError("a triple to rank is no known fact", do="give the facts of all splits")
        self.triples, self.facts = triples, facts
        known, asked = _by_question(facts.rows), _by_question(triples)
        self.known = {key: facts.rows[known[key], key[0]] for key in asked}
        self.asked = [(key, np.asarray(rows)) for key, rows in asked.items()]

    def __len__(self) -> int:
        return len(self.asked)

    def size(self, i: int) -> int:
        """Sequences of question ``i``."""
        key, rows = self.asked[i]
        return self.facts.entities - len(self.known[key]) + len(rows)

    def question(self, i: int) -> Question:
        key, which = self.asked[i]
        side = key[0]
        keep = np.ones(self.facts.entities, dtype=bool)
        keep[self.known[key]] = False
        answers = self.triples[which, side]
        keep[answers] = True
        rows = np.repeat(self.triples[which[:1]], keep.sum(), axis=0)
        rows[:, side] = np.flatnonzero(keep)
        return Question(rows, (np.cumsum(keep) - 1)[answers], which, side)

    def chunks(self, first: int = 0) -> list[range]:
        """Question numbers from ``first`` on, in groups of about ``CHUNK`` sequences, at least one each."""
        step = max(1, CHUNK // self.facts.entities)
        return [range(i, min(i + step, len(self))) for i in range(first, len(self), step)]


def _by_question(rows: np.ndarray) -> dict[tuple[int, int, int], list[int]]:
    """Row numbers by (missing side, relation, given entity)."""
    out: dict[tuple[int, int, int], list[int]] = {}
    for side in (HEAD, TAIL):
        for i, (relation, given) in enumerate(rows[:, [RELATION, HEAD + TAIL - side]].tolist()):
            out.setdefault((side, relation, given), []).append(i)
    return out


def ranks_of(scores: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Expected ranks float64 [k] of the answers int64 [k] among scores [candidates], each without the other answers."""
    true, others = scores[answers][:, None], np.delete(scores, answers)[None]
    return np.asarray(1 + (others > true).sum(axis=1) + (others == true).sum(axis=1) / 2, dtype=np.float64)


def rank(
    model: Any,
    plan: Plan,
    texts: Texts,
    *,
    batch_size: int = 256,
    state: Path | None = None,
    title: str = "rank",
    save_seconds: float = 30.0,
) -> Ranked:
    """The filtered rank of head and of tail of every triple of the plan.

    ``model``: whatever :func:`kdlsq_fx.evaluation.evaluate` runs, with two outputs. With ``state``, a file, ranks and
    scores are written down every ``save_seconds``, at an error, and at Ctrl-C or SIGTERM (:class:`Interrupted`); called
    again it scores only what is not there. When all is ranked the file holds all ranks.
    CheckpointError where the file is of another model, graph, plan or length. InputError for a model of another width
    and for scores that are NaN or infinite.
    """
    progress = Progress(state, len(plan.triples), identity(model, plan.triples, plan.facts, texts) if state else "")
    run, sizes, quiet = runner(model), [plan.size(i) for i in range(len(plan))], not sys.stderr.isatty()
    total, seen = sum(sizes), sum(sizes[: progress.question])
    bar = tqdm(total=total, initial=seen, desc=title, disable=quiet, unit="row", dynamic_ncols=True)
    try:
        with Stop() as stop, bar, progress.kept():
            for chunk in plan.chunks(progress.question):
                questions = [plan.question(i) for i in chunk]
                data = texts.triples(np.concatenate([q.rows for q in questions]))
                scores = progress.begin(len(data))
                for rows in data.sorted_batches(batch_size):
                    new = rows[np.isnan(scores[rows])]
                    if len(new):
                        scores[new] = score(run, data, new)
                    seen += len(rows)
                    bar.update(len(rows))
                    progress.save(older_than=save_seconds)
                    if stop.asked:
                        raise KeyboardInterrupt
                _take_ranks(questions, scores, progress.ranks)
                progress.end(chunk.stop)
    except KeyboardInterrupt:  # a second Ctrl-C comes in the middle of a batch
        kept = f"saved in {state}, run again to go on" if state else "nothing was kept"
        raise Interrupted(f"stopped at {seen} of {total} sequences; {kept}") from None
    return Ranked(progress.ranks, progress.seconds, total)


def score(run: Run, data: Encoded, rows: np.ndarray) -> np.ndarray:
    """The logit of class 1 of some rows: float32 [rows]. InputError for another width, NaN or infinity."""
    logits = run(data.batch(rows, labels=False))
    if logits.ndim != 2 or logits.shape[1] != 2:
        do = "rank with a model that `kdlsq-fx train --task kg-links` made"
        raise InputError(f"the model's output is {list(logits.shape)}, ranking needs two logits a row", do=do)
    if not np.isfinite(logits).all():
        do = "look at the model's outputs; training may have diverged"
        raise InputError("scores hold NaN or infinity", do=do)
    return np.asarray(logits[:, TRUE])


def _take_ranks(questions: list[Question], scores: np.ndarray, ranks: np.ndarray) -> None:
    """Ranks of the questions of a chunk, from its scores, into ``ranks`` [triples, (head, tail)]."""
    at = 0
    for question in questions:
        own = scores[at : at + len(question.rows)]
        ranks[question.triples, question.side // TAIL] = ranks_of(own, question.answers)
        at += len(question.rows)
