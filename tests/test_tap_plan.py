"""Tap plans between networks that are not the same: found, printed, saved, edited, trained through, refused."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import batch, for_model, tiny
from torch import nn

import kdlsq_fx as kq
from kdlsq_fx.distillation import distill
from kdlsq_fx.errors import CheckpointError, ConfigError, InputError
from kdlsq_fx.graph import site_of
from kdlsq_fx.layer_maps import layer_pairs
from kdlsq_fx.model import QuantModel
from kdlsq_fx.planning import plan_taps
from kdlsq_fx.tap_plan import Side, TapPlan
from kdlsq_fx.taps import Tap, find_taps

torch.set_num_threads(1)


def captured(model: nn.Module) -> QuantModel:
    """The float graph, no quantizer inserted."""
    return kq.prepare_qat(model, "W4E4A8", fuel=0)


@cache
def small(
    family: str = "bert", head: str = "ForSequenceClassification", **changes: Any
) -> tuple[nn.Module, QuantModel]:
    """A tiny model and its graph (capturing is what takes time): look, do not change."""
    model = tiny(family, head, **changes).eval()
    return model, captured(model)


def test_layer_maps_against_the_papers_formulas() -> None:
    """HSK's code, evaluated by hand: TinyBERT-4 and ROSITA-6 of a 12-layer teacher at t_top12, t_top10, t_top8."""
    g = {
        (6, 12): [0, 2, 4, 6, 8, 10, 12], (6, 10): [0, 2, 3, 5, 7, 8, 10], (6, 8): [0, 1, 3, 4, 5, 7, 8],
        (4, 12): [0, 3, 6, 9, 12], (4, 10): [0, 2, 5, 8, 10], (4, 8): [0, 2, 4, 6, 8],
    }  # fmt: skip
    for (student, top), want in g.items():
        assert [b for _, b in layer_pairs(f"hsk:{top}", student, 12)] == want
    assert layer_pairs("uniform", 4, 6) == ((0, 0), (1, 2), (2, 3), (3, 4), (4, 6))  # 1.5 -> 2, 4.5 -> 4: half to even
    assert layer_pairs("top", 4, 6) == ((0, 0), (1, 3), (2, 4), (3, 5), (4, 6))
    assert layer_pairs("skip", 5, 12) == ((0, 0), (1, 2), (2, 4), (3, 6), (4, 8), (5, 10))
    assert layer_pairs({2: 5, 1: 1}, 2, 6) == ((1, 1), (2, 5))


def nearest_even(numerator: int, denominator: int) -> int:
    """round-half-even of a fraction in whole numbers only."""
    whole, rest = divmod(numerator, denominator)
    return whole + (2 * rest > denominator or (2 * rest == denominator and whole % 2 == 1))


def test_layer_maps_at_every_depth() -> None:
    for student in range(1, 25):
        for teacher in range(1, 25):
            uniform = layer_pairs("uniform", student, teacher)
            assert uniform == tuple((n, nearest_even(n * teacher, student)) for n in range(student + 1))
            assert uniform[0] == (0, 0) and uniform[-1] == (student, teacher)
            if teacher >= student:
                assert layer_pairs("top", student, teacher)[-student:] == tuple(
                    zip(range(1, student + 1), range(teacher - student + 1, teacher + 1))
                )


