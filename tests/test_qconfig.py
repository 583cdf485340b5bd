"""QSpec, Rule, QConfig, globs, presets, JSON, and what is refused."""

from __future__ import annotations

import itertools
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlsq_fx.errors import ConfigError
from kdlsq_fx.globs import site_matches
from kdlsq_fx.qconfig import INIT_NAMES, NONLINEAR_NAMES, QConfig, QSpec, Rule, preset, resolve

LAYER = "bert.encoder.layer.3"
SITES = [
    ("bert.embeddings.word_embeddings/embedding", "embedding"),
    ("bert.embeddings.position_embeddings/embedding", "embedding"),
    ("bert.embeddings.token_type_embeddings/embedding", "embedding"),
    ("bert.embeddings/add", "add"),
    (f"{LAYER}.attention.self.query/linear", "linear"),
    (f"{LAYER}.attention.self/matmul", "matmul"),
    (f"{LAYER}.attention.self/matmul:1", "matmul"),
    (f"{LAYER}.output/add", "add"),
    (f"{LAYER}.intermediate/gelu", "gelu"),
    (f"{LAYER}.output.LayerNorm/layer_norm", "layer_norm"),
]


def test_ranges():
    for b in range(2, 9):
        lsq, narrow = QSpec(bits=b, quantizer="lsq"), QSpec(bits=b)
        assert (lsq.qmin, lsq.qmax) == (-(2 ** (b - 1)), 2 ** (b - 1) - 1)
        assert (narrow.qmin, narrow.qmax) == (-(2 ** (b - 1)) + 1, 2 ** (b - 1) - 1)
        for spec in (lsq, narrow):
            prob = spec.for_kind("prob")
            assert (prob.qmin, prob.qmax, prob.signed) == (0, 2**b - 1, False)
            assert spec.for_kind("act").signed is True
    assert QSpec(bits=8, signed=True).for_kind("prob").signed is True
    assert QSpec(bits=22).qmax == 2**21 - 1


@pytest.mark.parametrize("bits", [0, 1, 9, -4, 12, 64, "4", 4.0, True, None, [4]])
def test_impossible_bits_say_what_is_possible(bits):
    with pytest.raises(ConfigError, match="2 to 8"):
        QSpec(bits=bits)


@pytest.mark.parametrize(
    "keys",
    [
        {"signed": 1},
        {"axis": 1},
        {"axis": True},
        {"axis": "0"},
        {"quantizer": "kdslq"},
        {"quantizer": None},
        {"init": "means"},
        {"quantizer": "twn"},
    ],
)
def test_impossible_specs(keys):
    with pytest.raises(ConfigError):
        QSpec(**{"bits": 8, **keys})


@pytest.mark.parametrize(
    "keys",
    [
        {"site": ""},
        {"op": ""},
        {"site": 3},
        {"weight": 8},
        {"act": "A8"},
        {"nonlinear": "poly"},
        {"optional": 1},
        {"why": None},
    ],
)
def test_impossible_rules(keys):
    with pytest.raises(ConfigError):
        Rule(**keys)


@pytest.mark.parametrize(
    ("glob", "site", "fits"),
    [
        ("**", "a.b/linear", True),
        ("**/linear", "linear", True),
        ("**.layer.0.**", f"{LAYER}/add", False),
        ("**.layer.3.**", f"{LAYER}/add", True),
        ("bert.*.layer.*.output/add", f"{LAYER}.output/add", True),
        ("bert.*/add", f"{LAYER}.output/add", False),  # * stays inside a component
        ("*", "a/b", False),
        ("a.**.b/c", "a.b/c", True),
        ("a.**.b/c", "a.x.y.b/c", True),
        ("a/b", "aXb", False),
        ("**/matmul", "x/matmul:1", False),
        ("**/matmul*", "x/matmul:1", True),
        ("layer.?/add", "layer.1/add", True),
        ("layer.?/add", "layer.12/add", False),
        ("a.(b/c", "a.(b/c", True),  # no regular expressions
        ("a.b+/c", "a.bb/c", False),
    ],
)
def test_globs(glob, site, fits):
    assert site_matches(glob, site) is fits


