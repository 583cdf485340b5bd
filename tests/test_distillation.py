"""The KDLSQ loss against one written from the papers on Hugging Face's own outputs, and what may not leak."""

from __future__ import annotations

import inspect
import math
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, batch, for_model, tiny
from torch import nn

import kdlsq_fx as kq
from kdlsq_fx.distillation import Distiller, distill
from kdlsq_fx.errors import ConfigError, InputError
from kdlsq_fx.kd_targets import with_taps
from kdlsq_fx.model import QuantModel
from kdlsq_fx.tap_plan import TapPlan
from kdlsq_fx.taps import Tap, find_taps

torch.set_num_threads(1)
CLASSIFIER = "ForSequenceClassification"


def float_student(model: nn.Module) -> QuantModel:
    """A student that computes what the model computes: no quantizer is inserted."""
    return kq.prepare_qat(model, "W4E4A8", fuel=0)


@cache
def pair(
    head: str = "ForSequenceClassification", **options: Any
) -> tuple[nn.Module, nn.Module, QuantModel, QuantModel]:
    """Student and teacher of tiny BERT, and the two captured (capturing is what takes time): look, do not change."""
    student, teacher = tiny("bert", head, **options).eval(), tiny("bert", head, seed=1, **options).eval()
    return student, teacher, float_student(student), float_student(teacher)


