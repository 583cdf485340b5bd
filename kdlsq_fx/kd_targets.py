"""Where the teacher's side of a distillation loss comes from: a model that runs, or values stored before (a cache)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import fx, nn

from .compression import Kept
from .errors import ConfigError, InputError
from .graph import output_args
from .kd_losses import sentence_vectors
from .kd_named import Loss
from .model import QuantModel
from .planning import captured
from .tap_plan import OUTPUTS, PREFIX, TapPlan
from .taps import Tap, find_taps, node_at, output_names, token_axes, turned

EOS_SEPARATES = ("albert", "camembert", "mpnet", "roberta", "xlm-roberta")  # their configurations call [SEP] eos


@dataclass(frozen=True)
class Wanted:
    """The teacher's side of one batch: a :class:`Kept` for each tap (of a pooled tap the sentence vectors, (batch,
    width)), and by name the outputs that the loss reads: ``logits``, ``start_logits`` and ``end_logits``."""

    taps: tuple[Kept, ...]
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)


class Targets(Protocol):
    """What a Distiller asks for the teacher's side."""

    def wanted(self, given: dict[str, Any], inputs: dict[str, torch.Tensor]) -> Wanted:
        """The targets of a batch. ``given``: what the caller handed in, where it lies; ``inputs``: the student's inputs
        with defaults filled in, on its device."""

    def move(self, fn: Callable[..., Any], recurse: bool = True) -> None:
        """Follow ``.to(device)``, ``.double()`` and the like of the student."""


