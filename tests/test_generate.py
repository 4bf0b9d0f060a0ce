"""Generation with a cache: Transformers' tokens, draws by seed, row and position, ends, and a graph of the step."""

import copy
import math
import random

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from models import to_transformers, widen
from recorded_graph import Recorded

import fastlm
from fastlm.data import Tokenizer
from fastlm.generate import Settings, api, fill_spans, generate, graph, stream
from fastlm.generate.decoders import make_decoder
from fastlm.generate.loop import pack
from fastlm.generate.sampling import chances, draw, penalise, uniforms
from fastlm.generate.text import Text
from fastlm.models import GPT2, T5, Bert, BertConfig, GPT2Config, T5Config

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9], [3] * 13]
ENDS = [0, 5, 10, 15, 20, 25, 30, 35, 40, 45]  # so many that random weights come upon one


def train(model, **inputs):
    """A few steps by heart: probabilities far apart, and texts that end."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(25):
        model(**inputs).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def gpt2():
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32, "initializer_range": 0.3}
    return widen(GPT2(GPT2Config(vocab_size=50, bos_token_id=0, eos_token_id=0, **sizes))).eval()


@pytest.fixture(scope="module")
def t5():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    return widen(T5(T5Config(vocab_size=50, **sizes))).eval()


@pytest.fixture(scope="module")
def trained_gpt2():
    torch.manual_seed(1)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    model = GPT2(GPT2Config(vocab_size=50, bos_token_id=0, eos_token_id=0, attn_pdrop=0.0, **sizes))
    ids = torch.tensor([[(3 * i + 7 * j) % 11 + 1 for j in range(4 + i % 5)] + [0] * (9 - i % 5) for i in range(16)])
    return train(model, input_ids=ids, labels=ids)


@pytest.fixture(scope="module")
def trained_t5():
    torch.manual_seed(1)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    model = T5(T5Config(vocab_size=50, feed_forward_proj="gated-gelu", tie_word_embeddings=False, **sizes))
    source = torch.randint(2, 50, (16, 6), generator=torch.Generator().manual_seed(0))
    return train(model, input_ids=source, labels=torch.cat([source[:, :4], source.new_ones(16, 1)], 1))


def expected(model, prompt, **options):
    """Transformers' new tokens for one prompt, without the eos token, and the score of beams."""
    theirs = to_transformers(model)
    theirs.generation_config.pad_token_id = 0
    options.setdefault("eos_token_id", model.config.eos_token_id)
    out = theirs.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt)),
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    ids = out.sequences[0].tolist()[1 if isinstance(model, T5) else len(prompt) :]
    ends = options["eos_token_id"] if isinstance(options["eos_token_id"], list) else [options["eos_token_id"]]
    ids = ids[:-1] if ids and ids[-1] in ends else ids
    return ids, float(out.sequences_scores[0]) if options.get("num_beams", 1) > 1 else None


def same_as_transformers(model, prompts=PROMPTS, **options):
    """Of all prompts in one batch. Returns how they ended."""
    found = generate(model, prompts, **options)
    for prompt, got in zip(prompts, found):
        ids, score = expected(model, prompt, **options)
        assert got.ids == ids, (prompt, options)
        assert got.score is None if score is None else got.score == pytest.approx(score, abs=1e-4)
    return [got.finish for got in found]


NUCLEI = [
    {},
    {"repetition_penalty": 1.5, "min_new_tokens": 4, "eos_token_id": ENDS},
    {"num_beams": 3, "eos_token_id": ENDS},
    {"num_beams": 2, "early_stopping": True, "length_penalty": 0.0, "repetition_penalty": 1.5, "eos_token_id": ENDS},
    {"num_beams": 3, "early_stopping": "never", "length_penalty": 2.0, "min_new_tokens": 3, "eos_token_id": ENDS},
]


@pytest.mark.parametrize("options", NUCLEI, ids=str)
@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_tokens_are_those_of_transformers(name, options, request):
    finish = same_as_transformers(request.getfixturevalue(name), PROMPTS[:3], max_new_tokens=7, **options)
    assert "length" in finish or "eos" in finish


