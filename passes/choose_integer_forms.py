"""float: with the integer placement, ops whose integer form is another function get that function before training."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..errors import ConfigError
from ..graph import module_path, op_label, root, site_of
from ..masks import keep_of, masked_mean_of, masked_scores
from ..op import op_of, tensor_args
from ..ops.gelu import polynomial_gelu
from ..ops.int_mean import masked_mean
from ..ops.softmax import masked_softmax
from ..pipeline import graph_pass
from ..qconfig import QConfig


@graph_pass("float")
def choose_integer_forms(gm: fx.GraphModule) -> None:
    """softmax(x + mask) -> masked_softmax(x + mask, keep); (x * m).sum(1) / m.sum(1) -> masked_mean(x, m)

    And gelu(x) -> polynomial_gelu(x) where a rule says so.

    Training then computes what the integers will: probabilities from 10 bits of score, exact zeros at masked keys. The
    site stays, so rules, taps and reports still speak of ``softmax`` and ``gelu``. With the kdlsq placement nothing
    changes: its softmax and GELU are float to the end.
    """
    qconfig: QConfig = gm.meta["qconfig"]
    if qconfig.placement != "integer":
        return
    for node in list(gm.graph.nodes):
        op = op_of(node)
        if op is None or op.name not in ("softmax", "gelu", "div") or node.meta.get("plumbing"):
            continue
        rule = qconfig.find(site_of(node), op_label(node))
        if rule is None or rule.act is None:
            continue
        if op.name == "gelu" and rule.nonlinear == "polynomial":
            _replace(node, polynomial_gelu, (node.args[0],))
        elif op.name == "div" and (mean := masked_mean_of(node)) is not None:
            _mean(node, *mean)
        elif op.name == "softmax":
            _softmax(gm, node, rule.nonlinear or "table")


def _softmax(gm: fx.GraphModule, node: fx.Node, form: str) -> None:
    scores = tensor_args(node)[0]
    keep = None
    ready = [a for a in tensor_args(scores) if root(a).op == "placeholder"] if op_label(scores) == "add" else []
    if ready:
        what = f"the mask {root(ready[0]).target} comes in as numbers to add"
        do = "hand in the mask as 0 and 1 [batch, length]; numbers added to the scores have no place on a grid of codes"
        raise ConfigError(what, where=site_of(node), do=do)
    if masked_scores(scores) is not None:
        keep = keep_of(gm, scores)
        if keep is None:  # a mask nobody can read: the softmax stays float, and the report says why
            node.meta["why_float"] = "its additive mask could not be read back as true and false"
            return
    dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs["dim"]
    if dim in (-1, node.meta["val"].dim() - 1):
        _replace(node, masked_softmax, (scores, keep, -1, form))
    elif keep is None:
        _softmax_along(node, scores, dim, form)
    else:
        node.meta["why_float"] = "it is masked, and runs over a dimension that is not the last"


def _softmax_along(node: fx.Node, scores: fx.Node, dim: int, form: str) -> None:
    """The integers run over the last dimension: the scores are turned in front of them, the probabilities back."""
    transpose, val = torch.ops.aten.transpose.int, node.meta["val"].transpose(dim, -1)
    with node.graph.inserting_before(node):
        rows = node.graph.call_function(transpose, (scores, dim, -1))
        made = node.graph.call_function(masked_softmax, (rows, None, -1, form))
        back = node.graph.call_function(transpose, (made, dim, -1))
    rows.meta = {**node.meta, "val": val, "site": f"{site_of(node)}/rows", "turn": True}
    made.meta = {**node.meta, "val": val}
    back.meta = {**node.meta, "site": f"{site_of(node)}/back", "turn": True}
    node.replace_all_uses_with(back)
    node.graph.erase_node(node)


def _mean(node: fx.Node, x: fx.Node, keys: fx.Node) -> None:
    with node.graph.inserting_before(node):
        keep = node.graph.call_function(torch.ops.aten.ne.Scalar, (keys, 0))
    keep.meta = {"val": keys.meta["val"].to(torch.bool), "path": module_path(node), "plumbing": True}
    _replace(node, masked_mean, (x, keep))


def _replace(node: fx.Node, target: Any, args: tuple[Any, ...]) -> None:
    with node.graph.inserting_before(node):
        new = node.graph.call_function(target, args)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
