"""Tiny random models of every supported family, and batches with real padding."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

transformers.logging.set_verbosity_error()

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 99,
}
DEBERTA = {
    "relative_attention": True,
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
}
MODERN = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "local_attention": 8,
    "attention_dropout": 0.1,
    "mlp_dropout": 0.1,
}
DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 99}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", SMALL),
    "roberta": ("Roberta", SMALL),
    "xlm-roberta": ("XLMRoberta", SMALL),
    "camembert": ("Camembert", SMALL),
    "distilbert": ("DistilBert", DISTIL),
    "electra": ("Electra", {**SMALL, "embedding_size": 16}),
    "albert": ("Albert", {**SMALL, "embedding_size": 16}),
    "mobilebert": ("MobileBert", {**SMALL, "embedding_size": 32, "intra_bottleneck_size": 16}),
    "deberta-v2": ("DebertaV2", {**SMALL, **DEBERTA}),
    "mpnet": ("MPNet", SMALL),
    "convbert": ("ConvBert", {**SMALL, "embedding_size": 32}),
    "squeezebert": ("SqueezeBert", {**SMALL, "embedding_size": 32}),
    "modernbert": ("ModernBert", {**SMALL, **MODERN}),
}
HEADS = ("Model", "ForSequenceClassification", "ForQuestionAnswering", "ForTokenClassification", "ForMaskedLM")


def tiny(family: str, head: str = "ForSequenceClassification", seed: int = 0, **changes: Any) -> nn.Module:
    """A tiny random model of a family; sdpa where the family has it, as a user would load it."""
    stem, options = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{stem}Config")(**{**options, **changes})
    return getattr(transformers, f"{stem}{head}")(config)  # type: ignore[no-any-return]


def batch(rows: int = 4, length: int = 9, vocab: int = 99, seed: int = 0) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask, token_type_ids of shape (rows, length); every second row is padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1::2, max(length // 2, 1) :] = 0
    return {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


def for_model(model: nn.Module, data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The part of a batch that the model's forward takes."""
    import inspect

    names = inspect.signature(model.forward).parameters
    return {k: v for k, v in data.items() if k in names}
