"""Which native kernel computes an op of an integer graph: ``RULES``, and how its constants are read from the graph.

A backend keeps its own table of rules; the ops themselves know nothing of it. native_fusions.py joins neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..comparison import CODE_OPS
from ..errors import InputError
from ..graph import fetch, site_of
from ..integer_only import dtype_of
from ..op import BY_NAME, Op, op_of
from ..ranges import INT32_MAX
from . import native_attention as attending
from . import native_kernels as kernels

TERMS = (torch.int8, torch.uint8, torch.int16, torch.int32)


class Keep(Exception):
    """A rule's refusal: torch runs the op, for this reason."""


class Builder:
    """A graph on its way to kernels: int nodes give way to calls of functions that hold their constants."""

    def __init__(self, gm: fx.GraphModule, linear: Callable[..., Any]) -> None:
        self.linear = linear
        graph = fx.Graph()
        copied: dict[fx.Node, fx.Node] = {}
        result = graph.graph_copy(gm.graph, copied)
        graph.output(result)
        self.gm = fx.GraphModule(gm, graph)
        self.kernels: dict[fx.Node, str] = {}

    @property
    def graph(self) -> fx.Graph:
        return self.gm.graph

    def constant(self, node: Any, what: str = "an operand") -> torch.Tensor:
        """The tensor of a ``get_attr`` node; Keep for anything else."""
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            raise Keep(f"{what} is not a constant")
        tensor: torch.Tensor = fetch(self.gm, str(node.target)).detach()
        return tensor

    def number(self, value: Any, what: str) -> int | torch.Tensor:
        """An int, or the vector of a constant."""
        return value if isinstance(value, int) else self.constant(value, what)

    def byte(self, node: Any) -> torch.dtype:
        """The dtype of a node of codes; Keep where they are wider than a byte."""
        dtype = dtype_of(node) if isinstance(node, fx.Node) else None
        if dtype not in kernels.BYTES:
            raise Keep(f"its codes are {str(dtype).removeprefix('torch.')}, not of one byte")
        return dtype

    def call(self, at: fx.Node, run: Callable[..., Any], args: tuple[Any, ...], site: fx.Node, name: str) -> fx.Node:
        """A call of ``run`` in place of ``at``; its result is the codes of ``site``, if that rounds."""
        with self.graph.inserting_before(at):
            node = self.graph.call_function(run, args)
        node.meta = {"site": site_of(site), "rounds": rounds(site)}
        for key in ("val", "type"):
            if key in at.meta:
                node.meta[key] = at.meta[key]
        at.replace_all_uses_with(node)
        self.kernels[node] = name
        return node


def args_of(node: fx.Node, *defaults: Any, size: int = 0) -> list[Any]:
    """The arguments of a node, untyped: their kinds are those of its op. ``defaults``: of the last of its ``size``."""
    missing = max(size - len(node.args), 0)
    return [*node.args, *defaults[len(defaults) - missing :]]


def rounds(node: fx.Node) -> bool:
    op = op_of(node)
    return op is not None and op.name in CODE_OPS


def fixed_of(build: Builder, node: fx.Node) -> kernels.Fixed:
    """The constants of a ``requantize`` node with codes of one byte."""
    multiplier, shift, zero_point, qmin, qmax, *axis = (*args_of(node)[1:], -1)
    _demand_byte(qmin, qmax)
    if not isinstance(multiplier, int) and axis[0] != -1:
        raise Keep("its channels are not the last dimension")
    return kernels.Fixed(
        build.number(multiplier, "its multiplier"), build.number(shift, "its shift"), zero_point, qmin, qmax
    )


def grid_of(build: Builder, node: fx.Node) -> kernels.CodeGrid:
    """The grid of a ``quantize`` node with one scale and codes of one byte."""
    _, scale, zero_point, qmin, qmax = args_of(node)[:5]
    step = build.constant(scale, "its scale")
    _demand_byte(qmin, qmax)
    if step.numel() != 1:
        raise Keep("it has several scales")
    return kernels.CodeGrid(float(step), zero_point, qmin, qmax)


def _demand_byte(qmin: int, qmax: int) -> None:
    if not (qmin >= -128 and qmax <= 127) and not (qmin >= 0 and qmax <= 255):
        raise Keep("its codes take more than a byte")


def linear_of(build: Builder, node: fx.Node, **behind: Any) -> Callable[..., Any]:
    """The kernel of an ``int_linear`` node, with what is behind it."""
    x, weight, bias, zero_point = args_of(node, None, 0, size=4)[:4]
    zero_point = node.kwargs.get("x_zero_point", zero_point)
    codes = build.constant(weight, "its weight")
    if codes.dtype != torch.int8:
        raise Keep(f"its weight is {codes.dtype}, not int8")
    vector = None if bias is None else build.constant(bias, "its bias")
    return build.linear(build.byte(x), codes, vector, zero_point, **behind)