def scores_of(model: nn.Module, data: dict[str, torch.Tensor]) -> tuple[Any, list[torch.Tensor]]:
    """Hugging Face's outputs, and q k^T / sqrt(d) + mask of every layer, from hooks on query and key."""
    kept: dict[str, torch.Tensor] = {}
    layers = model.bert.encoder.layer  # type: ignore[union-attr]
    hooks = []
    for i, layer in enumerate(layers):  # type: ignore[arg-type]
        for name in ("query", "key"):
            module = getattr(layer.attention.self, name)
            hooks.append(module.register_forward_hook(lambda m, a, out, k=f"{name}{i}": kept.__setitem__(k, out)))
    out = model(**data, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    mask = torch.zeros(data["attention_mask"].shape).masked_fill(data["attention_mask"] == 0, -3.4e38)[:, None, None]
    heads = model.config.num_attention_heads  # type: ignore[union-attr]
    scores = []
    for i in range(len(layers)):  # type: ignore[arg-type]
        q, k = (kept[f"{n}{i}"].unflatten(-1, (heads, -1)).transpose(1, 2) for n in ("query", "key"))
        scores.append(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + mask)
    return out, scores


def expected_loss(student: nn.Module, teacher: nn.Module, data: dict[str, torch.Tensor], padding: str) -> torch.Tensor:
    """L_hid + L_att + L_pred, row by row and token by token, as the docstring of distill words it."""
    ours, our_scores = scores_of(student, data)
    theirs, their_scores = scores_of(teacher, data)
    lengths = data["attention_mask"].sum(1).tolist()
    rows = len(lengths)
    total = torch.zeros(())
    for a, b in zip(ours.hidden_states, theirs.hidden_states):
        if padding == "paper":
            total = total + F.mse_loss(a, b)
        else:
            total = total + sum(F.mse_loss(a[i, :n], b[i, :n]) for i, n in enumerate(lengths)) / rows
    for a, b in zip(our_scores, their_scores):
        if padding == "paper":
            zero = torch.zeros(())
            total = total + F.mse_loss(torch.where(a <= -100, zero, a), torch.where(b <= -100, zero, b))
        else:
            total = total + sum(F.mse_loss(a[i, :, :n, :n], b[i, :, :n, :n]) for i, n in enumerate(lengths)) / rows
    return total - (F.softmax(theirs.logits, -1) * F.log_softmax(ours.logits, -1)).mean()


@pytest.mark.parametrize("padding", ["exclude", "paper"])
@pytest.mark.parametrize("padded", [True, False])
def test_loss_and_gradient_equal_the_papers_form(padding: str, padded: bool) -> None:
    student, teacher = tiny("bert", num_labels=3).eval(), tiny("bert", num_labels=3, seed=1).eval()
    with torch.no_grad():  # larger weights, so that the attention term is no rounding error
        for m in (student, teacher):
            for layer in m.bert.encoder.layer:  # type: ignore[union-attr]
                layer.attention.self.query.weight.mul_(8)
                layer.attention.self.key.weight.mul_(8)
    data = batch()
    if not padded:
        data["attention_mask"] = torch.ones_like(data["attention_mask"])
    kd = distill(float_student(student), teacher, padding=padding).eval()
    got = kd(**data)
    want = expected_loss(student, teacher, data, padding)
    assert got.loss.item() == pytest.approx(want.item(), rel=1e-6, abs=1e-6)
    assert got.parts["attention"] > 1e-3 and got.parts["hidden"] > 1e-3
    got.loss.backward()
    want.backward()
    ours = dict(kd.student.gm.named_parameters())
    for name, p in student.named_parameters():
        if p.grad is not None and name in ours:
            torch.testing.assert_close(ours[name].grad, p.grad, rtol=1e-4, atol=1e-7)


def test_one_sided_masked_scores_count_as_zero_on_their_side() -> None:
    from kdlsq_fx.kd_losses import mse

    s = torch.tensor([[-150.0, 3.0, -1e38]], requires_grad=True)
    t = torch.tensor([[2.0, -150.0, -1e38]])
    loss = mse(s, t, floor=-100.0)
    assert loss.item() == pytest.approx((4 + 9) / 3)
    loss.backward()
    torch.testing.assert_close(s.grad, torch.tensor([[0.0, 2.0, 0.0]]))


def test_squares_have_the_right_gradient() -> None:
    from kdlsq_fx.kd_losses import mse

    torch.manual_seed(0)
    s, t, w = torch.randn(3, 2, 5, 5), torch.randn(3, 2, 5, 5), (torch.rand(3, 5) > 0.3).float()
    a, b = s.clone().requires_grad_(), s.clone().requires_grad_()
    mse(a, t, w, (2, 3)).backward()
    keep = w[:, None, :, None] * w[:, None, None, :]
    (((b - t) ** 2 * keep).sum((1, 2, 3)) / (2 * w.sum(1) ** 2)).mean().backward()
    torch.testing.assert_close(a.grad, b.grad)


def test_splitting_a_batch_does_not_change_the_gradient() -> None:
    kd = distill(*pair()[2:], gold=1.0).eval()
    data = {**batch(rows=4), "labels": torch.tensor([0, 1, 1, 0])}
    loss = kd(**data).loss
    whole = torch.autograd.grad(loss, [p for p in kd.parameters() if p.requires_grad], allow_unused=True)
    parts = [{k: v[i : i + 2] for k, v in data.items()} for i in (0, 2)]
    halves = [
        torch.autograd.grad(kd(**p).loss, [q for q in kd.parameters() if q.requires_grad], allow_unused=True)
        for p in parts
    ]
    for w, a, b in zip(whole, *halves):
        if w is not None:
            torch.testing.assert_close(w, (a + b) / 2, rtol=1e-4, atol=1e-7)


def test_more_padding_does_not_change_the_loss() -> None:
    kd = distill(*pair()[2:]).eval()
    short = batch()
    longer = {k: F.pad(v, (0, 6)) for k, v in short.items()}
    assert kd(**longer).loss.item() == pytest.approx(kd(**short).loss.item(), rel=1e-5)
    paper = distill(*pair()[2:], padding="paper").eval()
    assert paper(**longer).loss.item() != pytest.approx(paper(**short).loss.item(), rel=1e-3)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_taps_are_found_and_learned_from_in_every_family(family: str) -> None:
    model, teacher = tiny(family), tiny(family, seed=1)
    data = for_model(model, batch())
    qat = kq.prepare_qat(model, "W4E4A8")
    kq.calibrate(qat, [data])
    kd = distill(qat, teacher).train()
    assert [t.loss for t in kd.taps] == ["hidden"] * 3 + ["attention"] * 2
    out = kd(**data)
    assert set(out.parts) == {"hidden", "attention", "logits"} and all(v > 0 for v in out.parts.values())
    out.loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in qat.parameters())
    if family in SAME_AS_HUGGING_FACE:
        check_hidden_states(kd.teacher, teacher.eval(), data)


SAME_AS_HUGGING_FACE = ("bert", "roberta", "distilbert", "electra", "albert", "mobilebert", "deberta-v2", "squeezebert")


