"""The reference backend: an integer graph executed in NumPy, op by op, by the meanings the op table gives.

No torch kernel takes part, and float islands compute in float64. It says what the integers mean; other backends are
compared with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from ..comparison import CODE_OPS
from ..errors import InputError, LoweringError
from ..graph import fetch, site_of
from ..op import op_of
from ..ranges import gemm_dtype

Array = NDArray[Any]
CodeHook = Callable[[str, Any], Any]


@dataclass(frozen=True)
class Ref:
    """The result of an earlier step."""

    name: str


@dataclass(frozen=True)
class Step:
    """One op: where its arguments come from, and which values nobody needs after it."""

    name: str
    site: str
    op: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    frees: tuple[str, ...]


class ReferenceModel:
    """An int GraphModule (as lowered, or from ``load_program``) as a list of NumPy steps.

    Called with the graph's inputs by name or in order, NumPy arrays or torch tensors; returns the graph's outputs as
    NumPy arrays. LoweringError when an op of the graph has no NumPy meaning.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self.inputs = tuple(str(n.target) for n in gm.graph.find_nodes(op="placeholder"))
        self._names = tuple(n.name for n in gm.graph.find_nodes(op="placeholder"))
        constants = {n.name: _array(fetch(gm, str(n.target))) for n in gm.graph.find_nodes(op="get_attr")}
        if gm.meta.get("islands"):  # without them the only floats are the results, one product each: float32 everywhere
            constants = {name: _exact(value) for name, value in constants.items()}
        dying = _last_uses(gm.graph)
        calls = [n for n in gm.graph.nodes if n.op in ("call_function", "call_module", "call_method")]
        self.steps = [_step(n, constants, dying.get(n, ())) for n in calls]
        (out,) = gm.graph.find_nodes(op="output")
        self._result = _bound(out.args[0], constants)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self.inputs, args)), **kwargs}
        return self.run(given)

    def run(self, inputs: Mapping[str, Any], hook: CodeHook | None = None) -> Any:
        """Execute; ``hook(site, codes)`` sees what every rounding op made and returns what to go on with."""
        missing, extra = [n for n in self.inputs if n not in inputs], [n for n in inputs if n not in self.inputs]
        if missing or extra:
            raise InputError(f"inputs missing: {missing}, unknown: {extra}", do=f"pass {', '.join(self.inputs)}")
        values: dict[str, Any] = {n: _array(inputs[t]) for n, t in zip(self._names, self.inputs)}
        with np.errstate(all="ignore"):  # infinities and NaN arise silently, as in torch
            for step in self.steps:
                args, kwargs = _resolved(step.args, values), _resolved(step.kwargs, values)
                result = step.function(*args, **kwargs)
                if hook is not None and step.op in CODE_OPS:
                    result = hook(step.site, result)
                values[step.name] = result
                for name in step.frees:
                    del values[name]
        return _as_float32(_resolved(self._result, values))


def _exact(constant: Array) -> Array:
    """Float constants in float64, so that float islands compute in float64: what a code is at a near-tie is then a
    matter of the graph, not of the order in which floats were added."""
    return constant.astype(np.float64) if constant.dtype == np.float32 else constant


def _as_float32(value: Any) -> Any:
    """Results as the model has them."""
    if isinstance(value, tuple):
        return tuple(_as_float32(v) for v in value)
    return value.astype(np.float32) if getattr(value, "dtype", None) == np.float64 else value


def _array(value: Any) -> Any:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def _step(node: fx.Node, constants: dict[str, Array], frees: tuple[str, ...]) -> Step:
    op = op_of(node)
    if op is None or op.numpy is None or node.op != "call_function":
        raise LoweringError(f"{node.target} has no NumPy meaning", where=site_of(node), do="give its op a numpy= form")
    args = list(_bound(node.args, constants))
    kwargs = {k: _bound(v, constants) for k, v in node.kwargs.items()}
    if op.name in ("int_linear", "int_conv1d") and isinstance(args[1], np.ndarray):
        args[1] = args[1].astype(gemm_dtype(kwargs["bound"]))  # once, not at every call; the integers stay the same
    return Step(node.name, site_of(node), op.name, op.numpy, tuple(args), kwargs, frees)


def _bound(arg: Any, constants: dict[str, Array]) -> Any:
    """An argument with constants in place and references to earlier steps."""
    if isinstance(arg, fx.Node):
        return constants[arg.name] if arg.name in constants else Ref(arg.name)
    if isinstance(arg, tuple):
        return tuple(_bound(a, constants) for a in arg)
    if isinstance(arg, list):
        return [_bound(a, constants) for a in arg]
    if isinstance(arg, slice):
        return slice(*(_bound(a, constants) for a in (arg.start, arg.stop, arg.step)))
    return _plain(arg)


def _plain(arg: Any) -> Any:
    """torch dtypes as NumPy's."""
    return np.dtype(str(arg).removeprefix("torch.")) if isinstance(arg, torch.dtype) else arg


def _resolved(arg: Any, values: dict[str, Any]) -> Any:
    if isinstance(arg, Ref):
        return values[arg.name]
    if isinstance(arg, tuple):
        return tuple(_resolved(a, values) for a in arg)
    if isinstance(arg, list):
        return [_resolved(a, values) for a in arg]
    if isinstance(arg, dict):
        return {k: _resolved(v, values) for k, v in arg.items()}
    if isinstance(arg, slice):
        return slice(*(_resolved(a, values) for a in (arg.start, arg.stop, arg.step)))
    return arg


def _last_uses(graph: fx.Graph) -> dict[fx.Node, tuple[str, ...]]:
    """Node -> names of the values that nobody reads after it."""
    seen: set[fx.Node] = set()
    dying: dict[fx.Node, tuple[str, ...]] = {}
    for node in reversed(graph.nodes):
        last = [n for n in node.all_input_nodes if n not in seen and n.op != "get_attr"]
        seen.update(last)
        if node.op == "output":
            continue
        unread = [node] if not node.users and node.op != "get_attr" else []
        if node.op not in ("placeholder", "get_attr"):
            dying[node] = tuple(n.name for n in (*last, *unread))
    return dying