@pytest.mark.parametrize("name", ["trained_gpt2", "trained_t5"])
def test_tokens_of_trained_weights_are_those_of_transformers(name, request):
    model = request.getfixturevalue(name)
    prompts = [[1, 8], [4, 11, 7], [10]] if name == "trained_gpt2" else [[7, 8, 9, 10], [30, 31], [11, 45, 2, 3, 4]]
    finish = same_as_transformers(model, prompts, max_new_tokens=9)
    finish += same_as_transformers(model, prompts, max_new_tokens=9, num_beams=3)
    assert "eos" in finish


@pytest.mark.long
@pytest.mark.parametrize("beams", [2, 4])
@pytest.mark.parametrize("early", [True, False, "never"])
@pytest.mark.parametrize("penalty", [-1.0, 0.5, 2.0])
@pytest.mark.parametrize("name", ["gpt2", "t5", "trained_gpt2", "trained_t5"])
def test_beams_are_those_of_transformers(name, penalty, early, beams, request):
    options = {"num_beams": beams, "early_stopping": early, "length_penalty": penalty, "max_new_tokens": 12}
    same_as_transformers(request.getfixturevalue(name), **options)
    same_as_transformers(request.getfixturevalue(name), eos_token_id=ENDS, **options)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_logits_of_a_step_are_those_of_the_whole_text(name, request):
    """In float64. Rows become copies, change places, and leave."""
    model = request.getfixturevalue(name)
    model = type(model)(model.config, dtype=torch.float64).eval()
    texts = [list(prompt) for prompt in PROMPTS] if name == "gpt2" else [[0] for _ in PROMPTS]
    reads = list(range(len(PROMPTS)))

    def logits_are_right(logits):
        for text, prompt, row in zip(texts, reads, logits, strict=True):
            ids = torch.tensor([text])
            whole = model(ids) if name == "gpt2" else model(torch.tensor([PROMPTS[prompt]]), ids)
            torch.testing.assert_close(row, whole[0, -1], rtol=0, atol=1e-10)

    with torch.inference_mode():
        decoder = make_decoder(model, [len(prompt) for prompt in PROMPTS], 6, copies=2)
        logits_are_right(decoder.prefill(*pack(PROMPTS, torch.device("cpu"))))
        for index in ([0, 0, 1, 1, 2, 2, 3, 3], [1, 0, 3, 3, 4, 5, 6, 6], [0, 2, 4, 5, 7], [0, 4]):
            decoder.reorder(torch.tensor(index))
            texts, reads = [list(texts[i]) for i in index], [reads[i] for i in index]
            ids = [(3 * i + len(index)) % 50 for i in range(len(index))]
            for text, id in zip(texts, ids):
                text.append(id)
            logits_are_right(decoder.step(torch.tensor(ids)))


