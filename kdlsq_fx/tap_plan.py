"""A tap plan: what a distillation compares between two networks, as data. Printed, saved, edited, loaded, drawn."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from .errors import CheckpointError, ConfigError
from .files import FORMAT, make_folder, read_json, write_json
from .layer_maps import layer_pairs
from .taps import Tap

TeacherInputs = Literal["shared", "own"]
OUTPUTS = ("start_logits", "end_logits", "logits")  # what a plan may compare of a model's outputs
PREFIX = "teacher_"  # of the teacher's own inputs in a batch: teacher_input_ids and so on


@dataclass(frozen=True, kw_only=True)
class Side:
    """What a plan knows of one network. ``hidden[i]`` is the site of layer ``first + i`` (layer 0 enters the first
    block, layer l leaves the l-th), ``attention`` the pre-softmax sites, each with the block that it stands in, counted
    from 1; 0 where nothing is known."""

    name: str = ""
    hidden: tuple[str, ...] = ()
    attention: Mapping[str, int] = field(default_factory=dict)
    first: int = 0
    width: int = 0
    heads: int = 0
    vocabulary: int = 0

    def __post_init__(self) -> None:
        for site, block in self.attention.items():
            if type(block) is not int or block < 1:
                raise ConfigError(f"attention in block {block!r}", where=site, do="count blocks from 1")

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return self.first + len(self.hidden) - 1 if self.hidden else max(self.attention.values(), default=0)

    def layer_of(self, site: str) -> int | None:
        """The layer that a site is tapped at; None for other sites."""
        if site in self.hidden:
            return self.first + self.hidden.index(site)
        return self.attention.get(site)

    def __str__(self) -> str:
        told = [self.size(), f"{self.vocabulary} token ids" if self.vocabulary else ""]
        return f"{self.name or 'a module'} ({', '.join(filter(None, told))})" if any(told) else self.name or "a module"

    def size(self) -> str:
        """What is known of layers, width and heads, as text."""
        parts = (
            (self.layers, counted(self.layers, "layer")),
            (self.width, f"{self.width} wide"),
            (self.heads, counted(self.heads, "head")),
        )
        return ", ".join(text for known, text in parts if known)


@dataclass(frozen=True, kw_only=True)
class TapPlan:
    """Which values of a student should equal which of a teacher, and how to get there.

    ``taps``            what is compared inside the networks.
    ``projections``     name -> (student width, teacher width) of a trained linear map; taps of one name share it.
    ``outputs``         outputs compared besides, of ``start_logits``, ``end_logits`` and ``logits``; (): none; None:
                        those that the student has, or none where a tap has the loss "logits".
    ``teacher_inputs``  "shared": the teacher reads the student's ids; "own": its own, as ``teacher_input_ids`` and so
                        on; None: shared, and the vocabularies have to be equally large ("shared" takes your word).
    ``student, teacher``  the two networks with all their sites, to choose from.
    ``notes``           what was left out, and why.

    Edit it with ``dataclasses.replace`` or in its JSON file. ConfigError for a plan that contradicts itself.
    """

    taps: tuple[Tap, ...]
    projections: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    outputs: tuple[str, ...] | None = None
    teacher_inputs: TeacherInputs | None = None
    student: Side = Side()
    teacher: Side = Side()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "taps", tuple(self.taps))
        wrong = [t for t in self.taps if not isinstance(t, Tap)]
        if wrong:
            raise ConfigError(f"{wrong[0]!r} is not a Tap", do='use Tap(student=..., teacher=..., loss="hidden")')
        twice = [t for t, n in Counter(self.taps).items() if n > 1]
        if twice:
            raise ConfigError("a tap stands twice in the plan", where=twice[0].student, do="keep one of them")
        if self.outputs is not None:
            object.__setattr__(self, "outputs", tuple(self.outputs))
        for name in self.outputs or ():
            if name not in OUTPUTS:
                raise ConfigError(f"outputs: {name!r} is not compared", do=f"choose from {', '.join(OUTPUTS)}")
        if self.teacher_inputs not in (None, "shared", "own"):
            raise ConfigError(f"teacher_inputs={self.teacher_inputs!r}", do='use "shared", "own" or None')
        self._check_projections()
        self._check_tokens()

    def _check_projections(self) -> None:
        for name, widths in self.projections.items():
            if not re.fullmatch(r"[A-Za-z]\w*", name):
                raise ConfigError(f"a projection cannot be called {name!r}", do="use letters, digits and _")
            if len(widths) != 2 or any(type(w) is not int or w < 1 for w in widths):
                raise ConfigError(f"projection {name}: {widths!r} are no widths", do="give [student, teacher] widths")
        for tap in self.taps:
            if tap.projection and tap.projection not in self.projections:
                known = ", ".join(self.projections) or "none"
                raise ConfigError(
                    f"the plan has no projection {tap.projection!r}", where=tap.student, do=f"it has {known}"
                )
        unused = sorted(set(self.projections) - {t.projection for t in self.taps})
        if unused:
            raise ConfigError(f"no tap goes through projection {unused[0]!r}", do="remove it from projections")

    def _check_tokens(self) -> None:
        tokens = [t for t in self.taps if t.loss in ("hidden", "attention")]
        if self.teacher_inputs == "own" and tokens:
            what = f"a {tokens[0].loss} tap compares token by token, but the teacher reads tokens of its own"
            do = "keep only pooled taps, or say teacher_inputs='shared' where both have one tokenizer"
            raise ConfigError(what, where=tokens[0].student, do=do)

    def only(self, kinds: Iterable[str]) -> TapPlan:
        """The plan of these losses alone: their taps, the projections they need, the outputs where logits is one."""
        wanted = tuple(kinds)
        left = self.with_taps(t for t in self.taps if t.loss in wanted)
        return left if "logits" in wanted else replace(left, outputs=())

    def with_taps(self, taps: Iterable[Tap]) -> TapPlan:
        """The plan with these taps instead, and the projections they need."""
        chosen = tuple(taps)
        used = {t.projection for t in chosen}
        return replace(self, taps=chosen, projections={k: v for k, v in self.projections.items() if k in used})

    def layers(self) -> dict[int, tuple[int, ...]]:
        """Student layer -> the teacher's layers that its taps read, in order."""
        found: dict[int, set[int]] = {}
        for tap in self.taps:
            a, b = self.student.layer_of(tap.student), self.teacher.layer_of(tap.teacher)
            if a is not None and b is not None:
                found.setdefault(a, set()).add(b)
        return {a: tuple(sorted(b)) for a, b in sorted(found.items())}

    def pairs(self) -> str:
        """:meth:`layers` as text: ``1<-2  2<-4``."""
        return "  ".join(f"{a}<-{','.join(map(str, b))}" for a, b in self.layers().items())

    def __str__(self) -> str:
        """The whole plan as text: networks, layers, inputs, taps, projections, notes."""
        lines = [f"student: {self.student}", f"teacher: {self.teacher}"]
        if self.layers():
            lines.append(f"layers: {self.pairs()}")
        own = f"each side its own; the teacher's are called {PREFIX}input_ids, ..."
        lines.append(f"inputs: {own if self.teacher_inputs == 'own' else 'one batch for both'}")
        lines += [_row(t) for t in self.taps] or ["no taps"]
        for name, (a, b) in self.projections.items():
            count = sum(t.projection == name for t in self.taps)
            lines.append(f"projection {name}: {a} -> {b}, trained with the student, for {counted(count, 'tap')}")
        unsaid = self.outputs is None and not any(t.loss == "logits" for t in self.taps)
        if unsaid or self.outputs:
            lines.append(f"outputs: {', '.join(self.outputs or ['those of the student'])}")
        return "\n".join([*lines, *(f"note: {n}" for n in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        """JSON values; :meth:`from_dict` reads them."""
        return {"format": FORMAT, **asdict(self), "projections": {k: list(v) for k, v in self.projections.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: str = "") -> TapPlan:
        """The plan of :meth:`to_dict`; ConfigError naming the entry that cannot be read."""
        given = {k: v for k, v in data.items() if k not in ("format", "layer_map")}
        _refuse_unknown(given, cls, "the plan", where)
        if "taps" not in given:
            raise ConfigError("the plan has no taps", where=where, do='write "taps": [], where there are to be none')
        _check_types(given, where)
        made: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
        made["taps"] = tuple(_read(Tap, tap, f"tap {i}", where) for i, tap in enumerate(given["taps"]))
        for name in ("student", "teacher"):
            made[name] = _read(Side, given.get(name, {}), name, where)
        made["projections"] = {k: tuple(v) for k, v in given.get("projections", {}).items()}
        plan = _made(cls, made, where)
        plan._check_layer_map(data.get("layer_map", "given"), where)
        return plan

    def _check_layer_map(self, named: Any, where: str) -> None:
        """A file may name the map that its taps were made by (ours did); ConfigError where they compare others."""
        found = self.only(("hidden", "attention"))
        if named == "given" or not found.layers():
            return
        pairs: Iterable[tuple[Any, Any]] = named.items() if isinstance(named, Mapping) else ()
        if isinstance(named, str):
            pairs = layer_pairs(named, self.student.layers, self.teacher.layers)
        told = {f"{a}<-{b}" for a, b in pairs}
        if any(f"{a}<-{b}" not in told for a, layers in found.layers().items() for b in layers):
            what = f"layer_map is {named!r}, but the taps compare layers {found.pairs()}"
            do = "make other taps, plan_taps(student, teacher, layer_map=...), or remove layer_map: the taps count"
            raise ConfigError(what, where=where, do=do)

    def save(self, path: str | Path) -> Path:
        """Write the plan as JSON, to be read and edited."""
        file = Path(path)
        make_folder(file.parent)
        write_json(file, self.to_dict())
        return file

    @classmethod
    def load(cls, path: str | Path) -> TapPlan:
        """Read a plan; CheckpointError where there is none, ConfigError where it was edited into nonsense."""
        file = Path(path)
        if not file.is_file():
            raise CheckpointError(f"there is no plan in {file}", do="write one: plan_taps(...).save(path)")
        return cls.from_dict(read_json(file), where=str(file))

    def draw(self, path: str | Path) -> Path:
        """Write the two networks side by side, with the taps between them, as SVG."""
        from .tap_picture import draw

        return draw(self, Path(path))


def counted(count: int, what: str) -> str:
    """``1 tap``, ``2 taps``."""
    return f"{count} {what}" + "s" * (count != 1)


def _row(tap: Tap) -> str:
    arrow = f"{tap.student}  <-  {tap.teacher}" if tap.teacher != tap.student else tap.student
    return f"{tap.loss:10s} {arrow}" + (f"  through {tap.projection}" if tap.projection else "")


def _refuse_unknown(data: Mapping[str, Any], cls: type, what: str, where: str) -> None:
    known = [f.name for f in fields(cls)]
    unknown = [k for k in data if k not in known]
    if unknown:
        raise ConfigError(f"{what} has an entry {unknown[0]!r}", where=where, do=f"it may have {', '.join(known)}")


def _check_types(data: Mapping[str, Any], where: str) -> None:
    kinds = {"taps": list, "outputs": list, "notes": list, "projections": dict, "student": dict, "teacher": dict}
    for name, kind in kinds.items():
        if name == "outputs" and data.get(name) is None:
            continue
        if name in data and not isinstance(data[name], kind | tuple if kind is list else kind):
            raise ConfigError(f"{name} is a {type(data[name]).__name__}", where=where, do=f"write a {kind.__name__}")
        if name in ("outputs", "notes"):
            _check_texts(name, data.get(name, ()), where)
    for name, widths in data.get("projections", {}).items():
        if not isinstance(widths, (list, tuple)):
            raise ConfigError(f"projection {name}: {widths!r}", where=where, do="give [student, teacher] widths")


def _check_texts(what: str, values: Iterable[Any], where: str) -> None:
    for value in values:
        if not isinstance(value, str):
            raise ConfigError(f"{what} has {value!r} in it", where=where, do="write a list of texts")


def _made(cls: type, entries: dict[str, Any], where: str) -> Any:
    """``cls(**entries)``, whose errors name the file too."""
    try:
        return cls(**entries)
    except ConfigError as err:
        raise err.at(", ".join(filter(None, (where, err.where)))) from None


def _read(cls: type, data: Any, what: str, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise ConfigError(f"{what} is a {type(data).__name__}", where=where, do="write an object with named entries")
    _refuse_unknown(data, cls, what, where)
    made = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
    for f in fields(cls):
        kind = {"str": str, "int": int, "TapLoss": str, "Mapping[str, int]": dict}.get(str(f.type), tuple)
        value = made.get(f.name)
        if f.name in made and (not isinstance(value, kind) or isinstance(value, bool)):
            raise ConfigError(f"{what}: {f.name} is {value!r}", where=where, do=f"write a {kind.__name__}")
        if isinstance(value, tuple):
            _check_texts(f"{what}: {f.name}", value, where)
    try:
        return _made(cls, made, where)
    except TypeError as err:
        raise ConfigError(f"{what}: {err}", where=where, do="give student, teacher and loss") from None