def test_no_rules_are_an_error_where_no_qconfig_says_so(tmp_path):
    nothing = QConfig(rules=(), left_out=(0,))
    (tmp_path / "none.json").write_text(nothing.to_json())
    for empty in ([], (), tmp_path / "none.json"):
        with pytest.raises(ConfigError, match="no rules"):
            resolve(empty)
    assert resolve(nothing) is nothing


def test_first_match_wins_and_own_rules_go_in_front():
    base = preset("W2E2A8")
    own = Rule(site="**.layer.0.**", op="linear", weight=QSpec(bits=8), act=QSpec(bits=8))
    for config in (base.with_rules(own), resolve((own, *base.rules))):
        won = config.find("bert.encoder.layer.0.output.dense/linear", "linear")
        assert won.site == own.site and won.weight == won.act == QSpec(bits=8, quantizer="kdlsq")
        found = config.find(f"{LAYER}.output.dense/linear", "linear")
        assert found.spec("weight").bits == 2 and found.spec("act").bits == 8 and found.spec("bias") is None
    assert base.find("x/dropout", "dropout") is None
    assert base.find(*SITES[5]).spec("prob").signed is False


@pytest.mark.parametrize("digits", list(itertools.product(range(2, 9), repeat=3))[::5] + [(2, 2, 8), (8, 8, 8)])
@pytest.mark.parametrize("suffix", ["", "-lsq", "-lsq+", "-minmax", "-ema", "-int", "-lsq-int", "-int-lsq+"])
def test_presets_name_bits_quantizer_and_placement(digits, suffix):
    w, e, a = digits
    config = preset(f"W{w}E{e}A{a}{suffix}")
    names = [s for s in suffix.split("-") if s not in ("", "int")]
    kind = names[0] if names else "kdlsq"
    integer = "int" in suffix
    assert config.placement == ("integer" if integer else "kdlsq")
    assert config.heads == ("quantized" if integer else "float")
    linear, table = config.find(*SITES[4]), config.find(*SITES[0])
    assert (linear.spec("weight").bits, linear.spec("act").bits, table.spec("weight").bits) == (w, a, e)
    assert {s.quantizer for s in (linear.weight, linear.act, table.weight)} == {kind}
    assert (config.find(*SITES[2]).is_float) is not integer
    assert config.idle([]) == {} and QConfig.from_json(config.to_json()) == config
    assert all(rule.why for rule in config.rules)


def test_the_papers_placement():
    config = preset("W2E2A8")
    quantized = [op for site, op in SITES if (rule := config.find(site, op)) is not None and not rule.is_float]
    assert quantized == ["embedding", "embedding", "linear", "matmul", "matmul"]
    assert config.find("deberta.relative_attention_bias/embedding", "embedding").is_float


def test_the_integer_placement_covers_every_value_and_keeps_sums_wide():
    config = preset("W8E8A8-int")
    assert all(not config.find(site, op).is_float for site, op in SITES)
    assert config.find(*SITES[3]).spec("wide").bits == 16
    assert config.find(*SITES[7]).spec("wide").bits == 22
    assert config.find(*SITES[9]).spec("wide").bits == 22


def test_ternarybert():
    config = preset("W2E2A8-twn")
    assert config.find(*SITES[0]).weight == QSpec(bits=2, axis=0, quantizer="twn")
    assert config.find(*SITES[1]).is_float
    assert config.find(*SITES[4]).weight == QSpec(bits=2, quantizer="twn")
    assert preset("W8E2A8-twn").find(*SITES[4]).weight == QSpec(bits=8, quantizer="ema")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "W2E2",
        "W1E2A8",
        "W2E9A8",
        "w2e2a8",
        "W2E2A8-",
        "W2E2A8-foo",
        "W2E2A8-int-int",
        "W2E2A8-lsq-ema",
        "W4E4A8-twn",
        "int8",
    ],
)
def test_unknown_presets_show_the_form(name):
    with pytest.raises(ConfigError) as caught:
        preset(name)
    assert repr(name) in str(caught.value) and "W" in str(caught.value).partition("->")[2] + "W" * ("lsq-ema" in name)