def check_hidden_states(graph: QuantModel, model: nn.Module, data: dict[str, torch.Tensor]) -> None:
    """The hidden taps hold what Hugging Face returns as ``hidden_states``."""
    want = model(**data, output_hidden_states=True).hidden_states
    found = find_taps(graph.gm)
    _, got = with_taps(graph.gm, list(found.hidden))(*(data[n] for n in graph.input_names))
    assert len(got) == len(want) and "hidden" in found.report()
    for value, expected in zip(got, want):
        turned = value.shape != expected.shape  # SqueezeBERT's blocks run over (batch, width, length)
        torch.testing.assert_close(value.transpose(1, 2) if turned else value, expected, rtol=1e-4, atol=1e-5)


def test_the_teacher_is_frozen_and_nowhere_to_be_found() -> None:
    model, teacher = tiny("bert"), tiny("bert", seed=1).train()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    qat = float_student(model)
    kd = distill(qat, teacher, gold=1.0)
    assert list(kd.state_dict()) == [f"student.{k}" for k in qat.state_dict()]
    assert len(list(kd.parameters())) == len(list(qat.parameters()))
    kd.train()
    assert qat.training and not kd.teacher.training
    assert not any(m.training for m in kd.teacher.modules() if isinstance(m, nn.Dropout))
    optimizer = torch.optim.SGD(kd.parameters(), lr=0.1)
    out = kd(**batch(), labels=torch.tensor([0, 1, 0, 1]))
    out.loss.backward()
    optimizer.step()
    assert all(p.grad is None and not p.requires_grad for p in kd.teacher.parameters())
    assert teacher.training and all(p.requires_grad and p.grad is None for p in teacher.parameters())
    for k, v in teacher.state_dict().items():
        assert torch.equal(v, before[k])
    kd.eval()
    assert not qat.training


def test_student_keeps_its_dropout_and_its_parameters() -> None:
    qat = float_student(tiny("bert"))
    kd = distill(qat, pair()[3])
    kd.train()
    assert kd(**batch()).loss.item() != kd(**batch()).loss.item()
    kd.eval()
    first = kd(**batch()).logits
    torch.testing.assert_close(first, qat(**batch()).logits, rtol=0, atol=0)
    with torch.no_grad():
        for p in qat.parameters():
            p.mul_(1.5)
    assert not torch.equal(kd(**batch()).logits, first)
    torch.testing.assert_close(kd(**batch()).logits, qat(**batch()).logits, rtol=0, atol=0)


def test_to_moves_the_teacher_and_replaced_buffers_stay_shared() -> None:
    kd = distill(float_student(tiny("bert")), pair()[3]).double()
    assert {p.dtype for p in kd.teacher.parameters()} == {torch.float64}
    tapped = kd._unregistered[1]
    for name, p in kd.student.gm.named_parameters():
        assert tapped.get_parameter(name) is p


def test_convert_takes_the_student_after_distillation() -> None:
    model = tiny("bert")
    qat = kq.prepare_qat(model, "W8E8A8")
    data = batch()
    kq.calibrate(qat, [data])
    kd = distill(qat, model)
    kd(**data).loss.backward()
    with pytest.raises(ConfigError, match=r"got a Distiller\n.*kd\.student"):
        kq.convert(kd)
    frozen = kq.freeze_qat(kd.student)
    torch.testing.assert_close(frozen(**data).logits, kd.eval()(**data).logits, rtol=0, atol=0)


def test_weights_scale_the_terms_and_zero_leaves_them_out() -> None:
    student, _, *both = pair()
    data = {**batch(), "labels": torch.tensor([0, 1, 1, 0])}
    one = distill(*both, gold=1.0).eval()(**data)
    kd = distill(*both, hidden=2, attention=3, logits=5, gold=7).eval()
    p = one.parts
    want = 2 * p["hidden"] + 3 * p["attention"] + 5 * p["logits"] + 7 * p["gold"]
    assert kd(**data).loss.item() == pytest.approx(want.item(), rel=1e-6)
    assert p["gold"].item() == pytest.approx(student.eval()(**data).loss.item(), rel=1e-5)
    bare = distill(*both, hidden=0, attention=0).eval()
    assert bare.taps == () and set(bare(**data).parts) == {"logits"}


