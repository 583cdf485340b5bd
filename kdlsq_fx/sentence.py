"""Sentence vectors from a bare encoder: mean over the tokens, length one; search with them; how long one takes."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from kdlsq_fx.data import Encoded
from kdlsq_fx.errors import InputError
from kdlsq_fx.evaluation import Run, runner


def pool(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens that ``mask`` keeps, scaled to length 1.

    states float [batch, length, width], mask [batch, length] of 0 and 1 -> float [batch, width]. As the
    sentence-transformers models do (Reimers and Gurevych 2019, section 3).
    """
    kept = mask.unsqueeze(-1).to(states.dtype)
    return F.normalize((states * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1e-9), dim=-1)


def encode_texts(texts: Sequence[str], tokenizer: Any, *, max_length: int = 128) -> Encoded:
    """Tokenize texts once; longer ones are cut to ``max_length`` tokens. InputError without any text."""
    if not texts:
        raise InputError("no texts to encode", do="give at least one")
    got = tokenizer(list(texts), truncation=True, max_length=max_length, padding=False)
    starts = np.zeros(len(texts) + 1, dtype=np.int64)
    np.cumsum([len(x) for x in got["input_ids"]], out=starts[1:])
    flat = np.concatenate([np.asarray(x, dtype=np.int32) for x in got["input_ids"]])
    types = got.get("token_type_ids")
    kinds = np.concatenate([np.asarray(x, dtype=np.int32) for x in types]) if types else None
    return Encoded(flat, kinds, starts, None, int(tokenizer.pad_token_id or 0))


def embed(model: Any, data: Encoded, *, batch_size: int = 32, title: str = "embed") -> np.ndarray:
    """Sentence vectors of all rows, in their order: float32 [rows, width].

    ``model``: anything ``evaluation.runner`` takes (module, integer model, ONNX path) whose first output is the
    token states [batch, length, width].
    """
    run = runner(model)
    out: np.ndarray | None = None
    quiet = not sys.stderr.isatty()
    with tqdm(total=len(data), desc=title, disable=quiet, unit="text", dynamic_ncols=True) as bar:
        for rows in data.sorted_batches(batch_size):
            vectors = vectors_of(run, data.batch(rows, labels=False))
            out = np.zeros((len(data), vectors.shape[1]), dtype=np.float32) if out is None else out
            out[rows] = vectors
            bar.update(len(rows))
    if out is None:
        raise InputError("no texts to embed", do="give at least one")
    return out


def vectors_of(run: Run, batch: dict[str, torch.Tensor]) -> np.ndarray:
    """Sentence vectors of one batch: float32 [batch, width]. InputError where the model gives no token states."""
    states = torch.from_numpy(run(batch))
    if states.dim() != 3:
        raise InputError(
            f"the model's first output has shape {tuple(states.shape)}, token states have (batch, length, width)",
            do="use a bare encoder such as BertModel",
        )
    return pool(states, batch["attention_mask"]).numpy()


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Row by row cosine of vectors of length 1: [rows, width] twice -> float64 [rows]."""
    return np.einsum("rw,rw->r", a.astype(np.float64), b.astype(np.float64))


def search(queries: np.ndarray, texts: np.ndarray, k: int, *, skip_self: bool = False) -> np.ndarray:
    """Row numbers of the ``k`` texts nearest to each query, nearest first: int64 [queries, k].

    Vectors of length 1. Ties go to the lower row. ``skip_self``: query i is text i and does not find itself.
    """
    scores = queries @ texts.T
    if skip_self:
        np.fill_diagonal(scores, -np.inf)
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def overlap(found: np.ndarray, wanted: np.ndarray) -> float:
    """Mean share of ``wanted`` [queries, k] that is in ``found`` [queries, k], the order inside left out of account."""
    return float(np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in zip(found, wanted)]))


def latency(
    model: Any, data: Encoded, rows: Sequence[int] | np.ndarray, *, batch_size: int = 1, title: str = "time"
) -> float:
    """Median milliseconds per text over batches of ``batch_size`` rows, tokenization not included; one batch is run
    before, to warm up."""
    run = runner(model)
    times: list[float] = []
    starts, quiet = range(0, len(rows) - batch_size + 1, batch_size), not sys.stderr.isatty()
    for at in tqdm(starts, desc=title, disable=quiet, unit="batch", dynamic_ncols=True):
        batch = data.batch(rows[at : at + batch_size], labels=False)
        if not times:
            vectors_of(run, batch)
        began = time.perf_counter()
        vectors_of(run, batch)
        times.append((time.perf_counter() - began) * 1000 / batch_size)
    if not times:
        raise InputError(f"{len(rows)} rows make no batch of {batch_size}", do="time at least one batch")
    return float(np.median(times))
