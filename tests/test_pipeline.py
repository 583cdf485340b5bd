"""The runner: user passes, stop_after, diffs, timing; the verifier on graphs broken by hand."""

from __future__ import annotations

import pytest
import torch
from families import batch, tiny
from torch import nn

import kdlsq_fx as kq
from kdlsq_fx.capture import capture
from kdlsq_fx.errors import ConfigError, VerifyError
from kdlsq_fx.graph import sited
from kdlsq_fx.pipeline import Trace, graph_pass, run_passes
from kdlsq_fx.verify import verify

aten = torch.ops.aten


@graph_pass("float")
def fold_double_transpose(gm):
    """transpose(transpose(x, a, b), a, b) -> x"""
    for node in gm.graph.find_nodes(op="call_function", target=aten.transpose.int):
        inner = node.args[0]
        if inner.target is aten.transpose.int and inner.args[1:] == node.args[1:]:
            node.replace_all_uses_with(inner.args[0])


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x.transpose(0, 1).transpose(0, 1))


def test_a_users_pass_runs_before_the_quantizers():
    trace = Trace(diffs=True)
    x = torch.randn(4, 8)
    qat = kq.prepare_qat(Twice(), "W8E8A8", example=(x,), passes=[fold_double_transpose], trace=trace)
    assert [r[0] for r in trace.rows] == ["choose_integer_forms", "fold_double_transpose", "insert_quantizers"]
    assert not qat.gm.graph.find_nodes(op="call_function", target=aten.transpose.int)
    assert "-%transpose" in trace.texts["fold_double_transpose"]
    assert all(r[2] >= 0 for r in trace.rows) and "insert_quantizers" in str(trace)


def test_stop_after_and_wrong_names():
    x = torch.randn(4, 8)
    stopped = kq.prepare_qat(
        Twice(), "W8E8A8", example=(x,), passes=[fold_double_transpose], stop_after="fold_double_transpose"
    )
    assert stopped.stage == "float"
    with pytest.raises(ConfigError, match="no pass of this pipeline"):
        kq.prepare_qat(Twice(), "W8E8A8", example=(x,), stop_after="nonsense")
    with pytest.raises(ConfigError, match="graph_pass"):
        kq.prepare_qat(Twice(), "W8E8A8", example=(x,), passes=[lambda gm: None])
    with pytest.raises(ConfigError, match="no such stage"):
        graph_pass("flaot")


def test_a_pass_that_breaks_a_promise_is_named():
    @graph_pass("float")
    def twin_sites(gm):
        """two nodes -> one site"""
        nodes = list(sited(gm.graph).values())
        nodes[1].meta["site"] = nodes[0].meta["site"]

    with pytest.raises(VerifyError, match="two nodes have this site") as err:
        run_passes(capture(tiny("bert")).gm, [twin_sites])
    assert "twin_sites" in str(err.value)


def test_undeclared_target_after_a_pass():
    @graph_pass("float")
    def odd(gm):
        """gelu -> erfinv"""
        gm.graph.find_nodes(op="call_function", target=aten.gelu.default)[0].target = aten.erfinv.default

    with pytest.raises(VerifyError, match="erfinv"):
        run_passes(capture(tiny("bert")).gm, [odd])


def test_quantizer_behind_quantizer_is_refused():
    qat = kq.prepare_qat(tiny("bert"), "W8E8A8")
    linear = sited(qat.gm.graph)["bert.encoder.layer.0.attention.self.query/linear"]
    first = linear.args[0]
    with qat.gm.graph.inserting_before(linear):
        second = qat.gm.graph.call_module(str(first.target), (first,))
    second.meta = {**first.meta, "site": "again/q"}
    linear.replace_input_with(first, second)
    with pytest.raises(VerifyError, match="rounded twice"):
        verify(qat.gm)


def test_quantizer_in_a_float_graph_is_refused():
    qat = kq.prepare_qat(tiny("bert"), "W8E8A8")
    qat.gm.meta["stage"] = "float"
    with pytest.raises(VerifyError, match="quantizer in a float graph"):
        verify(qat.gm)


def test_bad_scale_in_qdq_is_refused():
    qat = kq.prepare_qat(tiny("bert"), "W8E8A8")
    kq.calibrate(qat, [batch()], progress=False)
    qdq = kq.freeze_qat(qat)
    name = next(k for k, v in qdq.gm.named_buffers() if "scale" in k)
    qdq.gm.get_buffer(name).fill_(-1.0)
    with pytest.raises(VerifyError, match="not finite and positive"):
        verify(qdq.gm)
