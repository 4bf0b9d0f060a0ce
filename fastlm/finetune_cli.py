"""`fastlm finetune TASK`: a command for each task on labelled examples."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from fastlm import _threads
from fastlm.terminal import width_of

# The task of a command, and what it does.
TASKS = {
    "classify": "Put texts, or pairs of texts, into classes: one each, or several labels.",
    "regress": "Predict a number for each text or pair of texts.",
    "tag": "Label each word, as entities in IOB2.",
    "answer": "Answer questions by spans of a text; SQuAD's JSON, or rows.",
    "seq2seq": "Write a target text for each source text, with T5.",
    "causal": "Write an answer to each prompt, with GPT-2: the loss is on the answer alone.",
}

Data = Annotated[
    list[str],
    typer.Option(
        "--data", metavar="PATH...", help="Labelled CSV, TSV, JSONL, Parquet, CoNLL, a file or directory a class."
    ),
]
Text = Annotated[
    list[str] | None, typer.Option("--text", metavar="COLUMN...", help="Column of the text; two of pairs.")
]
Label = Annotated[list[str] | None, typer.Option("--label", metavar="COLUMN...", help="Column of the label.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE...", help="Any key of the recipe, as train.patience=2."),
]


def add_commands(app: typer.Typer) -> None:
    """A command for each of TASKS."""
    for task, what in TASKS.items():
        app.command(task, help=f"{what} `fastlm recipe {task}` prints all settings.")(_command(task))


def _command(task: str) -> Callable:
    def finetune(
        model: Annotated[
            str, typer.Option(help="What to start from: a run, a checkpoint, or a Hugging Face directory.")
        ],
        data: Data,
        out: Annotated[Path, typer.Option(help="Directory of the run.")],
        text: Text = None,
        label: Label = None,
        validation: Annotated[
            str | None, typer.Option(help="Examples to evaluate on, a path. Default: a tenth of --data.")
        ] = None,
        test: Annotated[str | None, typer.Option(help="Examples to test the best checkpoint on, a path.")] = None,
        epochs: Annotated[float | None, typer.Option(help="Default: 3.")] = None,
        batch_size: Annotated[int | None, typer.Option(help="Examples a step. Default: 32.")] = None,
        lr: Annotated[float | None, typer.Option(help="Peak learning rate. Default: 5e-5.")] = None,
        max_length: Annotated[int | None, typer.Option(help="Tokens of an example; longer ones are cut.")] = None,
        seed: Annotated[int | None, typer.Option(help="Of the head's weights, order and dropout.")] = None,
        seeds: Annotated[
            int, typer.Option(min=1, help="Train with so many seeds, from --seed on, and print mean and spread.")
        ] = 1,
        device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; else a GPU where there is one.")] = None,
        dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16.")] = None,
        settings: Settings = None,
        resume: Annotated[str, typer.Option(help="auto: continue the run in OUT. never: OUT must hold none.")] = "auto",
        log: Annotated[list[str] | None, typer.Option(help="tensorboard or wandb gets the metrics too.")] = None,
    ) -> None:
        from fastlm.run.recipe import Recipe

        flags = {
            "data.text": None if text is None else ",".join(text),
            "data.label": None if label is None else ",".join(label),
            "data.validation": validation,
            "data.test": test,
            "data.max_length": max_length,
            "train.epochs": epochs,
            "train.batch_size": batch_size,
            "train.lr": lr,
            "train.seed": seed,
            "train.dtype": dtype,
        }
        recipe = Recipe(task, name=task).with_settings(settings or [])
        recipe = recipe.with_values({key: value for key, value in flags.items() if value is not None})

        import torch

        from fastlm.train.finetune import finetune, finetune_seeds

        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        _threads.for_work()
        options = {"device": device, "resume": resume, "log": log or ()}
        if seeds == 1:
            results = [finetune(recipe, model, data, out, **options)]
        else:
            first = recipe.train.seed
            results = finetune_seeds(recipe, model, data, out, range(first, first + seeds), **options)
        if results[-1].stopped_by is not None:
            sys.exit(128 + results[-1].stopped_by)
        if os.environ.get("RANK", "0") == "0":
            from fastlm.run.reports import report_table

            typer.echo(report_table(out, width_of(sys.stdout)))

    finetune.__name__ = task
    return finetune
