"""The demo at W8, W4 and W2 side by side; writes benchmarks/demo.md and one JSON a preset under results/demo/.

    python benchmarks/demo.py --runs runs/demo      # about 7 minutes a preset; a run that is done is read

Each preset is what `./demo --qconfig PRESET` runs, in a folder of its own below ``--runs``. ``--report`` writes the
page from the JSONs alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from common import HERE, origin, say

from kdlsq_fx import demo
from kdlsq_fx.files import make_folder, write_json, write_text

RESULTS = HERE / "results" / "demo"
PRESETS = ("W8E8A8", "W4E4A8", "W2E2A8")
HEAD = "| preset | model | cosine to fp32 | top-10 overlap | MB on disk | ms per text |\n|---|---|---|---|---|---|"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=Path, default=Path("runs/demo"), help="folder of the runs")
    parser.add_argument("--report", action="store_true", help="only write demo.md again")
    args = parser.parse_args()
    make_folder(RESULTS)
    failed = 0
    for preset in () if args.report else PRESETS:
        folder = args.runs / preset
        if not (folder / "results.json").is_file():
            failed |= demo.run(demo.Options(out=folder, qconfig=preset))
        found = json.loads((folder / "results.json").read_text())
        del found["searches"]  # texts of the standard library
        write_json(RESULTS / f"{preset}.json", {**found, **origin()})
    write_text(HERE / "demo.md", page([json.loads((RESULTS / f"{p}.json").read_text()) for p in PRESETS]))
    say(f"written to {HERE / 'demo.md'}")
    return failed


def page(runs: list[dict[str, Any]]) -> str:
    corpus, recipe, last = runs[0]["settings"]["corpus"], runs[0]["settings"], runs[-1]
    lines = [
        "# The demo at 8, 4 and 2 bits",
        "",
        f"Written by `benchmarks/demo.py`. all-MiniLM-L6-v2, distilled without labels on {corpus['train']} paragraphs,",
        f"measured on {corpus['held_out']} others; {recipe['steps']} steps of {recipe['batch']} texts, seed"
        f" {recipe['seed']}. Latency is that of one text at a time, of",
        "each row at another time; the integer rows run on NumPy, which is there to be right.",
        "",
        HEAD,
    ]
    for i, run in enumerate(runs):
        for row in run["rows"][i > 0 :]:  # fp32 once
            name = "–" if row["name"] == "fp32" else run["settings"]["qconfig"]
            figures = f"{row['cosine']:.4f} | {row['overlap']:.3f} | {row['bytes'] / 1e6:.1f} | {row['ms']:.1f}"
            lines.append(f"| {name} | {row['name']} | {figures} |")
    lines += ["", "| check | " + " | ".join(PRESETS) + " |", "|---" * (len(PRESETS) + 1) + "|"]
    for checks in zip(*(run["checks"] for run in runs)):
        seen = (c["seen"] if c["holds"] else f"**{c['seen']}** (wanted: {c['wanted']})" for c in checks)
        lines.append(f"| {checks[0]['what']} | " + " | ".join(seen) + " |")
    took = ", ".join(f"{r['settings']['qconfig']} {r['training']['seconds']:.0f} s" for r in runs)
    versions = "; ".join(f"{k} {v}" for k, v in last["versions"].items())
    where = f"{last['machine']}, {last['cores']} cores; {last['date']}; commit {last['commit']}; {versions}."
    return "\n".join([*lines, "", f"Training took {took} on {last['threads']} threads.", "", where, ""])


if __name__ == "__main__":
    sys.exit(main())
