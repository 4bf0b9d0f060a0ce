"""One graph for all lengths: torch.compile(dynamic=True) and torch.export of every op and every module of fastlm.nn."""

import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import fastlm.nn as nn
from fastlm import ops
from fastlm.ops import _registry
from fastlm.testing import checks

LENGTHS = range(5, 45, 2)
RNG, SPECIAL = torch.tensor([3, 4]), {"mask_token_id": 3, "vocab_size": 50, "special_ids": (0, 1), "seed": 7}
WEIGHT, BIAS = torch.linspace(0.5, 1.5, 16), torch.linspace(-1, 1, 16)
TABLE, BUCKETS = torch.linspace(-1, 1, 100 * 16).view(100, 16), torch.linspace(-1, 1, 16).view(8, 2)
RESIDUAL = {"dropout_p": 0.1, "rng": RNG, "return_residual": True}


def rows(n):
    return (torch.randn(2, n, 16, requires_grad=True),)


def ids(n):
    return (torch.randint(50, (2, n)),)


def packed_ids(n):
    return (torch.randint(50, (n,)),)


def heads(n):
    return (torch.randn(2, n, 2, 8, requires_grad=True),)


def padded_heads(n):
    return *heads(n), torch.arange(n).expand(2, n) < n - 1


def labelled(n):
    return *rows(n), torch.randint(16, (2, n))


def packed_heads(n):
    return torch.randn(n, 2, 8, requires_grad=True), torch.tensor([0, n - 2, n], dtype=torch.int32)


def whole_words(n):
    return *ids(n), torch.arange(n).expand(2, n) % 3 == 0


class Call(NamedTuple):
    """function(*make(n), backend): a call of an op whose inputs have a dimension of length n."""

    op: str
    function: Callable
    make: Callable


def mlm(*args, backend, **options):
    return tuple(ops.mlm_mask(*args, **SPECIAL, **options, backend=backend))


CALLS = {
    "layer_norm": Call("layer_norm", lambda x, backend: ops.layer_norm(x, WEIGHT, BIAS, backend=backend), rows),
    "layer_norm-residual": Call(
        "layer_norm", lambda x, backend: ops.layer_norm(x, WEIGHT, residual=x, **RESIDUAL, backend=backend), rows
    ),
    "rms_norm": Call("rms_norm", lambda x, backend: ops.rms_norm(x, WEIGHT, backend=backend), rows),
    "rms_norm-residual": Call(
        "rms_norm", lambda x, backend: ops.rms_norm(x, WEIGHT, residual=x, **RESIDUAL, backend=backend), rows
    ),
    "gelu": Call("gelu", lambda x, backend: ops.gelu(x, BIAS, gate=x, backend=backend), rows),
    "silu": Call("silu", lambda x, backend: ops.silu(x, gate=x, backend=backend), rows),
    "dropout": Call("dropout", lambda x, backend: ops.dropout(x, 0.1, rng=RNG, backend=backend), rows),
    "dropout-relu": Call("dropout", lambda x, backend: ops.dropout(x, 0.1, rng=RNG, relu=True, backend=backend), rows),
    "embedding": Call(
        "embedding", lambda i, backend: ops.embedding(i, TABLE, TABLE, weight=WEIGHT, bias=BIAS, backend=backend), ids
    ),
    "embedding-packed": Call(
        "embedding", lambda i, backend: ops.embedding(i, TABLE, TABLE, positions=i, backend=backend), packed_ids
    ),
    "cross_entropy": Call(
        "cross_entropy", lambda x, t, backend: ops.cross_entropy(x, t, z_loss=0.1, backend=backend), labelled
    ),
    "cross_entropy-inplace": Call(
        "cross_entropy", lambda x, t, backend: ops.cross_entropy(2 * x, t, inplace=True, backend=backend), labelled
    ),
    "cross_entropy-none": Call(
        "cross_entropy", lambda x, t, backend: ops.cross_entropy(x, t, reduction="none", backend=backend), labelled
    ),
    "linear_cross_entropy": Call(
        "linear_cross_entropy", lambda x, t, backend: ops.linear_cross_entropy(x, TABLE, t, backend=backend), labelled
    ),
    "linear_cross_entropy-none": Call(
        "linear_cross_entropy",
        lambda x, t, backend: ops.linear_cross_entropy(x, TABLE, t, reduction="none", backend=backend),
        labelled,
    ),
    "attention": Call("attention", lambda x, backend: ops.attention(x, x, x, backend=backend), heads),
    "attention-causal-padded": Call(
        "attention",
        lambda x, mask, backend: ops.attention(x, x, x, causal=True, key_mask=mask, backend=backend),
        padded_heads,
    ),
    "attention-window-bias": Call(
        "attention",
        lambda x, backend: ops.attention(
            x, x, x, window_size=(3, 3), relative_bias=ops.RelativeBias(BUCKETS, max_distance=9), backend=backend
        ),
        heads,
    ),
    "attention-dropout": Call(
        "attention", lambda x, backend: ops.attention(x, x, x, dropout_p=0.1, rng=RNG, backend=backend), heads
    ),
    "attention-packed": Call(
        "attention",
        lambda x, cu, backend: ops.attention(x, x, x, cu_seqlens_q=cu, max_seqlen_q=x.shape[0], backend=backend),
        packed_heads,
    ),
    "mlm_mask": Call("mlm_mask", mlm, ids),
    "mlm_mask-packed": Call(
        "mlm_mask", lambda i, backend: mlm(i, positions=i, sample_ids=i, backend=backend), packed_ids
    ),
    "mlm_mask-capacity": Call("mlm_mask", lambda i, backend: mlm(i, capacity=16, backend=backend), ids),
    "mlm_mask-words": Call("mlm_mask", lambda i, w, backend: mlm(i, word_starts=w, backend=backend), whole_words),
}


