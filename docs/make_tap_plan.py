"""The tap plan of a MiniLM-sized student of BERT-base, as docs/tap_plan.json and docs/tap_plan.svg.

python docs/make_tap_plan.py            a minute; weights do not matter to a plan, so they are random
python docs/make_tap_plan.py --layer-map top --out /tmp/plan
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import BertConfig, BertForSequenceClassification

import kdlsq_fx as kq

STUDENT = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer-map", default="uniform", help="uniform, top, skip or hsk:L")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("tap_plan"), help="without its ending")
    args = parser.parse_args()
    student, teacher = (BertForSequenceClassification(BertConfig(**size)) for size in (STUDENT, {}))
    plan = kq.plan_taps(student, teacher, layer_map=args.layer_map)
    print(plan)
    print(plan.save(args.out.with_suffix(".json")), plan.draw(args.out.with_suffix(".svg")))


if __name__ == "__main__":
    main()
