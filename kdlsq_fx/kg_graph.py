"""Knowledge graphs as folders in KG-BERT's layout: triples of names, and a text for every name.

    train.tsv dev.tsv [test.tsv]            head, relation, tail[, label]; label 1, and 0 or -1 for false triples
    entity2text.tsv [entity2textlong.tsv]   entity, text
    relation2text.tsv                       relation, text
    [entities.txt relations.txt]            the names that count, where the texts have more

Tab separated, nothing quoted, ``.tsv`` or ``.txt``, gzipped or not; a header line (``head relation tail[ label]``,
``entity text``, ``relation text``) may stand in front.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kdlsq_fx.errors import InputError
from kdlsq_fx.rows import read_lines

SPLITS = ("train", "dev", "test")
HEAD, RELATION, TAIL = 0, 1, 2
LABELS = {"1": 1, "0": 0, "-1": 0}


@dataclass(frozen=True)
class Triples:
    """``rows`` int64 [n, 3]: numbers of head, relation, tail. ``labels`` int64 [n]: 1 true, 0 false."""

    rows: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def true(self) -> np.ndarray:
        """The rows with label 1: int64 [m, 3]."""
        return self.rows[self.labels == 1]


class Facts:
    """A set of true triples of a graph with ``entities`` entities and ``relations`` relations."""

    def __init__(self, rows: np.ndarray, entities: int, relations: int) -> None:
        self.entities, self.relations = entities, relations
        self.rows = np.unique(rows.reshape(-1, 3), axis=0)
        self.keys = np.sort(self._key(self.rows))

    def _key(self, rows: np.ndarray) -> np.ndarray:
        return (rows[..., HEAD] * self.relations + rows[..., RELATION]) * self.entities + rows[..., TAIL]

    def hold(self, rows: np.ndarray) -> np.ndarray:
        """Which of the triples int64 [..., 3] are in the set: bool [...]."""
        keys = self._key(rows)
        if not len(self.keys):
            return np.zeros(keys.shape, dtype=bool)
        return self.keys[np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)] == keys


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A knowledge graph. Triples hold positions in ``entities`` and ``relations``; the texts stand in the same order.
    ``notes`` tell what was left out in reading."""

    name: str
    entities: tuple[str, ...]
    relations: tuple[str, ...]
    entity_texts: tuple[str, ...]
    relation_texts: tuple[str, ...]
    splits: dict[str, Triples]
    notes: tuple[str, ...] = ()

    def facts(self, *splits: str) -> Facts:
        """The true triples of these splits (those that the graph has), of all of them where none is named."""
        found = [self.splits[s].true for s in splits or SPLITS if s in self.splits]
        return Facts(np.concatenate(found), len(self.entities), len(self.relations))

    @property
    def fingerprint(self) -> str:
        """Hash of names, texts and triples."""
        digest = hashlib.sha256()
        for names in (self.entities, self.relations, self.entity_texts, self.relation_texts):
            digest.update("\n".join(names).encode() + b"\0")
        for split, triples in self.splits.items():
            digest.update(split.encode() + triples.rows.tobytes() + triples.labels.tobytes())
        return digest.hexdigest()[:16]


def read_graph(source: str | Path, *, long_texts: bool = False) -> Graph:
    """The graph in a folder. ``long_texts``: ``entity2textlong`` (descriptions) in place of ``entity2text``.

    A triple that stands twice in a split with the same label is kept once, which ``notes`` says. Raises
    :class:`InputError`, with file and line, for files that are absent or empty, another number of columns, names
    without a text, names with two texts, labels other than 1, 0, -1, false triples in train, and a triple that is both.
    """
    folder = Path(source)
    if not folder.is_dir():
        raise InputError("no such folder", where=str(source), do="give a folder with train.tsv, dev.tsv and texts")
    entities = _texts(folder, "entity", "entity2textlong" if long_texts else "entity2text", only="entities")
    relations = _texts(folder, "relation", "relation2text", only="relations")
    numbers = ({n: i for i, n in enumerate(entities)}, {n: i for i, n in enumerate(relations)})
    splits, notes = {}, []
    for split in SPLITS:
        path = _find(folder, split, needed=split != "test")
        if path is None:
            continue
        splits[split], twice = _triples(path, *numbers)
        if twice:
            notes.append(f"{path.name}: {twice} triples stood there more than once and are kept once")
    if not splits["train"].labels.all():
        do = "drop them: training draws its own false triples"
        raise InputError("train holds false triples", where=str(_find(folder, "train")), do=do)
    return Graph(
        name=folder.resolve().name, entities=tuple(entities), relations=tuple(relations),
        entity_texts=tuple(entities.values()), relation_texts=tuple(relations.values()),
        splits=splits, notes=tuple(notes),
    )  # fmt: skip