def test_layer_maps_that_make_no_sense() -> None:
    for wrong, what in (
        ("hsk:20", "layer 20 of the teacher"), ("bottom", "no layer map 'bottom'"), ({1: 13}, "layer 13"),
        ({7: 1}, "layer 7 of the student"), ({}, "no layer map"), ({1: 2.5}, "2.5"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=what):
            layer_pairs(wrong, 6, 12)
    for name in ("top", "skip"):
        with pytest.raises(ConfigError, match="at least as deep"):
            layer_pairs(name, 12, 6)


def test_a_shallower_student_learns_from_the_mapped_layers() -> None:
    (student, qat), (teacher, deep) = small(), small(num_hidden_layers=4, seed=1)
    data = batch()
    kd = distill(qat, deep, logits=0, attention=0, padding="paper").eval()
    a, b = (m(**data, output_hidden_states=True).hidden_states for m in (student, teacher))
    want = sum(F.mse_loss(a[i], b[j]) for i, j in ((0, 0), (1, 2), (2, 4)))
    assert kd(**data).loss.item() == pytest.approx(float(want), rel=1e-5)
    assert not kd.projections and kd.plan.layers() == {0: (0,), 1: (2,), 2: (4,)}
    assert distill(qat, deep, plan={"layer_map": "top"}).plan.layers() == {0: (0,), 1: (3,), 2: (4,)}
    with pytest.raises(ConfigError, match="not found by 'map'"):
        distill(qat, deep, plan={"map": "top"})
    top = plan_taps(qat, deep, layer_map="top", kinds=["attention"])
    assert tuple(t.teacher for t in top.taps) == tuple(top.teacher.attention)[-2:]


def test_a_narrower_student_learns_through_one_shared_projection() -> None:
    (student, qat), (teacher, wide) = small(), small(hidden_size=48, num_hidden_layers=4, seed=1)
    data = batch()
    kd = distill(qat, wide, logits=0, attention=0, padding="paper").eval()
    assert list(kd.projections) == ["hidden"] and kd.projections["hidden"].weight.shape == (48, 32)
    a, b = (m(**data, output_hidden_states=True).hidden_states for m in (student, teacher))
    w, bias = kd.projections["hidden"].weight, kd.projections["hidden"].bias
    want = sum(F.mse_loss(a[i] @ w.T + bias, b[j]) for i, j in ((0, 0), (1, 2), (2, 4)))
    loss = kd(**data).loss
    assert loss.item() == pytest.approx(float(want), rel=1e-5)
    loss.backward()
    assert w.grad is not None and w.grad.abs().sum() > 0
    each = plan_taps(qat, wide, projections="per_tap", kinds=["hidden"])
    assert each.projections == {f"hidden_{i}": (32, 48) for i in range(3)}


def test_projections_start_alike_everywhere_and_keep_lengths() -> None:
    from kdlsq_fx.projection import make_projections

    torch.manual_seed(1)
    one = make_projections({"hidden": (32, 48)})
    state = torch.get_rng_state()
    two = make_projections({"hidden": (32, 48)})
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one["hidden"].weight, two["hidden"].weight)
    x = torch.randn(5, 32)
    torch.testing.assert_close(one["hidden"](x).norm(dim=1), x.norm(dim=1))


OTHERS = [
    ("bert", "distilbert", {}, "hidden attention"),
    ("bert", "albert", {"num_hidden_layers": 4}, "hidden attention"),
    ("bert", "electra", {"hidden_size": 48}, "hidden attention"),
    ("distilbert", "mobilebert", {"hidden_size": 64, "num_attention_heads": 2}, "hidden"),
    ("squeezebert", "bert", {"hidden_size": 48, "num_hidden_layers": 3}, "hidden attention"),
    ("deberta-v2", "bert", {"hidden_size": 48}, "hidden attention"),
    ("modernbert", "bert", {"num_hidden_layers": 3}, "hidden attention"),
]