class Teacher:
    """A frozen model in eval mode that is run on every batch; what is kept of its hidden states is chosen at once.
    ``checked``: the student's look at a batch serves for it too, whose values then need not come from a GPU a second
    time."""

    def __init__(self, model: QuantModel, plan: TapPlan, loss: Loss, *, checked: bool = False) -> None:
        self.model, self.taps, self.loss, self.checked = model, plan.taps, loss, checked
        self.own = plan.teacher_inputs == "own"
        nodes = [node_at(model.gm, t.teacher, "teacher") for t in plan.taps]
        self.lie = [token_axes(model.gm, node) for node in nodes]
        self.axes = [axes_handed(t, lie) for t, lie in zip(plan.taps, self.lie)]
        compress = loss.compress
        read = compress is not None and compress.reads_attention
        self.scores = attention_behind(model.gm, plan.taps, nodes) if read else {}
        self.graph = with_taps(model.gm, [*nodes, *self.scores.values()])

    @torch.no_grad()
    def wanted(self, given: dict[str, Any], inputs: dict[str, torch.Tensor]) -> Wanted:
        inputs = self.model.fill(self._inputs(given, inputs), values=not self.checked)
        flat, values = self.graph(*(inputs[n] for n in self.model.input_names))
        fields = dict(zip(output_names(self.model), flat))
        outputs = {k: v for k, v in fields.items() if k in OUTPUTS}
        scores = dict(zip(self.scores, values[len(self.taps) :]))
        weight = token_weight(inputs, self.loss.padding)
        kept = (self._kept(i, v, weight, scores.get(i), inputs) for i, v in enumerate(values[: len(self.taps)]))
        return Wanted(tuple(kept), outputs)

    def _inputs(self, given: dict[str, Any], inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
        """What the teacher reads: the student's inputs, or with a plan for two tokenizers its own."""
        own = {k.removeprefix(PREFIX): v for k, v in given.items() if k.startswith(PREFIX) and v is not None}
        if own and not self.own:
            do = f"leave them out; {PREFIX}... is for a teacher of another tokenizer (same_tokenizer=False)"
            raise InputError(f"{PREFIX}{next(iter(own))}: in this plan both models read one batch", do=do)
        if self.own and not own:
            what = f"the teacher has another tokenizer, but the batch has no {PREFIX}{self.model.input_names[0]}"
            do = "tokenize for both (kdlsq_fx.data.Paired), or plan_taps(..., same_tokenizer=True) where it is the same"
            raise InputError(what, do=do)
        if self.own:
            return own
        return {k: v for k, v in {**given, **inputs}.items() if k in self.model.input_names and v is not None}

    def _kept(
        self, tap: int, value: torch.Tensor, weight: torch.Tensor | None, scores: Any, inputs: dict[str, torch.Tensor]
    ) -> Kept:
        compress, kind = self.loss.compress, self.taps[tap].loss
        if kind in ("hidden", "pooled"):
            value = tokens_first(value, self.lie[tap])
        if kind == "pooled":
            return Kept(sentence_vectors(value.float(), inputs.get("attention_mask")))
        if kind != "hidden" or compress is None or compress.whole:
            return Kept(value)
        return compress.select(value, weight, tap=tap, scores=scores, ids=inputs.get("input_ids"))

    def move(self, fn: Callable[..., Any], recurse: bool = True) -> None:
        self.model._apply(fn, recurse)


def separator_of(config: Any) -> int | None:
    """The id of [SEP] by a model's configuration; None where it does not say it (as BERT's)."""
    known = getattr(config, "sep_token_id", None)
    if known is None and getattr(config, "model_type", None) in EOS_SEPARATES:
        known = getattr(config, "eos_token_id", None)
    return known if isinstance(known, int) else None


def token_weight(inputs: dict[str, torch.Tensor], padding: str) -> torch.Tensor | None:
    """(batch, length) floats, 1 where a token is real; None where everything counts."""
    mask = inputs.get("attention_mask")
    return None if padding == "paper" or mask is None or mask.dim() != 2 else (mask != 0).float()


def tokens_first(value: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
    """Hidden states as (batch, length, width), also where a model runs over (batch, width, length)."""
    return value.transpose(1, 2) if turned(axes, value.dim()) else value


def axes_handed(tap: Tap, axes: tuple[int, ...]) -> tuple[int, ...]:
    """Token dimensions of a tap's value as the loss gets it: hidden states lie tokens first, pooled have no tokens."""
    if tap.loss == "pooled":
        return ()
    return (1,) if tap.loss == "hidden" and axes == (2,) else axes


def attention_behind(gm: fx.GraphModule, taps: tuple[Tap, ...], nodes: list[fx.Node]) -> dict[int, fx.Node]:
    """For each hidden tap the attention scores of the block that made it; the first block's for what enters it."""
    found = find_taps(gm).attention
    if not found:
        do = "choose tokens='left', 'right' or 'cls'"
        raise ConfigError("tokens are chosen by attention, but the teacher has none", where="compress", do=do)
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    hidden = [(i, n) for i, n in enumerate(nodes) if taps[i].loss == "hidden"]
    return {i: next((s for s in reversed(found) if order[s] < order[n]), found[0]) for i, n in hidden}


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
        frozen = captured(teacher, qat)
    return frozen.to(qat.device).eval().requires_grad_(False)


class Remembered:
    """A teacher's targets, asked for once a batch although several students read them.

    A batch is known by its tensor of ids; ``keep`` batches are remembered, the oldest goes first.
    """

    def __init__(self, targets: Targets, keep: int = 1) -> None:
        self.targets, self.keep = targets, keep
        self.seen: dict[int, tuple[Any, Wanted]] = {}

    def only(self, taps: Sequence[int]) -> _Some:
        return _Some(self, tuple(taps))

    def wanted(self, given: dict[str, Any], inputs: dict[str, torch.Tensor]) -> Wanted:
        key = next((v for v in given.values() if isinstance(v, torch.Tensor)), next(iter(inputs.values())))
        if id(key) not in self.seen:
            while len(self.seen) >= self.keep:
                self.seen.pop(next(iter(self.seen)))
            self.seen[id(key)] = (key, self.targets.wanted(given, inputs))  # the tensor too: its id stays taken
        return self.seen[id(key)][1]

    def forget(self, keep: int = 1) -> None:
        self.seen.clear()
        self.keep = keep


@dataclass(frozen=True)
class _Some:
    """The targets of some of the taps."""

    of: Remembered
    taps: tuple[int, ...]

    def wanted(self, given: dict[str, Any], inputs: dict[str, torch.Tensor]) -> Wanted:
        whole = self.of.wanted(given, inputs)
        return Wanted(tuple(whole.taps[i] for i in self.taps), whole.outputs)

    def move(self, fn: Any, recurse: bool = True) -> None:
        """The whole Distiller moves the teacher."""
