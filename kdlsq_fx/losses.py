"""The loss of a head, outside the graph, as Hugging Face computes it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .errors import InputError


def loss_for(model_class: str, config: Any, fields: dict[str, torch.Tensor], labels: dict[str, Any]) -> torch.Tensor:
    """Scalar loss for the labels given.

    ``ForSequenceClassification``: by ``config.problem_type`` or, as Hugging Face infers it, regression (MSE) for one
    label, cross-entropy for integer labels, BCE otherwise. ``ForTokenClassification`` and ``ForMaskedLM``:
    cross-entropy, label -100 left out. ``ForQuestionAnswering``: mean of the two cross-entropies, positions past the
    sequence left out. ``ForNextSentencePrediction``: cross-entropy. Raises InputError when the head has no loss for
    these labels, or they do not fit its output.
    """
    try:
        loss = _loss(model_class, config, fields, labels)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, IndexError, RuntimeError) as err:  # what torch raises for other shapes, types and class numbers
        shapes = ", ".join(f"{k} {tuple(v.shape)} {v.dtype}" for k, v in {**fields, **labels}.items() if k in _SHOWN)
        do = "one class number per row (or token), or floats for regression and several labels at once"
        raise InputError(f"the labels do not fit the output ({shapes}): {err}", where="labels", do=do) from None
    if loss is None:
        do = "compute your own loss from the outputs"
        raise InputError(f"{model_class or 'this model'} has no loss for {', '.join(labels)}", do=do)
    return loss


_SHOWN = ("logits", "labels", "start_logits", "start_positions", "end_positions")
_PER_TOKEN = ("ForTokenClassification", "ForMaskedLM", "ForNextSentencePrediction")


def _loss(
    model_class: str, config: Any, fields: dict[str, torch.Tensor], labels: dict[str, Any]
) -> torch.Tensor | None:
    if "start_logits" in fields and "start_positions" in labels and "end_positions" in labels:
        return _span(fields["start_logits"], fields["end_logits"], labels["start_positions"], labels["end_positions"])
    target, logits = labels.get("labels"), fields.get("logits")
    if target is None or logits is None:
        return None
    if "SequenceClassification" in model_class:
        return _classification(logits, target, config)
    if model_class.endswith(_PER_TOKEN):
        return F.cross_entropy(logits.flatten(0, -2), target.flatten().to(logits.device), ignore_index=-100)
    return None


def _classification(logits: torch.Tensor, target: torch.Tensor, config: Any) -> torch.Tensor:
    kind = getattr(config, "problem_type", None)
    if kind is None:
        integral = target.dtype in (torch.int64, torch.int32)
        kind = "regression" if config.num_labels == 1 else "single" if integral else "multi_label_classification"
    if kind == "regression":
        return F.mse_loss(logits.squeeze(), target.squeeze().to(logits.dtype))
    if kind == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits, target)
    return F.cross_entropy(logits.flatten(0, -2), target.flatten())


def _span(start: torch.Tensor, end: torch.Tensor, start_at: torch.Tensor, end_at: torch.Tensor) -> torch.Tensor:
    length = start.shape[1]
    losses = [
        F.cross_entropy(logits, at.reshape(-1).clamp(0, length), ignore_index=length)
        for logits, at in ((start, start_at), (end, end_at))
    ]
    return sum(losses, start=torch.zeros((), device=start.device)) / 2
