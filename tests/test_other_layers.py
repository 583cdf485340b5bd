"""Convolutions through all four stages: ConvBERT, SqueezeBERT and the LV-BERT of examples/, on every execution."""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from calibrated import livelier, per_channel
from families import batch, for_model, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kdlsq_fx import run_int
from kdlsq_fx.api import convert, export_onnx, freeze_qat, prepare_qat
from kdlsq_fx.backends.onnx_integer import OnnxIntegerCodes
from kdlsq_fx.calibration import calibrate, param_groups
from kdlsq_fx.capture import capture
from kdlsq_fx.comparison import compare
from kdlsq_fx.depth import without
from kdlsq_fx.errors import ConfigError, LoweringError, VerifyError
from kdlsq_fx.op import BY_NAME
from kdlsq_fx.ops.integer import int_linear, int_mul, numpy_int_mul
from kdlsq_fx.planning import plan_taps
from kdlsq_fx.qconfig import QSpec, Rule
from kdlsq_fx.verify import verify

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from lv_bert import (  # noqa: E402
    PUBLISHED_ORDER,
    DynamicConvolution,
    FeedForward,
    LVBert,
    LVBertConfig,
    SelfAttention,
    example_inputs,
)

torch.set_num_threads(1)
aten = torch.ops.aten
TINY = {"vocab_size": 99, "embedding_size": 16, "hidden_size": 32, "intermediate_size": 48, "positions": 64}
LENGTHS = (1, 7, 20)
channels = per_channel("W4E4A8-int", 4, "kdlsq").with_rules(
    Rule(op="conv1d", weight=QSpec(bits=4, axis=0), act=QSpec(bits=8), optional=True)
)
QCONFIGS: dict[str, Any] = {
    "W8E8A8-int": "W8E8A8-int",
    "W4E4A8-lsq+-int": "W4E4A8-lsq+-int",  # zero points: padding is their code
    "W2E2A8-int": "W2E2A8-int",
    "W4-channels-int": channels,
}


def lv_bert(order: str = "0122", **changes: Any) -> LVBert:
    torch.manual_seed(0)
    return LVBert(LVBertConfig(order=order, **{**TINY, **changes}))


def model_of(name: str) -> nn.Module:
    if name == "lv-bert":
        return lv_bert()
    grouped = {"num_groups": 2} if name == "convbert-grouped" else {}
    return tiny(name.removesuffix("-grouped"), num_hidden_layers=1, **grouped)  # two: docs/make_support.py


@lru_cache
def calibrated(name: str, qconfig: str) -> Any:
    model = livelier(model_of(name))
    example = example_inputs(model.config) if name == "lv-bert" else None  # type: ignore[arg-type]
    qat = prepare_qat(model, QCONFIGS.get(qconfig, qconfig), example=example)
    calibrate(qat, [for_model(model, batch(rows=6, seed=s)) for s in range(2)])
    return qat.eval()


def data_of(model: Any) -> list[dict[str, torch.Tensor]]:
    names = model.input_names
    return [{k: v for k, v in batch(rows=4, length=n, seed=n).items() if k in names} for n in LENGTHS]


@pytest.mark.parametrize("name", ["convbert", "convbert-grouped", "squeezebert", "lv-bert"])
def test_the_captured_graph_is_the_model_bit_for_bit(name: str) -> None:
    model = model_of(name).eval()
    if name != "lv-bert":
        model.set_attn_implementation("eager")  # type: ignore[operator]
    gm = capture(model, example_inputs(model.config) if name == "lv-bert" else None).gm.eval()  # type: ignore[arg-type]
    names = [str(n.target) for n in gm.graph.find_nodes(op="placeholder")]
    for length in LENGTHS:
        one = batch(rows=4, length=length, seed=length)
        want = model(**for_model(model, one))["logits"]
        assert torch.equal(want, gm(*(one[n] for n in names))[0])


CASES = [
    *((name, "W8E8A8-int") for name in ("convbert", "convbert-grouped", "squeezebert", "lv-bert")),
    *((name, q) for name in ("convbert", "lv-bert") for q in QCONFIGS if q != "W8E8A8-int"),
]


