"""Our integers beside I-BERT's simulation (``ibert`` of transformers), the same weights and ranges; writes ibert.md.

    python benchmarks/ibert.py                 half a minute on one core

Both models hold the same random weights, and our quantizers take their scales from the ranges that I-BERT tracked.
Every site is then fed the codes I-BERT had there, so that a difference is the site's own. To find its cause, I-BERT is
repaired in one respect after the other (ibert_repairs.py), and the sites are counted again after each.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from ibert_exact import Exact, grid_weights
from ibert_models import Codes, batch, float_twin, make_ibert, mirror, record, run_ours, widths
from ibert_page import CAUSES, COARSE, CONCLUSIONS, SETTING
from ibert_repairs import REPAIRS, repaired
from transformers.models.ibert.quant_modules import IntGELU, IntLayerNorm, IntSoftmax, QuantLinear

import kdlsq_fx as kq
from kdlsq_fx.ops.int_gelu import gelu_constants, numpy_int_gelu
from kdlsq_fx.ops.int_softmax import numpy_int_softmax, prob_divider, score_grid

SEED, FORWARDS = 0, 40
SIZES = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 512}
LAST = "classifier.dropout/dropout/q"  # the last hidden state
KINDS = {  # what a site holds, by the end of its name
    "sums of embeddings, 16 bits": ("embeddings/add:2/w", "embeddings/add:3/w"),
    "Q, K, V": ("query/linear/q", "key/linear/q", "value/linear/q"),
    "probabilities": ("self/dropout/q",),
    "context": ("matmul:1/q",),
    "sums before LayerNorm, 22 bits": ("output/add/w",),
    "LayerNorm": ("layer_norm/q", "embeddings.dropout/dropout/q", LAST),
    "GELU": ("gelu/q",),
}


@dataclass
class Setting:
    """The models, a batch, and what the float model gives at each site."""

    ibert: Any
    qat: Any
    ours: Any
    data: dict[str, torch.Tensor]
    real: Codes


def setting(sizes: Mapping[str, int], *, seed: int = SEED, forwards: int = FORWARDS, rows: int = 16) -> Setting:
    ibert, data = make_ibert(seed, sizes, forwards), batch(forwards, rows=rows)
    qat = mirror(ibert, data, widths())
    weights = {name: p.double().numpy() for name, p in float_twin(ibert).state_dict().items()}
    return Setting(ibert, qat, kq.convert(qat), data, Exact(weights, ibert.config)(data))


def sites_of(kind: str, codes: Iterable[str]) -> list[str]:
    return [site for site in codes if site.endswith(KINDS[kind])]


def off(a: Codes, b: Codes, sites: Iterable[str]) -> tuple[float, int]:
    """(share of codes that differ, by how many steps at most)"""
    steps = np.concatenate([np.abs(a[s] - b[s]).ravel() for s in sites])
    return float(np.mean(steps > 0)), int(steps.max())


def from_exact(codes: Codes, real: Codes, scales: Mapping[str, float], sites: Iterable[str]) -> tuple[float, float]:
    """(mean, largest) distance of codes from the real values, in steps, where those lie within the grid."""
    parts = []
    for site in sites:
        bits = 8 if site.endswith("/q") else 16 if ".embeddings/" in site else 22
        wanted = real[site] / scales[site]
        top = 255 if site.endswith("self/dropout/q") else 2 ** (bits - 1) - 1
        parts.append(np.abs(codes[site] - wanted)[np.abs(wanted) <= top])
    distance = np.concatenate(parts)
    return float(distance.mean()), float(distance.max())


@dataclass
class Site:
    """One kind of site fed I-BERT's codes: (mean, largest) distance from exact of each, (share, steps) between them."""

    theirs: tuple[float, float]
    ours: tuple[float, float]
    apart: tuple[float, int]


def local(at: Setting) -> dict[str, Site]:
    seen = record(at.ibert, at.data)
    found, _ = run_ours(at.ours, at.data, seen.codes)
    given = {site: codes * seen.scales[site] for site, codes in seen.codes.items()}
    real = Exact(grid_weights(at.qat), at.ibert.config, given)(at.data)
    rows = {}
    for kind in KINDS:
        sites = sites_of(kind, seen.codes)
        theirs, ours = (from_exact(codes, real, seen.scales, sites) for codes in (seen.codes, found))
        rows[kind] = Site(theirs, ours, off(seen.codes, found, sites))
    return rows


@dataclass
class Rung:
    """I-BERT after some repairs: kind -> (share, steps) that are not ours; mean distance of its last hidden state."""

    apart: dict[str, tuple[float, int]]
    end: float


