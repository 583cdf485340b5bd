"""What a cache stores of one example, as flat arrays: the teacher's targets without padding, and back to a batch.

A field is one array per row. Its shape has whole numbers, ``"length"`` (the row's real tokens) and ``"tokens"`` (those
kept of them), so that the lengths of the rows say where each row begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .compression import Compression, Kept
from .devices import moved
from .errors import InputError
from .kd_targets import Wanted

STORES = {"fp16": np.float16, "fp32": np.float32, "int8": np.int8}
PARTS = (".values", ".scales", ".positions", ".features")
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Field:
    """One stored array per row: its name in the shards, dtype (NumPy's name) and shape."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def sizes(self, lengths: Array, tokens: Array) -> Array:
        """Entries of each row, int64 [rows]."""
        out = np.ones(len(lengths), dtype=np.int64)
        for dim in self.shape:
            out *= dim if isinstance(dim, int) else lengths if dim == "length" else tokens
        return out

    def bytes(self, length: int, tokens: int) -> int:
        size = int(self.sizes(np.array([length]), np.array([tokens]))[0])
        return size * np.dtype(self.dtype).itemsize


def kept_tokens(lengths: Array, compress: Compression | None) -> Array:
    """How many tokens are kept of rows of these lengths."""
    if compress is None or not compress.picks_tokens:
        return lengths
    return np.minimum(lengths, 1 if compress.tokens == "cls" else compress.length or 1)


def fields_of(wanted: Wanted, axes: Sequence[tuple[int, ...]], store: str, compress: Compression | None) -> list[Field]:
    """The fields that hold such targets. ``axes``: the token dimensions of each tap's value (behind the batch)."""
    made: list[Field] = []
    for i, (kept, along) in enumerate(zip(wanted.taps, axes)):
        name = f"tap{i}"
        if kept.positions is None:
            made += _valued(name, store, _shape(kept.values, along))
            continue
        assert compress is not None
        width = kept.values.shape[-1]
        made.append(Field(f"{name}.positions", "uint16", ("tokens",)))
        made += _valued(name, store, ("tokens", compress.kept_features(width)))
        if compress.width < 1 and compress.fixed_features(i, width) is None:
            made.append(Field(f"{name}.features", "uint16", ("tokens", compress.kept_features(width))))
    made += [Field(k, "float32", _shape(v, output_axes(k, v))) for k, v in wanted.outputs.items()]
    return made


def output_axes(name: str, value: torch.Tensor) -> tuple[int, ...]:
    """Token dimensions of an output: spans' logits (batch, length), tokens' logits (batch, length, classes)."""
    return (1,) if name in ("start_logits", "end_logits") or (name == "logits" and value.dim() == 3) else ()


def _shape(value: torch.Tensor, along: tuple[int, ...]) -> tuple[int | str, ...]:
    return tuple("length" if i in along else int(n) for i, n in enumerate(value.shape) if i > 0)


def _valued(name: str, store: str, shape: tuple[int | str, ...]) -> list[Field]:
    """Values as they are stored; int8 with one scale for each vector of the last dimension."""
    values = Field(f"{name}.values", np.dtype(STORES[store]).name, shape)
    return [values, Field(f"{name}.scales", "float32", shape[:-1])] if store == "int8" else [values]


def encode(
    wanted: Wanted, axes: Sequence[tuple[int, ...]], lengths: Array, store: str, compress: Compression | None
) -> list[dict[str, Array]]:
    """Targets of a batch padded on the right -> each row's fields, without padding. InputError for a value that is not
    finite, and where fp16 overflows."""
    counts = kept_tokens(lengths, compress)
    rows: list[dict[str, Array]] = [{} for _ in lengths]
    for i, (kept, along) in enumerate(zip(wanted.taps, axes)):
        name, values = f"tap{i}", kept.values.float().cpu().numpy()
        if kept.positions is None:
            for row, value, n in zip(rows, values, lengths):
                real = tuple(slice(n) if d + 1 in along else slice(None) for d in range(value.ndim))
                row.update(_packed(name, value[real], store))
            continue
        assert compress is not None
        positions = kept.positions.cpu().numpy().astype(np.uint16)
        features = _feature_numbers(kept.features, compress.kept_features(values.shape[-1]))
        stored = features is not None and compress.fixed_features(i, values.shape[-1]) is None
        for r, (row, n) in enumerate(zip(rows, counts)):  # fillers stand behind: padding is on the right
            value = values[r, :n]
            row[f"{name}.positions"] = positions[r, :n]
            if features is not None:
                value = np.take_along_axis(value, features[r, :n], -1)
            row.update(_packed(name, value, store))
            if stored and features is not None:
                row[f"{name}.features"] = features[r, :n].astype(np.uint16)
    for key, output in wanted.outputs.items():
        cut = bool(output_axes(key, output))
        for row, value, n in zip(rows, output.float().cpu().numpy(), lengths):
            row[key] = _finite(key, value[:n] if cut else value)
    return rows


def _feature_numbers(mask: torch.Tensor | None, count: int) -> Array | None:
    """bool (batch, tokens, width) with ``count`` true in each token -> their numbers, ascending."""
    if mask is None:
        return None
    return mask.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[..., :count].cpu().numpy()


def _finite(name: str, value: Array, *, masked: bool = False) -> Array:
    """The value itself; InputError for NaN and infinities. ``masked``: -inf may stand in it (scores under a mask)."""
    if not (value < np.inf if masked else np.isfinite(value)).all():
        do = "look at what the teacher says of this data; only fp32 stores scores of -inf"
        raise InputError(f"the teacher's value at {name} is not finite", where=name, do=do)
    return value


def _packed(name: str, value: Array, store: str) -> dict[str, Array]:
    _finite(name, value, masked=store == "fp32")
    if store == "int8":
        scale = np.abs(value).max(-1) / 127 if value.size else np.zeros(value.shape[:-1], np.float32)
        codes = np.rint(value / np.maximum(scale, np.finfo(np.float32).tiny)[..., None])
        return {f"{name}.values": codes.astype(np.int8), f"{name}.scales": scale.astype(np.float32)}
    if store == "fp16" and value.size and np.abs(value).max() > np.finfo(np.float16).max:
        what = f"the teacher's value at {name} reaches {np.abs(value).max():.3g}, float16 ends at 65504"
        raise InputError(what, where=name, do="store it as fp32 or int8")
    return {f"{name}.values": value.astype(STORES[store])}


def decode(
    rows: Sequence[dict[str, Array]], fields: dict[str, Field], taps: int, widths: Sequence[int],
    compress: Compression | None, first: Sequence[int], length: int, device: torch.device,
) -> Wanted:  # fmt: skip
    """Rows back to targets of a batch (batch, length, ...); ``first``: where each row's tokens begin in it."""
    batch = {name: _filled([r[name] for r in rows], f, first, length) for name, f in fields.items()}
    kept = []
    for i in range(taps):
        values = moved(batch[f"tap{i}.values"], device).float()
        if f"tap{i}.scales" in batch:
            values = values * moved(batch[f"tap{i}.scales"], device).unsqueeze(-1)
        if f"tap{i}.positions" not in batch:
            kept.append(Kept(values))
            continue
        assert compress is not None
        here = batch[f"tap{i}.positions"].long() + torch.tensor(first).unsqueeze(1)
        count = torch.tensor([len(r[f"tap{i}.positions"]) for r in rows])
        real = (torch.arange(here.shape[1]) < count.unsqueeze(1)).float()
        positions = moved(torch.where(real > 0, here, 0), device)
        kept.append(
            _spread(values, positions, moved(real, device), i, widths[i], batch.get(f"tap{i}.features"), compress)
        )
    return Wanted(tuple(kept), {k: moved(v, device) for k, v in batch.items() if not k.endswith(PARTS)})


def _spread(
    values: torch.Tensor, positions: torch.Tensor, real: torch.Tensor, tap: int, width: int,
    numbers: torch.Tensor | None, compress: Compression,
) -> Kept:  # fmt: skip
    """Kept features at their places in the whole width, 0 elsewhere."""
    if compress.width == 1:
        return Kept(values, positions, None, real)
    fixed = compress.fixed_features(tap, width)
    at = fixed.expand(values.shape) if fixed is not None else numbers
    assert at is not None
    at = moved(at.long(), values.device)
    whole = torch.zeros(*values.shape[:-1], width, device=values.device)
    features = torch.zeros_like(whole, dtype=torch.bool).scatter_(-1, at, True)
    return Kept(whole.scatter_(-1, at, values), positions, features, real)


def _filled(rows: list[Array], field: Field, first: Sequence[int], length: int) -> torch.Tensor:
    """Rows of a field as one tensor, 0 where there is padding."""
    most = max(r.shape[field.shape.index("tokens")] for r in rows) if "tokens" in field.shape else 0
    shape = [{"length": length, "tokens": most}[d] if isinstance(d, str) else d for d in field.shape]
    dtype = np.dtype(np.int32) if field.dtype == "uint16" else np.dtype(field.dtype)
    out = np.zeros((len(rows), *shape), dtype=dtype)
    for k, row in enumerate(rows):
        start = [first[k] if d == "length" else 0 for d in field.shape]
        out[k][tuple(slice(a, a + n) for a, n in zip(start, row.shape))] = row
    return torch.from_numpy(out)
