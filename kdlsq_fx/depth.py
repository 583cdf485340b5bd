"""Leaving out encoder blocks: what enters a block takes the place of what leaves it."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable

from torch import fx

from .errors import ConfigError
from .graph import constants, fetch, site_of
from .lsq import Lsq
from .taps import find_taps


def count_blocks(gm: fx.GraphModule) -> int:
    """How many blocks the graph has, as :func:`kdlsq_fx.taps.find_taps` finds them."""
    found = find_taps(gm)
    return len(found.hidden) - 1 + found.first if found.hidden else 0


def leave_out(gm: fx.GraphModule, blocks: Iterable[int]) -> None:
    """block(x) -> x for these blocks, counted from 0, in a float or a qat graph; dead nodes go, modules stay.

    In a qat graph the value keeps its own quantizer: what was read behind the block is read through that of the value
    in front of it, as where the blocks were left out before the quantizers came. ConfigError for a block that is not
    there, or cannot go: it hands on a second value, nothing of its shape enters it, or the two quantizers differ.
    """
    chosen = sorted(set(blocks))
    if not chosen:
        return
    found = find_taps(gm)
    states: list[fx.Node | None] = [*([None] * found.first), *found.hidden]
    total = len(states) - 1 if found.hidden else 0
    if chosen[-1] >= total or chosen[0] < 0:
        what = f"block {chosen[-1] if chosen[0] >= 0 else chosen[0]} cannot be left out: there are {total} blocks"
        raise ConfigError(what, where="left_out", do=f"count from 0 to {total - 1}" if total else "leave none out")
    if len(chosen) == total:
        raise ConfigError(f"all {total} blocks are left out", where="left_out", do="keep one or more")
    value = states[0]
    for block, out in enumerate(states[1:]):
        assert out is not None
        if block not in chosen:
            value = out
        elif value is None:
            raise ConfigError(f"nothing of its width enters block {block}", where=site_of(out), do="keep this block")
        else:
            _bypass(gm, out, value)
    gm.graph.eliminate_dead_code()
    if count_blocks(gm) != total - len(chosen):
        do = "keep them: more than one value leaves one of them"
        raise ConfigError(f"blocks {chosen} cannot be left out", where="left_out", do=do)


def renumbered(blocks: Collection[int], gone: Collection[int]) -> tuple[int, ...]:
    """Numbers of blocks in a graph that lacks the blocks ``gone``, as numbers in the whole one."""
    left = (b for b in itertools.count() if b not in set(gone))
    numbers = list(itertools.islice(left, max(blocks, default=-1) + 1))
    return tuple(numbers[b] for b in sorted(blocks))


def _bypass(gm: fx.GraphModule, out: fx.Node, value: fx.Node) -> None:
    """Let everybody who reads ``out``, a block's output, read ``value``, its input."""
    for own in _quantizers(gm, out):
        spec = fetch(gm, str(own.target)).spec
        twin = next((q for q in _quantizers(gm, value) if fetch(gm, str(q.target)).spec == spec), None)
        if twin is None:
            what = f"what enters the block is not quantized as what leaves it ({spec.quantizer}{spec.bits})"
            raise ConfigError(what, where=site_of(own), do="keep the block, or give both values the same spec")
        for grid in [n for n in gm.graph.find_nodes(op="get_attr") if n.target == own.target]:
            grid.target = twin.target
        own.replace_all_uses_with(twin)
        gm.graph.erase_node(own)
    out.replace_all_uses_with(value)


def _quantizers(gm: fx.GraphModule, value: fx.Node) -> list[fx.Node]:
    return [n for n in value.users if n.op == "call_module" and isinstance(gm.get_submodule(str(n.target)), Lsq)]


def block_parameters(gm: fx.GraphModule) -> list[set[str] | None]:
    """For each block the names of parameters that no other part of the graph reads; None where it cannot go."""
    everything = set(constants(gm.graph))
    found: list[set[str] | None] = []
    for block in range(count_blocks(gm)):
        try:
            found.append(everything - constants(without(gm, (block,)).graph).keys())
        except ConfigError:
            found.append(None)
    return found


def without(gm: fx.GraphModule, blocks: tuple[int, ...]) -> fx.GraphModule:
    """A second graph over the very same parameters and submodules in which these blocks are left out."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    (out,) = gm.graph.find_nodes(op="output")
    graph.graph_copy(gm.graph, copies)
    graph.output(fx.map_arg(out.args[0], copies.__getitem__))
    made = fx.GraphModule(gm, graph)
    made.meta = dict(gm.meta)
    for store in ("_parameters", "_buffers", "_modules"):  # the stores themselves, so that .to() reaches both graphs
        made.__dict__[store] = gm.__dict__[store]
    leave_out(made, blocks)
    made.recompile()
    return made
