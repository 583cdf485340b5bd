"""What a frozen graph need not compute: floats made of constants, and integers that floats make of positions."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import fx

from .graph import fetch, module_path, moves_data, put, site_of, unused_name
from .op import BY_NAME, is_float, op_of, tensor_args
from .ranges import largest_size

LONGEST = 2**20  # tokens, where nothing bounds a text: what a softmax takes (docs/integer_primitives.md)
LARGEST_TABLE = 2**16
CHUNK = 2**16
ARITHMETIC = (
    "add sub rsub mul div div_mode neg abs sign log exp sqrt ceil floor round pow min max minimum maximum clamp to"
)
CHOICES = "where where_scalar_other where_scalar_self where_scalars masked_fill"
COMPARISONS = "lt le gt ge eq ne lt_tensor le_tensor gt_tensor ge_tensor eq_tensor ne_tensor"
LOGIC = "and or bitwise_and bitwise_or bitwise_not logical_and logical_or logical_not"
ELEMENTWISE = frozenset(f"{ARITHMETIC} {CHOICES} {COMPARISONS} {LOGIC}".split())
Ends = tuple[int, int]


def fold_constants(gm: fx.GraphModule) -> None:
    """f(constants) -> a constant, for floats: DeBERTa's normalized relative embeddings, the root of a head's width."""
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or not is_float(node) or moves_data(node) or op_of(node) is None:
            continue
        found = {n: fetch(gm, str(n.target)) for n in node.all_input_nodes if n.op == "get_attr"}
        if not found or len(found) < len(node.all_input_nodes):
            continue
        if all(isinstance(v, torch.Tensor) for v in found.values()):
            node.replace_all_uses_with(_constant(gm, node, "value", _call(node, found)))
            gm.graph.erase_node(node)


def tabulate_positions(gm: fx.GraphModule) -> None:
    """to_int(f(to_float(x))) -> lookup(clamp(x), table) for integers ``x`` of bounded size: buckets of positions

    MPNet and DeBERTa put distances into buckets by a logarithm in floats. The table holds what these float ops give
    for every distance that the captured sizes allow; where it ends in one repeated value, the clamp stands for it.
    """
    source = _sources(gm)
    through_floats: set[fx.Node] = set()
    for node in source:
        if is_float(node) or any(o in through_floats for o in tensor_args(node)):
            through_floats.add(node)
    for node in [n for n in source if n in through_floats and _leaves(n, source)]:
        base = source[node]
        ends = integer_ends(gm, base) if base is not None else None
        if base is not None and ends is not None:
            _tabulate(gm, node, base, ends)
    gm.graph.eliminate_dead_code()


def _sources(gm: fx.GraphModule) -> dict[fx.Node, fx.Node | None]:
    """The one integer tensor that an elementwise node of ids, masks and positions is a function of; None: constant."""
    source: dict[fx.Node, fx.Node | None] = {}
    for node in gm.graph.nodes:
        op = op_of(node)
        if not node.meta.get("plumbing"):
            continue
        scalar = node.op == "get_attr" and node.meta["val"].dim() == 0
        if scalar or (op is not None and op.name == "full" and isinstance(node.args[2], (int, float))):
            source[node] = None
        elif op is not None and op.name in ELEMENTWISE:
            bases = {source.get(o, o) for o in tensor_args(node)} - {None}
            base = next(iter(bases), None)
            if not bases or (len(bases) == 1 and _fits(node, base)):
                source[node] = base
    return source


def _fits(node: fx.Node, base: fx.Node | None) -> bool:
    """True where ``node`` has one element for each of its base's integers."""
    codes = base.meta["val"] if base is not None else None
    if not isinstance(codes, torch.Tensor) or codes.dtype not in (torch.int32, torch.int64):
        return False
    return str(tuple(node.meta["val"].shape)) == str(tuple(codes.shape))


def _leaves(node: fx.Node, source: dict[fx.Node, fx.Node | None]) -> bool:
    """True for an integer that others than the functions of its base read; its size they may have from anywhere."""
    if node.meta["val"].dtype not in (torch.int32, torch.int64):
        return False
    readers = [u for u in node.users if (op := op_of(u)) is None or op.name != "sym_size"]
    return any(source.get(u) is not source[node] for u in readers)


