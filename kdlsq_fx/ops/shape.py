"""Sizes, tensors made of sizes, and ops that only move elements (``same -> same``: codes pass through untouched)."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..op import Op, declare

aten = torch.ops.aten
Array = NDArray[Any]
WHY = "makes no numbers"


def arange(like: torch.Tensor, start: int, end: int, step: int, dtype: torch.dtype) -> torch.Tensor:
    """``torch.arange`` on the device of ``like``: 1-d, ``start, start + step ... < end``."""
    return torch.arange(start, end, step, dtype=dtype, device=like.device)


def full(like: torch.Tensor, shape: Sequence[int], value: float, dtype: torch.dtype) -> torch.Tensor:
    """``torch.full`` on the device of ``like``."""
    return torch.full(list(shape), value, dtype=dtype, device=like.device)


def _cube() -> torch.Tensor:
    return torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)


def _move(name: str, target: Any, numpy: Any, onnx: Callable[..., Any], *args: Any, x: Any = _cube) -> Op:
    """A ``same -> same`` op whose sample is ``x()`` and ``args``."""
    return declare(
        Op(
            name=name,
            target=target,
            sig="same -> same",
            numpy=numpy,
            onnx=onnx,
            sample=lambda: ((x(), *args), {}),
            why_float=WHY,
        )
    )


def _swap(rank: int, a: int, b: int) -> list[int]:
    order = list(range(rank))
    order[a], order[b] = order[b], order[a]
    return order


def _emit_transpose(g: Any, x: Any, a: int, b: int) -> Any:
    return g.Transpose(x, perm=_swap(g.rank(x), a, b))


def _emit_permute(g: Any, x: Any, dims: Sequence[int]) -> Any:
    return g.Transpose(x, perm=[d % g.rank(x) for d in dims])


def _emit_t(g: Any, x: Any) -> Any:
    return x if g.rank(x) < 2 else g.Transpose(x, perm=[1, 0])


def numpy_slice(x: Array, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Array:
    part: Array = x[(slice(None),) * (dim % x.ndim) + (slice(start, end, step),)]
    return part


LAST = 2**63 - 1


def _emit_slice(g: Any, x: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    start, end = 0 if start is None else start, LAST if end is None else end
    if start in (0, None) and isinstance(end, int) and end == LAST and step == 1:
        return x
    return g.Slice(x, g.vector([start]), g.vector([end]), g.vector([dim]), g.vector([step]))


def _emit_select(g: Any, x: Any, dim: int, index: Any) -> Any:
    return g.Gather(x, g.scalar(index), axis=dim)


def numpy_expand(x: Array, size: Sequence[int], implicit: bool = False) -> Array:
    """-1 keeps a dimension; new dimensions come in front."""
    old = (1,) * (len(size) - x.ndim) + x.shape
    return np.broadcast_to(x, [o if s == -1 else s for o, s in zip(old, size)])


def _emit_expand(g: Any, x: Any, size: Sequence[Any], implicit: bool = False) -> Any:
    """ONNX Expand takes the larger of both sides, so 1 keeps a dimension."""
    return g.Expand(x, g.vector([1 if isinstance(s, int) and s == -1 else s for s in size]))


def _emit_repeat(g: Any, x: Any, repeats: Sequence[Any]) -> Any:
    missing = len(repeats) - g.rank(x)
    return g.Tile(g.Unsqueeze(x, g.vector(range(missing))) if missing else x, g.vector(repeats))


def _merged(shape: Sequence[Any], start: int, end: int) -> tuple[int, int]:
    return start % max(len(shape), 1), end % max(len(shape), 1)


def numpy_flatten(x: Array, start: int = 0, end: int = -1) -> Array:
    a, b = _merged(x.shape, start, end)
    return x.reshape(*x.shape[:a], -1, *x.shape[b + 1 :])


def _emit_flatten(g: Any, x: Any, start: int = 0, end: int = -1) -> Any:
    rank = g.rank(x)
    a, b = start % max(rank, 1), end % max(rank, 1)
    sizes = [g.size(x, i) for i in range(rank)]
    return g.reshape(x, [*sizes[:a], -1, *sizes[b + 1 :]])


def numpy_unflatten(x: Array, dim: int, sizes: Sequence[int]) -> Array:
    dim %= x.ndim
    return x.reshape(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])


def _emit_unflatten(g: Any, x: Any, dim: int, sizes: Sequence[Any]) -> Any:
    dim %= g.rank(x)
    kept = [g.size(x, i) for i in range(g.rank(x))]
    return g.reshape(x, [*kept[:dim], *sizes, *kept[dim + 1 :]])


def numpy_squeeze(x: Array, dims: int | Sequence[int] | None = None) -> Array:
    """Drop the named dimensions that have size 1, all such when none is named."""
    named = range(x.ndim) if dims is None else [dims] if isinstance(dims, int) else dims
    return np.squeeze(x, tuple(d for d in named if x.shape[d] == 1))


def _emit_squeeze(g: Any, x: Any, dims: Any = None) -> Any:
    """Known sizes decide what goes, as they did at capture."""
    shape = g.dims(x)
    named = range(len(shape)) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = [d % len(shape) for d in named if shape[d] == 1]
    return g.Squeeze(x, g.vector(gone)) if gone else x


def _emit_unbind(g: Any, x: Any, dim: int = 0) -> list[Any]:
    return [g.Gather(x, g.scalar(i), axis=dim) for i in range(g.known(x, dim))]


def _parts(total: int, size: int) -> list[int]:
    return [min(size, total - at) for at in range(0, total, size)]


def numpy_split(x: Array, sizes: int | Sequence[int], dim: int = 0) -> list[Array]:
    parts = _parts(x.shape[dim], sizes) if isinstance(sizes, int) else sizes
    return np.split(x, np.cumsum(parts)[:-1], axis=dim)


def _emit_split(g: Any, x: Any, sizes: Any, dim: int = 0) -> list[Any]:
    parts = _parts(g.known(x, dim), sizes) if isinstance(sizes, int) else list(sizes)
    if len(parts) == 1:
        return [x]
    return list(g.Split(x, g.vector(parts), axis=dim, outputs=len(parts)))


def _emit_chunk(g: Any, x: Any, chunks: int, dim: int = 0) -> list[Any]:
    return _emit_split(g, x, -(-g.known(x, dim) // chunks), dim)


def _contiguous(x: Array, memory_format: Any = None) -> Array:
    return np.asarray(x, order="C")


_move("view", aten.view.default, lambda x, size: x.reshape(size), lambda g, x, s: g.reshape(x, s), [2, -1, 2])
_move("reshape", aten.reshape.default, lambda x, size: x.reshape(size), lambda g, x, s: g.reshape(x, s), [-1, 3, 2])
_move("flatten", aten.flatten.using_ints, numpy_flatten, _emit_flatten, 1)
_move("unflatten", aten.unflatten.int, numpy_unflatten, _emit_unflatten, -1, [2, 2])
_move("transpose", aten.transpose.int, lambda x, a, b: x.swapaxes(a, b), _emit_transpose, -1, -2)
_move("swapaxes", aten.swapaxes.default, lambda x, a, b: x.swapaxes(a, b), _emit_transpose, 0, 2)
_move("permute", aten.permute.default, lambda x, dims: x.transpose(dims), _emit_permute, [0, -1, 1])
_move("t", aten.t.default, lambda x: x.T, _emit_t, x=lambda: _cube()[0])
_move("numpy_T", aten.numpy_T.default, lambda x: x.T, _emit_t, x=lambda: _cube()[0])
_move("select", aten.select.int, lambda x, dim, index: np.take(x, index, axis=dim), _emit_select, 1, -1)
_move("slice", aten.slice.Tensor, numpy_slice, _emit_slice, 1, -2, LAST, 1)
_move("expand", aten.expand.default, numpy_expand, _emit_expand, [5, -1, 3, 4], x=lambda: _cube()[:1])
_move("contiguous", aten.contiguous.default, _contiguous, lambda g, x, memory_format=None: x)
_move("unsqueeze", aten.unsqueeze.default, np.expand_dims, lambda g, x, dim: g.Unsqueeze(x, g.vector([dim])), -1)
_move("squeeze", aten.squeeze.dim, numpy_squeeze, _emit_squeeze, -2, x=lambda: _cube()[:, :1])
_move("squeeze_all", aten.squeeze.default, numpy_squeeze, _emit_squeeze, x=lambda: _cube()[:1, :1])
_move("squeeze_dims", aten.squeeze.dims, numpy_squeeze, _emit_squeeze, [0, 1], x=lambda: _cube()[:, :1])
_move("repeat", aten.repeat.default, np.tile, _emit_repeat, [2, 1, 3, 1])
_move("unbind", aten.unbind.int, lambda x, dim=0: list(np.moveaxis(x, dim, 0)), _emit_unbind, -2)
_move("chunk", aten.chunk.default, lambda x, n, dim=0: numpy_split(x, -(-x.shape[dim] // n), dim), _emit_chunk, 3, -1)
_move("split", aten.split.Tensor, numpy_split, _emit_split, 3, -1)
_move("split_with_sizes", aten.split_with_sizes.default, numpy_split, _emit_split, [1, 3], 2)
GETITEM = declare(
    Op(
        name="getitem",
        target=operator.getitem,
        sig="same -> same",
        numpy=operator.getitem,
        onnx=lambda g, parts, index: parts[index],
        sample=lambda: (([_cube(), _cube() + 1], 1), {}),
        why_float=WHY,
    )
)


def _emit_arange(g: Any, like: Any, start: Any, end: Any, step: Any, dtype: torch.dtype) -> Any:
    if all(not isinstance(v, float) for v in (start, end, step)):
        return g.cast(g.Range(g.scalar(start), g.scalar(end), g.scalar(step)), dtype, source=torch.int64)
    return g.constant(np.arange(start, end, step, dtype=g.numpy_dtype(dtype)))


def _emit_full(g: Any, like: Any, shape: Sequence[Any], value: float, dtype: torch.dtype) -> Any:
    fill = np.asarray(value, g.numpy_dtype(dtype))
    if all(isinstance(s, int) for s in shape):
        return g.constant(np.full(tuple(shape), fill))
    return g.Expand(g.constant(fill), g.vector(shape))


declare(
    Op(
        name="arange",
        target=arange,
        sig="ids -> ids",
        numpy=lambda like, start, end, step, dtype: np.arange(start, end, step, dtype=dtype),
        onnx=_emit_arange,
        sample=lambda: ((_cube(), 2, 12, 3, torch.float32), {}),
    )
)
declare(
    Op(
        name="full",
        target=full,
        sig="ids -> ids",
        numpy=lambda like, shape, value, dtype: np.full(tuple(shape), value, dtype=dtype),
        onnx=_emit_full,
        sample=lambda: ((_cube(), [2, 3], -1.5, torch.float32), {}),
    )
)
declare(
    Op(
        name="sym_size",
        target=aten.sym_size.int,
        sig="ids -> int",
        numpy=lambda x, dim: x.shape[dim],
        onnx=lambda g, x, dim: g.size(x, dim),
        sample=lambda: ((_cube(), -1), {}),
    )
)
for _name, _function, _onnx in (
    ("size_add", operator.add, "Add"),
    ("size_sub", operator.sub, "Sub"),
    ("size_mul", operator.mul, "Mul"),
    ("size_floordiv", operator.floordiv, "Div"),  # sizes are not negative: truncation is the floor
    ("size_mod", operator.mod, "Mod"),
):
    declare(
        Op(
            name=_name,
            target=_function,
            sig="-> int",
            numpy=_function,
            onnx=lambda g, a, b, kind=_onnx: g.size_op(kind, a, b),
            sample=lambda: ((7, 2), {}),
        )
    )
