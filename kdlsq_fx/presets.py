"""Presets by name: W<bits>E<bits>A<bits> (weights, embeddings, activations), then a quantizer, then a placement."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches

from kdlsq_fx.errors import ConfigError
from kdlsq_fx.qconfig import QConfig, QSpec, Rule

_FORM = re.compile(r"W([2-8])E([2-8])A([2-8])((?:-[a-z]+\+?)*)")
_QUANTIZERS = ("kdlsq", "lsq", "lsq+", "minmax", "ema", "twn")
_EXAMPLES = "W2E2A8, W4E4A8, W8E8A8, W2E2A8-lsq, W4E4A8-lsq+, W8E8A8-int, W4E4A8-lsq-int, W8E8A8-minmax, W8E8A8-ema"


@dataclass(frozen=True)
class _Choice:
    """The specs a preset's name asks for: linear weights, tables, activations."""

    weight: QSpec
    table: QSpec
    act: QSpec
    quantizer: str


def build(name: str) -> QConfig:
    """The QConfig of a preset.

    ``W2E2A8``       bits of linear weights, embedding tables, activations, each 2 to 8; KDLSQ's learned clip.
    ``-lsq  -lsq+``  LSQ's learned step with all 2**b codes; LSQ+ adds a learned offset to the activations.
    ``-minmax -ema -twn``  baselines: PTQ from maxima; Q8BERT; TernaryBERT (rows of the table ternary, position
    table float, other widths by max-abs, as its released code does; its activations by Q8BERT's running maximum).
    ``-int``         integer placement: every value is quantized, not only what enters a matrix product.
    All scales are per tensor, as in the papers; a rule with ``axis=0`` in front changes that.
    Raises ConfigError for any other name.
    """
    match = _FORM.fullmatch(name) if isinstance(name, str) else None
    suffixes = match[4].split("-")[1:] if match else []
    known = (*_QUANTIZERS, "int")
    if match is None or any(s not in known for s in suffixes) or len(set(suffixes)) != len(suffixes):
        raise _unknown(name, [s for s in suffixes if s not in known])
    quantizers = [s for s in suffixes if s != "int"]
    if len(quantizers) > 1:
        raise ConfigError(f"preset {name!r} names {len(quantizers)} quantizers: {quantizers}", do="keep one of them")
    choice = _choose(name, *(int(d) for d in match.groups()[:3]), quantizer=quantizers[0] if quantizers else "kdlsq")
    if "int" in suffixes:
        return QConfig(rules=_integer(choice), placement="integer", heads="quantized", name=name)
    return QConfig(rules=_kdlsq(choice), placement="kdlsq", heads="float", name=name)


def _unknown(name: object, suffixes: list[str]) -> ConfigError:
    near = get_close_matches(str(name).split(" ", maxsplit=1)[0], _EXAMPLES.split(", "), n=1)
    what = f"unknown preset {name!r}" + (f": no suffix {suffixes[0]!r}" if suffixes else "")
    form = "the form is W<2-8>E<2-8>A<2-8>, then at most one of -lsq -lsq+ -minmax -ema -twn, then -int if wanted"
    return ConfigError(what, do=f"{f'did you mean {near[0]!r}? ' if near else ''}{form}; for example {_EXAMPLES}")


def _choose(name: str, w: int, e: int, a: int, *, quantizer: str) -> _Choice:
    if quantizer != "twn":
        weight, table, act = (QSpec(bits=b, quantizer=quantizer) for b in (w, e, a))
        return _Choice(weight, table, act, quantizer)
    if 2 not in (w, e):
        raise ConfigError(f"preset {name!r}: twn is ternary, yet neither W nor E is 2", do="use W2E2A8-twn or -ema")
    weight = QSpec(bits=w, quantizer="twn" if w == 2 else "ema")
    table = QSpec(bits=e, quantizer="twn" if e == 2 else "ema", axis=0)
    return _Choice(weight, table, QSpec(bits=a, quantizer="ema"), quantizer)


def _rule(
    site: str, op: str, why: str, *, weight: QSpec | None = None, act: QSpec | None = None, wide: QSpec | None = None
) -> Rule:
    return Rule(site=site, op=op, why=why, optional=True, weight=weight, act=act, wide=wide)


def _tables(choice: _Choice, *, all_tables: bool) -> list[Rule]:
    rules = []
    if not all_tables:
        rules += [
            _rule("**.token_type_embeddings/*", "embedding", "float: the papers leave token types alone (2 rows)"),
            _rule(
                "**.relative_attention_bias/*", "embedding", "float: a bias on the scores, not an operand of a product"
            ),
        ]
        if choice.quantizer == "twn":
            why = "float: TernaryBERT leaves positions alone"
            rules.append(_rule("**.position_embeddings/*", "embedding", why))
    return [*rules, _rule("**", "embedding", "table at E bits", weight=choice.table)]


def _products(choice: _Choice) -> list[Rule]:
    rules = [
        _rule("**", op, "weight at W bits, what enters at A bits", weight=choice.weight, act=choice.act)
        for op in ("linear", "conv1d")
    ]
    both = "both operands of the product at A bits (Q, K; P, V)"
    return rules + [_rule("**", op, both, act=choice.act) for op in ("matmul", "bmm")]


def _kdlsq(choice: _Choice) -> tuple[Rule, ...]:
    """Papers 1.2: operands of matrix products and the word and position tables; all else stays float."""
    return (*_tables(choice, all_tables=False), *_products(choice))


def _integer(choice: _Choice) -> tuple[Rule, ...]:
    """Every value. Sums keep 16 bits in the embeddings and 22 before a LayerNorm, as I-BERT (papers 4.7) does."""
    signed = {"signed": True, "quantizer": choice.act.quantizer}
    sum16, norm22 = QSpec(bits=16, **signed), QSpec(bits=22, **signed)  # type: ignore[arg-type]
    rules = [
        *_tables(choice, all_tables=True),
        *_products(choice),
        _rule("**.embeddings.**", "add", "sum of embeddings: 16 bits, rounded once", act=choice.act, wide=sum16),
        _rule("**", "add", "residual sum: 22 bits, rounded once", act=choice.act, wide=norm22),
        _rule("**", "layer_norm", "22 bits enter, A bits leave", act=choice.act, wide=norm22),
        _rule("**", "softmax", "accumulators (sums: 16 bits) enter, A unsigned bits leave", act=choice.act, wide=sum16),
    ]
    pointwise = ("gelu", "tanh", "relu", "silu", "sigmoid", "mul", "div", "sub", "mean")
    return (*rules, *(_rule("**", op, "A bits in and out", act=choice.act) for op in pointwise))
