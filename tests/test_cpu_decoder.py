"""The step of generation in C++: its products, and its logits beside the model's own forward."""

import copy

import pytest
import torch
from models import offsets, widen

from fastlm import _native
from fastlm.generate import cpu_decoder
from fastlm.generate.cpu_decoder import CpuDecoder
from fastlm.generate.decoder import PlainDecoder
from fastlm.generate.decoders import make_decoder
from fastlm.models import GPT2, T5, GPT2Config, T5Config
from fastlm.nn.linear import Linear
from fastlm.testing.compare import ModelComparison

pytestmark = pytest.mark.skipif(bool(_native.missing_cpu()), reason=str(_native.missing_cpu()))

STEPS = 4
PROMPTS = (5, 1, 9)
SIZES = {
    "gpt2": {"n_embd": 48, "n_layer": 2, "n_head": 3, "n_positions": 32},
    "gpt2-wide": {"n_embd": 64, "n_layer": 1, "n_head": 2, "n_positions": 32, "n_inner": 128},
    "gpt2-erf": {"n_embd": 40, "n_layer": 1, "n_head": 2, "n_positions": 32, "n_inner": 72, "bias": False}
    | {"activation_function": "gelu"},
    "t5": {"d_model": 48, "d_kv": 20, "d_ff": 72, "num_layers": 1, "num_decoder_layers": 2, "num_heads": 3}
    | {"relative_attention_num_buckets": 4, "relative_attention_max_distance": 3},
    "t5-gated": {"d_model": 32, "d_kv": 16, "d_ff": 40, "num_layers": 1, "num_heads": 2}
    | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}


def make(name):
    torch.manual_seed(0)
    cls, config = (GPT2, GPT2Config) if name.startswith("gpt2") else (T5, T5Config)
    return widen(cls(config(vocab_size=67, **SIZES[name]))).eval()


def texts(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 67, (n,), generator=generator) for n in lengths]


def decoder_of(model, rows, weights="float32"):
    cache = model.new_cache(rows, max(PROMPTS) + STEPS)
    return PlainDecoder(model, cache) if weights == "plain" else CpuDecoder(model, cache, weights)


def prefill(decoder, prompts):
    return decoder.prefill(torch.cat(prompts), offsets([*map(len, prompts)])[:-1], max(map(len, prompts)))


def decode(model, prompts, tokens, weights="float32"):
    """The logits of each step: (steps, rows, vocab), the prompt's first. tokens: (steps, rows)."""
    decoder = decoder_of(model, len(prompts), weights)
    return torch.stack([prefill(decoder, prompts), *(decoder.step(row) for row in tokens)])


def forwards(model, prompts, tokens):
    """The same from one forward of the model for each row."""
    rows = []
    for prompt, written in zip(prompts, tokens.t()):
        if isinstance(model, T5):
            start = torch.tensor([model.config.decoder_start_token_id])
            rows.append(model(prompt[None], torch.cat([start, written])[None])[0])
        else:
            rows.append(model(torch.cat([prompt, written])[None])[0, len(prompt) - 1 :])
    return torch.stack(rows, 1)


def round_weight(weight, weights):
    if weights == "bfloat16":
        return weight.bfloat16().float()
    if weights == "int8":
        quantized, scale = cpu_decoder.quantize(weight)
        return quantized * scale[:, None]
    return weight


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("cols", [4, 36, 192, 1052])
def test_products_are_those_of_the_rounded_weights_in_every_batch(cols, weights):
    """To the rounding of a float32 sum: a row of `batch` has the same bits alone, and on any number of threads."""
    generator = torch.Generator().manual_seed(cols)
    rows, batch = 83, 19
    w, bias = torch.randn(rows, cols, generator=generator), torch.randn(rows, generator=generator)
    x = torch.randn(batch, cols, generator=generator)
    packer = cpu_decoder._Packer(weights)
    matrix = packer.matrix(w, bias)

    def product(x, threads):
        y = torch.full((x.shape[0], rows), torch.nan)
        _native.cpu().matvec(matrix=matrix, x=x, batch=x.shape[0], y=y, threads=threads)
        return y

    y = product(x, 2)
    exact = x.double() @ round_weight(w, weights).double().t() + bias.double()
    size = x.abs().double() @ round_weight(w, weights).abs().double().t() + bias.abs().double()
    # Each lane adds cols / 16 products or more, then 16 lanes are added: as many roundings as there are columns, at
    # most, and two of the scale and the bias.
    assert ((y - exact).abs() <= (cols + 2) * 2.0**-24 * size).all()
    for b in (0, 7, 11, 18):
        assert torch.equal(product(x[b : b + 1], 1)[0], y[b])
    for count in (2, 3, 5, 8):
        assert torch.equal(product(x[:count], 1), y[:count])


@torch.no_grad()
@pytest.mark.parametrize("weights", ["plain", "float32", "bfloat16", "int8"])
@pytest.mark.parametrize("name", [*SIZES])
def test_logits_are_those_of_whole_forwards_with_the_rounded_weights(name, weights):
    """To the float32 bound of whole models: rounding the weights, once, is all that bfloat16 and int8 change.

    The model's own weights are rounded here, since it reads the prompts. "plain": its own step, in torch and ops.
    """
    model, comparison = make(name), ModelComparison()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.copy_(round_weight(parameter, weights))
    exact = copy.deepcopy(model).double()
    for seed in range(3):
        prompts, tokens = texts(PROMPTS, seed), torch.stack(texts([len(PROMPTS)] * STEPS, seed + 10))
        ours = decode(model, prompts, tokens, weights)
        comparison.add("logits", ours, forwards(model, prompts, tokens), forwards(exact, prompts, tokens))
    assert not comparison.failures(), comparison.failures()


