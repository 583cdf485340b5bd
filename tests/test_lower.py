"""qat -> qdq -> int: bit equality of qdq, one step at most per site, islands, proofs of the accumulators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calibrated import CONFIGS, calibrated, converted
from families import batch
from torch import fx, nn

from kdlsq_fx.api import convert, freeze_qat, prepare_qat
from kdlsq_fx.calibration import calibrate
from kdlsq_fx.comparison import compare
from kdlsq_fx.errors import CalibrationError, LoweringError, VerifyError
from kdlsq_fx.graph import fetch
from kdlsq_fx.op import op_of
from kdlsq_fx.pipeline import graph_pass
from kdlsq_fx.qconfig import QSpec, Rule

DATA = batch(rows=8, length=13, seed=7)


def ops_at(gm: Any) -> dict[str, str]:
    return {n.meta["site"]: op_of(n).name for n in gm.graph.nodes if n.op == "call_function"}  # type: ignore[union-attr]


@pytest.mark.parametrize("config", CONFIGS)
def test_qdq_equals_qat_bit_for_bit(config: str) -> None:
    qat = calibrated(config)
    qdq = freeze_qat(qat)
    with torch.no_grad():
        assert torch.equal(qat(**DATA).logits, qdq(**DATA).logits)
    assert not list(qdq.gm.graph.find_nodes(op="call_module"))
    weights = [n for n, t in qdq.gm.state_dict().items() if n.endswith("query.weight_codes")]
    assert weights and not any(n.endswith("query.weight") for n in qdq.gm.state_dict())


@pytest.mark.parametrize("config", CONFIGS)
def test_each_site_fed_the_same_codes_is_at_most_one_step_off(config: str) -> None:
    seen = compare(calibrated(config), converted(config), [DATA, batch(rows=5, length=9, seed=8)])
    assert not seen.unmatched and len(seen.sites) >= 12
    assert seen.max_steps <= 1, str(seen)
    assert seen.max_share <= 1e-3, str(seen)
    assert seen.outputs[0].max_abs <= 1e-3 * seen.outputs[0].largest
    assert seen.outputs[0].agree == seen.outputs[0].rows == 13


def test_kdlsq_placement_leaves_what_the_paper_leaves() -> None:
    model = converted("W8E8A8")
    found = ops_at(model.gm)
    layer = "bert.encoder.layer.0"
    assert found[f"{layer}.attention.self.query/linear"] == "int_linear"
    assert found[f"{layer}.attention.self.query/linear/q"] == "requantize"
    assert found[f"{layer}.attention.self/matmul"] == found[f"{layer}.attention.self/matmul:1"] == "int_matmul"
    assert found["bert.embeddings.word_embeddings/embedding"] == "int_embedding"
    islands = {i.site: i for i in model.islands}
    for site in ("attention.self/softmax", "intermediate.intermediate_act_fn/gelu", "attention.output/add"):
        assert islands[f"{layer}.{site}"].reason
    assert {"classifier/linear", "bert.embeddings.LayerNorm/layer_norm"} <= islands.keys()
    assert "gelu" in model.table()


def test_integer_placement_leaves_nothing_in_float() -> None:
    model = converted("W8E8A8-int")
    found = ops_at(model.gm)
    layer = "bert.encoder.layer.0"
    assert found["bert.embeddings/add/w"] == found[f"{layer}.attention.output/add/w"] == "int_add"
    assert found[f"{layer}.intermediate.intermediate_act_fn/gelu/q"] == "lookup"
    assert found["bert.pooler.dense/linear"] == found["classifier/linear"] == "int_linear"
    assert found["classifier/linear/real"] == "dequantize"  # the one float that leaves
    assert {"int_softmax", "int_layer_norm"} <= set(found.values())
    assert model.islands == () and model.gm.meta["integer_only"]
    assert not {"softmax", "masked_softmax", "layer_norm", "quantize"} & set(found.values())


def test_dtypes_inside_are_integers() -> None:
    gm = converted("W4E4A4-lsq+-int").gm
    weights = [fetch(gm, n.target) for n in gm.graph.find_nodes(op="get_attr") if "weight_codes" in n.target]
    assert weights and all(w.dtype == torch.int8 for w in weights)
    biases = [fetch(gm, n.target) for n in gm.graph.find_nodes(op="get_attr") if n.target.endswith("linear_bias")]
    assert biases and all(b.dtype == torch.int32 for b in biases)
    for node in gm.graph.nodes:
        if node.op == "call_function" and op_of(node).name == "int_linear":  # type: ignore[union-attr]
            assert 0 < node.kwargs["bound"] < 2**31
    assert not list(gm.graph.find_nodes(op="call_module"))


def test_both_backends_take_other_sizes() -> None:
    for rows, length in ((1, 1), (2, 30)):
        data = batch(rows=rows, length=length, seed=3)
        a, b = (converted("W8E8A8-int", backend)(**data).logits for backend in ("torch", "reference"))
        torch.testing.assert_close(a, b)


class Net(nn.Module):
    """One linear layer whose output feeds another."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


