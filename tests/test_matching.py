"""Student and teacher graphs matched by name, by structure, and what is left told."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from families import FAMILIES, tiny
from torch import nn

import kdlsq_fx as kq
from kdlsq_fx.capture import capture
from kdlsq_fx.matching import Match, match_graphs

torch.set_num_threads(1)


def graph(model: nn.Module, example: Any = None) -> torch.fx.GraphModule:
    return capture(model, example).gm


@cache
def small(family: str = "bert", head: str = "ForSequenceClassification", **changes: Any) -> torch.fx.GraphModule:
    return graph(tiny(family, head, **changes))


class Renamed(nn.Module):
    """Two branches that only structure and ports tell apart; ``names`` decides what the layers are called."""

    def __init__(self, names: tuple[str, str, str], swapped: bool = False) -> None:
        super().__init__()
        self.names, self.swapped = names, swapped
        for name in names:
            setattr(self, name, nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b, c = (getattr(self, n) for n in self.names)
        left, right = a(x), b(x).tanh()
        return c(right - left if self.swapped else left - right)


class Product(nn.Module):
    def __init__(self, square: bool) -> None:
        super().__init__()
        self.square = square

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.tanh()
        return y * y if self.square else y * x.exp()


def sites(match: Match) -> dict[str, str]:
    return {p.student: p.teacher for p in match.pairs}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_student_matches_its_own_float_model_whole(family: str) -> None:
    teacher = graph(tiny(family))
    for name in ("W4E4A8", "W4E4A8-int"):
        match = match_graphs(kq.prepare_qat(teacher, name), teacher)
        assert match.student_only == match.teacher_only == ()
        assert all(p.how == "path" and p.student == p.teacher for p in match.pairs)


def test_a_frozen_student_matches_too() -> None:
    from families import batch

    model = tiny("bert")
    qat = kq.prepare_qat(model, "W4E4A8")
    kq.calibrate(qat, [batch()])
    match = match_graphs(kq.freeze_qat(qat), graph(model))
    calls = [s for s in (*match.student_only, *match.teacher_only) if "/" in s]
    assert calls == [] and match.partner("classifier/linear") == "classifier/linear"


def test_a_common_prefix_may_differ() -> None:
    match = match_graphs(small("bert"), small("bert", "Model"))
    assert match.prefix == ("bert.", "") and match.teacher_only == ()
    assert match.partner("bert.encoder.layer.1.attention.self/softmax") == "encoder.layer.1.attention.self/softmax"
    assert set(match.student_only) == {"classifier.weight", "classifier.bias", "classifier/linear"}
    back = match_graphs(small("bert", "Model"), small("bert"))
    assert back.student_only == () and {p.teacher: p.student for p in back.pairs} == sites(match)


def test_renamed_modules_match_by_structure_and_port() -> None:
    x = torch.randn(2, 4)
    one = graph(Renamed(("a", "b", "c")), (x,))
    two = graph(Renamed(("u", "v", "w")), (x,))
    match = match_graphs(one, two)
    assert match.student_only == match.teacher_only == ()
    pairs = sites(match)
    assert (pairs["a/linear"], pairs["b/linear"], pairs["c/linear"]) == ("u/linear", "v/linear", "w/linear")
    assert pairs["a.weight"] == "u.weight" and pairs["b.bias"] == "v.bias"
    assert {p.how for p in match.pairs if p.student.startswith("a")} == {"isomorphism"}
    assert "a/linear  <->  u/linear" in match.report()
    swapped = match_graphs(one, graph(Renamed(("u", "v", "w"), swapped=True), (x,)))
    assert "a/linear" not in sites(swapped)  # right - left is not left - right: only ports tell


def test_a_square_is_no_product_of_two() -> None:
    x = torch.randn(2, 4)
    square, product = graph(Product(True), (x,)), graph(Product(False), (x,))
    assert match_graphs(square, square).student_only == ()
    assert "mul" not in sites(match_graphs(square, product))
    assert match_graphs(square, product).student_only == ("mul",)


def test_blocks_of_another_family_match_by_structure() -> None:
    match = match_graphs(small("bert"), small("distilbert"))
    pairs = sites(match)
    for i in (0, 1):
        ours, theirs = f"bert.encoder.layer.{i}", f"distilbert.transformer.layer.{i}"
        for a, b in (("self.query", "q_lin"), ("self.key", "k_lin"), ("self.value", "v_lin")):
            assert pairs[f"{ours}.attention.{a}/linear"] == f"{theirs}.attention.{b}/linear"
        assert pairs[f"{ours}.output.LayerNorm/layer_norm"] == f"{theirs}.output_layer_norm/layer_norm"


def test_what_feeds_a_block_may_differ() -> None:
    """ELECTRA projects its embeddings: queries read another value, yet they are queries."""
    pairs = sites(match_graphs(small("bert"), small("electra")))
    for name in ("query", "key", "value"):
        site = f"encoder.layer.0.attention.self.{name}/linear"
        assert pairs[f"bert.{site}"] == f"electra.{site}"


def test_a_deeper_teacher_leaves_its_layers_unmatched() -> None:
    match = match_graphs(small("bert"), small("bert", num_hidden_layers=3))
    assert match.teacher_only and all(".layer.2." in s or "pooler" in s for s in match.teacher_only)
    assert "unmatched in the teacher: " in match.report() and match.partner("nothing") is None
    assert len({p.teacher for p in match.pairs}) == len({p.student for p in match.pairs}) == len(match.pairs)
