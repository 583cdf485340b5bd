"""What gets quantized and how: QSpec, Rule, QConfig; JSON. Presets by name live in presets.py."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, cast

from kdlsq_fx.errors import ConfigError
from kdlsq_fx.globs import name_matches, site_matches, stars_within

DEFAULT_QUANTIZER = "kdlsq"
QUANTIZER_NAMES = ("kdlsq", "lsq", "lsq+", "minmax", "ema", "twn")
INIT_NAMES = ("", "mean", "quantile", "mse", "minmax")
NONLINEAR_NAMES = ("", "table", "polynomial")
PLACEMENTS = ("kdlsq", "integer")
HEADS = ("float", "quantized")
WIDE_BITS = (16, 22, 32)
SPECS = ("weight", "act", "wide")  # the operand kinds a rule names
FORMAT = 1
_TWO_SIDED = ("lsq", "lsq+")  # the LSQ papers use all 2**b codes; the others are symmetric around zero


@dataclass(frozen=True, kw_only=True)
class QSpec:
    """How one value is quantized: ``real = (q - zp) * scale`` with integer ``qmin <= q <= qmax``.

    ``bits``       2 to 8; 16, 22 and 32 only for the wide operands of the integer placement.
    ``signed``     None: by the value's kind (probabilities unsigned, all else signed); see :meth:`for_kind`.
    ``axis``       None: one scale per tensor; 0: one per output channel of a weight or per row of a table.
    ``quantizer``  a name of lsq.QUANTIZERS; "": that of the rules behind this one (:meth:`QConfig.find`), else kdlsq.
    ``init``       where the first scale comes from: mean, quantile, mse, minmax; "": that of an inherited quantizer,
                   else the quantizer's default.

    ``qmin, qmax``: lsq and lsq+ signed ``-2**(b-1) .. 2**(b-1)-1`` (LSQ, arXiv 1902.08153); all others signed
    ``+-(2**(b-1)-1)``, so ternary at 2 bits (KDLSQ's released code); unsigned always ``0 .. 2**b-1``.
    Raises ConfigError for anything outside these.
    """

    bits: int
    signed: bool | None = None
    axis: int | None = None
    quantizer: str = ""
    init: str = ""

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not (2 <= self.bits <= 8 or self.bits in WIDE_BITS):
            raise ConfigError(f"bits={self.bits!r} is not possible", do="use a whole number from 2 to 8")
        if not (self.signed is None or type(self.signed) is bool):
            raise ConfigError(f"signed={self.signed!r} is not possible", do="use true, false or null (by value kind)")
        if not (self.axis is None or (type(self.axis) is int and self.axis == 0)):
            raise ConfigError(f"axis={self.axis!r} is not possible", do="use null (per tensor) or 0 (per channel, row)")
        _one_of("quantizer", self.quantizer, ("", *QUANTIZER_NAMES))
        _one_of("init", self.init, INIT_NAMES)
        if self.quantizer == "twn" and (self.bits != 2 or self.signed is False):
            raise ConfigError(f"quantizer 'twn' is ternary, got bits={self.bits}, signed={self.signed}",
                              do="use bits=2 and signed=null, or quantizer 'ema' for more bits")  # fmt: skip

    @property
    def qmax(self) -> int:
        return 2**self.bits - 1 if self.signed is False else 2 ** (self.bits - 1) - 1

    @property
    def qmin(self) -> int:
        if self.signed is False:
            return 0
        return -self.qmax - 1 if self.quantizer in _TWO_SIDED else -self.qmax

    def for_kind(self, kind: str) -> QSpec:
        """The spec with nothing open: ``"prob"`` (in [0, 1]) is unsigned, every other kind signed; kdlsq quantizes."""
        signed = self.signed if self.signed is not None else kind != "prob"
        return replace(self, signed=signed, quantizer=self.quantizer or DEFAULT_QUANTIZER)

    def inheriting(self, others: Iterable[QSpec | None]) -> QSpec:
        """With the quantizer, and its init, of the first of these that has one; bits, signs and axis are its own.

        ConfigError where that quantizer cannot have so many bits (twn is ternary)."""
        known = next((o for o in others if o is not None and o.quantizer), None)
        if self.quantizer or known is None:
            return self
        return replace(self, quantizer=known.quantizer, init=self.init or known.init)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Which sites (key: ``site`` glob and ``op`` name, ``*`` allowed) get which QSpec (None: that operand is float).

    ``weight, act, wide``  by operand kind of the op's signature; ``act`` serves ``act`` and ``prob`` operands.
    ``nonlinear``          how to lower a non-linear op: "", "table", "polynomial".
    ``why``                the reason printed in the table of sites.
    ``optional``           True: the rule may match nothing (presets serve many architectures).
    """

    site: str = "**"
    op: str = "*"
    weight: QSpec | None = None
    act: QSpec | None = None
    wide: QSpec | None = None
    nonlinear: str = ""
    why: str = ""
    optional: bool = False

    def __post_init__(self) -> None:
        for key in ("site", "op", "nonlinear", "why"):
            if not isinstance(getattr(self, key), str):
                raise ConfigError(f"rule: {key}={getattr(self, key)!r} is not a string", do=f"give {key} as text")
        for key in SPECS:
            if not isinstance(getattr(self, key), QSpec | None):
                raise ConfigError(
                    f"rule: {key}={getattr(self, key)!r} is not a QSpec", do="use QSpec(bits=...) or None"
                )
        most = {"weight": 8, "act": 32 if self.nonlinear == "polynomial" else 8}  # a polynomial reads an accumulator
        for key, bits in most.items():
            spec = getattr(self, key)
            if spec is not None and spec.bits not in range(2, bits + 1):
                do = "use 2 to 8; more are for wide operands and what a polynomial reads"
                raise ConfigError(f"rule: {key} has {spec.bits} bits", do=do)
        if type(self.optional) is not bool:
            raise ConfigError(f"rule: optional={self.optional!r} is not true or false", do="use true or false")
        for key in ("site", "op"):
            if not getattr(self, key):
                raise ConfigError(f"rule: {key} is empty", do="use '**' for every site, '*' for every op")
        _one_of("nonlinear", self.nonlinear, NONLINEAR_NAMES)

    def matches(self, site: str, op: str) -> bool:
        """True where both globs fit; see :func:`site_matches`."""
        return name_matches(self.op, op) and site_matches(self.site, site)

    match = matches

    def spec(self, kind: str) -> QSpec | None:
        """The QSpec for an operand of this kind (``weight act prob wide``), nothing open in it; None: float."""
        field = {"weight": self.weight, "act": self.act, "prob": self.act, "wide": self.wide}.get(kind)
        return field.for_kind(kind) if field else None

    def inheriting(self, behind: Sequence[Rule]) -> Rule:
        """With quantizers for the specs that name none: of the first of these rules that names one for the operand."""
        own = {key: getattr(self, key) for key in SPECS}
        specs = {k: spec and spec.inheriting(getattr(r, k) for r in behind) for k, spec in own.items()}
        return replace(self, **specs)

    @property
    def is_open(self) -> bool:
        """True where a spec names no quantizer."""
        return any(spec is not None and not spec.quantizer for spec in (self.weight, self.act, self.wide))

    @property
    def is_float(self) -> bool:
        return self.weight is None and self.act is None and self.wide is None


@dataclass(frozen=True, kw_only=True)
class QConfig:
    """Rules (first match wins), where quantizers stand, and what happens to heads.

    ``placement``  "kdlsq": operands of matrix products and embedding tables (papers 1.2); "integer": every value.
    ``heads``      "float": the last linear of a classifier or QA head keeps its floats; "quantized": as any other.
    ``left_out``   encoder blocks, counted from 0, that are taken out before anything is quantized.
    """

    rules: tuple[Rule, ...]
    placement: Literal["kdlsq", "integer"] = "kdlsq"
    heads: Literal["float", "quantized"] = "float"
    name: str = ""
    left_out: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))
        if not isinstance(self.left_out, (tuple, list)) or any(type(b) is not int or b < 0 for b in self.left_out):
            raise ConfigError(f"left_out={self.left_out!r} names no blocks", do="list block numbers, from 0: [3, 5]")
        object.__setattr__(self, "left_out", tuple(sorted(set(self.left_out))))
        bad = [r for r in self.rules if not isinstance(r, Rule)]
        if bad:
            raise ConfigError(f"{bad[0]!r} is not a Rule", do="build a qconfig from Rule(site=..., op=..., ...)")
        if not isinstance(self.name, str):
            raise ConfigError(f"name={self.name!r} is not a string")
        _one_of("placement", self.placement, PLACEMENTS)
        _one_of("heads", self.heads, HEADS)
        chosen = next((r for r in self.rules if r.nonlinear and self.placement == "kdlsq"), None)
        if chosen is not None:
            what = f"rule (site={chosen.site!r}, op={chosen.op!r}) asks for nonlinear={chosen.nonlinear!r}"
            raise ConfigError(what + ", and nothing non-linear is integer here", do='use placement="integer"')

    def find(self, site: str, op: str) -> Rule | None:
        """The first rule that fits this site and op name; None: nothing is quantized there.

        Where one of its specs names no quantizer, it has that of the next rule behind it that fits here and names one
        for this operand, else of the next that names one for it anywhere: a preset's quantizer goes on to the rules in
        front of it. ConfigError where that quantizer cannot have so many bits.
        """
        winner = self._winner(site, op)
        if winner is None or not winner.is_open:
            return winner
        behind = self.rules[self.rules.index(winner) + 1 :]
        try:
            return winner.inheriting([*(r for r in behind if r.matches(site, op)), *behind])
        except ConfigError as error:
            raise error.at(site) from None

    def _winner(self, site: str, op: str) -> Rule | None:
        return next((rule for rule in self.rules if rule.matches(site, op)), None)

    def with_rules(self, *rules: Rule) -> QConfig:
        """The same config with these rules in front, so that they win."""
        return replace(self, rules=(*rules, *self.rules), name=self.name if not rules else f"{self.name}+rules")

    def idle(self, sites: Iterable[tuple[str, str]]) -> dict[Rule, Rule | None]:
        """Rules, but for optional ones, that decide none of these (site, op name) pairs: each with the rule in front
        of it that took the first pair it fits, or None where it fits none."""
        pairs = list(sites)
        winners = {pair: self._winner(*pair) for pair in pairs}
        idle: dict[Rule, Rule | None] = {}
        for index, rule in enumerate(self.rules):
            fits = [pair for pair in pairs if rule.matches(*pair)]
            twice = rule in self.rules[:index]
            if not rule.optional and (twice or not any(winners[pair] == rule for pair in fits)):
                idle[rule] = winners[fits[0]] if fits else None
        return idle

    def check_matches(self, sites: Iterable[tuple[str, str]]) -> None:
        """ConfigError for the first rule that decides nothing: it names the rule in front of it, or lists the sites
        nearest to its glob."""
        pairs = list(sites)
        for rule, winner in self.idle(pairs).items():
            if winner is not None:
                raise ConfigError(
                    f"rule (site={rule.site!r}, op={rule.op!r}) never wins: (site={winner.site!r}, op={winner.op!r}) "
                    "stands in front of it",
                    do="put the narrower rule first, or drop one of them",
                )
            same_op = [s for s, op in pairs if name_matches(rule.op, op)]
            names = same_op or [s for s, _ in pairs]
            near = get_close_matches(rule.site, names, n=5, cutoff=0.3) or names[:5]
            what = f"rule (site={rule.site!r}, op={rule.op!r}) matches nothing"
            if not same_op:
                what += f"; no op {rule.op!r} here, ops are {sorted({op for _, op in pairs})}"
            part = stars_within(rule.site)
            hint = f"** stands for whole components: **.{part.replace('**', '')} in place of {part}; " if part else ""
            raise ConfigError(what, do=f"{hint}correct the rule or drop it; sites near it: " + ", ".join(near))

    def to_dict(self) -> dict[str, Any]:
        known = {**asdict(self), "left_out": list(self.left_out), "rules": [asdict(r) for r in self.rules]}
        return {"format": FORMAT, **known}

    def to_json(self, indent: int | None = 1) -> str:
        """Text that :meth:`from_json` turns back into an equal QConfig."""
        return json.dumps(self.to_dict(), indent=indent)

    @classmethod
    def from_dict(cls, data: Any) -> QConfig:
        """ConfigError names the first unknown key or wrong type and lists what is allowed."""
        values = _checked(data, cls, "qconfig", extra=("format",))
        if values.pop("format", FORMAT) != FORMAT:
            raise ConfigError(
                f"qconfig: format {data['format']!r} is unknown", do=f"this version reads format {FORMAT}"
            )
        rules = values.pop("rules", None)
        if not isinstance(rules, list):
            raise ConfigError("qconfig: 'rules' must be a list of objects", do='write {"rules": [{...}, ...]}')
        return cls(rules=tuple(_rule_from(r, f"rules[{i}]") for i, r in enumerate(rules)), **values)

    @classmethod
    def from_json(cls, text: str) -> QConfig:
        try:
            data = json.loads(text)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"qconfig is not JSON: {error}", do="write it with QConfig.to_json()") from error
        return cls.from_dict(data)


