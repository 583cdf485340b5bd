"""What a student needs of the Hugging Face Trainer: to know how far the run is, and folders that can be loaded."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from .files import write_folder
from .train import tell


class StudentCallback(TrainerCallback):
    """``Trainer(model=kd, callbacks=[kq.StudentCallback()])``, where ``kd`` may be a qat model as well.

    Before each step it sets ``kd.progress``, which a two-stage loss goes by. Into each checkpoint it writes the
    student's own folder, ``checkpoint-N/qat``, whole or not at all, with the Trainer's ``processing_class`` as
    tokenizer: of a model that is not transformers' own the Trainer saves weights alone. Nothing but that folder is
    added, so the Trainer resumes as ever. A hyperparameter search has checkpoints elsewhere; they get no such folder.
    """

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        tell(given["model"], state.global_step / state.max_steps)

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.should_save and checkpoint.is_dir():
            save = partial(given["model"].save_pretrained, tokenizer=given["processing_class"])
            write_folder(checkpoint / "qat", save)
