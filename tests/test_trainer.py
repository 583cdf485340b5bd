"""A qat model and a distiller in other people's loops: the Hugging Face Trainer, accelerate, and the tour."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import tiny
from safetensors.torch import load_file
from test_docs import blocks, run
from tiny_glue import bert, tokenizer, write_model, write_sst

import kdlsq_fx as kq

pytest.importorskip("accelerate")


def rows(count: int = 24) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(count):
        ids = torch.randint(3, 99, (8,), generator=generator)
        made.append({"input_ids": ids, "attention_mask": torch.ones(8).long(), "labels": torch.tensor(i % 2)})
    return made


def prepared():
    model = tiny("bert").eval()
    qat = kq.prepare_qat(model, "W4E4A8")
    batch = {k: torch.stack([r[k] for r in rows(8)]) for k in ("input_ids", "attention_mask")}
    kq.calibrate(qat, [batch], progress=False)
    return model, qat


@pytest.mark.parametrize("distilled", [False, True])
def test_the_trainer_trains_saves_and_evaluates(tmp_path, distilled):
    from transformers import Trainer, TrainingArguments

    teacher, qat = prepared()
    model = kq.distill(qat, teacher) if distilled else qat
    before = {k: v.clone() for k, v in qat.state_dict().items()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=8, report_to=[], use_cpu=True,
        save_steps=3, logging_steps=1, learning_rate=1e-3, disable_tqdm=True,
    )  # fmt: skip
    data = {"train_dataset": rows(), "eval_dataset": rows(8)}
    trainer = Trainer(model=model, args=arguments, callbacks=[kq.StudentCallback()], **data)
    result = trainer.train()
    assert result.training_loss > 0
    moved = [k for k, v in qat.state_dict().items() if not torch.equal(v, before[k])]
    assert any(k.endswith("_lsq.raw") for k in moved) and any(k.endswith("dense.weight") for k in moved)
    if not distilled:
        assert "eval_loss" in trainer.evaluate()
    saved = tmp_path / "checkpoint-3"
    assert (saved / "model.safetensors").is_file() and not any("teacher" in k for k in qat.state_dict())
    some = {k: torch.stack([r[k] for r in rows(4)]) for k in ("input_ids", "attention_mask")}
    assert kq.convert(qat)(**some)

    want = qat.eval()(**some).logits
    assert torch.equal(kq.from_pretrained(saved / "qat")(**some).logits, want) and not list(saved.glob(".*"))
    with pytest.raises(kq.KdlsqError, match="give .*checkpoint-3/qat"):
        kq.from_pretrained(saved)
    shutil.rmtree(saved / "qat")  # as after a training without the callback; then what the error says to do
    name = "kd" if distilled else "qat"
    with pytest.raises(
        kq.KdlsqError, match=rf"Trainer: weights of a {name},(.|\n)*{name}.load_state_dict.*StudentCall"
    ):
        kq.from_pretrained(saved)
    again = kq.prepare_qat(tiny("bert"), "W4E4A8")
    again = kq.distill(again, teacher) if distilled else again
    again.load_state_dict(load_file(saved / "model.safetensors"))
    again.save_pretrained(saved / "qat")
    assert torch.equal(kq.from_pretrained(saved / "qat")(**some).logits, want)


def test_the_first_process_alone_writes_the_students_folder(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    qat, state = prepared()[1], SimpleNamespace(global_step=3)
    for should_save in (False, True):
        arguments = SimpleNamespace(output_dir=str(tmp_path), should_save=should_save)
        kq.StudentCallback().on_save(arguments, state, None, model=qat, processing_class=tokenizer())
        assert (tmp_path / "checkpoint-3" / "qat" / "tokenizer.json").is_file() is should_save
        assert (tmp_path / "checkpoint-3" / "qat" / "kdlsq.json").is_file() is should_save


def test_a_two_stage_loss_goes_by_the_callback_and_resumes_in_its_stage(tmp_path):
    from transformers import Trainer, TrainingArguments

    def trained(resume, *callbacks):
        teacher, qat = prepared()
        kd, terms = kq.distill(qat, teacher, schedule="two-stage", share=0.5), []
        kd.register_forward_hook(lambda _, __, out: terms.append(set(out.parts)))
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, gradient_accumulation_steps=2,
            report_to=[], use_cpu=True, save_steps=2, learning_rate=1e-3, disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = Trainer(model=kd, args=arguments, train_dataset=rows(), callbacks=[*callbacks])
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resume else None)
        return qat.state_dict(), terms

    with pytest.raises(kq.KdlsqError, match=r"callbacks=\[kq\.StudentCallback\(\)\]"):
        trained(False)
    (whole, terms), (resumed, rest) = (trained(resume, kq.StudentCallback()) for resume in (False, True))
    assert terms == 4 * [{"hidden", "attention"}] + 4 * [{"logits"}] and rest == terms[4:]
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, msg=name, atol=0, rtol=0)


def test_the_script_on_the_page_about_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "runs/train/fp32")
    write_sst(tmp_path / "data")
    (code,) = blocks("docs/training.md")
    known = run(code, {})
    state, rates = known["trainer"].state, {g["initial_lr"] for g in known["optimizer"].param_groups}
    assert state.global_step == state.max_steps == 9 and len(rates) > 2
    some = known["pad"](known["rows"][:5])
    want = known["qat"].eval()(**some).logits
    (checkpoint,) = (tmp_path / "runs/trainer").glob("checkpoint-*")
    for folder in (tmp_path / "runs/trainer/qat", checkpoint / "qat"):
        assert torch.equal(kq.from_pretrained(folder)(**some).logits, want) and (folder / "tokenizer.json").is_file()
    assert kq.from_pretrained(tmp_path / "runs/trainer/int")(**some).logits.shape == want.shape


def test_rows_of_two_tokenizers_under_the_trainer(tmp_path):
    """The collator on the page about distillation, on texts that the two sides cut into different numbers of tokens."""
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    teacher = bert(vocab_size=60).eval()
    theirs = tokenizer()
    theirs.add_tokens(["good film", "bad film"])
    qat = kq.prepare_qat(bert(), "W8E8A8")
    (code,) = (c for c in blocks("docs/distillation.md") if "def collate" in c)
    names = {"DataCollatorWithPadding": DataCollatorWithPadding, "tokenizer": tokenizer(), "teacher_tokenizer": theirs}
    known = run(code, names)
    data = [known["read"](text, i % 2) for i, text in enumerate(["a good film", "the plot was very bad", "dull"] * 4)]
    batch = known["collate"](data[:3])
    assert batch["input_ids"].shape == (3, 7) and batch["labels"].tolist() == [0, 1, 0]
    assert batch["attention_mask"].sum(1).tolist() == [5, 7, 3]
    assert batch["teacher_attention_mask"].sum(1).tolist() == [4, 7, 3]
    kq.calibrate(
        qat, [known["pad"]([{k: r[k] for k in ("input_ids", "attention_mask")} for r in data])], progress=False
    )
    kd = kq.distill(qat, teacher, plan=kq.plan_taps(qat, teacher), pooled=1.0)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=6, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=kd, args=arguments, train_dataset=data, data_collator=known["collate"])
    assert trainer.train().training_loss > 0


@pytest.mark.parametrize("distilled", [False, True])
def test_tied_weights_are_saved_once_and_resumed(tmp_path, distilled):
    from transformers import BertConfig, BertForMaskedLM, Trainer, TrainingArguments

    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 1}

    def trained(resume):
        torch.manual_seed(0)
        teacher = BertForMaskedLM(BertConfig(vocab_size=99, **sizes)).eval()
        qat = kq.prepare_qat(teacher, "W4E4A8")
        data = [{**r, "labels": r["input_ids"]} for r in rows()]
        kq.calibrate(qat, [{k: torch.stack([r[k] for r in data[:8]]) for k in ("input_ids", "attention_mask")}])
        model = kq.distill(qat, teacher, gold=1.0) if distilled else qat
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=8, report_to=[], use_cpu=True,
            save_steps=2, logging_steps=1, learning_rate=1e-3, disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resume else None)
        return qat.state_dict()

    whole, resumed = trained(False), trained(True)
    assert len({t.data_ptr() for t in whole.values() if t.numel()}) == len([t for t in whole.values() if t.numel()])
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, msg=name)


@pytest.mark.parametrize("distilled", [False, True])
def test_accumulated_steps_are_steps_on_the_whole_batch(tmp_path, distilled):
    """The loss is a mean over the batch: the Trainer has to divide it by the number of steps it accumulates."""
    from transformers import Trainer, TrainingArguments

    def trained(steps):
        model = tiny("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).eval()
        qat = kq.prepare_qat(model, "W8E8A8")
        data = {k: torch.stack([r[k] for r in rows(8)]) for k in ("input_ids", "attention_mask")}
        kq.calibrate(qat, [data], progress=False)
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=8 // steps, optim="sgd", seed=0,
            gradient_accumulation_steps=steps, report_to=[], use_cpu=True, save_strategy="no", logging_steps=1,
            learning_rate=1e-2, max_grad_norm=0, lr_scheduler_type="constant", disable_tqdm=True,
        )  # fmt: skip
        loop = kq.distill(qat, model, gold=1.0) if distilled else qat
        trainer = Trainer(model=loop, args=arguments, train_dataset=rows(16))
        trainer.train()
        return qat, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    (whole, losses), (parts, sums) = trained(1), trained(4)
    torch.testing.assert_close(torch.tensor(sums), torch.tensor(losses), atol=1e-3, rtol=0)
    before = tiny("bert").classifier.weight
    moved = (whole.gm.classifier.weight - before).detach()
    torch.testing.assert_close(parts.gm.classifier.weight - before, moved, atol=float(moved.abs().max()) / 50, rtol=0)


def test_accelerate():
    from accelerate import Accelerator

    _, qat = prepared()
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(kq.param_groups(qat, lr=1e-3))
    loader = torch.utils.data.DataLoader(rows(), batch_size=8)
    model, optimizer, loader = accelerator.prepare(qat.train(), optimizer, loader)
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    assert torch.isfinite(loss)


def test_the_tour_runs(capsys):
    runpy.run_path(str(Path(__file__).parents[1] / "docs" / "tour.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert "the loaded int folder gives the same logits: True" in out
