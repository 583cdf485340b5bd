"""Labelled text as files: TSV or JSONL in GLUE's layout, or a ``datasets`` name.

A data set is a folder with ``train.tsv[.gz]`` (or ``.jsonl[.gz]``) and ``dev.tsv[.gz]``. TSV: one header line, tab
separated, no quoting. Columns: ``sentence[, sentence2]`` (or others of ``TEXT_COLUMNS``), ``label`` or ``score`` (or
others of ``TARGETS``). The files of all GLUE tasks are read as they are published: MNLI's dev is ``dev_matched``,
CoLA's files have no header.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdlsq_fx.errors import InputError

TEXT_COLUMNS = (
    ("sentence", "sentence2"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("premise", "hypothesis"),
    ("#1 String", "#2 String"),
    ("sentence",),
    ("text",),
)
TARGETS = ("score", "gold_label", "label", "is_duplicate", "Quality")  # MNLI's dev has label1, ... besides
COLA = ("source", "label", "original", "sentence")
HUB_DEV = ("validation", "validation_matched")  # the latter is MNLI's


@dataclass(frozen=True)
class Rows:
    """Text of one split: ``first``, ``second`` (None for single sentences), raw ``target`` strings, and where each
    row stands (for errors)."""

    first: list[str]
    second: list[str] | None
    target: list[str]
    column: str
    source: str
    lines: list[int]

    def __len__(self) -> int:
        return len(self.first)


def read(source: str | Path) -> tuple[Rows, Rows, str]:
    """Train rows, dev rows and the data set's name, as text."""
    folder = Path(source)
    if folder.is_dir():
        return read_file(find_split(folder, "train")), read_file(find_split(folder, "dev")), folder.resolve().name
    if folder.is_file():
        raise InputError("a file, not a folder", where=str(source), do=f"give its folder: {folder.parent}")
    if folder.is_absolute() or folder.suffix or str(source).startswith("."):
        raise InputError("no such data folder", where=str(source), do="give a folder holding train.tsv and dev.tsv")
    return read_hub(str(source))


def find_split(folder: Path, split: str) -> Path:
    """``<split>.tsv[.gz]`` or ``<split>.jsonl[.gz]`` in the folder."""
    stems = (split, "dev_matched") if split == "dev" else (split,)
    names = [stem + end for stem in stems for end in (".tsv", ".tsv.gz", ".jsonl", ".jsonl.gz")]
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found:
        do = f"add one of {', '.join(names)}"
        if (folder / f"{split}.csv").is_file():
            do = f"write {split}.csv as {names[0]}: columns separated by tabs, nothing quoted"
        raise InputError(f"no {split} file", where=str(folder), do=do)
    return found[0]


def read_file(path: Path, *, labelled: bool = True) -> Rows:
    """One TSV or JSONL file, gzipped or not; nothing is quoted, a ``"`` is a plain character. Where it is not
    ``labelled`` only the text columns are read, and every target is empty."""
    lines = read_lines(path)
    rows = parse_json(lines, path) if ".jsonl" in path.suffixes else parse_tsv(lines, path)
    return to_rows(rows, str(path), labelled=labelled)


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file, gzipped or not; InputError where it cannot be read."""
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as e:
        raise InputError(f"cannot be read ({e})", where=str(path), do="check that it is whole, and UTF-8 text") from e
    return [line.rstrip("\r") for line in text.split("\n")]  # not splitlines: a form feed is a plain character


def parse_tsv(lines: list[str], path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    header = lines[0].split("\t") if lines else []
    bare = len(header) == len(COLA) and header[1] in ("0", "1") and header[2] in ("", "*")
    if bare:
        header = list(COLA)
    for number, line in enumerate(lines if bare else lines[1:], 1 if bare else 2):
        if not line:
            continue
        cells = line.split("\t")
        if len(cells) != len(header):
            what = f"{len(cells)} cells where the header has {len(header)}"
            raise InputError(what, where=f"{path}:{number}", do="separate columns by one tab; no tabs inside a text")
        yield number, dict(zip(header, cells))


def parse_json(lines: list[str], path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as e:
            raise InputError(f"no JSON ({e})", where=f"{path}:{number}", do="write one object a line") from e
        if not isinstance(row, dict):
            raise InputError("no JSON object", where=f"{path}:{number}", do='write {"sentence": ..., "label": ...}')
        yield number, row


def to_rows(numbered: Iterator[tuple[int, dict[str, Any]]], source: str, *, labelled: bool = True) -> Rows:
    """Pick the text columns, and the target column where rows are ``labelled``; every row must have them."""
    found = list(numbered)
    if not found:
        raise InputError("no rows", where=source, do="a header line and at least one row are needed")
    keys = found[0][1].keys()
    columns = next((c for c in TEXT_COLUMNS if all(k in keys for k in c)), None)
    target = next((c for c in TARGETS if c in keys), None) if labelled else ""
    if columns is None or target is None:
        do = "name the columns sentence[, sentence2]" + (" and label (classes) or score (a number)" if labelled else "")
        if len(keys) == 1 and "," in next(iter(keys)):
            do = "separate the columns by tabs, not by commas"
        raise InputError(f"columns are {', '.join(map(repr, keys))}", where=source, do=do)
    for number, row in found:
        bad = [c for c in columns if not isinstance(row.get(c), str) or not row[c].strip()]
        if bad or (target and (row.get(target) is None or not str(row[target]).strip())):
            raise InputError(
                f"no {bad[0] if bad else target}", where=f"{source}:{number}", do="fill it or drop the row"
            )
    texts = [[row[c] for _, row in found] for c in columns]
    targets = [str(row[target]).strip() if target else "" for _, row in found]
    return Rows(texts[0], texts[1] if len(texts) > 1 else None, targets, target, source, [n for n, _ in found])


def read_hub(name: str) -> tuple[Rows, Rows, str]:
    """Train and validation split of a `datasets` name: ``imdb``, ``owner/set``, or with a configuration behind it
    (``glue/sst2``, ``owner/set/configuration``)."""
    do = "give a folder with train.tsv and dev.tsv, or install `datasets` on a machine that reaches the hub"
    try:
        import datasets
    except ImportError as e:
        raise InputError("neither a folder nor readable by `datasets` (not installed)", where=name, do=do) from e
    parts = name.split("/")
    whole = 1 if parts[0] == "glue" else 2  # of the parts: the set's own name
    try:
        sets = datasets.load_dataset("/".join(parts[:whole]), *parts[whole:])
    except Exception as e:  # the library raises many kinds for "not found" and "no network"
        raise InputError(f"`datasets` cannot load it ({type(e).__name__}: {e})", where=name, do=do) from e
    held = next((split for split in HUB_DEV if split in sets), "")
    if "train" not in sets or not held:
        do = "write the rows to train on as train.tsv and the rows to measure on as dev.tsv, and give their folder"
        raise InputError(f"its splits are {', '.join(sets)}; train and validation are needed", where=name, do=do)
    train, dev = ([(i, _scored(dict(row))) for i, row in enumerate(sets[split], 1)] for split in ("train", held))
    return to_rows(iter(train), f"{name}:train"), to_rows(iter(dev), f"{name}:{held}"), parts[-1]


def _scored(row: dict[str, Any]) -> dict[str, Any]:
    """A float label is a score."""
    return {**row, "score": row["label"]} if isinstance(row.get("label"), float) else row