def ladder(at: Setting) -> list[Rung]:
    """One rung for each number of repairs, none first."""
    found = []
    for number in range(len(REPAIRS) + 1):
        seen = record(repaired(at.ibert, number), at.data)
        ours, _ = run_ours(at.ours, at.data, seen.codes)
        apart = {kind: off(seen.codes, ours, sites_of(kind, seen.codes)) for kind in KINDS}
        found.append(Rung(apart, from_exact(seen.codes, at.real, seen.scales, [LAST])[0]))
    return found


def end_to_end(at: Setting) -> list[str]:
    """Mean distance from the float model in steps, each model running on its own, and of the logits."""
    seen, told = record(at.ibert, at.data), record(repaired(at.ibert, 1), at.data)
    default = kq.convert(mirror(at.ibert, at.data, widths(as_ibert=False)))
    runs = [run_ours(model, at.data) for model in (at.ours, default)]
    columns = (seen.codes, told.codes, *(codes for codes, _ in runs))
    lines = [
        "| site | I-BERT | I-BERT told its scales | ours | ours, 8 bits enter GELU, tables |",
        "|---|---|---|---|---|",
    ]
    for site in (s for s in seen.codes if s.endswith(KINDS["probabilities"] + KINDS["LayerNorm"] + KINDS["GELU"])):
        cells = (f"{from_exact(codes, at.real, seen.scales, [site])[0]:.2f}" for codes in columns)
        lines.append(f"| {site.removeprefix('roberta.').removesuffix('/q')} | {' | '.join(cells)} |")
    ends = (seen.logits, told.logits, *(logits for _, logits in runs))
    weights = {name: p.double().numpy() for name, p in float_twin(at.ibert).state_dict().items()}
    heads = [Exact(weights, at.ibert.config).head(codes[LAST] * seen.scales[LAST]) for codes in columns]
    for name, logits in (("their head float, ours 8 bits", ends), ("every head float", heads)):
        cells = (f"{np.abs(one - at.real['logits']).mean():.3f}" for one in logits)
        lines.append(f"| logits, not in steps; {name} | {' | '.join(cells)} |")
    return lines


def coarse_scales() -> list[str]:
    """Softmax and GELU alone, at scores and accumulators of growing steps: largest errors."""
    lines = ["| step of the input | softmax, 1/256: I-BERT | ours | GELU: I-BERT | ours |", "|---|---|---|---|---|"]
    for step in (1e-4, 1e-3, 1e-2, 3e-2, 1e-1):
        cells = (*softmax_errors(step), *gelu_errors(step))
        lines.append(f"| {step:g} | {cells[0]:.2f} | {cells[1]:.2f} | {cells[2]:.4f} | {cells[3]:.4f} |")
    return lines


def softmax_errors(step: float) -> tuple[float, float]:
    """Largest error of probabilities in 1/256, of 500 rows of 64 random scores (sd 2): I-BERT in float64, ours."""
    codes = np.rint(np.random.default_rng(0).normal(0, 2, (500, 64)) / step).astype(np.int64)
    softmax, scale = IntSoftmax(8, quant_mode=True).double(), torch.tensor([step], dtype=torch.float64)
    softmax(torch.from_numpy(codes) * scale, scale)  # one training forward tracks the range of the exponentials
    theirs = softmax.eval()(torch.from_numpy(codes) * scale, scale)[0].numpy() * 256
    ours = numpy_int_softmax(codes, None, None, *score_grid(step, table=False), prob_divider(1 / 256), 0, 0, 255)
    real = torch.softmax(torch.from_numpy(codes * step), -1).numpy() * 256
    return float(np.abs(theirs - real).max()), float(np.abs(ours - real).max())


def gelu_errors(step: float) -> tuple[float, float]:
    """Largest error on [-6, 6]: I-BERT in float64, ours rounded to 2**-16."""
    codes, scale = np.arange(-int(6 / step), int(6 / step) + 1), torch.tensor([step], dtype=torch.float64)
    theirs = IntGELU().double()(torch.from_numpy(codes) * scale, scale)[0].numpy()
    ours = numpy_int_gelu(codes, 0, *gelu_constants(step, 2.0**-16), 0, -(2**22), 2**22) * 2.0**-16
    real = torch.nn.functional.gelu(torch.from_numpy(codes * step)).numpy()
    return float(np.abs(theirs - real).max()), float(np.abs(ours - real).max())


