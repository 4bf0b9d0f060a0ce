"""fastlm.nn.linear: the bits of torch's linear layers under autocast, with the weights cast once a step."""

import pytest
import torch
import torch.nn.functional as F

from fastlm import models
from fastlm.models import Counts, bert
from fastlm.nn import linear as linears
from fastlm.nn.linear import Linear, linear
from fastlm.ops import _low_weights, _products, layer_norm
from fastlm.ops._heads import split_heads
from fastlm.ops._low_weights import LowWeights
from fastlm.ops._products import COLUMNS, transposed_mm
from fastlm.tasks import Micro, TrainTable
from fastlm.train import optimizer as optimizers
from fastlm.train.adamw import AdamW
from fastlm.train.optimizer import make_optimizer, train_step


def parameters(dtype=torch.float32, shape=(40, 64)):
    torch.manual_seed(0)
    x = torch.randn(*shape, dtype=torch.bfloat16)
    w, b = torch.randn(96, 64, dtype=dtype) / 8, torch.randn(96, dtype=dtype)
    return [t.requires_grad_() for t in (x, w, b)], torch.randn(*shape[:-1], 96).bfloat16()


@pytest.mark.parametrize("shape", [(40, 64), (5, 8, 64)])
def test_bits_are_those_of_torch(shape):
    """On a CPU under autocast; the bias's gradient alone is closer, since it is summed in float32."""
    inputs, dy = parameters(shape=shape)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = linear(*inputs), F.linear(*inputs)
    assert torch.equal(ours, theirs)
    got, expected = (torch.autograd.grad(y, inputs, dy) for y in (ours, theirs))
    assert all(map(torch.equal, got[:2], expected[:2]))
    exact = dy.double().flatten(0, -2).sum(0)
    assert (got[2] - exact).abs().max() < 1e-5 < (expected[2] - exact).abs().max()


@pytest.mark.parametrize("autocast", [False, True])
def test_keep_adds_the_residuals_gradient(autocast):
    inputs, dy = parameters(torch.float32 if autocast else torch.bfloat16)
    other = torch.randn(40, 64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, kept = linear(*inputs, keep=True)
        expected = torch.autograd.grad((F.linear(*inputs), inputs[0] * 1), inputs, (dy, other))
    assert torch.equal(kept, inputs[0])
    got = torch.autograd.grad((y, kept), inputs, (dy, other), retain_graph=True)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(torch.autograd.grad(kept, inputs[0], other, retain_graph=True)[0], other)
    assert torch.equal(torch.autograd.grad(y, inputs[0], dy)[0], torch.mm(dy, inputs[1].bfloat16()))


@pytest.mark.parametrize("autocast", [False, True])
def test_a_constant_bias_gets_its_gradient_from_the_norm(autocast):
    """On a CPU that of a layer that sums its rows, but for the rounding of these rows; and the layer sums none."""
    (x, w, b), dy = parameters(torch.float32 if autocast else torch.bfloat16)
    residual, weight = torch.randn(40, 96).bfloat16(), torch.randn(96, requires_grad=True)
    results = []
    for constant in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            h = linear(x, w, b, constant_bias=constant)
            rng = torch.tensor([1, 2])
            y = layer_norm(h, weight, residual=residual, dropout_p=0.2, rng=rng, x_bias=b if constant else None)
        (dh,) = torch.autograd.grad(y, h, dy, retain_graph=True)
        results.append([y, *torch.autograd.grad(y, (x, w, b, weight), dy)])
        assert h.grad_fn is not None
        assert any(node.variable is b for node, _ in h.grad_fn.next_functions if hasattr(node, "variable")) != constant
    (*theirs, db, dweight), (*ours, summed, other) = results
    assert all(map(torch.equal, (*ours, other), (*theirs, dweight)))
    assert ((summed - db).abs() <= 2.0**-8 * dh.float().abs().sum(0)).all()


def test_what_torch_runs(monkeypatch):
    """Without a gradient, outside of autocast and in float64 nothing changes, and none of the copies is asked for."""
    monkeypatch.setattr(linears, "_low", None)
    inputs, _ = parameters()
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            assert torch.equal(linear(*inputs), F.linear(*inputs))
        wide = [t.detach().double().requires_grad_() for t in inputs]
        assert linear(*wide).dtype == torch.float64
    assert torch.equal(linear(inputs[0].float(), *inputs[1:]), F.linear(inputs[0].float(), *inputs[1:]))


def test_weights_are_cast_once_a_step():
    """In one call for those that were asked for before; they are the weights of this step, not of the one before."""
    layers, x = torch.nn.ModuleList([Linear(64, 64), Linear(64, 64)]), torch.randn(8, 64).bfloat16()
    foreign, low = Linear(64, 64), LowWeights(layers.parameters())
    for step in range(3):
        with low.fresh(torch.bfloat16), torch.autocast("cpu", torch.bfloat16):
            with torch.profiler.profile() as profile:
                for _ in range(2):  # micro-batches
                    y = layers[1](layers[0](x))
                expected = F.linear(F.linear(x, layers[0].weight, layers[0].bias), layers[1].weight, layers[1].bias)
            assert torch.equal(y, expected)
            assert torch.equal(foreign(x), F.linear(x, foreign.weight, foreign.bias))
        casts = sum(event.count for event in profile.key_averages() if event.key == "aten::_to_copy")
        assert casts == 4 + (4 if step == 0 else 0)  # torch's own of `expected`; ours in the first step
        assert len(low._copies) == 4
        with torch.no_grad():
            for p in layers.parameters():
                p.add_(1.0)
    with low.fresh(torch.float16), torch.autocast("cpu", torch.float16):
        assert layers[0](x.half()).dtype == torch.float16
    assert _low_weights._current is None


@pytest.mark.parametrize(("recompute", "micro_batches"), [(False, 2), (True, 2), (False, 1)])
def test_a_steps_losses_and_weights(recompute, micro_batches, monkeypatch):
    """Of BERT in bfloat16: the same bits as with weights cast at each use and gradients cast to float32.

    Activations are kept, and recomputed. From the second step on AdamW has written the copies; the gradients of a
    single micro-batch are bfloat16. A tied table's is then rounded (test_tied.py), so it is taken apart there.
    """
    if micro_batches == 1:
        monkeypatch.setattr(bert, "tied", lambda word: (word, word, False))
    casts, dtypes = [], []
    copy, update = torch._foreach_copy_, optimizers.total_norm
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, of: casts.append(len(to)) or copy(to, of))
    monkeypatch.setattr(optimizers, "total_norm", lambda g: dtypes.append({x.dtype for x in g}) or update(g))

    def run(copies):
        torch.manual_seed(0)
        config = models.BertConfig(
            vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
        )
        model = models.Bert(config).train()
        model.checkpoint_activations = recompute
        if not copies:
            monkeypatch.setattr(LowWeights, "get", lambda self, weight, dtype: None)
            monkeypatch.setattr(AdamW, "low_gradients", False)
        optimizer, results = make_optimizer(model, TrainTable(dtype="bfloat16")), []
        for step in range(3):
            micros = []
            for m in range(micro_batches):
                ids = torch.randint(5, 100, (64,), generator=torch.Generator().manual_seed(2 * step + m))
                inputs = {"input_ids": ids, "cu_seqlens": torch.tensor([0, 20, 64], dtype=torch.int32)}
                inputs |= {"max_seqlen": 44, "rng": torch.tensor([0, 2 * step + m]), "targets": ids, "reduction": "sum"}
                micros.append(Micro(inputs, Counts(predicted=64)))
            results.append(train_step(model, optimizer, micros, lr=1e-2, grad_clip=1.0, dtype=torch.bfloat16).tolist())
        assert all(p.grad is None and p.grad_dtype == torch.float32 for p in model.parameters())
        return results, list(model.parameters())

    (losses, weights), (expected, others) = run(True), run(False)
    assert losses == expected
    assert casts == []
    low = {torch.float32, torch.bfloat16} if micro_batches == 1 else {torch.float32}
    assert dtypes == 3 * [low] + 3 * [{torch.float32}]
    assert all(map(torch.equal, weights, others))


