"""calibrate, param_groups and scale_report on plain modules that hold quantizers."""

from __future__ import annotations

import math

import pytest
import torch
from families import batch, for_model, tiny
from torch import nn

from kdlsq_fx.api import freeze_qat, prepare_qat
from kdlsq_fx.calibration import LR_SCALE_ACT, LR_SCALE_WEIGHT, calibrate, param_groups, scale_report
from kdlsq_fx.errors import CalibrationError, InputError
from kdlsq_fx.lsq import make_quantizer
from kdlsq_fx.qconfig import QSpec


class Net(nn.Module):
    """Two linears that share one weight, each operand quantized; a norm and a dropout in eval of its own."""

    def __init__(self, quantizer: str = "kdlsq", axis: int | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.norm, self.drop = nn.LayerNorm(6), nn.Dropout(0.5)
        spec = QSpec(bits=4, quantizer=quantizer, axis=axis)
        self.first.weight_lsq = make_quantizer(spec, channels=6, numel=36, role="weight")
        self.first.weight_lsq.init_from(self.first.weight)
        self.x_lsq = make_quantizer(QSpec(bits=8, quantizer=quantizer), role="act")
        self.y_lsq = make_quantizer(QSpec(bits=8, quantizer=quantizer), role="act")
        self.spare = False

    def forward(self, x, spare=False):
        w = self.first.weight_lsq(self.first.weight)
        h = self.drop(nn.functional.linear(self.x_lsq(x), w, self.first.bias))
        if spare:
            return h
        return self.norm(nn.functional.linear(self.y_lsq(h), w, self.second.bias))


def batches(n=3, size=5):
    return [torch.randn(size, 6, generator=torch.Generator().manual_seed(i)) for i in range(n)]


@pytest.mark.parametrize("wrap", [lambda x: {"x": x}, lambda x: (x,), lambda x: [x], lambda x: x])
def test_calibrate_streams_and_restores(wrap):
    net = Net().train()
    net.norm.eval()
    drawn = []

    def stream():
        for x in batches():
            drawn.append(1)
            yield wrap(x)

    stats = calibrate(net, stream(), progress=False)
    assert len(drawn) == 3 and net.training and net.drop.training and not net.norm.training
    assert not net.x_lsq.observing and bool(net.x_lsq.ready) and bool(net.y_lsq.ready)
    seen, whole = stats["x_lsq"], torch.cat(batches())
    assert (seen.elements, seen.samples) == (90, 15) and net.x_lsq.features.item() == 6
    assert seen.low == pytest.approx(float(whole.min())) and seen.high == pytest.approx(float(whole.max()))
    assert seen.scale == pytest.approx(float(net.x_lsq.scale)) and 0 <= seen.clipped < 0.2
    assert torch.isfinite(net(whole)).all()
    reference = Net().eval()
    reference.x_lsq.init_from(whole)
    assert torch.equal(reference.x_lsq.scale, net.x_lsq.scale)


def test_max_batches_reads_no_further():
    left = iter(batches(5))
    calibrate(Net(), left, max_batches=2, progress=False)
    assert len(list(left)) == 3


def test_calibration_sees_quantized_weights_and_float_activations():
    net = Net()
    seen = []
    net.y_lsq.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    (x,) = batches(1)
    calibrate(net, [x], progress=False)
    assert torch.equal(seen[0], nn.functional.linear(x, net.first.weight_lsq(net.first.weight), net.first.bias))


def test_what_cannot_calibrate_says_so_and_changes_nothing():
    net = Net().train()
    (x,) = batches(1)
    bad = x.clone()
    bad[0, 0] = math.inf
    for data, error, says in (
        ([], CalibrationError, "no batch"),
        ([x, bad], CalibrationError, "NaN or infinity.*x_lsq"),
        ([{"x": x, "spare": True}], CalibrationError, "y_lsq"),
        ([3], InputError, "int"),
    ):
        with pytest.raises(error, match=f"(?s){says}"):
            calibrate(net, data, progress=False)
        assert not bool(net.x_lsq.ready) and not net.x_lsq.observing and net.training and net.drop.training
    with pytest.raises(CalibrationError, match="prepare_qat"):
        calibrate(nn.Linear(2, 2), [x], progress=False)
    with pytest.raises(CalibrationError, match="(?s)x_lsq.*calibrate first"):
        net(x)


@pytest.mark.parametrize("quantizer", ["kdlsq", "lsq", "lsq+", "minmax"])
def test_every_parameter_is_in_one_group(quantizer):
    net = Net(quantizer)
    if quantizer != "minmax":
        with pytest.raises(CalibrationError, match="calibrate"):
            param_groups(net, lr=1e-4)
    calibrate(net, batches(), progress=False)
    net.norm.bias.requires_grad_(False)
    groups = {g["name"]: g for g in param_groups(net, lr=1e-4)}
    listed = [p for g in groups.values() for p in g["params"]]
    assert len({id(p) for p in listed}) == len(listed)
    assert {id(p) for p in listed} == {id(p) for p in net.parameters() if p.requires_grad}
    assert groups["decay"]["params"] == [net.first.weight] and groups["decay"]["weight_decay"] == 0.01
    assert all(g["weight_decay"] == 0 for name, g in groups.items() if name != "decay")
    assert len(groups["no_decay"]["params"]) == 3 and groups["no_decay"]["lr"] == groups["decay"]["lr"] == 1e-4
    if quantizer == "kdlsq":
        assert groups["weight_scale"]["lr"] == LR_SCALE_WEIGHT and groups["act_scale"]["lr"] == LR_SCALE_ACT
    elif quantizer == "minmax":
        assert set(groups) == {"decay", "no_decay"}
    else:  # their parameter is the step: the same move of the clip value
        assert groups["weight_scale_step_7"]["lr"] == LR_SCALE_WEIGHT / 7
        assert groups["act_scale_step_127"]["lr"] == LR_SCALE_ACT / 127
        assert ("act_scale" in groups) == (quantizer == "lsq+")
    torch.optim.AdamW(list(groups.values()))


def test_group_rates_can_be_set():
    net = Net()
    calibrate(net, batches(), progress=False)
    groups = {g["name"]: g for g in param_groups(net, lr=1, weight_decay=0.5, lr_scale_weight=2, lr_scale_act=3)}
    assert [groups[n]["lr"] for n in ("decay", "weight_scale", "act_scale")] == [1, 2, 3]
    assert groups["decay"]["weight_decay"] == 0.5


@pytest.mark.parametrize("quantizer", ["kdlsq", "lsq", "lsq+"])
def test_scales_train_and_stay_positive_at_any_rate(quantizer):
    net = Net(quantizer).train()
    calibrate(net, batches(), progress=False)
    optimizer = torch.optim.AdamW(param_groups(net, lr=1e-2, lr_scale_weight=10.0, lr_scale_act=100.0))
    for x in batches(6):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
        out = net.eval()(x)
        assert torch.isfinite(out).all()
        assert all(bool((q.scale > 0).all()) for q in (net.first.weight_lsq, net.x_lsq, net.y_lsq))
        net.train()


@pytest.mark.parametrize(("quantizer", "axis"), [("kdlsq", None), ("lsq", 0), ("ema", None), ("lsq+", None)])
def test_scale_report(quantizer, axis):
    net = Net(quantizer, axis)
    before = scale_report(net)
    assert [r.ready for r in before] == [True, False, False] and "not set" in str(before)
    calibrate(net, batches(), progress=False)
    rows = {r.name: r for r in scale_report(net)}
    weight = rows["first.weight_lsq"]
    assert (weight.bits, weight.qmax, weight.channels) == (4, 7, 6 if axis == 0 else 1)
    with torch.no_grad():
        scale = net.first.weight_lsq.scale
        ratio = torch.round(net.first.weight / (scale[:, None] if axis == 0 else scale))
        share = float(((ratio < weight.qmin) | (ratio > 7)).float().mean())
    assert weight.clipped == pytest.approx(share)
    assert (
        rows["x_lsq"].scale == pytest.approx(float(net.x_lsq.scale))
        and rows["x_lsq"].zero_point == net.x_lsq.zero_point
    )
    assert len(str(scale_report(net)).splitlines()) == 4
    assert scale_report(net).to_dicts()[0]["name"] == "first.weight_lsq"


@pytest.mark.parametrize("preset", ["W4E4A8-ema", "W2E2A8-twn", "W4E4A8-minmax", "W2E2A8", "W4E4A8-lsq+"])
def test_a_step_after_the_last_forward_is_in_the_frozen_model(preset):
    """Baselines recompute a weight's scale in the forward: converting right after a step must not use the old one."""
    model = tiny("bert")
    data = for_model(model, batch(seed=0))
    qat = prepare_qat(model, preset)
    calibrate(qat, [data], progress=False)
    optimizer = torch.optim.SGD(param_groups(qat.train(), lr=0.05), lr=0.05)
    qat(**data).logits.square().sum().backward()
    optimizer.step()
    frozen = freeze_qat(qat)
    with torch.no_grad():
        assert torch.equal(frozen(**data).logits, qat.eval()(**data).logits)
