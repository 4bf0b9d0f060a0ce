"""The commands that use a finished model on text: `fill-mask`, `generate` and `evaluate`."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from fastlm import _threads
from fastlm.terminal import say

Data = Annotated[list[str], typer.Option("--data", metavar="PATH...", help="Text: files, directories, globs.")]


def fill_mask(
    text: Annotated[str, typer.Argument(help="Text with the model's mask token, as [MASK], once or more.")],
    model: Annotated[Path, typer.Option(help="A model's directory, as OUT/hf.")],
    top: Annotated[int, typer.Option(min=1, help="How many candidates.")] = 5,
) -> None:
    """Show what a model would put in place of each mask."""
    from fastlm.fill_mask import fill_mask as fill

    _threads.for_work()
    for place, candidates in enumerate(fill(model, text, top=top)):
        if place:
            typer.echo()
        for candidate in candidates:
            typer.echo(f"{candidate.probability:7.1%}  {candidate.token:<16}  {candidate.text}")


def generate(
    model: Annotated[Path, typer.Option(help="A GPT-2's or T5's directory, as OUT/hf.")],
    prompt: Annotated[str | None, typer.Option(help="Text to continue (GPT-2), or to answer (T5).")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="PATH...", help='Files of prompts instead: a line each, or JSONL\'s "prompt".'),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON lines to write, one a prompt.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0: the most probable token; else tokens are drawn.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from so many likeliest tokens. 0: from all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens with this probability. 1: all.")] = 1.0,
    num_beams: Annotated[int, typer.Option(help="Beam search with so many. 1: none.")] = 1,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer; again for more.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 8,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; else a GPU where there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    weights: Annotated[
        str | None, typer.Option(help="On a CPU, float32 weights read as bfloat16 or int8: faster, rounded.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE...", help="Any setting of generation, as repetition_penalty=1.2."),
    ] = None,
) -> None:
    """Write text: a prompt's as it comes, or answers to the prompts of a file. Speed goes to standard error."""
    from fastlm.run.recipe import parse_settings

    if (prompt is None) == (not data):
        raise ValueError(
            "--prompt: expected this, or --data with a file of prompts, got " + ("both" if data else "none")
        )
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype: expected float32, bfloat16 or float16, got {dtype!r}")

    import torch

    from fastlm.chip import parse_device
    from fastlm.generate import Settings, files

    _threads.for_work()
    device = parse_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    prompts = files.read_prompts(data) if data else [files.Prompt(prompt, "--prompt")]
    writer = files.Writer.load(model, device=device, dtype=getattr(torch, dtype))
    options = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "num_beams": num_beams,
        "stop": stop or (),
        "seed": seed,
        "weights": weights,
        **parse_settings(settings or []),
    }
    if unknown := sorted(options.keys() - Settings.__dataclass_fields__.keys()):
        raise ValueError(f"{unknown[0]}: expected one of {', '.join(Settings.__dataclass_fields__)}")
    speed = files.Speed()
    if not (data or out or as_json) and options["num_beams"] == 1:
        for piece in writer.pieces(prompts[0], speed, **options):
            print(piece, end="", flush=True)
        print()
    else:
        answers = writer.answers(prompts, batch, speed, **options)
        first = next(answers)  # before --out is written, which a wrong option would leave empty
        with out.open("w", encoding="utf-8") if out else contextlib.nullcontext(sys.stdout) as target:
            for asked, answer in itertools.chain([first], answers):
                text = asked.text + answer.text if writer.continues else answer.text
                print(files.as_json(asked, answer) if out or as_json else text, file=target, flush=True)
    say(str(speed), sys.stderr)


def evaluate(
    model: Annotated[str, typer.Option(help="A model: a run, a checkpoint, or a Hugging Face directory.")],
    data: Data,
    documents: Annotated[str, typer.Option(help="A document of a text file: file, line, blank.")] = "file",
    field: Annotated[str, typer.Option(help="Of JSON lines and tables: the name of the text.")] = "text",
    window: Annotated[int | None, typer.Option(help="Tokens of a window. Default: as trained.")] = None,
    stride: Annotated[int | None, typer.Option(help="GPT-2: from window to window. Default: half of it.")] = None,
    share: Annotated[float | None, typer.Option(help="BERT: of the tokens to mask. Default: about 4096.")] = None,
    ends: Annotated[bool, typer.Option("--ends/--no-ends", help="GPT-2: predict ends of documents too.")] = True,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of a forward.")] = 4096,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; else a GPU where there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure how well a model predicts a text.

    GPT-2: perplexity and bits a byte; BERT: pseudo-perplexity; T5: the loss of span corruption.
    """
    import torch

    from fastlm.evaluate import describe
    from fastlm.evaluate import evaluate as measure

    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"--dtype: expected float32 or bfloat16, got {dtype!r}")
    _threads.for_work()
    result = measure(
        model,
        data,
        documents=documents,
        fields=tuple(name.strip() for name in field.split(",")),
        window=window,
        stride=stride,
        share=share,
        ends=ends,
        batch_tokens=batch_tokens,
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        dtype=getattr(torch, dtype),
    )
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    for line in describe(result):
        say(line)