@pytest.mark.parametrize(("name", "qconfig"), CASES)
def test_every_execution_gives_the_integers_of_training(name: str, qconfig: str, tmp_path: Path) -> None:
    qat = calibrated(name, qconfig)
    data = data_of(qat)
    with torch.no_grad():
        frozen = freeze_qat(qat)
        for one in data:
            assert torch.equal(qat(**one)["logits"], frozen(**one)["logits"])
    model = convert(qat)
    assert model.gm.meta["integer_only"]
    seen = compare(qat, model, data)
    assert not seen.unmatched and seen.max_steps <= 1 and seen.max_share <= 1e-3, str(seen)

    reference = convert(qat, backend="reference")
    for other in (reference, OnnxIntegerCodes(model, threads=1), OnnxIntegerCodes(model, optimize=False, threads=1)):
        same = compare(model, other, data)
        assert not same.unmatched and all(s.end_off == 0 for s in same.sites.values())
        assert all(o.max_abs == 0 and o.largest > 0 for o in same.outputs.values())

    model.save_pretrained(tmp_path)
    program = run_int.load(tmp_path)
    for one in data:
        (got,) = program(**{k: v.numpy() for k, v in one.items()}).values()
        np.testing.assert_array_equal(model(**one)["logits"].numpy(), got)


@pytest.mark.parametrize("name", ["convbert", "lv-bert"])
def test_native_gives_the_same_codes(name: str) -> None:
    qat = calibrated(name, "W8E8A8-int")
    torch_model, native = convert(qat), convert(qat, backend="native")
    for one in data_of(qat):
        assert torch.equal(torch_model(**one)["logits"], native(**one)["logits"])


@pytest.mark.parametrize("preset", ["W2E2A8", "W4E4A8", "W8E8A8"])
@pytest.mark.parametrize("name", ["convbert", "squeezebert", "lv-bert"])
def test_the_papers_placement_converts(name: str, preset: str) -> None:
    qat = calibrated(name, preset)
    seen = compare(qat, convert(qat), data_of(qat))
    assert not seen.unmatched and seen.max_steps <= 1


