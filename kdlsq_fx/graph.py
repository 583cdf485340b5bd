"""Questions and small edits on one graph: sites, producers, constants. Every pass is written with these."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import torch
from torch import fx, nn

from .op import is_float, op_of, tensor_args

EXACT = ("linear", "matmul", "bmm", "conv1d", "embedding")  # on codes their results are integers: nothing to round


def site_of(node: fx.Node) -> str:
    """``module.path/op``, unique in its graph; the node's own name before sites are assigned."""
    return str(node.meta.get("site", node.name))


def op_label(node: fx.Node) -> str:
    """The op a rule speaks of: what stood at this site in the float graph, whatever a pass put there since."""
    op = op_of(node)
    label = re.sub(r":\d+$", "", str(node.meta["site"]).rpartition("/")[2]) if "site" in node.meta else ""
    return label or (op.name if op else "")


def module_path(node: fx.Node) -> str:
    """Dotted path of the innermost module whose forward made the node ("" for the root)."""
    if (path := node.meta.get("path")) is not None:
        return str(path)
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path = str(stack[-1][0]) if stack else ""
    return re.sub(r"@\d+", "", path) if not path.startswith("_empty") else ""


def assign_sites(graph: fx.Graph) -> None:
    """Give every call node without one a unique site; sites given before stay as they are."""
    taken = {n.meta["site"] for n in graph.nodes if "site" in n.meta}
    count: dict[str, int] = defaultdict(int)
    for node in graph.nodes:
        if node.op not in ("call_function", "call_module") or "site" in node.meta:
            continue
        op = op_of(node)
        path = module_path(node)
        base = f"{path}/{op.name if op else node.name}" if path else (op.name if op else node.name)
        site = base
        while site in taken:
            count[base] += 1
            site = f"{base}:{count[base]}"
        taken.add(site)
        node.meta["site"] = site


def sited(graph: fx.Graph) -> dict[str, fx.Node]:
    """Site -> node for every call node."""
    return {site_of(n): n for n in graph.nodes if n.op in ("call_function", "call_module")}


def moves_data(node: fx.Node) -> bool:
    """True for ops that only move elements of one operand (signature ``same -> same``)."""
    op = op_of(node)
    return op is not None and op.signature.operands[:1] == ("same",) and op.signature.result == "same"


def pads_zeros(node: fx.Node) -> bool:
    """True for a pad with constant zeros."""
    if node.target is not torch.ops.aten.pad.default:
        return False
    mode, value = (*node.args[2:4], *("constant", None)[len(node.args) - 2 :])  # type: ignore[misc]
    return mode == "constant" and not value and not node.kwargs


def root(node: fx.Node) -> fx.Node:
    """The value that ``node`` is made of: the first node upwards that does more than move data and add zeros to it.

    Every grid has a zero, so rounding commutes with a pad of zeros too.
    """
    while moves_data(node) or pads_zeros(node):
        node = tensor_args(node)[0]
    return node


def behind_dropout(node: fx.Node) -> fx.Node:
    """The producer of a value, looking through data movers and dropout (which is gone at inference)."""
    node = root(node)
    while (op := op_of(node)) is not None and op.name == "dropout":
        node = root(tensor_args(node)[0])
    return node


def is_product(node: fx.Node) -> bool:
    """True where ``node`` multiplies two computed floats element by element: no constant, no mask among them."""
    op, operands = op_of(node), tensor_args(node)
    if op is None or op.name != "mul" or len(operands) != 2:
        return False
    return all(is_float(o) and root(o).op != "get_attr" and not root(o).meta.get("plumbing") for o in operands)


def fetch(gm: fx.GraphModule, target: str) -> Any:
    """The attribute a ``get_attr`` node names: a tensor, parameter or module."""
    value: Any = gm
    for part in target.split("."):
        value = getattr(value, part)
    return value


def put(gm: fx.GraphModule, target: str, value: torch.Tensor | nn.Module) -> None:
    """Store a buffer, parameter or module under a dotted name, making the modules on the way."""
    *path, last = target.split(".")
    owner: nn.Module = gm
    for part in path:
        if not hasattr(owner, part):
            owner.add_module(part, nn.Module())
        owner = getattr(owner, part)
    if hasattr(owner, last):
        delattr(owner, last)
    if isinstance(value, nn.Module):
        owner.add_module(last, value)
    elif isinstance(value, nn.Parameter):
        owner.register_parameter(last, value)
    else:
        owner.register_buffer(last, value)


