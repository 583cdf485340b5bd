"""HSK's depth, length and width against loops over rows and tokens, on small tensors and on whole models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import batch
from test_distillation import float_student, pair, scores_of
from transformers import AutoConfig

from kdlsq_fx.compression import Compression
from kdlsq_fx.distillation import distill
from kdlsq_fx.errors import ConfigError
from kdlsq_fx.kd_losses import kept_mse
from kdlsq_fx.kd_targets import separator_of
from kdlsq_fx.planning import plan_taps
from kdlsq_fx.tap_plan import TapPlan
from kdlsq_fx.taps import Tap

torch.set_num_threads(1)
SEP = 3


def example(padding: str = "right") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """student, teacher (4, 7, 10), weight (4, 7), scores (4, 2, 7, 7), ids (4, 7); rows of 7, 5, 3 and 2 tokens."""
    g = torch.Generator().manual_seed(5)
    student, teacher = torch.randn(4, 7, 10, generator=g), torch.randn(4, 7, 10, generator=g)
    lengths = torch.tensor([7, 5, 3, 2]).unsqueeze(1)
    weight = (torch.arange(7) < lengths).float()
    ids = torch.randint(5, 90, (4, 7), generator=g)
    ids[torch.arange(4), lengths[:, 0] - 1] = SEP
    scores = 3 * torch.randn(4, 2, 7, 7, generator=g)
    scores[:, :, 0, :] += 6 * (ids == SEP)[:, None]  # [SEP] draws the most attention, as it does in BERT
    if padding == "left":
        weight, ids = weight.flip(1), ids.flip(1)
        scores = scores.flip(2, 3)
    scores = scores.masked_fill(weight[:, None, None] == 0, torch.finfo(torch.float32).min)
    return student, teacher, weight, scores, ids


def chosen_tokens(tokens: str, count: int, weight: Any, scores: Any, ids: Any) -> list[list[int]]:
    """Kept positions of each row, by sorting in Python."""
    found = []
    for r in range(len(weight)):
        real = [i for i, w in enumerate(weight[r].tolist()) if w]
        if tokens == "cls":
            found.append(real[:1])
            continue
        if tokens in ("left", "right"):
            found.append(real[:count] if tokens == "left" else real[-count:])
            continue
        row = np.zeros(weight.shape[1])
        for head in scores[r].double().numpy():
            e = np.exp(head[real[0]] - head[real[0]].max())
            row += e / e.sum() / len(scores[r])
        if tokens == "attention-no-sep":
            row[(ids[r] == SEP).numpy()] = -1e4
        found.append(sorted(sorted(real, key=lambda i: -row[i])[:count]))
    return found


def features_kept(values: np.ndarray, count: int, features: str, everything: np.ndarray | None = None) -> list[int]:
    if features == "uniform":
        return [k * len(values) // count for k in range(count)]
    if features == "magnitude":
        return sorted(sorted(range(len(values)), key=lambda i: -abs(values[i]))[:count])
    assert everything is not None
    least = np.sort(np.abs(everything).ravel())[::-1][int(everything.size * count / len(values)) - 1]
    return [i for i, v in enumerate(values) if abs(v) >= least]


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("mask", ["teacher", "both"])
@pytest.mark.parametrize("features", ["magnitude", "magnitude-batch", "uniform"])
@pytest.mark.parametrize("tokens", ["left", "right", "cls", "attention", "attention-no-sep"])
def test_every_strategy_equals_loops(tokens: str, features: str, mask: str, padding: str) -> None:
    student, teacher, weight, scores, ids = example(padding)
    compress = Compression(length=3, width=0.4, tokens=tokens, features=features, mask=mask, separator=SEP)
    kept = compress.select(teacher, weight, scores=scores, ids=ids)
    got = kept_mse(student, kept, both=mask == "both")
    where = chosen_tokens(tokens, 3, weight, scores, ids)
    everything = np.stack([teacher[r, i].numpy() for r, row in enumerate(where) for i in row])
    want = 0.0
    for r, row in enumerate(where):
        assert kept.positions is not None and kept.real is not None
        assert [int(p) for p, w in zip(kept.positions[r], kept.real[r]) if w] == row
        squares, count = 0.0, 0
        for i in row:
            a, b = student[r, i].numpy(), teacher[r, i].numpy()
            on = features_kept(b, 4, features, everything)
            target = np.zeros_like(b)
            target[on] = b[on]
            over = on if mask == "both" else range(len(b))
            squares += sum((a[j] - target[j]) ** 2 for j in over)
            count += len(over)
        want += squares / max(count, 1) / len(where)
    assert got.item() == pytest.approx(want, rel=1e-5)


def test_dropped_features_draw_the_student_to_zero_unless_both_sides_are_masked() -> None:
    teacher = torch.tensor([[[3.0, 1.0, -5.0, 0.5]]])
    student = torch.ones(1, 1, 4, requires_grad=True)
    kept = Compression(width=0.5).select(teacher, None)
    alone = torch.autograd.grad(kept_mse(student, kept, both=False), student)[0]
    both = torch.autograd.grad(kept_mse(student, kept, both=True), student)[0]
    torch.testing.assert_close(alone, torch.tensor([[[-1.0, 0.5, 3.0, 0.5]]]))  # 2 (s - t) / 4
    torch.testing.assert_close(both, torch.tensor([[[-2.0, 0.0, 6.0, 0.0]]]))  # 2 (s - t) / 2


def test_random_features_are_the_same_every_time_and_others_at_another_tap_or_seed() -> None:
    _, teacher, weight, *_ = example()
    compress = Compression(width=0.4, features="random")
    first = compress.select(teacher, weight, tap=1)
    assert first.features is not None
    again = compress.select(teacher.roll(1, 0), weight, tap=1).features
    assert again is not None and torch.equal(first.features, again)
    assert torch.equal(first.features, first.features[:1, :1].expand_as(first.features))
    assert first.features[0, 0].sum() == 4
    draws = {tuple(Compression(width=0.4, features="random", seed=s).fixed_features(t, 10).tolist())  # type: ignore[union-attr]
             for s in range(4) for t in range(4)}  # fmt: skip
    assert len(draws) > 10


def test_padding_is_kept_only_where_it_counts() -> None:
    _, teacher, weight, scores, ids = example()
    compress = Compression(length=4, separator=SEP)
    kept = compress.select(teacher, weight, scores=scores, ids=ids)
    assert kept.real is not None and kept.real.sum(1).tolist() == [4, 4, 3, 2]
    everything = compress.select(teacher, None, scores=scores, ids=ids)  # the release: padding goes before [SEP]
    assert everything.real is not None and everything.real.sum() == 16
    assert everything.positions is not None and 1 not in everything.positions[3].tolist()


def test_sizes_are_read_from_the_papers_notation() -> None:
    made = Compression.parse("1l_10t_0.1h", tokens="left")
    assert (made.depth, made.length, made.width, made.tokens) == (1, 10, 0.1, "left") and "1l_10t_0.1h" in str(made)
    assert Compression.parse("0.1h").kept_features(768) == 76  # papers: 76 values
    assert Compression.parse("0.1h").kept_features(770) == 77 and Compression(width=0.001).kept_features(10) == 1
    for wrong in ("", "10", "1l_2l", "0h", "2h", "l", "0t", "-1l", None, 5, made):
        with pytest.raises(ConfigError):
            Compression.parse(wrong)  # type: ignore[arg-type]
    fields: list[dict[str, Any]] = [{"tokens": "best"}, {"features": "big"}, {"mask": "none"}, {"width": "0.1"}]
    fields += [{"depth": 0}, {"length": True}, *({"separator": s} for s in ("[SEP]", -1, 1.5, True))]
    for field in fields:
        with pytest.raises(ConfigError, match=next(iter(field))):
            Compression(**field)


def test_text_tells_the_strategies_that_choose_something() -> None:
    chosen: dict[str, Any] = {"tokens": "attention", "features": "random", "mask": "both"}
    assert str(Compression(**chosen)) == "whole (every token, every feature)" and Compression(**chosen).whole
    for sizes, told in (
        ({"depth": 1}, "1l (every token, every feature)"),
        ({"length": 10}, "10t (attention, every feature)"),
        ({"width": 0.1}, "0.1h (every token, random, both)"),
        ({"depth": 1, "length": 10, "width": 0.1}, "1l_10t_0.1h (attention, random, both)"),
        ({"tokens": "cls", "length": 10}, "1t (cls, every feature)"),
    ):
        assert str(Compression(**{**chosen, **sizes})) == told


@pytest.mark.parametrize("tokens", ["attention", "attention-no-sep"])
def test_whole_models_keep_the_tokens_their_teacher_attends_to(tokens: str) -> None:
    student, teacher, *both = pair()
    data = batch()
    data["input_ids"][:, 1] = SEP
    compress = Compression(depth=3, length=3, width=0.25, tokens=tokens, separator=SEP)
    kd = distill(*both, loss="hsk", compress=compress, schedule="joint", logits=0).eval()
    assert [t.loss for t in kd.taps] == ["hidden"] * 3
    ours = student(**data, output_hidden_states=True).hidden_states
    theirs, scores = scores_of(teacher, data)
    want = 0.0
    chosen = [chosen_tokens(tokens, 3, data["attention_mask"], s.detach(), data["input_ids"]) for s in scores]
    assert chosen[0] != chosen[1]
    for layer in (0, 1, 2):  # hidden state 1 is what leaves block 0; what enters it takes its tokens
        where = chosen[max(layer - 1, 0)]
        for r, row in enumerate(where):
            a, b = ours[layer][r, row].detach().numpy(), theirs.hidden_states[layer][r, row].detach().numpy()
            on = np.zeros_like(b)
            for t in range(len(row)):
                on[t, features_kept(b[t], b.shape[1] // 4, "magnitude")] = 1
            want += ((a - b * on) ** 2).mean() / len(where)
    assert kd(**data).loss.item() == pytest.approx(want, rel=1e-4)
    kd.train()
    with pytest.raises(ConfigError, match="progress"):
        distill(*both, loss="hsk", compress="1l").train()(**data)


def test_depth_counts_from_the_top_however_a_plan_is_written() -> None:
    both = pair()[2:]
    plan = plan_taps(*both, kinds="hidden")
    for taps in (plan.taps, plan.taps[::-1], (plan.taps[2], plan.taps[0], plan.taps[1])):
        kd = distill(*both, plan=plan.with_taps(taps), compress="2l")
        assert set(kd.taps) == set(plan.taps[1:])


@pytest.mark.parametrize("loss, compress", [("pooled", None), ("hidden", "0.5h"), ("hidden", "2t")])
def test_a_value_without_tokens_is_refused_where_the_loss_needs_them(loss: Any, compress: Any) -> None:
    tap = Tap(student="bert.pooler.activation/tanh", teacher="bert.pooler.activation/tanh", loss=loss)
    with pytest.raises(ConfigError, match=rf"{loss} tap.*\(\?, 32\)(?s:.*)\(batch, length, width\)"):
        distill(*pair()[2:], plan=TapPlan(taps=[tap]), pooled=1.0, compress=compress)


def test_a_compression_that_keeps_everything_is_the_plain_loss() -> None:
    both, data = pair()[2:], batch()
    plain = distill(*both, attention=0, logits=0).eval()(**data).loss.item()
    kept = Compression(length=99, tokens="left")
    assert distill(*both, attention=0, logits=0, compress=kept).eval()(**data).loss.item() == pytest.approx(plain)
    uneven = {k: F.pad(v, (0, 5)) for k, v in data.items()}
    small = distill(*both, attention=0, logits=0, compress=Compression(length=2, width=0.5, tokens="attention")).eval()
    assert small(**uneven).loss.item() == pytest.approx(small(**data).loss.item(), rel=1e-5)


def test_a_state_that_lies_the_other_way_is_turned() -> None:
    from families import for_model, tiny

    model, teacher = tiny("squeezebert").eval(), tiny("squeezebert", seed=1).eval()
    data = for_model(model, batch())
    compress = Compression(length=2, tokens="left")
    kd = distill(float_student(model), teacher, attention=0, logits=0, compress=compress).eval()
    ours, theirs = (m(**data, output_hidden_states=True).hidden_states for m in (model, teacher))
    want = sum(F.mse_loss(a[:, :2], b[:, :2]).item() for a, b in zip(ours, theirs))
    assert min(data["attention_mask"].sum(1)) >= 2
    assert kd(**data).loss.item() == pytest.approx(want, rel=1e-4)


def test_mistakes_are_told() -> None:
    both = pair()[2:]
    with pytest.raises(ConfigError, match=r"needs the id of \[SEP\]"):
        distill(*both, loss="hsk", compress="1l_10t_0.1h")
    with pytest.raises(ConfigError, match="separator=99, but the teacher's token ids end at 98"):
        distill(*both, compress=Compression(length=3, separator=99))
    distill(*both, compress=Compression(length=3, separator=98))
    with pytest.raises(ConfigError, match="keeps 9 layers, the plan has 3"):
        distill(*both, compress="9l")
    with pytest.raises(ConfigError, match="the plan has no hidden taps"):
        distill(*both, compress="1l", hidden=0)
    with pytest.raises(ConfigError, match="cannot be read"):
        distill(*both, compress="ten tokens")
    with pytest.raises(ConfigError, match="compress=3"):
        distill(*both, compress=3)


def test_a_separator_is_taken_from_configurations_that_name_one() -> None:
    named = {name: separator_of(AutoConfig.for_model(name)) for name in ("roberta", "albert", "bert", "convbert")}
    assert named == {"roberta": 2, "albert": 3, "bert": None, "convbert": None}  # ConvBERT's default eos is no [SEP]
