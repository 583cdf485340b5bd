"""How far a ranking is, in one file: it can be stopped at any moment, and goes on after the last batch written."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdlsq_fx.errors import CheckpointError
from kdlsq_fx.files import make_folder, read_tensors, write_tensors
from kdlsq_fx.kg_graph import Facts
from kdlsq_fx.kg_text import Texts


class Progress:
    """``ranks`` float64 [triples, 2] (NaN: not known yet); ``question``, the first that has none; the scores from there
    on, as far as they are there; ``seconds`` of work. Kept in ``path`` (None: nowhere), a file of this ``identity``."""

    def __init__(self, path: Path | None, triples: int, identity: str) -> None:
        self.path, self.identity = path, identity
        self.ranks = np.full((triples, 2), np.nan)
        self.question = 0
        self.scores = np.zeros(0, dtype=np.float32)
        self.before, self.began = 0.0, 0.0
        self.saved = time.monotonic()
        if path is not None and path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        found = read_tensors(path)
        if set(found) != {"ranks", "question", "scores", "seconds", "identity"}:
            raise CheckpointError("not the state of a ranking", where=str(path), do="remove it or name another file")
        if bytes(found["identity"].tolist()).hex() != self.identity:
            do = "remove it, or rank with the model, graph, split and length that it was begun with"
            raise CheckpointError("the state of another ranking", where=str(path), do=do)
        self.ranks, self.scores = found["ranks"].numpy(), found["scores"].numpy()
        self.question, self.before = int(found["question"]), float(found["seconds"])

    @property
    def seconds(self) -> float:
        return self.before + (time.monotonic() - self.began if self.began else 0.0)

    def begin(self, sequences: int) -> np.ndarray:
        """The scores float32 [sequences] of the next questions, NaN where they are not there yet."""
        self.began = self.began or time.monotonic()
        if len(self.scores) != sequences:
            self.scores = np.full(sequences, np.nan, dtype=np.float32)
        return self.scores

    def end(self, question: int) -> None:
        """The ranks of all questions before this one stand in ``ranks``."""
        self.question, self.scores = question, np.zeros(0, dtype=np.float32)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Saves when the block is left, by an error or an interrupt too."""
        try:
            yield
        finally:
            self.save()

    def save(self, *, older_than: float = 0.0) -> None:
        """Write the file, atomically, where the last one is ``older_than`` seconds old."""
        if self.path is None or time.monotonic() - self.saved < older_than:
            return
        make_folder(self.path.parent)
        tensors = {
            "ranks": torch.from_numpy(self.ranks),
            "scores": torch.from_numpy(self.scores),
            "question": torch.tensor(self.question),
            "seconds": torch.tensor(self.seconds, dtype=torch.float64),
            "identity": torch.tensor(list(bytes.fromhex(self.identity)), dtype=torch.uint8),
        }
        write_tensors(self.path, tensors)
        self.saved = time.monotonic()


def forget(path: Path) -> None:
    """Remove the file of a ranking, and the two folders around it where they are then empty."""
    path.unlink(missing_ok=True)
    with suppress(OSError):  # other files stand there
        path.parent.rmdir()
        path.parent.parent.rmdir()


def identity(model: Any, triples: np.ndarray, facts: Facts, texts: Texts) -> str:
    """Hash of all that decides the scores and their order: weights, what runs them, triples, facts, tokens."""
    digest = hashlib.sha256()
    sizes = np.array([facts.entities, facts.relations, texts.max_length, texts.cls_id, texts.sep_id, texts.typed])
    pieces = (texts.entities, texts.relations)
    for array in (triples, facts.keys, sizes, *(a for p in pieces for a in (p.ids, p.starts))):
        digest.update(np.ascontiguousarray(array).tobytes())
    if isinstance(model, str | Path):
        digest.update(Path(model).read_bytes() if Path(model).is_file() else b"")
    elif isinstance(model, torch.nn.Module):
        digest.update(f"{type(model).__name__} {getattr(model, 'backend', '')}".encode())
        for name, value in sorted(model.state_dict().items()):
            raw = value.detach().cpu().contiguous().view(-1).view(torch.uint8)  # NumPy has no bfloat16
            digest.update(name.encode() + raw.numpy().tobytes())
    return digest.hexdigest()
