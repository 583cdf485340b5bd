"""Sentence and sentence-pair tasks: files in GLUE's layout, tokenized once, batched by length.

A folder named like a GLUE task (rows.py tells its layout) gets that task's metric and length; any other folder is read
by its columns: ``score`` is regression, ``label`` classification.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdlsq_fx.errors import InputError
from kdlsq_fx.rows import Rows, find_split, read, read_file
from kdlsq_fx.tap_plan import PREFIX

WINDOW = 50  # batches per length-sorting window: wide enough to waste almost no padding, narrow enough to stay random


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a data set asks for. ``labels`` are the class names (empty: regression); ``metric`` names the headline
    figure of metrics.py; ``max_length`` is in tokens, special ones included. ``spans``: the model marks the first and
    the last token of an answer, and ``labels`` are those two marks."""

    name: str
    metric: str
    max_length: int = 128
    labels: tuple[str, ...] = ("0", "1")
    spans: bool = False

    @property
    def regression(self) -> bool:
        return not self.labels

    @property
    def outputs(self) -> int:
        """Width of the model's head: one per class, 1 for regression, 2 for spans."""
        return max(len(self.labels), 1)


GLUE = {
    "sst2": Task(name="sst2", metric="accuracy", max_length=64),
    "cola": Task(name="cola", metric="matthews", max_length=64),
    "mrpc": Task(name="mrpc", metric="accuracy_f1"),
    "qqp": Task(name="qqp", metric="accuracy_f1"),
    "rte": Task(name="rte", metric="accuracy"),
    "qnli": Task(name="qnli", metric="accuracy"),
    "stsb": Task(name="stsb", metric="pearson_spearman", labels=()),
    "mnli": Task(name="mnli", metric="accuracy", labels=("0", "1", "2")),
    "wnli": Task(name="wnli", metric="accuracy"),
}
INFERENCE = ("entailment", "not_entailment")
WORDS = {"rte": INFERENCE, "qnli": INFERENCE, "mnli": ("entailment", "neutral", "contradiction")}  # classes 0, 1, 2


