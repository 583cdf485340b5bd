"""Switches: the weights and tables of a qat model whose width can be chosen (family.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from .errors import ConfigError
from .graph import fetch, moves_data, op_label, root, site_of
from .lsq import Lsq
from .model import QuantModel
from .op import op_of
from .qconfig import Rule


@dataclass(frozen=True)
class Switch:
    """A weight whose width is chosen. ``name``: of the parameter; ``quantizer``: the dotted name where the chosen
    quantizer stands; ``readers``: (site, op, rule) of every op that reads it; ``block``: the only block that reads it,
    or None."""

    name: str
    quantizer: str
    readers: tuple[tuple[str, str, Rule], ...]
    block: int | None


def find_switches(qat: QuantModel, own: Sequence[set[str] | None]) -> tuple[Switch, ...]:
    """The weights and tables whose rules give them a width, in the graph's order; ``own``: the blocks' parameters.
    ConfigError where there are none."""
    readers: dict[str, list[fx.Node]] = {}
    names: dict[str, str] = {}
    for node in qat.gm.graph.nodes:
        if node.op != "call_module" or not isinstance(lsq := fetch(qat.gm, str(node.target)), Lsq):
            continue
        if lsq.role == "weight":
            readers.setdefault(str(node.target), []).extend(_readers(node))
            names[str(node.target)] = str(node.target).removesuffix("_lsq")
    found = []
    for quantizer, nodes in readers.items():
        rules = [(site_of(n), op_label(n), qat.qconfig.find(site_of(n), op_label(n))) for n in nodes]
        spec = fetch(qat.gm, quantizer).spec
        if all(rule is not None and rule.spec("weight") == spec for _, _, rule in rules):
            known = tuple((site, op, rule) for site, op, rule in rules if rule is not None)
            block = next((i for i, held in enumerate(own) if names[quantizer] in (held or ())), None)
            found.append(Switch(names[quantizer], quantizer, known, block))
    if not found:
        do = "use a preset such as W8E8A8, or a rule with weight=QSpec(...)"
        raise ConfigError("no weight is quantized, so none has a width to choose", where="qconfig", do=do)
    return tuple(found)


def _readers(node: fx.Node) -> list[fx.Node]:
    """The ops that a weight's quantizer serves: those that read it, or the look-up whose rows it quantizes."""
    source = root(node.args[0])  # type: ignore[arg-type]
    if source.op != "get_attr":
        return [source]
    found: list[fx.Node] = []
    for user in node.users:
        found += _readers_behind(user) if moves_data(user) else [user] if op_of(user) is not None else []
    return found


def _readers_behind(mover: fx.Node) -> list[fx.Node]:
    return [r for u in mover.users for r in (_readers_behind(u) if moves_data(u) else [u])]