def test_draws_follow_the_chances():
    """Chi-square of 40,000 draws, with 3 degrees of freedom: 21.1 is exceeded once in ten thousand."""
    logits = torch.tensor([[2.0, -1.0, 1.0, 0.0, 1.5]])
    p = chances(logits, Settings(temperature=0.7, top_k=4))
    draws = draw(
        p.expand(40_000, -1), uniforms(3, torch.arange(40_000), torch.zeros(40_000, dtype=torch.int64), 1)[:, 0]
    )
    counts = torch.bincount(draws, minlength=5).double()
    wanted = (torch.tensor([2.0, -torch.inf, 1.0, 0.0, 1.5]).double() / 0.7).softmax(0) * 40_000
    assert counts[1] == 0
    kept = wanted > 0
    assert ((counts - wanted)[kept] ** 2 / wanted[kept]).sum() < 21.1
    along = draw(p.expand(4000, -1), uniforms(3, torch.tensor([5]), torch.tensor([0]), 4000)[0])
    assert (torch.bincount(along, minlength=5) / 4000 - wanted / 40_000).abs().max() < 0.04


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.05},
        {"top_p": 0.01},
        {"top_k": 500, "top_p": 0.99},
        {"temperature": 0.6, "top_k": 30, "top_p": 0.9, "min_p": 0.02},
        {"temperature": 2.0, "top_p": 0.95, "min_p": 0.3},
    ],
    ids=str,
)
def test_filters_are_those_of_transformers(options):
    scores = torch.randn(32, 200, generator=torch.Generator().manual_seed(0)) * 3
    scores[:, 10] = -torch.inf
    settings = Settings(**{"temperature": 1.0, **options})
    processors = [transformers.TemperatureLogitsWarper(float(settings.temperature))]
    if settings.top_k:
        processors.append(transformers.TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        processors.append(transformers.TopPLogitsWarper(settings.top_p))
    if settings.min_p:
        processors.append(transformers.MinPLogitsWarper(settings.min_p))
    theirs = transformers.LogitsProcessorList(processors)(None, scores.clone()).softmax(-1)
    ours = chances(scores, settings)
    assert torch.equal(ours > 0, theirs > 0)
    torch.testing.assert_close(ours / ours.sum(-1, keepdim=True), theirs)


def test_the_repetition_penalty_is_that_of_transformers():
    scores, ids = torch.randn(4, 30, generator=torch.Generator().manual_seed(0)), torch.randint(0, 30, (4, 9))
    seen = torch.zeros(4, 30, dtype=torch.bool).scatter_(1, ids, True)
    theirs = transformers.RepetitionPenaltyLogitsProcessor(1.7)(ids, scores.clone())
    assert torch.equal(penalise(scores, seen, 1.7), theirs)


SAMPLED = {"temperature": 1.0, "top_p": 0.95, "repetition_penalty": 1.1, "max_new_tokens": 12, "eos_token_id": ENDS[:5]}


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_a_rows_text_depends_on_seed_number_and_prompt_alone(name, request):
    model = request.getfixturevalue(name)
    together = generate(model, PROMPTS, **SAMPLED)
    assert len({len(row.ids) for row in together}) > 1, "rows leave the batch while others go on"
    alone = [generate(model, [ids], rows=[row], **SAMPLED)[0] for row, ids in enumerate(PROMPTS)]
    assert together == alone
    assert generate(model, PROMPTS[::-1], rows=[3, 2, 1, 0], **SAMPLED) == together[::-1]
    same, other = generate(model, [PROMPTS[0]] * 2, **SAMPLED), generate(model, PROMPTS, **SAMPLED, seed=1)
    assert same[0] == together[0] != same[1]
    assert other != together
    assert generate(model, PROMPTS[:1], **SAMPLED, rows=[2**40])[0] != together[0]


def test_a_longer_prompt_continues_the_draws(gpt2):
    """The position counts from the beginning of the text, so that a text may be written in parts."""
    options = {"temperature": 1.0, "eos_token_id": ()}
    (whole,) = generate(gpt2, [[1, 2, 3]], max_new_tokens=9, **options)
    (part,) = generate(gpt2, [[1, 2, 3]], max_new_tokens=4, **options)
    (rest,) = generate(gpt2, [[1, 2, 3, *part.ids]], max_new_tokens=5, **options)
    assert part.ids + rest.ids == whole.ids


def test_the_iterator_yields_what_generate_returns(gpt2):
    whole, tokens = generate(gpt2, PROMPTS, **SAMPLED), list(stream(gpt2, PROMPTS, **SAMPLED))
    for row, wanted in enumerate(whole):
        mine = [token for token in tokens if token.row == row]
        assert [token.id for token in mine if token.finish != "eos"] == wanted.ids
        assert [token.finish for token in mine] == [None] * (len(mine) - 1) + [wanted.finish]


def test_the_caller_keeps_modes_and_autocast_between_tokens(gpt2):
    whole, model = generate(gpt2, PROMPTS, **SAMPLED), copy.deepcopy(gpt2).train()
    model.layers[0].mlp.eval()
    modes = [module.training for module in model.modules()]
    with torch.autocast("cpu", torch.bfloat16):
        first, second = (stream(model, PROMPTS, **SAMPLED) for _ in range(2))
        for _ in range(5):
            assert next(first)[:2] == next(second)[:2]
            assert [module.training for module in model.modules()] == modes
            assert torch.is_autocast_enabled("cpu")
        first.close()
        assert len([*second]) > 5
        assert generate(model, PROMPTS, **SAMPLED) == whole
    assert [module.training for module in model.modules()] == modes


def test_forms_of_the_prompts(gpt2):
    wanted = gpt2.generate(PROMPTS, max_new_tokens=3)
    assert wanted == fastlm.generate.generate(gpt2, [torch.tensor(ids) for ids in PROMPTS], max_new_tokens=3)
    assert (
        wanted[:1]
        == gpt2.generate(PROMPTS[0], max_new_tokens=3)
        == gpt2.generate(torch.tensor(PROMPTS[:1]), max_new_tokens=3)
    )
    for array in (np.array(PROMPTS[0]), [*np.array(PROMPTS[0])], np.array(PROMPTS[:1]), [np.array(PROMPTS[0])]):
        assert gpt2.generate(array, max_new_tokens=3) == wanted[:1]
    with pytest.raises(ValueError, match="attention_mask: expected a tensor, as input_ids, got a list"):
        gpt2.generate(torch.tensor(PROMPTS[:1]), attention_mask=[[1, 1, 1]])
    for left in (True, False):
        padded = torch.full((4, 13), 49)
        for row, ids in zip(padded, PROMPTS):
            row[13 - len(ids) :] if left else row[: len(ids)]
            row[slice(13 - len(ids), None) if left else slice(len(ids))] = torch.tensor(ids)
        assert gpt2.generate(padded, attention_mask=(padded != 49).long(), max_new_tokens=3) == wanted
    assert gpt2.train().generate(PROMPTS, max_new_tokens=3) == wanted
    assert gpt2.eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert gpt2.generate(PROMPTS, max_new_tokens=3) == wanted
    low = GPT2(gpt2.config, dtype=torch.bfloat16)
    low.load_state_dict(gpt2.state_dict())
    assert all(len(row.ids) <= 3 for row in low.generate(PROMPTS, max_new_tokens=3, num_beams=2))


def test_a_row_ends_with_the_models_positions(gpt2):
    """The last position's logits give one more token; rows beside it go on."""
    options = {"max_new_tokens": 9, "eos_token_id": ()}
    long, short = gpt2.generate([[1] * 30, [1, 2]], **options)
    assert (len(long.ids), long.finish, len(short.ids)) == (3, "length", 9)
    assert gpt2.generate([[1] * 30], **options) == [long]
    assert [len(row.ids) for row in gpt2.generate([[1] * 32, [2] * 29], num_beams=2, **options)] == [1, 4]
    assert make_decoder(gpt2, [30, 2], 31).cache.k.shape[2] == 32


class Letters:
    """A tokenizer whose token i is spelled by two letters; 48 and 49 are the two bytes of a character."""

    vocab_size = 50

    def decode(self, ids, skip_special_tokens):
        pieces = [bytes([97 + id % 26, 97 + id // 26]) if id < 48 else (b"\xc3", b"\xa9")[id - 48] for id in ids]
        return b"".join(pieces).decode(errors="replace")


@pytest.mark.parametrize("beams", [1, 2])
def test_stop_strings_lie_across_tokens(beams, gpt2):
    options = {"max_new_tokens": 9, "eos_token_id": (), "tokenizer": Letters(), "num_beams": beams}
    plain = gpt2.generate(PROMPTS, **options)
    assert all(row.text == Letters().decode(row.ids, True) for row in plain)
    text = plain[1].text
    stop = text[5:8]  # the second letter of the third token, and the fourth one
    at = text.index(stop)
    got = gpt2.generate(PROMPTS, **options, stop=[stop, "?"])
    if beams == 1:
        assert (got[1].text, got[1].finish) == (text[:at], "stop")
        assert got[1].ids == plain[1].ids[: math.ceil((at + 3) / 2)]
        pieces = list(stream(gpt2, PROMPTS, **{**options, "stop": stop}))
        for row, wanted in enumerate(got):
            assert "".join(token.text for token in pieces if token.row == row) == wanted.text
    for row, before in zip(got, plain):
        assert stop not in row.text
        assert (row.finish == "stop") == (stop in Letters().decode(row.ids, True))
        if stop not in before.text and beams == 1:
            assert row == before


def test_text_is_given_out_when_no_token_can_change_it():
    text = Text(Letters(), stop=["bab"])
    given = []
    for id in (0, 48, 49, 1, 0, 2):  # "aa", two bytes of "é", "ba", "aa", "ca"
        text.add(id)
        given.append(text.fresh(False))
    assert given == ["aa", "", "é", "", "baaa", "ca"]
    for id in (1, 1):
        text.add(id)
        given.append(text.fresh(False))
    assert (text.text, text.stopped, given[-2:]) == ("aaébaaaca", True, ["", ""])
    open_end = Text(Letters(), stop=["bab"])
    open_end.add(1)
    assert (open_end.fresh(False), open_end.fresh(True)) == ("", "ba")


def test_transformers_tokenizer_and_context():
    """The first new token keeps its space, which decoding it alone would lose."""

    class Spaced:
        def decode(self, ids, skip_special_tokens):
            return " ".join(f"w{id}" for id in ids)

    text = Text(Spaced(), context=[1, 2])
    text.add(3)
    assert text.fresh(False) == " w3"


@pytest.mark.parametrize("purpose", ["causal", "span"])
def test_texts_are_those_of_all_tokens_together(purpose, monkeypatch):
    """Whatever the tokens are; and a long text decodes few tokens for each new one."""
    texts = ["the caf\u00e9 \u4e2d\u6587 \U0001f600 sat. it's on the mat", "a dog saw the cat \ufffd"] * 5
    tokenizer = Tokenizer.train(lambda: texts, {"causal": 300, "span": 400}[purpose], purpose=purpose)
    draws, decode, counts = random.Random(0), tokenizer.decode, []
    for prompt, written in ("the caf\u00e9 ", "\u4e2d\U0001f600 cat"), (texts[0], texts[1] * 9), ("\ufffd", "a. it's"):
        ids = tokenizer.encode(prompt + written)
        noise = [draws.randrange(tokenizer.vocab_size) for _ in range(200)]
        for prompt_ids, new in (
            *((ids[:at], ids[at:]) for at in range(1, len(ids) - 1)),  # in the middle of characters too
            (ids, noise),
        ):
            text, given = Text(tokenizer, prompt_ids), ""
            for id in new:
                text.add(id)
                given += text.fresh(False)
            given += text.fresh(True)
            assert given == text.text
            context = decode(prompt_ids[-8:])
            whole = decode([*prompt_ids[-8:], *new])
            start = len(context if whole.startswith(context) else context.rstrip("\ufffd"))
            assert text.text == whole[start:]
    text = Text(tokenizer, stop=["mat END"])
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **o: counts.append(len(ids)) or decode(ids, **o))
    for id in tokenizer.encode(texts[0] * 20 + " END of it"):
        if not text.stopped:
            text.add(id)
    assert text.text == (texts[0] * 20).removesuffix("mat")
    assert max(counts) <= 40


def test_added_tokens_of_a_transformers_tokenizer_are_written():
    """Its vocab_size leaves them out, and len counts them; a model's ids beyond all of these are never written."""
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(50)}, unk_token="w0")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words))
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    assert (tokenizer.vocab_size, len(tokenizer), tokenizer.eos_token_id) == (50, 51, 50)
    model = GPT2(GPT2Config(vocab_size=52, n_embd=32, n_layer=1, n_head=2, bos_token_id=50, eos_token_id=50))
    torch.nn.init.normal_(model.norm.bias)
    with torch.no_grad():
        model.word[50:] = torch.tensor([[1.0], [2.0]]) * model.norm.bias  # 51 is the most probable, then the end
    for options in ({}, {"num_beams": 2}, {"repetition_penalty": 1.2}):  # the prompt has an id without a word
        (got,) = generate(model, [[1, 51, 3]], max_new_tokens=5, tokenizer=tokenizer, **options)
        assert (got.ids, got.finish) == ([], "eos")