@pytest.mark.parametrize("mine, theirs, changes, kinds", OTHERS)
def test_another_family_teaches(mine: str, theirs: str, changes: dict[str, Any], kinds: str) -> None:
    (model, qat), (teacher, graph) = small(mine), small(theirs, seed=1, **changes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kd = distill(qat, graph, padding="paper").eval()
    assert {t.loss for t in kd.taps} == set(kinds.split())
    assert [t.loss for t in kd.taps].count("hidden") == 3
    both = [for_model(m, batch()) for m in (model, teacher)]
    out = kd(**both[0])
    a, b = (m(**d, output_hidden_states=True).hidden_states for m, d in zip((model, teacher), both))
    layers = len(b) - 1
    want = torch.zeros(())
    for i in range(3):
        if i == 2 and mine == "modernbert":  # its last hidden state has the final norm, which is no block's
            continue
        through = kd.projections["hidden"](a[i]) if kd.projections else a[i]
        want = want + F.mse_loss(through, b[nearest_even(i * layers, 2)])
    if mine != "modernbert":
        assert out.parts["hidden"].item() == pytest.approx(want.item(), rel=1e-4)
    assert torch.isfinite(out.loss)


def test_other_heads_leave_attention_out_and_say_so() -> None:
    (_, qat), (_, graph) = small(), small(num_attention_heads=2, seed=1)
    with pytest.warns(UserWarning, match="attention taps left out: the student has 4 heads, the teacher 2"):
        kd = distill(qat, graph)
    assert {t.loss for t in kd.taps} == {"hidden"} and "note: attention taps left out" in kd.report()


def test_a_plan_printed() -> None:
    (_, qat), (_, graph) = small(), small("distilbert", dim=48, n_layers=4, seed=1)
    assert str(plan_taps(qat, graph)) == PRINTED.strip()


PRINTED = """
student: BertForSequenceClassification (2 layers, 32 wide, 4 heads, 99 token ids)
teacher: DistilBertForSequenceClassification (4 layers, 48 wide, 4 heads, 99 token ids)
layers: 0<-0  1<-2  2<-4
inputs: one batch for both
hidden     bert.embeddings.dropout/dropout  <-  distilbert.embeddings.dropout/dropout  through hidden
hidden     bert.encoder.layer.0.output.LayerNorm/layer_norm  \
<-  distilbert.transformer.layer.1.output_layer_norm/layer_norm  through hidden
hidden     bert.encoder.layer.1.output.LayerNorm/layer_norm  \
<-  distilbert.transformer.layer.3.output_layer_norm/layer_norm  through hidden
attention  bert.encoder.layer.0.attention.self/add  <-  distilbert.transformer.layer.1.attention/add
attention  bert.encoder.layer.1.attention.self/add  <-  distilbert.transformer.layer.3.attention/add
projection hidden: 32 -> 48, trained with the student, for 3 taps
outputs: logits
"""


@cache
def strangers() -> tuple[nn.Module, QuantModel, nn.Module, QuantModel]:
    """A BERT and a wider RoBERTa with a vocabulary of its own."""
    return *small(), *small("roberta", vocab_size=120, hidden_size=48, seed=1)


def both_inputs() -> dict[str, torch.Tensor]:
    """One batch, read by the teacher in ids of its own and at another length."""
    return {**batch(), **{f"teacher_{k}": v for k, v in batch(length=12, vocab=120, seed=3).items() if "type" not in k}}


def test_across_tokenizers_logits_and_pooled_states_only() -> None:
    model, qat, teacher, graph = strangers()
    plan = plan_taps(qat, graph)
    assert [t.loss for t in plan.taps] == ["pooled"] and plan.teacher_inputs == "own" and plan.outputs == ("logits",)
    for kind in ("hidden", "attention"):
        assert f"note: {kind} taps left out: two tokenizers (99 and 120 token ids)" in str(plan)
    with pytest.warns(UserWarning, match="weight is 0.*pooled=1.0"):
        assert not distill(qat, graph, plan=plan).taps
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distill(qat, graph, plan=plan, pooled=0)
    kd = distill(qat, graph, plan=plan, pooled=2.0).eval()
    data = both_inputs()
    out = kd(**data)
    own = {k.removeprefix("teacher_"): v for k, v in data.items() if k.startswith("teacher_")}
    a, b = model(**batch(), output_hidden_states=True), teacher(**own, output_hidden_states=True)
    vectors = []
    for states, mask in (
        (a.hidden_states[-1], batch()["attention_mask"]),
        (b.hidden_states[-1], own["attention_mask"]),
    ):
        vectors.append(torch.stack([s[: int(n)].mean(0) for s, n in zip(states, mask.sum(1))]))
    pooled = (1 - F.cosine_similarity(kd.projections["pooled"](vectors[0]), vectors[1])).mean()
    logits = -(b.logits.softmax(-1) * a.logits.log_softmax(-1)).mean()
    assert out.parts["pooled"].item() == pytest.approx(pooled.item(), abs=1e-6)
    assert out.loss.item() == pytest.approx((2 * pooled + logits).item(), rel=1e-5)
    assert "teacher_input_ids" in type(kd).forward.__signature__.parameters  # the Trainer keeps the column


def test_across_tokenizers_each_side_needs_its_inputs() -> None:
    _, qat, _, graph = strangers()
    with pytest.warns(UserWarning, match="hidden taps left out: two tokenizers"):
        kd = distill(qat, graph)
        with pytest.raises(ConfigError, match="the plan has no hidden taps .*two tokenizers"):
            distill(qat, graph, compress="1l")
    with pytest.raises(InputError, match="no teacher_input_ids"):
        kd(**batch())
    with pytest.raises(InputError, match="teacher_input_ids.*both models read one batch"):
        distill(qat, small(seed=1)[1])(**both_inputs())
    qa = [small(head="ForQuestionAnswering")[1], small("roberta", "ForQuestionAnswering", vocab_size=120)[1]]
    with pytest.raises(ConfigError, match="start_logits: one row a token"):
        distill(*qa, hidden=0, attention=0, pooled=1.0)
    assert "note: end_logits left out: one row a token" in str(plan_taps(*qa))
    head = Tap(student="qa_outputs/linear", teacher="qa_outputs/linear", loss="logits")
    with pytest.raises(ConfigError, match="a logits tap with one row a token"):
        distill(*qa, plan=TapPlan(taps=[head], teacher_inputs="own"))


def encoded(vocab: int, lengths: list[int], labels: Any) -> Any:
    import numpy as np

    from kdlsq_fx.data import Encoded

    starts = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.random.default_rng(vocab).integers(3, vocab, starts[-1]).astype(np.int32)
    return Encoded(ids, None, starts, np.asarray(labels))


def test_rows_read_by_two_tokenizers() -> None:
    from kdlsq_fx.data import Paired

    ours, theirs = encoded(99, [4, 6, 3, 5], [0, 1, 1, 0]), encoded(120, [7, 5, 5, 9], [0, 1, 1, 0])
    data = Paired.of(ours, theirs)
    got = data.batch([3, 1])
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(got[name], ours.batch([3, 1])[name])
        assert torch.equal(got[f"teacher_{name}"], theirs.batch([3, 1])[name])
    assert got["teacher_input_ids"].shape == (2, 9) and "teacher_labels" not in got
    assert not any("teacher" in k for one in data.sample(2, batch_size=2, seed=0) for k in one)
    assert len(data.head(2)) == len(data.head(2).theirs) == 2
    assert data.fingerprint not in (ours.fingerprint, Paired.of(ours, ours).fingerprint)
    with pytest.raises(InputError, match="not the same rows"):
        Paired.of(ours, theirs.head(3))
    with pytest.raises(InputError, match="not the same rows"):
        Paired.of(ours, encoded(120, [7, 5, 5, 9], [0, 1, 1, 1]))
    _, qat, _, graph = strangers()
    kd = distill(qat, graph, plan=plan_taps(qat, graph), pooled=1.0)
    assert torch.isfinite(kd(**got).loss)


def test_a_padded_table_is_the_same_tokenizer_where_the_user_says_so() -> None:
    (_, qat), (_, padded) = small(), small(vocab_size=104, seed=1)
    plan = plan_taps(qat, padded, same_tokenizer=True)
    assert plan.teacher_inputs == "shared" and len(plan.taps) == 5
    assert distill(qat, padded, plan=plan).eval()(**batch()).parts["hidden"] > 0


def test_a_plan_is_saved_edited_and_loaded(tmp_path: Path) -> None:
    (_, qat), (_, wide) = small(), small(hidden_size=48, num_hidden_layers=4, seed=1)
    plan = plan_taps(qat, wide)
    file = plan.save(tmp_path / "deep" / "plan.json")
    assert TapPlan.load(file) == plan
    data = json.loads(file.read_text())
    data["taps"] = [t for t in data["taps"] if t["loss"] == "hidden"][1:]
    data["taps"][0]["teacher"] = data["teacher"]["hidden"][1]
    file.write_text(json.dumps(data))
    kd = distill(qat, wide, plan=TapPlan.load(file))
    assert kd.plan.layers() == {1: (1,), 2: (4,)} and "1<-1  2<-4" in kd.report()
    assert len(plan.only(["attention"]).taps) == 2 and not plan.only(["attention"]).projections


def test_a_layer_map_in_a_file_is_held_against_its_taps() -> None:
    """Plans of before named the map that made them; the entry moves no tap, so one that says otherwise is refused."""
    (_, qat), (_, deep) = small(), small(num_hidden_layers=4, seed=1)
    for kinds in (None, ["hidden", "pooled"], ["attention"]):
        plan = plan_taps(qat, deep, layer_map="hsk:3", kinds=kinds)
        assert "layer_map" not in plan.to_dict()
        for agrees in ("hsk:3", "given", {"0": 0, "1": 2, "2": 3}):
            assert TapPlan.from_dict({**plan.to_dict(), "layer_map": agrees}) == plan
        for wrong in ("top", "uniform", {"1": 2}, None):
            with pytest.raises(ConfigError, match=r"the taps compare layers.* 2<-3(?s:.*)layer_map=\.\.\."):
                TapPlan.from_dict({**plan.to_dict(), "layer_map": wrong})
    with pytest.raises(ConfigError, match="no layer map 'bottom'"):
        TapPlan.from_dict({**plan.to_dict(), "layer_map": "bottom"})
    with pytest.raises(ConfigError, match=r"no 'layer_map'(?s:.*)plan=kq.plan_taps\(student, teacher, layer_map="):
        distill(qat, deep, layer_map="top")


def test_a_picture_is_svg_and_one_is_no_plural(tmp_path: Path) -> None:
    side = Side(name="net", hidden=("a", "b"), attention={"x": 1}, width=8, heads=1)
    tap = Tap(student="b", teacher="b", loss="hidden", projection="p")
    plan = TapPlan(taps=(tap,), projections={"p": (8, 8)}, student=side, teacher=side)
    for name in ("plan.png", "plan"):
        with pytest.raises(ConfigError, match="give a name that ends in .svg"):
            plan.draw(tmp_path / name)
    assert not list(tmp_path.iterdir())
    for text in (str(plan), plan.draw(tmp_path / "plan.SVG").read_text()):
        assert "1 layer, 8 wide, 1 head" in text and "for 1 tap" in text
        assert not any(f"1 {what}s" in text for what in ("layer", "head", "tap"))


def test_the_picture_shows_every_tap(tmp_path: Path) -> None:
    from xml.etree import ElementTree

    plan = plan_taps(small()[1], small("distilbert", dim=48, n_layers=4, seed=1)[1])
    lost = dataclasses.replace(plan, taps=(*plan.taps, Tap(student="a<b>", teacher="head", loss="logits")))
    for drawn, taps in ((plan, 5), (lost, 6)):
        root = ElementTree.parse(drawn.draw(tmp_path / "pictures" / "plan.svg")).getroot()
        name = "{http://www.w3.org/2000/svg}"
        told = [e.text for line in root.iter(f"{name}line") for e in line.iter(f"{name}title")]
        assert told == [f"{t.student} <- {t.teacher}" for t in drawn.taps] and len(told) == taps
        texts = [e.text for e in root.iter(f"{name}text")]
        assert texts.count("embeddings") == 2 and texts.count("layer 2") == 2 and texts.count("layer 4") == 1
        wide, tall = float(root.get("width", 0)), float(root.get("height", 0))
        for box in root.iter(f"{name}rect"):
            x, y = float(box.get("x", 0)), float(box.get("y", 0))
            assert 0 <= x <= x + float(box.get("width", 0)) <= wide and 0 <= y <= tall
        level = [e for e in root.iter(f"{name}line") if e.get("y1") == e.get("y2") and list(e)]
        assert len(level) >= 5  # the uniform map is level
    assert any("projection hidden: 32 → 48" in (t or "") for t in texts)


def edited(plan: TapPlan, change: Any) -> dict[str, Any]:
    data = json.loads(json.dumps(plan.to_dict()))
    change(data)
    return data


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda d: d.pop("taps"), "the plan has no taps"),
        (lambda d: d.update(notes=[1]), "notes has 1 in it"),
        (lambda d: d.update(outputs=[None]), "outputs has None in it"),
        (lambda d: d["student"].update(first=True), "student: first is True"),
        (lambda d: d["student"].update(hidden=[1, "b"]), "student: hidden has 1 in it"),
        (lambda d: d["student"].update(attention={"x": 0}), "attention in block 0"),
        (lambda d: d["taps"][0].update(student=""), "a site is empty"),
        (lambda d: d.update(teacher_inputs="both"), "teacher_inputs='both'"),
    ],
)
def test_an_entry_that_makes_no_sense_is_named_with_its_file(change: Any, told: str, tmp_path: Path) -> None:
    side = Side(name="net", hidden=("a", "b"), attention={"x": 1})
    plan = TapPlan(taps=(Tap(student="b", teacher="b", loss="hidden"),), student=side, teacher=side)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(edited(plan, change)))
    with pytest.raises(ConfigError, match=re.escape(told)) as caught:
        TapPlan.load(path)
    assert str(path) in str(caught.value)


