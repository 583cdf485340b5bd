"""Making a cache: the teacher runs once over a data set, and what the loss needs of it is stored."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from tqdm import tqdm

from .data import Encoded
from .distillation import Distiller
from .errors import CheckpointError, ConfigError, InputError
from .files import FORMAT, check_no_model, checksum, differences, make_folder, read_json, write_atomic, write_json
from .kd_cache import INDEX, Cache, shard_name, token_hash, tokenizer_hash
from .kd_fields import STORES, Array, Field, encode, fields_of, kept_tokens
from .kd_targets import Teacher, Wanted
from .tap_plan import PREFIX

SHARD_BYTES = 32 * 2**20  # small enough to hold two in memory, large enough for few files


def build_cache(
    kd: Distiller,
    data: Encoded,
    folder: str | Path,
    *,
    store: str = "fp16",
    batch_size: int = 64,
    tokenizer: Any = None,
    shard_bytes: int = SHARD_BYTES,
) -> Cache:
    """Run the teacher of ``kd`` over every row of ``data`` and store the targets of ``kd``'s loss.

    A run that was stopped, or whose shards were damaged or lost, makes those that
    are missing. ``store``: how hidden states and attention scores are
    stored, ``"fp16"`` (relative error 2**-11), ``"fp32"`` or ``"int8"`` (each vector its largest magnitude / 127);
    outputs are float32 in any case. ``tokenizer``: its vocabulary is written down, to be told from another's.

    Raises:
        ConfigError: the loss cannot be stored: padding counts in it, or the choice of features depends on the batch.
        CheckpointError: the folder holds another cache, a model or a run, or cannot be written.
        InputError: a value is not finite, or too large for float16.
    """
    teacher = kd.targets
    if not isinstance(teacher, Teacher):
        raise ConfigError("a cache is made from a teacher", do="distill(qat, teacher, ...) and pass that")
    compress = kd.loss.compress
    if store not in STORES:
        raise ConfigError(f"store={store!r} is unknown", do=f"use one of {', '.join(STORES)}")
    if kd.loss.padding == "paper":
        raise ConfigError("with padding='paper' padded positions count, and they are not stored", do="use 'exclude'")
    if compress is not None and compress.features == "magnitude-batch" and compress.width < 1:
        do = "use features='magnitude', which chooses for each token"
        raise ConfigError("features='magnitude-batch' depends on the batch, which changes", where="compress", do=do)
    if not len(data):
        raise InputError("the data set is empty", do="give at least one row")
    check_no_model(Path(folder))
    target = make_folder(folder)
    index = _index(kd, teacher, data, store, tokenizer, shard_bytes)
    index["shards"] = _finished(target, index)
    write_json(target / INDEX, index)
    _write_shards(kd, teacher, data, target, index, batch_size)
    return Cache.open(target)


def _index(
    kd: Distiller, teacher: Teacher, data: Encoded, store: str, tokenizer: Any, shard_bytes: int
) -> dict[str, Any]:
    """All of ``cache.json`` but the shards."""
    probe = _run(kd, teacher, data, np.arange(1))
    fields = fields_of(probe, teacher.axes, store, kd.loss.compress)
    longest = int(data.lengths.max())
    kept = int(kept_tokens(np.array([longest]), kd.loss.compress)[0])
    most = sum(f.bytes(longest, kept) for f in fields) + 8
    return {
        "format": FORMAT,
        "kind": "distillation cache",
        "rows": len(data),
        "data": data.fingerprint,
        "tokenizer": "" if tokenizer is None else tokenizer_hash(tokenizer),
        "teacher": _hash_of(teacher),
        "loss": kd.loss.changed(kd.weights).to_dict(),  # without terms that this model has not
        "plan": json.loads(json.dumps(kd.plan.to_dict())),  # as it is read back: lists for tuples
        "widths": [_width(v.values, a if v.positions is None else (1,)) for v, a in zip(probe.taps, teacher.axes)],
        "store": store,
        "rows_per_shard": max(1, min(len(data), shard_bytes // most)),
        "fields": {f.name: {"dtype": f.dtype, "shape": list(f.shape)} for f in fields},
    }


def _width(value: torch.Tensor, axes: tuple[int, ...]) -> int:
    """The last dimension that does not run over tokens: features, classes, or heads."""
    return int([n for i, n in enumerate(value.shape) if i not in axes][-1])


def _hash_of(teacher: Teacher) -> str:
    """Of what the teacher computes and of its weights."""
    digest = hashlib.sha256(teacher.model.gm.code.encode())
    for name, value in sorted(teacher.model.gm.state_dict().items()):
        if isinstance(value, torch.Tensor):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _finished(folder: Path, index: dict[str, Any]) -> list[dict[str, Any]]:
    """The whole shards of a run that was stopped; CheckpointError where the folder holds a cache of something else."""
    if not (folder / INDEX).is_file():
        return []
    before = read_json(folder / INDEX)
    if changed := differences(before, index):
        what = f"the folder holds a cache with another {', '.join(changed)}"
        raise CheckpointError(what, where=str(folder), do="give another folder, or remove this one")
    whole: list[dict[str, Any]] = []
    for shard in before["shards"]:
        path = folder / shard["file"]
        if path.is_file() and checksum(path) == shard["sha256"]:
            whole.append(shard)
    return whole


def _write_shards(
    kd: Distiller, teacher: Teacher, data: Encoded, folder: Path, index: dict[str, Any], batch_size: int
) -> None:
    """The shards that are missing; the index names a shard as soon as it is whole."""
    size, total = index["rows_per_shard"], len(data)
    fields = [Field(name, f["dtype"], tuple(f["shape"])) for name, f in index["fields"].items()]
    done = {s["file"] for s in index["shards"]}
    initial = sum(s["rows"] for s in index["shards"])
    bar = tqdm(
        total=total, initial=initial, desc="cache", unit="row", disable=not sys.stderr.isatty(), dynamic_ncols=True
    )
    with bar:
        for at in (n for n in range(-(-total // size)) if shard_name(n) not in done):
            numbers = np.arange(at * size, min((at + 1) * size, total))
            rows: dict[int, dict[str, Array]] = {}
            for batch in _by_length(data, numbers, batch_size):
                targets = _run(kd, teacher, data, batch)
                lengths = data.lengths[batch]
                rows |= zip(batch.tolist(), encode(targets, teacher.axes, lengths, index["store"], kd.loss.compress))
                bar.update(len(batch))
            path = folder / shard_name(at)
            arrays = _joined([rows[i] for i in numbers.tolist()], fields, data, numbers)
            write_atomic(path, lambda name, arrays=arrays: save_file(arrays, name))  # type: ignore[misc]
            index["shards"].append({
                "file": path.name, "rows": len(numbers), "bytes": path.stat().st_size, "sha256": checksum(path),
            })  # fmt: skip
            index["shards"].sort(key=lambda s: s["file"])
            write_json(folder / INDEX, index)


def _by_length(data: Encoded, numbers: Array, batch_size: int) -> Iterator[Array]:
    """Batches with the least padding."""
    order = numbers[np.argsort(data.lengths[numbers], kind="stable")]
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _run(kd: Distiller, teacher: Teacher, data: Encoded, rows: Array) -> Wanted:
    """The teacher's targets of some rows, without outputs of no weight."""
    batch = data.batch(rows, labels=False)
    own = {k: batch.pop(k) for k in list(batch) if k.startswith(PREFIX)}
    found = teacher.wanted(own, kd.student.split(**batch)[1])
    return found if kd.weights["logits"] else replace(found, outputs={})


def _joined(rows: list[dict[str, Array]], fields: list[Field], data: Encoded, numbers: Array) -> dict[str, Array]:
    """The flat arrays of a shard."""
    flat = {f.name: np.concatenate([np.ravel(r[f.name]) for r in rows]).astype(f.dtype, copy=False) for f in fields}
    spans = [(data.starts[i], data.starts[i + 1]) for i in numbers]
    flat["length"] = data.lengths[numbers].astype(np.int32)
    flat["crc"] = np.array([token_hash(data.ids[a:b]) for a, b in spans], dtype=np.uint32)
    return flat
