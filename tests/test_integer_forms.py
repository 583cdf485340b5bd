"""Before training with the integer placement: masks read back, softmax and GELU in the form the integers will have."""

from __future__ import annotations

import pytest
import torch
from calibrated import calibrated, livelier
from families import batch, for_model, tiny
from torch import fx, nn

from kdlsq_fx.api import convert, freeze_qat, prepare_qat
from kdlsq_fx.calibration import calibrate
from kdlsq_fx.capture import capture
from kdlsq_fx.comparison import compare
from kdlsq_fx.errors import ConfigError
from kdlsq_fx.graph import site_of
from kdlsq_fx.masks import keep_of, masked_scores
from kdlsq_fx.op import op_of
from kdlsq_fx.presets import build
from kdlsq_fx.qconfig import QSpec, Rule
from kdlsq_fx.regions import find_regions

torch.set_num_threads(1)
ATTENTION = ("bert", "distilbert", "electra", "albert", "mpnet", "deberta-v2", "squeezebert", "modernbert")
WHOLE = ("bert", "roberta", "distilbert", "electra", "albert", "squeezebert")


def named(gm: fx.GraphModule, name: str) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if (op := op_of(n)) is not None and op.name == name]


@pytest.mark.parametrize("family", ATTENTION)
def test_a_mask_is_read_back_as_the_keys_that_are_there(family: str) -> None:
    """The bool equals where the additive mask leaves the softmax's operand alone, seen in execution."""
    model = tiny(family).eval()
    gm = capture(model, None).gm
    scores = [n.args[0] for n in named(gm, "softmax") if masked_scores(n.args[0]) is not None]  # type: ignore[arg-type]
    assert scores
    node = scores[0]
    keep = keep_of(gm, node)  # type: ignore[arg-type]
    assert keep is not None
    (out,) = gm.graph.find_nodes(op="output")
    out.args = ((node, keep),)
    gm.graph.lint()
    gm.recompile()
    given = for_model(model, batch(rows=3, length=10))
    names = [str(n.target) for n in gm.graph.find_nodes(op="placeholder")]
    masked, found = gm(*(given.get(n, torch.zeros_like(given["input_ids"])) for n in names))
    assert found.dtype == torch.bool
    assert torch.equal(found.expand_as(masked), masked > -1e30)
    assert not bool(found.all())


def test_a_mask_nobody_understands_leaves_the_softmax_float() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            scores = self.a(x) @ x.transpose(1, 2)
            return torch.softmax(scores + (attention_mask.float() * 3.0 - 2.0)[:, None], -1) @ x

    example = {"x": torch.randn(2, 5, 8), "attention_mask": torch.ones(2, 5, dtype=torch.int64)}
    qat = prepare_qat(Odd(), "W8E8A8-int", example=example)
    assert len(named(qat.gm, "softmax")) == 1
    assert not named(qat.gm, "masked_softmax")


def test_rules_speak_of_the_op_that_stood_there() -> None:
    rules = build("W8E8A8-int").with_rules(
        Rule(op="softmax", act=QSpec(bits=8), wide=QSpec(bits=16), nonlinear="polynomial"),
        Rule(op="gelu", act=QSpec(bits=8), nonlinear="polynomial"),
    )
    qat = prepare_qat(tiny("bert"), rules)
    forms = [n.args[3] for n in named(qat.gm, "masked_softmax")]
    assert forms == ["polynomial"] * 2
    assert [site_of(n).rpartition("/")[2] for n in named(qat.gm, "polynomial_gelu")] == ["gelu", "gelu"]
    with pytest.raises(Exception, match="matches nothing"):
        prepare_qat(tiny("bert"), build("W8E8A8-int").with_rules(Rule(op="masked_softmax", act=QSpec(bits=8))))


def test_the_kdlsq_placement_keeps_its_float_softmax() -> None:
    qat = prepare_qat(tiny("bert"), "W8E8A8")
    assert len(named(qat.gm, "softmax")) == 2
    assert not named(qat.gm, "norm_on_grid")


