"""Bit operations and milliseconds of a family's members, by width and block."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx

from .depth import without
from .family import Family, Member
from .family_search import Array
from .files import read_json, write_json
from .graph import op_label, site_of
from .op import op_of, tensor_args
from .taps import shape_of

PRODUCTS = ("matmul", "bmm")
LATENCY = "latency.json"
LENGTH = 128  # tokens of the text that both are told for


def bit_operations(family: Family, length: int) -> tuple[Array, float, Array]:
    """(by switch and width [S, W], the rest, the rest of each block [B]) for one text of so many tokens: multiply-adds
    times the bits of both factors. Look-ups count as none, float operands as 32 bits."""
    gm = family.student.gm
    nodes = {site_of(n): n for n in gm.graph.nodes if op_of(n) is not None}
    table = np.zeros((len(family.switches), len(family.bits)))
    for i, switch in enumerate(family.switches):
        for site, op, rule in switch.readers:
            if op == "embedding":
                continue
            rows = length if len(shape_of(nodes[site])) > 2 else 1  # a pooler reads one token
            act = rule.act.bits if rule.act is not None else 32
            table[i] += rows * family.weight(i).numel() * act * np.asarray(family.bits)
    each = {site: _product(family, n, length) for site, n in nodes.items() if op_label(n) in PRODUCTS}
    blocks = np.zeros(family.blocks)
    for block in family.removable:
        there = {site_of(n) for n in without(gm, (block,)).graph.nodes}
        blocks[block] = sum(v for site, v in each.items() if site not in there)
    return table, sum(each.values()), blocks


def _product(family: Family, node: fx.Node, length: int) -> float:
    """Bit operations of a product of two activations."""
    rule = family.student.qconfig.find(site_of(node), op_label(node))
    bits = rule.act.bits if rule is not None and rule.act is not None else 32
    out, left = (_sizes(n, length) for n in (node, tensor_args(node)[0]))
    return float(np.prod(out[1:])) * left[-1] * bits**2 if out and left else 0.0


def _sizes(node: fx.Node, length: int) -> list[int]:
    """Sizes of a value for one text of so many tokens: what varies is the batch in front and the length behind."""
    return [s if s is not None else length if i else 1 for i, s in enumerate(shape_of(node))]


def latency(family: Family, in_turn: Callable[[Sequence[Member]], Array]) -> tuple[float, Array]:
    """(milliseconds of the largest member, [B] less without each block): medians over rounds, of differences within a
    round, so that what else the machine does falls on both. Narrow weights run at the speed of int8, so widths do not
    count; blocks of equal work are measured once. ``in_turn``: members -> milliseconds [rounds, members]."""
    work, _, rest = bit_operations(family, LENGTH)
    owner = np.array(family.owner)
    alike: dict[float, list[int]] = {}
    for block in family.removable if family.most_left_out else []:
        alike.setdefault(float(work[owner == block, -1].sum() + rest[block]), []).append(block)
    ms = in_turn([family.largest, *(replace(family.largest, left_out=(same[0],)) for same in alike.values())])
    blocks = np.zeros(family.blocks)
    for same, less in zip(alike.values(), np.median(ms[:, :1] - ms[:, 1:], axis=0)):
        blocks[same] = max(less, 0.0)
    return float(np.median(ms[:, 0])), blocks


def run_in_turn(family: Family, members: Sequence[Member], model: torch.nn.Module, *, seconds: float = 4.0) -> Array:
    """Milliseconds [rounds, members] of one text of ``LENGTH`` tokens as ONNX under ONNX Runtime, on the threads that
    torch uses; every member once a round. ``model``: the float model that members are made from."""
    from .api import export_onnx
    from .evaluation import onnx_runner
    from .timing import Shape, padded, time_in_turn

    with tempfile.TemporaryDirectory() as folder:
        runs: list[Any] = []
        for i, member in enumerate(members):
            path = Path(folder) / f"{i}.onnx"
            export_onnx(family.member(member, model), path)
            runs.append(onnx_runner(path))
        vocab = int(getattr(getattr(model, "config", None), "vocab_size", 1000))
        shape = Shape(1, min(LENGTH, family.student.most_tokens or LENGTH))
        batch: Any = {k: torch.from_numpy(v) for k, v in padded(shape, vocab=vocab).items()}
        return np.array(time_in_turn(runs, batch, seconds=seconds))


def measure_latency(family: Family, model: torch.nn.Module) -> tuple[float, Array]:
    """:func:`latency` under ONNX Runtime on this machine."""
    return latency(family, lambda members: run_in_turn(family, members, model))


def keep_latency(out: Path, ms: tuple[float, Array]) -> None:
    """What :func:`latency` gave, as ``out/latency.json``."""
    write_json(out / LATENCY, {"format": 1, "whole": ms[0], "blocks": ms[1].tolist()})


def read_latency(out: Path) -> tuple[float, Array]:
    """What :func:`keep_latency` wrote."""
    known = read_json(out / LATENCY)
    return known["whole"], np.asarray(known["blocks"], float)
