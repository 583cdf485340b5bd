"""Distillation: the KDLSQ loss between a qat student and a frozen teacher, read at taps inside both graphs."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import kd_losses as losses
from .errors import ConfigError, InputError
from .kd_setup import (
    check_options,
    check_outputs,
    check_shapes,
    check_vocabulary,
    given_taps,
    matched_taps,
    output_names,
)
from .kd_targets import Kept, Targets, Teacher, frozen_teacher, with_taps
from .matching import Match, match_graphs
from .model import QuantModel
from .taps import Tap, node_at, token_axes

__all__ = ["DistillOutput", "Distiller", "Tap", "distill"]


class DistillOutput(OrderedDict[str, Any]):
    """What ``kd(**batch)`` returns: ``loss`` first, then the student's own outputs; by name, key or position.

    ``parts`` holds every term before its weight, detached: hidden, attention, logits, gold, pooled.
    """

    def __init__(self, fields: Iterable[tuple[str, Any]] | dict[str, Any] = (), parts: dict[str, Any] | None = None):
        super().__init__(fields)
        self.__dict__["parts"] = parts or {}

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return OrderedDict.__getitem__(self, name)
        raise AttributeError(name)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())


class Distiller(nn.Module):
    """The student with the distillation loss around it; made by :func:`distill`.

    ``kd(**batch)`` runs both models and returns a :class:`DistillOutput`. ``student`` is the qat model itself, whose
    parameters are the only ones here: the teacher is no submodule, so it stands in no ``state_dict``, ``parameters``
    or checkpoint, keeps eval mode under ``kd.train()``, and follows ``kd.to(device)``.
    """

    accepts_loss_kwargs = False  # as QuantModel's: the loss is a mean over the batch
    moves_inputs = True

    def __init__(
        self, student: QuantModel, targets: Targets, taps: tuple[Tap, ...], weights: dict[str, float],
        temperature: float, padding: str,
    ) -> None:  # fmt: skip
        super().__init__()
        self.student = student
        self.taps, self.weights = taps, weights
        self.temperature, self.padding = temperature, padding
        places = [node_at(student.gm, t.student, "student") for t in taps]
        self._axes = [token_axes(student.gm, node) for node in places]
        self._unregistered = (targets, with_taps(student.gm, places))  # in a tuple: no submodules

    @property
    def targets(self) -> Targets:
        """Where the teacher's side of the loss comes from."""
        return self._unregistered[0]

    @property
    def teacher(self) -> QuantModel:
        if not isinstance(self.targets, Teacher):
            raise ConfigError("there is no teacher in memory", do="it was run before; the cache knows its targets")
        return self.targets.model

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
        """The taps and the weights of the terms, as text."""
        rows = [
            f"{t.loss:10s} {t.student}" + (f"  <-  {t.teacher}" if t.teacher != t.student else "") for t in self.taps
        ]
        terms = ", ".join(f"{k} {v:g}" for k, v in self.weights.items())
        return "\n".join([*rows, f"weights: {terms}; temperature {self.temperature:g}; padding {self.padding}"])

    def forward(self, *args: Any, **kwargs: Any) -> DistillOutput:
        """Both models on one batch. InputError where the batch does not fit, or ``gold`` has a weight and no labels."""
        labels, inputs = self.student.split(*args, **kwargs)
        wanted = self.targets.wanted({**kwargs, **inputs})
        flat, values = self._unregistered[1](*(inputs[n] for n in self.student.input_names))
        fields = dict(zip(output_names(self.student), flat))
        parts = self._between(values, wanted.taps, self._weight(inputs))
        parts |= self._outputs(fields, wanted.outputs, inputs)
        if self.weights["gold"]:
            if not labels:
                raise InputError("gold has a weight but the batch has no labels", do="pass labels=, or set gold=0")
            parts["gold"] = self.student.pack(flat, labels)["loss"]
        loss = sum((self.weights[k] * v for k, v in parts.items()), start=torch.zeros((), device=self.device))
        return DistillOutput({"loss": loss, **fields}, {k: v.detach() for k, v in parts.items()})

    def _weight(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """(batch, length) floats, 1 where a token is real; None where everything counts."""
        mask = inputs.get("attention_mask")
        return None if self.padding == "paper" or mask is None or mask.dim() != 2 else (mask != 0).float()

    def _between(
        self, values: tuple[torch.Tensor, ...], wanted: tuple[Kept, ...], weight: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """Terms at the taps: for each loss the sum over its taps."""
        parts: dict[str, torch.Tensor] = {}
        for tap, axes, value, kept in zip(self.taps, self._axes, values, wanted):
            target = kept.values
            if value.shape != target.shape:
                raise InputError(f"shapes {tuple(value.shape)} and {tuple(target.shape)} differ", where=tap.student)
            if tap.loss == "logits":
                term = losses.soft_cross_entropy(value, target, weight if 1 in axes else None, self.temperature)
            else:
                floor = losses.MASKED if tap.loss == "attention" else None
                term = losses.mse(value, target, weight, axes, floor)
            parts[tap.loss] = parts[tap.loss] + term if tap.loss in parts else term
        return parts

    def _outputs(
        self, fields: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Terms at the outputs: logits of any head, sentence vectors."""
        parts = {}
        if self.weights["logits"] and not any(t.loss == "logits" for t in self.taps):
            parts["logits"] = self._logits(fields, wanted, self._weight(inputs))
        if self.weights["pooled"]:
            mask = inputs.get("attention_mask")
            parts["pooled"] = losses.pooled(fields["last_hidden_state"], wanted["pooled"], mask)
        return parts

    def _logits(
        self, fields: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], weight: torch.Tensor | None
    ) -> torch.Tensor:
        if "start_logits" in fields:
            pairs = [(fields[k], wanted[k]) for k in ("start_logits", "end_logits")]
            return sum(
                (losses.span_cross_entropy(s, t, weight, self.temperature) for s, t in pairs),
                start=torch.zeros((), device=self.device),
            )
        s, t = fields["logits"], wanted["logits"]
        kind = getattr(self.config, "problem_type", None)
        if s.dim() == 2 and (kind == "regression" or s.shape[-1] == 1):
            return losses.mse(s, t)
        if s.dim() == 2 and kind == "multi_label_classification":
            return losses.soft_binary(s, t, self.temperature)
        return losses.soft_cross_entropy(s, t, weight if s.dim() == 3 else None, self.temperature)

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
    teacher: nn.Module | QuantModel,
    *,
    hidden: float = 1.0,
    attention: float = 1.0,
    logits: float = 1.0,
    gold: float = 0.0,
    pooled: float = 0.0,
    temperature: float = 1.0,
    padding: str = "exclude",
    taps: Iterable[Tap] | None = None,
) -> Distiller:
    """Put the KDLSQ loss (arXiv 2101.05938 and its release; all weights 1 there) around ``qat``.

    ``loss = hidden * L_hid + attention * L_att + logits * L_pred + gold * L_gt + pooled * L_vec``; a term of weight 0
    costs nothing.

    * ``L_hid``: sum over taps (what enters the first block and leaves each block) of the MSE of hidden states.
    * ``L_att``: sum over layers of the MSE of attention scores before the softmax (scaled, mask added); entries <= -100
      count as 0 on each side first.
    * ``L_pred``: soft cross-entropy to the teacher, mean over batch x classes (``temperature**2`` scales it); question
      answering: start + end over positions (the release multiplies by 100: set ``logits=100``); one label
      (regression): MSE to the teacher's output; several labels at once: binary. A bare encoder has none.
    * ``L_gt``: the head's own loss from the labels. ``L_vec``: 1 - cosine of the mean-pooled sentence vectors.

    Args:
        qat: the student, from ``prepare_qat``. It is trained in place and stays what ``convert`` takes.
        teacher: a model of the same tokenizer, or a QuantModel; it is copied, frozen and run in eval mode.
        padding: ``"exclude"``: rows and columns of padded positions leave every mean; each example is averaged over
            its own tokens, then the examples are averaged, so that neither the amount of padding nor the split of a
            batch over steps or processes changes the gradient. ``"paper"``: plain means over all positions as in the
            released code (padded keys count as 0, padded queries and hidden states of padding count in full).
        taps: pairs of sites to use in place of the hidden and attention taps found in the graphs.

    Raises:
        ConfigError: weights or options make no sense; no taps; another vocabulary; shapes differ at a tap.
    """
    weights = {"hidden": hidden, "attention": attention, "logits": logits, "gold": gold, "pooled": pooled}
    check_options(qat, teacher, weights, temperature, padding)
    frozen = frozen_teacher(teacher, qat)
    chosen = given_taps(taps, weights) if taps is not None else matched_taps(qat, frozen, weights)
    check_vocabulary(qat, frozen, chosen)
    check_shapes(qat, frozen, chosen)
    check_outputs(qat, frozen, weights, chosen)
    targets = Teacher(frozen, chosen, checked=frozen.covers(qat))
    return _signed(qat)(qat, targets, chosen, weights, temperature, padding)


def _signed(qat: QuantModel) -> type[Distiller]:
    """A Distiller whose ``forward`` shows the student's signature (the Hugging Face Trainer reads it)."""

    def forward(self: Distiller, *args: Any, **kwargs: Any) -> DistillOutput:
        return Distiller.forward(self, *args, **kwargs)

    forward.__signature__ = inspect.signature(type(qat).forward)  # type: ignore[attr-defined]
    return type("Distiller", (Distiller,), {"forward": forward, "__module__": __name__, "__doc__": Distiller.__doc__})