def test_resolve(tmp_path):
    config = preset("W4E4A8-lsq")
    path = tmp_path / "q.json"
    path.write_text(config.to_json())
    assert resolve(config) is config and resolve("W4E4A8-lsq") == config
    assert resolve(path) == resolve(str(path)) == config
    rule = Rule(weight=QSpec(bits=8))
    assert resolve(rule).rules == resolve([rule]).rules == (rule,)
    for bad in (tmp_path / "none.json", 3, None, ["W2E2A8"], tmp_path):
        with pytest.raises(ConfigError):
            resolve(bad)


@pytest.mark.parametrize("text, place", [("{", ""), ('{"rules": [{"sit": "**"}]}', ": rules[0]")])
def test_a_fault_in_a_file_names_the_file(tmp_path, text, place):
    path = tmp_path / "q.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(f"[at {path}{place}]")):
        resolve(path)


def test_an_open_quantizer_is_that_of_the_rules_behind():
    wide = Rule(op="linear", weight=QSpec(bits=3, quantizer="lsq", init="mse"))
    own = Rule(op="linear", weight=QSpec(bits=8), act=QSpec(bits=8))
    config = QConfig(rules=(own, Rule(act=QSpec(bits=4, quantizer="ema")), wide))
    found = config.find(*SITES[4])
    assert found.weight == QSpec(bits=8, quantizer="lsq", init="mse") and found.act == QSpec(bits=8, quantizer="ema")
    assert QConfig.from_json(config.to_json()).find(*SITES[4]) == found
    alone = QConfig(rules=(own,)).find(*SITES[4])
    assert alone == own and alone.spec("weight") == QSpec(bits=8, signed=True, quantizer="kdlsq")
    ahead = QConfig(rules=(Rule(weight=QSpec(bits=3, quantizer="lsq")), own))  # what stands in front does not count
    assert ahead.rules[1].inheriting(()) == own and ahead.find(*SITES[4]).weight.bits == 3
    other = preset("W4E4A8-lsq").with_rules(Rule(op="mish", act=QSpec(bits=8)))
    assert other.find("x/mish", "mish").act.quantizer == "lsq"  # no rule of the preset fits there: what it has for act
    for site, op, quantizer in ((SITES[4][0], "linear", "ema"), (SITES[0][0], "embedding", "twn")):
        config = preset("W8E2A8-twn").with_rules(Rule(op=op, weight=QSpec(bits=2)))
        assert config.find(site, op).weight == QSpec(bits=2, quantizer=quantizer)


specs = st.builds(
    QSpec,
    bits=st.integers(2, 8),
    signed=st.sampled_from([None, True, False]),
    axis=st.sampled_from([None, 0]),
    quantizer=st.sampled_from(["kdlsq", "lsq", "lsq+", "minmax", "ema"]),
    init=st.sampled_from(INIT_NAMES),
)
rules = st.builds(
    Rule,
    site=st.text(min_size=1),
    op=st.text(min_size=1),
    weight=st.none() | specs,
    act=st.none() | specs,
    wide=st.none() | specs,
    nonlinear=st.sampled_from(NONLINEAR_NAMES),
    why=st.text(),
    optional=st.booleans(),
)


@settings(max_examples=50, deadline=None)
@given(
    config=st.builds(
        QConfig,
        rules=st.lists(rules, max_size=4).map(tuple),
        placement=st.just("integer"),
        heads=st.sampled_from(["float", "quantized"]),
        name=st.text(),
    )
)
def test_json_gives_the_same_back(config):
    assert QConfig.from_json(config.to_json()) == config