def marked(qat: Any, rows: int, seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A batch and its labels: token 3 or 4 stands once in each row, at its second to fourth place, and is the answer
    plus 3. Heads that read the first token see it only through the layers between."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (rows,), generator=generator)
    one = batch(rows, 8, seed=seed)
    ids = one["input_ids"]
    ids[(ids == 3) | (ids == 4)] = 5
    ids[torch.arange(rows), torch.randint(1, 4, (rows,), generator=generator)] = 3 + labels
    return {k: v for k, v in one.items() if k in qat.input_names}, labels


@pytest.mark.parametrize("name", ["convbert", "squeezebert", "lv-bert"])
def test_a_short_training_learns_and_the_integers_with_it(name: str) -> None:
    model = livelier(model_of(name))
    example = example_inputs(model.config) if name == "lv-bert" else None  # type: ignore[arg-type]
    qat = prepare_qat(model, "W4E4A8-int", example=example)
    calibrate(qat, [marked(qat, 16, seed)[0] for seed in range(2)])
    optimizer = torch.optim.AdamW(param_groups(qat, lr=3e-3))
    qat.train()
    losses = []
    for step in range(60):
        inputs, labels = marked(qat, 16, step)
        loss = nn.functional.cross_entropy(qat(**inputs)["logits"], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[:10]) > 0.6 and np.mean(losses[-10:]) < 0.3, losses

    inputs, labels = marked(qat.eval(), 64, 999)
    integers = convert(qat)
    assert integers.gm.meta["integer_only"]
    for trained in (qat, integers):
        assert (trained(**inputs)["logits"].argmax(-1) == labels).float().mean() > 0.9
    seen = compare(qat, integers, inputs)
    assert not seen.unmatched and seen.max_steps <= 1 and seen.outputs[0].agree == 64, str(seen)


@pytest.mark.parametrize("name", ["convbert", "lv-bert"])
def test_onnx_for_a_runtime_is_the_frozen_model(name: str, tmp_path: Path) -> None:
    qat = calibrated(name, "W8E8A8")
    path = tmp_path / "m.onnx"
    export_onnx(qat, path, target="ort-cpu")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    frozen = freeze_qat(qat)
    for one in data_of(qat):
        names = {i.name for i in session.get_inputs()}
        got = session.run(None, {k: v.numpy() for k, v in one.items() if k in names})[0]
        want = frozen(**one)["logits"].detach().numpy()
        np.testing.assert_allclose(got, want, atol=0.02 * np.abs(want).max())


# ---- the dynamic convolution, against the formula in loops


@pytest.mark.parametrize("mask_padding", [True, False])
def test_dynamic_convolution_is_its_formula(mask_padding: bool) -> None:
    config = LVBertConfig(**{**TINY, "hidden_size": 8}, heads=2, taps=3, mask_padding=mask_padding)  # type: ignore[arg-type]
    torch.manual_seed(1)
    layer = DynamicConvolution(config).double().eval()
    x, mask = torch.randn(2, 5, 8, dtype=torch.float64), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    got = layer(x, mask).detach().numpy()
    p = {k: v.numpy() for k, v in layer.state_dict().items()}
    for b in range(2):
        rows = x[b].numpy()
        gate = 1 / (1 + np.exp(-(rows @ p["gate.weight"].T + p["gate.bias"])))
        v = (rows @ p["value.weight"].T + p["value.bias"]) * gate
        v = v * mask[b].numpy()[:, None] if mask_padding else v
        at = lambda i, v=v: v[i] if 0 <= i < 5 else np.zeros(8)  # noqa: E731
        for i in range(5):
            deep = sum(at(i + t - 1) * p["depthwise.weight"][:, 0, t] for t in range(3))
            made = p["pointwise.weight"][:, :, 0] @ deep + p["pointwise.bias"]
            numbers = (p["kernel.weight"] @ made + p["kernel.bias"]).reshape(2, 3)
            kernel = np.exp(numbers) / np.exp(numbers).sum(-1, keepdims=True)
            want = sum(np.repeat(kernel[:, t], 4) * at(i + t - 1) for t in range(3))
            np.testing.assert_allclose(got[b, i], want, atol=1e-12)


def test_padding_changes_nothing_where_it_is_masked() -> None:
    one = batch(rows=2, length=12, seed=3)
    for masked, alike in ((True, True), (False, False)):
        model = livelier(lv_bert("0012", mask_padding=masked))
        alone = {k: one[k][1:, :6] for k in ("input_ids", "attention_mask")}
        padded = {k: one[k][1:] for k in ("input_ids", "attention_mask")}
        assert torch.allclose(model(**alone)["logits"], model(**padded)["logits"], atol=1e-5) is alike


def test_the_published_order() -> None:
    pretrain = "0 0 1 2 2 1 0 2 2 1 0 0 1 2 0 2 1 0 2 0 1 1 2 1"  # pretrain.sh of yuweihao/LV-BERT
    assert PUBLISHED_ORDER == LVBertConfig().order == pretrain.replace(" ", "")
    kinds = {DynamicConvolution: "0", SelfAttention: "1", FeedForward: "2"}
    layers = lv_bert(PUBLISHED_ORDER).layers
    assert "".join(kinds[type(layer.inner)] for layer in layers) == PUBLISHED_ORDER  # type: ignore[index, arg-type]


def test_every_sub_layer_is_a_block_and_only_attention_attends() -> None:
    """The kernels of a dynamic convolution come from a softmax too, but weigh no tokens."""
    found = plan_taps(lv_bert("1021"), lv_bert("1221"), layer_map="uniform")
    assert found.student.hidden == ("embeddings.project/linear", *(f"layers.{i}.norm/layer_norm" for i in range(4)))
    assert found.student.attention == {"layers.0.inner/add": 1, "layers.3.inner/add": 4}
    assert [t.loss for t in found.taps] == ["hidden"] * 5 + ["attention"] * 2 and not found.notes
    other = plan_taps(lv_bert("1012"), lv_bert("1201"))
    assert [t.student for t in other.taps if t.loss == "attention"] == ["layers.0.inner/add"]
    assert other.notes == ("attention left out at blocks that learn from a layer without any: 3<-3",)


@pytest.mark.parametrize("gone", range(4))
def test_any_sub_layer_can_be_left_out(gone: int) -> None:
    """What is left computes what a model of the shorter order does with the same weights."""
    order = "0122"
    whole, short = lv_bert(order).eval(), lv_bert(order[:gone] + order[gone + 1 :]).eval()
    kept = [i for i in range(4) if i != gone]
    weights = {k: v for k, v in whole.state_dict().items() if not k.startswith("layers.")}
    for i, layer in enumerate(kept):
        weights |= {f"layers.{i}.{k}": v for k, v in whole.layers[layer].state_dict().items()}
    short.load_state_dict(weights)
    data = example_inputs(whole.config)
    graph = without(capture(whole, data).gm, (gone,)).eval()
    with torch.no_grad():
        assert torch.equal(graph(*data.values())[0], short(**data)["logits"])


@pytest.mark.parametrize(
    ("changes", "what"),
    [({"order": "0132"}, "no sub-layer '3' .letter 3"), ({"order": ""}, "empty"), ({"heads": 3}, "share")]
    + [({"taps": 4}, "no middle"), ({"heads": 0}, "heads is 0"), ({"order": None}, "is no text")],
)
def test_a_config_that_names_nothing_is_refused(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        LVBertConfig(**{**TINY, **changes})


# ---- the new integers


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_int_mul_equals_python(data: st.DataObject) -> None:
    codes = st.integers(-(2**15), 2**15 - 1)
    a, b = (data.draw(st.lists(codes, min_size=6, max_size=6)) for _ in range(2))
    za, zb = (data.draw(st.integers(-99, 99)) for _ in range(2))
    want = [[(x - za) * (y - zb) for y in b[:3]] for x in a]
    left, right = np.array(a, np.int16)[:, None], np.array(b[:3], np.int16)
    np.testing.assert_array_equal(numpy_int_mul(left, right, za, zb), np.array(want, np.int32), strict=True)
    assert int_mul(torch.from_numpy(left), torch.from_numpy(right), za, zb).tolist() == want
    assert run_int.int_mul(left, right, za, zb).tolist() == want


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 12), size=st.integers(1, 5), step=st.integers(1, 3), dim=st.integers(-3, 2))
def test_unfold_equals_torch(length: int, size: int, step: int, dim: int) -> None:
    shape = [2, 3, 4]
    shape[dim] = length + size - 1
    x = torch.arange(int(np.prod(shape)), dtype=torch.int8).reshape(shape)
    want = x.unfold(dim, size, step).numpy()
    for unfold in (BY_NAME["unfold"].numpy, run_int.unfold):
        np.testing.assert_array_equal(unfold(x.numpy(), dim, size, step), want, strict=True)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("kernel", "dilation", "padding", "stride"),
    [((3, 1), 1, (1, 0), 1), ((3, 2), (2, 1), (2, 1), (1, 2)), (2, 1, 0, 2)],
)
def test_windows_are_torchs_whatever_the_sizes(kernel: Any, dilation: Any, padding: Any, stride: Any) -> None:
    layer = nn.Unfold(kernel, dilation, padding, stride)
    gm = capture(layer, {"input": torch.randn(2, 3, 9, 6)}).gm
    x = torch.randn(2, 3, 9, 6)
    assert torch.equal(gm(x)[0], layer(x))


