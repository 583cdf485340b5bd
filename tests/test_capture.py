"""Capture: bit for bit the eager model, at other shapes, in both modes; clear errors for what cannot be captured."""

from __future__ import annotations

import copy
import inspect
import sys

import pytest
import torch
import transformers
from families import FAMILIES, batch, for_model, tiny
from torch import nn

from kdlsq_fx.capture import capture
from kdlsq_fx.errors import CaptureError
from kdlsq_fx.graph import sited


def eager(model: nn.Module) -> nn.Module:
    own = copy.deepcopy(model)
    for m in own.modules():
        if hasattr(getattr(m, "config", None), "_attn_implementation"):
            m.config._attn_implementation = "eager"
    return own


def run(captured, data):
    return captured.gm(*(data[k] for k in captured.inputs))


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_eager_bit_for_bit(family):
    model = tiny(family)
    before = copy.deepcopy(model.state_dict())
    captured = capture(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    reference = eager(model).eval()
    captured.gm.eval()
    with torch.no_grad():
        for rows, length in ((1, 1), (4, 9), (2, 60), (3, 130)):
            data = batch(rows, length)
            want = reference(**for_model(model, data))
            got = run(captured, data)
            assert captured.outputs == tuple(want.keys())
            assert all(torch.equal(g, w) for g, w in zip(got, want.values())), (rows, length)
        plain = model.eval()(**for_model(model, batch()))
        torch.testing.assert_close(run(captured, batch())[0], plain[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_train_mode_draws_the_same_dropout(family):
    model = tiny(family)
    captured = capture(model)
    reference = eager(model).train()
    captured.gm.train()
    data = batch()
    torch.manual_seed(3)
    want = reference(**for_model(model, data))[0]
    torch.manual_seed(3)
    assert torch.equal(run(captured, data)[0], want)
    captured.gm.eval()
    assert not torch.equal(run(captured, data)[0], want)


@pytest.mark.parametrize("head", ["ForQuestionAnswering", "ForTokenClassification", "ForMaskedLM", "Model"])
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "albert", "modernbert"])
def test_other_heads(family, head):
    model = tiny(family, head)
    captured = capture(model)
    captured.gm.eval()
    reference = eager(model).eval()
    data = batch(3, 11)
    with torch.no_grad():
        want = reference(**for_model(model, data))
        got = run(captured, data)
    assert captured.outputs == tuple(want.keys())
    assert all(torch.equal(g, w) for g, w in zip(got, want.values()))


def test_sites_are_stable_and_unique():
    first, second = (sited(capture(tiny("albert")).gm.graph) for _ in range(2))
    assert list(first) == list(second)
    assert "albert.encoder.albert_layer_groups.0.albert_layers.0.attention.query/linear:1" in first
    bert = sited(capture(tiny("bert")).gm.graph)
    assert "bert.encoder.layer.1.attention.self.query/linear" in bert


def test_parameters_keep_their_names_and_ties():
    model = tiny("bert", "ForMaskedLM")
    captured = capture(model)
    names = dict(captured.gm.named_parameters(remove_duplicate=False))
    assert set(names) <= set(dict(model.named_parameters(remove_duplicate=False)))
    table = names["bert.embeddings.word_embeddings.weight"]
    assert sum(p.data_ptr() == table.data_ptr() for p in captured.gm.parameters()) == 1


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.3), nn.Linear(16, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def test_any_module_with_an_example():
    model = Plain()
    captured = capture(model, example=(torch.randn(3, 8),))
    captured.gm.eval()
    x = torch.randn(7, 8)
    assert torch.equal(captured.gm(x)[0], model.eval()(x))
    with pytest.raises(CaptureError, match="example="):
        capture(model)


def test_graph_module_and_exported_program():
    model = Plain().eval()
    x = torch.randn(3, 8)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    y = torch.randn(5, 8)
    assert torch.equal(capture(program).gm.eval()(y)[0], model(y))
    assert torch.equal(capture(program.module(check_guards=False)).gm.eval()(y)[0], model(y))
    with pytest.raises(CaptureError, match="torch.export"):
        capture(torch.fx.symbolic_trace(model))
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for p in capture(program).gm.parameters():
            p.add_(1)
    for state in (model.state_dict(), program.state_dict):
        assert all(torch.equal(v, before[k]) for k, v in state.items())


class Branches(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return x * 2
        return x


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.Module()
        self.deep.forward = torch.erfinv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x)


def test_what_cannot_be_captured_is_named(capfd):
    """One error of ours: torch's logs and the graph that it prints at a failure are held back."""
    with pytest.raises(CaptureError) as err:
        capture(Branches(), example=(torch.randn(3, 8),))
    assert "test_capture.py" in str(err.value) and "Branches" in str(err.value)
    with pytest.raises(CaptureError, match="special_bessel_j0"):
        capture(Odd(), example=(torch.randn(3, 8),))
    with pytest.raises(CaptureError, match="int"):
        capture(3)
    assert capfd.readouterr() == ("", "")


class Talks(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        print("traced", file=sys.stderr)
        return super().forward(x)


def test_what_a_models_own_code_says_is_passed_on(capfd):
    capture(Talks(8, 8), example=(torch.randn(3, 8),))
    assert "traced" in capfd.readouterr().err


def test_a_compiled_model_is_captured_as_what_it_was_made_of():
    model = tiny("bert").eval()
    data = for_model(model, batch())
    with torch.no_grad():
        found = capture(torch.compile(model))
        found.gm.eval()
        torch.testing.assert_close(run(found, data)[0], eager(model)(**data).logits, rtol=0, atol=0)


def test_multiple_choice_is_told_how_to_do_without():
    config = tiny("bert").config
    with pytest.raises(CaptureError, match="score every choice as a row"):
        capture(transformers.BertForMultipleChoice(config))
    ids = torch.ones(2, 3, 9, dtype=torch.int64)
    with pytest.raises(CaptureError, match=r"shape \(2, 3, 9\)"):
        capture(transformers.BertForMultipleChoice(config), example={"input_ids": ids})
    with pytest.raises(CaptureError, match=r"(?s)shape \(9,\).*give a batch of texts"):
        capture(tiny("bert"), example={"input_ids": torch.arange(9)})


class Written(nn.Module):
    def __init__(self, write) -> None:
        super().__init__()
        self.inner, self.write = nn.Linear(8, 8), write
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.write(self, self.inner(x))


def first_column(_, h):
    h[:, 0] = 0
    return h


def through_a_view(_, h):
    h.view(-1).relu_()
    return h


def view_from_before(_, h):
    view = h.view(-1)
    h.add_(1)
    return view


def count_calls(self, h):
    self.calls += 1
    return h * self.calls


@pytest.mark.parametrize("write", [first_column, through_a_view, view_from_before, count_calls])
def test_writes_that_are_seen_elsewhere_are_refused(write):
    """A graph without in-place ops would leave them out and say nothing."""
    with pytest.raises(CaptureError, match=r"writes in place into .*\[at forward/"):
        capture(Written(write), example=(torch.randn(3, 8),))


def into_a_copy(_, h):
    copy = h.clone()
    copy.add_(1)
    return h + copy


def in_place(_, h):
    h.mul_(2)
    view = h.view(-1)
    view.add_(1)
    return view.relu_()


@pytest.mark.parametrize("write", [into_a_copy, in_place])
def test_other_writes_in_place_are_understood(write):
    model, x = Written(write).eval(), torch.randn(5, 8)
    assert torch.equal(capture(model, example=(torch.randn(3, 8),)).gm.eval()(x)[0], model(x))


def test_dropout_of_whole_features():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout1d(0.5)).train()
    x = torch.randn(6, 4, 8)
    captured = capture(model, example=(x,)).gm.train()
    torch.manual_seed(1)
    want = model(x)
    torch.manual_seed(1)
    assert torch.equal(captured(x)[0], want)
    assert torch.equal(captured.eval()(x)[0], model.eval()(x))


class Nested(nn.Module):
    def __init__(self, of) -> None:
        super().__init__()
        self.inner, self.of = nn.Linear(8, 8), of

    def forward(self, x: torch.Tensor):
        return self.of(self.inner(x))


@pytest.mark.parametrize("of", [lambda h: {"a": (h, h + 1), "b": h + 2}, lambda h: (h, [h + 1])])
def test_outputs_within_outputs_are_refused(of):
    with pytest.raises(CaptureError, match="output ('a'|1) of the model is a (tuple|list)"):
        capture(Nested(of), example=(torch.randn(3, 8),))


def test_dropout_keeps_its_own_p():
    model = tiny("bert", hidden_dropout_prob=0.25, attention_probs_dropout_prob=0.05)
    drops = [m.p for m in capture(model).gm.modules() if isinstance(m, nn.Dropout)]
    assert sorted(set(drops)) == [0.05, 0.25]
    assert "attention_mask" in inspect.signature(model.forward).parameters


def test_an_example_that_is_no_call_is_told() -> None:
    class Two(nn.Module):
        def forward(self, input_ids, attention_mask):
            return input_ids * attention_mask

    with pytest.raises(CaptureError, match="no call of Two: missing a required argument: 'attention_mask'"):
        capture(Two(), {"input_ids": torch.ones(2, 4, dtype=torch.long)})