@dataclass(frozen=True)
class Encoded:
    """A tokenized split, ragged: row ``i`` is ``ids[starts[i]:starts[i+1]]``.

    ``ids``, ``types`` int32 [total tokens] (``types`` None where the tokenizer has none), ``starts`` int64 [rows + 1],
    ``labels`` int64 [rows] (classes) or float32 [rows] (scores), or None.
    """

    ids: np.ndarray
    types: np.ndarray | None
    starts: np.ndarray
    labels: np.ndarray | None
    pad_id: int = 0

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)

    @property
    def extent(self) -> tuple[int, int, int]:
        """(tokens of the longest row, largest id, padding's among them, largest token type)."""
        end = self.starts[-1]
        types = 0 if self.types is None else int(self.types[:end].max(initial=0))
        return int(self.lengths.max(initial=0)), int(self.ids[:end].max(initial=self.pad_id)), types

    def head(self, rows: int) -> Encoded:
        """The first ``rows`` rows; all of them where there are fewer."""
        rows = min(rows, len(self))
        labels = None if self.labels is None else self.labels[:rows]
        return replace(self, starts=self.starts[: rows + 1], labels=labels)

    def pick(self, rows: np.ndarray) -> Encoded:
        """These rows, in this order."""
        parts = [slice(self.starts[i], self.starts[i + 1]) for i in rows]
        starts = np.concatenate([[0], np.cumsum(self.lengths[rows])]).astype(np.int64)
        types = None if self.types is None else np.concatenate([self.types[p] for p in parts])
        labels = None if self.labels is None else self.labels[rows]
        return replace(
            self, ids=np.concatenate([self.ids[p] for p in parts]), types=types, starts=starts, labels=labels
        )

    def joined(self, other: Encoded) -> Encoded:
        """These rows, then those of ``other``, without labels: what a teacher alone can be learned from."""
        if (self.types is None) != (other.types is None) or self.pad_id != other.pad_id:
            raise InputError("rows of two tokenizers cannot be joined", do="encode both with one tokenizer")
        a, b = self.starts[-1], other.starts[-1]
        types = None
        if self.types is not None and other.types is not None:
            types = np.concatenate([self.types[:a], other.types[:b]])
        ids = np.concatenate([self.ids[:a], other.ids[:b]])
        return replace(
            self, ids=ids, types=types, starts=np.concatenate([self.starts, a + other.starts[1:]]), labels=None
        )

    def batch(
        self, rows: Sequence[int] | np.ndarray, *, labels: bool = True, part: slice = slice(None)
    ) -> dict[str, torch.Tensor]:
        """Rows as a batch padded to the longest of them: input_ids, attention_mask[, token_type_ids, labels],
        int64 [rows, length]; labels int64 or float32 [rows]. With ``part`` only those of the rows, as wide as the
        whole batch: then a row's tensors do not depend on how the batch is split over processes."""
        width = int(max(self.lengths[i] for i in rows))
        rows = rows[part]
        ids = np.full((len(rows), width), self.pad_id, dtype=np.int64)
        mask = np.zeros((len(rows), width), dtype=np.int64)
        types = np.zeros((len(rows), width), dtype=np.int64)
        for k, i in enumerate(rows):
            a, b = self.starts[i], self.starts[i + 1]
            ids[k, : b - a], mask[k, : b - a] = self.ids[a:b], 1
            if self.types is not None:
                types[k, : b - a] = self.types[a:b]
        out = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        if self.types is not None:
            out["token_type_ids"] = torch.from_numpy(types)
        if labels and self.labels is not None:
            out["labels"] = torch.from_numpy(self.labels[np.asarray(rows)])
        return out

    def order(self, *, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
        """Row numbers of each batch of one epoch; a function of (seed, epoch) alone, so a resumed run sees the same.

        Shuffled, sorted by length inside windows of ``WINDOW`` batches, cut, and the batches shuffled again. The last
        batch may be short; no row is dropped.
        """
        rng = np.random.default_rng([seed, epoch])
        rows = rng.permutation(len(self))
        batches: list[np.ndarray] = []
        for at in range(0, len(rows), WINDOW * batch_size):
            window = rows[at : at + WINDOW * batch_size]
            window = window[np.argsort(self.lengths[window], kind="stable")]
            batches += [window[k : k + batch_size] for k in range(0, len(window), batch_size)]
        return [batches[i] for i in rng.permutation(len(batches))]

    def sorted_batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """Row numbers by length, for evaluation: least padding, every row once."""
        rows = np.argsort(self.lengths, kind="stable")
        for at in range(0, len(rows), batch_size):
            yield rows[at : at + batch_size]

    def sample(self, batches: int, *, batch_size: int, seed: int) -> list[dict[str, torch.Tensor]]:
        """A few random batches without labels, for calibration."""
        order = self.order(batch_size=batch_size, seed=seed, epoch=-1 & 0xFFFF)
        return [self.batch(rows, labels=False) for rows in order[:batches]]

    @property
    def fingerprint(self) -> str:
        """Hash of tokens and labels: two runs with the same one saw the same data."""
        digest = hashlib.sha256()
        for array in (self.ids[: self.starts[-1]], self.starts, self.types, self.labels):
            if array is not None:
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Paired(Encoded):
    """The same rows as two tokenizers read them: what a student and a teacher of another tokenizer train on.

    A batch holds the student's fields, and the teacher's as ``teacher_input_ids``, ``teacher_attention_mask`` (and
    ``teacher_token_type_ids``), int64 [rows, the teacher's length]. Order and lengths are the student's.
    """

    teacher: Encoded | None = None

    @classmethod
    def of(cls, student: Encoded, teacher: Encoded) -> Paired:
        """Both readings of the same rows; InputError where they are not."""
        a, b = student.labels, teacher.labels
        same = a is b if a is None or b is None else np.array_equal(a, b)
        if len(student) != len(teacher) or not same:
            what = f"the two are not the same rows: {len(student)} for the student, {len(teacher)} for the teacher"
            raise InputError(what, do="encode one list of rows with both tokenizers, or give them the same labels")
        return cls(student.ids, student.types, student.starts, student.labels, student.pad_id, teacher)

    @property
    def theirs(self) -> Encoded:
        """The teacher's reading."""
        if self.teacher is None:
            raise InputError("there is no reading of the teacher", do="make it with Paired.of(student, teacher)")
        return self.teacher

    def head(self, rows: int) -> Paired:
        return Paired.of(super().head(rows), self.theirs.head(rows))

    def batch(
        self, rows: Sequence[int] | np.ndarray, *, labels: bool = True, part: slice = slice(None)
    ) -> dict[str, torch.Tensor]:
        own = self.theirs.batch(rows, labels=False, part=part)
        return super().batch(rows, labels=labels, part=part) | {f"{PREFIX}{k}": v for k, v in own.items()}

    def sample(self, batches: int, *, batch_size: int, seed: int) -> list[dict[str, torch.Tensor]]:
        """Batches for calibration, which only the student reads."""
        made = super().sample(batches, batch_size=batch_size, seed=seed)
        return [{k: v for k, v in one.items() if not k.startswith(PREFIX)} for one in made]

    @property
    def fingerprint(self) -> str:
        return f"{super().fingerprint}-{self.theirs.fingerprint}"


@dataclass(frozen=True)
class Dataset:
    """A task with its tokenized train and dev splits; ``device``: where models are trained on it."""

    task: Task
    train: Any  # Encoded, or another train.Source with ``sample``
    dev: Encoded
    device: str = "cpu"

    def extents(self, *, train: bool = True) -> dict[str, tuple[int, int, int]]:
        """:attr:`Encoded.extent` by the name of what has it: what a model has to take."""
        splits = {"train": self.train if train else None, "dev": self.dev}
        return {name: split.extent for name, split in splits.items() if isinstance(split, Encoded)}


def held_out(dataset: Dataset, rows: int, *, seed: int, limit: int | None = None) -> tuple[Dataset, Encoded]:
    """The data set without some random rows of train, and those rows: to choose models on, dev being for reports.

    ``limit``: keep at most so many of the other rows of train. InputError where fewer than twice ``rows`` are there.
    """
    train = dataset.train
    if not isinstance(train, Encoded) or len(train) < 2 * rows:
        what = f"{rows} rows cannot be held out of {len(train)} rows of train"
        raise InputError(what, where=dataset.task.name, do=f"--held-out {len(train) // 2} or fewer, or more rows")
    order = np.random.default_rng(seed).permutation(len(train))
    kept = order[rows:] if limit is None else order[rows : rows + limit]
    return replace(dataset, train=train.pick(kept)), train.pick(order[:rows])


def load(source: str | Path, tokenizer: Any, *, max_length: int | None = None, training: bool = True) -> Dataset:
    """Read and tokenize a folder, or a ``datasets`` name such as ``glue/sst2``.

    Raises :class:`InputError` for a missing file, a wrong column, an empty split or a bad label, with file and line;
    for ``training`` also where all rows of train are of one class.
    """
    train_rows, dev_rows, name = read(source)
    task = task_of(name, train_rows)
    if training and not task.regression and len(set(train_rows.target)) == 1:
        what = f"all {len(train_rows)} rows are of one class, {train_rows.target[0]!r}: there is nothing to tell apart"
        raise InputError(what, where=train_rows.source, do="add rows of another class, or check the column of labels")
    if max_length is not None:
        task = replace(task, max_length=max_length)
    return Dataset(task, encode(train_rows, task, tokenizer), encode(dev_rows, task, tokenizer))


def task_of(name: str, rows: Rows) -> Task:
    """The GLUE task of that name, or one made from the columns: ``score`` means regression, else the classes found."""
    known = GLUE.get(name.lower().replace("-", "").replace("_", ""))
    if known is not None and known.regression == (rows.column == "score"):
        words = WORDS.get(known.name, ())
        return replace(known, labels=words) if words and set(rows.target) <= set(words) else known
    if rows.column == "score":
        return Task(name=name, metric="pearson_spearman", labels=())
    found = set(rows.target)
    if all(t.isdigit() for t in found):
        return Task(name=name, metric="accuracy", labels=tuple(map(str, range(max(map(int, found)) + 1))))
    return Task(name=name, metric="accuracy", labels=tuple(sorted(found)))


def targets(rows: Rows, task: Task) -> np.ndarray:
    """Class numbers int64 [rows] or scores float32 [rows]."""
    index = {label: i for i, label in enumerate(task.labels)}
    out: list[float] = []
    for line, text in zip(rows.lines, rows.target):
        try:
            value = float(text) if task.regression else index[text]
        except (KeyError, ValueError):
            value = float("nan")
        if not np.isfinite(value):
            do = "write a finite number" if task.regression else f"classes are {', '.join(task.labels[:8])}"
            raise InputError(f"bad {rows.column} {text!r}", where=f"{rows.source}:{line}", do=do)
        out.append(value)
    return np.asarray(out, dtype=np.float32 if task.regression else np.int64)


def load_texts(source: str | Path, task: Task, tokenizer: Any, *, limit: int | None = None) -> Encoded:
    """Texts without labels for a teacher to label: a file, or the train split of a folder, whatever its own task was.

    ``limit``: at most so many rows, the first ones. Raises :class:`InputError` for a file that cannot be read.
    """
    path = Path(source)
    rows = read_file(find_split(path, "train") if path.is_dir() else path, labelled=False)
    first, second = rows.first[:limit], None if rows.second is None else rows.second[:limit]
    return encode(replace(rows, first=first, second=second, target=[]), task, tokenizer)


def encode(rows: Rows, task: Task, tokenizer: Any) -> Encoded:
    """Tokenize all rows at once; longer ones are cut to ``task.max_length`` (longest text first). No targets, no
    labels."""
    labels = targets(rows, task) if rows.target else None
    pairs = () if rows.second is None else (rows.second,)
    got = tokenizer(rows.first, *pairs, truncation=True, max_length=task.max_length, padding=False)
    starts = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(x) for x in got["input_ids"]], out=starts[1:])
    types = got.get("token_type_ids")
    flat = [np.concatenate([np.asarray(x, dtype=np.int32) for x in v]) for v in (got["input_ids"], types) if v]
    return Encoded(flat[0], flat[1] if len(flat) > 1 else None, starts, labels, int(tokenizer.pad_token_id or 0))