def test_every_op_is_here():
    assert {call.op for call in CALLS.values()} == set(_registry.ops())


def everything(function, inputs):
    """Outputs and gradients by name."""
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    named = {f"output {i}": out for i, out in enumerate(outputs) if isinstance(out, torch.Tensor)}
    leaves = [x for x in inputs if x.requires_grad]
    floats = [out.square().sum() for out in outputs if isinstance(out, torch.Tensor) and out.requires_grad]
    if leaves and floats:
        named |= {f"gradient {i}": g for i, g in enumerate(torch.autograd.grad(sum(floats), leaves))}
    return named


def one_graph(function, make):
    """Compiled once for all LENGTHS, forward and backward, with the bits of the call that is not compiled."""
    torch._dynamo.reset()
    counter = CompileCounter()
    counted = torch.compile(function, backend=counter, dynamic=True, fullgraph=True)
    for n in LENGTHS:
        counted(*make(n))
    assert counter.frame_count == 1
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", dynamic=True, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in LENGTHS:
            torch.manual_seed(n)
            inputs = make(n)
            checks.assert_same_bits(everything(function, inputs), everything(compiled, inputs), f"length {n}")


def exports(function, make):
    """torch.export with a dynamic length; the program runs at another one."""

    class Module(torch.nn.Module):
        def forward(self, *args):
            return function(*args)

    length = torch.export.Dim("length", min=3, max=100)
    inputs, others = (tuple(x.detach() for x in make(n)) for n in (12, 17))
    shapes = tuple(
        {i: length for i, (size, other) in enumerate(zip(x.shape, y.shape)) if size != other}
        for x, y in zip(inputs, others)
    )
    program = torch.export.export(Module(), inputs, dynamic_shapes=(shapes,))
    checks.assert_same_bits(everything(program.module(), others), everything(function, others), "exported")


@pytest.mark.parametrize("backend", ["cpu", pytest.param("reference", marks=pytest.mark.long)])
@pytest.mark.parametrize("name", CALLS)
def test_op_compiles_once(name, backend):
    call = CALLS[name]
    one_graph(lambda *inputs: call.function(*inputs, backend=backend), call.make)


@pytest.mark.parametrize("name", CALLS)
def test_op_exports_with_a_dynamic_length(name):
    call = CALLS[name]
    exports(lambda *inputs: call.function(*inputs, backend="cpu"), call.make)


