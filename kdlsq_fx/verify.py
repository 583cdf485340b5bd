"""What each stage promises, checked at every pass boundary."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from .errors import CaptureError, VerifyError
from .graph import computes_floats, fetch, root, site_of
from .integer_only import float_nodes
from .op import op_of, tensor_args
from .placement import table_of
from .range_analysis import analyse_ranges

STAGES = ("float", "qat", "qdq", "int")


def verify(gm: fx.GraphModule, *, after_pass: str = "") -> None:
    """Raise VerifyError (CaptureError straight after capture) where ``gm`` breaks a promise of its stage.

    Every stage: each call is a declared op and each site is unique. float: no quantizer. qat: every operand that a
    rule names reads a quantizer, and no quantizer another. qdq: no module is left; scales are finite and positive; a
    dequantize undoes the quantize before it with the same scale and zero point. int: every float op is a listed
    island, and none is left where the graph is marked integer_only; no accumulator and no intermediate of a primitive
    can overflow.
    """
    stage = gm.meta.get("stage")
    if stage not in STAGES:
        raise VerifyError(f"unknown stage {stage!r}", where=after_pass, do=f"one of {', '.join(STAGES)}")
    seen: set[str] = set()
    for node in gm.graph.nodes:
        if node.op not in ("call_function", "call_module"):
            continue
        _declared(node, after_pass)
        site = site_of(node)
        if site in seen:
            raise VerifyError("two nodes have this site", where=site, do=f"give new nodes no site ({after_pass})")
        seen.add(site)
        CHECKS[stage](gm, node, after_pass)
    if stage == "int":
        _check_integers(gm, after_pass)


def _declared(node: fx.Node, after_pass: str) -> None:
    if op_of(node) is not None:
        return
    if after_pass == "capture":
        raise CaptureError(
            f"op {node.target} has no declared meaning",
            where=site_of(node),
            do="declare it (docs/declaring_an_op.md) or replace it in the model",
        )
    raise VerifyError(f"undeclared target {node.target}", where=site_of(node), do=f"pass {after_pass} must not make it")


def _name(node: fx.Node) -> str:
    op = op_of(node)
    return op.name if op else ""


def _check_float(gm: fx.GraphModule, node: fx.Node, after_pass: str) -> None:
    if _name(node) in ("lsq", "quantize", "dequantize"):
        raise VerifyError("a quantizer in a float graph", where=site_of(node), do=f"look at pass {after_pass}")


def _check_qat(gm: fx.GraphModule, node: fx.Node, after_pass: str) -> None:
    for i in node.meta.get("ruled", ()):
        _check_ruled(node, i, after_pass)
    if _name(node) != "lsq":
        return
    source = root(node.args[0])  # type: ignore[arg-type]
    if _name(source) == "lsq":
        raise VerifyError(
            f"a quantizer reads another ({site_of(source)}): the value would be rounded twice",
            where=site_of(node),
            do=f"pass {after_pass} must look the value up through data movers",
        )


def _check_ruled(node: fx.Node, i: int, after_pass: str) -> None:
    """Operand ``i``, which a rule names, comes from a quantizer; a table's rows may be quantized once gathered."""
    operands = tensor_args(node)
    source = root(operands[i]) if i < len(operands) else None
    if source is not None and _name(source) == "lsq":
        return
    if table_of(node) is not None and all(_name(user) == "lsq" for user in node.users):
        return
    raise VerifyError(
        f"a rule quantizes operand {i}, which now reads {'nothing' if source is None else site_of(source)}"
        " in front of its quantizer",
        where=site_of(node),
        do=f"pass {after_pass} must keep the quantizer, or take {i} out of node.meta['ruled']",
    )


def _check_qdq(gm: fx.GraphModule, node: fx.Node, after_pass: str) -> None:
    name = _name(node)
    if node.op == "call_module":
        raise VerifyError("a module is left in a qdq graph", where=site_of(node), do=f"look at pass {after_pass}")
    if name not in ("quantize", "dequantize"):
        return
    scale = fetch(gm, str(node.args[1].target)) if isinstance(node.args[1], fx.Node) else node.args[1]
    tensor = torch.as_tensor(scale)
    if not bool(torch.isfinite(tensor).all()) or not bool((tensor > 0).all()):
        raise VerifyError("a scale is not finite and positive", where=site_of(node), do=f"look at pass {after_pass}")
    if name == "dequantize":
        source = root(node.args[0])  # type: ignore[arg-type]
        if _name(source) == "quantize" and tuple(source.args[1:3]) != tuple(node.args[1:3]):
            raise VerifyError(
                f"the two sides disagree: quantized with {source.args[1:3]}, dequantized with {node.args[1:3]}",
                where=site_of(node),
                do=f"look at pass {after_pass}",
            )


def _check_int(gm: fx.GraphModule, node: fx.Node, after_pass: str) -> None:
    if node.op == "call_module":
        raise VerifyError("a module is left in an int graph", where=site_of(node), do=f"look at pass {after_pass}")
    if computes_floats(node) and site_of(node) not in gm.meta["may_be_float"]:
        raise VerifyError("a float op is no listed island", where=site_of(node), do=f"look at pass {after_pass}")


def _check_integers(gm: fx.GraphModule, after_pass: str) -> None:
    """What only the whole graph shows: that integer_only is true, and that nothing overflows."""
    floats = float_nodes(gm) if gm.meta.get("integer_only") else []
    if floats:
        raise VerifyError(
            f"the graph is said to be integer-only, yet {len(floats)} nodes make floats",
            where=site_of(floats[0]),
            do=f"look at pass {after_pass}",
        )
    broken = analyse_ranges(gm).broken
    if broken:
        raise VerifyError(
            f"{broken[0]} ({len(broken)} such bounds in the graph)",
            where=broken[0].site,
            do=f"an overflow would go unseen: look at pass {after_pass}, or use fewer bits at this site",
        )


CHECKS: dict[str, Callable[[fx.GraphModule, fx.Node, str], None]] = {
    "float": _check_float,
    "qat": _check_qat,
    "qdq": _check_qdq,
    "int": _check_int,
}
