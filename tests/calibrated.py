"""Tiny calibrated models, made once per test run and preset."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from families import batch, for_model, tiny

from kdlsq_fx.api import prepare_qat
from kdlsq_fx.calibration import calibrate
from kdlsq_fx.model import QuantModel
from kdlsq_fx.presets import build
from kdlsq_fx.qconfig import QSpec, Rule


def livelier(model: torch.nn.Module) -> torch.nn.Module:
    """Larger random weights and biases, so that attention and logits are not all alike."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.mul_(6)
            elif "bias" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return model.eval()


def per_channel(preset: str, w: int, quantizer: str) -> Any:
    """A preset with one scale per output channel and per row of a table."""
    spec = QSpec(bits=w, axis=0, quantizer=quantizer)
    act = QSpec(bits=8, quantizer=quantizer)
    return build(preset).with_rules(
        Rule(op="embedding", weight=spec, optional=True), Rule(op="linear", weight=spec, act=act, optional=True)
    )


CONFIGS: dict[str, Any] = {
    "W8E8A8": "W8E8A8",
    "W4E4A8-lsq+": "W4E4A8-lsq+",
    "W2E2A8": "W2E2A8",
    "W2E2A8-twn": "W2E2A8-twn",
    "W8E8A8-int": "W8E8A8-int",
    "W4E4A4-lsq+-int": "W4E4A4-lsq+-int",
    "W2E2A8-int": "W2E2A8-int",
    "W4-channels": per_channel("W4E4A8-lsq", 4, "lsq"),
    "W2-channels-int": per_channel("W2E2A8-lsq-int", 2, "lsq"),
}


@lru_cache
def calibrated(config: str, family: str = "bert", head: str = "ForSequenceClassification") -> QuantModel:
    """A qat model in eval mode; do not change it."""
    model = livelier(tiny(family, head))
    qat = prepare_qat(model, CONFIGS[config])
    calibrate(qat, [for_model(model, batch(rows=6, seed=s)) for s in range(3)])
    return qat.eval()


@lru_cache
def converted(config: str, backend: str = "torch", family: str = "bert") -> Any:
    from kdlsq_fx.api import convert

    return convert(calibrated(config, family), backend=backend)
