"""Losses by name against the formulas of each release, written here from Hugging Face's outputs; schedules."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import batch
from test_distillation import expected_loss, pair, scores_of

from kdlsq_fx.compression import Compression
from kdlsq_fx.distillation import distill
from kdlsq_fx.errors import ConfigError, InputError
from kdlsq_fx.kd_losses import span_cross_entropy
from kdlsq_fx.kd_named import LOSSES, Loss, named_loss
from kdlsq_fx.tap_plan import TapPlan
from kdlsq_fx.taps import Tap
from kdlsq_fx.train import fit

torch.set_num_threads(1)


@pytest.mark.parametrize("name", ["kdlsq", "kdlsq-release", "ternarybert", "ternarybert-release"])
def test_classification(name: str) -> None:
    student, teacher, *both = pair()
    padding = "paper" if name.endswith("release") else "exclude"
    want = expected_loss(student, teacher, batch(), padding)
    assert distill(*both, loss=name).eval()(**batch()).loss.item() == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize("name", list(LOSSES))
def test_one_output_learns_from_the_label_or_from_the_teacher(name: str) -> None:
    student, teacher, *both = pair(num_labels=1)
    kd = distill(*both, loss=name, schedule="joint").eval()
    labels = torch.tensor([1.0, -2.0, 0.5, 4.0])
    ours = student(**batch()).logits
    gold = name in ("kdlsq-release", "hsk-release")
    want = F.mse_loss(ours.squeeze(), labels) if gold else F.mse_loss(ours, teacher(**batch()).logits)
    got = kd(**batch(), labels=labels).parts["logits"]
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    if gold:
        with pytest.raises(InputError, match="no labels"):
            kd(**batch())


def test_kdlsqs_release_multiplies_the_spans_by_100() -> None:
    student, teacher, *both = pair("ForQuestionAnswering")
    a, b = student(**batch()), teacher(**batch())
    want = torch.zeros(())
    for s, t in ((a.start_logits, b.start_logits), (a.end_logits, b.end_logits)):
        want = want - 100 * (t.softmax(-1) * s.log_softmax(-1)).mean()
    kd = distill(*both, loss="kdlsq-release").eval()
    assert kd(**batch()).parts["logits"].item() == pytest.approx(want.item(), rel=1e-5)
    plain = distill(*both, loss="ternarybert-release").eval()
    assert plain(**batch()).parts["logits"].item() == pytest.approx(want.item() / 100, rel=1e-5)


@pytest.mark.parametrize("name", ["hsk", "hsk-release"])
def test_hidden_state_knowledge_of_all_layers(name: str) -> None:
    student, teacher, *both = pair()
    data = batch()
    kd = distill(*both, loss=name).train()
    kd.student.eval()  # no dropout, but the schedule runs
    ours, theirs = (m(**data, output_hidden_states=True) for m in (student, teacher))
    lengths = data["attention_mask"].sum(1).tolist()
    hidden = 0.0
    for a, b in zip(ours.hidden_states, theirs.hidden_states):
        if name == "hsk-release":
            hidden += F.mse_loss(a, b).item()
        else:
            hidden += sum(F.mse_loss(a[i, :n], b[i, :n]).item() for i, n in enumerate(lengths)) / 4
    kd.progress = 0.0
    first = kd(**data)
    assert set(first.parts) == {"hidden"} and first.loss.item() == pytest.approx(hidden, rel=1e-5)
    kd.progress = 0.8
    second = kd(**data)
    want = -(theirs.logits.softmax(-1) * ours.logits.log_softmax(-1)).mean()
    assert set(second.parts) == {"logits"} and second.loss.item() == pytest.approx(want.item(), rel=1e-5)


def test_which_stage_a_term_is_of() -> None:
    kd = distill(*pair()[2:], loss="hsk", attention=1.0, gold=1.0, pooled=1.0).train()
    data = {**batch(), "labels": torch.tensor([0, 1, 1, 0])}
    for progress, terms in ((0.0, {"hidden", "attention", "pooled"}), (0.8, {"logits", "gold"})):
        kd.progress = progress
        assert set(kd(**data).parts) == terms
    kd.progress = None
    assert set(kd.eval()(**data).parts) == {"hidden", "attention", "pooled", "logits", "gold"}


def test_a_stage_without_a_term_is_refused() -> None:
    both = pair()[2:]
    for stage, changes in (("second", {"logits": 0}), ("first", {"hidden": 0})):
        with pytest.raises(ConfigError, match=f"the {stage} stage has no term(?s:.*)schedule='joint'"):
            distill(*both, loss="hsk", **changes)
        distill(*both, loss="hsk", schedule="joint", **changes)(**batch()).loss.backward()
    distill(*both, loss="hsk", logits=0, gold=1.0)
    with pytest.raises(ConfigError, match="the second stage has no term"):
        distill(*pair("Model")[2:], loss="hsk")


def softened(values: torch.Tensor) -> list[float]:
    e = [math.exp(v / 2) for v in values.tolist()]
    return [v / sum(e) for v in e]


def test_spans_at_a_temperature_against_a_loop() -> None:
    torch.manual_seed(0)
    s, t, lengths = torch.randn(3, 5), torch.randn(3, 5), [5, 3, 1]
    weight = (torch.arange(5) < torch.tensor(lengths).unsqueeze(1)).float()
    want = 0.0
    for a, b, n in zip(s, t, lengths):
        want -= sum(q * math.log(p) for p, q in zip(softened(a[:n]), softened(b[:n]))) / n / 3 * 4
    assert span_cross_entropy(s, t, weight, 2.0).item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("tapped", [False, True])
def test_several_labels_at_once_and_one_output_by_head_or_by_tap(tapped: bool) -> None:
    """A tap at the head is the head's logits: the same loss."""
    head = Tap(student="classifier/linear", teacher="classifier/linear", loss="logits")
    plan = TapPlan(taps=[head]) if tapped else TapPlan(taps=[])
    student, teacher, *both = pair(num_labels=3, problem_type="multi_label_classification")
    want = 0.0
    a, b = student(**batch()).logits, teacher(**batch()).logits
    for x, y in zip(a.flatten().tolist(), b.flatten().tolist()):
        p, q = (1 / (1 + math.exp(-v / 2)) for v in (x, y))
        want -= 4 * (q * math.log(p) + (1 - q) * math.log(1 - p)) / a.numel()
    assert distill(*both, plan=plan, temperature=2.0).eval()(**batch()).loss.item() == pytest.approx(want, rel=1e-5)
    student, teacher, *both = pair(num_labels=1)
    labels = torch.tensor([1.0, -2.0, 0.5, 4.0])
    for regression, target in (("teacher", teacher(**batch()).logits), ("gold", labels.unsqueeze(1))):
        got = distill(*both, plan=plan, regression=regression).eval()(**batch(), labels=labels).loss
        assert got.item() == pytest.approx(F.mse_loss(student(**batch()).logits, target).item(), rel=1e-5)


