"""The `fastlm` command. Each subcommand imports what it needs when it runs, so that `--help` is quick."""

from __future__ import annotations

import difflib
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from fastlm import _malloc, _threads, finetune_cli, text_cli
from fastlm.terminal import say, width_of

_FINE_TUNING = "did you mean finetune, as fastlm finetune classify?"
_ELSEWHERE = dict.fromkeys(("fine-tune", "fine_tune", "sft"), _FINE_TUNING)  # no commands of fastlm's


class _Commands(TyperGroup):
    """Subcommands, and an error of one line for a name that is none: Typer would take "finetune" for "tune"."""

    def resolve_command(self, ctx, args):
        name = args[0]
        if name.startswith("-") or name in self.commands:
            return super().resolve_command(ctx, args)
        near = difflib.get_close_matches(name, self.commands, cutoff=0.75)
        hint = _ELSEWHERE.get(name) or (f"did you mean {' or '.join(near)}?" if near else "see fastlm --help")
        raise ValueError(f"command: expected one of {', '.join(self.commands)}, got {name!r}; {hint}")


app = typer.Typer(
    cls=_Commands,
    help="Pretrain and fine-tune Transformer language models on fused kernels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Options that take several values, `--data a b c`; everything up to the next option belongs to them.
_SEVERAL = ("--data", "--set", "--text", "--label")

DataOption = Annotated[
    list[str],
    typer.Option(
        "--data", metavar="PATH...", help="Text: files, directories, globs, -, hf:NAME; or `prepare` outputs."
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE...", help="Any key of the recipe, as train.lr=1e-3."),
]


@app.callback()
def _options(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
) -> None:
    pass


@app.command()
def info() -> None:
    """Show this machine, and which backend each op would run on it."""
    import fastlm.info

    _threads.for_work()
    typer.echo(fastlm.info.report())


@app.command()
def prepare(
    data: DataOption,
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    recipe: Annotated[
        str | None, typer.Option(help="Take task and data settings from this recipe; else those of masked_lm.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="train:N, bpe:N, unigram:N, chars, or a directory. Default: train:8192."),
    ] = None,
    row_tokens: Annotated[int | None, typer.Option(help="Length of a row of packed pieces. Default: 128.")] = None,
    documents: Annotated[
        str | None, typer.Option(help="A document of a text file: file, line, blank. Default: file.")
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="How many read and clean. Default: one a core, for more than 64 MiB of text."),
    ] = None,
    executor: Annotated[str, typer.Option(help="processes, or ray: the workers of a Ray cluster.")] = "processes",
    ray_address: Annotated[
        str, typer.Option(help="The cluster's head, as 10.0.0.1:6379. Default: one is started here.")
    ] = "",
    validation: Annotated[str | None, typer.Option(help="Text to evaluate on, a path.")] = None,
    validation_share: Annotated[
        float | None, typer.Option(help="Share of the documents to hold out for evaluation instead.")
    ] = None,
    settings: SetOption = None,
) -> None:
    """Clean and tokenize text, and pack it into rows that `pretrain` reads."""
    from fastlm.data.contents import cleaning_lines, counted, trained_on
    from fastlm.run.directory import prepare_for
    from fastlm.run.recipe import Recipe, load_recipe

    flags = {
        "tokenizer": tokenizer,
        "row_tokens": row_tokens,
        "documents": documents,
        "validation": validation,
        "validation_share": validation_share,
    }
    chosen = Recipe() if recipe is None else load_recipe(recipe)
    table = chosen.with_settings(settings or []).data_with(**{k: v for k, v in flags.items() if v is not None})
    dataset = prepare_for(
        chosen.task, table, data, out, processes=processes, executor=executor, ray_address=ray_address
    )
    report = dataset.manifest["report"]
    say(
        f"{out}: {counted(dataset.rows, 'row')} of {dataset.row_tokens} tokens from {report['kept']:,} of "
        f"{counted(report['read'], 'document')}, {' and '.join(f'{share:.0%}' for share in dataset.fill)} full; "
        f"vocabulary {dataset.tokenizer.vocab_size:,}, unigram entropy {dataset.unigram_entropy:.3f} nats"
    )
    if (held := dataset.manifest["validation"])["rows"]:
        say(f"  held out: {counted(held['rows'], 'row')} of {counted(held['documents'], 'document')}")
    if unknown := dataset.manifest.get("unknown"):  # older preparations did not count it
        say(f"  [UNK]: {unknown['tokens']:.2%} of the tokens, for {unknown['characters']:.2%} of the characters")
    for line in cleaning_lines(dataset):
        say(line)
    for line in trained_on(dataset):
        say(f"  {line}")


@app.command()
def data(
    directory: Annotated[Path, typer.Argument(help="What `fastlm prepare` wrote.")],
    rows: Annotated[int, typer.Option(min=0, help="How many rows to show as text.")] = 2,
    plot: Annotated[Path | None, typer.Option(help="PNG to write. Default: DIRECTORY.png, beside it.")] = None,
) -> None:
    """Show what is in prepared data: counts, lengths and fill, rows with their masks, and what was set aside."""
    from fastlm.data import open_dataset
    from fastlm.run.data_report import plot_contents, report

    dataset = open_dataset(directory)
    for line in report(dataset, rows):
        say(line)
    plot = plot or directory.absolute().with_name(directory.absolute().name + ".png")
    plot_contents(dataset, plot)
    say(f"lengths and fill: {plot}")


@app.command()
def pretrain(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, as bert-mini, or the path of a TOML file.")],
    data: DataOption,
    out: Annotated[Path, typer.Option(help="Directory of the run.")],
    tokenizer: Annotated[str | None, typer.Option(help="train:N or a directory; else the recipe's.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Same as --set train.max_steps=N.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same as --set train.seed=S.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; else a GPU where there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16; same as --set train.dtype=...")] = None,
    settings: SetOption = None,
    resume: Annotated[
        str,
        typer.Option(
            help="auto: continue the run in OUT, if there is one. never: OUT must hold none. Another run's directory "
            "or checkpoint: start a run in OUT from there; the same command again continues that one."
        ),
    ] = "auto",
    init: Annotated[
        str | None,
        typer.Option(
            help="A model to start from, with its tokenizer: a run, a checkpoint, or a Hugging Face directory."
        ),
    ] = None,
    log: Annotated[
        list[str] | None,
        typer.Option(help="tensorboard or wandb gets the metrics too; again for both. A resumed run may have others."),
    ] = None,
) -> None:
    """Pretrain a model; the finished one lies in OUT/hf, for `AutoModel.from_pretrained`.

    SIGTERM and Ctrl-C write a checkpoint first; the exit status is then 143 or 130, and the same command resumes.
    """
    from fastlm.run.recipe import load_recipe

    flags = {"train.max_steps": max_steps, "train.seed": seed, "train.dtype": dtype, "data.tokenizer": tokenizer}
    chosen = load_recipe(recipe).with_settings(settings or [])
    chosen = chosen.with_values({key: value for key, value in flags.items() if value is not None})

    import torch

    from fastlm import train
    from fastlm.data import is_prepared
    from fastlm.run.summary import summary_table
    from fastlm.run.tracking import check_logs

    check_logs(log or [])

    if tokenizer is not None and any(map(is_prepared, data)):
        raise ValueError("--tokenizer: the data is prepared, with a tokenizer; leave --tokenizer out, or give text")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    _threads.for_work(chosen.layer_flops())
    result = train.pretrain(chosen, data, out, device=device, resume=resume, init=init, log=log or ())
    if result.stopped_by is not None:
        sys.exit(128 + result.stopped_by)  # as a shell reports it; `pretrain && next` does not go on without a model
    if result.summary is not None:
        typer.echo(summary_table(result.summary, out / "hf", width_of(sys.stdout)))


@app.command()
def recipe(
    name: Annotated[str, typer.Argument(help="A recipe's name, as bert-mini, or the path of a TOML file.")],
    settings: SetOption = None,
) -> None:
    """Print a recipe with every key and its meaning: a TOML file to start from."""
    from fastlm.run.recipe import load_recipe

    typer.echo(load_recipe(name).with_settings(settings or []).as_toml(), nl=False)


app.command()(text_cli.fill_mask)
app.command()(text_cli.generate)
app.command()(text_cli.evaluate)


@app.command()
def demo(
    kind: Annotated[str, typer.Argument(help="bert, gpt2 or t5.")] = "bert",
    out: Annotated[Path | None, typer.Option(help="Directory to write. Default: runs/demo-KIND.")] = None,
    seconds: Annotated[float, typer.Option(help="How long to train, about.")] = 180.0,
) -> None:
    """Train a small model on this Python's documentation, and show what it learned; about three minutes.

    Exit status 1 where it learned less than it should have.
    """
    from fastlm import demo as demos

    recipe = demos.recipe_of(kind)
    _threads.for_work(recipe.layer_flops())
    out = Path(f"runs/demo-{kind}") if out is None else out
    good, verdict = demos.judge(demos.demo(out, seconds=seconds, kind=kind, recipe=recipe))
    if not good:
        sys.exit(f"error: {verdict}")


@app.command()
def profile(
    recipe: Annotated[str, typer.Argument(help="A recipe's name or TOML file, or gpt2-39m-4x256, t5-small-8x256.")],
    out: Annotated[Path, typer.Option(help="Directory to write.")] = Path("runs/profile"),
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; else a GPU where there is one.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps to profile, after the warm-up.")] = 3,
    tool: Annotated[list[str] | None, typer.Option(help="torch, nsys or ncu; again for more. Default: all.")] = None,
    vocab: Annotated[int, typer.Option(help="Size of a BERT's vocabulary.")] = 30522,
    settings: SetOption = None,
    inside: Annotated[bool, typer.Option("--inside", hidden=True)] = False,
) -> None:
    """Show where the time of a training step goes: tables and a trace, and under Nsight where it is installed."""
    import torch
    from rich.console import Console

    from fastlm.bench import profile as profiler
    from fastlm.chip import parse_device

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    parse_device(device)
    _threads.for_work()
    options = {"device": device, "steps": steps, "settings": settings or [], "vocab_size": vocab}
    if inside:
        profiler.inside(recipe, **options)
        return
    say = Console(highlight=False, soft_wrap=True).print
    profiler.profile(recipe, out, **options, tools=tool or profiler.TOOLS, say=say)


@app.command()
def tune(
    op: Annotated[
        list[str] | None, typer.Option(help="An op; again for more. Default: all with Triton kernels.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    out: Annotated[Path | None, typer.Option(help="Table to write or add to; else the user's for this GPU.")] = None,
) -> None:
    """Measure the Triton kernels' configurations on this GPU, and keep those that beat the shipped ones."""
    import torch

    if not torch.cuda.is_available():
        raise ValueError("tune: expected a CUDA device, found none; the shipped configurations need no tuning to work")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype: expected float32, bfloat16 or float16, got {dtype!r}")

    from fastlm.bench import tune as tuner
    from fastlm.ops import _registry

    gpu = torch.cuda.get_device_name()
    out = out or tuner.user_table(gpu)
    ops = op or [name for name in _registry.ops() if "triton" in _registry.backends(name)]
    found = tuner.tune(ops, getattr(torch, dtype), say=typer.echo)
    tuner.write_table(out, gpu, found)
    typer.echo(f"{sum(map(len, found.values()))} configurations: {out}")


_finetune = typer.Typer(cls=_Commands, no_args_is_help=True, help="Fine-tune a model on labelled examples.")
finetune_cli.add_commands(_finetune)
app.add_typer(_finetune, name="finetune")
app.command()(finetune_cli.predict)


def _repeat_options(arguments: list[str]) -> list[str]:
    """`--data a b` as `--data a --data b`, which is what click knows. ValueError where no value follows."""
    out, several = [], None
    for argument, after in zip(arguments, [*arguments[1:], "--"]):
        if _is_option(argument):
            several = argument if argument in _SEVERAL else None
            if several is None:
                out.append(argument)
            elif _is_option(after):
                raise ValueError(f"{argument}: expected one value or more, got none")
        elif several is not None:
            out += [several, argument]
        else:
            out.append(argument)
    return out


def _is_option(argument: str) -> bool:
    """Not so standard input: "-", "-.jsonl", "-.csv.gz"."""
    return argument.startswith("-") and argument != "-" and not argument.startswith("-.")


def main() -> None:
    """Run the command line. What a user can mend is one line, `error: ...`, and exit status 2."""
    arguments = sys.argv[1:]
    _malloc.tune()
    _threads.wait_policy()
    warnings.showwarning = lambda message, *_: say(f"warning: {message}", sys.stderr)
    try:
        app(_repeat_options(arguments))
    except (ValueError, OSError, FloatingPointError) as error:
        if "--traceback" in arguments:
            raise
        sys.exit(_fail(error))


def _fail(error: Exception) -> int:
    say(f"error: {error}", sys.stderr)
    return 2
