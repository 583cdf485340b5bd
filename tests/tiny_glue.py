"""A BERT, a tokenizer and data sets small enough to write and train inside a test."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

GOOD, BAD = ["good", "fine", "great", "nice", "happy"], ["bad", "poor", "sad", "awful", "dull"]
WORDS = [*GOOD, *BAD, "film", "story", "actor", "plot", "and", "very", "the", "a", "was", "not"]


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: i for i, word in enumerate([*specials, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, model_input_names=["input_ids", "token_type_ids", "attention_mask"], **names
    )


def bert(**changes: Any) -> Any:
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    limits = {"vocab_size": len(WORDS) + 5, "max_position_embeddings": 40}
    config = BertConfig(**(limits | sizes | changes))
    return BertForSequenceClassification(config)


def write_sst(folder: Path, *, train: int = 96, dev: int = 24, seed: int = 0) -> Path:
    """Sentences whose label is whether good words outnumber bad ones."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", train), ("dev", dev)):
        lines = ["sentence\tlabel"]
        for _ in range(rows):
            label = rng.randrange(2)
            words = rng.choices(WORDS[10:], k=rng.randrange(1, 9)) + rng.choices(GOOD if label else BAD, k=2)
            rng.shuffle(words)
            lines.append(f"{' '.join(words)}\t{label}")
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_model(folder: Path, **changes: Any) -> Path:
    bert(**changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
