"""Fine-tuning for text: T5 from source to target, GPT-2 with the loss on the answer alone."""

import json
import random
import sys

import numpy as np
import pytest
import torch
import transformers
from models import widen
from pages import command_of, run_command

from fastlm.data import Tokenizer
from fastlm.models import GPT2, T5, GPT2Config, T5Config
from fastlm.run.labelled import open_examples
from fastlm.run.recipe import Recipe
from fastlm.tasks import find_task
from fastlm.tasks._text_scores import check_measures, figures_of, text_scores
from fastlm.train.finetune import finetune

VOCAB = 61
WORDS = ("red", "green", "blue", "white", "black", "brown")


def gpt2(positions=24):
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": positions, "bos_token_id": 1, "eos_token_id": 1}
    return widen(GPT2(GPT2Config(vocab_size=VOCAB, **sizes))).eval()


def t5():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2}
    ids = {"pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 1}
    return widen(T5(T5Config(vocab_size=VOCAB, **sizes, **ids))).eval()


def test_figures_are_those_of_the_packages():
    predicted = ["the cat sat on the mat ", "a dog", "nothing at all in common here"]
    wanted = ["the cat sat on the mat", "the dog barks", "other words"]
    names = ("rouge", "bleu", "chrf")
    scores = text_scores(predicted, wanted, names)
    assert tuple(scores) == figures_of(names) == ("exact", "rouge1", "rouge2", "rougeL", "bleu", "chrf")
    assert scores["exact"] == pytest.approx(1 / 3)
    assert scores["rouge1"] == pytest.approx((1 + 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3) + 0) / 3)
    same = text_scores(wanted, wanted, names)
    assert same["bleu"] == pytest.approx(100)
    assert same["chrf"] == pytest.approx(100)
    assert text_scores(predicted, wanted, ()) == {"exact": pytest.approx(1 / 3)}


def test_a_missing_package_names_the_extra(monkeypatch):
    with pytest.raises(
        ValueError, match=r"train\.measures: expected some of rouge, bleu, chrf, by commas, got 'meteor'"
    ):
        check_measures("train.measures", ("rouge", "meteor"))
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(
        ValueError, match=r"train\.measures: BLEU and chrF figures need the package sacrebleu; pip insta"
    ):
        check_measures("train.measures", ("bleu",))


# ---- runs


def rows(path, count, seed, columns=("source", "target")):
    """Writes JSON lines whose target is the source's middle word, twice."""
    draw, lines = random.Random(seed), []
    for _ in range(count):
        word = draw.choice(WORDS)
        lines.append(dict(zip(columns, (f"say {word} now", f"{word} {word}"))))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


@pytest.fixture(scope="module", params=["seq2seq", "causal"])
def run(request, tmp_path_factory):
    """(task, directory of the page's run, its recipe, rows held out)"""
    task, out = request.param, tmp_path_factory.mktemp(request.param)
    texts = [f"say {word} now {word} {word}\n" for word in WORDS]
    torch.manual_seed(0)
    if task == "causal":
        tokenizer = Tokenizer.train(lambda: texts * 4, 300, purpose="causal")
        ids = {"bos_token_id": tokenizer.eos_id, "eos_token_id": tokenizer.eos_id}
        base = GPT2(GPT2Config(tokenizer.vocab_size, n_positions=32, n_embd=48, n_layer=2, n_head=4, **ids))
        drop = [f"model.{name}_pdrop" for name in ("attn", "embd", "resid")]
    else:
        tokenizer = Tokenizer.train(lambda: texts * 4, 400, purpose="span")
        ids = {"pad_token_id": tokenizer.pad_id, "decoder_start_token_id": tokenizer.pad_id}
        sizes = {"d_model": 48, "d_kv": 12, "d_ff": 96, "num_layers": 1, "num_heads": 4}
        base = T5(T5Config(vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_id, **sizes, **ids))
        drop = ["model.dropout_rate"]
    base.save_pretrained(out / "runs" / {"causal": "gpt2", "seq2seq": "t5"}[task], tokenizer)
    rows(out / "pairs.jsonl", 96, 1)
    held = rows(out / "dev.jsonl", 20, 2)
    line = command_of("finetuning-texts.md", f"fastlm finetune {task}")
    small = ["train.eval_every=60", "train.generate=12", "data.max_target=8", *(f"{name}=0.0" for name in drop)]
    more = ["--validation=dev.jsonl", "--batch-size=16", "--lr=1e-2", "--epochs=10", "--device=cpu", "--set", *small]
    assert run_command(line, out, *more) == 0
    (finished,) = (path for path in (out / "runs").iterdir() if (path / "hf").is_dir())
    recipe = Recipe(task, name=task).with_settings(small).with_values({"data.text": "source", "data.label": "target"})
    return task, finished, recipe.with_values({"train.batch_size": 16}), held


