"""The command line from the outside: output, errors, exit status."""

import io
import json
import re
import signal
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from training import corpus, set_options

from fastlm import _malloc, _threads, cli, terminal
from fastlm.data import Tokenizer
from fastlm.fill_mask import fill_mask
from fastlm.models import Bert, BertConfig
from fastlm.run import directory
from fastlm.run.metrics import read_metrics
from fastlm.run.progress import ProgressLine
from fastlm.train import loop


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "fastlm", *map(str, arguments)], capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def fastlm(monkeypatch, capsys):
    """Runs the command in this process: (exit status, standard output, standard error)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["fastlm", *map(str, arguments)])
        monkeypatch.setattr(_malloc, "tune", lambda: "left alone in tests")
        monkeypatch.setattr(_threads, "for_work", lambda flops=None: 2)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.showwarning", None)
            with pytest.raises(SystemExit) as exit:
                cli.main()
        captured = capsys.readouterr()
        return exit.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("text") / "corpus.txt")


def test_from_text_to_a_filled_mask(text, tmp_path, fastlm):
    """prepare, pretrain, fill-mask, each in a process of its own or as good."""
    rows = ["--tokenizer", "train:200", "--row-tokens", 32, "--documents", "line"]
    status, out, _ = fastlm("prepare", "--data", text, "--out", tmp_path / "data", *rows)
    assert status == 0
    assert "rows of 32 tokens" in out
    options = ["--max-steps", 40, "--seed", 3, "--device", "cpu", "--dtype", "float32", *set_options()]
    done = run("pretrain", "bert-mini", "--data", tmp_path / "data", "--out", tmp_path / "run", *options)
    assert done.returncode == 0, done.stderr
    assert "loss" in done.stdout
    assert "tokens/s" in done.stderr
    assert re.search(r"peak: \S+ TFLOP/s, as measured on this CPU in float32 with", done.stderr)
    assert re.search(r"MFU [\d.]+%", done.stderr)
    recipe = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert (recipe["train"]["max_steps"], recipe["train"]["seed"]) == (40, 3)
    status, out, _ = fastlm(
        "fill-mask", "--model", tmp_path / "run" / "hf", "anna found the old [MASK] near the [MASK]."
    )
    lines = out.splitlines()
    assert status == 0
    assert len(lines) == 11
    shares = [float(line.split("%")[0]) for line in lines if line]
    assert shares[:5] == sorted(shares[:5], reverse=True)
    assert sum(shares[:5]) <= 100.5


def test_several_values_after_one_option():
    assert cli._repeat_options(["prepare", "--data", "a", "b", "--out", "o"]) == (
        ["prepare", "--data", "a", "--data", "b", "--out", "o"]
    )
    assert cli._repeat_options(["--set", "a=1", "b=2", "--resume", "never"]) == (
        ["--set", "a=1", "--set", "b=2", "--resume", "never"]
    )
    assert cli._repeat_options(["prepare", "--data", "-", "-.jsonl.gz", "--out", "o"]) == (
        ["prepare", "--data", "-", "--data", "-.jsonl.gz", "--out", "o"]
    )
    with pytest.raises(ValueError, match="--data: expected one value or more, got none"):
        cli._repeat_options(["prepare", "--data"])
    assert cli._repeat_options(["fill-mask", "--model", "m", "a b"]) == ["fill-mask", "--model", "m", "a b"]


def pretrain_arguments(text, out, *more):
    return ["pretrain", "bert-mini", "--data", text, "--out", out, "--device", "cpu", *set_options(), *more]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: [*a, "train.learning_rate=1"], "train.learning_rate: there is no such key"),
        (lambda a: [*a, "train.lr=high"], "train.lr: expected a number, got 'high'"),
        (lambda a: [*a, "train.batch_tokens=33"], "train.batch_tokens: expected a multiple"),
        (lambda a: ["pretrain", "bert-huge", *a[2:]], "recipe: expected one of bert-base"),
        (lambda a: [*a, "--tokenizer", "train:many"], "tokenizer: expected train:N"),
        (lambda a: [*a, "--device", "tpu"], "device: expected cpu or cuda, got 'tpu'"),
        (lambda a: [*a, "--dtype", "float16"], "train.dtype: expected 'auto' or 'float32' or 'bfloat16'"),
        (lambda a: [*a, "--seed", "1", "--set"], "--set: expected one value or more, got none"),
        (lambda a: [*a[:3], *a[4:]], "--data: expected one value or more, got none"),
        (lambda a: [*a, "--device", "cuda:99"], "device: expected cpu, or one of the"),
        (lambda a: [*a, "--resume", "/no/such/run"], "resume: expected auto, never"),
        (lambda a: [*a[:3], "/no/such/text", *a[4:]], "/no/such/text"),
    ],
)
def test_errors_are_one_line_and_write_nothing(change, message, text, tmp_path, fastlm):
    status, out, err = fastlm(*change(list(map(str, pretrain_arguments(text, tmp_path / "deep" / "run")))))
    assert (status, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: ")
    assert message in err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_empty_corpus(tmp_path, fastlm):
    (tmp_path / "empty.txt").write_text("\n \n")
    status, _, err = fastlm(*pretrain_arguments(tmp_path / "empty.txt", tmp_path / "run"))
    assert status == 2
    assert "error: data: no text is left" in err
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]


def test_tokenizer_without_a_mask_token(text, tmp_path, fastlm):
    from tokenizers import Tokenizer, models

    (tmp_path / "tokenizer").mkdir()
    vocab = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4}
    Tokenizer(models.WordPiece(vocab, unk_token="[UNK]")).save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    arguments = pretrain_arguments(text, tmp_path / "run", "--tokenizer", tmp_path / "tokenizer")
    status, _, err = fastlm(*arguments)
    assert status == 2
    assert "error: tokenizer: expected one with a mask_token" in err
    assert not (tmp_path / "run").exists()


def test_prepared_data_that_does_not_fit(text, tmp_path, fastlm):
    rows = tmp_path / "rows"
    fastlm("prepare", "--data", text, "--tokenizer", "train:200", "--out", rows, "--row-tokens", 64)
    status, _, err = fastlm(*pretrain_arguments(rows, tmp_path / "run"))
    assert status == 2
    assert "data.row_tokens" in err
    assert "set data.row_tokens=64" in err
    assert not (tmp_path / "run").exists()
    status, _, err = fastlm(*pretrain_arguments(rows, tmp_path / "run", "--tokenizer", "train:300"))
    assert "error: --tokenizer: the data is prepared" in err
    assert status == 2
    assert not (tmp_path / "run").exists()


def test_fill_mask_errors(tmp_path, fastlm):
    status, _, err = fastlm("fill-mask", "--model", tmp_path / "none", "a [MASK]")
    assert status == 2
    assert err.startswith("error: model: expected a directory")
    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    Bert(config).save_pretrained(tmp_path / "hf", Tokenizer.train(lambda: ["the cat sat on the mat"] * 9, 30))
    status, _, err = fastlm("fill-mask", "--model", tmp_path / "hf", "a [MASK]")
    assert status == 2
    assert err.startswith("error: model: expected a tokenizer of at most the model's 20 tokens")


def test_a_vocabulary_rounded_up_fills_no_mask_with_what_is_no_token(tmp_path):
    tokenizer = Tokenizer.train(lambda: ["the cat sat on the mat"] * 9, 30)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = Bert(BertConfig(vocab_size=tokenizer.vocab_size + 7, **sizes))
    with torch.no_grad():
        model.head.bias[-7:] = 100.0
    model.save_pretrained(tmp_path, tokenizer)
    (candidates,) = fill_mask(tmp_path, "the [MASK]", top=1000)
    assert len(candidates) == tokenizer.vocab_size
    assert all(candidate.token for candidate in candidates)


def test_plain_progress_says_a_thing_once():
    console = Console(file=io.StringIO(), force_terminal=False)
    with ProgressLine("rows", 2, console) as line:
        for done in (1, 2, 2):
            line.update(done, [f"{done} of 2"])
    assert console.file.getvalue() == "rows 2 of 2\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_is_no_success(number, text, tmp_path, fastlm, monkeypatch):
    """In its last but one step; a signal in the last step stops nothing."""
    original = loop.train_step

    def step_and_signal(*arguments, **options):
        result = original(*arguments, **options)
        if len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == at:
            signal.raise_signal(number)
        return result

    monkeypatch.setattr(loop, "train_step", step_and_signal)
    at = 10
    status, out, err = fastlm(*pretrain_arguments(text, tmp_path / "run"))
    assert (status, out) == (128 + number, "")
    assert "stopped at step 11; the same command continues after step 11" in err
    assert (tmp_path / "run" / "checkpoints" / "step-00000011").is_dir()
    at = 11
    status, out, err = fastlm(*pretrain_arguments(text, tmp_path / "run"))
    assert status == 0
    assert out.startswith("loss ")


def test_interrupted_before_training(text, tmp_path, fastlm, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(directory, "open_data", interrupted)
    assert fastlm(*pretrain_arguments(text, tmp_path / "run"))[0] == 130


FIELDS = ["step 640/1000", "loss 6.413", "12,345 tokens/s", "ETA 3:05", "2 skipped", "MFU n/a", "lr 1.0e-03"]


@pytest.mark.parametrize(("width", "shown"), [(60, 2), (80, 4), (90, 5), (140, 7)])
def test_the_bar_stays_on_a_narrow_terminal(width, shown):
    """One line with the bar, and as many fields as fit, the first ones first."""
    console = Console(file=io.StringIO(), force_terminal=True, width=width, legacy_windows=False, _environ={})
    with ProgressLine("bert-mini", 1000, console) as line:
        line.update(640, FIELDS)
        line._bar.refresh()
        (text,) = (t for t in ANSI.sub("", console.file.getvalue()).replace("\r", "\n").split("\n") if "640" in t)
    assert len(text.rstrip()) <= width
    assert "━━━━" in text
    assert text.rstrip().endswith("  ".join(FIELDS[:shown]))


ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def test_notes_break_between_words():
    """On a terminal alone: a log keeps its lines whole."""
    text = "small: 0.05 M parameters; 1,234 rows of 128 tokens, vocabulary 8,192, in /a/path/of/more/than/40/columns/x"
    for live, lines in ((True, 4), (False, 1)):
        console = Console(file=io.StringIO(), force_terminal=live, width=30, highlight=False, _environ={})
        ProgressLine("rows", 2, console).note(text)
        found = console.file.getvalue().splitlines()
        assert " ".join(found) == text
        assert len(found) >= lines
        assert not live or all(len(line) <= 30 or " " not in line for line in found)


def test_messages_break_between_words(monkeypatch, fastlm, tmp_path):
    monkeypatch.setattr(terminal, "width_of", lambda stream: 40)
    _, _, err = fastlm("fill-mask", "--model", tmp_path / "none", "a [MASK]")
    assert " ".join(err.split()).startswith("error: model: expected a directory, as OUT/hf after")
    assert all(len(line) <= 40 or " " not in line for line in err.splitlines())


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("fine-tune", "did you mean finetune, as fastlm finetune classify?"),
        ("pretain", "did you mean pretrain?"),
        ("train", "did you mean pretrain?"),
        ("filmask", "did you mean fill-mask?"),
        ("bake", "see fastlm --help"),
    ],
)
def test_unknown_commands(name, hint, fastlm):
    status, out, err = fastlm(name, "bert-mini")
    assert (status, out) == (2, "")
    names = (
        "info, prepare, data, pretrain, recipe, fill-mask, generate, evaluate, demo, profile, tune, predict, finetune"
    )
    assert err.startswith(f"error: command: expected one of {names}")
    assert f"got '{name}'; {hint}" in err
    assert "mean tune" not in err


def test_short_runs_print_their_loss_once(text, tmp_path, fastlm):
    for steps, pattern in ((1, r"loss +\d\.\d{3} \("), (2, r"loss +(\d\.\d{3}) -> (?!\1)\d\.\d{3} \(")):
        settings = [f"train.max_steps={steps}", "train.warmup_steps=0"]
        _, out, _ = fastlm(*pretrain_arguments(text, tmp_path / str(steps), *settings))
        assert re.match(pattern, out), out


def test_the_directory_of_a_run_is_no_model(tmp_path, fastlm):
    tokenizer = Tokenizer.train(lambda: ["the cat sat on the mat"] * 9, 30)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    Bert(BertConfig(vocab_size=tokenizer.vocab_size, **sizes)).save_pretrained(tmp_path / "hf", tokenizer)
    status, _, err = fastlm("fill-mask", "--model", tmp_path, "a [MASK]")
    assert status == 2
    assert err.endswith(f"it is the directory of a run, whose model is in {tmp_path / 'hf'}\n")


def test_a_traceback_where_asked_for(tmp_path):
    done = run("--traceback", "fill-mask", "--model", tmp_path / "none", "a [MASK]")
    assert done.returncode != 0
    assert "Traceback" in done.stderr


def test_help_names_the_commands_and_imports_no_torch():
    code = "import sys, fastlm.cli as c; sys.argv = ['fastlm', '--help']\n"
    code += "try: c.main()\nexcept SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert all(name in done.stdout for name in ("info", "prepare", "pretrain", "recipe", "fill-mask", "generate"))
    assert done.stdout.rstrip().endswith("False")


def test_the_command_tunes_the_allocator():
    code = "from fastlm import _malloc; print(_malloc.state()); print(_malloc.tune()); print(_malloc.state())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    before, tuned, after = done.stdout.splitlines()
    assert before == "as shipped"
    assert tuned == after
    if sys.platform == "linux":
        assert "mallopt" in after or "environment" in after