def integer_ends(gm: fx.GraphModule, node: fx.Node) -> Ends | None:
    """The smallest and the largest integer that a tensor of positions can hold, by its sizes; None where unknown."""
    op = op_of(node)
    if node.op == "get_attr":
        tensor = fetch(gm, str(node.target))
        return (int(tensor.min()), int(tensor.max())) if tensor.numel() else None
    if op is None:
        return None
    if op.name == "arange":
        return _ends_of_arange(node)
    inner = [integer_ends(gm, o) for o in tensor_args(node)]
    known = [e for e in inner if e is not None]
    if len(known) < len(inner) or not known:
        return None
    low, high = known[0]
    if moves_data(node):
        return low, high
    if op.name == "neg":
        return -high, -low
    if op.name in ("add", "sub") and "alpha" not in node.kwargs and len(node.args) == 2:
        number = node.args[1]
        other = (number, number) if isinstance(number, int) else known[1] if len(known) == 2 else None
        if other is not None:
            return (low + other[0], high + other[1]) if op.name == "add" else (low - other[1], high - other[0])
    return None


def _ends_of_arange(node: fx.Node) -> Ends | None:
    _, start, end, step, _ = node.args
    size = end.meta.get("val") if isinstance(end, fx.Node) else end
    if not isinstance(start, int) or step != 1 or not isinstance(size, (int, torch.SymInt)):
        return None
    return start, max(largest_size(size, LONGEST) - 1, start)


def _tabulate(gm: fx.GraphModule, node: fx.Node, base: fx.Node, ends: Ends) -> None:
    low, high = ends
    codes = torch.arange(low, high + 1, dtype=base.meta["val"].dtype)
    table = torch.cat([_evaluate(gm, node, {base: part}) for part in codes.split(CHUNK)])
    changes = torch.nonzero(table[1:] != table[:-1])[:, 0]
    first, last = (int(changes[0]), int(changes[-1]) + 1) if len(changes) else (0, 0)
    table, low, high = table[first : last + 1].clone(), low + first, low + last
    if len(table) > LARGEST_TABLE:
        return  # a float function that this many entries do not exhaust stays, and the report names it
    constant = _constant(gm, node, "table", table)
    with gm.graph.inserting_before(node):
        near = gm.graph.call_function(BY_NAME["clamp"].target, (base, low, high))
        made = gm.graph.call_function(BY_NAME["lookup"].target, (near, constant, low))
    for new, val, site in ((near, base.meta["val"], f"{site_of(node)}/near"), (made, node.meta["val"], site_of(node))):
        new.meta = {"val": val, "site": site, "path": module_path(node), "plumbing": True}
    node.replace_all_uses_with(made)
    gm.graph.erase_node(node)


def _evaluate(gm: fx.GraphModule, node: fx.Node, known: dict[fx.Node, torch.Tensor]) -> torch.Tensor:
    """The value of ``node`` where its base has the value in ``known``, by the ops of the graph themselves."""
    if node in known:
        return known[node]
    op = op_of(node)
    if node.op == "get_attr":
        known[node] = fetch(gm, str(node.target)).detach().cpu()
    elif op is not None and op.name == "full":
        known[node] = torch.full((), node.args[2], dtype=node.meta["val"].dtype)  # type: ignore[arg-type]
    else:
        known[node] = _call(node, {n: _evaluate(gm, n, known) for n in node.all_input_nodes})
    return known[node]


def _call(node: fx.Node, values: dict[fx.Node, Any]) -> torch.Tensor:
    target: Any = node.target
    with torch.no_grad():
        made: torch.Tensor = target(
            *fx.node.map_arg(node.args, values.__getitem__), **fx.node.map_arg(node.kwargs, values.__getitem__)
        )
    return made.detach()


def _constant(gm: fx.GraphModule, node: fx.Node, what: str, tensor: torch.Tensor) -> fx.Node:
    name = unused_name(gm, f"{re.sub(r'[/:]', '_', site_of(node))}_{what}")
    put(gm, name, tensor)
    with gm.graph.inserting_before(node):
        new = gm.graph.get_attr(name)
    new.meta = {"val": torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"), "plumbing": True}
    return new
