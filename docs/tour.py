"""The whole idea in one file: capture, quantize, calibrate, distil, convert, export, compare. Runs in CI in seconds.

Run it with ``python docs/tour.py``. The model is a random two-layer BERT, so the figures show agreement, not accuracy.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification

import kdlsq_fx as kq

aten = torch.ops.aten


def batches(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Random ids of random lengths, padded, as a tokenizer would hand them over."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        lengths = torch.randint(4, 17, (8, 1), generator=generator)
        mask = (torch.arange(16)[None] < lengths).long()
        ids = torch.randint(5, 200, (8, 16), generator=generator) * mask
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


@kq.graph_pass("float")
def count_linears(gm: torch.fx.GraphModule) -> None:
    """graph -> the same graph; a pass may also only look"""
    print("a user's pass sees", len(gm.graph.find_nodes(op="call_function", target=aten.linear.default)), "linears")


def main() -> None:
    # 1. A teacher: any Hugging Face encoder. It is never changed.
    torch.manual_seed(0)
    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    teacher = BertForSequenceClassification(BertConfig(vocab_size=200, **size)).eval()

    # 2. float -> qat. A preset names bits of weights, embeddings and activations; rules in front of it win.
    trace = kq.Trace()
    qat = kq.prepare_qat(teacher, "W4E4A8", passes=[count_linears], trace=trace)
    print(trace)
    print("\n".join(qat.table().splitlines()[:12]), "\n...")

    # 3. Scales of activations come from data, before the optimizer is built.
    kq.calibrate(qat, batches(4, seed=1), progress=False)

    # 4. Distil: taps are matched by name and by graph; the loss is KDLSQ's.
    kd = kq.distill(qat, teacher)
    optimizer = torch.optim.AdamW(kq.param_groups(qat, lr=1e-4))
    kd.train()
    for batch in batches(10, seed=2):
        out = kd(**batch)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    print("last loss", float(out.loss))
    qat.eval()

    # 5. qat -> int: integer products; what stays float is listed with its reason.
    int_model = kq.convert(qat)
    test = batches(1, seed=3)[0]
    with torch.no_grad():
        trained = qat(**test).logits
    integer = int_model(**test).logits
    print("integer logits differ by", float((trained - torch.as_tensor(integer)).abs().max()))
    print(kq.compare(qat, int_model, test))

    # 6. The same trained quantizers as ONNX QDQ, and folders that load again.
    with tempfile.TemporaryDirectory() as folder:
        print(kq.export_onnx(qat, Path(folder) / "bert.onnx", target="ort-cpu"))
        qat.save_pretrained(Path(folder) / "qat")
        int_model.save_pretrained(Path(folder) / "int")
        again = kq.from_pretrained(Path(folder) / "int")
        same = torch.equal(torch.as_tensor(again(**test).logits), torch.as_tensor(integer))
        print("the loaded int folder gives the same logits:", same)


if __name__ == "__main__":
    main()
