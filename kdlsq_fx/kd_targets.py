"""Where the teacher's side of a distillation loss comes from: a model that runs, or values stored before (a cache)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import fx, nn

from .capture import capture
from .graph import output_args
from .kd_losses import sentence_vectors
from .kd_setup import output_names
from .model import QuantModel, wrap
from .qconfig import QConfig
from .taps import Tap, node_at


@dataclass(frozen=True)
class Kept:
    """What is kept of the teacher's value at one tap.

    ``values``     the value as it is; or (batch, tokens, width) at the kept positions, 0 where a feature was dropped
    ``positions``  int64 (batch, tokens): where in the sequence they stand; None: the value is whole
    ``features``   bool (batch, tokens, width): which features were kept; None: all
    ``real``       float (batch, tokens): 1 for a token that is there, 0 for filling; None where the value is whole
    """

    values: torch.Tensor
    positions: torch.Tensor | None = None
    features: torch.Tensor | None = None
    real: torch.Tensor | None = None


@dataclass(frozen=True)
class Wanted:
    """The teacher's side of one batch: a :class:`Kept` for each tap, and by name the outputs that the loss reads:
    ``logits``, ``start_logits`` and ``end_logits``, ``pooled`` (sentence vectors, (batch, width))."""

    taps: tuple[Kept, ...]
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)


class Targets(Protocol):
    """What a Distiller asks for the teacher's side."""

    def wanted(self, given: dict[str, Any]) -> Wanted:
        """The targets of a batch. ``given``: everything the caller handed in, the student's defaults filled in."""

    def move(self, fn: Callable[..., Any], recurse: bool = True) -> None:
        """Follow ``.to(device)``, ``.double()`` and the like of the student."""


class Teacher:
    """A frozen model in eval mode that is run on every batch. ``checked``: the student's look at a batch serves for it
    too, whose values then need not come from a GPU a second time."""

    def __init__(self, model: QuantModel, taps: tuple[Tap, ...], *, checked: bool = False) -> None:
        self.model, self.checked = model, checked
        self.graph = with_taps(model.gm, [node_at(model.gm, t.teacher, "teacher") for t in taps])

    @torch.no_grad()
    def wanted(self, given: dict[str, Any]) -> Wanted:
        own = {k: v for k, v in given.items() if k in self.model.input_names and v is not None}
        inputs = self.model.fill(own, values=not self.checked)
        flat, values = self.graph(*(inputs[n] for n in self.model.input_names))
        fields = dict(zip(output_names(self.model), flat))
        outputs = {k: v for k, v in fields.items() if k in ("logits", "start_logits", "end_logits")}
        if "last_hidden_state" in fields:
            outputs["pooled"] = sentence_vectors(fields["last_hidden_state"].float(), inputs.get("attention_mask"))
        return Wanted(tuple(Kept(v) for v in values), outputs)

    def move(self, fn: Callable[..., Any], recurse: bool = True) -> None:
        self.model._apply(fn, recurse)


def with_taps(gm: fx.GraphModule, nodes: list[fx.Node]) -> fx.GraphModule:
    """A second graph over the very same parameters and submodules that returns ``(outputs, values of nodes)``."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(gm.graph, copies)
    outputs = tuple(copies[o] if isinstance(o, fx.Node) else o for o in output_args(gm.graph))
    graph.output((outputs, tuple(copies[n] for n in nodes)))
    tapped = fx.GraphModule(gm, graph)
    for store in ("_parameters", "_buffers", "_modules"):  # the stores themselves, so that .to() reaches both graphs
        tapped.__dict__[store] = gm.__dict__[store]
    return tapped


def frozen_teacher(teacher: nn.Module, qat: QuantModel) -> QuantModel:
    """A frozen copy of the teacher as a graph, in eval mode."""
    if isinstance(teacher, QuantModel):
        frozen = copy.copy(teacher)
        frozen.__dict__["_modules"] = dict(teacher._modules)
        gm = copy.deepcopy(teacher.gm)
        gm.meta = dict(teacher.gm.meta)
        for old, new in zip(teacher.gm.graph.nodes, gm.graph.nodes):
            new.meta = dict(old.meta)
        frozen.gm = gm
    else:
        example = qat.example if getattr(teacher, "config", None) is None else None
        frozen = wrap(capture(teacher, example), teacher, QConfig(rules=(), name="teacher"))
    return frozen.eval().requires_grad_(False)
