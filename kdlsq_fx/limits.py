"""How many ids, tokens and token types a model takes, and whether a data set fits it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from torch import fx

from .errors import InputError

if TYPE_CHECKING:
    from .data import Dataset

ROBERTA = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "roberta-prelayernorm", "data2vec-text")


def configured_limits(config: Any) -> tuple[int, int]:
    """(size of the vocabulary, number of positions) by a Hugging Face configuration; 0 where it names no such limit."""
    positions = int(getattr(config, "max_position_embeddings", 0) or 0)
    return int(getattr(config, "vocab_size", 0) or 0), max(positions - _position_offset(config), 0)


def captured_limits(gm: fx.GraphModule, config: Any) -> tuple[int, int]:
    """The same of a captured graph, whose table of positions decides."""
    vocab, positions = configured_limits(config)
    for node in gm.graph.find_nodes(op="get_attr"):
        if "position_embeddings" in str(node.target) and "val" in node.meta and node.meta["val"].dim() == 2:
            positions = int(node.meta["val"].shape[0]) - _position_offset(config)
    return vocab, positions


def _position_offset(config: Any) -> int:
    """RoBERTa's family numbers positions from pad + 1: that many rows of the table are never used."""
    family = str(getattr(config, "model_type", ""))
    return int(config.pad_token_id) + 1 if family in ROBERTA else 0


def kinds_of(config: Any) -> int:
    """Number of token types; 0 where the model has no such limit."""
    return int(getattr(config, "type_vocab_size", 0) or 0)


def check_fits(model: Any, dataset: Dataset, *, train: bool = True, name: str = "the model") -> None:
    """InputError where a row is longer than the positions of a model, or an id or a token type outside its tables.
    ``model``: or its configuration; an ONNX file has no limits that could be known. ``train=False``: only what is
    measured counts. ``name``: what the error calls the model."""
    config = getattr(model, "config", model)
    vocab, positions = getattr(model, "_limits", None) or configured_limits(config)
    kinds = kinds_of(config)
    if kinds > 1 and getattr(dataset.train, "types", kinds) is None:
        what = f"the tokenizer gives no token types, {name} has {kinds}: all tokens count as type 0, in pairs too"
        warnings.warn(f"{what}; use the tokenizer that belongs to this model", stacklevel=2)
    for split, (longest, largest, kind) in dataset.extents(train=train).items():
        of, do = f"{split} of {dataset.task.name}", "use a model and a tokenizer that belong together"
        if positions and longest > positions:
            what = f"a row has {longest} tokens, {name} {positions} positions"
            raise InputError(what, where=of, do=f"give --max-length {positions} or less")
        if vocab and largest >= vocab:
            raise InputError(f"an id is {largest}, {name} has a vocabulary of {vocab}", where=of, do=do)
        if kinds and kind >= kinds:
            raise InputError(f"a token type is {kind}, {name} has {kinds}", where=of, do=do)