def test_the_outputs_of_a_plan_are_what_is_compared() -> None:
    (_, qat), (_, teacher) = small(), small(seed=1)
    plan = plan_taps(qat, teacher)

    def terms(outputs: Any) -> set[str]:
        kd = distill(qat, teacher, plan=TapPlan.from_dict(edited(plan, lambda d: d.update(outputs=outputs))))
        assert set(kd.plan.outputs or ()) == set(kd.eval()(**batch()).parts) & {"logits"}
        return set(kd(**batch()).parts)

    assert terms(["logits"]) == terms(None) == {"hidden", "attention", "logits"}
    assert terms([]) == {"hidden", "attention"}
    with pytest.raises(ConfigError, match="no output 'start_logits'.*\n.*it has logits"):
        terms(["logits", "start_logits"])
    five = small(num_labels=5)[1]
    found = plan_taps(qat, five)
    assert not found.outputs and "note: logits left out: the student's shape is (?, 2), the teacher's (?, 5)" in str(
        found
    )
    assert set(distill(qat, five, plan=found).eval()(**batch()).parts) == {"hidden", "attention"}
    with pytest.raises(ConfigError, match="logits: the student's shape"):
        distill(qat, five, plan=dataclasses.replace(found, outputs=("logits",)))
    qa = small(head="ForQuestionAnswering")[1], small(head="ForQuestionAnswering", seed=1)[1]
    whole, start = (distill(*qa, plan=TapPlan(taps=(), outputs=o)).eval() for o in (None, ("start_logits",)))
    assert 0 < start(**batch()).loss < whole(**batch()).loss