def test_the_gelu_that_albert_spells_out_is_one_region() -> None:
    regions = find_regions(capture(tiny("albert"), None).gm.graph)
    assert len(regions) == 2  # one a repeat of the shared layer
    assert all(len(r.nodes) == 8 and "activation" in site_of(r.last) for r in regions)
    assert find_regions(capture(tiny("bert"), None).gm.graph) == []


@pytest.mark.parametrize("family", WHOLE)
def test_no_float_is_left_and_the_integers_are_those_of_training(family: str) -> None:
    qat = calibrated("W8E8A8-int", family)
    model = convert(qat)
    assert model.gm.meta["islands"] == ()
    frozen = freeze_qat(qat)
    given = [for_model(tiny(family), batch(rows=4, length=n, seed=n)) for n in (1, 7, 20)]
    for one in given:
        assert torch.equal(qat(**one).logits, frozen(**one).logits)
        assert torch.equal(model(**one).logits, convert(qat, backend="torch")(**one).logits)
    seen = compare(qat, model, given)
    assert seen.unmatched == ()
    assert max(s.max_steps for s in seen.sites.values()) <= 1
    assert max(s.off / s.outputs for s in seen.sites.values()) <= 1e-3


@pytest.mark.parametrize("bits", ["W4E4A8-int", "W2E2A8-lsq-int", "W8E8A4-lsq+-int"])
@pytest.mark.parametrize("wide", [None, QSpec(bits=16)])
def test_polynomials_in_every_execution(bits: str, wide: QSpec | None) -> None:
    quantizer = build(bits).rules[-1].act.quantizer  # type: ignore[union-attr]
    act = QSpec(bits=int(bits[5]), quantizer=quantizer)
    rules = build(bits).with_rules(
        Rule(op="softmax", act=act, wide=QSpec(bits=16), nonlinear="polynomial"),
        Rule(op="gelu", act=act, wide=wide, nonlinear="polynomial"),
    )
    model = livelier(tiny("bert"))
    qat = prepare_qat(model, rules)
    calibrate(qat, [for_model(model, batch(rows=6, seed=s)) for s in range(3)])
    qat.eval()
    numpy, torch_ = convert(qat), convert(qat, backend="torch")
    assert [n.args[2] for n in named(numpy.gm, "int_softmax")] == [None, None]
    assert len(named(numpy.gm, "int_gelu")) == 2
    given = for_model(model, batch(rows=4, length=9, seed=5))
    assert torch.equal(numpy(**given).logits, torch_(**given).logits)
    seen = compare(qat, numpy, given)
    assert max(s.max_steps for s in seen.sites.values()) <= 1


@pytest.mark.parametrize("family", [*WHOLE, "mobilebert", "mpnet", "deberta-v2"])
def test_padding_changes_nothing_for_the_tokens_that_are_there(family: str) -> None:
    """The states of the bare encoder, token by token, and what comes out of a whole classifier."""
    for head, output in (("Model", "last_hidden_state"), ("ForSequenceClassification", "logits")):
        model = convert(calibrated("W8E8A8-int", family, head))
        short = for_model(tiny(family, head), batch(rows=1, length=6, seed=3))
        padded = {k: torch.nn.functional.pad(v, (0, 7)) for k, v in short.items()}
        wanted, found = model(**short)[output], model(**padded)[output]
        assert torch.equal(wanted, found[:, : wanted.shape[1]])


def test_a_row_without_any_key_is_defined() -> None:
    model = convert(calibrated("W8E8A8-int"))
    given = batch(rows=2, length=5)
    given["attention_mask"][1] = 0
    out = model(**given).logits
    assert bool(torch.isfinite(out).all())
    assert torch.equal(out[:1], model(**{k: v[:1] for k, v in given.items()}).logits)


