"""Where quantizers stand: which values of a float graph get which spec, and who reads them so (docs/stages.md)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx, nn

from .errors import ConfigError
from .graph import EXACT, behind_dropout, fetch, is_product, moves_data, op_label, output_args, plumbing, root, site_of
from .masks import masked_scores, tokens_there
from .op import is_float, op_of, tensor_args
from .qconfig import QConfig, QSpec, Rule
from .regions import Region, find_regions

MOVES_CODES = ("cat", "gather", "index_select", "pad")  # as long as all operands stand on one grid
SCALES = "scales by a number, a vector or a mask: its operand keeps its codes"
MOVED = "moves the codes that come in"
OWN_FORM = ("masked_softmax", "polynomial_gelu", "masked_mean")  # chosen before training by choose_integer_forms


@dataclass
class Demand:
    """One value to be quantized with one spec, and the (consumer, operand) pairs that read it so."""

    value: fx.Node
    spec: QSpec
    kind: str
    why: str
    uses: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)

    @property
    def is_table(self) -> bool:
        return any(table_of(user) is not None for user, _ in self.uses)

    @property
    def text(self) -> str:
        """What the table of sites says: ``weight:lsq4 per channel``."""
        scales = "per tensor" if self.spec.axis is None else "per row" if self.is_table else "per channel"
        return f"{self.kind}:{self.spec.quantizer}{self.spec.bits} {scales}"


def find_demands(gm: fx.GraphModule, qconfig: QConfig) -> list[Demand]:
    """Every value some rule wants quantized, in graph order; ConfigError where two rules disagree about one."""
    moved = plumbing(gm.graph)
    ops = [n for n in gm.graph.nodes if op_of(n) is not None and not moves_data(n) and n not in moved]
    qconfig.check_matches([(site_of(n), op_label(n)) for n in ops])
    heads = set() if qconfig.heads == "quantized" else _heads(gm)
    found: dict[tuple[object, str], Demand] = {}
    regions = find_regions(gm.graph) if qconfig.placement == "integer" else []
    joined = {n for region in regions if _want_region(region, qconfig, found) for n in region.nodes}
    for node in ops:
        if node in joined:
            continue
        rule = qconfig.find(site_of(node), op_label(node))
        if node in heads and rule is not None and rule.optional:
            node.meta["decision"] = ("float", "head: the papers keep the output layer in floats")
            continue
        if rule is None:
            node.meta["decision"] = ("float", "no rule names it")
        else:
            _want(gm, node, rule, moved, found)
        if op_of(node).name == "dropout" and node.meta["decision"][0] == "float":  # type: ignore[union-attr]
            node.meta["decision"] = ("none", "gone at inference")
    if qconfig.placement == "integer":
        _want_outputs(gm, qconfig, moved, found)
        _tell_integers(gm, ops, moved)
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    return sorted(found.values(), key=lambda d: min(order[u] for u, _ in d.uses))


def _want(
    gm: fx.GraphModule, node: fx.Node, rule: Rule, moved: set[fx.Node], found: dict[tuple[object, str], Demand]
) -> None:
    op = op_of(node)
    operands = tensor_args(node)
    kinds = op.signature.operands  # type: ignore[union-attr]
    if masked_scores(node) is not None:
        node.meta["decision"] = ("float", "adds the attention mask; goes with the softmax")
        return
    if op is not None and op.name == "mul" and not is_product(node):
        node.meta["decision"] = ("float", SCALES)
        return
    got = [op.name] if op is not None and op.name in OWN_FORM else []
    for operand, kind in zip(operands, kinds):
        if kind == "wide" and (masked := masked_scores(operand)) is not None:
            reader, operand = operand, masked[0]  # noqa: PLW2901  (the mask is added behind the quantizer)
        else:
            reader = node
        demand = _demand(gm, operand, kind, rule, moved, on_grid=op_label(node) == "layer_norm")
        if demand is None:
            continue
        key = (_identity(demand.value), "wide" if demand.kind == "wide" else "act")
        known = found.setdefault(key, demand)
        if known.is_table and rule.optional:
            demand = known  # a decoder tied to its table, under a preset: W bits for one, E bits for the other
        if known.spec != demand.spec:
            first = site_of(known.uses[0][0]) if known.uses else site_of(known.value)
            raise ConfigError(
                f"two rules quantize one value differently: {first} wants {known.spec}, {site_of(node)} {demand.spec}",
                where=site_of(demand.value) if demand.value.op != "get_attr" else str(demand.value.target),
                do="give both consumers the same spec, or leave one of them float",
            )
        known.uses.append((reader, operand))
        got.append(demand.text)
    node.meta["decision"] = (", ".join(got) or "float", rule.why or f"rule site={rule.site} op={rule.op}")


def _tell_integers(gm: fx.GraphModule, ops: list[fx.Node], moved: set[fx.Node]) -> None:
    """Say of ops without a quantizer what integers make of them: with the integer placement few of them stay float."""
    known = _unreached(gm.graph)
    for node in ops:
        got, why = node.meta["decision"]
        if got == "float" and node in known:
            node.meta["decision"] = ("none", "a constant: computed once")
        elif got == "float" and _reads_integers(node, moved, known):
            node.meta["decision"] = ("integer", why.replace("no rule names it", MOVED))
        elif got == "float" and why == SCALES:
            node.meta["decision"] = ("float", "one of its operands stays float")


def _reads_integers(node: fx.Node, moved: set[fx.Node], known: set[fx.Node]) -> bool:
    """True where an op without a quantizer of its own will be computed on the integers that come in."""
    op = op_of(node)
    if op is None or masked_scores(node) is not None:
        return any(op_label(user) == "softmax" and user.meta["decision"][0] != "float" for user in node.users)
    if "weight" in op.signature.operands or (op.lower is None and op.name not in (*MOVES_CODES, "layer_norm")):
        return False
    operands = [behind_dropout(a) for a in tensor_args(node) if is_float(a) and tokens_there(a) is None]
    computed = [a for a in operands if a not in known]
    return all(a not in moved and a.meta.get("decision", ("float",))[0] != "float" for a in computed)


def _unreached(graph: fx.Graph) -> set[fx.Node]:
    """What no input reaches: freeze will compute it once."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr" or (node.op == "call_function" and all(a in found for a in node.all_input_nodes)):
            found.add(node)
    return found