@torch.no_grad()
def facts(at: Setting) -> dict[str, float]:
    """What single causes leave behind.

    ``their_rows, our_rows``  mean sum of a row of probabilities; ``cut``: share of weight rows whose largest weight is
    positive and so cut by a step; ``exp_low, exp_high``: largest exponential of the batch over the range that training
    tracked for it, least and greatest over the layers; ``norm_shift``: most bits a LayerNorm drops of its deviations.
    """
    seen = record(at.ibert, at.data)
    ours, _ = run_ours(at.ours, at.data, seen.codes)
    modules = list(at.ibert.modules())
    linears = [m.weight for m in modules if isinstance(m, QuantLinear)]
    ratios: list[float] = []
    acts = [m.act for m in modules if isinstance(m, IntSoftmax)]
    handles = [a.register_forward_pre_hook(lambda m, args: ratios.append(float(args[0].max() / m.x_max))) for a in acts]
    at.ibert(**at.data)
    for handle in handles:
        handle.remove()
    return {
        "their_rows": _row_sum(seen.codes),
        "our_rows": _row_sum(ours),
        "cut": float(torch.cat([w.amax(1) == w.abs().amax(1) for w in linears]).double().mean()),
        "exp_low": min(ratios),
        "exp_high": max(ratios),
        "norm_shift": max(float(m.shift) for m in modules if isinstance(m, IntLayerNorm)),
    }


def _row_sum(codes: Codes) -> float:
    sites = sites_of("probabilities", codes)
    return float(np.mean([codes[s].sum(-1).mean() / 256 for s in sites]))


def _pair(pair: tuple[float, float]) -> str:
    return ", ".join(f"{v:.2f}" if v < 100 else f"{v:.0f}" for v in pair)


def local_lines(rows: Mapping[str, Site]) -> list[str]:
    lines = ["| sites | I-BERT from exact: mean, max | ours from exact: mean, max | I-BERT is not ours, by at most |"]
    lines.append("|---|---|---|---|")
    for kind, row in rows.items():
        lines.append(f"| {kind} | {_pair(row.theirs)} | {_pair(row.ours)} | {_share(row.apart)} |")
    return lines


def ladder_lines(rungs: list[Rung]) -> list[str]:
    lines = [f"| I-BERT, one more repair a row | {' | '.join(KINDS)} | last hidden state from float |"]
    lines.append(f"|---|{'---|' * (len(KINDS) + 1)}")
    for name, rung in zip(("as shipped", *(name for name, _ in REPAIRS)), rungs):
        cells = (*map(_share, rung.apart.values()), f"{rung.end:.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _share(pair: tuple[float, int]) -> str:
    return f"{100 * pair[0]:.2f} %, {pair[1]}" if pair[1] else "0"


def report(at: Setting) -> str:
    found, figures = ladder(at), facts(at)
    wrong, right = (rung.apart["sums before LayerNorm, 22 bits"][1] for rung in found[:2])
    torch_version = torch.__version__.split("+")[0]
    parts = [
        "# Our integers and I-BERT's simulation",
        f"Written by `python benchmarks/ibert.py`, {datetime.date.today()}; torch {torch_version}, transformers "
        f"{transformers.__version__}, NumPy {np.__version__}. Random weights and ids from fixed seeds; no times. On "
        "another CPU float32 sums may move a few codes.",
        SETTING.format(seed=SEED, forwards=FORWARDS, **SIZES),
        "## Each site, fed I-BERT's codes",
        "Distances in steps of the site, where the exact value lies in its grid; rounding alone costs 0.25 on average, "
        "0.50 at most. *Exact* is the function in float64 of the codes that enter and of our 8-bit weights.",
        "\n".join(local_lines(local(at))),
        "## Causes",
        "Share of codes that are not ours, and by how many steps at most, fed the same codes; in the last column the "
        "mean distance of I-BERT's last hidden state from the float model, end to end, in steps.",
        "\n".join(ladder_lines(found)),
        CAUSES.format(wrong=wrong, right=right, **{**figures, "cut": 100 * figures["cut"]}),
        "## Coarse steps",
        "Softmax (64 keys, scores of standard deviation 2) and GELU (-6 to 6) alone, I-BERT in float64: largest error.",
        "\n".join(coarse_scales()),
        COARSE,
        "## End to end",
        "Mean distance from the float model in steps of the site, each model on its own.",
        "\n".join(end_to_end(at)),
        "## Conclusions",
        CONCLUSIONS,
    ]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    Path(__file__).with_suffix(".md").write_text(report(setting(SIZES)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
