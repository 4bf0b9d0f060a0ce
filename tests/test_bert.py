"""fastlm.models.Bert against transformers.BertForMaskedLM: results, gradients, training; its inputs."""

import pytest
import torch
import torch.nn.functional as F
from bert_models import LENGTHS, MASK, NO_DROPOUT, PAD, TINY, Batch, make_bert, run_ours, run_theirs
from models import gradients, loss_curves, to_transformers

from fastlm import ops
from fastlm.models import Bert, BertConfig
from fastlm.testing.compare import ModelComparison

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize("act", ["gelu", "gelu_new"])
def test_equals_transformers(act, device):
    """Losses, logits and every gradient: error against float64 at most four times that of Transformers' eager model."""
    comparison = ModelComparison()
    for seed in range(3):
        bert = make_bert(seed, hidden_act=act, **NO_DROPOUT).to(device)
        batch = Batch(seed, device=device)
        ours, eager = run_ours(bert, batch), run_theirs(bert, batch, torch.float32)
        exact = run_theirs(bert, batch, torch.float64)
        for name in exact:
            comparison.add(name, ours[name], eager[name], exact[name])
    assert len(comparison.ours) == 2 + len(list(bert.parameters()))
    assert not comparison.failures(), "; ".join(comparison.failures())


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "parameters"])
def test_equals_transformers_in_bfloat16(autocast, device):
    """The same bound in bfloat16: autocast over float32 parameters, and bfloat16 parameters."""
    comparison = ModelComparison()
    for seed in range(3):
        bert, batch = make_bert(seed, **NO_DROPOUT).to(device), Batch(seed, device=device)
        if not autocast:
            bert.to(torch.bfloat16)
        ours = run_ours(bert, batch, torch.bfloat16 if autocast else None)
        exact = run_theirs(bert, batch, torch.float64)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
            eager = run_theirs(bert, batch, bert.head.bias.dtype)
        for name in exact:
            comparison.add(name, ours[name], eager[name], exact[name])
    assert not comparison.failures(), "; ".join(comparison.failures())


def test_bfloat16_residual_stream(device):
    """Between the layers x is bfloat16 under autocast, and parameters and their gradients stay float32."""
    bert, batch, seen = make_bert().to(device), Batch(device=device), []
    for layer in bert.layers:
        layer.register_forward_hook(lambda module, inputs, out: seen.append((inputs[0].dtype, out.dtype)))
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = bert(**batch.packed, **batch.sparse())
    loss.backward()
    assert seen == [(torch.bfloat16, torch.bfloat16)] * 2
    assert loss.dtype == torch.float32
    assert {grad.dtype for grad in gradients(bert).values()} == {torch.float32}


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_equals_packed(side, device):
    """Real tokens: the same logits, loss and gradients, whatever ids stand in the padding."""
    bert = make_bert(**NO_DROPOUT).double().to(device)
    batch = Batch(device=device)
    inputs, labels = batch.sides[side]
    real = inputs["attention_mask"].bool()
    packed = run_ours(bert, batch)
    for noise in (False, True):
        if noise:
            junk = torch.randint_like(inputs["input_ids"], TINY["vocab_size"])
            inputs = {**inputs, "input_ids": torch.where(real, inputs["input_ids"], junk)}
        bert.zero_grad()
        loss = bert(**inputs, targets=labels)
        loss.backward()
        torch.testing.assert_close(loss.detach(), packed["losses"].mean())
        torch.testing.assert_close(bert(**inputs)[real], packed["logits"])
        for name, grad in gradients(bert).items():
            torch.testing.assert_close(grad, packed[name], msg=name)