def _want_region(region: Region, qconfig: QConfig, found: dict[tuple[object, str], Demand]) -> bool:
    """Quantize what a region reads, once, and mark its nodes: they become one table. False where no rule asks."""
    rules = [qconfig.find(site_of(n), op_label(n)) for n in region.nodes]
    rule = next((r for r in rules if r is not None and r.act is not None and r.wide is None), None)
    if rule is None:
        return False
    spec = rule.spec("act")
    assert spec is not None
    demand = found.setdefault((_identity(region.source), "act"), Demand(region.source, spec, "act", rule.why))
    demand.uses += [(n, region.source) for n in region.nodes if region.source in n.all_input_nodes]
    for node in region.nodes:
        node.meta["curve"] = True
        node.meta["decision"] = (demand.text, f"part of one table, as {site_of(region.last)}")
    return True


def _demand(
    gm: fx.GraphModule, operand: fx.Node, kind: str, rule: Rule, moved: set[fx.Node], *, on_grid: bool = False
) -> Demand | None:
    """``on_grid``: the reader takes no accumulator as it is, but a value with a quantizer."""
    value = root(operand)
    if not is_float(value) or value in moved:
        return None
    if value.op == "get_attr":
        is_weight = kind == "weight" or (kind == "act" and isinstance(fetch(gm, str(value.target)), nn.Parameter))
        spec = rule.spec("weight") if kind == "weight" else rule.spec("act") if is_weight else None
        return Demand(value, spec, "weight", rule.why) if spec is not None else None
    producer = op_of(behind_dropout(value))
    name = producer.name if producer else ""
    if kind in ("act", "prob"):
        kind = "prob" if producer is not None and producer.signature.result == "prob" else "act"
        spec = None if _holds_codes(gm, behind_dropout(value)) else rule.spec(kind)
    elif kind == "wide" and (rule.wide is not None or rule.act is not None):
        exact = _exact(value)
        many = value is not operand and _has_channel_scales(gm, value)
        rounded = many or (on_grid and exact and not _holds_codes(gm, behind_dropout(value)))
        if exact and not rounded:
            return None
        is_wide = name == "add" or rounded
        spec = rule.spec("wide") if is_wide and rule.wide else rule.spec("act") if rule.wide else None
        kind = "wide" if is_wide else "act"
    else:
        return None
    return Demand(value, spec, kind, rule.why) if spec is not None else None