def net(weight: QSpec, act: QSpec, features: int = 64) -> Any:
    torch.manual_seed(0)
    x = torch.randn(4, features)
    rules = [Rule(op="linear", weight=weight, act=act), Rule(op="relu", act=act)]
    qat = prepare_qat(Net(features), rules, example=(x,))
    calibrate(qat, [(x,)])
    return qat.eval(), x


def test_an_accumulator_that_can_overflow_is_refused_by_site_and_bound() -> None:
    spec = QSpec(bits=8, quantizer="minmax")  # uniform weights: codes of 63 in the mean, 63 * 127 * 2**19 > 2**31
    qat, _ = net(weight=spec, act=spec, features=2**19)
    with pytest.raises(LoweringError, match=r"its bound is \d{10,}") as caught:
        convert(qat)
    assert caught.value.where == "first/linear"


def test_relu_becomes_a_table_and_other_modules_convert() -> None:
    qat, x = net(weight=QSpec(bits=4, axis=0, quantizer="lsq"), act=QSpec(bits=8, signed=True, quantizer="lsq+"))
    model = convert(qat)
    assert "lookup" in ops_at(model.gm).values() and not model.islands
    seen = compare(qat, model, {"x": x})
    assert seen.max_steps == 0 and seen.outputs[0].max_abs < 1e-5
    torch.testing.assert_close(model(x), qat(x).detach(), atol=1e-5, rtol=1e-5)


def test_an_all_zero_channel_converts() -> None:
    torch.manual_seed(0)
    x, module = torch.randn(4, 64), Net()
    with torch.no_grad():
        module.first.weight[2] = 0
    spec = QSpec(bits=4, axis=0, quantizer="lsq")
    qat = prepare_qat(module, [Rule(op="linear", weight=spec, act=QSpec(bits=8))], example=(x,))
    calibrate(qat, [(x,)])
    torch.testing.assert_close(convert(qat)(x), qat.eval()(x).detach(), atol=1e-5, rtol=1e-5)


def test_a_weight_that_became_nan_is_named() -> None:
    qat, _ = net(weight=QSpec(bits=8), act=QSpec(bits=8))
    with torch.no_grad():
        qat.gm.get_parameter("first.weight")[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match=r"first\.weight"):
        convert(qat)


def test_convert_before_calibration_is_refused() -> None:
    qat = prepare_qat(
        Net(), [Rule(op="linear", weight=QSpec(bits=8), act=QSpec(bits=8))], example=(torch.randn(4, 64),)
    )
    with pytest.raises(CalibrationError, match="calibrate"):
        convert(qat)


def test_the_verifier_refuses_unlisted_floats_and_bounds_beyond_32_bits() -> None:
    qat, _ = net(weight=QSpec(bits=8), act=QSpec(bits=8))

    @graph_pass("int")
    def add_a_float_op(gm: fx.GraphModule) -> None:
        """out -> sqrt(out)"""
        (out,) = gm.graph.find_nodes(op="output")
        value = out.args[0][0]
        with gm.graph.inserting_before(out):
            new = gm.graph.call_function(torch.ops.aten.sqrt.default, (value,))
        new.meta["val"] = value.meta["val"]
        out.args = ((new,),)

    @graph_pass("int")
    def raise_a_bound(gm: fx.GraphModule) -> None:
        """int_linear(..., bound) -> int_linear(..., 2**31)"""
        for node in gm.graph.nodes:
            if "bound" in node.kwargs:
                node.kwargs = {**node.kwargs, "bound": 2**31}

    with pytest.raises(VerifyError, match="listed island"):
        convert(qat, passes=[add_a_float_op])
    with pytest.raises(VerifyError, match="2147483648"):
        convert(qat, passes=[raise_a_bound])


def test_albert_shares_its_codes() -> None:
    model = converted("W8E8A8", family="albert")
    seen = compare(calibrated("W8E8A8", "albert"), model, DATA)
    assert seen.max_steps <= 1 and seen.max_share <= 1e-3
    queries = {n.target for n in model.gm.graph.find_nodes(op="get_attr") if n.target.endswith("query.weight_codes")}
    assert len(queries) == 1


def test_convbert_convolves_in_integers() -> None:
    model = converted("W4E4A8-lsq+", family="convbert")
    seen = compare(calibrated("W4E4A8-lsq+", "convbert"), model, DATA)
    assert "int_conv1d" in ops_at(model.gm).values()
    assert seen.max_steps <= 1 and seen.max_share <= 1e-3, str(seen)