def self_attention(causal):
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    return lambda x: attention(x, x, x, need_weights=False, is_causal=causal)[0]


def masked_attention():
    """Two masks that the op cannot do, one of them with the weights."""
    attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def call(x, mask):
        weighted = attention(x, x, x, attn_mask=mask)
        return *weighted, attention(x, x, x, attn_mask=mask, need_weights=False)[0]

    return call


def masked_rows(n):
    return *rows(n), torch.eye(n).bool()


def encoder_layer(**options):
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True, **options)
    return lambda x: layer(x, rng=RNG)


def packed_encoder_layer():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0)
    return lambda x, cu: layer(x.flatten(1), cu_seqlens=cu, max_seqlen=x.shape[0])


def classes_first(n):
    return torch.randn(2, 16, n, requires_grad=True), torch.randint(16, (2, n))


def mlm_masking():
    masking = nn.MLMMasking(**SPECIAL)
    return lambda i: tuple(masking(i))


def dropout():
    module = nn.Dropout(0.1)
    return lambda x: module(x, RNG)


# Module or what makes it: (function, its inputs of length n)
MODULES = {
    "LayerNorm": (lambda: nn.LayerNorm(16), rows),
    "RMSNorm": (lambda: nn.RMSNorm(16), rows),
    "Dropout": (dropout, rows),
    "MLP": (lambda: nn.MLP(16, 32), rows),
    "MLP-gated": (lambda: nn.MLP(16, 32, gated=True, activation="silu"), rows),
    "MultiheadAttention": (lambda: self_attention(False), rows),
    "MultiheadAttention-causal": (lambda: self_attention(True), rows),
    "MultiheadAttention-mask": (masked_attention, masked_rows),
    "TransformerEncoderLayer": (encoder_layer, rows),
    "TransformerEncoderLayer-norm_first": (lambda: encoder_layer(norm_first=True, activation="gelu"), rows),
    "TransformerEncoderLayer-packed": (packed_encoder_layer, packed_heads),
    "CrossEntropyLoss": (nn.CrossEntropyLoss, classes_first),
    "LinearCrossEntropyLoss": (lambda: nn.LinearCrossEntropyLoss(16, 50), labelled),
    "MLMMasking": (mlm_masking, ids),
}


def test_every_module_is_here():
    assert {name.partition("-")[0] for name in MODULES} == set(nn.__all__)


@pytest.mark.parametrize("name", MODULES)
def test_module_compiles_once(name, seeded):
    make, inputs = MODULES[name]
    one_graph(make(), inputs)


@pytest.mark.parametrize("name", MODULES)
def test_module_exports_with_a_dynamic_length(name, seeded):
    make, inputs = MODULES[name]
    exports(make(), inputs)


def test_a_compiled_call_reads_no_mask():
    """Under torch.compile a causal mask has the values of the op's causal attention, by torch's attention."""
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    compiled = torch.compile(
        lambda x, mask: attention(x, x, x, attn_mask=mask, need_weights=False)[0], backend="eager", fullgraph=True
    )
    (x,) = rows(9)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(9)
    want = attention(x, x, x, is_causal=True, need_weights=False)[0]
    torch.testing.assert_close(compiled(x, mask), want)


FIRST_CALL = """
import torch
from fastlm import ops

torch._dynamo.config.error_on_recompile = True
options = {"mask_token_id": 3, "vocab_size": 50, "special_ids": (0, 1), "seed": 7}
mask = torch.compile(lambda i: tuple(ops.mlm_mask(i, **options)), backend="aot_eager", dynamic=True, fullgraph=True)
norm = torch.compile(lambda x: ops.layer_norm(x), backend="aot_eager", dynamic=True, fullgraph=True)
for n in (5, 9, 400):
    mask(torch.randint(50, (2, n)))
    norm(torch.randn(2, n, 16))
"""


def test_the_first_call_of_a_process_is_compiled():
    """The trace loads the backends, and torch may start it again."""
    done = subprocess.run([sys.executable, "-c", FIRST_CALL], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