def test_left_padding_equals_transformers(device):
    """Given the positions that we count, Transformers agrees; and ours can be told to count as it does."""
    bert, batch = make_bert().eval().to(device), Batch(device=device)
    inputs, _ = batch.sides["left"]
    real = inputs["attention_mask"].bool()
    theirs = to_transformers(bert)
    columns = torch.arange(real.shape[1], device=device).expand_as(real)
    for positions in ((real.cumsum(-1) - 1).clamp(min=0), columns):
        want = theirs(**inputs, position_ids=positions).logits[real]
        torch.testing.assert_close(bert(**inputs, positions=positions)[real], want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(theirs(**inputs).logits[real], want)


def test_defaults(device):
    """No mask: all tokens are real. No positions, no max_seqlen: from cu_seqlens. No types: 0."""
    bert, batch = make_bert().eval().to(device), Batch(device=device)
    ids = batch.packed["input_ids"][:22].view(2, 11)
    torch.testing.assert_close(bert(ids), bert(ids, attention_mask=torch.ones_like(ids)))
    cu = batch.packed["cu_seqlens"]
    positions = torch.cat([torch.arange(n) for n in LENGTHS]).to(device)
    types = torch.zeros_like(positions)
    full = bert(batch.packed["input_ids"], cu_seqlens=cu, max_seqlen=16, positions=positions, token_type_ids=types)
    torch.testing.assert_close(bert(batch.packed["input_ids"], cu_seqlens=cu), full)


def test_sparse_head(device):
    """Logits at an index, and the loss without count, with an int, with nothing to predict, summed and per token."""
    bert, batch = make_bert().eval().to(device), Batch(device=device)
    sparse, logits = batch.sparse(), bert(**batch.packed)
    index, targets, count = sparse["index"], sparse["targets"], int(sparse["count"])
    torch.testing.assert_close(bert(**batch.packed, index=index), logits[index])
    want = F.cross_entropy(logits, batch.labels)
    for given in (None, count, torch.tensor(count)):
        torch.testing.assert_close(bert(**batch.packed, index=index, targets=targets, count=given), want)
    total = bert(**batch.packed, **sparse, reduction="sum")
    torch.testing.assert_close(total / count, want)
    each = bert(**batch.packed, index=index, targets=targets, reduction="none")
    torch.testing.assert_close(each.sum(), total)
    nothing = bert(**batch.packed, index=index, targets=targets * 0 - 100, count=0, reduction="sum")
    nothing.backward()
    assert nothing == 0
    assert all(not grad.any() for grad in gradients(bert).values())


def test_masked_training_coincides_with_transformers(device):
    """50 steps on masked batches, dropout off: the losses of both models lie on one curve, and fall."""
    bert = make_bert(**NO_DROPOUT).to(device)
    theirs = to_transformers(bert)

    def masked_batch(step):
        batch = Batch(step % 2, device=device)
        return batch, ops.mlm_mask(
            batch.packed["input_ids"],
            mask_token_id=MASK,
            vocab_size=TINY["vocab_size"],
            special_ids=[PAD],
            seed=1,
            mlm_probability=0.4,
        )

    def our_loss(step):
        batch, masked = masked_batch(step)
        sparse = {"index": masked.index, "targets": masked.targets, "count": masked.count}
        return bert(**{**batch.packed, "input_ids": masked.input_ids}, **sparse)

    def their_loss(step):
        batch, masked = masked_batch(step)
        arguments, real = batch.theirs()
        arguments["input_ids"] = arguments["input_ids"].masked_scatter(real, masked.input_ids)
        arguments["labels"] = torch.full_like(arguments["labels"], -100).masked_scatter(real, masked.labels)
        return theirs(**arguments).loss

    ours, eager = loss_curves([(bert, our_loss), (theirs, their_loss)], lr=0.05)
    assert ours == pytest.approx(eager, rel=1e-4)
    assert ours[-1] < 0.5 * ours[0]


def test_dropout_is_a_function_of_seed_and_step(device):
    """Same (seed, step), same loss and gradients; another, others; none in evaluation. Each call site has its bits."""
    bert, batch = make_bert().to(device), Batch(device=device)

    def run(*rng):
        bert.zero_grad()
        loss = bert(**batch.packed, **batch.sparse(), rng=torch.tensor(rng, device=device))
        loss.backward()
        return {"loss": loss.detach(), **gradients(bert)}

    first, again = run(1, 0), run(1, 0)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert first["loss"] != run(1, 1)["loss"]
    assert first["loss"] != run(2, 0)["loss"]
    sites = [bert.embeddings.site, *(layer.site + site for layer in bert.layers for site in range(3))]
    assert sites == list(range(7))
    torch.manual_seed(0)
    drawn = bert(**batch.packed, **batch.sparse())
    torch.manual_seed(0)
    assert torch.equal(drawn, bert(**batch.packed, **batch.sparse()))
    bert.eval()
    assert run(1, 0)["loss"] == run(1, 1)["loss"]


def test_every_dropout_is_at_work():
    """Each of the three kinds of call site changes the loss when it alone drops."""
    batch, rng = Batch(), torch.tensor([1, 2])
    bert = make_bert()
    sites = [bert.embeddings, bert.layers[0]]
    names = [(sites[0], "dropout_p"), (sites[1], "dropout_p"), (sites[1], "attention_dropout_p")]
    for module in (bert.embeddings, *bert.layers):
        module.dropout_p = module.attention_dropout_p = 0.0
    plain = bert(**batch.packed, **batch.sparse(), rng=rng)
    for module, name in names:
        setattr(module, name, 0.5)
        assert bert(**batch.packed, **batch.sparse(), rng=rng) != plain
        setattr(module, name, 0.0)


@pytest.mark.parametrize("rng", [(3, 4), None], ids=["rng", "torch"])
def test_checkpointed_activations(rng, device):
    """The same bits, though each layer runs twice, the last one on the predicted tokens alone."""
    bert, batch, runs = make_bert().to(device), Batch(device=device), []
    bert.layers[1].register_forward_pre_hook(lambda *_: runs.append(1))
    rng = None if rng is None else torch.tensor(rng, device=device)
    results = []
    for again in (False, True):
        bert.checkpoint_activations = again
        bert.zero_grad()
        torch.manual_seed(5)
        loss = bert(**batch.packed, **batch.sparse(), rng=rng)
        loss.backward()
        results.append({"loss": loss.detach(), **gradients(bert)})
    assert len(runs) == 3
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_compile(device):
    """One graph covers the training forward with dropout, and its backward gives eager's gradients."""
    bert, batch = make_bert(num_hidden_layers=1).to(device), Batch(device=device)
    sparse = batch.sparse()
    arguments = {**batch.packed, "index": sparse["index"], "targets": sparse["targets"]}
    arguments["rng"] = torch.tensor([1, 2], device=device)
    want = bert(**arguments)
    want.backward()
    eager = gradients(bert)
    bert.zero_grad()
    loss = torch.compile(bert, fullgraph=True)(**arguments)
    loss.backward()
    torch.testing.assert_close(loss, want)
    for name, grad in gradients(bert).items():
        torch.testing.assert_close(grad, eager[name], rtol=1e-4, atol=1e-6, msg=name)


def test_initialisation():
    torch.manual_seed(0)
    bert = Bert(BertConfig(vocab_size=2000, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, pad_token_id=7))
    for name, parameter in bert.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        elif "token_type" not in name:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
    assert not bert.embeddings.word[7].any()
    assert bert.embeddings.word[0].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, "hidden_size: expected a positive integer, got 0"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers: expected a positive integer, got 1.5"),
        ({"num_attention_heads": 5}, "num_attention_heads: expected a divisor of hidden_size=32, got 5"),
        ({"hidden_dropout_prob": 1.5}, r"hidden_dropout_prob: expected a probability in \[0, 1\], got 1.5"),
        ({"hidden_dropout_prob": None}, "hidden_dropout_prob: expected a number that is not negative, got None"),
        ({"layer_norm_eps": "1e-12"}, "layer_norm_eps: expected a number that is not negative, got '1e-12'"),
        ({"initializer_range": -0.02}, "initializer_range: expected a number that is not negative, got -0.02"),
        ({"pad_token_id": 83}, "pad_token_id: expected None or an id below vocab_size=83, got 83"),
        ({"pad_token_id": "0"}, "pad_token_id: expected None or an id below vocab_size=83, got '0'"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        BertConfig(**{**TINY, **changes})


IDS, CU = torch.ones(6, dtype=torch.long), torch.tensor([0, 2, 6], dtype=torch.int32)

INDEX = torch.tensor([1, 4])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": IDS}, r"input_ids: expected \(T,\) with cu_seqlens.*got \(6,\)"),
        ({"input_ids": IDS.float(), "cu_seqlens": CU}, "input_ids: expected torch.int64 or torch.int32"),
        ({"input_ids": IDS[None], "cu_seqlens": CU}, r"input_ids: expected shape \(\*,\), got \(1, 6\)"),
        ({"input_ids": IDS.repeat(5)[None]}, "max_position_embeddings=24"),
        ({"input_ids": IDS, "cu_seqlens": CU.long()}, "cu_seqlens: expected torch.int32"),
        ({"input_ids": IDS, "cu_seqlens": CU[:0]}, "cu_seqlens: expected one more entry than there are sequences"),
        ({"input_ids": IDS, "cu_seqlens": CU[1:]}, "cu_seqlens_q: expected to start at 0"),
        ({"input_ids": IDS, "cu_seqlens": CU, "max_seqlen": 25}, "max_seqlen: expected at most"),
        ({"input_ids": IDS, "cu_seqlens": CU, "attention_mask": IDS}, "attention_mask: expected None"),
        ({"input_ids": IDS[None], "attention_mask": IDS}, r"attention_mask: expected shape \(1, 6\)"),
        ({"input_ids": IDS * 83, "cu_seqlens": CU}, "input_ids: expected ids in"),
        ({"input_ids": IDS.repeat(7), "cu_seqlens": CU * 7}, "positions: expected ids in"),
        ({"input_ids": IDS, "cu_seqlens": CU, "index": INDEX.int()}, "index: expected torch.int64"),
        (
            {"input_ids": IDS, "cu_seqlens": CU, "index": INDEX + 2},
            r"index: expected .* the number of tokens = 6\), got 6",
        ),
        ({"input_ids": IDS, "cu_seqlens": CU, "index": INDEX, "targets": IDS}, r"targets: expected shape \(2,\)"),
        ({"input_ids": IDS, "cu_seqlens": CU, "targets": INDEX}, r"target: expected shape \(6,\)"),
        ({"input_ids": IDS, "cu_seqlens": CU, "targets": IDS, "count": 3}, "count: expected None without index"),
        ({"input_ids": IDS, "cu_seqlens": CU, "targets": IDS * 83}, "target: expected class indices"),
    ],
)
def test_input_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_bert()(**arguments)