class Reversed(nn.Module):
    """Blocks; ``order`` says which runs when, whatever their numbers."""

    def __init__(self, order: tuple[int, ...]) -> None:
        super().__init__()
        self.order = order
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.GELU()) for _ in order)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.tanh()
        for i in self.order:
            x = self.layers[i](x)
        return x


def test_layers_that_match_are_compared_though_they_run_in_another_order() -> None:
    both = [kq.prepare_qat(Reversed(o), "W8E8A8", example=(torch.randn(2, 4),), fuel=0) for o in ((0, 1), (1, 0))]
    taps = plan_taps(*both, kinds="hidden").taps
    assert len(taps) == 3 and all(t.student == t.teacher for t in taps)
    assert [t.student for t in taps] == [site_of(n) for n in find_taps(both[0].gm).hidden]
    assert [t.teacher for t in taps] != [site_of(n) for n in find_taps(both[1].gm).hidden]


BROKEN = [
    ("'nonsense' is not compared", lambda d: d.update(outputs=["nonsense"])),
    ("no projection 'narrow'", lambda d: d["taps"][0].update(projection="narrow")),
    ("no width to project", lambda d: d["taps"][-1].update(projection="hidden")),
    ("no tap goes through projection 'spare'", lambda d: d["projections"].update(spare=[32, 48])),
    ("no widths", lambda d: d["projections"].update(hidden=[32, 0])),
    ("projection hidden: 'wide'", lambda d: d["projections"].update(hidden="wide")),
    ("cannot be called 'a.b'", lambda d: d["projections"].update({"a.b": [32, 48]})),
    ("no loss 'cosine'", lambda d: d["taps"][0].update(loss="cosine")),
    ("tap 0 has an entry 'weight'", lambda d: d["taps"][0].update(weight=2)),
    ("tap 0: student is 7", lambda d: d["taps"][0].update(student=7)),
    ("tap 1 is a str", lambda d: d["taps"].__setitem__(1, "layer 1")),
    ("tap 0: .*teacher", lambda d: d["taps"][0].pop("teacher")),
    ("the plan has an entry 'layers'", lambda d: d.update(layers=6)),
    ("taps is a dict", lambda d: d.update(taps={})),
    ("student: first is 'no'", lambda d: d["student"].update(first="no")),
    ("stands twice", lambda d: d["taps"].append(d["taps"][0])),
    ("teacher_inputs='mine'", lambda d: d.update(teacher_inputs="mine")),
    ("compares token by token", lambda d: d.update(teacher_inputs="own")),
]


