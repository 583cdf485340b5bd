"""The runner: user passes, stop_after, diffs, timing; the verifier on graphs broken by hand."""

from __future__ import annotations

import pytest
import torch
from families import batch, tiny
from torch import nn

import kdlsq_fx as kq
from kdlsq_fx.capture import capture
from kdlsq_fx.errors import ConfigError, PassError, VerifyError
from kdlsq_fx.graph import module_path, sited
from kdlsq_fx.op import op_of
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


def test_stop_after_and_wrong_names(tmp_path):
    x = torch.randn(4, 8)
    stopped = kq.prepare_qat(
        Twice(), "W8E8A8", example=(x,), passes=[fold_double_transpose], stop_after="fold_double_transpose"
    )
    assert stopped.stage == "float"
    qat = kq.prepare_qat(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 3)), "W8E8A8", example=(x,))
    kq.calibrate(qat, [(x,)], progress=False)
    with pytest.raises(ConfigError, match="still at stage qdq"):
        kq.convert(qat.eval(), stop_after="freeze").save_pretrained(tmp_path / "int")
    assert not list(tmp_path.iterdir())
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


@pytest.mark.parametrize("qconfig", ["W8E8A8", "W4E4A8-int", "W8E8A8-minmax"])
def test_an_operand_that_passes_by_its_quantizer_is_refused(qconfig):
    """Every quantizer of every preset in turn is taken out of the graph: the verifier names a reader of each."""
    qat = kq.prepare_qat(tiny("bert"), qconfig)
    quantizers = [n for n in qat.gm.graph.find_nodes(op="call_module") if op_of(n).name == "lsq"]
    assert len(quantizers) > 20
    for node in quantizers:
        if all(user.op == "output" for user in node.users):
            continue
        value, users = node.args[0], list(node.users)
        for user in users:
            user.replace_input_with(node, value)
        with pytest.raises(VerifyError, match=r"a rule quantizes operand \d, which now reads"):
            verify(qat.gm)
        for user in users:
            user.replace_input_with(value, node)
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


@graph_pass("float")
def drop_transposes(gm):
    """transpose(x, 1, 2) -> x: heads and tokens change places"""
    for node in gm.graph.find_nodes(op="call_function", target=aten.transpose.int):
        node.replace_all_uses_with(node.args[0])


@graph_pass("float")
def swap_two_sizes(gm):
    """transpose(x, -1, -2) -> x, with as many features as tokens nobody would notice"""
    for node in gm.graph.find_nodes(op="call_function", target=aten.gelu.default):
        with gm.graph.inserting_after(node):
            new = gm.graph.call_function(aten.transpose.int, (node, 0, 1))
        node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)


@graph_pass("float")
def halve(gm):
    """gelu(x) -> gelu(x) * 0.5"""
    for node in gm.graph.find_nodes(op="call_function", target=aten.gelu.default):
        with gm.graph.inserting_after(node):
            new = gm.graph.call_function(aten.mul.Tensor, (node, 0.5))
        node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)


@graph_pass("qat")
def turn_before_quantizers(gm):
    """lsq(x) -> lsq(transpose(x, -1, -2)): quantizers are not run to see that"""
    for node in gm.graph.find_nodes(
        op="call_module", target="bert.encoder.layer.0.intermediate.intermediate_act_fn.gelu_lsq"
    ):
        with gm.graph.inserting_before(node):
            node.args = (gm.graph.call_function(aten.transpose.int, (node.args[0], -1, -2)),)


@pytest.mark.parametrize("broken", [drop_transposes, swap_two_sizes, turn_before_quantizers])
def test_a_users_pass_that_breaks_shapes_is_stopped_there(broken):
    with pytest.raises(VerifyError, match=rf"(?s)bert\.encoder\.layer\.0\..*{broken.__name__}"):
        kq.prepare_qat(tiny("bert"), "W8E8A8", passes=[broken])


def test_a_users_pass_that_drops_an_output_is_stopped():
    @graph_pass("float")
    def drop(gm):
        """(a, b) -> a"""
        (out,) = gm.graph.find_nodes(op="output")
        out.args = (out.args[0][:1],)

    with pytest.raises(VerifyError, match=r"(?s)returned 2 values, it returns 1 now.*pass drop must keep them"):
        kq.prepare_qat(tiny("bert", "Model"), "W8E8A8", passes=[drop])


def test_the_nodes_of_a_users_pass_get_types():
    gm = kq.prepare_qat(tiny("bert"), "W8E8A8", passes=[halve], stop_after="halve").gm
    made = [n for n in gm.graph.find_nodes(op="call_function", target=aten.mul.Tensor) if n.args[1:] == (0.5,)]
    assert [n.meta["val"].shape[-1] for n in made] == [64, 64]
    assert all(n.meta["val"].dtype == torch.float32 and not n.meta["plumbing"] for n in made)


@pytest.mark.parametrize("named", [True, False])
def test_where_a_users_pass_says_nothing_of_the_module_its_node_stands_at_the_root(named):
    """Captured nodes have no meta["path"]: copying it gave None, and quantizers under a module of that name."""

    @graph_pass("float")
    def relu_for_gelu(gm):
        """gelu(x) -> relu(x)"""
        for node in gm.graph.find_nodes(op="call_function", target=aten.gelu.default):
            with gm.graph.inserting_before(node):
                new = gm.graph.call_function(aten.relu.default, (node.args[0],))
            new.meta["path"] = module_path(node) if named else node.meta.get("path")
            node.replace_all_uses_with(new)

    sites = sited(kq.prepare_qat(tiny("bert", "Model"), "W8E8A8-int", passes=[relu_for_gelu]).gm.graph)
    place = "encoder.layer.0.intermediate.intermediate_act_fn/relu" if named else "relu"
    assert {place, f"{place}/q"} <= set(sites)


@pytest.mark.parametrize("preset", ["W4E4A8", "W8E8A8-int"])
def test_a_pass_that_changes_nothing_passes_at_every_stage(preset):
    seen = []

    def nothing(stage):
        @graph_pass(stage)
        def look(gm):
            """x -> x"""
            seen.append(gm.meta["stage"])

        return look

    qat = kq.prepare_qat(tiny("bert"), preset, passes=[nothing("float"), nothing("qat")])
    kq.calibrate(qat, [batch()], progress=False)
    program = kq.convert(qat.eval(), passes=[nothing("qdq"), nothing("int")], backend="torch")
    assert seen == ["float", "qat", "qdq", "int"]
    assert torch.equal(program(**batch()).logits, kq.convert(qat, backend="torch")(**batch()).logits)


def test_what_a_users_pass_raises_names_it():
    @graph_pass("float")
    def careless(gm):
        """x -> ?"""
        raise KeyError("no such thing")

    @graph_pass("float")
    def tangled(gm):
        """a value that is read before it is made"""
        nodes = [n for n in gm.graph.nodes if n.op == "call_function"]
        nodes[0].append(nodes[-1])

    for bad, cause in ((careless, KeyError), (tangled, RuntimeError)):
        with pytest.raises(PassError, match=f"pass {bad.__name__} failed with {cause.__name__}") as err:
            kq.prepare_qat(tiny("bert"), "W8E8A8", passes=[bad])
        assert isinstance(err.value.__cause__, cause)