def test_temperature_softens_both_sides() -> None:
    (student, teacher, *both), data = pair(), batch()
    kd = distill(*both, temperature=2.0, hidden=0, attention=0).eval()
    s, t = student(**data).logits / 2, teacher(**data).logits / 2
    want = -(t.softmax(-1) * s.log_softmax(-1)).mean() * 4
    assert kd(**data).loss.item() == pytest.approx(want.item(), rel=1e-5)


def test_regression_learns_the_teachers_output() -> None:
    student, teacher, *both = pair(num_labels=1)
    kd = distill(*both, hidden=0, attention=0).eval()
    want = F.mse_loss(student(**batch()).logits, teacher(**batch()).logits)
    assert kd(**batch()).parts["logits"].item() == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize("padding", ["exclude", "paper"])
def test_question_answering_sums_start_and_end(padding: str) -> None:
    student, teacher, *both = pair("ForQuestionAnswering")
    data = batch()
    kd = distill(*both, hidden=0, attention=0, padding=padding).eval()
    a, b = student(**data), teacher(**data)
    want = torch.zeros(())
    for s, t in ((a.start_logits, b.start_logits), (a.end_logits, b.end_logits)):
        if padding == "paper":
            want = want - (t.softmax(-1) * s.log_softmax(-1)).mean()
        else:
            for i, n in enumerate(data["attention_mask"].sum(1).tolist()):
                want = want - (t[i, :n].softmax(-1) * s[i, :n].log_softmax(-1)).mean() / len(s)
    out = kd(**data)
    assert out.loss.item() == pytest.approx(want.item(), rel=1e-5)
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in kd.parameters() if p.grad is not None)


def test_token_logits_leave_padding_out() -> None:
    student, teacher, *both = pair("ForTokenClassification", num_labels=3)
    data = batch()
    kd = distill(*both, hidden=0, attention=0).eval()
    s, t = student(**data).logits, teacher(**data).logits
    each = -(t.softmax(-1) * s.log_softmax(-1)).mean(-1)
    want = sum(each[i, :n].mean() for i, n in enumerate(data["attention_mask"].sum(1).tolist())) / 4
    assert kd(**data).loss.item() == pytest.approx(want.item(), rel=1e-5)


def test_a_bare_encoder_learns_hidden_states_and_sentence_vectors() -> None:
    student, teacher, *both = pair("Model")
    data = batch()
    assert set(distill(*both).eval()(**data).parts) == {"hidden", "attention"}
    kd = distill(*both, hidden=0, attention=0, pooled=1.0).eval()
    mask = data["attention_mask"].unsqueeze(-1)
    vectors = [(m(**data).last_hidden_state * mask).sum(1) / mask.sum(1) for m in (student, teacher)]
    want = (1 - F.cosine_similarity(*vectors)).mean()
    assert kd(**data).loss.item() == pytest.approx(want.item(), rel=1e-5)


def test_a_teacher_with_another_prefix_or_a_quantized_one() -> None:
    student, data = pair()[2], batch()
    bare = distill(student, pair("Model")[3], logits=0).eval()
    assert bare.taps[1].student == f"bert.{bare.taps[1].teacher}" and bare(**data).loss > 0
    assert "<-" in bare.report()
    helper = kq.prepare_qat(tiny("bert", seed=1), "W8E8A8")
    kq.calibrate(helper, [data])
    kd = distill(student, helper)
    assert kd(**data).loss > 0 and helper.training and kd.teacher is not helper
    assert all(p.requires_grad for p in helper.parameters())


def test_own_taps_replace_the_found_ones() -> None:
    (student, _, qat, _), data = pair(), batch()
    _, teacher, _, deep = pair(num_hidden_layers=4)
    site = "bert.encoder.layer.{}.output.LayerNorm/layer_norm"
    taps = [Tap(student=site.format(i), teacher=site.format(2 * i + 1), loss="hidden") for i in (0, 1)]
    kd = distill(qat, deep, plan=TapPlan(taps=taps), logits=0, padding="paper").eval()
    a, b = (m(**data, output_hidden_states=True).hidden_states for m in (student, teacher))
    want = F.mse_loss(a[1], b[2]) + F.mse_loss(a[2], b[4])
    assert kd(**data).loss.item() == pytest.approx(want.item(), rel=1e-5)
    with pytest.raises(ConfigError, match="layer.9"):
        distill(qat, deep, plan=TapPlan(taps=[Tap(student=site.format(9), teacher=site.format(0), loss="hidden")]))
    logits = Tap(student="classifier/linear", teacher="classifier/linear", loss="logits")
    alone = distill(qat, deep, plan=TapPlan(taps=[logits])).eval()(**data)
    want = -(teacher(**data).logits.softmax(-1) * student(**data).logits.log_softmax(-1)).mean()
    assert alone.loss.item() == pytest.approx(want.item(), rel=1e-5)


