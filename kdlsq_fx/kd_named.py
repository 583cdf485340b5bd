"""Distillation losses by name: what is compared, with which weights, and when in a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from .compression import Compression
from .errors import ConfigError

TERMS = ("hidden", "attention", "logits", "gold", "pooled")
PADDING = ("exclude", "paper")
REGRESSION = ("teacher", "gold")
SCHEDULES = ("joint", "two-stage")
PLANNED = ("layer_map", "kinds", "projections", "same_tokenizer")  # what plan_taps is asked for


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A distillation loss: weights of its terms, and how they are computed. :func:`kdlsq_fx.distill` says each term.

    ``regression``  what one output (STS-B) learns from: ``"teacher"`` its output (TernaryBERT), ``"gold"`` the label in
                    its place (the releases of KDLSQ and HSK)
    ``span``        factor of start + end, for question answering (KDLSQ's release: 100 beside hidden states and
                    attention, since a mean over 384 positions makes them small, and 1 without them)
    ``compress``    what is kept of the teacher's hidden states; text such as ``"1l_10t_0.1h"`` is parsed
    ``schedule``    ``"joint"``: all terms all the time. ``"two-stage"``: hidden, attention and pooled for the first
                    ``share`` of the run, then logits and gold alone (HSK). ``fit`` tells the share that is done, and
                    ``kq.StudentCallback`` under the Trainer; in a loop of your own set ``kd.progress = step / steps``.
    """

    hidden: float = 1.0
    attention: float = 1.0
    logits: float = 1.0
    gold: float = 0.0
    pooled: float = 0.0
    temperature: float = 1.0
    padding: str = "exclude"
    regression: str = "teacher"
    span: float = 1.0
    compress: Compression | None = None
    schedule: str = "joint"
    share: float = 0.8

    def __post_init__(self) -> None:
        if isinstance(self.compress, str):
            object.__setattr__(self, "compress", Compression.parse(self.compress))
        if self.compress is not None and not isinstance(self.compress, Compression):
            raise ConfigError(f"compress={self.compress!r}", do="use Compression(...), or text such as '1l_10t_0.1h'")
        for name, known in (("padding", PADDING), ("regression", REGRESSION), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name}={getattr(self, name)!r} is unknown", do=f"use one of {', '.join(known)}")
        for name in (*TERMS, "temperature", "span", "share"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value < 0 or (value == 0 and name not in TERMS):
                do = f"use a finite number, {'0 or more' if name in TERMS else 'above 0'}"
                raise ConfigError(f"{name}={value!r} makes no sense", do=do)
        if self.share >= 1:
            raise ConfigError(f"share={self.share!r}", do="give the first stage a share of the run between 0 and 1")

    @property
    def weights(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in TERMS}

    def counts(self, term: str, progress: float) -> bool:
        """Whether a term is part of the loss when this share of the run is done."""
        first = term in ("hidden", "attention", "pooled")
        return self.schedule == "joint" or first == (progress < self.share)

    def changed(self, changes: Mapping[str, Any]) -> Loss:
        """With other fields, of ``compress`` as text only the sizes; ConfigError for a name that is none."""
        names = [f.name for f in fields(self)]
        wrong = [name for name in changes if name not in names]
        if wrong:
            do = f"it has {', '.join(names)}"
            if wrong[0] in PLANNED:
                do = f"it belongs to the plan: plan=kq.plan_taps(student, teacher, {wrong[0]}=...)"
            raise ConfigError(f"a loss has no {wrong[0]!r}", do=do)
        sizes = changes.get("compress")
        if isinstance(sizes, str) and self.compress is not None:
            changes = {**changes, "compress": self.compress.sized(sizes)}
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Loss:
        compress = data.get("compress")
        return cls().changed({**data, "compress": None if compress is None else Compression(**compress)})


LOSSES = {
    "kdlsq": Loss(),
    "kdlsq-release": Loss(padding="paper", regression="gold", span=100.0),
    "ternarybert": Loss(),
    "ternarybert-release": Loss(padding="paper"),
    "hsk": Loss(attention=0.0, schedule="two-stage"),
    "hsk-release": Loss(
        attention=0.0, schedule="two-stage", padding="paper", regression="gold",
        compress=Compression(features="magnitude-batch"),
    ),
}  # fmt: skip


def named_loss(name: str | Loss) -> Loss:
    """The loss of a name, or the one handed in; ConfigError for another name."""
    if isinstance(name, Loss):
        return name
    if callable(name):
        do = "add a term of your own with a hook on what distill returns: docs/distillation.md, A term of your own"
        raise ConfigError("a loss is chosen by name, not handed in as a function", where="loss", do=do)
    if not isinstance(name, str) or name not in LOSSES:
        raise ConfigError(f"there is no loss {name!r}", do=f"use one of {', '.join(LOSSES)}, or a Loss(...)")
    return LOSSES[name]
