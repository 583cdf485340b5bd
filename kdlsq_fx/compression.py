"""HSK's compression of hidden states: which layers, tokens and features of the teacher a student learns from.

"Marginal Utility Diminishes" (Liu et al., ACL 2021, arXiv 2106.05691) and its released code. The choice is made from
the teacher's values alone, so that it can be stored; the student is read at the same places.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from .errors import ConfigError

TOKENS = ("left", "right", "cls", "attention", "attention-no-sep")
FEATURES = ("magnitude", "magnitude-batch", "random", "uniform")
MASKS = ("teacher", "both")
SEPARATOR = -1e4  # the score of [SEP] in the release: behind every other token


@dataclass(frozen=True)
class Kept:
    """What is kept of the teacher's value at one tap.

    ``values``     the value as it is; or (batch, tokens, width) at the kept positions, 0 where a feature was dropped
    ``positions``  int64 (batch, tokens): where in the sequence they stand; None: the value is whole
    ``features``   bool (batch, tokens, width): which features were kept; None: all
    ``real``       float (batch, tokens): 1 for a token that counts, 0 for filling; None where the value is whole
    """

    values: torch.Tensor
    positions: torch.Tensor | None = None
    features: torch.Tensor | None = None
    real: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Compression:
    """What is kept of the hidden states; ``Compression.parse("1l_10t_0.1h")`` is the paper's way to write the sizes.
    As text it tells them with the strategies that choose something.

    ``depth``      taps kept, from the top of the plan; None: all. The map of layers, g(l, L_top), is the plan's.
    ``length``     tokens kept of a row, None: all. Padding is never kept, unless padding counts (``padding="paper"``).
    ``width``      share of the features kept of a token, rounded down, at least one; 1: all
    ``tokens``     which: ``"left"`` the first, ``"right"`` the last, ``"cls"`` the first one alone, ``"attention"``
                   those that [CLS] attends to most (mean over heads, in the block that made the state; what enters
                   the first block takes that block's), ``"attention-no-sep"`` the same with [SEP] behind all others
    ``features``   which: ``"magnitude"`` the largest of each token, ``"magnitude-batch"`` the largest of the batch
                   together (the release; cannot be stored, as it depends on the batch), ``"random"`` the same ones in
                   every token, drawn with ``seed`` for each tap, ``"uniform"`` evenly spaced ones
    ``mask``       ``"teacher"``: dropped features are 0 in the teacher and the student is drawn to 0 there (the
                   release); ``"both"``: they count on neither side, and the mean runs over kept ones
    ``separator``  id of [SEP], for ``attention-no-sep``; None: by the teacher's configuration
    """

    depth: int | None = None
    length: int | None = None
    width: float = 1.0
    tokens: str = "attention-no-sep"
    features: str = "magnitude"
    mask: str = "teacher"
    separator: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("tokens", TOKENS), ("features", FEATURES), ("mask", MASKS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name}={getattr(self, name)!r} is unknown", do=f"use one of {', '.join(known)}")
        for name, least, do in (
            ("depth", 1, "keep at least one, or None for all"),
            ("length", 1, "keep at least one, or None for all"),
            ("separator", 0, "give the id of [SEP], tokenizer.sep_token_id, or None for the teacher's"),
        ):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise ConfigError(f"{name}={value!r}", do=do)
        if not (isinstance(self.width, int | float) and 0 < self.width <= 1):
            raise ConfigError(f"width={self.width!r} is no share of the features", do="use a number above 0, up to 1")

    @classmethod
    def parse(cls, text: str, **more: Any) -> Compression:
        """``"1l_10t_0.1h"``: one layer, ten tokens, a tenth of the features; parts may be left out: ``"10t"``."""
        sizes: dict[str, Any] = {}
        for part in text.split("_") if isinstance(text, str) else [""]:
            match = re.fullmatch(r"(\d+)(l|t)|(\d*\.?\d+)(h)", part)
            name = {"l": "depth", "t": "length", "h": "width"}[match[2] or match[4]] if match else ""
            if match is None or name in sizes:
                do = "write it as 1l_10t_0.1h: layers, tokens, share of the features; leave out what stays whole"
                raise ConfigError(f"compress={text!r} cannot be read", do=do)
            sizes[name] = int(match[1]) if match[1] else float(match[3])
        return cls(**sizes, **more)

    def sized(self, text: str) -> Compression:
        """The same strategies with the sizes that a text says."""
        sizes = Compression.parse(text)
        return replace(self, depth=sizes.depth, length=sizes.length, width=sizes.width)

    def __str__(self) -> str:
        length = 1 if self.tokens == "cls" else self.length
        sizes = [f"{size}{of}" for size, of in ((self.depth, "l"), (length, "t")) if size]
        sizes += [f"{self.width:g}h"] if self.width < 1 else []
        tokens = self.tokens if self.picks_tokens else "every token"
        features = f"{self.features}, {self.mask}" if self.width < 1 else "every feature"
        return f"{'_'.join(sizes) or 'whole'} ({tokens}, {features})"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def whole(self) -> bool:
        """Whether every token and every feature of a tap is kept."""
        return self.width == 1 and not self.picks_tokens

    @property
    def picks_tokens(self) -> bool:
        return self.length is not None or self.tokens == "cls"

    @property
    def reads_attention(self) -> bool:
        return self.length is not None and self.tokens.startswith("attention")

    def with_separator(self, found: int | None, entries: int = 0) -> Compression:
        """With the id of [SEP] where it is needed, ``found`` where none was given. ConfigError where nobody knows it,
        and where it is none of the teacher's ``entries`` token ids (0: their number is not known)."""
        if not self.reads_attention or self.tokens != "attention-no-sep":
            return self
        made = self if self.separator is not None else replace(self, separator=found)
        do = "give Compression(separator=tokenizer.sep_token_id), or choose tokens='attention'"
        if made.separator is None:
            raise ConfigError("tokens='attention-no-sep' needs the id of [SEP]", where="compress", do=do)
        if 0 < entries <= made.separator:
            what = f"separator={made.separator}, but the teacher's token ids end at {entries - 1}"
            raise ConfigError(what, where="compress", do=do)
        return made

    def kept_features(self, width: int) -> int:
        """How many of ``width`` features a token keeps."""
        return max(1, int(self.width * width + 1e-9))

    def fixed_features(self, tap: int, width: int) -> torch.Tensor | None:
        """The features that every token keeps at a tap, int64, ascending; None where they depend on the values."""
        count = self.kept_features(width)
        if self.features == "uniform":
            return torch.arange(count) * width // count
        if self.features == "random":
            generator = torch.Generator().manual_seed(self.seed * 1000 + tap)
            return torch.randperm(width, generator=generator)[:count].sort().values
        return None

    def select(
        self,
        value: torch.Tensor,
        weight: torch.Tensor | None,
        *,
        tap: int = 0,
        scores: torch.Tensor | None = None,
        ids: torch.Tensor | None = None,
    ) -> Kept:
        """What is kept of hidden states (batch, length, width).

        ``weight`` (batch, length): 1 for a real token; None: all count. ``scores`` (batch, heads, length, length):
        attention before its softmax; ``ids`` (batch, length): for the separator. Both only where tokens are chosen by
        attention.
        """
        real = torch.ones(value.shape[:2], device=value.device) if weight is None else weight
        positions = self._positions(real, scores, ids)
        values = value.gather(1, positions.unsqueeze(-1).expand(-1, -1, value.shape[-1]))
        real = real.gather(1, positions)
        features = self._features(values, real, tap)
        if features is not None:
            values = values * features
        return Kept(values, positions, features, real)

    def _positions(self, real: torch.Tensor, scores: torch.Tensor | None, ids: torch.Tensor | None) -> torch.Tensor:
        """Kept positions, ascending; fillers are chosen only where a row has too few tokens."""
        rows, length = real.shape
        order = torch.arange(length, device=real.device).expand(rows, -1)
        if not self.picks_tokens:
            return order
        first = real.argmax(1)
        if self.tokens == "cls":
            return first.unsqueeze(1)
        key = order.double() if self.tokens == "right" else -order.double()
        if self.reads_attention:
            assert scores is not None and ids is not None  # the running teacher hands them in
            row = torch.softmax(scores.float(), -1)[torch.arange(rows, device=first.device), :, first].mean(1)
            key = row if self.tokens == "attention" else row.masked_fill(ids.eq(self.separator or 0), SEPARATOR)
        key = key.masked_fill(real == 0, -torch.inf)
        top = torch.sort(key, dim=1, descending=True, stable=True).indices[:, : self.length]
        return top.sort(dim=1).values

    def _features(self, values: torch.Tensor, real: torch.Tensor, tap: int) -> torch.Tensor | None:
        width = values.shape[-1]
        if self.width == 1:
            return None
        mask = torch.zeros_like(values, dtype=torch.bool)
        fixed = self.fixed_features(tap, width)
        if fixed is not None:
            mask[..., fixed.to(values.device)] = True
            return mask
        sizes = values.abs()
        if self.features == "magnitude":
            return mask.scatter_(-1, sizes.topk(self.kept_features(width), -1).indices, True)
        counted = sizes[real != 0].flatten()  # one threshold for the batch: some tokens keep more than others
        least = counted.topk(max(1, int(self.width * counted.numel() + 1e-9))).values[-1]
        return (sizes >= least) & (real != 0).unsqueeze(-1)
