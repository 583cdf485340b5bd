"""From start and end logits to answers: the best spans over all windows of a question."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from kdlsq_fx.errors import InputError
from kdlsq_fx.squad_windows import Place, Windows

BEST, LONGEST = 20, 30  # spans kept of a question, tokens of an answer: BERT's and KDLSQ's scripts


@dataclass(frozen=True)
class Answer:
    """A part of the context, ``start`` its first character. ``score``: start logit + end logit; ``probability``: the
    softmax of the scores over the spans that were kept."""

    text: str
    start: int
    score: float
    probability: float


def best_answers(
    windows: Windows, logits: np.ndarray, *, best: int = BEST, longest: int = LONGEST
) -> dict[int, list[Answer]]:
    """For each question's number its ``best`` spans over all its windows, the most likely first.

    ``logits``: float [tokens of all windows, 2], start and end, ragged as ``windows`` is. A span lies in the context,
    ends where it starts or later, and has at most ``longest`` tokens. All such spans compete, not only those of the
    largest start and end logits. A span that two windows hold counts once, with the higher score; of equal scores the
    earlier, then the shorter span comes first. InputError for logits of other rows, or that are no numbers.
    """
    if logits.shape != (windows.starts[-1], 2):
        what = f"logits of shape {logits.shape} for windows of {windows.starts[-1]} tokens"
        raise InputError(what, do="give start and end logits of every token of these windows")
    if not np.isfinite(logits).all():
        do = "look at the model's outputs; training may have diverged"
        raise InputError("logits hold NaN or infinity", do=do)
    found: dict[int, dict[tuple[int, int], float]] = defaultdict(dict)
    for place, at in zip(windows.places, windows.starts):
        own = logits[at + place.begin : at + place.begin + place.count]
        characters = windows.contexts.offsets[_tokens(windows, place)]
        spans = found[place.question]
        for first, last, score in _spans(own[:, 0], own[:, 1], best, longest):
            key = int(characters[first, 0]), int(characters[last, 1])
            spans[key] = max(score, spans.get(key, score))
    return {number: _answers(windows, number, spans, best) for number, spans in found.items()}


def texts_of(windows: Windows, logits: np.ndarray, *, longest: int = LONGEST) -> list[str]:
    """The best answer of every question, in the file's order; empty where a question has no window."""
    found = best_answers(windows, logits, best=1, longest=longest)
    return [found[i][0].text if i in found else "" for i in range(len(windows.squad.questions))]


def _tokens(windows: Windows, place: Place) -> slice:
    """The window's tokens among those of the contexts."""
    at = int(windows.contexts.starts[windows.squad.questions[place.question].paragraph]) + place.first
    return slice(at, at + place.count)


def _spans(start: np.ndarray, end: np.ndarray, best: int, longest: int) -> list[tuple[int, int, float]]:
    """The best spans of one window: first token, last token, score."""
    width = min(longest, len(start))
    ends = np.concatenate([end.astype(np.float64), np.full(width - 1, -np.inf)])
    scores = start[:, None].astype(np.float64) + np.lib.stride_tricks.sliding_window_view(ends, width)
    flat = scores.ravel()  # [first token, further tokens]
    if best == 1:
        order = np.array([flat.argmax()])
    else:
        kept = np.flatnonzero(flat >= np.partition(flat, -best)[-best]) if len(flat) > best else np.arange(len(flat))
        order = kept[np.argsort(-flat[kept], kind="stable")][:best]
    return [(i // width, i // width + i % width, float(flat[i])) for i in order.tolist() if np.isfinite(flat[i])]


def _answers(windows: Windows, number: int, spans: dict[tuple[int, int], float], best: int) -> list[Answer]:
    context = windows.squad.contexts[windows.squad.questions[number].paragraph]
    kept = sorted(spans.items(), key=lambda item: (-item[1], item[0]))[:best]
    weights = np.exp(np.array([score for _, score in kept]) - kept[0][1])
    shares = (weights / weights.sum()).tolist()
    return [Answer(context[a:b], a, score, share) for ((a, b), score), share in zip(kept, shares)]
