"""The process that one contender of a fine-tuning runs in.

    python -m fastlm.bench.finetune_worker NAME SPEC

SPEC is a JSON file that fastlm/bench/finetuning.py writes. The process answers {"ready": true}, then reads lines:
"time N" trains N + 1 steps and answers {"seconds": a step, the first one aside, "losses"}; "finish" trains to the end,
evaluates, and answers {"seconds": of training, "figures": on the held-out examples}.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from fastlm import _malloc
from fastlm.data.labelled import Examples
from fastlm.run.initial import find_initial
from fastlm.run.labelled import open_examples
from fastlm.run.recipe import Recipe
from fastlm.tasks import find_task
from fastlm.tasks._labelled import LabelledTask
from fastlm.train.ahead import ahead
from fastlm.train.evaluation import evaluation
from fastlm.train.optimizer import lr_at, make_optimizer, train_step

# Whether the allocator is tuned, and Transformers' TrainingArguments beside the recipe's; None: fastlm.
CONTENDERS = {
    "fastlm": (True, None),
    "transformers": (False, {}),
    "transformers tuned": (True, {"optim": "adamw_torch_fused"}),
    "transformers tuned, grouped": (
        True,
        {"optim": "adamw_torch_fused", "train_sampling_strategy": "group_by_length"},
    ),
}
HEADS = {
    "classify": "AutoModelForSequenceClassification",
    "regress": "AutoModelForSequenceClassification",
    "tag": "AutoModelForTokenClassification",
}


def opened(spec: dict) -> tuple[LabelledTask, object]:
    """(the task with its examples, the Initial of the model)"""
    initial = find_initial(spec["model"])
    recipe = Recipe(spec["task"], name=spec["task"]).with_settings(["train.dtype=float32", *spec["settings"]])
    recipe, found = open_examples(initial.recipe(recipe), spec["data"], initial.tokenizer, initial.labels())
    return find_task(spec["task"])(recipe, found.train, torch.device("cpu"), found.validation), initial


def fastlm_losses(task: LabelledTask, model) -> Iterator[float]:
    """The loss of each step."""
    table = task.recipe.train
    optimizer, dtype = make_optimizer(model.train(), table), getattr(torch, table.dtype)
    for step, micros in ahead(task, range(task.recipe.micro_count), 0, table.max_steps):
        result = train_step(model, optimizer, micros, lr=lr_at(step, table), grad_clip=table.grad_clip, dtype=dtype)
        yield result[0].item()


def rows_of(data: Examples) -> list[dict]:
    """Examples as Transformers' collators take them."""
    rows, labels = [], data.fields["labels"]
    for number in range(data.rows):
        at = np.array([number])
        row = {"input_ids": data.ids.take(at).tolist()}
        if (types := data.fields.get("token_type_ids")) is not None:
            row["token_type_ids"] = types.take(at).tolist()
        row["labels"] = labels.take(at).tolist() if hasattr(labels, "offsets") else labels[number].tolist()
        rows.append(row)
    return rows


class Gate:
    """Lets a training run on as commands come, and answers them; `step(loss)` at the end of each step."""

    def __init__(self, answers):
        self._answers, self._left, self._losses, self.began = answers, 0, [], 0.0

    def answer(self, **content) -> None:
        print(json.dumps(content), file=self._answers, flush=True)

    def wait(self) -> None:
        """Before the first step, and where the steps of a command are done."""
        line = sys.stdin.readline().split()
        if not line:
            sys.exit(0)
        self._left, self._losses = (int(line[1]) + 1 if line[0] == "time" else -1), []
        self._count, self.began = self._left - 1, time.perf_counter()

    def step(self, loss: float | None) -> None:
        if loss is not None:
            self._losses.append(loss)
        self._left -= 1
        if self._left == self._count:  # after the first step, which finds the caches full of other processes' data
            self.began = time.perf_counter() if self._left > 0 else self.began
        if self._left == 0:
            seconds = (time.perf_counter() - self.began) / self._count
            self.answer(seconds=seconds, losses=self._losses)
            self.wait()


def run_fastlm(task: LabelledTask, initial, gate: Gate) -> None:
    model = initial.model(task.recipe, task.dataset.tokenizer, task.head())
    gate.answer(ready=True)
    gate.wait()
    for loss in fastlm_losses(task, model):
        gate.step(loss)
    seconds = time.perf_counter() - gate.began
    gate.answer(seconds=seconds, figures=evaluation(model, task, getattr(torch, task.recipe.train.dtype)).figures)


def run_transformers(task: LabelledTask, spec: dict, options: dict, gate: Gate) -> None:
    import transformers

    table, head = task.recipe.train, task.head()
    names = dict(enumerate(head["labels"]))
    extra = {"problem_type": head["problem_type"]} if "problem_type" in head else {}
    config = task.recipe.model
    dropout = {of.name: getattr(config, of.name) for of in config.settings() if "drop" in of.name}
    transformers.set_seed(table.seed)
    model = getattr(transformers, HEADS[spec["task"]]).from_pretrained(
        spec["model"], id2label=names, label2id={name: i for i, name in names.items()}, **extra, **dropout
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(spec["model"])
    collators = transformers.DataCollatorWithPadding, transformers.DataCollatorForTokenClassification

    class Gated(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            gate.answer(ready=True)
            gate.wait()

        def on_step_end(self, *_, **__):
            gate.step(None)

        def on_train_end(self, *_, **__):
            self.seconds = time.perf_counter() - gate.began

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder,
            per_device_train_batch_size=table.batch_size,
            per_device_eval_batch_size=table.batch_size,
            learning_rate=table.lr,
            max_steps=table.max_steps,
            warmup_steps=table.warmup_steps,
            weight_decay=table.weight_decay,
            adam_beta2=table.beta2,
            adam_epsilon=table.eps,
            max_grad_norm=table.grad_clip,
            bf16=table.dtype == "bfloat16",
            seed=table.seed,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_strategy="no",
            **options,
        )
        gated = Gated()
        trainer = transformers.Trainer(
            model,
            arguments,
            train_dataset=rows_of(task.dataset),
            data_collator=collators[spec["task"] == "tag"](tokenizer),
            callbacks=[gated],
        )
        trainer.train()
        outputs = their_outputs(trainer, task)
    gate.answer(seconds=gated.seconds, figures={f"val_{k}": v for k, v in task.scores(outputs).items()})


def their_outputs(trainer, task: LabelledTask) -> np.ndarray:
    """Logits of the held-out examples as `task.scores` takes them."""
    found = trainer.predict(rows_of(task.validation))
    logits, labels = found.predictions, found.label_ids
    return logits[labels != -100] if logits.ndim == 3 else logits


def main() -> None:
    name, spec = sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries may print
    warnings.filterwarnings("ignore", message="left out|the head starts anew")
    tuned, options = CONTENDERS[name]
    if tuned:
        _malloc.tune()
    torch.set_num_threads(spec["threads"])
    task, initial = opened(spec)
    gate = Gate(answers)
    if options is None:
        run_fastlm(task, initial, gate)
    else:
        run_transformers(task, spec, options, gate)


if __name__ == "__main__":
    main()
