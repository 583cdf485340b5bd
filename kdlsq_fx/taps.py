"""Taps: values inside a student and a teacher that a distillation loss compares, found in the graphs themselves."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from .blocks import states_between_blocks
from .errors import ConfigError
from .graph import fetch, output_args, plumbing, root, site_of
from .model import QuantModel
from .op import is_float, op_of, tensor_args

TapLoss = Literal["hidden", "attention", "logits", "pooled"]
LOSSES = ("hidden", "attention", "logits", "pooled")
UNSEEN = ("lsq", "bias_grid", "quantize", "dequantize")  # quantizers: they mark a value, they are not one


@dataclass(frozen=True, kw_only=True)
class Tap:
    """One value of the student, the value of the teacher it should equal, and the loss between them.

    ``student, teacher``  sites (``module.path/op``); for ``"attention"`` the value *before* the softmax.
    ``loss``              "hidden": MSE; "attention": MSE where entries <= -100 count as 0; "logits": soft cross-entropy
                          over the last dimension; "pooled": 1 - cosine of the means over each side's tokens.
    ``projection``        name of the trained linear map that the student's value goes through first ("": none);
                          hidden and pooled taps only.
    Shapes are then equal on both sides. Raises ConfigError for another loss or an empty site.
    """

    student: str
    teacher: str
    loss: TapLoss
    projection: str = ""

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ConfigError(f"a tap has no loss {self.loss!r}", do=f"use one of {', '.join(LOSSES)}")
        if not self.student or not self.teacher:
            raise ConfigError(f"{self}: a site is empty", do="give a site of the student and one of the teacher")
        if self.projection and self.loss not in ("hidden", "pooled"):
            what = f"the values of {self.loss} taps have no width to project"
            raise ConfigError(what, where=self.student, do="leave projection out")


@dataclass(frozen=True)
class Found:
    """What one graph offers: ``hidden`` (what enters the first block, then what leaves each block, as Hugging Face's
    ``hidden_states``) and ``attention`` (pre-softmax scores, scaled, mask added), in the order they are computed.

    ``first``: the layer of ``hidden[0]``, 0, or 1 where nothing of that shape enters the first block."""

    hidden: tuple[fx.Node, ...]
    attention: tuple[fx.Node, ...]
    first: int = 0

    def block_of(self, scores: fx.Node) -> int:
        """The block that scores are made in, counted from 1: the one behind the last hidden state before them."""
        if not self.hidden:
            return self.attention.index(scores) + 1
        order = {n: i for i, n in enumerate(scores.graph.nodes)}
        return self.first + sum(order[n] < order[scores] for n in self.hidden)

    def of(self, loss: str) -> tuple[fx.Node, ...]:
        return self.hidden if loss == "hidden" else self.attention

    def report(self) -> str:
        """One line a tap."""
        rows = [(loss, site_of(n)) for loss in ("hidden", "attention") for n in self.of(loss)]
        return "\n".join(f"{loss:10s} {site}" for loss, site in rows) or "no taps"


def find_taps(gm: fx.GraphModule) -> Found:
    """Hidden states and attention scores of a graph of any architecture, by module path and structure.

    Attention: the operand of a softmax over the last dimension of a (batch, heads, query, key) value, that dimension
    being as long as the text where there is an ``attention_mask`` (the kernels of a dynamic convolution are not). A
    block is the call of a member ``X.<number>`` of the list that has such softmaxes in the most members, the innermost
    of several (ALBERT calls one module several times; each call counts); members without attention are blocks too.
    Without any attention it is a member of an outermost list. Its hidden state is the last float value that leaves
    it. Where no path names a block the data flow does (:func:`kdlsq_fx.blocks.states_between_blocks`).
    """
    length = mask_shape(gm)[-1:]
    softmaxes = [n for n in gm.graph.nodes if _is_attention(n, length)]
    scores = tuple(_producer(tensor_args(n)[0]) for n in softmaxes)
    if softmaxes and not any(member_calls(n) for n in softmaxes):
        return Found(tuple(states_between_blocks(gm, softmaxes)), scores)
    moved = plumbing(gm.graph)
    blocks = _blocks(gm.graph, softmaxes)
    outputs = [out for block in blocks if (out := _leaves(block, moved)) is not None]
    entry = _enters(gm.graph, blocks[0], outputs[0], moved) if blocks and outputs else None
    hidden = outputs if entry is None else [entry, *outputs]
    return Found(tuple(hidden), scores, int(entry is None))


def node_at(gm: fx.GraphModule, site: str, side: str) -> fx.Node:
    """The node of a site; ConfigError naming near sites where there is none."""
    import difflib

    by_site = {site_of(n): n for n in gm.graph.nodes if n.op in ("call_function", "call_module")}
    if site in by_site:
        return by_site[site]
    near = difflib.get_close_matches(site, by_site, 3, 0.5) or list(by_site)[:3]
    raise ConfigError(f"the {side} has no site {site!r}", where=site, do=f"near it are {', '.join(near)}")


def shape_of(node: fx.Node) -> tuple[int | None, ...]:
    """Sizes of a value, None where they vary from call to call; () where nothing is known."""
    value = node.meta.get("val")
    return tuple(s if isinstance(s, int) else None for s in value.shape) if isinstance(value, torch.Tensor) else ()


def shape_text(shape: tuple[int | None, ...]) -> str:
    """``(?, 9, 32)``."""
    return "(" + ", ".join("?" if s is None else str(s) for s in shape) + ")"


def token_axes(gm: fx.GraphModule, node: fx.Node) -> tuple[int, ...]:
    """The dimensions of a value (behind the batch) that run over the tokens of the input.

    ConfigError in a graph of fixed sizes where another dimension is as long as a text by chance.
    """
    mask = mask_shape(gm)
    value = node.meta.get("val")
    if len(mask) != 2 or not isinstance(value, torch.Tensor):
        return ()
    axes = tuple(i for i, s in enumerate(value.shape) if i > 0 and str(s) == str(mask[1]))
    if isinstance(mask[1], int) and len(axes) > max(value.dim() - 2, 1):
        what = f"texts have {mask[1]} tokens in this graph, and so have other dimensions of {tuple(value.shape)}"
        raise ConfigError(what, where=site_of(node), do="export it with a dynamic length, or at another one")
    return axes


def mask_shape(gm: fx.GraphModule) -> tuple[Any, ...]:
    """Sizes of the input ``attention_mask``; () where there is none."""
    mask = next((n for n in gm.graph.find_nodes(op="placeholder") if str(n.target) == "attention_mask"), None)
    value = None if mask is None else mask.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def width_of(gm: fx.GraphModule, node: fx.Node) -> int:
    """Features of a hidden state: (batch, length, width), or (batch, width, length) where token_axes says so."""
    shape = shape_of(node)
    return (shape[1 if turned(token_axes(gm, node), len(shape)) else -1] or 0) if shape else 0


def turned(axes: tuple[int, ...], dims: int) -> bool:
    """Whether tokens are the last dimension of a hidden state (SqueezeBERT's blocks)."""
    return axes == (2,) and dims == 3


def output_names(model: QuantModel) -> tuple[str, ...]:
    """Names of the graph's flat outputs; a plain module's first one is called logits where it is (batch, classes)."""
    if model.output_names:
        return model.output_names
    flat = output_args(model.gm.graph)
    first = "logits" if isinstance(flat[0], fx.Node) and len(shape_of(flat[0])) == 2 else "output_0"
    return (first, *(f"output_{i}" for i in range(1, len(flat))))


def _name(node: fx.Node) -> str:
    op = op_of(node)
    return op.name if op else ""


def _producer(node: fx.Node) -> fx.Node:
    """The value itself, looked up through quantizers."""
    while _name(node) in UNSEEN:
        node = tensor_args(node)[0]
    return node


def _is_attention(node: fx.Node, length: tuple[Any, ...]) -> bool:
    """Whether a node is a softmax over keys; ``length``: that of the texts, () where it is not known."""
    if "softmax" not in _name(node) or _name(node).startswith("log"):
        return False
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dim() != 4:
        return False
    if length and str(value.shape[-1]) != str(length[0]):
        return False
    dim = node.args[1] if len(node.args) > 1 and isinstance(node.args[1], int) else node.kwargs.get("dim", -1)
    return dim in (-1, 3) or _name(node) == "masked_softmax"


def member_calls(node: fx.Node) -> list[str]:
    """Module calls around a node that are members of a list (``X.<number>``), outermost first; ``@k``: k-th repeat.

    A member that is entered by a method other than its call shows in the paths of its children only (SqueezeBERT).
    """
    found: dict[str, str] = {}
    for key, (path, *_) in node.meta.get("nn_module_stack", {}).items():
        whole = str(path).partition("@")[0]
        member = re.match(r"(.*\.)?\d+(?=\.|$)", whole)
        if member and (member.group() == whole or member.group() not in found):
            repeat = "".join(str(key).partition("@")[1:]) if member.group() == whole else ""
            found[member.group()] = member.group() + repeat
    return list(found.values())


def _blocks(graph: fx.Graph, softmaxes: list[fx.Node]) -> list[list[fx.Node]]:
    """The nodes of each repeated block, in order."""
    members = {n: member_calls(n) for n in graph.nodes}
    if softmaxes:
        holders = Counter(_list_of(c) for c in {c for n in softmaxes for c in members[n]})
        around = [[_list_of(c) for c in reversed(members[n])] for n in softmaxes]
        lists = {max(found, key=holders.__getitem__) for found in around if found}
    else:
        lists = {_list_of(calls[0]) for calls in members.values() if calls}
    blocks = dict.fromkeys(c for calls in members.values() for c in calls if _list_of(c) in lists)
    return [[n for n in graph.nodes if call in members[n]] for call in blocks]


def _list_of(call: str) -> str:
    """The list that a call's module is a member of: its path without the number."""
    return call.partition("@")[0].rstrip("0123456789")


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Users of a value, looking through quantizers."""
    for user in node.users:
        if _name(user) in UNSEEN:
            yield from _readers(user)
        else:
            yield user


def _is_value(node: fx.Node, moved: set[fx.Node]) -> bool:
    return (
        node.op in ("call_function", "call_module")
        and is_float(node)
        and node not in moved
        and _name(node) not in UNSEEN
        and node.meta["val"].dim() >= 2
    )


def _leaves(block: list[fx.Node], moved: set[fx.Node]) -> fx.Node | None:
    inside = set(block)
    for node in reversed(block):
        if _is_value(node, moved) and any(r not in inside for r in _readers(node)):
            return node
    return None


def _enters(graph: fx.Graph, block: list[fx.Node], like: fx.Node, moved: set[fx.Node]) -> fx.Node | None:
    """What the first block reads: the last value before it that has the shape of what leaves it."""
    inside = set(block)
    shape = [str(s) for s in like.meta["val"].shape]
    before = [n for n in graph.nodes if _is_value(n, moved) and n not in inside]
    for node in reversed(before):
        same = [str(s) for s in node.meta["val"].shape] == shape
        if same and any(r in inside for r in _readers(node)):
            return node
    return None


def vocabulary(gm: fx.GraphModule, config: object) -> int:
    """Rows of the token table: by the configuration, else by the table that ``input_ids`` look up; 0: none."""
    known = getattr(config, "vocab_size", None)
    if known:
        return int(known)
    for node in gm.graph.nodes:
        if _name(node) == "embedding":
            table, ids = (root(a) for a in tensor_args(node)[:2])
            if table.op == "get_attr" and ids.op == "placeholder" and str(ids.target) == "input_ids":
                return int(fetch(gm, str(table.target)).shape[0])
    return 0
