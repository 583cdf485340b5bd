"""What a student and a teacher must have in common for distillation, and whether a plan fits them."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from .errors import ConfigError
from .model import QuantModel
from .planning import is_of_sentences, output_shapes
from .tap_plan import Side, TapPlan
from .taps import Tap, mask_shape, node_at, shape_of, vocabulary, width_of

PADDING = ("exclude", "paper")


def check_options(qat: Any, teacher: Any, weights: dict[str, float], temperature: float, padding: str) -> None:
    if not isinstance(qat, QuantModel) or qat.stage not in ("float", "qat"):
        found = type(qat).__name__ if not isinstance(qat, QuantModel) else f"a model of stage {qat.stage}"
        raise ConfigError(f"the student must be a qat model, got {found}", do="call prepare_qat first")
    if teacher is not None and not isinstance(teacher, nn.Module):
        raise ConfigError(f"a {type(teacher).__name__} cannot teach", do="pass the float model, an nn.Module")
    if teacher is not None and (teacher is qat or teacher is qat.gm):
        raise ConfigError("the teacher is the student itself", do="pass the float model the student was made from")
    if isinstance(teacher, QuantModel) and teacher.stage == "int":
        raise ConfigError("an int model cannot teach", do="pass the float model or a qat model")
    for name, value in {**weights, "temperature": temperature}.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            raise ConfigError(f"{name}={value!r} is no weight", do="use a finite number, 0 or more")
    if temperature == 0:
        raise ConfigError("temperature=0", do="use a number above 0; 1 is the papers'")
    if not any(weights.values()):
        raise ConfigError("every weight is 0: there is no loss", do="leave one of hidden, attention, logits above 0")
    if padding not in PADDING:
        raise ConfigError(f"padding={padding!r} is unknown", do=f"use one of {', '.join(PADDING)}")
    if padding == "exclude" and len(mask_shape(qat.gm)) > 2:
        what = "padding cannot be told apart: attention_mask was captured as a ready mask, not as (batch, length)"
        raise ConfigError(
            what, where="attention_mask", do="capture it with a mask of zeros and ones, or padding='paper'"
        )


def check_plan(qat: QuantModel, teacher: QuantModel, plan: TapPlan) -> None:
    """Every tap stands on both sides with shapes that agree, projections have their widths, ids mean the same."""
    ours, theirs = vocabulary(qat.gm, qat.config), vocabulary(teacher.gm, teacher.config)
    _check_side("student", plan.student, ours)
    _check_side("teacher", plan.teacher, theirs)
    tokens = [t for t in plan.taps if t.loss in ("hidden", "attention")]
    if plan.teacher_inputs is None and tokens and ours and theirs and ours != theirs:
        raise ConfigError(
            f"token-level taps need one vocabulary: the student's has {ours} entries, the teacher's {theirs}",
            where=tokens[0].student,
            do="use a teacher of the same tokenizer, or plan_taps(..., same_tokenizer=True) where one is only padded",
        )
    for tap in plan.taps:
        a, b = node_at(qat.gm, tap.student, "student"), node_at(teacher.gm, tap.teacher, "teacher")
        if tap.loss in ("hidden", "pooled"):
            _check_widths(tap, plan, width_of(qat.gm, a), width_of(teacher.gm, b), (shape_of(a), shape_of(b)))
        else:
            _check_shapes(tap, shape_of(a), shape_of(b))


def _check_side(name: str, side: Side, entries: int) -> None:
    if side.vocabulary and entries and side.vocabulary != entries:
        what = f"the plan was made for a {name} with {side.vocabulary} token ids, this one has {entries}"
        raise ConfigError(what, where=side.name, do="make a plan for these two: plan_taps(student, teacher)")


def _check_widths(
    tap: Tap, plan: TapPlan, ours: int, theirs: int, shapes: tuple[tuple[int | None, ...], tuple[int | None, ...]]
) -> None:
    a, b = (_text(s) for s in shapes)
    told = f"{tap.loss} tap: the student's value has shape {a}, the teacher's {b} ({tap.teacher})"
    if len(shapes[0]) != len(shapes[1]) or not ours or not theirs:
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
        raise ConfigError(
            f"{tap.loss} tap: the student's value has shape {_text(a)}, the teacher's {_text(b)} ({tap.teacher})",
            where=tap.student,
            do=f"take this tap out of the plan, or set {tap.loss}=0: nothing can make these shapes agree",
        )


def _text(shape: tuple[int | None, ...]) -> str:
    return "(" + ", ".join("?" if s is None else str(s) for s in shape) + ")"


def check_outputs(qat: QuantModel, teacher: QuantModel, weights: dict[str, float], plan: TapPlan) -> None:
    """The outputs that a loss reads exist on both sides and agree; a bare encoder loses its ``logits`` term."""
    ours, theirs = output_shapes(qat), output_shapes(teacher)
    if weights["logits"] and not any(t.loss == "logits" for t in plan.taps):
        wanted = [k for k in ("start_logits", "end_logits", "logits") if k in ours]
        if not wanted:
            weights["logits"] = 0.0
        for name in wanted:
            if name not in theirs or ours[name][1:] != theirs[name][1:]:
                found = _text(theirs[name]) if name in theirs else "none"
                raise ConfigError(
                    f"{name}: the student's shape is {_text(ours[name])}, the teacher's {found}",
                    where=name,
                    do="use a teacher with the same head, or set logits=0",
                )
            if plan.teacher_inputs == "own" and not is_of_sentences(name, ours[name]):
                what = f"{name} are one row a token, but the teacher reads tokens of its own"
                raise ConfigError(what, where=name, do="set logits=0")
    if not any(weights[k] for k in ("gold", "logits")) and not plan.taps:
        raise ConfigError("no term is left: there are neither taps nor logits", do="give plan=, or pooled=1")
