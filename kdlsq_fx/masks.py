"""An additive attention mask, read back as the truth it was made from: which keys are there."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .graph import fetch, module_path, moves_data, root
from .op import op_of, tensor_args

aten = torch.ops.aten
LOW = -1e4  # what masks add to a masked key is at or below this; BERT's own code has -10000


def masked_scores(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(scores, mask) where ``node`` adds a mask to scores or fills the masked ones; None for anything else.

    The mask is plumbing: nothing learned flows through it (kdlsq_fx/graph.py).
    """
    op = op_of(node)
    if op is None or op.name not in ("add", "masked_fill"):
        return None
    operands = tensor_args(node)
    plain = [o for o in operands if not o.meta.get("plumbing")]
    hidden = [o for o in operands if o.meta.get("plumbing")]
    if len(plain) != 1 or len(hidden) != 1:
        return None
    if op.name == "masked_fill" and not _is_low(node.args[2]):
        return None
    return plain[0], hidden[0]


def keep_of(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """A bool node, True where ``node`` (:func:`masked_scores`) keeps a key; None where its mask is not understood.

    New nodes stand in front of ``node``. Understood are choices between 0 and a very low number by a bool
    (``where``, ``masked_fill``), data movers, and sums of such masks.
    """
    found = masked_scores(node)
    if found is None:
        return None
    _, mask = found
    if op_of(node).name == "masked_fill":  # type: ignore[union-attr]
        return _not(node, mask)
    return _keep(gm, mask)


def masked_mean_of(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(x, keys) where ``node`` is the mean of ``x`` [batch, length, width] over the tokens that ``keys`` holds.

    ``(x * m).sum(1) / m.sum(1)``, the count held above zero by ``clamp(min=...)`` of at most 1 or not at all (a text
    without tokens then gives 0 where the model gave NaN). ``m`` is the input ``attention_mask``, or a bool, [batch,
    length], behind a cast, an unsqueeze or an expand. None for anything else: other weights than 0 and 1 above all.
    """
    if _name(node) != "div" or len(tensor_args(node)) != 2:
        return None
    total, count = tensor_args(node)
    if _name(count) in ("clamp", "clamp_min"):
        if not _only_above_zero(count):
            return None
        count = count.args[0]  # type: ignore[assignment]
    if _name(total) != "sum" or _name(count) != "sum" or not _sums_tokens(total) or not _sums_tokens(count):
        return None
    product, ones = total.args[0], count.args[0]
    if not isinstance(product, fx.Node) or _name(product) != "mul" or ones not in tensor_args(product):
        return None
    others = [o for o in tensor_args(product) if o is not ones]
    keys = _zero_one(ones)  # type: ignore[arg-type]
    return (others[0], keys) if len(others) == 1 and keys is not None else None


def _sums_tokens(node: fx.Node) -> bool:
    dims = node.args[1] if len(node.args) > 1 else None
    return dims in ([1], (1,), 1, [-2], (-2,)) and not node.kwargs.get("keepdim", False) and len(node.args) < 3


def _only_above_zero(clamp: fx.Node) -> bool:
    low, *rest = (*clamp.args[1:], *clamp.kwargs.values())
    return isinstance(low, (int, float)) and 0 < low <= 1 and all(r is None for r in rest)


def _zero_one(node: fx.Node) -> fx.Node | None:
    """The mask [batch, length] that a float [batch, length, ...] of ones and zeros was cast from; None for weights."""
    while node.meta.get("plumbing") and _name(node) in ("to", "unsqueeze", "expand"):
        node = node.args[0]  # type: ignore[assignment]
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dim() != 2 or not node.meta.get("plumbing"):
        return None
    is_mask = node.op == "placeholder" and str(node.target) == "attention_mask" and not value.is_floating_point()
    return node if is_mask or value.dtype == torch.bool else None


def _name(node: fx.Node) -> str:
    op = op_of(node)
    return op.name if op else ""


def _keep(gm: fx.GraphModule, mask: fx.Node) -> fx.Node | None:
    name = _name(mask)
    if name.startswith("where"):
        return _of_where(gm, mask)
    if name == "masked_fill" and _is_low(mask.args[2]):
        return _also(mask, _keep(gm, mask.args[0]), _not(mask, mask.args[1]))  # type: ignore[arg-type]
    if name == "add" and len(tensor_args(mask)) == 2:
        left, right = (_keep(gm, o) for o in tensor_args(mask))
        return None if left is None or right is None else _also(mask, left, right)
    if name == "full" and _number(gm, mask) == 0:
        return _filled(mask)
    if moves_data(mask):
        source = tensor_args(mask)[0]
        kept = _keep(gm, source)
        return None if kept is None else _moved(mask, source, kept)
    return None


def _of_where(gm: fx.GraphModule, mask: fx.Node) -> fx.Node | None:
    condition, yes, no = mask.args[:3]
    if _number(gm, yes) == 0 and _is_low(_number(gm, no)):
        return condition  # type: ignore[return-value]
    if _number(gm, no) == 0 and _is_low(_number(gm, yes)):
        return _not(mask, condition)  # type: ignore[arg-type]
    return None


def _number(gm: fx.GraphModule, value: Any) -> float | None:
    """The number every element of an operand has, as far as the graph tells."""
    if isinstance(value, (int, float)):
        return float(value)
    if not isinstance(value, fx.Node):
        return None
    if value.op == "get_attr":
        tensor = fetch(gm, str(value.target))
        return float(tensor) if isinstance(tensor, torch.Tensor) and tensor.numel() == 1 else None
    op = op_of(value)
    if op is not None and op.name == "full":
        filled = value.args[2]
        return float(filled) if isinstance(filled, (int, float)) else None
    if op is not None and moves_data(value):
        return _number(gm, tensor_args(value)[0])
    return None


def _is_low(value: Any) -> bool:
    return isinstance(value, (int, float)) and value <= LOW


def _new(like: fx.Node, target: Any, args: tuple[Any, ...], val: Any) -> fx.Node:
    with like.graph.inserting_before(like):
        node = like.graph.call_function(target, args)
    node.meta = {"val": val, "path": module_path(like), "plumbing": True}
    return node


def _not(like: fx.Node, value: fx.Node) -> fx.Node:
    source = op_of(value)
    if source is not None and source.target is aten.bitwise_not.default:  # not not x
        return value.args[0]  # type: ignore[return-value]
    return _new(like, aten.bitwise_not.default, (value,), value.meta["val"])


def _also(like: fx.Node, a: fx.Node | None, b: fx.Node) -> fx.Node | None:
    if a is None:
        return None
    return _new(like, aten.bitwise_and.Tensor, (a, b), like.meta["val"].to(torch.bool))


def _filled(like: fx.Node) -> fx.Node:
    with like.graph.inserting_before(like):
        node = like.graph.node_copy(like)
    node.args = (*like.args[:2], 1, torch.bool)
    node.meta = {"val": like.meta["val"].to(torch.bool), "path": module_path(like), "plumbing": True}
    return node


def _moved(like: fx.Node, source: fx.Node, kept: fx.Node) -> fx.Node:
    with like.graph.inserting_before(like):
        node = like.graph.node_copy(like, lambda n: kept if n is source else n)
    node.meta = {"val": like.meta["val"].to(torch.bool), "path": module_path(like), "plumbing": True}
    return node


def tokens_there(node: Any) -> fx.Node | None:
    """The bool or the input ``attention_mask`` that a float of zeros and ones was made from; None for anything else."""
    op = op_of(node) if isinstance(node, fx.Node) else None
    if op is None or op.name != "to" or not node.meta.get("plumbing"):
        return None
    truth: fx.Node = node.args[0]
    source = root(truth)
    named = source.op == "placeholder" and str(source.target) == "attention_mask"
    return truth if truth.meta["val"].dtype == torch.bool or named else None
