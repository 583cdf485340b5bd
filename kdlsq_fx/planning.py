"""Finding a tap plan for two networks: their layers by structure, a layer map, projections where widths differ."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx, nn

from .capture import capture
from .errors import ConfigError
from .graph import output_args, site_of
from .layer_maps import LayerMap, layer_pairs
from .matching import match_graphs
from .model import QuantModel, wrap
from .qconfig import QConfig
from .tap_plan import OUTPUTS, Side, TapPlan
from .taps import Found, Tap, find_taps, output_names, shape_of, shape_text, vocabulary, width_of

KINDS = ("hidden", "attention", "pooled")
TOKENS = ("hidden", "attention")
SHARING = ("shared", "per_tap")


def plan_taps(
    student: nn.Module,
    teacher: nn.Module,
    *,
    layer_map: LayerMap = "uniform",
    kinds: Iterable[str] | None = None,
    projections: str = "shared",
    same_tokenizer: bool | None = None,
) -> TapPlan:
    """What a student may learn from a teacher that is another network: another depth, width, family or tokenizer.

    * hidden: layer l of the student from layer map(l) of the teacher. Where the widths differ the student's value goes
      through a trained linear map, student width -> teacher width (TinyBERT's fit_dense).
    * attention: scores of block l from block map(l). With other numbers of heads they are left out: no head of one side
      stands for a head of the other. Block l has none where map(l) has none: layer 0, or a convolution.
    * pooled: the mean of the last hidden state over each side's own tokens.
    * With another tokenizer tokens do not correspond: only pooled taps and the logits of whole sentences are left, and
      the teacher reads inputs of its own.
    * outputs: the logits that both have in one shape.

    What is left out stands in the plan's ``notes``.

    Args:
        student, teacher: QuantModels, or modules that ``prepare_qat`` takes (they are captured, not changed).
        layer_map: see :func:`kdlsq_fx.layer_maps.layer_pairs`.
        kinds: which of hidden, attention, pooled; ConfigError where a network has none of a kind. None: hidden and
            attention where they can be had, pooled across tokenizers.
        projections: ``"shared"``: one map for all hidden taps (TinyBERT, HSK); ``"per_tap"``: one each.
        same_tokenizer: None: taken to be so where both token tables have as many rows. Say True where one table is
            padded, False where two vocabularies happen to be equally large.

    Raises:
        ConfigError: options make no sense; the map names layers that are not there; a kind asked for is not there.
    """
    return _draft(student, teacher, layer_map, kinds, projections, same_tokenizer).plan()


def _draft(
    student: nn.Module,
    teacher: nn.Module,
    layer_map: LayerMap = "uniform",
    kinds: Iterable[str] | None = None,
    projections: str = "shared",
    same_tokenizer: bool | None = None,
) -> Draft:
    if projections not in SHARING:
        raise ConfigError(f"projections={projections!r} is unknown", do=f"use one of {', '.join(SHARING)}")
    asked = None if kinds is None else (kinds,) if isinstance(kinds, str) else tuple(kinds)
    unknown = [k for k in asked or () if k not in KINDS]
    if unknown:
        raise ConfigError(f"there are no {unknown[0]!r} taps to find", do=f"use {', '.join(KINDS)}")
    ours = Network.of(student, None)
    theirs = Network.of(teacher, ours.model)
    shared = ours.side.vocabulary == theirs.side.vocabulary if same_tokenizer is None else same_tokenizer
    draft = Draft(ours, theirs, shared, asked, projections)
    draft.pairs = layer_pairs(layer_map, ours.side.layers, theirs.side.layers) if ours.found.hidden else ()
    for kind in asked if asked is not None else TOKENS if shared else KINDS:
        draft.add(kind)
    return draft


def captured(model: nn.Module, like: QuantModel | None) -> QuantModel:
    """The model as a float graph; one that does not describe its inputs gets the example of ``like``."""
    if isinstance(model, QuantModel):
        return model
    example = like.example if like is not None and getattr(model, "config", None) is None else None
    return wrap(capture(model, example), model, QConfig(rules=(), name="float"))


@dataclass
class Network:
    """One side while a plan is made."""

    model: QuantModel
    found: Found
    side: Side

    @classmethod
    def of(cls, model: nn.Module, like: QuantModel | None) -> Network:
        graph = captured(model, like)
        found = find_taps(graph.gm)
        side = Side(
            name=graph.model_class,
            hidden=tuple(site_of(n) for n in found.hidden),
            attention={site_of(n): found.block_of(n) for n in found.attention},
            first=found.first,
            width=width_of(graph.gm, found.hidden[-1]) if found.hidden else 0,
            heads=heads_of(found.attention[-1]) if found.attention else 0,
            vocabulary=vocabulary(graph.gm, graph.config),
        )
        return cls(graph, found, side)

    def hidden_at(self, layer: int) -> fx.Node | None:
        at = layer - self.side.first
        return self.found.hidden[at] if 0 <= at < len(self.found.hidden) else None

    def attention_at(self, layer: int) -> tuple[fx.Node, ...]:
        """The scores of a block, none where it does not attend, several where it attends several times."""
        return tuple(n for n in self.found.attention if self.side.attention[site_of(n)] == layer)

    def pooled(self) -> fx.Node | None:
        """The last hidden state: the output of that name, else what leaves the last block."""
        named = dict(zip(output_names(self.model), output_args(self.model.gm.graph)))
        last = named.get("last_hidden_state")
        if isinstance(last, fx.Node) and last.op in ("call_function", "call_module"):
            return last
        return self.found.hidden[-1] if self.found.hidden else None


def heads_of(node: fx.Node) -> int:
    shape = shape_of(node)
    return shape[1] or 0 if len(shape) == 4 else 0


@dataclass
class Draft:
    """A plan in the making: taps, the projections they need, and what could not be had."""

    ours: Network
    theirs: Network
    shared: bool
    asked: tuple[str, ...] | None
    sharing: str
    pairs: tuple[tuple[int, int], ...] = ()
    taps: list[Tap] = field(default_factory=list)
    projections: dict[str, tuple[int, int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, kind: str) -> None:
        """The taps of a kind, or a note why there are none."""
        if kind in TOKENS and not self.shared:
            sizes = f"{self.ours.side.vocabulary} and {self.theirs.side.vocabulary} token ids"
            self.notes.append(f"{kind} taps left out: two tokenizers ({sizes}), so tokens do not correspond")
        elif self._is_there(kind):
            getattr(self, f"_{kind}")()

    def _is_there(self, kind: str) -> bool:
        for name, side in (("student", self.ours), ("teacher", self.theirs)):
            if not (side.found.attention if kind == "attention" else side.found.hidden):
                if self.asked is not None:
                    do = f"set {kind}=0, or give a plan=TapPlan(taps=[Tap(...), ...])"
                    raise ConfigError(f"no {kind} taps found in the {name}", do=do)
                self.notes.append(f"{kind} taps left out: none found in the {name}")
                return False
        return True

    def _hidden(self) -> None:
        nodes = [(a, self.ours.hidden_at(a), self.theirs.hidden_at(b)) for a, b in self.pairs]
        there = [(a, x, y) for a, x, y in nodes if x is not None and y is not None]
        if len(there) < len(nodes):
            self.notes.append("layer 0 left out: nothing of the width of a layer enters the first block")
        partners = self._partners([x for _, x, _ in there], [y for _, _, y in there])
        for (layer, x, y), partner in zip(there, partners):
            through = self._projection("hidden", x, y, layer)
            self.taps.append(Tap(student=site_of(x), teacher=partner, loss="hidden", projection=through))

    def _attention(self) -> None:
        a, b = self.ours.side, self.theirs.side
        if a.heads != b.heads:
            self.notes.append(f"attention taps left out: the student has {a.heads} heads, the teacher {b.heads}")
            return
        found = {(x, y): (self.ours.attention_at(x), self.theirs.attention_at(y)) for x, y in self.pairs}
        if any(len(x) != len(y) for x, y in found.values() if x and y):
            self.notes.append("attention taps left out: the blocks of the two attend unequally often")
            return
        flat = [pair for x, y in found.values() for pair in zip(x, y)]
        alone = [f"{layers[0]}<-{layers[1]}" for layers, (x, y) in found.items() if x and not y]
        if alone:
            self.notes.append(f"attention left out at blocks that learn from a layer without any: {', '.join(alone)}")
        partners = self._partners([x for x, _ in flat], [y for _, y in flat])
        self.taps += [Tap(student=site_of(x), teacher=y, loss="attention") for (x, _), y in zip(flat, partners)]

    def _pooled(self) -> None:
        x, y = self.ours.pooled(), self.theirs.pooled()
        if x is not None and y is not None:
            through = self._projection("pooled", x, y, self.ours.side.layers)
            self.taps.append(Tap(student=site_of(x), teacher=site_of(y), loss="pooled", projection=through))

    def _partners(self, ours: list[fx.Node], theirs: list[fx.Node]) -> list[str]:
        """Sites of the teacher: by order; layer by layer as the graphs match where both are equally deep."""
        others = [site_of(n) for n in theirs]
        if any(a != b for a, b in self.pairs) or self.ours.side.layers != self.theirs.side.layers:
            return others
        match = match_graphs(self.ours.model, self.theirs.model)
        partners = [match.partner(site_of(n)) or "" for n in ours]
        return partners if sorted(partners) == sorted(others) else others

    def _projection(self, kind: str, x: fx.Node, y: fx.Node, layer: int) -> str:
        """Name of the projection that a tap goes through, made where it is needed first; "" for equal widths."""
        widths = width_of(self.ours.model.gm, x), width_of(self.theirs.model.gm, y)
        if widths[0] == widths[1]:
            return ""
        name = kind if self.sharing == "shared" or kind == "pooled" else f"{kind}_{layer}"
        if self.projections.setdefault(name, widths) != widths:  # a network whose layers are not all equally wide
            name = f"{name}_{widths[0]}_{widths[1]}"
            self.projections[name] = widths
        return name

    def plan(self) -> TapPlan:
        outputs, lost = compared_outputs(self.ours.model, self.theirs.model, shared=self.shared)
        return TapPlan(
            taps=tuple(self.taps),
            projections=self.projections,
            outputs=outputs,
            teacher_inputs="shared" if self.shared else "own",
            student=self.ours.side,
            teacher=self.theirs.side,
            notes=(*self.notes, *lost),
        )


def compared_outputs(
    student: QuantModel, teacher: QuantModel, *, shared: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The logits that both have in one shape, across tokenizers only those of whole sentences; why others are left."""
    ours, theirs = output_shapes(student), output_shapes(teacher)
    lost = {k: misfit(k, ours, theirs, shared=shared) for k in OUTPUTS if k in ours}
    return tuple(k for k, why in lost.items() if not why), tuple(f"{k} left out: {v}" for k, v in lost.items() if v)


Shapes = dict[str, tuple[int | None, ...]]


def misfit(name: str, ours: Shapes, theirs: Shapes, *, shared: bool) -> str:
    """Why an output of the student cannot be compared with the teacher's; "" where it can."""
    if name not in theirs or ours[name][1:] != theirs[name][1:]:
        found = shape_text(theirs[name]) if name in theirs else "has none"
        return f"the student's shape is {shape_text(ours[name])}, the teacher's {found}"
    if not shared and (name != "logits" or len(ours[name]) != 2):  # (batch, classes) are of whole sentences
        return "one row a token, but the teacher reads tokens of its own"
    return ""


def output_shapes(model: QuantModel) -> Shapes:
    """Name -> shape of the graph's outputs."""
    flat = output_args(model.gm.graph)
    return {n: shape_of(v) for n, v in zip(output_names(model), flat) if isinstance(v, fx.Node)}


def found_plan(qat: QuantModel, teacher: QuantModel, weights: dict[str, float], **options: Any) -> TapPlan:
    """The plan that ``distill`` finds: taps of the losses that have a weight; what it leaves out is warned of. Outputs
    are the student's, so that one which the teacher lacks is refused and not left out."""
    import warnings

    draft = _draft(qat, teacher, kinds=[k for k in KINDS if weights[k]], **options)
    if draft.notes:
        warnings.warn("the tap plan found: " + "; ".join(draft.notes), stacklevel=4)
    return replace(draft.plan(), outputs=None)