@torch.inference_mode()
@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_rows_move_and_leave_without_a_trace(name):
    """After `reorder` a row's logits have the bits of the row that it was, whatever the other rows are."""
    model, prompts = make(name), texts(PROMPTS)
    decoder, kept = decoder_of(model, 3), decoder_of(model, 3)
    prefill(decoder, prompts), prefill(kept, prompts)
    tokens = torch.tensor([5, 6, 7])
    assert torch.equal(decoder.step(tokens), kept.step(tokens))
    index = torch.tensor([1, 2, 2])
    decoder.reorder(index)
    assert torch.equal(decoder.step(tokens[index]), kept.step(tokens)[index])
    decoder.reorder(torch.tensor([1]))
    assert torch.equal(decoder.step(tokens[2:]), kept.step(tokens)[2:])


def test_weights_are_packed_once_and_anew_after_a_change():
    model = make("gpt2")
    first = cpu_decoder.pack(model, "int8")
    assert cpu_decoder.pack(model, "int8") is first
    with torch.no_grad():
        model.layers[0].out.weight.mul_(2.0)
    assert cpu_decoder.pack(model, "int8") is not first
    assert cpu_decoder.pack(model, "float32").bytes > 3.5 * first.bytes


@torch.no_grad()
@pytest.mark.parametrize("weights", [*cpu_decoder.FORMS])
def test_changed_and_new_parameters_are_read(weights):
    """`.data` does not raise the version, and a new parameter may lie where the old one was."""
    model, prompts, tokens = make("t5"), texts(PROMPTS), torch.tensor([[3, 4, 5]])
    decode(model, prompts, tokens, weights)
    for parameter in model.decoder.parameters():
        parameter.data.copy_(torch.randn_like(parameter) / 4)
    assert torch.equal(decode(model, prompts, tokens, weights), decode(copy.deepcopy(model), prompts, tokens, weights))
    out = model.decoder.layers[0].attention.out
    for _ in range(10):
        shape, out.weight = out.weight.shape, None
        out.weight = torch.nn.Parameter(torch.randn(shape))
        fresh = decode(copy.deepcopy(model), prompts, tokens, weights)
        assert torch.equal(decode(model, prompts, tokens, weights), fresh)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_a_decoder_keeps_the_weights_that_it_reads(name):
    model, prompts, tokens = make(name), texts(PROMPTS), torch.tensor([3, 4, 5])
    wanted = decode(model, prompts, tokens[None])[1]
    decoder = decoder_of(model, 3)
    prefill(decoder, prompts)
    shapes = [parameter.shape for parameter in model.parameters()]
    model.to(torch.float64)
    others = [torch.full(shape, torch.nan) for shape in shapes for _ in range(2)]  # where the weights were
    assert torch.equal(decoder.step(tokens), wanted)
    assert len(others) == 2 * len(shapes)


def test_the_model_itself_decodes_where_the_step_would_leave_something_out():
    class Twice(Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = make("gpt2")
    assert cpu_decoder.missing(model) is None
    hook = model.layers[0].mlp.register_forward_hook(lambda module, args, result: 0 * result)
    assert "layers.0.mlp has a forward hook" in cpu_decoder.missing(model)
    assert isinstance(make_decoder(model, [3], 4), PlainDecoder)
    with pytest.raises(ValueError, match=r"weights: expected None, .*layers\.0\.mlp has a forward hook"):
        make_decoder(model, [3], 4, weights="int8")
    hook.remove()
    assert isinstance(make_decoder(model, [3], 4), CpuDecoder)
    model.layers[1].qkv = Twice(48, 144)
    assert "layers.1.qkv is a test_cpu_decoder." in cpu_decoder.missing(model)
    model = make("gpt2")
    model.layers[1].out.forward = lambda x: x
    assert "layers.1.out has a forward hook, or a forward of its own" in cpu_decoder.missing(model)


@torch.no_grad()
def test_refusals_name_the_argument_and_change_nothing():
    model, prompts = make("gpt2"), texts(PROMPTS)
    with pytest.raises(ValueError, match="weights: expected one of 'float32', 'bfloat16', 'int8', got 'int4'"):
        decoder_of(model, 3, "int4")
    with pytest.raises(ValueError, match=r"weights: expected None.* word is bfloat16 on cpu"):
        decoder_of(copy.deepcopy(model).bfloat16(), 3)
    narrow = GPT2(GPT2Config(vocab_size=11, n_embd=6, n_head=1, n_layer=1, n_positions=8))
    with pytest.raises(ValueError, match="weights: expected float32 for a layer with 6 inputs, got int8"):
        decoder_of(narrow, 1, "int8")
    decoder = decoder_of(model, 3)
    prefill(decoder, prompts)
    with pytest.raises(ValueError, match="ids: expected token ids from 0 and below vocab_size=67, got 67 in row 1"):
        decoder.step(torch.tensor([1, 67, 1]))
    assert decoder.cache.lengths.tolist() == list(PROMPTS)
    for _ in range(STEPS):
        decoder.step(torch.tensor([1, 2, 3]))
    with pytest.raises(
        ValueError, match=f"cache: expected fewer tokens in a row than its length {max(PROMPTS) + STEPS}"
    ):
        decoder.step(torch.tensor([1, 2, 3]))