def test_output_is_read_by_name_key_and_position_and_the_signature_is_the_models() -> None:
    model, _, *both = pair()
    kd = distill(*both).eval()
    out = kd(**batch())
    assert out.loss is out["loss"] is out[0] and out.logits is out[1] is out.to_tuple()[1]
    assert isinstance(out, dict) and list(out) == ["loss", "logits"]
    assert inspect.signature(kd.forward).parameters.keys() == inspect.signature(model.forward).parameters.keys()
    assert isinstance(kd, Distiller) and kd.config is kd.student.config
    assert not hasattr(out, "nothing")


def test_save_pretrained_writes_the_student_alone(tmp_path: Any) -> None:
    qat = pair()[2]
    kd = distill(*pair()[2:])
    kd.save_pretrained(tmp_path / "kd")
    qat.save_pretrained(tmp_path / "qat")
    names = {p.name for p in (tmp_path / "qat").iterdir()}
    assert {p.name for p in (tmp_path / "kd").iterdir()} == names
    for name in names:
        assert (tmp_path / "kd" / name).read_bytes() == (tmp_path / "qat" / name).read_bytes()


def test_a_plain_module_learns_from_another() -> None:
    def net(seed: int, bias: float) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))

    x = torch.randn(4, 6)
    qat = kq.prepare_qat(net(0, 0), "W8E8A8", example=(x,), fuel=0)
    kd = distill(qat, net(1, 0), attention=0)
    out = kd(x)
    assert set(out.parts) == {"hidden", "logits"} and torch.isfinite(out.loss)
    with pytest.raises(ConfigError, match="attention taps"):
        distill(qat, net(1, 0))


def test_padding_that_cannot_be_told_apart_is_refused() -> None:
    """A ready mask says nothing of queries; in a graph of fixed sizes a width may be as long as a text."""
    model = tiny("bert").eval()
    model.set_attn_implementation("eager")
    ready = {"input_ids": batch()["input_ids"], "attention_mask": torch.zeros(4, 1, 9, 9)}
    both = [kq.prepare_qat(model, "W8E8A8", fuel=0, example=ready) for _ in range(2)]
    with pytest.raises(ConfigError, match="captured as a ready mask"):
        distill(*both)
    assert distill(*both, padding="paper")(**ready).loss >= 0
    program = torch.export.export(model, (), batch(4, 32), strict=False)  # 32 features, too
    with pytest.raises(ConfigError, match=r"32 tokens in this graph.*\(4, 32, 32\)"):
        distill(kq.prepare_qat(program, "W8E8A8", fuel=0), pair()[3])
    program = torch.export.export(model, (), batch(4, 12), strict=False)
    fixed = distill(kq.prepare_qat(program, "W8E8A8", fuel=0), pair()[3]).eval()(**batch(4, 12))
    free = distill(pair()[2], pair()[3]).eval()(**batch(4, 12))
    torch.testing.assert_close(fixed.loss, free.loss)


def test_mistakes_are_told(tmp_path: Any) -> None:
    model, _, qat, other = pair()
    with pytest.raises(ConfigError, match="itself"):
        distill(qat, qat)
    with pytest.raises(ConfigError, match="qat model"):
        distill(model, model)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="cannot teach"):
        distill(qat, "bert-base-uncased")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="logits"):
        distill(qat, tiny("bert", num_labels=5))
    for wrong in ({"hidden": -1.0}, {"logits": float("nan")}, {"temperature": 0.0}, {"padding": "no"}):
        with pytest.raises(ConfigError):
            distill(qat, other, **wrong)
    with pytest.raises(ConfigError, match="every weight is 0"):
        distill(qat, other, hidden=0, attention=0, logits=0)
    with pytest.raises(ConfigError, match="no loss 'cosine'"):
        Tap(student="a", teacher="b", loss="cosine")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no labels"):
        distill(qat, other, gold=1.0)(**batch())