@pytest.mark.parametrize("told, change", BROKEN)
def test_a_broken_plan_is_refused(told: str, change: Any) -> None:
    plan = plan_taps(small()[1], small(hidden_size=48, num_hidden_layers=4, seed=1)[1])
    with pytest.raises(ConfigError, match=told):
        TapPlan.from_dict(edited(plan, change))


MISFITS = [
    ("the student has no site", lambda d: d["taps"][0].update(student="bert.encoder.layer.9/add")),
    ("the teacher has no site", lambda d: d["taps"][1].update(teacher="bert.encoder.layer.9/add")),
    (
        r"(?s)hidden tap.*32.*48.*projection",
        lambda d: [t.pop("projection") for t in d["taps"]] + [d.pop("projections")],
    ),
    ("its projection hidden is 32 -> 40", lambda d: d["projections"].update(hidden=[32, 40])),
    ("attention tap.*shape", lambda d: d["taps"][-1].update(teacher=d["teacher"]["hidden"][2])),
    ("hidden tap.*shape", lambda d: d["taps"][0].update(teacher=next(iter(d["teacher"]["attention"])))),
    ("a student with 98 token ids", lambda d: d["student"].update(vocabulary=98)),
]


@pytest.mark.parametrize("told, change", MISFITS)
def test_a_plan_of_other_networks_is_refused(told: str, change: Any) -> None:
    qat, wide = small()[1], small(hidden_size=48, num_hidden_layers=4, seed=1)[1]
    plan = TapPlan.from_dict(edited(plan_taps(qat, wide), change))
    with pytest.raises(ConfigError, match=told):
        distill(qat, wide, plan=plan)