def _holds_codes(gm: fx.GraphModule, value: fx.Node) -> bool:
    """Rows of a table that its rule quantizes with one scale: a product reads their codes as they are."""
    op = op_of(value)
    if op is None or op.name != "embedding":
        return False
    qconfig: QConfig = gm.meta["qconfig"]
    rule = qconfig.find(site_of(value), op_label(value))
    spec = rule.spec("weight") if rule is not None else None
    return spec is not None and spec.axis is None


def _exact(value: fx.Node) -> bool:
    """An accumulator, a product or a look-up, also times a number or a vector: integers with a scale already.

    A sum times a vector (MobileBERT's NoNorm) is still a sum, and rounded once with what is added next.
    """
    value = behind_dropout(value)
    op = op_of(value)
    if op is None or op.name not in ("mul", "div"):
        return op is not None and op.name in EXACT
    operands = tensor_args(value)
    if is_product(value):
        return True
    if len(operands) == 2 and _is_vector(operands[1]):
        scaled = op_of(behind_dropout(operands[0]))
        return _exact(operands[0]) or (scaled is not None and scaled.name == "add")
    return len(operands) == 1 and _exact(operands[0])


def _has_channel_scales(gm: fx.GraphModule, value: fx.Node) -> bool:
    """A product by weights with a scale for each channel: moved, its accumulators stand on no grid that has a name."""
    value = behind_dropout(value)
    qconfig: QConfig = gm.meta["qconfig"]
    rule = qconfig.find(site_of(value), op_label(value)) if op_label(value) in ("linear", "conv1d") else None
    spec = rule.spec("weight") if rule is not None else None
    return spec is not None and spec.axis is not None


def _is_vector(value: fx.Node) -> bool:
    return value.op == "get_attr" and is_float(value) and value.meta["val"].dim() == 1


def _identity(value: fx.Node) -> object:
    """Parameters are one value however many nodes read them."""
    return ("parameter", id(fetch_parameter(value))) if value.op == "get_attr" else value


def fetch_parameter(node: fx.Node) -> torch.Tensor:
    """The tensor that a ``get_attr`` node reads."""
    return fetch(node.graph.owning_module, str(node.target))  # type: ignore[arg-type]


def _want_outputs(
    gm: fx.GraphModule, qconfig: QConfig, moved: set[fx.Node], found: dict[tuple[object, str], Demand]
) -> None:
    """With the integer placement what leaves the graph is quantized too, unless it is an exact accumulator."""
    (out,) = gm.graph.find_nodes(op="output")
    for operand in output_args(gm.graph):
        if not isinstance(operand, fx.Node) or not is_float(operand) or root(operand) in moved:
            continue
        value = root(operand)
        producer = op_of(behind_dropout(value))
        rule = qconfig.find(site_of(value), op_label(value)) if producer else None
        if producer is None or rule is None or producer.name in EXACT:
            continue
        demand = _demand(gm, operand, "act", rule, moved)
        if demand is not None:
            found.setdefault((_identity(demand.value), "act"), demand).uses.append((out, operand))


def _heads(gm: fx.GraphModule) -> set[fx.Node]:
    """Matrix products whose result leaves the graph as it is, unless their weight is an embedding table too."""
    tables = {id(fetch_parameter(t)) for n in gm.graph.nodes if (t := table_of(n)) is not None}
    found = set()
    for value in output_args(gm.graph):
        node = behind_dropout(value) if isinstance(value, fx.Node) else value
        op = op_of(node) if isinstance(node, fx.Node) else None
        if op is None or op.name not in EXACT:
            continue
        weights = [root(o) for o in tensor_args(node)]
        if not any(w.op == "get_attr" and id(fetch_parameter(w)) in tables for w in weights):
            found.add(node)
    return found


def table_of(node: fx.Node) -> fx.Node | None:
    """The parameter whose rows an embedding gathers; None for any other node."""
    op = op_of(node)
    if op is None or op.name != "embedding":
        return None
    source = root(tensor_args(node)[0])
    return source if source.op == "get_attr" else None