def native_linear(build: Builder, node: fx.Node) -> None:
    build.call(node, linear_of(build, node), (node.args[0],), node, "linear")


def sides_of(build: Builder, node: fx.Node) -> tuple[attending.Side, attending.Side]:
    """The operands of an ``int_matmul`` node."""
    zeros = args_of(node, 0, 0, size=4)[2:4]
    a_zero, b_zero = (node.kwargs.get(f"{s}_zero_point", z) for s, z in zip("ab", zeros))
    return attending.Side(build.byte(node.args[0]), a_zero), attending.Side(build.byte(node.args[1]), b_zero)


def native_matmul(build: Builder, node: fx.Node) -> None:
    a, b = sides_of(build, node)
    checked = _with_length(attending.product(a.dtype, b.dtype, a.zero_point, b.zero_point), node)
    build.call(node, checked, node.args[:2], node, "product")


def _with_length(run: Callable[..., Any], node: fx.Node) -> Callable[..., Any]:
    """The product, after the check of its length that the reference makes too."""
    args: Any = node.kwargs
    a_max, b_max = (int(args.get(k, 255)) for k in ("a_max", "b_max"))
    longest = INT32_MAX // (a_max * b_max)

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        demand_length(a.shape[-1], longest)
        found: torch.Tensor = run(a, b)
        return found

    return product


def demand_length(length: int, longest: int) -> None:
    if length > longest:
        raise InputError(
            f"an inner product of {length} codes can overflow 32 bits", do=f"use sequences of at most {longest}"
        )


def native_requantize(build: Builder, node: fx.Node) -> None:
    build.call(node, kernels.requantize(fixed_of(build, node)), (node.args[0],), node, "requantize")


def native_quantize(build: Builder, node: fx.Node) -> None:
    if len(node.args) > 5 and node.args[5] is not None:
        raise Keep("it has several scales")
    build.call(node, kernels.quantize(grid_of(build, node)), (node.args[0],), node, "quantize")


def whole_of(build: Builder, node: fx.Node) -> tuple[attending.Whole, kernels.CodeGrid]:
    """The constants of an ``int_softmax`` node."""
    _, _, table, multiplier, shift, limit, divider, zero_point, qmin, qmax = args_of(node)
    if table is None:
        raise Keep("its exponential is the polynomial, not the table")
    _demand_byte(qmin, qmax)
    whole = attending.Whole(build.constant(table), multiplier, shift, limit, divider)
    return whole, kernels.CodeGrid(1.0, zero_point, qmin, qmax)


def native_softmax(build: Builder, node: fx.Node) -> None:
    build.call(node, attending.int_softmax(*whole_of(build, node)), node.args[:2], node, "int_softmax")


def norm_of(build: Builder, node: fx.Node) -> kernels.NormCodes:
    """The constants of an ``int_layer_norm`` node."""
    _, gain, offset, fraction, eps, shift, zero_point, qmin, qmax = args_of(node)
    _demand_byte(qmin, qmax)
    vectors = [build.constant(v).contiguous() for v in (gain, offset)]
    return kernels.NormCodes(vectors[0], vectors[1], fraction, eps, shift, zero_point, qmin, qmax)


def native_norm(build: Builder, node: fx.Node) -> None:
    build.call(node, kernels.int_layer_norm(norm_of(build, node)), (node.args[0],), node, "int_layer_norm")


def sum_of(build: Builder, node: fx.Node, norm: kernels.NormCodes | None = None) -> Callable[..., Any]:
    """The kernel of an ``int_add`` node, with the LayerNorm behind it."""
    terms, multipliers, zeros, shift, zero_point, qmin, qmax, *axis = (*args_of(node), -1)
    if len(terms) > kernels.MOST_TERMS:
        raise Keep(f"it adds {len(terms)} terms")
    factors = [build.number(m, "a multiplier") for m in multipliers]
    if any(isinstance(f, torch.Tensor) and (f.dim() != 1 or axis[0] != -1) for f in factors):
        raise Keep("it has scales along a dimension that is not the last")
    if any(dtype_of(t) not in TERMS for t in terms):
        raise Keep("a term takes more than 32 bits")
    dtype = dtype_of(node) or torch.int32
    return kernels.int_add(factors, zeros, shift, zero_point, qmin, qmax, dtype, norm)


def native_sum(build: Builder, node: fx.Node) -> None:
    build.call(node, sum_of(build, node), tuple(args_of(node)[0]), node, "int_add")


Rule = Callable[[Builder, fx.Node], None]
RULES: dict[Op, Rule] = {
    BY_NAME["int_linear"]: native_linear,
    BY_NAME["int_matmul"]: native_matmul,
    BY_NAME["requantize"]: native_requantize,
    BY_NAME["quantize"]: native_quantize,
    BY_NAME["int_softmax"]: native_softmax,
    BY_NAME["int_layer_norm"]: native_norm,
    BY_NAME["int_add"]: native_sum,
}
