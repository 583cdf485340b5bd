"""Set activation scales from data, group parameters for an optimizer, report scales."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from operator import length_hint
from typing import Any

import torch
from torch import Tensor, nn

from kdlsq_fx.errors import CalibrationError, InputError
from kdlsq_fx.lsq import Kdlsq, LsqPlus
from kdlsq_fx.observer import Observer
from kdlsq_fx.quantizer import Lsq, round_codes

LR_SCALE_WEIGHT = 1e-3
LR_SCALE_ACT = 3e-2


@dataclass(frozen=True)
class SeenStats:
    """What calibration saw at one activation, and the scale it made of it. ``clipped``: share of the sample cut off."""

    elements: int
    samples: int
    low: float
    high: float
    mean_abs: float
    scale: float
    zero_point: int
    clipped: float


def calibrate(
    model: nn.Module, batches: Iterable[Any], *, max_batches: int | None = None, progress: bool = True
) -> dict[str, SeenStats]:
    """Run the model on batches and set every activation scale from what passes; per quantizer name what was seen.

    Args:
        model: a qat model. It runs in eval mode without gradients, weights quantized, activations not; each module's
            mode is restored. Calibrating again replaces the activation scales.
        batches: dicts (called as ``model(**batch)``), tuples or lists (``model(*batch)``) or single tensors. Streamed:
            none is kept. Use training data, not the data you measure on.
        max_batches: stop after so many.
        progress: a bar on stderr where that is a terminal.

    Raises:
        CalibrationError: no batch, no quantizer, a quantizer that nothing reached, or NaN or infinity (at its site).
            No scale has changed then.
    """
    quantizers = _quantizers(model)
    if not quantizers:
        raise CalibrationError(
            "the model has no quantizers", do="prepare_qat(model, qconfig) puts them in, by rules that name some"
        )
    _check_weights(quantizers)
    acts = {name: q for name, q in quantizers.items() if q.role == "act"}
    with _observing(model, acts), torch.no_grad():
        number = 0
        for batch in _bar(batches, progress, max_batches):
            _call(model, batch)
            number += 1
        if not number:
            raise CalibrationError("no batch to calibrate with", do="pass at least one batch of training data")
        unseen = [name for name, q in acts.items() if not q.observed.count]
        if unseen:
            what = f"{len(unseen)} activations were reached by no batch: {', '.join(unseen[:5])}"
            raise CalibrationError(what, where=unseen[0], do="calibrate with batches that use every part of the model")
        return {name: _finish(q) for name, q in acts.items()}


def _finish(quantizer: Lsq) -> SeenStats:
    seen: Observer = quantizer.observed
    quantizer.finish()
    scale, zero = float(quantizer.scale), quantizer.zero_point
    return SeenStats(seen.count, seen.rows, seen.low, seen.high, seen.mean_abs, scale, zero, quantizer.clipped)


@contextmanager
def _observing(model: nn.Module, acts: Mapping[str, Lsq]) -> Iterator[None]:
    modes = {m: m.training for m in model.modules()}
    try:
        model.eval()
        for name, quantizer in acts.items():
            quantizer.site = quantizer.site or name
            quantizer.observing = True
        yield
    finally:
        for quantizer in acts.values():
            quantizer.observing = False
        for module, mode in modes.items():
            module.training = mode


def _call(model: nn.Module, batch: Any) -> None:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        model(**{k: moved(v) for k, v in batch.items()})
    elif isinstance(batch, (tuple, list)):
        model(*(moved(v) for v in batch))
    elif isinstance(batch, Tensor):
        model(moved(batch))
    else:
        do = "give a list of batches: one dict of tensors stands in a list, [batch]"
        raise InputError(
            f"a batch is a dict, a tuple or a tensor, got {type(batch).__name__}", where="calibrate", do=do
        )


def _bar(batches: Iterable[Any], progress: bool, most: int | None) -> Iterable[Any]:
    from tqdm import tqdm

    known = [n for n in (length_hint(batches), most) if n]
    off = not (progress and sys.stderr.isatty())
    return tqdm(islice(batches, most), desc="calibrate", total=min(known, default=None), leave=False, disable=off)


def _quantizers(model: nn.Module) -> dict[str, Lsq]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Lsq)}


def _check_weights(quantizers: Mapping[str, Lsq]) -> None:
    for name, quantizer in quantizers.items():
        if quantizer.role == "weight":
            quantizer.site = quantizer.site or name
            quantizer.check_ready()


def param_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.01,
    lr_scale_weight: float | None = None,
    lr_scale_act: float | None = None,
) -> list[dict[str, Any]]:
    """Groups for an optimizer, every trainable parameter in exactly one: decayed weights; biases and other 1-d
    parameters (LayerNorm) without decay; weight scales and activation scales with learning rates of their own.

    Scales never decay: decay would shrink the range whatever the data say (the released KDLSQ code uses 2e-5, 1e-4).
    ``lr_scale_weight, lr_scale_act`` are those of the **clip** value alpha, None for the released KDLSQ code's 1e-3
    and 3e-2 (papers.md 1.5). A quantizer whose parameter is the step s = alpha / qmax (lsq, lsq+) gets 1/qmax of it:
    with Adam, whose steps do not depend on a gradient's size, both forms then move alike. LSQ+'s offset is in the
    units of alpha. For plain SGD with the LSQ paper's rates give the groups named ``*_step`` the weights' own lr.

    Raises CalibrationError where a scale is not set yet: an optimizer would train a placeholder.
    """
    quantizers = _quantizers(model)
    for name, quantizer in quantizers.items():
        quantizer.site = quantizer.site or name
        quantizer.check_ready()
    rates = {
        "weight": LR_SCALE_WEIGHT if lr_scale_weight is None else lr_scale_weight,
        "act": LR_SCALE_ACT if lr_scale_act is None else lr_scale_act,
    }
    groups: dict[tuple[str, int], dict[str, Any]] = {}
    for (label, per), parameter in _labelled(model, quantizers):
        role = label.partition("_")[0]
        group = groups.setdefault(
            (label, per),
            {
                "name": label if per == 1 else f"{label}_{per}",
                "params": [],
                "lr": rates[role] / per if "scale" in label else lr,
                "weight_decay": weight_decay if label == "decay" else 0.0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def _labelled(model: nn.Module, quantizers: Mapping[str, Lsq]) -> Iterator[tuple[tuple[str, int], nn.Parameter]]:
    """((group label, divisor of its learning rate), parameter), each parameter once."""
    scales: dict[nn.Parameter, tuple[str, int]] = {}
    for quantizer in quantizers.values():
        if not quantizer.learned:
            continue
        label = f"{quantizer.role}_scale"
        stepped = not isinstance(quantizer, Kdlsq)
        scales[quantizer.raw] = (f"{label}_step", quantizer.qmax) if stepped else (label, 1)  # type: ignore[index]
        if isinstance(quantizer, LsqPlus) and quantizer.offset is not None:
            scales[quantizer.offset] = (label, 1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            yield scales.get(parameter, ("no_decay" if parameter.ndim < 2 else "decay", 1)), parameter


@dataclass(frozen=True)
class ScaleRow:
    """One quantizer: ``scale`` is the mean over channels where there are several, ``channels`` their number (1: per
    tensor). ``clipped``: share of the weight now, or of the calibration sample, beyond the range (NaN: not known)."""

    name: str
    role: str
    quantizer: str
    bits: int
    qmin: int
    qmax: int
    scale: float
    channels: int
    zero_point: int
    clipped: float
    ready: bool


class ScaleReport(Sequence[ScaleRow]):
    """The rows; ``str()`` is a table, ``to_dicts()`` plain data."""

    def __init__(self, rows: Sequence[ScaleRow]) -> None:
        self._rows = tuple(rows)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def to_dicts(self) -> list[dict[str, Any]]:
        return [asdict(row) for row in self._rows]

    def __str__(self) -> str:
        wide = max((len(row.name) for row in self._rows), default=4)
        lines = [f"{'name':{wide}}  {'quantizer':9}  {'codes':>15}  {'scale':>10}  {'zero':>5}  clipped"]
        for row in self._rows:
            kind = f"{row.quantizer}{row.bits}" + (f" x{row.channels}" if row.channels > 1 else "")
            scale = f"{row.scale:10.4g}" if row.ready else "    not set"
            codes = f"{row.qmin}..{row.qmax}"
            lines.append(f"{row.name:{wide}}  {kind:9}  {codes:>15}  {scale}  {row.zero_point:5}  {row.clipped:7.2%}")
        return "\n".join(lines)


def scale_report(model: nn.Module) -> ScaleReport:
    """Per quantizer its name, bits, scale, zero point and share of clipped values."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    rows = []
    for name, q in _quantizers(model).items():
        weight = parameters.get(name.removesuffix("_lsq")) if q.role == "weight" else None
        spec, scale = q.spec, q.scale
        clipped = q.clipped if weight is None or not bool(q.ready) else _clipped(q, weight)
        codes = (q.qmin, q.qmax, float(scale.mean()), scale.numel(), q.zero_point)
        rows.append(ScaleRow(name, q.role, spec.quantizer, spec.bits, *codes, clipped, bool(q.ready)))
    return ScaleReport(rows)


@torch.no_grad()
def _clipped(quantizer: Lsq, weight: Tensor) -> float:
    if quantizer.spec.quantizer == "twn":
        return 0.0  # no range: every weight goes to the nearest of three values by a threshold
    quantizer.refresh(weight)
    scale = quantizer.scale.reshape(-1, *[1] * (weight.ndim - 1)) if quantizer.scale.ndim else quantizer.scale
    q = round_codes(weight, scale, 0, quantizer.qmin - 1, quantizer.qmax + 1)
    return float(((q < quantizer.qmin) | (q > quantizer.qmax)).float().mean())
