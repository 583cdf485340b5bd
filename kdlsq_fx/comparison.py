"""``compare``: where two executions of one model differ, site by site, in quantization steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from .errors import ConfigError
from .graph import fetch, put, site_of
from .model import QuantModel
from .op import op_of
from .report import columns
from .run_int import ROUNDING

Array = NDArray[Any]
CodeHook = Callable[[str, Any], Any]
Run = Callable[[Mapping[str, Any], CodeHook], Any]
CODE_OPS = ("quantize", *ROUNDING)  # what a hook sees: every op that rounds to codes


@dataclass
class SiteDiff:
    """One quantizer: how its codes differ, with the codes of all other sites equal (forced), and end to end."""

    site: str
    outputs: int = 0
    off: int = 0
    max_steps: int = 0
    end_off: int = 0
    end_max_steps: int = 0

    @property
    def share(self) -> float:
        """Share of outputs whose code differs although the site was fed the same codes."""
        return self.off / max(self.outputs, 1)

    @property
    def end_share(self) -> float:
        return self.end_off / max(self.outputs, 1)


@dataclass
class OutputDiff:
    """One output of the model, end to end: largest difference, largest value, and rows whose argmax agrees."""

    index: int
    max_abs: float = 0.0
    largest: float = 0.0
    rows: int = 0
    agree: int = 0


@dataclass
class Comparison:
    """What :func:`compare` saw. ``unmatched``: sites that round in one of the two only."""

    sites: dict[str, SiteDiff] = field(default_factory=dict)
    outputs: dict[int, OutputDiff] = field(default_factory=dict)
    unmatched: tuple[str, ...] = ()

    @property
    def max_steps(self) -> int:
        """Largest difference at any site fed the same codes."""
        return max((s.max_steps for s in self.sites.values()), default=0)

    @property
    def max_share(self) -> float:
        """Largest share of differing outputs at any site fed the same codes."""
        return max((s.share for s in self.sites.values()), default=0.0)

    def __str__(self) -> str:
        rows = [
            (s.site, s.outputs, _percent(s.share), s.max_steps, _percent(s.end_share), s.end_max_steps)
            for s in self.sites.values()
        ]
        table = (
            columns(("site", "outputs", "same codes: off", "steps", "end to end: off", "steps"), rows) if rows else ""
        )
        ends = [
            f"output {o.index}: end to end at most {o.max_abs:.3g} apart (largest value {o.largest:.3g}), "
            f"argmax equal on {o.agree} of {o.rows}"
            for o in self.outputs.values()
        ]
        share = _percent(self.max_share)
        worst = f"{len(rows)} sites; fed the same codes at most {self.max_steps} apart, on at most {share}"
        lone = [f"rounds in one only: {', '.join(self.unmatched)}"] if self.unmatched else []
        return "\n".join([t for t in (table, worst, *ends, *lone) if t])


def _percent(share: float) -> str:
    return f"{100 * share:.4f} %"


class HookedInterpreter(fx.Interpreter):
    """Runs a graph; ``hook(site, codes)`` sees the codes of every rounding op and returns what to go on with."""

    def __init__(self, gm: fx.GraphModule, hook: CodeHook) -> None:
        super().__init__(gm)
        self.hook = hook

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        op = op_of(n)
        return self.hook(site_of(n), result) if op is not None and op.name in CODE_OPS else result


def compare(
    a: Any, b: Any, batch: Mapping[str, Any] | Iterable[Mapping[str, Any]], *, exact: bool = True
) -> Comparison:
    """How far ``b`` (an int model, any backend) is from ``a`` (qat or qdq) on a batch, or a list of batches.

    Two measurements: each site fed the codes that ``a`` had there (what the site itself does), and end to end, where
    differences travel. Codes are matched by site.

    Args:
        a, b: a model of ``prepare_qat``, ``freeze_qat`` or ``convert``, a GraphModule, or a ReferenceModel.
        batch: arguments of the model by name; for a GraphModule, of the graph.
        exact: evaluate ``a`` in float64. Its float32 sums carry errors of their own, which reach whole steps where a
            site has 22 bits; False compares with ``a`` as it runs.
    """
    run_a, run_b = _runner(a, exact), _runner(b, False)
    seen = Comparison()
    for one in [batch] if isinstance(batch, Mapping) else batch:
        _compare_batch(seen, run_a, run_b, one)
    return seen


def _compare_batch(seen: Comparison, run_a: Run, run_b: Run, batch: Mapping[str, Any]) -> None:
    recorded: dict[str, Array] = {}
    free: dict[str, Array] = {}
    found: dict[str, Array] = {}

    def keep(store: dict[str, Array]) -> CodeHook:
        def hook(site: str, codes: Any) -> Any:
            store[site] = _array(codes)
            return codes

        return hook

    def force(site: str, codes: Any) -> Any:
        found[site] = _array(codes)
        return _like(recorded[site], codes) if site in recorded else codes

    out_a = run_a(batch, keep(recorded))
    out_b = run_b(batch, keep(free))
    run_b(batch, force)
    seen.unmatched = tuple(sorted({*seen.unmatched, *(recorded.keys() ^ found.keys())}))
    for site in (s for s in recorded if s in found):
        _count(seen.sites.setdefault(site, SiteDiff(site)), recorded[site], found[site], free[site])
    for i, (x, y) in enumerate(zip(_flat(out_a), _flat(out_b), strict=True)):
        _count_output(seen.outputs.setdefault(i, OutputDiff(i)), _array(x), _array(y))


def _count(row: SiteDiff, wanted: Array, forced: Array, free: Array) -> None:
    if wanted.shape != forced.shape:
        raise ConfigError(f"codes of shape {wanted.shape} and {forced.shape}", where=row.site, do="compare one model")
    steps = np.abs(wanted.astype(np.int64) - forced)
    ends = np.abs(wanted.astype(np.int64) - free)
    row.outputs += steps.size
    row.off += int((steps > 0).sum())
    row.max_steps = max(row.max_steps, int(steps.max(initial=0)))
    row.end_off += int((ends > 0).sum())
    row.end_max_steps = max(row.end_max_steps, int(ends.max(initial=0)))


def _count_output(row: OutputDiff, x: Array, y: Array) -> None:
    row.max_abs = max(row.max_abs, float(np.abs(x.astype(np.float64) - y).max(initial=0)))
    row.largest = max(row.largest, float(np.abs(x).max(initial=0)))
    if x.ndim >= 2:
        row.rows += x[..., 0].size
        row.agree += int((x.argmax(-1) == y.argmax(-1)).sum())


def _flat(out: Any) -> list[Any]:
    return list(out) if isinstance(out, (tuple, list)) else [out]


def _array(value: Any) -> Array:
    found: Array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    return found


def _like(codes: Array, made: Any) -> Any:
    """Codes in the container and on the side (torch or NumPy) of those they replace."""
    if isinstance(made, torch.Tensor):
        return torch.from_numpy(np.ascontiguousarray(codes)).to(made.dtype).to(made.device)
    return codes.astype(made.dtype)


def _runner(model: Any, exact: bool) -> Run:
    """``run(batch, hook) -> flat outputs`` for any execution."""
    if isinstance(model, QuantModel):
        own = _frozen(model)
        backend = getattr(own, "reference", None) or getattr(own, "native", None)  # an int model that runs elsewhere
        inner: Run = _runner_of_graph(own.gm, exact) if backend is None else backend.run
        return lambda batch, hook: inner(own.split(**batch)[1], hook)
    if isinstance(model, fx.GraphModule):
        return _runner_of_graph(model, exact)
    if hasattr(model, "run"):
        run: Run = model.run
        return run
    do = "pass a converted model or a GraphModule; for an ONNX file backends.onnx_codes.OnnxCodes (docs/targets.md)"
    raise ConfigError(f"cannot compare a {type(model).__name__}", do=do)


def _frozen(model: QuantModel) -> QuantModel:
    if model.stage != "qat":
        return model
    from .api import freeze_qat

    return freeze_qat(model)


def _runner_of_graph(gm: fx.GraphModule, exact: bool) -> Run:
    own = in_float64(gm) if exact else gm
    names = [str(n.target) for n in own.graph.find_nodes(op="placeholder")]

    def run(batch: Mapping[str, Any], hook: CodeHook) -> Any:
        missing = [n for n in names if n not in batch]
        if missing:
            raise ConfigError(f"the batch lacks {missing}", do=f"pass {', '.join(names)}")
        values = [torch.as_tensor(batch[n]) for n in names]
        with torch.no_grad():
            return HookedInterpreter(own, hook).run(*(_as_float64(v) if exact else v for v in values))

    return run


def exactly(qat: QuantModel) -> QuantModel:
    """The qdq form of a qat (or qdq) model, computing in float64: what its quantizers decide then does not hang on the
    order in which floats are added. Call it like the model itself."""
    own = copy.copy(_frozen(qat))
    own._modules = dict(own._modules)
    own.gm = in_float64(own.gm)
    return own


def in_float64(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy that computes in float64 what ``gm`` computes in float32, on the same weights and scales."""
    own = copy.deepcopy(gm).double()
    own.meta = dict(gm.meta)

    for old, node in zip(gm.graph.nodes, own.graph.nodes):
        node.meta = {k: v for k, v in old.meta.items() if k == "site"}
        if node.op == "call_function":
            node.args = tuple(torch.float64 if a is torch.float32 else a for a in node.args)
            node.kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in node.kwargs.items()}
        if "scale_product" in old.meta:  # a bias: its float32 scale is a rounded product, visible at 22 bits
            x_scale, w_scale = (fetch(own, name) for name in old.meta["scale_product"])
            put(own, str(node.args[1].target), x_scale * w_scale)
    own.recompile()
    return own


def _as_float64(value: torch.Tensor) -> torch.Tensor:
    return value.double() if value.dtype == torch.float32 else value
