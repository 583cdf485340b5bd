"""A knowledge graph that a tiny model can learn: heads are good, tails are good (`very`) or bad (`not`)."""

from __future__ import annotations

import random
from pathlib import Path

from tiny_glue import BAD, GOOD


def write_graph(folder: Path, *, header: bool = True, labelled: bool = False, seed: int = 0) -> Path:
    """20 entities of two words, 190 true triples, 70 % of them in train. ``labelled``: dev and test have a false
    triple (-1), by another head, behind each true one."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    entities = {
        f"{kind[0]}{i}": f"{kind[i % 5]} {kind[(i * 2 + i // 5) % 5]}" for kind in (GOOD, BAD) for i in range(10)
    }
    names = list(entities)
    every = [(h, r, t) for h in names for t in names for r in ("very", "not") if h != t]
    good = names[:10]
    true = [x for x in every if x[0] in good and (x[2] in good) == (x[1] == "very")]
    rng.shuffle(true)
    cut = int(len(true) * 0.7)
    parts = {"train": true[:cut], "dev": true[cut : cut + 30], "test": true[cut + 30 : cut + 50]}
    for split, triples in parts.items():
        lines = ["head\trelation\ttail" + "\tlabel" * labelled] if header else []
        for h, r, t in triples:
            lines.append(f"{h}\t{r}\t{t}" + "\t1" * labelled)
            if labelled and split != "train":
                other = rng.choice([e for e in names if (e, r, t) not in true and e != t])
                lines.append(f"{other}\t{r}\t{t}\t-1")
        (folder / f"{split}.tsv").write_text("\n".join(dict.fromkeys(lines)) + "\n", encoding="utf-8")
    texts = {"entity": entities, "relation": {"very": "very", "not": "not the"}}
    for kind, found in texts.items():
        lines = [f"{kind}\ttext"] * header + [f"{name}\t{text}" for name, text in found.items()]
        (folder / f"{kind}2text.{'tsv' if header else 'txt'}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