def test_token_taps_of_two_vocabularies_are_refused() -> None:
    _, qat, _, graph = strangers()
    tap = Tap(student="classifier/linear", teacher="classifier/linear", loss="hidden")
    with pytest.raises(ConfigError, match="99 entries, the teacher's 120"):
        distill(qat, graph, plan=TapPlan(taps=(tap,)))
    with pytest.raises(ConfigError, match="one batch for both needs one vocabulary"):
        distill(qat, graph, plan=TapPlan(taps=()))
    with pytest.raises(ConfigError, match="plan is a list"):
        distill(qat, graph, plan=[tap])  # type: ignore[arg-type]


def test_files_that_are_no_plans(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no plan in"):
        TapPlan.load(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        TapPlan.load(tmp_path / "broken.json")
    with pytest.raises(ConfigError, match="unknown"):
        plan_taps(small()[1], small()[1], projections="none")
    with pytest.raises(ConfigError, match="no 'gold' taps"):
        plan_taps(small()[1], small()[1], kinds=["gold"])


def test_where_a_site_stands() -> None:
    side = Side(hidden=("a", "b", "c"), attention={"x": 1, "y": 2})
    assert [side.layer_of(s) for s in ("a", "c", "x", "y", "z")] == [0, 2, 1, 2, None] and side.layers == 2
    assert dataclasses.replace(side, first=1).layers == 3
    with pytest.raises(ConfigError, match="(?s)attention in block '1'.*count blocks from 1"):
        Side(attention={"x": "1"})  # type: ignore[dict-item]


class Rows:
    """Twelve random rows as ``fit`` reads them."""

    fingerprint = "rows"

    def order(self, *, batch_size: int, seed: int, epoch: int) -> list[Any]:
        import numpy as np

        return np.array_split(np.random.default_rng([seed, epoch]).permutation(12), 12 // batch_size)

    def batch(self, rows: Any) -> dict[str, torch.Tensor]:
        whole = batch(rows=12, length=6)
        return {k: v[torch.as_tensor(rows)] for k, v in whole.items()}


def trained(out: Path, steps: list[int]) -> tuple[Any, Any]:
    """A quantized student of a wider, deeper teacher after a run stopped at each of ``steps`` but the last."""
    from kdlsq_fx.train import Interrupted, fit

    wide = small(hidden_size=48, num_hidden_layers=3, seed=1)[1]
    for last in steps:
        torch.manual_seed(0)
        qat = kq.prepare_qat(small()[0], "W4E4A8")
        kq.calibrate(qat, [batch()], progress=False)
        kd = distill(qat, wide, attention=0)

        def stop(step: int, _: nn.Module, at: int = last) -> None:
            if step == at and at != steps[-1]:
                raise Interrupted

        groups = kq.param_groups(kd, lr=1e-3)
        try:
            done = fit(
                kd,
                Rows(),
                out_dir=out,
                steps=steps[-1],
                lr=1e-3,
                batch_size=4,
                groups=groups,
                save_every=1,
                on_step=stop,
            )
        except Interrupted:
            continue
    return kd, done


def test_training_learns_the_projection_and_resumes_to_the_bit(tmp_path: Path) -> None:
    straight, _ = trained(tmp_path / "one", [8])
    again, done = trained(tmp_path / "two", [3, 8])
    assert done.resumed_at == 3
    ours, theirs = straight.state_dict(), again.state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours) and "projections.hidden.weight" in ours
    start = distill(small()[1], small(hidden_size=48, num_hidden_layers=3, seed=1)[1], attention=0)
    assert not torch.equal(start.projections["hidden"].weight, straight.projections["hidden"].weight)
    first, *_, last = (tmp_path / "one" / "log.tsv").read_text().splitlines()[1:]
    assert float(last.split("\t")[1]) < 0.9 * float(first.split("\t")[1])


def test_the_student_leaves_the_projection_behind(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    wide = small(hidden_size=48, num_hidden_layers=3, seed=1)[1]
    qat = kq.prepare_qat(small()[0], "W8E8A8")
    kq.calibrate(qat, [batch()], progress=False)
    kd = distill(qat, wide, attention=0)
    assert {k for k in kd.state_dict() if not k.startswith("student.")} == {
        "projections.hidden.weight",
        "projections.hidden.bias",
    }
    groups = kq.param_groups(kd, lr=1e-3)
    ours = {id(p) for g in groups for p in g["params"]}
    assert all(id(p) in ours for p in kd.projections.parameters())
    kd.save_pretrained(tmp_path)
    assert not any("projection" in k for k in load_file(tmp_path / "model.safetensors"))
    assert "projection" not in (tmp_path / "kdlsq.json").read_text()
    logits = kq.convert(qat.eval())(**batch()).logits
    torch.testing.assert_close(torch.as_tensor(logits), kd.eval()(**batch()).logits, rtol=0.1, atol=0.02)
