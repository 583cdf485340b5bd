"""prepare_qat: where quantizers stand, the HF surface, saving, and clear errors."""

from __future__ import annotations

import copy
import inspect
import json

import onnxruntime
import pytest
import torch
from families import FAMILIES, batch, for_model, tiny
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

import kdlsq_fx as kq
from kdlsq_fx.capture import capture
from kdlsq_fx.cli import main
from kdlsq_fx.errors import CalibrationError, CheckpointError, ConfigError, InputError
from kdlsq_fx.graph import root, sited
from kdlsq_fx.lsq import Lsq
from kdlsq_fx.op import op_of, tensor_args
from kdlsq_fx.qconfig import QSpec, Rule
from kdlsq_fx.report import site_rows


def quantizers(qat):
    return {str(n.target): n for n in qat.gm.graph.nodes if (op := op_of(n)) and op.name == "lsq"}


def operand_is_quantized(qat, site, index):
    op = op_of(root(tensor_args(sited(qat.gm.graph)[site])[index]))
    return op is not None and op.name == "lsq"


def calibrated(model, qconfig, **kwargs):
    qat = kq.prepare_qat(model, qconfig, **kwargs)
    kq.calibrate(qat, [for_model(model, batch(seed=s)) for s in range(2)], progress=False)
    return qat


def test_the_papers_placement_on_bert():
    qat = kq.prepare_qat(tiny("bert"), "W2E2A8")
    layer = "bert.encoder.layer.0"
    for name in ("attention.self.query", "attention.self.key", "attention.output.dense", "intermediate.dense"):
        assert operand_is_quantized(qat, f"{layer}.{name}/linear", 0) and operand_is_quantized(
            qat, f"{layer}.{name}/linear", 1
        )
    for site in (f"{layer}.attention.self/matmul", f"{layer}.attention.self/matmul:1"):
        assert operand_is_quantized(qat, site, 0) and operand_is_quantized(qat, site, 1)
    assert operand_is_quantized(qat, "bert.pooler.dense/linear", 1)
    assert not operand_is_quantized(qat, "classifier/linear", 1)
    for site in (f"{layer}.attention.output/add", f"{layer}.output/add", "bert.embeddings.LayerNorm/layer_norm"):
        assert not any(
            op_of(root(a)) and op_of(root(a)).name == "lsq" for a in tensor_args(sited(qat.gm.graph)[site])[:1]
        )
    names = quantizers(qat)
    assert (
        "bert.embeddings.word_embeddings.weight_lsq" in names
        and "bert.embeddings.position_embeddings.weight_lsq" in names
    )
    assert "bert.embeddings.token_type_embeddings.weight_lsq" not in names


def test_a_value_read_three_times_is_quantized_once():
    qat = kq.prepare_qat(tiny("bert"), "W4E4A8")
    sites = sited(qat.gm.graph)
    readers = [sites[f"bert.encoder.layer.1.attention.self.{n}/linear"] for n in ("query", "key", "value")]
    assert len({root(r.args[0]) for r in readers}) == 1
    assert len(quantizers(qat)) == len(set(quantizers(qat).values()))


