"""Ops that join tensors, pick from them by index, pad them, or reduce a dimension; and the change of dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..op import Op, declare
from ..ranges import Bounds, Interval

aten = torch.ops.aten
Array = NDArray[Any]
WHY = "moves or sums values of several scales"


def _cube() -> torch.Tensor:
    return torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)


def _declare(
    name: str,
    target: Any,
    sig: str,
    numpy: Callable[..., Any],
    onnx: Callable[..., Any],
    sample: Callable[[], tuple[Any, ...]],
    bounds: Callable[..., Bounds] | None = None,
) -> Op:
    return declare(
        Op(
            name=name,
            target=target,
            sig=sig,
            numpy=numpy,
            onnx=onnx,
            bounds=bounds,
            sample=lambda: (sample(), {}),
            why_float=WHY,
        )
    )


def _joined_bounds(tensors: Sequence[Interval], dim: int = 0) -> Bounds:
    return Bounds(min(t.lo for t in tensors), max(t.hi for t in tensors))


def _picked_bounds(x: Interval, *_: Any, **__: Any) -> Bounds:
    return Bounds(x.lo, x.hi)


def _padded_bounds(x: Interval, pad: Sequence[Any], mode: str = "constant", value: float | None = None) -> Bounds:
    added = int(value or 0)
    return Bounds(min(x.lo, added), max(x.hi, added)) if mode == "constant" else Bounds(x.lo, x.hi)


def _emit_stack(g: Any, tensors: Sequence[Any], dim: int = 0) -> Any:
    at = dim % (g.rank(tensors[0]) + 1)
    return g.Concat(*(g.Unsqueeze(g.typed(t), g.vector([at])) for t in tensors), axis=at)


def numpy_index(x: Array, indices: Sequence[Array | None]) -> Array:
    """Advanced indexing; None keeps a dimension."""
    found: Array = x[tuple(slice(None) if i is None else i for i in indices)]
    return found


def _emit_index(g: Any, x: Any, indices: Sequence[Any]) -> Any:
    """Indices of the leading dimensions become the coordinates of a GatherND; one index alone a Gather."""
    named = [i for i, index in enumerate(indices) if index is not None]
    if len(named) == 1:
        return g.Gather(x, indices[named[0]], axis=named[0])
    if named != list(range(len(named))):
        g.refuse("indexing of dimensions that are not the leading ones")
    shape = g.Shape(indices[0])
    for index in indices[1 : len(named)]:  # the shape that all of them broadcast to
        shape = g.Shape(g.Expand(index, shape))
    parts = [g.Unsqueeze(g.Expand(g.cast(i, torch.int64), shape), g.vector([-1])) for i in indices[: len(named)]]
    return g.GatherND(x, g.Concat(*parts, axis=-1))


def numpy_gather(x: Array, dim: int, index: Array, sparse_grad: bool = False) -> Array:
    """``out[i][j] = x[i][index[i][j]]`` for dim 1; the other dimensions of ``index`` may be shorter than those of x."""
    dim %= x.ndim
    part = x[tuple(slice(None) if d == dim else slice(0, n) for d, n in enumerate(index.shape))]
    return np.take_along_axis(part, index, axis=dim)


PAD_MODES = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}  # NumPy's names


def numpy_pad(x: Array, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Array:
    """``pad`` names (before, after) from the last dimension on; negative numbers crop."""
    widths = [(0, 0)] * (x.ndim - len(pad) // 2) + [(pad[i], pad[i + 1]) for i in range(len(pad) - 2, -1, -2)]
    x = x[tuple(slice(max(-a, 0), n - max(-b, 0)) for (a, b), n in zip(widths, x.shape))]
    grow = [(max(a, 0), max(b, 0)) for a, b in widths]
    options: dict[str, Any] = {"constant_values": value or 0} if mode == "constant" else {}
    return np.pad(x, grow, PAD_MODES[mode], **options)  # type: ignore[call-overload]


def _emit_pad(g: Any, x: Any, pad: Sequence[Any], mode: str = "constant", value: float | None = None) -> Any:
    rank, n = g.rank(x), len(pad) // 2
    if mode == "circular":
        g.refuse("padding with what stands at the other end (circular)")
    before, after = [0] * rank, [0] * rank
    for i in range(n):
        before[rank - 1 - i], after[rank - 1 - i] = pad[2 * i], pad[2 * i + 1]
    inputs = (g.typed(value or 0),) if mode == "constant" else ()
    return g.Pad(x, g.vector([*before, *after]), *inputs, mode=PAD_MODES[mode])


def _axes(dims: int | Sequence[int] | None) -> tuple[int, ...] | None:
    return None if dims is None or dims == [] else (dims,) if isinstance(dims, int) else tuple(dims)


def _numpy_reduce(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(x: Array, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
        return function(x if dtype is None else x.astype(dtype), axis=_axes(dim), keepdims=keepdim)

    return run


def _emit_reduce(kind: str) -> Callable[..., Any]:
    def emit(g: Any, x: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
        axes = _axes(dim)
        x = g.cast(x, g.dtype)
        return getattr(g, kind)(x, *(() if axes is None else (g.vector(axes),)), keepdims=int(keepdim))

    return emit


def numpy_to(x: Array, dtype: Any, *_: Any) -> Array:
    return x.astype(dtype)


_declare(
    "cat",
    aten.cat.default,
    "float, float -> float",
    lambda tensors, dim=0: np.concatenate(tensors, axis=dim),
    lambda g, tensors, dim=0: g.Concat(*(g.typed(t) for t in tensors), axis=dim),
    lambda: ([_cube(), _cube()[..., :2]], -1),
    _joined_bounds,
)
_declare(
    "stack",
    aten.stack.default,
    "float, float -> float",
    lambda tensors, dim=0: np.stack(tensors, axis=dim),
    _emit_stack,
    lambda: ([_cube(), _cube() + 1], -1),
)
_declare(
    "pad",
    aten.pad.default,
    "float -> float",
    numpy_pad,
    _emit_pad,
    lambda: (_cube(), [0, 0, 2, -1], "constant", 0.5),
    _padded_bounds,
)
_declare(
    "index",
    aten.index.Tensor,
    "float, ids -> float",
    numpy_index,
    _emit_index,
    lambda: (_cube(), [torch.tensor([[1], [0]]), torch.tensor([[0, 2, 1]])]),
)
_declare(
    "index_select",
    aten.index_select.default,
    "float, ids -> float",
    lambda x, dim, index: np.take(x, index, axis=dim),
    lambda g, x, dim, index: g.Gather(x, index, axis=dim),
    lambda: (_cube(), 1, torch.tensor([2, 0])),
    _picked_bounds,
)
_declare(
    "gather",
    aten.gather.default,
    "float, ids -> float",
    numpy_gather,
    lambda g, x, dim, index, sparse_grad=False: g.GatherElements(x, g.cast(index, torch.int64), axis=dim),
    lambda: (_cube(), -1, torch.tensor([[[0, 3, 1, 1, 2]] * 3] * 2)),
    _picked_bounds,
)
_declare(
    "cumsum",
    aten.cumsum.default,
    "float -> float",
    lambda x, dim, dtype=None: np.cumsum(x, axis=dim, dtype=dtype or (x.dtype if x.dtype.kind == "f" else np.int64)),
    lambda g, x, dim, dtype=None: g.CumSum(g.cast(x, g.dtype), g.scalar(dim)),
    lambda: (torch.tensor([[1, 0, 1], [1, 1, 1]], dtype=torch.int32), 1),
)
for _name, _target, _function, _onnx, _args in (
    ("mean", aten.mean.dim, np.mean, "ReduceMean", ([-1], True)),
    ("mean_all", aten.mean.default, np.mean, "ReduceMean", ()),
    ("sum", aten.sum.dim_IntList, np.sum, "ReduceSum", ([0, 2],)),
    ("sum_all", aten.sum.default, np.sum, "ReduceSum", ()),
    ("amax", aten.amax.default, np.max, "ReduceMax", ([1], True)),
    ("amin", aten.amin.default, np.min, "ReduceMin", ([1],)),
):
    _declare(
        _name,
        _target,
        "float -> float",
        _numpy_reduce(_function),
        _emit_reduce(_onnx),
        lambda args=_args: (_cube() / 7, *args),  # type: ignore[misc]
    )
_declare(
    "to",
    aten.to.dtype,
    "float -> float",
    numpy_to,
    lambda g, x, dtype, *_: g.cast(x, dtype),
    lambda: (torch.tensor([-1.7, -0.2, 0.0, 1.5, 2.5]), torch.int64),
)
_declare(
    "type_as",
    aten.type_as.default,
    "float, float -> float",
    lambda x, other: x.astype(other.dtype),
    lambda g, x, other: g.cast(x, g.dtype),
    lambda: (torch.tensor([0, 1, 2]), torch.tensor(1.0)),
)