def test_a_bias_with_a_stride():
    x, w, b = torch.randn(6, 32).bfloat16(), torch.randn(16, 32).bfloat16(), torch.randn(32).bfloat16()
    for bias in (b[::2], b[:1].expand(16)):
        assert torch.equal(_products.linear(x, w, bias), _products.linear(x, w, bias.contiguous()))


def test_a_step_in_float16_has_float32_gradients():
    torch.manual_seed(0)
    model = models.GPT2(models.GPT2Config(vocab_size=99, n_positions=16, n_embd=32, n_layer=1, n_head=2))
    ids = torch.randint(99, (1, 16))
    micro = Micro({"input_ids": ids, "labels": ids}, Counts(16, 15))
    optimizer = make_optimizer(model, TrainTable())
    loss = train_step(model, optimizer, [micro], lr=1e-3, grad_clip=1.0, dtype=torch.float16)[0]
    assert loss.isfinite()


def test_heads_whose_gradients_are_apart():
    """Any gradients of q, k and v, or none of some, give that of the whole."""
    qkv = torch.randn(2, 5, 3 * 4 * 8, requires_grad=True)
    parts, plain = split_heads(qkv, 4), qkv.unflatten(-1, (3, 4, 8)).unbind(-3)
    assert all(map(torch.equal, parts, plain))
    grads = [torch.randn(2, 5, 4, 8) for _ in range(3)]
    views = torch.stack(grads, -3).unbind(-3)
    for which in ((0, 1, 2), (1,), (0, 2)):
        for given in (grads, views, views[::-1]):
            dy = [given[i] for i in which]
            got = torch.autograd.grad([parts[i] for i in which], qkv, dy, retain_graph=True)[0]
            assert torch.equal(got, torch.autograd.grad([plain[i] for i in which], qkv, dy, retain_graph=True)[0])


@pytest.mark.parametrize(("n", "m"), [(1, 1), (33, 31), (64, 160), (100, 300)])
def test_product_of_a_transposed_copy(n, m):
    """Of rows that lie apart, in whole tiles and edges, and without the copy."""
    a, eye = torch.randn(n, m + 7).bfloat16()[:, 3 : m + 3], torch.eye(n, COLUMNS + n).bfloat16()
    assert torch.equal(transposed_mm(a, eye)[:, :n], a.t())
    assert torch.equal(transposed_mm(a, eye[:, :n]), a.t())
