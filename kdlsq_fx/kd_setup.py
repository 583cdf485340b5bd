"""What a student and a teacher must have in common for distillation, and the choice of taps."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import fx, nn

from .errors import ConfigError
from .graph import output_args, site_of
from .matching import Match, match_graphs
from .model import QuantModel
from .taps import Tap, find_taps, node_at, shape_of, vocabulary

PADDING = ("exclude", "paper")


def check_options(qat: Any, teacher: Any, weights: dict[str, float], temperature: float, padding: str) -> None:
    if not isinstance(qat, QuantModel) or qat.stage not in ("float", "qat"):
        found = f"a {qat.stage} model" if isinstance(qat, QuantModel) else f"a {type(qat).__name__}"
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


def given_taps(taps: Iterable[Tap], weights: dict[str, float]) -> tuple[Tap, ...]:
    chosen = tuple(taps)
    wrong = [t for t in chosen if not isinstance(t, Tap)]
    if wrong:
        raise ConfigError(f"{wrong[0]!r} is not a Tap", do='use Tap(student=..., teacher=..., loss="hidden")')
    return tuple(t for t in chosen if weights[t.loss])


def matched_taps(qat: QuantModel, teacher: QuantModel, weights: dict[str, float]) -> tuple[Tap, ...]:
    """Hidden and attention taps of both graphs, paired by the match of the graphs, else by their order."""
    kinds = [k for k in ("hidden", "attention") if weights[k]]
    if not kinds:
        return ()
    ours, theirs = find_taps(qat.gm), find_taps(teacher.gm)
    match = match_graphs(qat, teacher)
    chosen: list[Tap] = []
    for kind in kinds:
        a, b = ours.of(kind), theirs.of(kind)
        if not a or not b:
            side = "student" if not a else "teacher"
            raise ConfigError(f"no {kind} taps found in the {side}", do=f"set {kind}=0, or name taps=[Tap(...), ...]")
        if len(a) != len(b):
            raise ConfigError(
                f"the student has {len(a)} {kind} taps, the teacher {len(b)}",
                where=site_of(a[-1]),
                do=f"say with taps=[Tap(...), ...] which belong together, or set {kind}=0 (layer maps come later)",
            )
        chosen += _pair(kind, a, b, match)
    return tuple(chosen)


def _pair(kind: Any, ours: tuple[fx.Node, ...], theirs: tuple[fx.Node, ...], match: Match) -> list[Tap]:
    """As the match says where it pairs tap with tap, one to one; else by order."""
    sites = [site_of(n) for n in ours]
    others = [site_of(n) for n in theirs]
    partners = [match.partner(s) for s in sites]
    if sorted(p or "" for p in partners) == sorted(others):
        others = [str(p) for p in partners]
    return [Tap(student=a, teacher=b, loss=kind) for a, b in zip(sites, others)]


def check_vocabulary(qat: QuantModel, teacher: QuantModel, taps: tuple[Tap, ...]) -> None:
    ours, theirs = vocabulary(qat.gm, qat.config), vocabulary(teacher.gm, teacher.config)
    if taps and ours and theirs and ours != theirs:
        raise ConfigError(
            f"token-level taps need one vocabulary: the student's has {ours} entries, the teacher's {theirs}",
            where=taps[0].student,
            do="use a teacher of the same tokenizer, or set hidden=0 and attention=0",
        )


def check_shapes(qat: QuantModel, teacher: QuantModel, taps: tuple[Tap, ...]) -> None:
    for tap in taps:
        a = shape_of(node_at(qat.gm, tap.student, "student"))
        b = shape_of(node_at(teacher.gm, tap.teacher, "teacher"))
        if len(a) != len(b) or any(x != y for x, y in zip(a, b) if x is not None and y is not None):
            raise ConfigError(
                f"{tap.loss} tap: the student's value has shape {_text(a)}, the teacher's {_text(b)} ({tap.teacher})",
                where=tap.student,
                do=f"use a teacher of the same width and heads, other taps=, or {tap.loss}=0 (no projections yet)",
            )


def _text(shape: tuple[int | None, ...]) -> str:
    return "(" + ", ".join("?" if s is None else str(s) for s in shape) + ")"


def check_outputs(qat: QuantModel, teacher: QuantModel, weights: dict[str, float], taps: tuple[Tap, ...]) -> None:
    """The outputs that a loss reads exist on both sides and agree; a bare encoder loses its ``logits`` term."""
    ours, theirs = (_shapes(m) for m in (qat, teacher))
    if weights["logits"] and not any(t.loss == "logits" for t in taps):
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
    if weights["pooled"] and not ("last_hidden_state" in ours and "last_hidden_state" in theirs):
        raise ConfigError("pooled needs last_hidden_state, the output of a bare encoder", do="set pooled=0")
    if not any(weights[k] for k in ("gold", "pooled", "logits")) and not taps:
        raise ConfigError("no term is left: there are neither taps nor logits", do="give taps=, or pooled=1")


def output_names(model: QuantModel) -> tuple[str, ...]:
    """Names of the graph's flat outputs; a plain module's first one is called logits where it is (batch, classes)."""
    if model.output_names:
        return model.output_names
    flat = output_args(model.gm.graph)
    first = "logits" if isinstance(flat[0], fx.Node) and len(shape_of(flat[0])) == 2 else "output_0"
    return (first, *(f"output_{i}" for i in range(1, len(flat))))


def _shapes(model: QuantModel) -> dict[str, tuple[int | None, ...]]:
    flat = output_args(model.gm.graph)
    return {n: shape_of(v) for n, v in zip(output_names(model), flat) if isinstance(v, fx.Node)}