@pytest.fixture
def recorded(monkeypatch):
    made, caches = [], []

    def decoder(*args, **options):
        made = make_decoder(*args, **options)
        caches[:] = [made.cache]
        return made

    monkeypatch.setattr(api, "make_decoder", decoder)
    monkeypatch.setattr(graph, "possible", lambda device: True)
    monkeypatch.setattr(graph, "CudaGraph", lambda: made.append(Recorded(caches)) or made[-1])
    return made


@pytest.mark.parametrize("name", ["gpt2", "t5"])
@pytest.mark.parametrize(
    "options",
    [
        {"eos_token_id": ENDS, "repetition_penalty": 1.2},
        SAMPLED,
        {"num_beams": 3, "eos_token_id": ENDS, "repetition_penalty": 1.2},
    ],
    ids=["greedy", "sampled", "beams"],
)
def test_a_graph_of_the_step_gives_the_same_tokens(name, options, recorded, request, monkeypatch):
    """Rows that have ended go on unseen, at one position; GPT-2's first prompt ends with the model's positions."""
    model = request.getfixturevalue(name)
    prompts = [[1] * 31, *PROMPTS]
    options = {**options, "max_new_tokens": 20}
    got = generate(model, prompts, **options)
    (taken,) = recorded
    assert taken.warmed == 2
    assert taken.replays >= 7
    monkeypatch.undo()
    assert generate(model, prompts, **options) == got
    assert len(recorded) == 1


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_keys_of_later_steps_follow_their_beam_in_a_graph(name, recorded, request, monkeypatch):
    """`reorder` copies as many keys as the host says, which a capture reads once."""
    model, options = request.getfixturevalue(name), {"num_beams": 4, "max_new_tokens": 25, "eos_token_id": ()}
    got = generate(model, PROMPTS[:2], **options)
    assert recorded[0].replays > 20
    monkeypatch.undo()
    assert generate(model, PROMPTS[:2], **options) == got


