"""Families that lower by rules of their own: MobileBERT's NoNorm and joined embeddings, buckets of MPNet, DeBERTa."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calibrated import calibrated
from families import batch, for_model, tiny
from torch import nn
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

from kdlsq_fx.api import convert, freeze_qat, prepare_qat
from kdlsq_fx.calibration import calibrate
from kdlsq_fx.comparison import compare
from kdlsq_fx.graph import fetch
from kdlsq_fx.op import op_of

torch.set_num_threads(1)


def names(model: Any) -> list[str]:
    return [op.name for n in model.gm.graph.nodes if (op := op_of(n)) is not None]


class NoNorm(nn.Module):
    """x * weight + bias behind a residual sum, with factors of both signs and a 0 among them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second, self.third = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.weight = nn.Parameter(torch.linspace(-2, 2, 17)[:16] * 0.7)
        self.bias = nn.Parameter(torch.randn(16) * 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.first(x)
        b = self.second(a) + a
        return self.third(b * self.weight + self.bias)


def rows(seed: int) -> torch.Tensor:
    return torch.randn(64, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("preset", ["W8E8A8-int", "W4E4A4-lsq+-int"])
def test_a_sum_times_a_vector_plus_a_vector_is_rounded_once(preset: str) -> None:
    qat = prepare_qat(NoNorm(), preset, example=(rows(0),))
    calibrate(qat, [{"x": rows(s)} for s in range(3)])
    qat.eval()
    model = convert(qat)
    assert model.gm.meta["islands"] == ()
    adds = [n for n in model.gm.graph.nodes if op_of(n) is not None and op_of(n).name == "int_add"]  # type: ignore[union-attr]
    assert [len(n.args[0]) for n in adds] == [3]  # accumulator, residual and bias: nothing is rounded in between
    factors = model.gm.get_buffer(str(adds[0].args[1][0].target))
    assert bool((factors < 0).any()) and bool((factors == 0).any()) and bool((factors > 0).any())
    seen = compare(qat, model, [{"x": rows(s)} for s in range(10, 30)])
    assert seen.unmatched == ()
    assert max(s.max_steps for s in seen.sites.values()) <= 1
    assert max(s.off / s.outputs for s in seen.sites.values()) <= 1e-3


@pytest.mark.parametrize("family", ["mobilebert", "mpnet", "deberta-v2"])
def test_no_float_is_left_and_the_integers_are_those_of_training(family: str) -> None:
    qat = calibrated("W8E8A8-int", family)
    model = convert(qat)  # refuses islands, and floats in masks and positions
    assert model.gm.meta["integer_only"]
    frozen, torch_ = freeze_qat(qat), convert(qat, backend="torch")
    given = [for_model(tiny(family), batch(rows=4, length=n, seed=n)) for n in (1, 7, 20)]
    for one in given:
        assert torch.equal(qat(**one).logits, frozen(**one).logits)
        assert torch.equal(model(**one).logits, torch_(**one).logits)
    seen = compare(qat, model, given)
    assert seen.unmatched == ()
    assert max(s.max_steps for s in seen.sites.values()) <= 1
    assert max(s.off / s.outputs for s in seen.sites.values()) <= 1e-3


def test_pads_and_joins_move_codes() -> None:
    model = convert(calibrated("W8E8A8-int", "mobilebert"))
    found = names(model)
    assert found.count("pad") == 2 and found.count("cat") == 1
    for node in model.gm.graph.nodes:
        if (op := op_of(node)) is not None and op.name in ("pad", "cat"):
            assert node.meta["val"].dtype == torch.int8


def table_of(family: str) -> tuple[int, torch.Tensor]:
    """The first distance and the entries of a family's table of buckets, in the frozen graph."""
    model = freeze_qat(calibrated("W8E8A8-int", family))
    (node,) = [n for n in model.gm.graph.nodes if (op := op_of(n)) is not None and op.name == "lookup"]
    assert "log" not in names(model)
    near, table, first = node.args
    assert near.args[1:] == (first, first + len(fetch(model.gm, table.target)) - 1)
    return first, fetch(model.gm, table.target)


def test_the_buckets_of_mpnet_are_those_of_its_own_code() -> None:
    """transformers' function, in floats, for every distance in a text of 2**20 tokens."""
    first, table = table_of("mpnet")
    distances = torch.arange(-(2**20) + 1, 2**20)
    wanted = MPNetEncoder.relative_position_bucket(distances)
    assert torch.equal(table[distances.clamp(first, first + len(table) - 1) - first], wanted)


def test_the_buckets_of_deberta_are_those_of_its_own_code() -> None:
    """For every distance in a text of as many tokens as its positions allow."""
    config = tiny("deberta-v2").config
    first, table = table_of("deberta-v2")
    longest = config.max_position_embeddings
    wanted = make_log_bucket_position(torch.arange(1 - longest, longest), config.position_buckets, longest)
    assert first <= 1 - longest or bool((table[0] == wanted[: first + longest]).all())
    assert torch.equal(table[torch.arange(1 - longest, longest).clamp(first, -first) - first], wanted.long())


def test_what_constants_alone_decide_is_computed_once() -> None:
    model = freeze_qat(calibrated("W8E8A8-int", "deberta-v2"))
    left = names(model)
    assert "sqrt" not in left and "layer_norm" not in left


def test_parts_of_two_scales_are_joined_on_the_grid_behind() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(16, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(torch.cat([self.a(x).relu(), self.b(x).tanh()], -1))

    data = torch.randn(32, 8)
    qat = prepare_qat(Two(), "W8E8A8-int", example=(data,))
    calibrate(qat, [{"x": data}])
    model = convert(qat.eval(), allow_islands=True)  # the input is float
    assert "cat" not in {i.op for i in model.gm.meta["islands"]}
    seen = compare(qat, model, {"x": data})
    assert not seen.unmatched and seen.max_steps <= 1