def test_the_loss_is_on_the_targets_alone(run):
    """Against Transformers' model of the export, an example at a time."""
    task, out, _, held = run
    theirs = transformers.AutoModelForCausalLM if task == "causal" else transformers.AutoModelForSeq2SeqLM
    theirs = theirs.from_pretrained(out / "hf").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "hf")
    nats, predicted, right = 0.0, 0, 0
    end = tokenizer.eos_token_id
    with torch.no_grad():
        for number, row in enumerate(held):
            target = [*tokenizer(row["target"], add_special_tokens=False).input_ids, end]
            if task == "causal":
                prompt = [end, *tokenizer(row["source"] + "\n").input_ids]
                labels = [-100] * len(prompt) + target
                loss = theirs(torch.tensor([prompt + target]), labels=torch.tensor([labels])).loss
                options = {"input_ids": torch.tensor([prompt])}
            else:
                source = [*tokenizer("answer: " + row["source"], add_special_tokens=False).input_ids, end]
                loss = theirs(torch.tensor([source]), labels=torch.tensor([target])).loss
                options = {"input_ids": torch.tensor([source])}
            nats, predicted = nats + float(loss.double()) * len(target), predicted + len(target)
            if number < 12:
                written = theirs.generate(**options, max_new_tokens=8, do_sample=False, pad_token_id=end)[0]
                written = written[len(prompt) :] if task == "causal" else written
                right += tokenizer.decode(written, skip_special_tokens=True).strip() == row["target"]
    figures = json.loads((out / "metrics.json").read_text())
    assert figures["metrics"]["loss"] == pytest.approx(nats / predicted, rel=1e-4)
    assert figures["metrics"]["perplexity"] == pytest.approx(np.exp(nats / predicted), rel=1e-4)
    assert figures["metrics"]["exact"] == pytest.approx(right / 12)
    assert figures["metrics"]["exact"] > 0.5  # it learned to say the word
    assert figures["metrics"]["rouge1"] >= figures["metrics"]["exact"]
    assert {"bleu", "chrf", "rouge2", "rougeL"} <= figures["metrics"].keys()
    assert figures["generated"][0]["wanted"] == held[0]["target"]


def test_a_model_whose_logits_are_nan_writes_nothing(run):
    task, out, recipe, _ = run
    model = {"causal": GPT2, "seq2seq": T5}[task].from_pretrained(out / "hf").eval()
    resolved, data = open_examples(recipe, out.parents[1] / "pairs.jsonl", out / "hf")
    written = find_task(task)(resolved, data.train, torch.device("cpu"), data.validation)
    micro = next(iter(written.evaluation()))
    with torch.no_grad():
        assert (written.score(model, micro)[1] >= 0).any()
        torch.nn.init.constant_((model.norm if task == "causal" else model.decoder.norm).weight, torch.nan)
        loss, outputs = written.score(model, micro)
    assert loss.isnan()
    assert (outputs == -1).all()
    assert outputs.shape == (micro.outputs, 8)


def test_packed_padded_and_filled_rows_have_the_same_loss(run):
    """On a device every micro-batch has the same shapes, filled up with sequences of padding."""
    task, out, recipe, _ = run
    model = {"causal": GPT2, "seq2seq": T5}[task].from_pretrained(out / "hf").eval()
    losses, shapes = [], []
    for layout, device in (("packed", "cpu"), ("padded", "cpu"), ("packed", "cuda"), ("packed", "cuda")):
        resolved, data = open_examples(
            recipe.with_values({"data.layout": layout}), out.parents[1] / "pairs.jsonl", out / "hf"
        )
        step = len(losses) // 3
        micro = find_task(task)(resolved, data.train, torch.device(device), data.validation).micro(step, 0)
        shapes.append({name: x.shape for name, x in micro.inputs.items() if isinstance(x, torch.Tensor)})
        with torch.no_grad():
            losses.append(float(model(**micro.inputs)) / micro.counts.predicted)
    assert losses[1:3] == pytest.approx([losses[0]] * 2, rel=1e-5)
    assert shapes[2] == shapes[3] != shapes[0]
    assert losses[3] != pytest.approx(losses[0], rel=1e-3)


def test_long_examples_are_cut_and_counted(run, tmp_path):
    task, out, recipe, _ = run
    long, words = (
        {"source": "say " + "red " * 60 + "now", "target": "red " * 30},
        {"source": "say red now", "target": "red"},
    )
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (long, words) * 4))
    settings = {"data.validation": "", "data.max_length": 24}
    _, data = open_examples(recipe.with_values(settings), tmp_path / "rows.jsonl", out / "hf")
    cut = {"causal": ("prompts", "answers"), "seq2seq": ("sources", "targets")}[task]
    assert data.train.cut == dict.fromkeys(cut, 4)
    assert data.train.lengths.max() == 24
    ids, tokenizer = data.train.ids.take(np.array([0])), data.train.tokenizer
    targets = data.train.fields["targets" if task == "causal" else "labels"].take(np.array([0]))
    if task == "causal":
        assert ids[0] == tokenizer.eos_id
        assert tokenizer.decode(ids[: np.argmax(targets >= 0) + 1]).endswith("now\n")  # the end of the prompt is kept
        assert (targets >= 0).sum() == 8
    else:
        assert ids[-1] == targets[-1] == tokenizer.eos_id
        assert len(targets) == 8


def test_bad_rows(run, tmp_path):
    _, out, recipe, _ = run
    path = tmp_path / "rows.jsonl"
    for content, message in (
        ("", "found none"),
        ('{"source": "a"}\n', r'data\.label: expected a column "target" in rows.jsonl:1, found "source"'),
        (
            '{"source": "", "target": "a"}\n{"source": 3, "target": "a"}\n',
            'found none that can be used .*empty text in column "source"',
        ),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            open_examples(recipe.with_values({"data.validation": ""}), path, out / "hf")
    same = {"data.text": "source", "data.label": "source", "data.validation": ""}
    path.write_text('{"source": "a", "target": "b"}\n')
    with pytest.raises(
        ValueError, match=r'data\.label: expected another column than data\.text, got "source" for both'
    ):
        open_examples(recipe.with_values(same), path, out / "hf")
    with pytest.raises(
        ValueError, match=r"train\.measures: expected some of rouge, bleu, chrf, by commas, got 'meteor'"
    ):
        finetune(
            recipe.with_values({"train.measures": "meteor"}),
            out / "hf",
            out.parents[1] / "pairs.jsonl",
            tmp_path / "run",
        )
