"""Quantized tensors made again in backward: the same gradients bit for bit, and fewer tensors kept."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny_glue import bert
from torch import Tensor

from kdlsq_fx import fused, model, recompute
from kdlsq_fx.api import prepare_qat
from kdlsq_fx.calibration import calibrate
from kdlsq_fx.distillation import distill

PRESETS = ("W2E2A8", "W4E4A8-lsq", "W8E8A8-lsq+", "W4E4A8-lsq-int", "W2E2A8-twn", "W8E8A8-ema")


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 25, (4, 16), generator=generator)
    return {"input_ids": ids, "attention_mask": (torch.arange(16) < torch.tensor([[16], [9], [3], [12]])).long()}


def student(preset: str) -> Any:
    qat = prepare_qat(bert(), preset)
    calibrate(qat, [batch()], progress=False)
    return qat.train()


@contextmanager
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forwards that keep everything, as autograd alone would."""

    @contextmanager
    def nothing() -> Iterator[None]:
        yield

    with monkeypatch.context() as patch:
        patch.setattr(model, "recomputing", nothing)
        yield


def gradients(module: Any) -> dict[str, Tensor]:
    torch.manual_seed(5)  # dropout
    module.zero_grad()
    module(**batch(), labels=torch.tensor([0, 1, 1, 0])).loss.backward()
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("on", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("preset", PRESETS)
def test_gradients_are_the_same_bit_for_bit(preset: str, on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    qat = student(preset)
    other = copy.deepcopy(qat)
    fused.use(on)
    try:
        with kept(monkeypatch):
            want = gradients(other)
        got = gradients(qat)
    finally:
        fused.use(True)
    assert want.keys() == got.keys() and len(want) > 20
    for name, value in want.items():
        assert torch.equal(value, got[name]), name


def test_distillation_too(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = bert()
    qat = student("W4E4A8")
    other = copy.deepcopy(qat)
    with kept(monkeypatch):
        want = gradients(distill(other, teacher).train())
    got = gradients(distill(qat, teacher).train())
    for name, value in want.items():
        assert torch.equal(value, got[name]), name


def test_products_keep_no_quantized_operand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted by what is packed: every quantized operand of a product is a view to be made again."""
    counts = {"again": 0, "kept": 0}
    pack = recompute._Notes.pack

    def counted(notes: Any, tensor: Tensor) -> Any:
        packed = pack(notes, tensor)
        counts["kept" if packed is tensor else "again"] += tensor.numel()
        return packed

    monkeypatch.setattr(recompute._Notes, "pack", counted)
    qat = student("W4E4A8")
    qat(**batch(), labels=torch.tensor([0, 1, 1, 0]))
    weights = sum(m.weight.numel() for m in qat.modules() if type(m).__name__ == "Linear")
    assert counts["again"] > weights  # the weights of dense layers, and activations


def test_nothing_outside_of_training() -> None:
    qat = student("W4E4A8")
    with torch.no_grad():
        qat(**batch())
    assert recompute._notes.get() is None
    recompute.note(torch.ones(2, requires_grad=True) * 2, lambda: torch.ones(2))  # no forward runs: nobody listens
