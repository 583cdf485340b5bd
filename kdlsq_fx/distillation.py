"""Distillation: the KDLSQ loss between a qat student and a frozen teacher, read at taps inside both graphs."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import kd_losses as losses
from .compression import Kept
from .distill_output import DistillOutput
from .errors import ConfigError, InputError
from .kd_cache import Cache
from .kd_fields import output_axes
from .kd_named import Loss, named_loss
from .kd_setup import check_options, check_plan, check_stages, compared, plan_of, upper
from .kd_targets import (
    Targets,
    Teacher,
    Wanted,
    axes_handed,
    frozen_teacher,
    separator_of,
    token_weight,
    tokens_first,
    with_taps,
)
from .matching import Match, match_graphs
from .model import QuantModel
from .projection import make_projections
from .tap_plan import PREFIX, TapPlan
from .taps import Tap, node_at, output_names, token_axes, vocabulary

__all__ = ["DistillOutput", "Distiller", "distill"]


class Distiller(nn.Module):
    """The student with the distillation loss around it; made by :func:`distill`.

    ``kd(**batch)`` runs both models and returns a :class:`DistillOutput`. ``student`` is the qat model itself;
    ``projections`` are the plan's trained maps, which belong to the training and not to the student: they stand in
    ``kd``'s parameters and state, so give ``param_groups(kd, ...)`` to the optimizer. The teacher is no submodule, so
    it stands in no ``state_dict``, ``parameters`` or checkpoint, keeps eval mode under ``kd.train()``, and follows
    ``kd.to(device)``.
    """

    accepts_loss_kwargs = False  # as QuantModel's: the loss is a mean over the batch
    moves_inputs = True

    def __init__(
        self, student: QuantModel, targets: Targets, plan: TapPlan, weights: dict[str, float], loss: Loss
    ) -> None:
        super().__init__()
        self.student = student
        self.projections = make_projections(plan.projections).to(student.device)
        self.plan, self.weights, self.loss = plan, weights, loss
        self.progress: float | None = None  # the share of the run that is done; what trains says it
        places = [node_at(student.gm, t.student, "student") for t in plan.taps]
        self._lie = [token_axes(student.gm, node) for node in places]
        self._unregistered = (targets, with_taps(student.gm, places))  # in a tuple: no submodules

    @property
    def targets(self) -> Targets:
        """Where the teacher's side of the loss comes from."""
        return self._unregistered[0]

    @property
    def teacher(self) -> QuantModel:
        if not isinstance(self.targets, Teacher):
            do = "distill(qat, teacher) has one in memory"
            raise ConfigError("this student learns from a cache, there is no teacher", do=do)
        return self.targets.model

    @property
    def taps(self) -> tuple[Tap, ...]:
        return self.plan.taps

    @property
    def config(self) -> Any:
        return self.student.config

    @property
    def device(self) -> torch.device:
        return self.student.device

    def match(self) -> Match:
        """Which nodes of the two graphs correspond; ``print(kd.match().report())``."""
        return match_graphs(self.student, self.teacher)

    def report(self) -> str:
        """The plan and the weights of the terms, as text."""
        terms = ", ".join(f"{k} {v:g}" for k, v in self.weights.items())
        loss = self.loss
        more = f"temperature {loss.temperature:g}; padding {loss.padding}; schedule {loss.schedule}"
        if loss.compress is not None:
            more += f"; compress {loss.compress}"
        return f"{self.plan}\nweights: {terms}; {more}"

    def forward(self, *args: Any, **kwargs: Any) -> DistillOutput:
        """Both sides on one batch. InputError where the batch does not fit, or labels are needed and not there.

        ``example_id`` (batch,): the rows' numbers in the data set, where the targets come from a cache.
        ``teacher_input_ids`` and so on: what the teacher reads, where it has another tokenizer.
        """
        more = {k: kwargs.pop(k) for k in list(kwargs) if k == "example_id" or k.startswith(PREFIX)}
        labels, inputs = self.student.split(*args, **kwargs)
        weights = self._weights_now()
        wanted = self.targets.wanted({**kwargs, **more}, inputs)
        _check_rows(wanted, next(iter(inputs.values())).shape[0])
        flat, values = self._unregistered[1](*(inputs[n] for n in self.student.input_names))
        fields = dict(zip(output_names(self.student), flat))
        parts: dict[str, torch.Tensor] = {}
        for name, term in self._terms(values, fields, wanted, weights, inputs, labels):
            parts[name] = parts[name] + term if name in parts else term
        if weights["gold"]:
            self._want_labels(labels, "gold has a weight", "set gold=0")
            parts["gold"] = self.student.pack(flat, labels)["loss"]
        loss = sum((weights[k] * v for k, v in parts.items()), start=torch.zeros((), device=self.device))
        return DistillOutput({"loss": loss, **fields}, {k: v.detach() for k, v in parts.items()})

    def _weights_now(self) -> dict[str, float]:
        """The terms' weights at this point of the run; 0 for those whose stage it is not."""
        if self.loss.schedule == "joint" or not self.training:
            return self.weights
        if self.progress is None:
            do = "train with kdlsq_fx.train.fit, give the Hugging Face Trainer callbacks=[kq.StudentCallback()], "
            do += "or set kd.progress = step / steps before each step of your own loop"
            raise ConfigError("a two-stage loss has to know how much of the run is done", where="schedule", do=do)
        return {k: v if self.loss.counts(k, self.progress) else 0.0 for k, v in self.weights.items()}

    @staticmethod
    def _want_labels(labels: dict[str, Any], why: str, do: str) -> None:
        if not labels:
            raise InputError(f"{why} but the batch has no labels", do=f"pass labels=, or {do}")

    def _terms(
        self,
        values: tuple[torch.Tensor, ...],
        fields: dict[str, torch.Tensor],
        wanted: Wanted,
        weights: dict[str, float],
        inputs: dict[str, torch.Tensor],
        labels: dict[str, Any],
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """(loss, term) of each tap and of each output of the plan."""
        weight, mask = token_weight(inputs, self.loss.padding), inputs.get("attention_mask")
        for tap, lie, value, kept in zip(self.taps, self._lie, values, wanted.taps):
            if weights[tap.loss]:
                ours, axes = self._handed(tap, lie, value, mask), axes_handed(tap, lie)
                yield tap.loss, self._at(tap, axes, ours, kept, weight, labels)
        for name in (self.plan.outputs or ()) if weights["logits"] else ():
            s, t = fields[name], wanted.outputs[name]
            yield "logits", self._logits(s, t, output_axes(name, s), weight, labels)

    def _handed(self, tap: Tap, lie: tuple[int, ...], value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The student's value as the loss gets it: tokens first, pooled, projected."""
        if tap.loss in ("hidden", "pooled"):
            value = tokens_first(value, lie)
        if tap.loss == "pooled":
            value = losses.sentence_vectors(value.float(), mask)
        return self.projections[tap.projection](value) if tap.projection else value

    def _at(
        self,
        tap: Tap,
        axes: tuple[int, ...],
        value: torch.Tensor,
        kept: Kept,
        weight: torch.Tensor | None,
        labels: dict[str, Any],
    ) -> torch.Tensor:
        """The term of one tap."""
        if kept.positions is not None:
            both = self.loss.compress is not None and self.loss.compress.mask == "both"
            return losses.kept_mse(value, kept, both=both)
        if value.shape != kept.values.shape:
            what = f"shapes {tuple(value.shape)} and {tuple(kept.values.shape)} differ"
            raise InputError(what, where=tap.student)
        if tap.loss == "pooled":
            return losses.pooled(value, kept.values)
        if tap.loss == "logits":
            return self._logits(value, kept.values, axes, weight, labels)
        return losses.mse(value, kept.values, weight, axes, losses.MASKED if tap.loss == "attention" else None)

    def _logits(
        self,
        s: torch.Tensor,
        t: torch.Tensor,
        axes: tuple[int, ...],
        weight: torch.Tensor | None,
        labels: dict[str, Any],
    ) -> torch.Tensor:
        """The term at logits of any head; ``axes``: their dimensions that run over tokens."""
        temperature, kind = self.loss.temperature, getattr(self.config, "problem_type", None)
        if s.dim() == 2 and axes:
            return losses.span_cross_entropy(s, t, weight, temperature) * self.loss.span
        if s.dim() == 2 and (kind == "regression" or s.shape[-1] == 1):
            if self.loss.regression == "teacher":
                return losses.mse(s, t)
            self._want_labels(labels, "regression='gold'", "set regression='teacher'")
            return losses.mse(s, labels["labels"].view(s.shape).to(s.dtype))
        if s.dim() == 2 and kind == "multi_label_classification":
            return losses.soft_binary(s, t, temperature)
        return losses.soft_cross_entropy(s, t, weight if 1 in axes else None, temperature)

    def save_pretrained(self, path: str | Path, *args: Any, **kwargs: Any) -> Path:
        """Write the student alone; see :meth:`QuantModel.save_pretrained`."""
        return self.student.save_pretrained(path, *args, **kwargs)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Distiller:
        """``.to``, ``.cuda`` and the like reach the teacher too, though it is no submodule."""
        super()._apply(fn, recurse)
        self.targets.move(fn, recurse)
        return self


def distill(
    qat: QuantModel,
    teacher: nn.Module | QuantModel | None = None,
    *,
    loss: str | Loss = "kdlsq",
    cache: str | Path | Cache | None = None,
    plan: TapPlan | Mapping[str, Any] | None = None,
    **changes: Any,
) -> Distiller:
    """Put a distillation loss around ``qat``; its targets come from a running teacher, or from a cache of one.

    ``loss = hidden * L_hid + attention * L_att + logits * L_pred + gold * L_gt + pooled * L_vec``; a term of weight 0
    costs nothing.

    * ``L_hid``: sum over taps (what enters the first block and leaves each block) of the MSE of hidden states; with
      ``compress`` of what it keeps of them (:class:`kdlsq_fx.compression.Compression`).
    * ``L_att``: sum over layers of the MSE of attention scores before the softmax (scaled, mask added); entries <= -100
      count as 0 on each side first.
    * ``L_pred``: soft cross-entropy to the teacher, mean over batch x classes (``temperature**2`` scales it); question
      answering: start + end over positions, times ``span``; one label (regression): MSE to the teacher's output, or
      with ``regression="gold"`` to the label; several labels at once: binary. A bare encoder has none.
    * ``L_gt``: the head's own loss from the labels. ``L_vec``: 1 - cosine of the sentence vectors, the means of the
      last hidden states over the tokens.

    Args:
        qat: the student, from ``prepare_qat``. It is trained in place and stays what ``convert`` takes.
        teacher: any model, or a QuantModel; it is copied, frozen and run in eval mode.
        loss: a name (``"kdlsq"``, ``"ternarybert"``, ``"hsk"``; with ``-release`` as the released code does it,
            padding and all; docs/distillation.md says where they still differ), or a
            :class:`kdlsq_fx.kd_named.Loss`. With a cache: the one it was made for. A term of your own: that page.
        cache: a folder that ``kdlsq-fx cache`` made, in place of a teacher. It brings the plan and the compression;
            the batches then need ``example_id``.
        plan: which values are compared; taps of a loss of weight 0 are left out, with a warning unless ``changes`` say
            that weight. Logits are those of its ``outputs`` and taps. None: ``plan_taps`` finds one, with
            projections for another width and the uniform layer map for another depth, and a warning tells what cannot
            be compared (attention with another number of heads, tokens of another tokenizer). A dict: it finds one
            with these of its options: ``{"layer_map": "top"}``, ``projections``, ``same_tokenizer``.
        changes: fields of the loss that are to differ: ``hidden, attention, logits, gold, pooled, temperature,
            regression, span, compress, schedule, share``, and ``padding``. ``padding="exclude"``: rows and columns of
            padded positions leave every mean; each example is averaged over its own tokens, then the examples are
            averaged, so that neither the amount of padding nor the split of a batch over steps or processes changes
            the gradient. ``"paper"``: plain means over all positions as in the released code (padded keys count as 0,
            padded queries and hidden states of padding count in full).

    Raises:
        ConfigError: weights or options make no sense; no taps; a stage without a term; a plan of other networks; shapes
            differ at a tap.
        CheckpointError: the cache is damaged or not finished.
    """
    if (teacher is None) == (cache is None):
        raise ConfigError("a student learns from a teacher or from a cache", do="give one of teacher and cache=")
    if cache is not None:
        return _from_cache(qat, cache, plan, loss, changes)
    chosen = named_loss(loss).changed(changes)
    check_options(qat, teacher, chosen)
    assert isinstance(teacher, nn.Module)
    frozen = frozen_teacher(teacher, qat)
    plan = plan_of(qat, frozen, chosen.weights, plan)
    if lost := sorted({t.loss for t in plan.taps if not chosen.weights[t.loss]} - set(changes)):
        do = ", ".join(f"{k}=1.0" for k in lost)
        warnings.warn(f"taps of the plan are left out, their weight is 0; to learn from them say {do}", stacklevel=2)
    plan, weights = compared(qat, plan, chosen.weights)
    check_plan(qat, frozen, plan, chosen.compress)
    plan = upper(qat, plan, chosen.compress)
    check_stages(chosen, weights)
    if chosen.compress is not None:
        entries = vocabulary(frozen.gm, frozen.config)
        chosen = replace(chosen, compress=chosen.compress.with_separator(separator_of(frozen.config), entries))
    own = [PREFIX + n for n in frozen.input_names] if plan.teacher_inputs == "own" else []
    targets = Teacher(frozen, plan, chosen, checked=not own and frozen.covers(qat))
    return _signed(qat, *own)(qat, targets, plan, weights, chosen)


def _check_rows(wanted: Wanted, rows: int) -> None:
    """InputError where the teacher's side has not a row for each of the student's."""
    for value in (*(kept.values for kept in wanted.taps), *wanted.outputs.values()):
        if value.shape[:1] != (rows,):
            what = f"the student reads {rows} rows, the teacher's side has shape {tuple(value.shape)}"
            raise InputError(what, do="give both sides the same rows")


def _from_cache(
    qat: QuantModel, cache: str | Path | Cache, plan: Any, loss: str | Loss, changes: dict[str, Any]
) -> Distiller:
    """A Distiller whose targets were stored before."""
    if plan is not None or loss != "kdlsq":
        do = "leave plan= and loss= away; weights, temperature and schedule may differ"
        raise ConfigError("a cache was made for its own plan and loss", do=do)
    opened = cache if isinstance(cache, Cache) else Cache.open(cache)
    chosen = opened.loss_with(changes)
    weights = chosen.weights
    check_options(qat, None, chosen)
    opened.check(qat, weights)
    check_stages(chosen, weights)
    return _signed(qat, "example_id")(qat, opened, opened.plan, weights, chosen)


def _signed(qat: QuantModel, *more: str) -> type[Distiller]:
    """A Distiller whose ``forward`` shows the student's signature and more (the Hugging Face Trainer reads it)."""

    def forward(self: Distiller, *args: Any, **kwargs: Any) -> DistillOutput:
        return Distiller.forward(self, *args, **kwargs)

    signature = inspect.signature(type(qat).forward)
    parameters = list(signature.parameters.values())
    rest = [parameters.pop()] if parameters[-1].kind is inspect.Parameter.VAR_KEYWORD else []
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in more]
    forward.__signature__ = signature.replace(parameters=[*parameters, *added, *rest])  # type: ignore[attr-defined]
    return type("Distiller", (Distiller,), {"forward": forward, "__module__": __name__, "__doc__": Distiller.__doc__})