def test_training_reaches_every_parameter_through_the_integer_forms() -> None:
    model = livelier(tiny("bert"))
    qat = prepare_qat(model, "W8E8A8-int").train()
    data = for_model(model, batch(rows=6))
    calibrate(qat, [data])
    qat(**data).logits.square().sum().backward()
    still = [n for n, p in qat.named_parameters() if p.grad is None]
    assert still == []


class Sentence(nn.Module):
    """A bare encoder with the mean over its tokens behind it, as sentence encoders pool."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = livelier(tiny("bert", "Model"))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        kept = attention_mask.unsqueeze(-1).to(states.dtype)
        return (states * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1e-9)  # type: ignore[no-any-return]


def test_a_sentence_vector_is_pooled_in_integers() -> None:
    model = Sentence().eval()
    data = [{k: v for k, v in batch(rows=4, length=n, seed=n).items() if k != "token_type_ids"} for n in (5, 9, 12)]
    qat = prepare_qat(model, "W8E8A8-int", example=data[0])
    calibrate(qat, data)
    qat.eval()
    own = convert(qat)
    assert own.gm.meta["islands"] == ()
    assert len(named(own.gm, "int_mean")) == 1
    wanted, found = model(**data[1]), own(**data[1])
    cosine = torch.nn.functional.cosine_similarity(wanted, found, dim=-1)
    assert bool((cosine > 0.95).all())
    assert torch.equal(found, convert(qat, backend="torch")(**data[1]))
    assert max(s.max_steps for s in compare(qat, own, data).sites.values()) <= 1


class Pooled(Sentence):
    """Weights that are no 0 and 1, and a count that is held above more than one token."""

    def __init__(self, floor: float, positions: bool) -> None:
        super().__init__()
        self.floor, self.positions = floor, positions

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask * torch.arange(1, attention_mask.shape[1] + 1) if self.positions else attention_mask
        kept = weights.unsqueeze(-1).to(states.dtype)
        return (states * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=self.floor)  # type: ignore[no-any-return]


@pytest.mark.parametrize("floor, positions", [(1e-9, True), (20.0, False)])
def test_other_weighted_sums_are_no_masked_mean(floor: float, positions: bool) -> None:
    example = {k: v for k, v in batch(rows=4, length=7).items() if k != "token_type_ids"}
    qat = prepare_qat(Pooled(floor, positions).eval(), "W8E8A8-int", example=example)
    assert not named(qat.gm, "masked_mean")


def test_an_autocast_around_the_integers_changes_nothing() -> None:
    model = convert(calibrated("W8E8A8-int"), backend="torch")
    given = batch(rows=3, length=9)
    wanted = model(**given).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(**given).logits
    assert torch.equal(wanted, found)


def test_a_mask_of_numbers_is_refused_before_it_spoils_a_grid() -> None:
    model = livelier(tiny("bert"))
    ids = batch(rows=2, length=6)["input_ids"]
    ready = torch.zeros(2, 1, 6, 6)
    with pytest.raises(ConfigError, match="comes in as numbers to add"):
        prepare_qat(model, "W8E8A8-int", example={"input_ids": ids, "attention_mask": ready})


@pytest.mark.parametrize("preset", ["W8E8A8", "W4E4A8-int", "W2E2A8-lsq-int"])
def test_a_product_reads_the_rows_of_a_table_as_they_are(preset: str) -> None:
    class Looked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.out = nn.Embedding(20, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, 3)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.head(torch.tanh(self.out(self.words(input_ids))))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    given = {"input_ids": torch.randint(0, 20, (4, 5))}
    qat = prepare_qat(Looked(), preset, example=given)
    calibrate(qat, [given])
    own = convert(qat.eval())
    seen = compare(qat, own, given)
    assert seen.unmatched == () and max((s.max_steps for s in seen.sites.values()), default=0) <= 1
    assert torch.allclose(own(**given), qat(**given), atol=1e-5)