def test_where_there_is_no_graph(gpt2, recorded, monkeypatch):
    short = generate(gpt2, PROMPTS, max_new_tokens=8)
    assert not recorded, "a capture costs more than it gains"
    assert generate(gpt2, PROMPTS, max_new_tokens=8, cuda_graph=True) == short
    assert len(recorded) == 1

    def refuse(self, function):
        function()
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(Recorded, "capture", refuse)
    with pytest.raises(torch.OutOfMemoryError):
        generate(gpt2, PROMPTS, cuda_graph=True)
    options = {"max_new_tokens": 18, "eos_token_id": ()}
    with pytest.warns(UserWarning, match="cuda_graph: the step is not captured, and runs by single launches: CUDA out"):
        refused = generate(gpt2, PROMPTS, **options)
    assert refused == generate(gpt2, PROMPTS, cuda_graph=False, **options)
    with pytest.raises(ValueError, match="got True; stop strings are looked for on the host"):
        generate(gpt2, PROMPTS, num_beams=2, stop="a", tokenizer=Letters(), cuda_graph=True)
    monkeypatch.undo()
    assert refused == generate(gpt2, PROMPTS, **options)
    with pytest.raises(ValueError, match=r"cuda_graph: .* got True; it needs a CUDA device, and the model is on cpu"):
        generate(gpt2, PROMPTS, cuda_graph=True)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: expected an integer from 1 on, got 0"),
        ({"min_new_tokens": 9, "max_new_tokens": 5}, "min_new_tokens: expected at most max_new_tokens=5, got 9"),
        ({"temperature": -1.0}, "temperature: expected 0 or a positive number, got -1.0"),
        ({"temperature": math.nan}, "temperature: expected 0 or a positive number, got nan"),
        ({"top_k": -1, "temperature": 1.0}, "top_k: expected an integer from 0 on, got -1"),
        ({"top_p": 0.0}, "top_p: expected a number above 0 and at most 1, got 0.0"),
        ({"min_p": 1.5}, "min_p: expected a number from 0 to 1, got 1.5"),
        ({"top_k": 5}, "temperature: expected a positive one with top_k=5, .* set temperature=1"),
        ({"repetition_penalty": 0}, "repetition_penalty: expected a positive number, got 0"),
        ({"num_beams": 2, "temperature": 1.0}, "temperature: expected 0 with num_beams=2, .* got 1.0"),
        ({"early_stopping": 1}, 'early_stopping: expected True, False or "never", got 1'),
        ({"length_penalty": "1"}, "length_penalty: expected a finite number, got '1'"),
        ({"stop": ""}, "stop: expected strings that are not empty"),
        ({"stop": "x"}, "tokenizer: expected one with stop strings"),
        ({"eos_token_id": 50}, r"eos_token_id: expected ids from 0 to 49, got \(50,\)"),
        ({"eos_token_id": "x"}, "eos_token_id: expected a token's id, or several, got 'x'"),
        ({"seed": 0.5}, "seed: expected an integer of 64 bits, got 0.5"),
        ({"cuda_graph": 1}, 'cuda_graph: expected True, False or "auto", got 1'),
        ({"rows": [1]}, r"rows: expected a number from 0 on for each of 4 prompts, got \[1\]"),
        ({"rows": 5}, "rows: expected a number from 0 on for each of 4 prompts, got 5"),
        ({"rows": ["a"] * 4}, "rows: expected a number from 0 on for each of 4 prompts, got "),
        ({"stop": None}, "stop: expected a string, or several, got None"),
        ({"eos_token_id": 1.5}, "eos_token_id: expected a token's id, or several, got 1.5"),
        ({"temperature": 1e-300}, "temperature: expected 0, .* or at least 1.2e-38, .* got 1e-300"),
        ({"min_new_tokens": 2, "eos_token_id": range(50)}, "min_new_tokens: expected 0 where each of the 50 ids ends"),
        ({"attention_mask": [[1]]}, r"attention_mask: expected with a padded tensor of input_ids \(B, S\)"),
        ({"do_sample": True}, "do_sample: expected one of max_new_tokens, min_new_tokens"),
    ],
)
def test_wrong_options(options, error, gpt2):
    with pytest.raises(ValueError, match=error):
        generate(gpt2, PROMPTS, **options)