def _find(folder: Path, name: str, *, needed: bool = True) -> Path | None:
    paths = [folder / f"{name}{end}" for end in (".tsv", ".tsv.gz", ".txt", ".txt.gz")]
    found = next((p for p in paths if p.is_file()), None)
    if found is None and needed:
        raise InputError(f"no {name} file", where=str(folder), do=f"add one of {', '.join(p.name for p in paths)}")
    return found


def _cells(path: Path, header: Sequence[str], widths: tuple[int, ...]) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of every line that is neither blank nor the header."""
    any_row = False
    for number, line in enumerate(read_lines(path), 1):
        cells = [c.strip() for c in line.split("\t")]
        if not line.strip() or (number == 1 and cells == list(header[: len(cells)]) and len(cells) > 1):
            continue
        if len(cells) not in widths:
            do = f"write {', '.join(header)}, separated by one tab each"
            raise InputError(f"{len(cells)} cells", where=f"{path}:{number}", do=do)
        if not all(cells):
            raise InputError("an empty cell", where=f"{path}:{number}", do="fill it or drop the line")
        any_row = True
        yield number, cells
    if not any_row:
        raise InputError("no rows", where=str(path), do=f"write lines of {', '.join(header)}")


def _texts(folder: Path, kind: str, name: str, *, only: str) -> dict[str, str]:
    """Text by name, in the file's order; the names of ``<only>.txt`` alone where there is such a file."""
    path = _find(folder, name)
    assert path is not None
    out: dict[str, str] = {}
    for number, (key, text) in _cells(path, (kind, "text"), (2,)):
        if out.setdefault(key, text) != text:
            raise InputError(f"a second text of {key!r}", where=f"{path}:{number}", do="keep one of them")
    listed = _find(folder, only, needed=False)
    if listed is None:
        return out
    kept = [cells[0] for _, cells in _cells(listed, (kind,), (1,))]
    missing = [key for key in kept if key not in out]
    if missing:
        what = f"{len(missing)} of {listed.name} have no text, {missing[0]!r} for one"
        raise InputError(what, where=str(path), do=f"add a line `{missing[0]}<tab>its text`")
    return {key: out[key] for key in kept}


def _triples(path: Path, entities: dict[str, int], relations: dict[str, int]) -> tuple[Triples, int]:
    """The triples of a file, and how many lines repeat an earlier one."""
    found: dict[tuple[int, int, int], int] = {}
    lines = 0
    for number, cells in _cells(path, ("head", "relation", "tail", "label"), (3, 4)):
        where, lines = f"{path}:{number}", lines + 1
        for name, known, kind in zip(cells, (entities, relations, entities), ("entity", "relation", "entity")):
            if name not in known:
                listed = _find(path.parent, "entities" if kind == "entity" else "relations", needed=False)
                only = f" and to {listed.name}, which names those that count," if listed else ""
                do = f"add it with its text to {kind}2text{only} or drop the triple"
                raise InputError(f"unknown {kind} {name!r}", where=where, do=do)
        label = LABELS.get(cells[3] if len(cells) > 3 else "1")
        if label is None:
            raise InputError(f"bad label {cells[3]!r}", where=where, do="write 1 for true, 0 or -1 for false")
        key = (entities[cells[0]], relations[cells[1]], entities[cells[2]])
        if found.setdefault(key, label) != label:
            raise InputError("a triple that is both true and false", where=where, do="keep one of the two lines")
    rows = np.array(list(found), dtype=np.int64).reshape(-1, 3)
    return Triples(rows, np.array(list(found.values()), dtype=np.int64)), lines - len(found)
