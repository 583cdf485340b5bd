"""What a student and a teacher must have in common for distillation: the plan, and whether it fits them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from .compression import Compression
from .errors import ConfigError
from .graph import site_of
from .kd_named import PLANNED, Loss
from .model import QuantModel
from .planning import Shapes, found_plan, misfit, output_shapes
from .tap_plan import OUTPUTS, Side, TapPlan, counted
from .taps import Tap, mask_shape, node_at, shape_of, shape_text, token_axes, vocabulary, width_of

FINDING = tuple(name for name in PLANNED if name != "kinds")  # those of distill are the terms with a weight


def check_options(qat: Any, teacher: Any, loss: Loss) -> None:
    """Student and teacher are such, some term has a weight, and padding can be told."""
    if not isinstance(qat, QuantModel) or qat.stage not in ("float", "qat"):
        found = type(qat).__name__ if not isinstance(qat, QuantModel) else f"a model of stage {qat.stage}"
        raise ConfigError(f"the student must be a qat model, got {found}", do="call prepare_qat first")
    if teacher is not None and not isinstance(teacher, nn.Module):
        raise ConfigError(f"a {type(teacher).__name__} cannot teach", do="pass the float model, an nn.Module")
    if teacher is not None and (teacher is qat or teacher is qat.gm):
        raise ConfigError("the teacher is the student itself", do="pass the float model the student was made from")
    if isinstance(teacher, QuantModel) and teacher.stage == "int":
        raise ConfigError("an int model cannot teach", do="pass the float model or a qat model")
    if not any(loss.weights.values()):
        raise ConfigError("every weight is 0: there is no loss", do="leave one of hidden, attention, logits above 0")
    if loss.padding == "exclude" and len(mask_shape(qat.gm)) > 2:
        what = "padding cannot be told apart: attention_mask was captured as a ready mask, not as (batch, length)"
        raise ConfigError(
            what, where="attention_mask", do="capture it with a mask of zeros and ones, or padding='paper'"
        )


def compared(qat: QuantModel, plan: TapPlan, weights: dict[str, float]) -> tuple[TapPlan, dict[str, float]]:
    """What is left of a plan where terms have no weight, its outputs named; and the weights of the terms it has."""
    plan = plan.only([k for k, v in weights.items() if v])
    if plan.outputs is None:
        tapped = any(t.loss == "logits" for t in plan.taps)
        shapes = output_shapes(qat)
        plan = replace(plan, outputs=() if tapped else tuple(k for k in OUTPUTS if k in shapes))
    there = {"gold", *(t.loss for t in plan.taps), *(["logits"] if plan.outputs else [])}
    return plan, {k: v if k in there else 0.0 for k, v in weights.items()}


def check_stages(loss: Loss, weights: dict[str, float]) -> None:
    """Every stage of the schedule has a term to learn from."""
    for stage, progress in ("first", 0.0), ("second", 1.0):
        if any(v for k, v in weights.items() if loss.counts(k, progress)):
            continue
        if loss.schedule == "joint":
            raise ConfigError("no term is left: there are neither taps nor logits", do="give plan=, or pooled=1")
        left = ", ".join(k for k, v in weights.items() if v) or "none"
        what = f"the {stage} stage has no term to learn from: those with a weight are {left}"
        raise ConfigError(what, where="schedule", do="say schedule='joint', which has one stage")


def check_plan(qat: QuantModel, teacher: QuantModel, plan: TapPlan, compress: Compression | None) -> None:
    """Every tap and output stands on both sides with shapes that agree, projections have their widths, ids mean the
    same."""
    ours, theirs = vocabulary(qat.gm, qat.config), vocabulary(teacher.gm, teacher.config)
    _check_side("student", plan.student, ours)
    _check_side("teacher", plan.teacher, theirs)
    if plan.teacher_inputs is None and ours and theirs and ours != theirs:
        raise ConfigError(
            f"one batch for both needs one vocabulary: the student's has {ours} entries, the teacher's {theirs}",
            where="teacher_inputs",
            do='say "own" where the teacher reads ids of its own, "shared" where one table is only padded',
        )
    own = plan.teacher_inputs == "own"
    for tap in plan.taps:
        a, b = node_at(qat.gm, tap.student, "student"), node_at(teacher.gm, tap.teacher, "teacher")
        if tap.loss in ("hidden", "pooled"):
            tokens = tap.loss == "pooled" or not (compress is None or compress.whole)
            widths = width_of(qat.gm, a), width_of(teacher.gm, b)
            _check_widths(tap, plan, widths, (shape_of(a), shape_of(b)), tokens)
        else:
            _check_shapes(tap, shape_of(a), shape_of(b))
        if tap.loss == "logits" and own and (len(shape_of(a)) != 2 or token_axes(qat.gm, a)):
            what = "a logits tap with one row a token, but the teacher reads tokens of its own"
            raise ConfigError(what, where=tap.student, do="take this tap out of the plan, or set logits=0")
    _check_outputs(plan, output_shapes(qat), output_shapes(teacher))


def _check_side(name: str, side: Side, entries: int) -> None:
    if side.vocabulary and entries and side.vocabulary != entries:
        what = f"the plan was made for a {name} with {side.vocabulary} token ids, this one has {entries}"
        raise ConfigError(what, where=side.name, do="make a plan for these two: plan_taps(student, teacher)")


def _check_widths(
    tap: Tap,
    plan: TapPlan,
    widths: tuple[int, int],
    shapes: tuple[tuple[int | None, ...], tuple[int | None, ...]],
    tokens: bool,
) -> None:
    """``tokens``: the loss takes tokens apart, so the values need a dimension of them."""
    ours, theirs = widths
    a, b = (shape_text(s) for s in shapes)
    told = f"{tap.loss} tap: the student's value has shape {a}, the teacher's {b} ({tap.teacher})"
    if len(shapes[0]) != len(shapes[1]) or (tokens and len(shapes[0]) != 3) or not ours or not theirs:
        raise ConfigError(told, where=tap.student, do="tap two hidden states, (batch, length, width)")
    if not tap.projection and ours != theirs:
        do = f'give the tap a projection, {{"name": [{ours}, {theirs}]}} in the plan; plan_taps does it'
        raise ConfigError(told, where=tap.student, do=do)
    if tap.projection and plan.projections[tap.projection] != (ours, theirs):
        given = "{} -> {}".format(*plan.projections[tap.projection])
        what = f"{told}; its projection {tap.projection} is {given}"
        raise ConfigError(what, where=tap.student, do=f"make the projection [{ours}, {theirs}]")


def _check_shapes(tap: Tap, a: tuple[int | None, ...], b: tuple[int | None, ...]) -> None:
    if len(a) != len(b) or any(x != y for x, y in zip(a, b) if x is not None and y is not None):
        ours, theirs = shape_text(a), f"{shape_text(b)} ({tap.teacher})"
        do = f"take this tap out of the plan, or set {tap.loss}=0: nothing can make these shapes agree"
        what = f"{tap.loss} tap: the student's value has shape {ours}, the teacher's {theirs}"
        raise ConfigError(what, where=tap.student, do=do)


def _check_outputs(plan: TapPlan, ours: Shapes, theirs: Shapes) -> None:
    for name in plan.outputs or ():
        if name not in ours:
            raise ConfigError(f"the student has no output {name!r}", where="outputs", do=f"it has {', '.join(ours)}")
        if why := misfit(name, ours, theirs, shared=plan.teacher_inputs != "own"):
            do = "use a teacher with the same head, take it out of the plan's outputs, or set logits=0"
            raise ConfigError(f"{name}: {why}", where=name, do=do)


def plan_of(
    qat: QuantModel, teacher: QuantModel, weights: dict[str, float], plan: TapPlan | Mapping[str, Any] | None
) -> TapPlan:
    """The plan that was given, or the one that is found with these options."""
    if isinstance(plan, TapPlan):
        return plan
    if not isinstance(plan, Mapping | None):
        do = "use plan_taps(student, teacher) or TapPlan.load(path)"
        raise ConfigError(f"plan is a {type(plan).__name__}", do=do)
    options = dict(plan or {})
    if unknown := sorted(set(options) - set(FINDING)):
        raise ConfigError(f"a plan is not found by {unknown[0]!r}", where="plan", do=f"give {', '.join(FINDING)}")
    return found_plan(qat, teacher, weights, **options)


def upper(qat: QuantModel, plan: TapPlan, compress: Compression | None) -> TapPlan:
    """The plan without the lower hidden taps that a compression in depth leaves out."""
    if compress is None or compress.depth is None:
        return plan
    order = {site_of(n): i for i, n in enumerate(qat.gm.graph.nodes)}
    hidden = sorted((t for t in plan.taps if t.loss == "hidden"), key=lambda t: order[t.student])
    if not hidden:
        what = "compress keeps some of the hidden states, and the plan has no hidden taps"
        do = "leave compress away, or distil from a teacher whose hidden states can be compared: see the plan's notes"
        raise ConfigError(what + (f" ({'; '.join(plan.notes)})" if plan.notes else ""), where="compress", do=do)
    if compress.depth > len(hidden):
        what = f"compress keeps {counted(compress.depth, 'layer')}, the plan has {counted(len(hidden), 'hidden tap')}"
        raise ConfigError(what, do=f"keep at most {len(hidden)}")
    gone = hidden[: -compress.depth]
    return plan.with_taps(t for t in plan.taps if t not in gone)
