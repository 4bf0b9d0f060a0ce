"""`fastlm finetune TASK`, a command for each task on labelled examples, and `fastlm predict`."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
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

_CONLL = (".conll", ".iob", ".bio")

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
        dtype: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16. Default: auto.")] = None,
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


def predict(
    model: Annotated[Path, typer.Option(help="OUT of a fine-tuning, its OUT/hf, or a Hugging Face directory.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data", metavar="PATH...", help="Texts: CSV, JSONL, Parquet, a text a line. Default: - (stdin)."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON lines to write. Default: the terminal.")] = None,
    text: Text = None,
    header: Annotated[bool, typer.Option(help="Whether the first line of a CSV file names its columns.")] = True,
    null_threshold: Annotated[
        float | None,
        typer.Option(help="Of answers: how much more none has to score than the best one. Default: the run's."),
    ] = None,
    squad: Annotated[Path | None, typer.Option(help="Of answers: SQuAD's file of predictions, to write too.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; else a GPU where there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
) -> None:
    """Write what a fine-tuned model says of each text or question, with probabilities, as JSON lines."""
    import torch

    from fastlm import predict as predicting
    from fastlm.chip import parse_device
    from fastlm.data.labelled import stream_records
    from fastlm.data.labelled.squad import stream_rows
    from fastlm.data.sources import Report
    from fastlm.data.sources.files import inner_suffix
    from fastlm.models import BertForQuestionAnswering
    from fastlm.predict_answers import AnswerPredictor
    from fastlm.storage import atomic_file, replace_json

    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"--dtype: expected float32 or bfloat16, got {dtype!r}")
    _threads.for_work()
    device = parse_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    report, paths, began = Report(), data or ["-"], time.perf_counter()
    architecture = predicting.architecture_of(predicting.model_directory(model))
    questions, options = architecture == BertForQuestionAnswering.architecture, {"device": device}
    given = {"--text": text} if questions else {"--null-threshold": null_threshold, "--squad": squad}
    for flag, value in given.items():
        if value is not None:
            raise ValueError(f"{flag}: expected none for the {architecture} in {model}, got {value}")
    options["dtype"] = getattr(torch, dtype)
    if questions:
        predictor, reader = AnswerPredictor(model, null_threshold=null_threshold, **options), stream_rows
    else:
        predictor = predicting.Predictor(model, text="" if text is None else ",".join(text), **options)
        plain = "conll" if predictor.tags and all(inner_suffix(Path(path)) in _CONLL for path in paths) else "line"
        column = predictor.text if predictor.text and "," not in predictor.text else "text"
        reader = partial(stream_records, names={}, plain=plain, header=header, column=column)
    answers = {}
    with ExitStack() as stack:
        spool = stack.enter_context(tempfile.TemporaryDirectory())
        file = sys.stdout
        if out is not None:
            path = stack.enter_context(atomic_file(out, what="the predictions"))
            file = stack.enter_context(open(path, "w", encoding="utf-8"))
        for said in predictor.predict(reader(paths, report, spool=spool), report):
            print(json.dumps(said, ensure_ascii=False), file=file)
            if squad is not None:
                answers[said["id"]] = said["answer"]
    predicting.describe(predictor, report, time.perf_counter() - began, lambda line: print(line, file=sys.stderr))
    if not report.kept:
        raise ValueError(f"data: expected texts, found none in {' '.join(paths)} ({report.reasons()})")
    if squad is not None:
        replace_json(squad, answers, what="SQuAD's predictions")