def edited(change):
    data = json.loads(preset("W8E8A8").to_json())
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d.update(rule=[]), "unknown key 'rule'.*did you mean 'rules'"),
        (lambda d: d["rules"][0].update(sit="**"), "unknown key 'sit'.*rules.0.*did you mean 'site'"),
        (lambda d: d["rules"][2]["weight"].update(bit=3), "unknown key 'bit'.*weight.*allowed keys: bits"),
        (lambda d: d["rules"][2]["weight"].update(bits="4"), "bits='4'.*rules.2..weight.*2 to 8"),
        (lambda d: d["rules"][2]["weight"].pop("bits"), "'bits' is missing"),
        (lambda d: d["rules"][2].update(weight=8), "expected an object"),
        (lambda d: d["rules"][2].update(site=None), "site=None is not a string"),
        (lambda d: d.update(rules={}), "must be a list"),
        (lambda d: d.pop("rules"), "must be a list"),
        (lambda d: d.update(placement="all"), "placement='all'.*kdlsq.*integer"),
        (lambda d: d.update(heads=0), "heads=0"),
        (lambda d: d.update(name=None), "name=None"),
        (lambda d: d.update(format=2), "format 2"),
    ],
)
def test_json_errors_name_the_key(change, says):
    with pytest.raises(ConfigError, match="(?s)" + says):
        QConfig.from_json(edited(change))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7"])
def test_what_is_no_object_is_refused(text):
    with pytest.raises(ConfigError):
        QConfig.from_json(text)


def test_rules_without_match_list_the_sites_nearby():
    wrong = Rule(site="bert.encoder.layer.3.attention.self.qery/linear", op="linear", weight=QSpec(bits=8))
    config = preset("W2E2A8").with_rules(wrong)
    assert config.idle(SITES) == {wrong: None}
    with pytest.raises(ConfigError, match=r"self\.query/linear"):
        config.check_matches(SITES)
    with pytest.raises(ConfigError, match=r"\*\*\.query in place of \*\*query"):
        resolve(Rule(site="**query/linear", act=QSpec(bits=8))).check_matches(SITES)
    with pytest.raises(ConfigError, match="no op 'conv9d' here"):
        resolve(Rule(op="conv9d", act=QSpec(bits=8))).check_matches(SITES)
    preset("W2E2A8").check_matches([])  # a preset's rules may match nothing


def test_a_rule_that_never_wins_names_the_one_in_front():
    first, second = (
        Rule(site="bert.**", act=QSpec(bits=8)),
        Rule(op="linear", site="bert.encoder.**", weight=QSpec(bits=2)),
    )
    config = QConfig(rules=(first, second))
    assert config.idle(SITES) == {second: first}
    with pytest.raises(ConfigError, match=r"never wins: \(site='bert\.\*\*', op='\*'\) stands in front"):
        config.check_matches(SITES)
    QConfig(rules=(second, first)).check_matches(SITES)
    preset("W2E2A8").with_rules(Rule()).check_matches(SITES)  # a preset's own rules may lose everywhere
    with pytest.raises(ConfigError, match="never wins"):  # said twice
        QConfig(rules=(first, first)).check_matches(SITES)


def test_forms_of_the_integer_placement_are_refused_elsewhere():
    with pytest.raises(ConfigError, match="nothing non-linear is integer here"):
        preset("W8E8A8").with_rules(Rule(op="gelu", nonlinear="polynomial"))


@pytest.mark.parametrize("operand", ["weight", "act"])
def test_more_than_8_bits_are_for_wide_operands(operand):
    with pytest.raises(ConfigError, match=f"{operand} has 16 bits"):
        Rule(**{operand: QSpec(bits=16)})
    assert Rule(wide=QSpec(bits=16)).wide.bits == 16
