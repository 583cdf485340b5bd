"""I-BERT of transformers, its float twin and our mirror of it, and the codes of both by site; used by ibert.py."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers
from ibert_exact import PAD, by_head
from numpy.typing import NDArray
from torch import nn

import kdlsq_fx as kq
from kdlsq_fx.lsq import Lsq
from kdlsq_fx.qconfig import QConfig, QSpec, Rule

Array = NDArray[Any]
Codes = dict[str, Array]
VOCAB, EPS = 199, 1e-5


def site_map(layers: int) -> dict[str, tuple[str, int]]:
    """Our site -> (I-BERT's QuantAct or IntSoftmax whose output has the codes, which of its calls).

    Where I-BERT rounds twice in a row (behind a LayerNorm, behind GELU) our one site stands for the second.
    """
    found = {
        "roberta.embeddings/add:2/w": ("embeddings.embeddings_act1", 0),
        "roberta.embeddings/add:3/w": ("embeddings.embeddings_act1", 1),
        "roberta.embeddings.dropout/dropout/q": ("embeddings.output_activation", 0),
    }
    for i in range(layers):
        ours, theirs = f"roberta.encoder.layer.{i}.", f"encoder.layer.{i}."
        last = i == layers - 1
        norm = "classifier.dropout/dropout/q" if last else f"{ours}output.LayerNorm/layer_norm/q"
        pairs = {
            f"{ours}attention.self.query/linear/q": "attention.self.query_activation",
            f"{ours}attention.self.key/linear/q": "attention.self.key_activation",
            f"{ours}attention.self.value/linear/q": "attention.self.value_activation",
            f"{ours}attention.self/dropout/q": "attention.self.softmax",
            f"{ours}attention.self/matmul:1/q": "attention.self.output_activation",
            f"{ours}attention.output/add/w": "attention.output.ln_input_act",
            f"{ours}attention.output.LayerNorm/layer_norm/q": "pre_intermediate_act",
            f"{ours}intermediate.intermediate_act_fn/gelu/q": "pre_output_act",
            f"{ours}output/add/w": "output.ln_input_act",
            norm: "output.output_activation",
        }
        found |= {site: (theirs + module, 0) for site, module in pairs.items()}
    return found


def batch(seed: int, rows: int = 4, length: int = 24) -> dict[str, torch.Tensor]:
    """Random ids without pads; every second row is padded from its middle on."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1::2, length // 2 :] = 0
    return {"input_ids": torch.where(mask == 1, ids, PAD), "attention_mask": mask}


def make_ibert(seed: int, sizes: Mapping[str, Any], forwards: int) -> Any:
    """I-BERT in quant mode with lively random weights whose ranges were tracked over training-mode forwards."""
    torch.manual_seed(seed)
    config = transformers.IBertConfig(
        **sizes, vocab_size=VOCAB, max_position_embeddings=66, type_vocab_size=2, pad_token_id=PAD, layer_norm_eps=EPS,
        quant_mode=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = transformers.IBertForSequenceClassification(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "LayerNorm.weight" in name:
                p.copy_(torch.empty_like(p).uniform_(0.5, 1.5))
            else:
                p.copy_(4 * p if p.dim() > 1 else 0.2 * torch.randn_like(p))
        model.train()
        for step in range(forwards):
            model(**batch(step))
    return model.eval()


def float_twin(ibert: Any) -> Any:
    """The RoBERTa model with I-BERT's weights: the architectures are the same."""
    sizes = {k: v for k, v in ibert.config.to_dict().items() if k not in ("model_type", "quant_mode", "force_dequant")}
    sizes |= {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}  # evaluated only; names the sites
    model: Any = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**sizes))
    known = {name.replace("ibert.", "roberta."): value for name, value in ibert.state_dict().items()}
    model.load_state_dict({name: known[name] for name in model.state_dict()})
    return model.eval()


def widths(*, as_ibert: bool = True) -> QConfig:
    """I-BERT's widths: 8 bits, rows of weights by max-abs; sums 16 and 22 bits; GELU reads an accumulator (22 here).

    Not ``as_ibert``: what W8E8A8-int does at the non-linear ops: 8 bits enter GELU, tables for GELU and exp.
    """
    act, table = QSpec(bits=8, quantizer="lsq"), QSpec(bits=8, quantizer="minmax")
    wide16, wide22 = (QSpec(bits=b, quantizer="lsq", signed=True) for b in (16, 22))
    form = "polynomial" if as_ibert else "table"
    return kq.preset("W8E8A8-lsq-int").with_rules(
        Rule(op="embedding", weight=table),
        Rule(op="linear", weight=QSpec(bits=8, quantizer="minmax", axis=0), act=act),
        Rule(op="softmax", nonlinear=form, act=act, wide=wide16),
        Rule(op="gelu", nonlinear=form, act=wide22 if as_ibert else act),
        Rule(site="**.embeddings.LayerNorm/*", op="layer_norm", act=act, wide=wide16),
    )


def mirror(ibert: Any, data: Mapping[str, torch.Tensor], qconfig: QConfig) -> Any:
    """Our qat model of the float twin on I-BERT's scales; GELU's input and the head, which have none there, by data."""
    qat = kq.prepare_qat(float_twin(ibert), qconfig)
    kq.calibrate(qat, [data])
    scales = record(ibert, data).scales
    for quantizer in (m for m in qat.gm.modules() if isinstance(m, Lsq) and m.role == "act"):
        for end in ("/q", "/w"):
            if quantizer.site + end in scales:
                quantizer._set_raw(torch.tensor(scales[quantizer.site + end], dtype=torch.float32))
    return qat.eval()


@dataclass
class Record:
    """Codes and scales of I-BERT by our site, and its logits."""

    codes: Codes = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    logits: Array = field(default_factory=lambda: np.empty(0))


@torch.no_grad()
def record(ibert: Any, data: Mapping[str, torch.Tensor]) -> Record:
    """Run I-BERT and read the codes of every mapped site off its modules."""
    seen, wanted = Record(), {where: site for site, where in site_map(ibert.config.num_hidden_layers).items()}
    calls: dict[str, int] = {}
    heads = ibert.config.num_attention_heads

    def keep(module: nn.Module, args: Any, out: Any, *, name: str) -> None:
        call = calls[name] = calls.get(name, -1) + 1
        if (name, call) in wanted:
            site, (value, scale) = wanted[name, call], out
            codes = torch.round(value.double() / torch.as_tensor(scale).double()).long().numpy()
            seen.codes[site] = by_head(codes, heads) if site.endswith("/matmul:1/q") else codes
            seen.scales[site] = float(scale)

    modules = dict(ibert.ibert.named_modules())
    names = {name for name, _ in wanted}
    handles = [modules[n].register_forward_hook(functools.partial(keep, name=n)) for n in names]
    seen.logits = ibert(**data).logits.double().numpy()
    for handle in handles:
        handle.remove()
    return seen


def run_ours(model: Any, data: Mapping[str, torch.Tensor], forced: Codes | None = None) -> tuple[Codes, Array]:
    """Our codes by site and logits; ``forced`` codes replace those of their site for all that reads it."""
    found: Codes = {}

    def hook(site: str, codes: Any) -> Any:
        found[site] = np.asarray(codes, dtype=np.int64)
        if forced is None or site not in forced:
            return codes
        info = np.iinfo(codes.dtype)  # I-BERT's probability of a lone key is 256 of 256: one more than a byte holds
        return np.clip(forced[site], info.min, info.max).astype(codes.dtype)

    out = model.reference.run(model.split(**data)[1], hook)
    return found, np.asarray(out[0] if isinstance(out, (tuple, list)) else out, dtype=np.float64)