def test_hsks_release_compresses_as_its_code_does() -> None:
    """Top layer, 3 tokens of 9 by attention without [SEP], one threshold for a batch, means over fillers too."""
    student, teacher, *both = pair()
    data = batch()
    data["input_ids"][:, 2] = 3
    compress = Compression(depth=1, length=3, width=0.25, features="magnitude-batch", separator=3)
    kd = distill(*both, loss="hsk-release", compress=compress, schedule="joint", logits=0).eval()
    theirs, scores = scores_of(teacher, data)
    row = scores[-1].softmax(-1)[:, :, 0].mean(1)
    row[data["input_ids"] == 3] = -1e4
    at = row.topk(3, dim=1).indices
    pick = torch.arange(4).unsqueeze(1), at
    a = student(**data, output_hidden_states=True).hidden_states[-1][pick]
    b = theirs.hidden_states[-1][pick]
    mask = b.abs() >= b.abs().flatten().sort(descending=True).values[b.numel() // 4 - 1]
    assert kd(**data).loss.item() == pytest.approx(F.mse_loss(a, b * mask).item(), rel=1e-5)


def test_fit_tells_the_schedule(tmp_path: Any) -> None:
    from test_kd_cache import data, live

    kd = live(loss="hsk", share=0.25)
    fit(kd, data(8), out_dir=tmp_path, steps=8, lr=0.0, batch_size=4)
    lines = (tmp_path / "log.tsv").read_text().splitlines()[1:]
    assert ["hidden" in line for line in lines] == [True] * 2 + [False] * 6


def test_a_term_of_ones_own_as_the_page_adds_it(tmp_path: Any) -> None:
    from test_docs import ROOT, blocks, run
    from test_kd_cache import data

    student, _, *both = pair()
    plain, kd = distill(*both).eval(), distill(*both).eval()
    with pytest.raises(ConfigError, match="A term of your own"):
        distill(*both, loss=lambda out: out)  # type: ignore[arg-type]
    page = "docs/distillation.md"
    assert "## A term of your own\n" in (ROOT / page).read_text(encoding="utf-8")
    (code,) = [b for b in blocks(page) if "my_terms" in b]
    run(code, {"kd": kd})
    ours = student(**batch(), output_hidden_states=True)
    unsure = torch.distributions.Categorical(logits=ours.logits).entropy().mean()
    term = 0.1 * unsure + 0.01 * ours.hidden_states[-1].square().mean()
    got, want = kd(**batch()), plain(**batch())
    assert (got.loss - want.loss).item() == pytest.approx(term.item(), rel=1e-3)
    assert got.parts["unsure"].item() == pytest.approx(unsure.item(), rel=1e-5)
    name = "bert.encoder.layer.1.output.LayerNorm.weight"
    mine, theirs = (torch.autograd.grad(o.loss, both[0].gm.get_parameter(name))[0] for o in (got, want))
    torch.testing.assert_close(mine - theirs, torch.autograd.grad(term, student.get_parameter(name))[0])
    fit(kd, data(8), out_dir=tmp_path, steps=2, lr=0.0, batch_size=4)
    lines = (tmp_path / "log.tsv").read_text().splitlines()[1:]
    for line in lines:
        parts = {k: float(v) for k, v in (p.split("=") for p in line.split("\t")[-1].split())}
        weights = {**dict.fromkeys(parts, 1.0), "unsure": 0.1, "large": 0.01}
        assert float(line.split("\t")[1]) == pytest.approx(sum(weights[k] * v for k, v in parts.items()), rel=1e-4)
        assert set(parts) == {"hidden", "attention", "logits", "unsure", "large"}
    assert len(lines) == 2


def test_a_loss_is_written_down_and_read_again() -> None:
    made = Loss(compress=Compression.parse("1l_10t_0.1h", separator=102), schedule="two-stage", temperature=2.0)
    assert Loss.from_dict(made.to_dict()) == made
    assert Loss.from_dict(Loss().to_dict()) == Loss() and named_loss(made) is made
    assert Loss(compress="2t").compress == Compression(length=2)  # type: ignore[arg-type]


def test_mistakes_are_told() -> None:
    both = pair()[2:]
    with pytest.raises(ConfigError, match="no loss 'kd'"):
        distill(*both, loss="kd")
    with pytest.raises(ConfigError, match=r"no loss \['kdlsq'\]"):
        distill(*both, loss=["kdlsq"])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"temperature=-1(?s:.*)above 0"):
        distill(*both, temperature=-1)
    with pytest.raises(ConfigError, match="no 'hiden'"):
        distill(*both, hiden=1.0)
    for wrong in (
        {"schedule": "late"}, {"share": 1.0}, {"share": "x"}, {"regression": "none"}, {"span": -5}, {"span": "x"},
        {"span": 0}, {"gold": True}, {"temperature": float("inf")},
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            distill(*both, **wrong)


def test_sizes_as_text_leave_the_strategies_of_the_loss() -> None:
    release = named_loss("hsk-release").changed({"compress": "1l_10t_0.1h"})
    assert release.compress == Compression(depth=1, length=10, width=0.1, features="magnitude-batch")
    assert release.changed({"compress": "2l"}).compress == Compression(depth=2, features="magnitude-batch")
    assert named_loss("hsk").changed({"compress": "2l"}).compress == Compression(depth=2)