class Joined(nn.Module):
    """Two products with scales of their own, joined; a softmax over the middle; what it weighs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(50, 16)
        self.a, self.b, self.c = nn.Linear(16, 8), nn.Linear(16, 24), nn.Linear(32, 4)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.words(input_ids)
        joined = torch.cat([self.a(x), self.b(x) * 7], -1)
        return self.c(joined * torch.softmax(joined.view(*x.shape[:2], 8, 4), 2).flatten(2))  # type: ignore[no-any-return]


def joined(qconfig: Any = "W8E8A8-int") -> Any:
    ids = {"input_ids": batch(4, 6, vocab=50)["input_ids"]}
    qat = prepare_qat(Joined().eval(), qconfig, example=ids)
    calibrate(qat, [ids])
    return qat.eval(), ids


def test_parts_of_several_scales_are_rounded_before_they_are_joined() -> None:
    qat, ids = joined()
    model = convert(qat)
    assert model.gm.meta["integer_only"]
    seen = compare(qat, model, ids)
    assert not seen.unmatched and seen.max_steps == 0
    joins = model.gm.graph.find_nodes(op="call_function", target=aten.cat.default)
    assert [n.meta["val"].dtype for n in joins] == [torch.int8]


def test_a_product_that_leaves_32_bits_is_refused() -> None:
    qat, _ = joined()
    gm = convert(qat).gm
    (product,) = gm.graph.find_nodes(op="call_function", target=int_mul)
    accumulator = gm.graph.find_nodes(op="call_function", target=int_linear)[0]
    product.args = (accumulator, accumulator, 0, 0)
    gm.recompile()
    with pytest.raises(VerifyError, match="product of int_mul can be"):
        verify(gm)


class Conv(nn.Module):
    """A convolution between a table and a LayerNorm, with what ``nn.Conv1d`` takes."""

    def __init__(self, product: str = "conv", **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.product, self.words = product, nn.Embedding(20, 16)
        self.linear, self.norm, self.head = nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 2)
        self.conv = nn.Conv1d(16, 16, **{"kernel_size": 3, "padding": 1, **options})

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.words(input_ids)
        x = self.linear(x) if self.product == "linear" else self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


def conv(qconfig: Any, **options: Any) -> tuple[nn.Module, Any]:
    model = Conv(**options).eval()
    ids = {"input_ids": torch.randint(0, 20, (4, 12))}
    qat = prepare_qat(model, qconfig, example=ids)
    calibrate(qat, [ids], progress=False)
    return model, qat.eval()


@pytest.mark.parametrize(
    "options",
    [
        {"padding": "same"},
        {"padding": "same", "kernel_size": 4, "groups": 16},  # one more behind than in front
        {"padding": "same", "dilation": 3},
        {"padding": "valid"},
        {"padding_mode": "reflect"},
        {"padding_mode": "circular"},
    ],
)
def test_padding_by_name(options: dict[str, Any], tmp_path: Path) -> None:
    model, qat = conv("W4E4A8", **options)
    ids = torch.randint(0, 20, (2, 9))
    with torch.no_grad():
        assert torch.equal(capture(model, {"input_ids": ids[:, :7]}).gm(ids)[0], model(ids))
    want = qat(ids).detach()
    seen = convert(qat)(ids)
    torch.testing.assert_close(seen, want, rtol=0, atol=1e-5)
    if options.get("padding_mode") == "circular":
        with pytest.raises(LoweringError, match="no ONNX form for padding"):
            export_onnx(qat, tmp_path / "m.onnx")
        return
    export_onnx(qat, tmp_path / "m.onnx")
    (there,) = onnxruntime.InferenceSession(str(tmp_path / "m.onnx")).run(None, {"input_ids": ids.numpy()})
    np.testing.assert_allclose(there, want.numpy(), atol=1e-5)


@pytest.mark.parametrize("options", [{"product": "linear"}, {}, {"padding": "same", "kernel_size": 4}])
def test_a_product_is_rounded_before_a_layer_norm_of_integers(options: dict[str, Any], tmp_path: Path) -> None:
    """There is no sum between them that would be."""
    _, qat = conv("W8E8A8-int", **options)
    ids = torch.randint(0, 20, (2, 9))
    model = convert(qat)
    seen = compare(qat, model, {"input_ids": ids})
    assert model.gm.meta["integer_only"] and not seen.unmatched and seen.max_steps <= 1
    export_onnx(qat, tmp_path / "m.onnx", target="integer")
    (there,) = onnxruntime.InferenceSession(str(tmp_path / "m.onnx")).run(None, {"input_ids": ids.numpy()})
    for backend in ("reference", "torch"):
        np.testing.assert_array_equal(convert(qat, backend=backend)(ids).numpy(), there)