@pytest.mark.parametrize(
    ("ids", "error"),
    [
        ([], "input_ids: expected at least one prompt, got none"),
        ([[1], []], "input_ids: expected at least one token in every prompt, got none in prompt 1"),
        ([[1], [50]], "input_ids: expected ids from 0 to 49, the model's, got 50 to 50 in prompt 1"),
        ([[1] * 33], "input_ids: expected at most 32 tokens, the model's n_positions, got 33 in prompt 0; leave out"),
        ("text", "input_ids: expected token ids, .* got a str; a tokenizer turns text into ids"),
        (["text"], "input_ids: expected token ids"),
        (["12"], "input_ids: expected token ids"),
        ([[1.7, 2.2]], "input_ids: expected token ids"),
        (np.ones(2), "input_ids: expected token ids"),
        (torch.ones(2), "input_ids: expected integers, got torch.float32"),
        (torch.ones(0, 3, dtype=torch.int64), "input_ids: expected at least one prompt, got none"),
        (torch.ones(1, 2), "input_ids: expected integers, got torch.float32"),
    ],
)
def test_wrong_prompts(ids, error, gpt2):
    with pytest.raises(ValueError, match=error):
        generate(gpt2, ids)


def test_a_cache_that_does_not_fit(t5):
    with pytest.raises(ValueError, match=r"cache: .* got 2,048,000\.0 GB for 4 rows of 1000000000000 tokens, of the"):
        generate(t5, PROMPTS, max_new_tokens=10**12)