@pytest.mark.parametrize("qconfig", ["W4E4A8", "W2E2A8-lsq", "W8E8A8-int", "W4E4A8-lsq+"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_prepares_trains_and_evaluates(family, qconfig):
    model = tiny(family)
    qat = calibrated(model, qconfig)
    data = for_model(model, batch())
    loss = qat.train()(**data, labels=torch.tensor([0, 1, 0, 1])).loss
    loss.backward()
    steps = [p for m in qat.gm.modules() if isinstance(m, Lsq) for p in m.parameters(recurse=False)]
    assert steps and all(p.grad is not None and torch.isfinite(p.grad).all() for p in steps)
    with torch.no_grad():
        assert torch.isfinite(qat.eval()(**data).logits).all()


def test_no_fuel_is_the_float_model_and_fuel_counts():
    model = tiny("bert").eval()
    data = batch()
    empty = kq.prepare_qat(model, "W2E2A8", fuel=0).eval()
    torch.testing.assert_close(empty(**data).logits, model(**data).logits, atol=1e-5, rtol=1e-5)
    some = kq.prepare_qat(model, "W2E2A8", fuel=5)
    assert len(quantizers(some)) == 5
    assert "0 of 49 sites have quantizers" in empty.table() and "fuel ended before weight:kdlsq2" in empty.table()
    assert sum(row[2].count("kdlsq") for row in site_rows(some.gm)) == 7  # the first layer's input has three readers


def test_hugging_face_surface():
    model = tiny("bert").eval()
    before = copy.deepcopy(model.state_dict())
    qat = calibrated(model, "W8E8A8")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and not model.training
    names = list(inspect.signature(qat.forward).parameters)
    assert names == list(inspect.signature(model.forward).parameters)
    data = batch()
    out = qat(data["input_ids"], data["attention_mask"], labels=torch.tensor([0, 1, 1, 0]))
    assert isinstance(out, SequenceClassifierOutput) and out.loss is not None and out[1] is out.logits
    want = model(**data, labels=torch.tensor([0, 1, 1, 0]))
    assert abs(float(out.loss) - float(want.loss)) < 0.05
    assert qat.config.num_labels == 2
    with pytest.warns(UserWarning, match="pad ids"):
        ones = qat(input_ids=data["input_ids"]).logits
    assert torch.equal(ones, qat(input_ids=data["input_ids"], attention_mask=torch.ones_like(data["input_ids"])).logits)


@pytest.mark.parametrize("labels", [{"labels": torch.tensor([0, 1, 0, 1])}, {"labels": torch.randn(4, 2)}])
def test_losses_equal_hugging_face(labels):
    model = tiny("bert").eval()
    data = batch()
    qat = kq.prepare_qat(model, "W8E8A8", fuel=0).eval()
    torch.testing.assert_close(qat(**data, **labels).loss, model(**data, **labels).loss, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head", ["ForQuestionAnswering", "ForTokenClassification", "ForMaskedLM"])
def test_losses_of_other_heads(head):
    model = tiny("bert", head).eval()
    data = batch()
    labels = {"labels": torch.where(data["attention_mask"] == 1, data["input_ids"] % 2, -100)}
    if head == "ForQuestionAnswering":
        labels = {"start_positions": torch.tensor([0, 1, 2, 40]), "end_positions": torch.tensor([1, 2, 3, 50])}
    qat = kq.prepare_qat(model, "W8E8A8", fuel=0).eval()
    torch.testing.assert_close(qat(**data, **labels).loss, model(**data, **labels).loss, atol=1e-5, rtol=1e-5)


def test_bad_batches():
    model = tiny("bert")
    qat = calibrated(model, "W8E8A8")
    ids = torch.randint(3, 90, (1, 513))
    with pytest.raises(InputError, match="513.*512 positions"):
        qat(input_ids=ids, attention_mask=torch.ones_like(ids))
    with pytest.raises(InputError, match="vocabulary from 0 to 98"):
        qat(input_ids=torch.tensor([[5, 99]]), attention_mask=torch.ones(1, 2).long())
    with pytest.raises(InputError, match="position_ids was not captured"):
        qat(input_ids=torch.tensor([[5, 6]]), position_ids=torch.tensor([[0, 1]]))
    with pytest.raises(InputError, match="wrong_name|takes"):
        kq.prepare_qat(nn.Linear(3, 3), "W8E8A8", example=(torch.randn(2, 3),))(wrong_name=1)


def test_bad_configs():
    model = tiny("bert")
    with pytest.raises(ConfigError, match="W2E2A8"):
        kq.prepare_qat(model, "W9000")
    with pytest.raises(ConfigError, match="matches nothing.*"):
        kq.prepare_qat(model, (Rule(site="**.layer.7.**", op="linear", weight=QSpec(bits=4)),))
    clash = (
        Rule(site="**.query/linear", weight=QSpec(bits=4), act=QSpec(bits=4)),
        Rule(site="**", op="linear", weight=QSpec(bits=4), act=QSpec(bits=8)),
    )
    with pytest.raises(ConfigError, match="differently"):
        kq.prepare_qat(model, clash)
    for broken in ("nan", "inf", "-inf"):
        with torch.no_grad():
            model.bert.encoder.layer[1].output.dense.weight[3, 3] = float(broken)
        with pytest.raises(CalibrationError, match=r"layer\.1\.output\.dense\.weight"):
            kq.prepare_qat(model, "W8E8A8")


def test_uncalibrated_models_say_so():
    qat = kq.prepare_qat(tiny("bert"), "W8E8A8")
    with pytest.raises(CalibrationError, match="calibrate"):
        qat(**batch())
    with pytest.raises(CalibrationError, match="calibrate"):
        kq.convert(qat)


def weights_of(qat):
    """Site glob of the weight -> quantizer and bits."""
    found = {name: m.spec for name, m in qat.named_modules() if getattr(m, "role", "") == "weight"}
    return {name: (spec.quantizer, spec.bits, spec.axis) for name, spec in found.items()}


@pytest.mark.parametrize("suffix", ["", "-lsq", "-lsq+", "-minmax", "-ema", "-lsq-int"])
def test_a_users_rule_keeps_the_presets_quantizer(suffix):
    config = kq.preset(f"W4E4A8{suffix}").with_rules(Rule(site="**.query/*", weight=QSpec(bits=8, axis=0)))
    preset_own = suffix.strip("-").replace("-int", "") or "kdlsq"
    made = weights_of(kq.prepare_qat(tiny("bert"), config))
    assert {v for k, v in made.items() if ".query." in k} == {(preset_own, 8, 0)}
    assert {v for k, v in made.items() if ".key." in k} == {(preset_own, 4, None)}


def test_a_quantizer_a_rule_names_is_its_own():
    config = kq.preset("W4E4A8-lsq").with_rules(Rule(op="linear", weight=QSpec(bits=8, quantizer="minmax")))
    made = weights_of(kq.prepare_qat(tiny("bert"), config))
    assert {v for k, v in made.items() if ".query." in k} == {("minmax", 8, None)}


def test_ternarybert_has_no_other_width():
    config = kq.preset("W2E2A8-twn").with_rules(Rule(site="**.query/*", weight=QSpec(bits=8)))
    with pytest.raises(ConfigError, match=r"(?s)'twn' is ternary, got bits=8.*layer\.0.*query.*quantizer 'ema'"):
        kq.prepare_qat(tiny("bert"), config)


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "modernbert", "mobilebert", "convbert"])
def test_the_table_tells_what_convert_makes(family):
    """Rules printed before training against the islands that are there after lowering."""
    model = tiny(family)
    qat = calibrated(model, "W8E8A8-int")
    got = {site: got for site, _, got, _ in site_rows(qat.gm)}
    islands = {island.site for island in kq.convert(qat, allow_islands=True).islands}
    assert {site for site in got if got[site] == "float"} == islands
    assert {got[s] for s in got if s.endswith("/dropout")} <= {"none"} and "integer" in got.values()


def test_the_table_tells_the_axis():
    rules = Rule(op="linear", weight=QSpec(bits=8, axis=0)), Rule(op="embedding", weight=QSpec(bits=8, axis=0))
    table = kq.prepare_qat(tiny("bert"), kq.preset("W2E2A8-lsq").with_rules(*rules)).table()
    lines = {line.split()[0]: line for line in table.splitlines()}
    assert "weight:lsq8 per row" in lines["bert.embeddings.word_embeddings/embedding"]
    query = lines["bert.encoder.layer.0.attention.self.query/linear"]
    assert "weight:lsq8 per channel" in query and "act" not in query.replace("attention", "")
    assert "act:lsq8 per tensor, prob" not in lines["bert.encoder.layer.0.attention.self/matmul"]
    assert "prob:lsq8 per tensor, act:lsq8 per tensor" in lines["bert.encoder.layer.0.attention.self/matmul:1"]


def test_the_table_names_every_site():
    table = kq.prepare_qat(tiny("bert"), "W2E2A8").table()
    assert "classifier/linear" in table and "head" in table
    assert "bert.encoder.layer.1.attention.self/matmul:1" in table
    assert "no rule names it" in table


def test_tied_decoder_shares_the_quantizer():
    qat = kq.prepare_qat(tiny("bert", "ForMaskedLM"), "W4E4A8")
    shared = [n for n in qat.gm.graph.nodes if str(n.target) == "bert.embeddings.word_embeddings.weight_lsq"]
    assert len(shared) == 2 or operand_is_quantized(qat, "cls.predictions.decoder/linear", 1)


@pytest.mark.parametrize("preset", ["W2E8A8", "W4E2A8-lsq-int"])
def test_a_tied_decoder_has_the_bits_of_its_table(preset):
    """One parameter, and a preset that names two widths; a user's own rule for the decoder is still a conflict."""
    model = tiny("bert", "ForMaskedLM")
    made = weights_of(kq.prepare_qat(model, preset))
    tied = [spec for name, spec in made.items() if "decoder" in name or "word_embeddings" in name]
    assert tied and {bits for _, bits, _ in tied} == {int(preset[3])}
    rule = Rule(site="**.decoder/linear", op="linear", weight=QSpec(bits=5), act=QSpec(bits=8))
    with pytest.raises(ConfigError, match="two rules quantize one value differently"):
        kq.prepare_qat(model, kq.preset(preset).with_rules(rule))


@pytest.mark.parametrize("family", ["bert", "albert", "modernbert"])
def test_save_and_load(tmp_path, family):
    model = tiny(family)
    qat = calibrated(model, "W4E4A8").eval()
    qat.save_pretrained(tmp_path / "qat")
    again = kq.from_pretrained(tmp_path / "qat")
    data = for_model(model, batch(seed=5))
    assert torch.equal(again(**data).logits, qat(**data).logits)
    assert again.qconfig == qat.qconfig and again.stage == "qat"


@kq.graph_pass("float")
def sharpen(gm):
    """gelu(x) -> gelu(2 x)"""
    aten = torch.ops.aten
    for node in gm.graph.find_nodes(op="call_function", target=aten.gelu.default):
        with gm.graph.inserting_before(node):
            node.args = (gm.graph.call_function(aten.mul.Tensor, (node.args[0], 2.0)),)


def test_a_folder_with_a_users_pass_asks_for_it(tmp_path, capsys):
    qat = kq.prepare_qat(tiny("bert").eval(), "W8E8A8", passes=[sharpen])
    kq.calibrate(qat, [batch()], progress=False)
    folder = qat.save_pretrained(tmp_path / "qat")
    again = kq.from_pretrained(folder, passes=[sharpen])
    assert torch.equal(again(**batch(seed=3)).logits, qat(**batch(seed=3)).logits)
    with pytest.raises(CheckpointError, match=r"(?s)prepared with sharpen, and none came.*passes=\[sharpen\]"):
        kq.from_pretrained(folder)
    assert main(["convert", str(folder), str(tmp_path / "int")]) == 1
    assert "prepared with sharpen" in (said := capsys.readouterr().err) and "the command line takes no passes" in said
    kq.convert(again).save_pretrained(tmp_path / "int")  # needs none
    kq.from_pretrained(tmp_path / "int")(**batch())
    plain = kq.prepare_qat(tiny("bert").eval(), "W8E8A8").train()
    kq.calibrate(plain, [batch()], progress=False)
    with pytest.raises(CheckpointError, match=r"no passes of its author, and sharpen came"):
        kq.from_pretrained(plain.save_pretrained(tmp_path / "plain"), passes=[sharpen])


@pytest.mark.parametrize("preset", ["W8E8A8", "W8E8A8-int"])
def test_token_types_of_a_model_that_has_one(tmp_path, preset):
    """RoBERTa's checkpoints: type_vocab_size 1. No stage asks for token types, zeros are taken."""
    model = tiny("roberta", type_vocab_size=1).eval()
    qat = calibrated(model, preset).eval()
    data = batch(seed=5)
    bare = {k: v for k, v in data.items() if k != "token_type_ids"}
    graph = capture(model).gm.eval()
    with torch.no_grad():
        eager = tiny("roberta", type_vocab_size=1, attn_implementation="eager").eval()
        assert torch.equal(graph(*bare.values())[0], eager(**data).logits)
    assert qat.input_names == ("input_ids", "attention_mask")
    assert torch.equal(qat(**data).logits, qat(**bare).logits)
    with pytest.raises(InputError, match="one token type"):
        qat(**{**data, "token_type_ids": torch.ones_like(data["input_ids"])})
    program = kq.convert(qat)
    assert torch.equal(program(**data).logits, program(**bare).logits)
    again = kq.from_pretrained(qat.save_pretrained(tmp_path / "qat"))
    assert torch.equal(again(**bare).logits, qat(**bare).logits)
    program.save_pretrained(tmp_path / "int")
    assert torch.equal(kq.from_pretrained(tmp_path / "int")(**bare).logits, program(**bare).logits)
    kq.export_onnx(qat, tmp_path / "m.onnx", target="integer" if "int" in preset else "ort-cpu")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["input_ids", "attention_mask"]
    (logits,) = session.run(None, {k: v.numpy() for k, v in bare.items()})
    assert abs(logits - program(**bare).logits.numpy()).max() < 0.05


def test_unused_token_types_are_no_input():
    assert kq.prepare_qat(tiny("deberta-v2"), "W8E8A8").input_names == ("input_ids", "attention_mask")


def test_damaged_folders(tmp_path):
    qat = calibrated(tiny("bert"), "W4E4A8")
    folder = tmp_path / "qat"
    qat.save_pretrained(folder)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="truncated"):
        kq.from_pretrained(folder)
    weights.write_bytes(whole)
    info = json.loads((folder / "kdlsq.json").read_text())
    (folder / "kdlsq.json").write_text(json.dumps({**info, "format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        kq.from_pretrained(folder)
    (folder / "kdlsq.json").write_text(json.dumps({**info, "graph": "0" * 64}))
    with pytest.raises(CheckpointError, match="not the one"):
        kq.from_pretrained(folder)
    for name in ("config.json", "kdlsq.json"):
        (folder / name).rename(tmp_path / name)
        with pytest.raises(CheckpointError, match=f"has no {name}"):
            kq.from_pretrained(folder)
        (tmp_path / name).rename(folder / name)
    with pytest.raises(CheckpointError, match="does not exist"):
        kq.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        qat.save_pretrained(tmp_path / "file" / "qat")


def test_no_save_overwrites_a_model_of_another_kind(tmp_path):
    model = tiny("bert")
    model.save_pretrained(tmp_path / "float")
    qat = kq.prepare_qat(model, "W8E8A8")
    kq.calibrate(qat, [batch()], progress=False)
    int_model = kq.convert(qat.eval())
    qat.save_pretrained(tmp_path / "qat")
    int_model.save_pretrained(tmp_path / "int")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for own, others in ((qat, ("float", "int")), (int_model, ("float", "qat"))):
        for other in others:
            with pytest.raises(CheckpointError, match=f"an? {other} model stands in"):
                own.save_pretrained(tmp_path / other)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    qat.save_pretrained(tmp_path / "qat")
    int_model.save_pretrained(tmp_path / "int")


def test_a_folder_mixed_of_two_saves_is_refused(tmp_path):
    """What a save leaves that was stopped between its files, and what a flipped bit does."""
    for preset in ("W4E4A8", "W8E8A8"):
        calibrated(tiny("bert"), preset).save_pretrained(tmp_path / preset)
    weights = tmp_path / "W4E4A8" / "model.safetensors"
    own = weights.read_bytes()
    flipped = own[:-1] + bytes([own[-1] ^ 1])
    for other in ((tmp_path / "W8E8A8" / "model.safetensors").read_bytes(), flipped):
        weights.write_bytes(other)
        with pytest.raises(CheckpointError, match="is not the file that kdlsq.json was written for"):
            kq.from_pretrained(tmp_path / "W4E4A8")
    weights.write_bytes(own)
    kq.from_pretrained(tmp_path / "W4E4A8")


def test_a_save_that_was_stopped_is_refused_until_the_next_one(tmp_path, monkeypatch):
    """Stopped after any of its files: over another model's folder it is the new one, or none; never a mix."""
    first, second = calibrated(tiny("bert"), "W4E4A8"), calibrated(tiny("bert"), "W4E4A8")
    with torch.no_grad():
        second.gm.get_parameter("classifier.bias").add_(1)
    inputs = batch()
    first.save_pretrained(tmp_path)
    saved = kq.from_pretrained(tmp_path)(**inputs).logits

    def stopped(*_):
        raise KeyboardInterrupt

    for name in ("write_tensors", "checksum", "write_json"):
        with monkeypatch.context() as patch:
            patch.setattr(f"kdlsq_fx.saving.{name}", stopped)
            with pytest.raises(KeyboardInterrupt):
                second.save_pretrained(tmp_path)
        if name == "write_tensors":  # the first of them: nothing was written yet
            assert torch.equal(kq.from_pretrained(tmp_path)(**inputs).logits, saved)
            continue
        with pytest.raises(CheckpointError, match="is not the file that kdlsq.json was written for"):
            kq.from_pretrained(tmp_path)
    second.save_pretrained(tmp_path)
    torch.testing.assert_close(kq.from_pretrained(tmp_path)(**inputs).logits, saved + 1)


def test_a_folder_whose_scales_are_of_other_ranges_is_refused(tmp_path):
    """As a version wrote it that counted codes in another way: its files agree with each other."""
    qat = calibrated(tiny("bert"), "W4E4A8")
    name, quantizer = next((n, m) for n, m in qat.gm.named_modules() if isinstance(m, Lsq))
    quantizer.ready.fill_(1)
    qat.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=rf"(?s)does not fit the graph.*{name}.*is for 1 codes.*make the folder"):
        kq.from_pretrained(tmp_path)


def test_other_modules_save_and_load(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    x = torch.randn(5, 8)
    qat = kq.prepare_qat(model, "W8E8A8", example=(x,))
    kq.calibrate(qat, [(x,)], progress=False)
    qat.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="model="):
        kq.from_pretrained(tmp_path)
    again = kq.from_pretrained(tmp_path, model=model)
    assert torch.equal(again(x), qat.eval()(x))