def unused_name(gm: fx.GraphModule, target: str) -> str:
    """``target`` or ``target_k``, whichever names nothing yet."""
    name, k = target, 0
    while _exists(gm, name):
        k += 1
        name = f"{target}_{k}"
    return name


def _exists(gm: fx.GraphModule, target: str) -> bool:
    try:
        fetch(gm, target)
    except AttributeError:
        return False
    return True


def drop_unused(gm: fx.GraphModule) -> None:
    """Forget every parameter, buffer and module that no node of the graph reads."""
    used = {str(n.target) for n in gm.graph.nodes if n.op in ("get_attr", "call_module")}
    for owner_name, owner in list(gm.named_modules(remove_duplicate=False)):
        prefix = f"{owner_name}." if owner_name else ""
        if any(prefix[:i] in used for i, c in enumerate(prefix) if c == "."):
            continue  # a module that is called keeps what it holds
        for own in (owner._parameters, owner._buffers):
            for name in [n for n in own if f"{prefix}{n}" not in used]:
                del own[name]
    for name, module in sorted(gm.named_modules(remove_duplicate=False), key=lambda p: -len(p[0])):
        empty = not (module._modules or module._parameters or module._buffers)
        if name and empty and name not in used:
            parent, _, last = name.rpartition(".")
            gm.get_submodule(parent)._modules.pop(last, None)


def constants(graph: fx.Graph) -> dict[str, fx.Node]:
    """Target -> the first ``get_attr`` node that reads it."""
    found: dict[str, fx.Node] = {}
    for node in graph.find_nodes(op="get_attr"):
        found.setdefault(str(node.target), node)
    return found


def output_args(graph: fx.Graph) -> list[Any]:
    """The values a graph returns, flat."""
    (out,) = graph.find_nodes(op="output")
    args = out.args[0]
    return list(args) if isinstance(args, (list, tuple)) else [args]


def plumbing(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that carry only ids, masks, positions and sizes; they are never quantized and are no float islands."""
    return {n for n in graph.nodes if n.meta.get("plumbing")}


def mark_plumbing(gm: fx.GraphModule) -> None:
    """Find the plumbing of a float graph: nothing learned or measured flows through it.

    Integer inputs and constants (buffers) are plumbing, and so is every call that reads nothing else. Later stages
    keep the marks: there weights are buffers too.
    """
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder":
            found = not (isinstance(value, torch.Tensor) and value.is_floating_point())
        elif node.op == "get_attr":
            found = not isinstance(fetch(gm, str(node.target)), nn.Parameter)
        else:
            found = node.op in ("call_function", "call_module") and all(
                a.meta.get("plumbing") for a in node.all_input_nodes
            )
        node.meta["plumbing"] = found


def computes_floats(node: fx.Node) -> bool:
    """True for a float op of an int graph: not a quantize or dequantize, and no mover of data."""
    op = op_of(node)
    edge = op is not None and op.name in ("quantize", "dequantize", "int_embedding")  # the last: rows of scales
    return op is not None and not edge and not moves_data(node) and is_float(node)


def text(gm: fx.GraphModule) -> str:
    """The graph as stable text, one line a node: ``%name = op(args) | site``. Snapshots and diffs use it."""
    lines = [f"stage {gm.meta.get('stage')}"]
    for node in gm.graph.nodes:
        if node.op == "output":
            lines.append(f"return {node.args[0]}")
            continue
        op = op_of(node)
        what = op.name if op else str(node.target)
        if node.op == "call_module":
            what = f"{what}<{node.target}>"
        args = ", ".join([*(_show(a) for a in node.args), *(f"{k}={_show(v)}" for k, v in node.kwargs.items())])
        if node.op in ("placeholder", "get_attr"):
            lines.append(f"%{node.name} = {node.op} {node.target}")
        else:
            lines.append(f"%{node.name} = {what}({args}) | {site_of(node)}")
    return "\n".join(lines) + "\n"


def _show(arg: Any) -> str:
    if isinstance(arg, fx.Node):
        return f"%{arg.name}"
    if isinstance(arg, (list, tuple)):
        return "[" + ", ".join(_show(a) for a in arg) + "]"
    return f"{arg:.6g}" if isinstance(arg, float) else str(arg)
