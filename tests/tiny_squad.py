"""SQuAD's layout with made-up texts: the answer is the one good word of the context, or it and a "very" before it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tiny_glue import GOOD

NEUTRAL = ["film", "story", "actor", "plot", "and", "the", "a", "was"]


def squad(questions: int, seed: int = 0) -> dict[str, Any]:
    """A file's JSON: paragraphs of two questions each, some contexts too long for 24 tokens."""
    rng = random.Random(seed)
    paragraphs = []
    for number in range(questions // 2):
        words = rng.choices(NEUTRAL, k=rng.randrange(4, 34))
        answer = rng.choice(GOOD) if rng.random() < 0.7 else f"very {rng.choice(GOOD)}"
        at = rng.randrange(len(words) + 1)
        start = len(" ".join(words[:at])) + (at > 0)
        context = " ".join([*words[:at], answer, *words[at:]])
        right = [{"text": answer, "answer_start": start}]
        asked = [
            {"id": f"{seed}-{number}-{k}", "question": "what " * k + "was the film", "answers": right} for k in (0, 1)
        ]
        paragraphs.append({"context": context, "qas": asked})
    return {"version": "1.1", "data": [{"title": "films", "paragraphs": paragraphs}]}


def write_squad(folder: Path, *, train: int = 96, dev: int = 24) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (split, count) in enumerate((("train", train), ("dev", dev))):
        (folder / f"{split}-v1.1.json").write_text(json.dumps(squad(count, seed)), encoding="utf-8")
    return folder
