"""SQuAD 1.1 as files: articles, paragraphs, questions and the places of their answers, read from its JSON layout.

    {"data": [{"paragraphs": [{"context": ..., "qas": [{"id": ..., "question": ..., "answers": [{"text": ...,
      "answer_start": ...}, ...]}, ...]}, ...]}, ...]}

A folder holds ``train-v1.1.json`` and ``dev-v1.1.json``, or ``train.json`` and ``dev.json``, gzipped or not. Other keys
are not read, but for one: a question that says ``start_certain: false`` has a guessed place of its answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdlsq_fx.errors import InputError
from kdlsq_fx.rows import read_lines

NAMES = ("{}-v1.1.json", "{}-v1.1.json.gz", "{}.json", "{}.json.gz")
LAYOUT = 'SQuAD 1.1 is {"data": [{"paragraphs": [{"context": ..., "qas": [...]}]}]}'


@dataclass(frozen=True)
class Question:
    """``answers``: the texts that count as right. ``start``: where the first of them begins in the context, in
    characters, or None where that is not known for certain. ``paragraph``: the number of its context."""

    id: str
    text: str
    answers: tuple[str, ...]
    start: int | None
    paragraph: int


@dataclass(frozen=True)
class Squad:
    """One file: the paragraphs' texts, and the questions in the file's order."""

    contexts: tuple[str, ...]
    questions: tuple[Question, ...]


def read_squad(path: str | Path) -> Squad:
    """One JSON file, gzipped or not. InputError, with the place in the file, for a missing or wrong key, an answer that
    does not stand where it should, a question without answers (SQuAD 2.0's) or an id that stands twice."""
    text = "\n".join(read_lines(Path(path)))
    if not text.strip():
        raise InputError("the file is empty", where=str(path), do=LAYOUT)
    try:
        root = json.loads(text)
    except ValueError as e:
        raise InputError(f"no JSON ({e})", where=str(path), do=f"check that it is whole; {LAYOUT}") from e
    contexts: list[str] = []
    questions: dict[str, Question] = {}
    for article, where in _items(root, "data", str(path)):
        for paragraph, at in _items(article, "paragraphs", where):
            contexts.append(_text(paragraph, "context", at))
            for entry, place in _items(paragraph, "qas", at):
                made = _question(entry, place, contexts[-1], len(contexts) - 1)
                if made.id in questions:
                    raise InputError(f"the id {made.id!r} stands twice", where=place, do="give each question its own")
                questions[made.id] = made
    if not questions:
        raise InputError("no questions", where=str(path), do=LAYOUT)
    return Squad(tuple(contexts), tuple(questions.values()))


def find_file(folder: str | Path, split: str) -> Path:
    """The file of a split, ``train`` or ``dev``; InputError where there is none."""
    if not Path(folder).is_dir():
        raise InputError(
            "no such folder", where=str(folder), do="give the folder that holds SQuAD's train and dev JSON files"
        )
    names = [name.format(split) for name in NAMES]
    found = [Path(folder) / name for name in names if (Path(folder) / name).is_file()]
    if not found:
        raise InputError(f"no {split} file", where=str(folder), do=f"add one of {', '.join(names)}")
    return found[0]


def _question(entry: Any, where: str, context: str, paragraph: int) -> Question:
    answers = list(_items(entry, "answers", where))
    if not answers:
        do = "leave it out; SQuAD 2.0's questions without an answer are no part of 1.1"
        raise InputError("a question without an answer", where=where, do=do)
    texts = tuple(_text(answer, "text", at) for answer, at in answers)
    starts = [_start(answer, at, context, text) for (answer, at), text in zip(answers, texts)]
    certain = entry.get("start_certain") is not False
    return Question(_text(entry, "id", where), _text(entry, "question", where), texts, starts[0] if certain else None,
                    paragraph)  # fmt: skip


def _start(answer: dict[str, Any], where: str, context: str, text: str) -> int:
    start = _get(answer, "answer_start", where)
    if isinstance(start, bool) or not isinstance(start, int):
        raise InputError(f"answer_start is {start!r}", where=where, do="give a whole number, counted in characters")
    if start < 0 or context[start : start + len(text)] != text:
        there = context[max(start, 0) : max(start, 0) + len(text)]
        what = f"the answer {text!r} does not stand at character {start} of the context: {there!r} does"
        raise InputError(what, where=where, do="mend answer_start, or leave the question out")
    return start


def _items(parent: Any, key: str, where: str) -> Iterator[tuple[Any, str]]:
    """The objects of a list, each with its place."""
    found = _get(parent, key, where)
    if not isinstance(found, list):
        raise InputError(f"{key} is no list", where=where, do=LAYOUT)
    for number, item in enumerate(found):
        yield item, f"{where}: {key}[{number}]" if key == "data" else f"{where}.{key}[{number}]"


def _text(parent: Any, key: str, where: str) -> str:
    found = _get(parent, key, where)
    if not isinstance(found, str) or not found.strip():
        raise InputError(f"{key} is {found!r}", where=where, do="give a text")
    return found


def _get(parent: Any, key: str, where: str) -> Any:
    if not isinstance(parent, dict):
        raise InputError(f"a {type(parent).__name__} where an object should be", where=where, do=LAYOUT)
    if key not in parent:
        has = ", ".join(map(repr, parent)) or "nothing"
        raise InputError(f"no {key!r} (it has {has})", where=where, do=LAYOUT)
    return parent[key]
