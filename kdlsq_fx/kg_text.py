"""Triples as token sequences, as KG-BERT writes them; every name is tokenized once.

    [CLS] head [SEP] relation [SEP] tail [SEP]      token types 0, 1, 0: the relation has its own
    [CLS] head [SEP] tail [SEP]                     token types 0, 1 (relation prediction)

A sequence that is too long loses one token at a time at the end of its longest part, as in KG-BERT; of the last of
them where two are as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdlsq_fx.data import Encoded
from kdlsq_fx.errors import ConfigError, InputError
from kdlsq_fx.kg_graph import HEAD, RELATION, TAIL, Graph


@dataclass(frozen=True)
class Pieces:
    """Tokens of every name, ragged: name ``i`` is ``ids[starts[i]:starts[i+1]]`` (int32, int64 [names + 1])."""

    ids: np.ndarray
    starts: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)


class Texts:
    """The tokens of a graph's names, and sequences made of them, at most ``max_length`` tokens each."""

    def __init__(self, graph: Graph, tokenizer: Any, *, max_length: int) -> None:
        if max_length < 7:
            raise ConfigError(f"{max_length} tokens hold no triple", where="max_length", do="give 7 or more")
        self.cls_id, self.sep_id = tokenizer.cls_token_id, tokenizer.sep_token_id
        if self.cls_id is None or self.sep_id is None:
            raise ConfigError("the tokenizer has no [CLS] or no [SEP]", do="use the tokenizer of a BERT-like encoder")
        self.max_length, self.pad_id = max_length, int(tokenizer.pad_token_id or 0)
        self.typed = "token_type_ids" in tokenizer.model_input_names
        self.entities = _tokenize(tokenizer, graph.entity_texts, graph.entities)
        self.relations = _tokenize(tokenizer, graph.relation_texts, graph.relations)

    def extent(self, *, relations: bool = True) -> tuple[int, int, int]:
        """:attr:`Encoded.extent` of all sequences that can be made, of pairs without ``relations``."""
        parts = [self.entities, self.entities, *([self.relations] if relations else [])]
        whole = sum(int(p.lengths.max()) for p in parts) + 1 + len(parts)
        largest = max(self.cls_id, self.sep_id, self.pad_id, *(int(p.ids.max()) for p in parts))
        return min(whole, self.max_length), largest, int(self.typed)

    def triples(self, rows: np.ndarray, labels: np.ndarray | None = None) -> Encoded:
        """Triples int64 [n, 3] as sequences of three parts, labels int64 [n]."""
        parts = [(self.entities, rows[:, HEAD]), (self.relations, rows[:, RELATION]), (self.entities, rows[:, TAIL])]
        return self._join(parts, (0, 1, 0), labels)

    def pairs(self, rows: np.ndarray, labels: np.ndarray | None = None) -> Encoded:
        """Head and tail of triples int64 [n, 3] as sequences of two parts, labels int64 [n]."""
        return self._join([(self.entities, rows[:, HEAD]), (self.entities, rows[:, TAIL])], (0, 1), labels)

    def _join(self, parts: list[tuple[Pieces, np.ndarray]], types: Sequence[int], labels: np.ndarray | None) -> Encoded:
        room = self.max_length - 1 - len(parts)
        lengths = shorten(np.stack([pieces.lengths[names] for pieces, names in parts], axis=1), room)
        starts = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths.sum(axis=1) + 1 + len(parts), out=starts[1:])
        ids = np.full(starts[-1], self.sep_id, dtype=np.int32)
        kinds = np.zeros(starts[-1], dtype=np.int32)
        ids[starts[:-1]] = self.cls_id
        at = starts[:-1] + 1
        for (pieces, names), kind, length in zip(parts, types, lengths.T):
            ids[_spans(at, length)] = pieces.ids[_spans(pieces.starts[names], length)]
            kinds[_spans(at, length + 1)] = kind  # the separator belongs to the part before it
            at = at + length + 1
        return Encoded(ids, kinds if self.typed else None, starts, labels, self.pad_id)


def shorten(lengths: np.ndarray, room: int) -> np.ndarray:
    """Lengths of parts int64 [n, parts], cut so that each row's sum is at most ``room``, always from the longest part
    (the last of those that are as long)."""
    lengths = np.minimum(lengths, room)
    while len(over := np.flatnonzero(lengths.sum(axis=1) > room)):
        longest = lengths.shape[1] - 1 - lengths[over, ::-1].argmax(axis=1)
        lengths[over, longest] -= 1
    return lengths


def _spans(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """``start, start + 1, ...`` of every span, one after another: int64 [sum of lengths]."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)


def _tokenize(tokenizer: Any, texts: Sequence[str], names: Sequence[str]) -> Pieces:
    tokens = tokenizer(list(texts), add_special_tokens=False, padding=False, verbose=False)["input_ids"]
    empty = [name for name, found in zip(names, tokens) if not found]
    if empty:
        raise InputError(f"the text of {empty[0]!r} has no tokens", do="write a text that the tokenizer can read")
    starts = np.zeros(len(tokens) + 1, dtype=np.int64)
    np.cumsum([len(t) for t in tokens], out=starts[1:])
    return Pieces(np.concatenate([np.asarray(t, dtype=np.int32) for t in tokens]), starts)
