"""LV-BERT: an encoder whose sub-layers stand in any order (Yu et al., Findings of ACL 2021), quantized like any other.

    from lv_bert import LVBert, LVBertConfig, example_inputs
    model = LVBert(LVBertConfig(order="012012"))
    qat = kdlsq_fx.prepare_qat(model, "W8E8A8-int", example=example_inputs(model.config))

A sub-layer is a digit of ``order``: 0 dynamic convolution, 1 self-attention, 2 feed-forward. Each is a residual
sub-layer with its LayerNorm behind the sum. ``PUBLISHED_ORDER`` is the searched order of LV-BERT-small.

From the paper and its code: the three kinds, the order, the dynamic convolution (gated input, 9 taps), hidden size 256
and embedding size 128. Chosen here: the number of heads, the width of the feed-forward, the head for sentences, and
``mask_padding``: the published convolution lets what stands at padded positions leak into the last real tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdlsq_fx.errors import ConfigError

PUBLISHED_ORDER = "001221022100120210201121"


@dataclass(frozen=True, kw_only=True)
class LVBertConfig:
    """Sizes of an LV-BERT. ConfigError for an order that names an unknown kind, and for sizes that do not fit."""

    order: str = PUBLISHED_ORDER
    vocab_size: int = 30522
    embedding_size: int = 128
    hidden_size: int = 256
    heads: int = 4
    intermediate_size: int = 1024
    taps: int = 9
    positions: int = 512
    labels: int = 2
    dropout: float = 0.1
    mask_padding: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.order, str):
            raise ConfigError(f"order {self.order!r} is no text", do=f"write digits, for example {PUBLISHED_ORDER!r}")
        sizes = (
            "vocab_size",
            "embedding_size",
            "hidden_size",
            "heads",
            "intermediate_size",
            "taps",
            "positions",
            "labels",
        )
        for name in sizes:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}", where="LVBertConfig", do="give 1 or more")
        for at, kind in enumerate(self.order):
            if kind not in KINDS:
                what = f"order {self.order!r}: there is no sub-layer {kind!r} (letter {at + 1})"
                raise ConfigError(what, do="use 0 dynamic convolution, 1 self-attention, 2 feed-forward")
        if not self.order:
            raise ConfigError("the order is empty", do=f"name at least one sub-layer, for example {PUBLISHED_ORDER!r}")
        if self.hidden_size % self.heads:
            raise ConfigError(f"{self.heads} heads do not share {self.hidden_size} channels", do="take a divisor")
        if self.taps % 2 == 0:
            raise ConfigError(f"a kernel of {self.taps} taps has no middle", do="take an odd number")


class DynamicConvolution(nn.Module):
    """Every position convolves its neighbours with a kernel of its own, one kernel a head.

    ``v = value(x) * sigmoid(gate(x))``; a separable convolution of ``v`` and a linear give ``heads * taps`` numbers a
    position; their softmax over the taps is applied to ``v``, padded with zeros.
    """

    def __init__(self, config: LVBertConfig) -> None:
        super().__init__()
        width, taps = config.hidden_size, config.taps
        self.heads, self.taps, self.mask_padding = config.heads, taps, config.mask_padding
        self.value, self.gate = nn.Linear(width, width), nn.Linear(width, width)
        self.depthwise = nn.Conv1d(width, width, taps, padding=taps // 2, groups=width, bias=False)
        self.pointwise = nn.Conv1d(width, width, 1)
        self.kernel = nn.Linear(width, config.heads * taps)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """``x`` [batch, length, width], ``mask`` [batch, length] of 0 and 1 -> [batch, length, width]."""
        batch, length, width = x.shape
        v = self.value(x) * torch.sigmoid(self.gate(x))
        if self.mask_padding:
            v = v * mask[:, :, None].to(v.dtype)
        channels = v.transpose(1, 2)
        made = self.pointwise(self.depthwise(channels)).transpose(1, 2)
        kernels = F.softmax(self.kernel(made).view(batch, length, self.heads, self.taps), dim=-1)
        windows = F.unfold(channels.unsqueeze(-1), (self.taps, 1), padding=(self.taps // 2, 0)).transpose(1, 2)
        windows = windows.reshape(batch, length, self.heads, width // self.heads, self.taps)
        return torch.matmul(windows, kernels.unsqueeze(-1)).reshape(batch, length, width)


class SelfAttention(nn.Module):
    """Scaled dot-product attention of ``heads`` heads; masked keys get no weight."""

    def __init__(self, config: LVBertConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """``x`` [batch, length, width], ``mask`` [batch, length] of 0 and 1 -> [batch, length, width]."""
        batch, length, width = x.shape
        size = width // self.heads
        q, k, v = (
            f(x).view(batch, length, self.heads, size).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        added = torch.where(mask[:, None, None, :] != 0, 0.0, torch.finfo(x.dtype).min)
        scores = torch.matmul(q, k.transpose(-1, -2)) / size**0.5 + added
        context = torch.matmul(self.dropout(F.softmax(scores, dim=-1)), v)
        return context.transpose(1, 2).reshape(batch, length, width)


class FeedForward(nn.Module):
    """``gelu(x W)``; the linear back to the width is the sub-layer's own."""

    def __init__(self, config: LVBertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """``x`` [batch, length, width] -> [batch, length, intermediate width]."""
        return F.gelu(self.dense(x))


KINDS: dict[str, type[nn.Module]] = {"0": DynamicConvolution, "1": SelfAttention, "2": FeedForward}


class SubLayer(nn.Module):
    """``layer_norm(x + dropout(output(kind(x))))``"""

    def __init__(self, kind: str, config: LVBertConfig) -> None:
        super().__init__()
        self.inner = KINDS[kind](config)
        self.output = nn.Linear(config.intermediate_size if kind == "2" else config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """``x`` [batch, length, width], ``mask`` [batch, length] of 0 and 1 -> [batch, length, width]."""
        return self.norm(x + self.dropout(self.output(self.inner(x, mask))))


class Embeddings(nn.Module):
    """Words and positions, normalised, and brought to the width of the sub-layers."""

    def __init__(self, config: LVBertConfig) -> None:
        super().__init__()
        self.words = nn.Embedding(config.vocab_size, config.embedding_size)
        self.places = nn.Embedding(config.positions, config.embedding_size)
        self.norm = nn.LayerNorm(config.embedding_size)
        self.dropout = nn.Dropout(config.dropout)
        self.project = nn.Linear(config.embedding_size, config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        """ids [batch, length] -> [batch, length, width]."""
        places = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        return self.project(self.dropout(self.norm(self.words(input_ids) + self.places(places))))


class LVBert(nn.Module):
    """A classifier of sentences: sub-layers in the order of its config, then the mean of the tokens."""

    def __init__(self, config: LVBertConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(SubLayer(kind, config) for kind in config.order)
        self.head = Head(config)
        self.apply(_small)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """int64 ids and mask [batch, length] -> {"logits": [batch, labels]}."""
        x = self.embeddings(input_ids)
        for layer in self.layers:
            x = layer(x, attention_mask)
        return {"logits": self.head(x, attention_mask)}


class Head(nn.Module):
    """The mean over the tokens that are there, a hidden layer, the labels."""

    def __init__(self, config: LVBertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.labels = nn.Linear(config.hidden_size, config.labels)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """``x`` [batch, length, width], ``mask`` [batch, length] of 0 and 1 -> [batch, labels]."""
        there = mask.unsqueeze(-1).to(x.dtype)
        mean = (x * there).sum(1) / there.sum(1).clamp(min=1)
        return self.labels(self.dropout(F.gelu(self.dense(mean))))


def _small(module: nn.Module) -> None:
    """BERT's first weights: normal, deviation 0.02; a depthwise kernel sums few terms and keeps torch's."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


def example_inputs(config: LVBertConfig, rows: int = 3, length: int = 12) -> dict[str, Tensor]:
    """A batch to capture the model with: ids and a mask, the second row padded."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, config.vocab_size, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, length // 2 :] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}