def _rule_from(data: Any, where: str) -> Rule:
    values = _checked(data, Rule, where)
    for key in SPECS:
        if values.get(key) is not None:
            spec = _checked(values[key], QSpec, f"{where}.{key}")
            if "bits" not in spec:
                raise ConfigError("'bits' is missing", where=f"{where}.{key}", do='add "bits": 2 to 8')
            values[key] = _located(QSpec, spec, f"{where}.{key}")
    return cast(Rule, _located(Rule, values, where))


def _located(cls: type, values: dict[str, Any], where: str) -> Any:
    try:
        return cls(**values)
    except ConfigError as error:
        raise error.at(where) from None


def _checked(data: Any, cls: type, where: str, *, extra: Sequence[str] = ()) -> dict[str, Any]:
    """A copy of a JSON object whose keys are all fields of ``cls``."""
    allowed = [f.name for f in fields(cls)] + list(extra)
    if not isinstance(data, Mapping):
        raise ConfigError(f"expected an object with the keys {allowed}, got {data!r:.80}", where=where)
    for key in data:
        if key not in allowed:
            near = get_close_matches(str(key), allowed, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(f"unknown key {key!r}", where=where, do=f"{hint}allowed keys: {', '.join(allowed)}")
    return dict(data)


def _one_of(key: str, value: Any, allowed: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in allowed:
        near = get_close_matches(str(value), [a for a in allowed if a], n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        names = ", ".join(repr(a) for a in allowed)
        raise ConfigError(f"{key}={value!r} is unknown", do=f"{hint}allowed: {names}")


def preset(name: str) -> QConfig:
    """The rules of a preset such as ``"W2E2A8"``; see presets.py for the names."""
    from kdlsq_fx.presets import build

    return build(name)


def resolve(qconfig: str | Path | QConfig | Rule | Sequence[Rule]) -> QConfig:
    """A QConfig from a preset's name, a path to a JSON file, rules, or a QConfig (returned as it is). ConfigError for
    what is none of these, and for no rules, unless it is a QConfig that says so."""
    found = _resolve(qconfig)
    if not found.rules and found is not qconfig:
        do = "give a preset's name or rules; capture(model) is for the float graph"
        where = str(qconfig) if isinstance(qconfig, (str, Path)) else "qconfig"
        raise ConfigError("no rules: nothing would be quantized", where=where, do=do)
    return found


def _resolve(qconfig: str | Path | QConfig | Rule | Sequence[Rule]) -> QConfig:
    if isinstance(qconfig, QConfig):
        return qconfig
    if isinstance(qconfig, Rule):
        return QConfig(rules=(qconfig,), name="rules")
    if isinstance(qconfig, Path) or (isinstance(qconfig, str) and qconfig.endswith(".json")):
        try:
            text = Path(qconfig).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the qconfig file {str(qconfig)!r}: {error}", do="check the path") from error
        try:
            return QConfig.from_json(text)
        except ConfigError as error:
            raise error.at(f"{qconfig}: {error.where}" if error.where else str(qconfig)) from None
    if isinstance(qconfig, str):
        return preset(qconfig)
    if isinstance(qconfig, (tuple, list)):
        return QConfig(rules=tuple(qconfig), name="rules")
    raise ConfigError(
        f"{qconfig!r:.80} is no qconfig", do="give a preset's name, a tuple of Rules, a QConfig or a path"
    )
