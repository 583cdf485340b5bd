"""A teacher's targets on disk, read by example: training then needs no teacher in memory.

A folder with ``cache.json`` (what it was made for, the fields, the shards with their checksums) and safetensors shards
of flat arrays, which are mapped into memory and read row by row. docs/distillation.md describes the format.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from .data import Encoded
from .depth import count_blocks
from .errors import CheckpointError, ConfigError, InputError
from .files import checksum, read_json
from .kd_fields import Array, Field, decode, kept_tokens
from .kd_named import TERMS, Loss
from .kd_targets import Wanted
from .model import QuantModel
from .tap_plan import TapPlan
from .taps import node_at, shape_of

INDEX = "cache.json"
OPEN = 64  # shards mapped at a time
FIXED = ("padding", "compress")  # of the loss: what is stored hangs on them


@dataclass(frozen=True)
class Numbered:
    """A data set whose batches carry ``example_id``, the rows' numbers; :func:`kdlsq_fx.train.fit` takes it. ``cache``:
    the fingerprint of the targets beside the rows."""

    data: Encoded
    cache: str

    def order(self, *, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
        return self.data.order(batch_size=batch_size, seed=seed, epoch=epoch)

    def batch(self, rows: np.ndarray, *, part: slice = slice(None)) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(np.asarray(rows, dtype=np.int64)[part])
        return self.data.batch(rows, part=part) | {"example_id": ids}

    @property
    def fingerprint(self) -> str:
        """Of the rows and of the targets: a run is not continued on those of another teacher."""
        return f"{self.data.fingerprint}-{self.cache}"


class Cache:
    """Targets of every row of one data set; made by :func:`kdlsq_fx.kd_cache_build.build_cache`.

    ``plan`` and ``loss`` are those it was made for; ``rows`` how many examples it holds.
    """

    def __init__(self, folder: Path, index: dict[str, Any]) -> None:
        self.folder, self.index = folder, index
        self.plan = TapPlan.from_dict(index["plan"], where=str(folder / INDEX))
        self.loss = Loss.from_dict(index["loss"])
        self.rows = int(index["rows"])
        self.fields = {name: Field(name, f["dtype"], tuple(f["shape"])) for name, f in index["fields"].items()}
        self._shard = lru_cache(maxsize=OPEN)(self._open_shard)
        self._verified: set[int] = set()

    @property
    def fingerprint(self) -> str:
        """Of what it was made for and of what every shard holds."""
        return hashlib.sha256(json.dumps(self.index, sort_keys=True).encode()).hexdigest()[:16]

    @classmethod
    def open(cls, path: str | Path) -> Cache:
        """A finished cache. CheckpointError where it is not there, not finished, or a shard is missing or cut short;
        the checksum of a shard is verified when it is first read."""
        folder = Path(path)
        if not (folder / INDEX).is_file():
            do = f"name a folder that `kdlsq-fx cache` wrote, or make it: kdlsq-fx cache --out {folder}"
            raise CheckpointError("no distillation cache there", where=str(folder), do=do)
        index = read_json(folder / INDEX)
        if index.get("kind") != "distillation cache":
            raise CheckpointError("the folder holds no distillation cache", where=str(folder), do="kdlsq-fx cache")
        try:
            cache = cls(folder, index)
            count = math.ceil(cache.rows / index["rows_per_shard"])
            missing = sorted({shard_name(i) for i in range(count)} - {s["file"] for s in index["shards"]})
            if len(index["shards"]) > count:
                raise ValueError(f"{len(index['shards'])} shards where {count} hold all rows")
        except (KeyError, TypeError, ValueError) as err:
            told = f"the entry {err} is missing" if isinstance(err, KeyError) else str(err)
            do = "copy the folder again, or remove it and run kdlsq-fx cache"
            raise CheckpointError(f"{INDEX} is damaged: {told}", where=str(folder), do=do) from None
        if missing:
            what = f"the cache is not finished: {len(missing)} of {count} shards are missing, the first {missing[0]}"
            raise CheckpointError(what, where=str(folder), do="run the same kdlsq-fx cache again, it goes on")
        for shard in index["shards"]:
            file = folder / shard["file"]
            if not file.is_file() or file.stat().st_size != shard["bytes"]:
                raise CheckpointError(
                    f"{file} is missing or cut short", do="copy it again, or run kdlsq-fx cache again"
                )
        return cache

    @property
    def bytes_per_example(self) -> float:
        """Bytes of the shards for each row, everything included."""
        return float(sum(s["bytes"] for s in self.index["shards"]) / max(self.rows, 1))

    def report(self) -> str:
        """What the cache holds, as text."""
        rows = [f"{f.name:16s} {f.dtype:8s} {' x '.join(map(str, f.shape)) or '1'}" for f in self.fields.values()]
        head = f"{self.rows} examples, {self.bytes_per_example:.0f} bytes each, {len(self.index['shards'])} shards"
        return "\n".join(
            [head, f"loss: compress {self.loss.compress or 'nothing'}, store {self.index['store']}", *rows]
        )

    def source(self, data: Encoded, tokenizer: Any = None) -> Numbered:
        """The data set as ``fit`` needs it beside this cache. InputError where the cache was made for another one."""
        if tokenizer is not None and self.index["tokenizer"] not in ("", tokenizer_hash(tokenizer)):
            what = "the cache was made with another tokenizer"
            raise InputError(what, where=str(self.folder), do="use that one, or make another cache")
        if data.fingerprint != self.index["data"] or len(data) != self.rows:
            same = f"both have {self.rows} rows, but tokens, lengths or labels differ"
            told = same if len(data) == self.rows else f"it has {self.rows} rows, this one {len(data)}"
            do = "use the same rows in the same order, max_length and labels, or make another cache"
            raise InputError(f"the cache was made for another data set: {told}", where=str(self.folder), do=do)
        return Numbered(data, self.fingerprint)

    def loss_with(self, changes: dict[str, Any]) -> Loss:
        """The loss it was made for, with other weights, temperature or schedule; ConfigError for what is stored."""
        changed = self.loss.changed(changes)
        fixed = [k for k in FIXED if getattr(changed, k) != getattr(self.loss, k)]
        if fixed:
            what = f"{fixed[0]} was fixed when the cache was made"
            raise ConfigError(what, where=str(self.folder), do="leave it away, or make another cache")
        return changed

    def check(self, qat: QuantModel, weights: dict[str, float]) -> None:
        """ConfigError where the student is not the one it was made for, or a term needs what is not stored."""
        made_for, blocks = self.plan.student.layers, count_blocks(qat.gm)
        if made_for and blocks and made_for != blocks:
            what = f"the cache was made for a student of {made_for} layers, this one has {blocks}"
            raise ConfigError(what, where=str(self.folder), do="make a cache for this student")
        stored = {t.loss for t in self.plan.taps} | {"gold"}
        stored |= {"logits" for k in self.fields if k.endswith("logits")}
        for term in TERMS:
            if weights[term] and term not in stored:
                has = ", ".join(sorted(stored - {"gold"}))
                raise ConfigError(
                    f"{term} has a weight, but the cache holds only {has}",
                    where=str(self.folder), do=f"set {term}=0, or make a cache with it",
                )  # fmt: skip
        for tap, width in zip(self.plan.taps, self.index["widths"]):
            shape = shape_of(node_at(qat.gm, tap.student, "student"))
            own = self.plan.projections[tap.projection][0] if tap.projection else width
            if own not in shape[1:]:
                what = f"the student's value has shape {shape}, the cache was made for one {own} wide"
                raise ConfigError(what, where=tap.student, do="make a cache for this student")

    def wanted(self, given: dict[str, Any], inputs: dict[str, torch.Tensor]) -> Wanted:
        """Targets of the rows ``given["example_id"]``. InputError without it, or where a row's tokens are others."""
        if given.get("example_id") is None:
            do = "train on cache.source(data), or give every batch the numbers of its rows"
            raise InputError("the batch has no example_id, so its targets cannot be found", do=do)
        both = {**inputs, **{k: v for k, v in given.items() if v is not None}}  # the caller's lie on the host
        ids = both["input_ids"].cpu().numpy()
        mask = both["attention_mask"].cpu().numpy() != 0 if "attention_mask" in both else np.ones(ids.shape, bool)
        numbers = _numbers(given["example_id"], len(ids))
        rows = [self._row(i) for i in numbers]
        for number, row, tokens, real in zip(numbers, rows, ids, mask):
            if int(row["crc"]) != token_hash(tokens[real]):
                what = f"example {number} has other tokens than the one the cache was made for"
                raise InputError(
                    what, where=str(self.folder), do="train on the data set of the cache: cache.source(data)"
                )
        return decode(
            rows, self.fields, len(self.plan.taps), self.index["widths"], self.loss.compress,
            mask.argmax(1).tolist(), ids.shape[1], inputs["input_ids"].device,
        )  # fmt: skip

    def move(self, fn: Callable[..., Any], recurse: bool = True) -> None:
        """Nothing to move: targets go to the device of their batch."""

    def _row(self, number: int) -> dict[str, Array]:
        """The fields of one example, views of the mapped shard."""
        if not 0 <= number < self.rows:
            what = f"example_id {number}, the cache has examples 0 to {self.rows - 1}"
            raise InputError(what, where=str(self.folder), do="train on the data set of the cache")
        at, k = divmod(number, self.index["rows_per_shard"])
        flat, starts, lengths, tokens = self._shard(at)
        row: dict[str, Array] = {"crc": flat["crc"][k]}
        sizes = {"length": int(lengths[k]), "tokens": int(tokens[k])}
        for name, field in self.fields.items():
            shape = [sizes[d] if isinstance(d, str) else d for d in field.shape]
            row[name] = flat[name][starts[name][k] : starts[name][k + 1]].reshape(shape)
        return row

    def _open_shard(self, at: int) -> tuple[dict[str, Array], dict[str, Array], Array, Array]:
        """Flat arrays of a shard, where each row begins in them, the rows' lengths and kept tokens."""
        entry = self.index["shards"][at]
        path = self.folder / entry["file"]
        if at not in self._verified and checksum(path) != entry["sha256"]:
            do = "copy it again; or delete it and run the same kdlsq-fx cache, which makes it again"
            raise CheckpointError(f"{path} is damaged: its checksum is another", do=do)
        self._verified.add(at)
        try:
            with safe_open(path, framework="pt") as file:  # its tensors are views of the mapped file
                flat = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as err:
            raise CheckpointError(f"{path} cannot be read: {err}", do="copy it again") from None
        lengths = flat["length"].astype(np.int64)
        tokens = kept_tokens(lengths, self.loss.compress)
        starts = {n: np.concatenate([[0], np.cumsum(f.sizes(lengths, tokens))]) for n, f in self.fields.items()}
        return flat, starts, lengths, tokens


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _numbers(given: Any, rows: int) -> list[int]:
    """The rows' numbers of a batch; InputError where they are not one whole number for each of its rows."""
    if not isinstance(given, torch.Tensor) or given.is_floating_point() or given.shape != (rows,):
        found = f"{tuple(given.shape)} {given.dtype}" if isinstance(given, torch.Tensor) else type(given).__name__
        what = f"example_id is {found}, the batch has {rows} rows"
        raise InputError(what, do=f"give an integer tensor of shape ({rows},): the number of each row in the data set")
    return [int(i) for i in given.tolist()]


def token_hash(ids: Array | Sequence[int]) -> int:
    """CRC-32 of a row's ids as little-endian int32: a row of another data set is noticed."""
    return zlib.crc32(np.asarray(ids, dtype="<i4").tobytes())


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 over the vocabulary and the special ids."""
    known = [sorted(tokenizer.get_vocab().items()), sorted(map(int, tokenizer.all_special_ids))]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()
