"""RoBERTa in float64 and NumPy, site by site, written down from the architecture: the reference of ibert.py."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdlsq_fx.graph import fetch
from kdlsq_fx.lsq import BiasGrid, Lsq
from kdlsq_fx.ops.qat import bias_grid

Array = NDArray[Any]
PAD = 1


def by_head(x: Array, heads: int) -> Array:
    """[batch, length, width] -> [batch, heads, length, width / heads]"""
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def grid_weights(qat: Any) -> dict[str, Array]:
    """Every parameter of a qat model in float64: weights and biases at the points of their grids, norms as they are."""
    found = {name: p.detach().double().numpy() for name, p in qat.gm.named_parameters()}
    for quantizer in (m for m in qat.gm.modules() if isinstance(m, Lsq) and m.role == "weight"):
        scale = quantizer.scale.double().reshape(-1, 1)
        found[quantizer.site] = (quantizer.codes(fetch(qat.gm, quantizer.site)).double() * scale).numpy()
    for node in (n for n in qat.gm.graph.nodes if n.target is bias_grid):
        bias, x, w = (fetch(qat.gm, str(a.target)) for a in node.args)
        codes = BiasGrid().codes(bias.detach(), x.scale, w.scale).double()
        found[str(node.args[0].target)] = (codes * x.scale.double() * w.scale.double()).numpy()
    return found


class Exact:
    """What each site's function gives, in reals, by our site names; "logits" is the last.

    ``weights``  every parameter by its name in RobertaForSequenceClassification.
    ``given``    real values by site: what reads such a site reads these in place of the site's own result. Without
                 them this is the float model.
    """

    def __init__(self, weights: Mapping[str, Array], config: Any, given: Mapping[str, Array] | None = None) -> None:
        self.w, self.config, self.given = weights, config, given or {}
        self.values: dict[str, Array] = {}

    def __call__(self, data: Mapping[str, torch.Tensor]) -> dict[str, Array]:
        ids, keep = data["input_ids"].numpy(), data["attention_mask"].numpy().astype(bool)
        positions = np.cumsum(ids != PAD, 1) * (ids != PAD) + PAD
        root, layers = "roberta.embeddings", self.config.num_hidden_layers
        words = self.w[f"{root}.word_embeddings.weight"][ids] + self.w[f"{root}.token_type_embeddings.weight"][0]
        x = self._at(f"{root}/add:2/w", words)
        x = self._at(f"{root}/add:3/w", x + self.w[f"{root}.position_embeddings.weight"][positions])
        x = self._at(f"{root}.dropout/dropout/q", self._norm(x, f"{root}.LayerNorm"))
        for i in range(layers):
            name = f"roberta.encoder.layer.{i}"
            x = self._attention(x, f"{name}.attention", keep)
            x = self._feed_forward(x, name, last=i == layers - 1)
        self.values["logits"] = self.head(x)
        return self.values

    def head(self, x: Array) -> Array:
        """Logits from the last hidden state [batch, length, width]."""
        return self._linear(np.tanh(self._linear(x[:, 0], "classifier.dense")), "classifier.out_proj")

    def _at(self, site: str, value: Array) -> Array:
        self.values[site] = value
        return self.given.get(site, value)

    def _linear(self, x: Array, name: str) -> Array:
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def _norm(self, x: Array, name: str) -> Array:
        y = x - x.mean(-1, keepdims=True)
        y = y / np.sqrt((y * y).mean(-1, keepdims=True) + self.config.layer_norm_eps)
        return y * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def _attention(self, x: Array, name: str, keep: Array) -> Array:
        own, heads = f"{name}.self", self.config.num_attention_heads
        linears = (self._at(f"{own}.{n}/linear/q", self._linear(x, f"{own}.{n}")) for n in ("query", "key", "value"))
        q, k, v = (by_head(t, heads) for t in linears)
        scores = np.where(keep[:, None, None], q @ k.swapaxes(2, 3) / math.sqrt(q.shape[-1]), -np.inf)
        e = np.exp(scores - scores.max(-1, keepdims=True))
        p = self._at(f"{own}/dropout/q", e / e.sum(-1, keepdims=True))
        context = self._at(f"{own}/matmul:1/q", p @ v).swapaxes(1, 2).reshape(x.shape)
        x = self._at(f"{name}.output/add/w", self._linear(context, f"{name}.output.dense") + x)
        norm = f"{name}.output.LayerNorm"
        return self._at(f"{norm}/layer_norm/q", self._norm(x, norm))

    def _feed_forward(self, x: Array, name: str, *, last: bool) -> Array:
        inner = torch.nn.functional.gelu(torch.from_numpy(self._linear(x, f"{name}.intermediate.dense"))).numpy()
        inner = self._at(f"{name}.intermediate.intermediate_act_fn/gelu/q", inner)
        x = self._at(f"{name}.output/add/w", self._linear(inner, f"{name}.output.dense") + x)
        norm = f"{name}.output.LayerNorm"
        site = "classifier.dropout/dropout/q" if last else f"{norm}/layer_norm/q"
        return self._at(site, self._norm(x, norm))
