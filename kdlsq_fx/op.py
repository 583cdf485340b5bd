"""An op is declared once: its float meaning, which operands get quantizers, and its form in every backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from kdlsq_fx.errors import ConfigError
from kdlsq_fx.ranges import Bounds

KINDS = frozenset({"act", "weight", "bias", "wide", "prob", "float", "ids", "mask", "int", "code", "same"})


@dataclass(frozen=True)
class Signature:
    """Operand kinds of the tensor arguments, in schema order, and the kind of the result.

    ``act`` gets an activation quantizer, ``weight`` a weight quantizer, ``bias`` a 32-bit grid derived from the two
    scales, ``wide`` keeps more bits than the user's choice, ``prob`` is an ``act`` known to lie in [0, 1], ``same``
    moves data only, ``code`` is an integer code, ``float ids mask int`` are never quantized.
    """

    operands: tuple[str, ...]
    result: str

    @classmethod
    def parse(cls, text: str) -> Signature:
        """``"act, weight, bias -> act"`` to a Signature; ValueError names an unknown kind."""
        left, arrow, right = text.partition("->")
        operands = tuple(k.strip() for k in left.split(",") if k.strip())
        unknown = [k for k in (*operands, right.strip()) if k not in KINDS]
        if not arrow or unknown:
            raise ValueError(f"signature {text!r}: unknown {unknown or 'form, want `kind, kind -> kind`'}")
        return cls(operands, right.strip())


@dataclass(frozen=True, kw_only=True)
class Op:
    """One ATen overload, own function, or module class, and everything the compiler knows of it.

    ``target``  what stands in the graph; its torch meaning.
    ``sig``     text of a :class:`Signature`.
    ``numpy``   the same arguments with numpy arrays for tensors and numpy dtypes for dtypes -> numpy array(s).
    ``onnx``    ``(g, *args, **kwargs) -> value``; ``g.Gelu(x, approximate="none")`` emits a node (backends/onnx.py).
    ``lower``   ``(lowering, node) -> QValue``: integer form, used by passes/lower.py; None keeps the op a float island.
    ``bounds``  the same arguments with Intervals for tensors -> Bounds (kdlsq_fx/range_analysis.py); ValueError where
                none can be given. None: data movers pass their operand's interval on, others have that of their dtype.
    ``why_float``  the reason printed for the island when ``lower`` is None.
    ``sample``  ``() -> (args, kwargs)``: from it all tests of the op are made.
    """

    name: str
    target: Any
    sig: str
    numpy: Callable[..., Any] | None = None
    onnx: Callable[..., Any] | None = None
    lower: Callable[..., Any] | None = None
    bounds: Callable[..., Bounds] | None = None
    why_float: str = ""
    sample: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]] | None = None

    @property
    def signature(self) -> Signature:
        return Signature.parse(self.sig)


BY_TARGET: dict[Any, Op] = {}
BY_NAME: dict[str, Op] = {}


def declare(op: Op) -> Op:
    """Enter an op into the table. ConfigError for a second op of the same target or name, ValueError for a signature
    of unknown kinds."""
    Signature.parse(op.sig)
    known = BY_TARGET.get(op.target) or BY_NAME.get(op.name)
    if known is not None:
        do = "declare an op once in a process; give an op of another target another name"
        raise ConfigError(f"op {known.name!r} ({known.target}) is declared already", where=op.name, do=do)
    BY_TARGET[op.target] = BY_NAME[op.name] = op
    return op


def op_of(node: fx.Node) -> Op | None:
    """The declared op of a call node; None for placeholders, outputs, constants and undeclared targets."""
    if node.op == "call_function":
        return BY_TARGET.get(node.target)
    if node.op == "call_module":
        module = node.graph.owning_module.get_submodule(str(node.target))  # type: ignore[union-attr]
        return next((BY_TARGET[c] for c in type(module).__mro__ if c in BY_TARGET), None)
    return None


def tensor_args(node: fx.Node) -> list[fx.Node]:
    """The operands a signature speaks of: node-valued arguments in schema order, sizes left out."""
    found: list[fx.Node] = []
    for arg in (*node.args, *node.kwargs.values()):
        parts = arg if isinstance(arg, (list, tuple)) else (arg,)
        found += [a for a in parts if isinstance(a, fx.Node) and is_tensor(a)]
    return found


def is_tensor(node: fx.Node) -> bool:
    """True unless the node is known to be a size (a Python int at run time)."""
    value = node.meta.get("val")
    return not isinstance(value, (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool))


def is_float(node: fx.Node) -> bool:
    """True where the node's value is a floating-point tensor."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()