def test_wrong_models(gpt2):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    with pytest.raises(ValueError, match=r"model: expected a fastlm\.models.GPT2 or T5, got a Bert"):
        generate(Bert(BertConfig(vocab_size=10, **sizes)), PROMPTS)
    with pytest.raises(ValueError, match="num_beams: expected 1 where tokens are streamed, got 2"):
        stream(gpt2, PROMPTS, num_beams=2)
    broken = GPT2(gpt2.config)
    torch.nn.init.constant_(broken.norm.weight, torch.nan)
    for options in ({}, {"temperature": 1.0}, {"num_beams": 2}):
        with pytest.raises(FloatingPointError, match="logits: expected numbers, got NaN"):
            generate(broken, PROMPTS, **options)


def test_spans_are_those_that_the_decoder_writes():
    """A T5 that has learned one corrupted text by heart."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    model = T5(T5Config(vocab_size=40, **sizes))
    sentinels, source, written = (39, 38, 37), [5, 39, 8, 38, 9, 1], [39, 6, 7, 38, 11, 1]
    train(model, input_ids=torch.tensor([source]), labels=torch.tensor([written]))
    assert fill_spans(model, source, sentinels, 1) == [[6, 7], [11]]
    assert fill_spans(model, source, sentinels, 1, tokens=2) == [[6], []]
    for wrong in ([5, 8, 1], [5, 38, 1], [38, 5, 39, 1]):
        with pytest.raises(ValueError, match=r"ids: expected the sentinels 0, 1, \.\.\. in this order"):
            fill_spans(model, wrong, sentinels, 1)
