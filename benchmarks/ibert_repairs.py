"""I-BERT's model changed in one respect at a time, to find out what a difference comes from; used by ibert.py.

A repair takes the model of transformers in quant mode and changes it in place. They build on each other in the order of
:data:`REPAIRS`; after the last one I-BERT computes the functions themselves and rounds where we round.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.ibert.quant_modules import (
    IntGELU,
    IntLayerNorm,
    IntSoftmax,
    QuantAct,
    QuantEmbedding,
    QuantLinear,
)

A0, A1 = 0.35815147, 0.96963238  # exp(p) is about A0 p**2 + A1 p + 1 on (-ln 2, 0]


def hand_on_scales(ibert: Any) -> None:
    """Each layer is told the scale of its own input; shipped, all are told the scale of the first layer's."""

    def correct(layer: nn.Module, args: tuple[Any, ...], *, before: Any) -> tuple[Any, ...]:
        return (args[0], before.output.output_activation.act_scaling_factor, *args[2:])

    layers = ibert.ibert.encoder.layer
    for before, layer in zip(layers, layers[1:]):
        layer.register_forward_pre_hook(functools.partial(correct, before=before))


def use_float64(ibert: Any) -> None:
    """Simulate in float64, whose integers are exact up to 2**53, on scales that stay those of float32."""
    for module in ibert.modules():
        if isinstance(module, QuantAct):
            top = 2 ** (module.activation_bit - 1) - 1
            scale = torch.maximum(module.x_min.abs(), module.x_max.abs()) / top
            module.double()
            module.x_max.copy_(scale.double() * top)
            module.x_min.copy_(-module.x_max)
        elif isinstance(module, (QuantLinear, QuantEmbedding)):
            rows = 1 if getattr(module, "per_channel", False) else (0, 1)
            peak = module.weight.data.abs().amax(rows, keepdim=True)
            wide = module.weight.data.double()
            on_scale = wide.sign() * (peak / 127).double() * 127
            module.double()
            module.weight.data = torch.where(wide.abs() == peak, on_scale, wide)
    ibert.double()


def keep_largest_weight(ibert: Any) -> None:
    """Weights are clamped to +-127; shipped, to -127..126, which cuts a row's largest weight where it is positive."""
    for module in ibert.modules():
        if isinstance(module, (QuantLinear, QuantEmbedding)):
            module.weight_function = _round_to_grid


def _round_to_grid(x: Tensor, bits: int, percentile: bool, scale: Tensor) -> Tensor:
    top = 2 ** (bits - 1) - 1
    return torch.round(x / (scale.view(-1, 1) if x.ndim == 2 else scale)).clamp(-top, top)


def round_once(ibert: Any) -> None:
    """A sum is rounded after it was added (shipped: each term before), and no 8-bit code is rounded to 8 bits again."""
    for name, module in ibert.named_modules():
        if name.endswith(("ln_input_act", "embeddings_act1")):
            module.forward = functools.partial(_sum, module)
        elif name.endswith(("attention.output.output_activation", "intermediate.output_activation")):
            module.forward = _pass_on


def _sum(act: QuantAct, x: Tensor, x_scale: Tensor, *, identity: Tensor, identity_scale: Any = None, **_: Any) -> Any:
    top = 2 ** (act.activation_bit - 1) - 1
    scale = act.act_scaling_factor = torch.maximum(act.x_min.abs(), act.x_max.abs()) / top
    return torch.round((x + identity) / scale).clamp(-top - 1, top) * scale, scale


def _pass_on(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return x, scale


def round_probabilities(ibert: Any) -> None:
    """Probabilities are rounded to the nearest 1/256; shipped, rounded down."""
    _set_softmax(ibert, sixteen_bits=True, exact=False)


def keep_exponentials(ibert: Any) -> None:
    """Exponentials keep their bits; shipped, they are rounded to 16 bits of a range that training tracked."""
    _set_softmax(ibert, sixteen_bits=False, exact=False)


def keep_softmax_constants(ibert: Any) -> None:
    """The polynomial of exp in real numbers; shipped, its constants are rounded down to steps of the scores."""
    _set_softmax(ibert, sixteen_bits=False, exact=True)


def _set_softmax(ibert: Any, *, sixteen_bits: bool, exact: bool) -> None:
    for module in ibert.modules():
        if isinstance(module, IntSoftmax):
            forward = functools.partial(_softmax, module, sixteen_bits=sixteen_bits, exact=exact)
            module.forward = forward  # type: ignore[method-assign]


def _softmax(softmax: IntSoftmax, x: Tensor, scale: Tensor, *, sixteen_bits: bool, exact: bool) -> tuple[Tensor, float]:
    below = (x - x.amax(-1, keepdim=True)).clamp(min=-30 * math.log(2))
    if exact:
        z = torch.floor(-below / math.log(2))
        p = below + z * math.log(2)
        e = (A0 * p * p + A1 * p + 1) * 2.0**-z
    else:
        e, e_scale = softmax.int_exp(torch.maximum(x - x.amax(-1, keepdim=True), x.new_tensor(-1e6)) / scale, scale)
        e = softmax.act(e, e_scale)[0] if sixteen_bits else e
    return torch.round(256 * e / e.sum(-1, keepdim=True)).clamp(max=255) / 256, 1 / 256


def keep_gelu_bits(ibert: Any) -> None:
    """The polynomial of erf keeps its bits and takes sqrt(2) for 1.4142; shipped, it drops 14 bits."""
    for module in ibert.modules():
        if isinstance(module, IntGELU):
            module.const, module.k = 0, math.sqrt(2)


def keep_norm_bits(ibert: Any) -> None:
    """LayerNorm of the codes in real numbers; shipped, the mean is a whole code, the deviation drops ``shift`` bits."""
    eps = ibert.config.layer_norm_eps
    for module in ibert.modules():
        if isinstance(module, IntLayerNorm):
            module.forward = functools.partial(_norm, module, eps)  # type: ignore[method-assign]


def _norm(norm: IntLayerNorm, eps: float, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    out = nn.functional.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, eps)
    return out, x.new_tensor([2.0**-40])


REPAIRS: tuple[tuple[str, Callable[[Any], None]], ...] = (
    ("each layer is told the scale of its input", hand_on_scales),
    ("simulated in float64", use_float64),
    ("weights clamped to +-127, not -127..126", keep_largest_weight),
    ("sums and 8-bit results rounded once", round_once),
    ("probabilities rounded, not floored", round_probabilities),
    ("exponentials not rounded to 16 bits", keep_exponentials),
    ("constants of exp not floored", keep_softmax_constants),
    ("erf keeps its last 14 bits", keep_gelu_bits),
    ("LayerNorm in real numbers", keep_norm_bits),
)


def repaired(ibert: Any, number: int) -> Any:
    """A copy with the first ``number`` repairs."""
    model = copy.deepcopy(ibert)
    for _, repair in REPAIRS[:number]:
        repair(model)
    return model
