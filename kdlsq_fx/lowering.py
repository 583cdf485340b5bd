"""What passes/lower.py and the ``lower`` rules of ops share: integer values of float nodes, and how to make nodes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from .graph import fetch, module_path, moves_data, put, site_of, unused_name
from .op import BY_NAME, tensor_args

Array = NDArray[Any]
KEEP_RANGE = (torch.ops.aten.cat.default, torch.ops.aten.pad.default)  # of codes: a pad adds the code of zero


@dataclass(frozen=True)
class Island:
    """A float op left in an integer graph, and why."""

    site: str
    op: str
    reason: str


class StaysFloat(Exception):
    """Raised by a lowering rule: the node stays a float island, for this reason."""


@dataclass(frozen=True)
class Grid:
    """The codes a ``quantize`` node asks for: ``qmin <= code <= qmax``, ``real = (code - zero_point) * scale``."""

    scale: float
    zero_point: int
    qmin: int
    qmax: int


@dataclass(frozen=True)
class QValue:
    """A float value held as integers: ``real = (node - zero_point) * scale`` and ``lo <= node <= hi``.

    ``scale`` is float64: 0-d; 1-d along ``axis``; or, with ``rows``, one per row of the table whose rows the ids
    ``rows`` picked (the value then has one scale per leading position). ``codes`` are the integers themselves where
    they are constant. An accumulator has zero point 0.
    """

    node: fx.Node
    scale: Array
    lo: int
    hi: int
    zero_point: int = 0
    axis: int | None = None
    rows: fx.Node | None = None
    codes: Array | None = None

    @property
    def is_per_tensor(self) -> bool:
        return self.scale.ndim == 0


class Deferred(Protocol):
    """A value whose integers depend on the grid of the quantizer behind it: a sum, or a function of codes."""

    def quantized(self, lowering: Lowering, node: fx.Node, grid: Grid) -> QValue:
        """The codes that the ``quantize`` node ``node`` asks for."""
        ...


Value = QValue | Deferred


@dataclass
class Lowering:
    """The state of one walk over a qdq graph: float node -> integer value, bounds of integer nodes, reasons.

    ``hidden``: nodes that carry only ids, masks, positions and sizes (kdlsq_fx/graph.py, ``plumbing``).
    """

    gm: fx.GraphModule
    hidden: frozenset[fx.Node] = frozenset()
    values: dict[fx.Node, Value] = field(default_factory=dict)
    ranges: dict[fx.Node, tuple[int, int]] = field(default_factory=dict)
    reasons: dict[fx.Node, str] = field(default_factory=dict)

    def codes(self, operand: Any) -> QValue:
        """The integers of an operand; StaysFloat where it has none."""
        value = self.values.get(operand) if isinstance(operand, fx.Node) else None
        if isinstance(value, QValue):
            return value
        what = "is rounded by no quantizer" if value is not None else "is float"
        if operand in self.hidden:
            what = "is a mask"
        raise StaysFloat(f"its operand {_called(operand)} {what}")

    def per_tensor(self, operand: Any) -> QValue:
        """:meth:`codes` with one scale for the whole tensor; StaysFloat where it has more."""
        value = self.codes(operand)
        if not value.is_per_tensor:
            raise StaysFloat(f"its operand {_called(operand)} has more than one scale")
        return value

    def constant(self, operand: Any) -> torch.Tensor | None:
        """The tensor of a ``get_attr`` operand; None for anything else."""
        if not isinstance(operand, fx.Node) or operand.op != "get_attr":
            return None
        tensor = fetch(self.gm, str(operand.target))
        return tensor.detach() if isinstance(tensor, torch.Tensor) else None

    def range_of(self, node: fx.Node) -> tuple[int, int]:
        """Bounds of an integer node: known from how it was made, from its constant or what it moves, or its dtype."""
        if node not in self.ranges:
            tensor = self.constant(node)
            if node.target in KEEP_RANGE or moves_data(node):
                ends = [self.range_of(source) for source in tensor_args(node)]
                self.ranges[node] = min(low for low, _ in ends), max(high for _, high in ends)
            elif tensor is not None:
                self.ranges[node] = (int(tensor.min()), int(tensor.max())) if tensor.numel() else (0, 0)
            else:
                info = torch.iinfo(node.meta["val"].dtype)
                self.ranges[node] = (int(info.min), int(info.max))
        return self.ranges[node]

    def call(
        self, like: fx.Node, target: Callable[..., Any], *args: Any, dtype: torch.dtype, site: str = "", **kwargs: Any
    ) -> fx.Node:
        """A new node in front of ``like``, with its shape and site (or ``site``) and the dtype given."""
        with self.gm.graph.inserting_before(like):
            node = self.gm.graph.call_function(target, args, kwargs)
        node.meta = {"site": site or site_of(like), "path": module_path(like)}
        if isinstance(like.meta.get("val"), torch.Tensor):
            node.meta["val"] = like.meta["val"].detach().to(dtype)
        return node

    def store(self, like: fx.Node, what: str, tensor: torch.Tensor, *, exact: str = "") -> fx.Node:
        """A constant named after the site of ``like`` (or ``exact``), read in front of it."""
        name = exact or unused_name(self.gm, f"{re.sub(r'[/:]', '_', site_of(like))}_{what}")
        put(self.gm, name, tensor)
        with self.gm.graph.inserting_before(like):
            node = self.gm.graph.get_attr(name)
        node.meta["val"] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        return node

    def real(self, value: QValue, node: fx.Node) -> fx.Node:
        """A ``dequantize`` behind the float ``node``, for readers that stay float."""
        after = node.next
        scale: Any = torch.as_tensor(value.scale, dtype=torch.float32)
        site = f"{site_of(node)}/real"
        if value.rows is None:
            factor = self.store(after, "scale", scale, exact=unused_name(self.gm, _attribute(site, "scale")))
        else:
            table = self.store(after, "scale", scale[:, None], exact=unused_name(self.gm, _attribute(site, "scale")))
            rows = BY_NAME["int_embedding"].target
            factor = self.call(after, rows, table, value.rows, dtype=torch.float32, site=f"{site}/scale")
            factor.meta["val"] = value.rows.meta["val"].unsqueeze(-1).to(torch.float32)  # one scale a row
        target = BY_NAME["dequantize"].target
        made = self.call(
            after, target, value.node, factor, value.zero_point, value.axis, dtype=torch.float32, site=site
        )
        made.meta["val"] = node.meta.get("val")
        return made


def _called(operand: Any) -> str:
    if not isinstance(operand, fx.Node):
        return repr(operand)
    return str(operand.target) if operand.op in ("get_attr", "placeholder") else site_of(operand)


def _attribute(site: str, what: str) -> str:
    return f"{re.sub(r'[/:]', '_', site)}_{what}"


def array(tensor: torch.Tensor) -> Array:
    """A constant as a NumPy array."""
    found: Array = tensor.detach().cpu().numpy()
    return found


def float64(tensor: torch.Tensor) -> Array:
    """A scale as float64, exactly."""
    return array(tensor).astype(np.float64)
