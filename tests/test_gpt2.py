"""fastlm.models.GPT2 against transformers.GPT2LMHeadModel: results, gradients, training, checkpoints, inputs."""

import warnings

import pytest
import torch
import torch.nn.functional as F
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

from fastlm.models import GPT2, GPT2Config
from fastlm.testing.compare import ModelComparison

TINY = {"vocab_size": 83, "n_positions": 24, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 56}
TINY |= {"bos_token_id": None, "eos_token_id": None}  # of a vocabulary as small
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
LENGTHS = (11, 3, 16, 1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make_gpt2(seed=0, **changes):
    return widen(GPT2(GPT2Config(**{**TINY, **changes})), seed)


class Batch:
    """The same documents packed, padded left and padded right; labels are the ids, some of them left out."""

    def __init__(self, seed=0, device="cpu"):
        generator = torch.Generator().manual_seed(seed)
        documents = [torch.randint(TINY["vocab_size"], (n,), generator=generator) for n in LENGTHS]
        labels = [torch.where(torch.rand(len(d), generator=generator) < 0.2, -100, d) for d in documents]
        self.packed = {"input_ids": torch.cat(documents), "cu_seqlens": offsets(LENGTHS), "max_seqlen": max(LENGTHS)}
        self.packed = {k: v.to(device) if k != "max_seqlen" else v for k, v in self.packed.items()}
        self.labels = torch.cat(labels).to(device)
        self.sides = {}
        for side, left in (("left", True), ("right", False)):
            real = pad([torch.ones(n) for n in LENGTHS], 0, left).long()
            inputs = {"input_ids": pad(documents, 7, left).to(device), "attention_mask": real.to(device)}
            self.sides[side] = inputs, pad(labels, 13, left).to(device)
        # what each packed token predicts
        self.targets = torch.cat([torch.cat([label[1:], torch.tensor([-100])]) for label in labels]).to(device)

    def theirs(self):
        """Transformers' arguments, right padding; which tokens are real; what each token predicts."""
        inputs, labels = self.sides["right"]
        real = inputs["attention_mask"].bool()
        return inputs, real, labels.masked_fill(~real, -100)


def run_theirs(gpt2, batch, dtype):
    """Losses of the predicted tokens, logits of the real ones, gradients of the mean loss."""
    theirs = to_transformers(gpt2, dtype)
    inputs, real, _ = batch.theirs()
    logits = theirs(**inputs).logits[real]
    predicted = batch.targets != -100
    losses = F.cross_entropy(logits[predicted], batch.targets[predicted], reduction="none")  # theirs is float32
    losses.mean().backward()
    return {"losses": losses.detach(), "logits": logits.detach(), **their_gradients(theirs, gpt2)}


def run_ours(gpt2, batch, dtype=None):
    gpt2.zero_grad()
    with torch.autocast(batch.labels.device.type, dtype=dtype, enabled=dtype is not None):
        losses = gpt2(**batch.packed, labels=batch.labels, reduction="none")[batch.targets != -100]
        logits = gpt2(**batch.packed)
        gpt2(**batch.packed, labels=batch.labels).backward()
    return {"losses": losses.detach(), "logits": logits.detach(), **gradients(gpt2)}


def compare(device, *, autocast=None, dtype=torch.float32, **changes):
    comparison = ModelComparison()
    for seed in range(3):
        gpt2, batch = make_gpt2(seed, **NO_DROPOUT, **changes).to(device, dtype), Batch(seed, device)
        ours = run_ours(gpt2, batch, autocast)
        exact = run_theirs(gpt2, batch, torch.float64)
        with torch.autocast(device, dtype=autocast, enabled=autocast is not None):
            eager = run_theirs(gpt2, batch, dtype)
        for name in exact:
            comparison.add(name, ours[name], eager[name], exact[name])
    assert len(comparison.ours) == 2 + len(list(gpt2.parameters()))
    assert not comparison.failures(), "; ".join(comparison.failures())


@pytest.mark.parametrize("act", ["gelu_new", "gelu"])
def test_equals_transformers(act, device):
    """Losses, logits and every gradient: error against float64 at most four times that of Transformers' eager model."""
    compare(device, activation_function=act)


def test_equals_transformers_without_biases(device):
    """Transformers' with zeros for the biases that ours lacks."""
    assert not [name for name, _ in make_gpt2(bias=False).named_parameters() if name.endswith("bias")]
    compare(device, bias=False)


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "parameters"])
def test_equals_transformers_in_bfloat16(autocast, device):
    """The same bound in bfloat16: autocast over float32 parameters, and bfloat16 parameters."""
    compare(device, **({"autocast": torch.bfloat16} if autocast else {"dtype": torch.bfloat16}))


def test_bfloat16_residual_stream(device):
    gpt2, batch, seen = make_gpt2().to(device), Batch(device=device), []
    for layer in gpt2.layers:
        layer.register_forward_hook(lambda module, inputs, out: seen.append({t.dtype for t in (inputs[0], *out)}))
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = gpt2(**batch.packed, labels=batch.labels)
    loss.backward()
    assert seen == [{torch.bfloat16}] * 2
    assert loss.dtype == torch.float32
    assert {grad.dtype for grad in gradients(gpt2).values()} == {torch.float32}


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_equals_packed(side, device):
    """Real tokens: the same logits, loss and gradients, whatever ids and labels stand in the padding."""
    gpt2, batch = make_gpt2(**NO_DROPOUT).double().to(device), Batch(device=device)
    inputs, labels = batch.sides[side]
    real = inputs["attention_mask"].bool()
    packed = run_ours(gpt2, batch)
    for noise in (False, True):
        if noise:
            junk = torch.randint_like(inputs["input_ids"], TINY["vocab_size"])
            inputs = {**inputs, "input_ids": torch.where(real, inputs["input_ids"], junk)}
            labels = torch.where(real, labels, junk)
        gpt2.zero_grad()
        loss = gpt2(**inputs, labels=labels)
        loss.backward()
        torch.testing.assert_close(loss.detach(), packed["losses"].mean())
        torch.testing.assert_close(gpt2(**inputs)[real], packed["logits"])
        for name, grad in gradients(gpt2).items():
            torch.testing.assert_close(grad, packed[name], msg=name)


def test_left_padding_equals_transformers(device):
    """Given the positions that we count, Transformers agrees; and ours can be told to count as it does."""
    gpt2, batch = make_gpt2().eval().to(device), Batch(device=device)
    inputs, _ = batch.sides["left"]
    real = inputs["attention_mask"].bool()
    theirs = to_transformers(gpt2)
    columns = torch.arange(real.shape[1], device=device).expand_as(real)
    for positions in ((real.cumsum(-1) - 1).clamp(min=0), columns):
        want = theirs(**inputs, position_ids=positions).logits[real]
        torch.testing.assert_close(gpt2(**inputs, positions=positions)[real], want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(theirs(**inputs).logits[real], want)


def test_documents_do_not_meet(device):
    """A token sees and predicts its own document alone: each packed one is what it is alone."""
    gpt2, batch = make_gpt2(**NO_DROPOUT).to(device), Batch(device=device)
    ids = batch.packed["input_ids"]
    losses = gpt2(**batch.packed, labels=ids, reduction="none")
    logits = gpt2(**batch.packed)
    for document, loss, logit in zip(*(t.split(LENGTHS) for t in (ids, losses, logits))):
        torch.testing.assert_close(gpt2(document[None])[0], logit, rtol=1e-4, atol=1e-5)
        alone = gpt2(document[None], labels=document[None], reduction="none")[0]
        torch.testing.assert_close(alone, loss, rtol=1e-4, atol=1e-5)
        assert loss[-1] == 0  # nothing follows
    torch.testing.assert_close(gpt2(**batch.packed, labels=ids), losses.sum() / (sum(LENGTHS) - len(LENGTHS)))
    torch.testing.assert_close(gpt2(**batch.packed, labels=ids, reduction="sum"), losses.sum())


def test_targets_that_are_shifted_already(device):
    """What each token predicts, in any form of input; padding predicts nothing, whatever stands there."""
    gpt2, batch = make_gpt2(**NO_DROPOUT).to(device), Batch(device=device)
    for reduction in ("mean", "sum", "none"):
        want = gpt2(**batch.packed, labels=batch.labels, reduction=reduction)
        assert torch.equal(gpt2(**batch.packed, shift_labels=batch.targets, reduction=reduction), want)
    inputs, real, _ = batch.theirs()
    targets = torch.full_like(inputs["input_ids"], 5).masked_scatter(real, batch.targets)
    loss = gpt2(**inputs, shift_labels=targets)
    torch.testing.assert_close(loss, gpt2(**batch.packed, labels=batch.labels))
    theirs = to_transformers(gpt2)
    want = theirs(**inputs, labels=targets, shift_labels=targets.masked_fill(~real, -100)).loss
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-5)
    rows = batch.packed["input_ids"][:22].view(2, 11)  # all real: a document's last token predicts too
    losses = gpt2(rows[:, :-1], shift_labels=rows[:, 1:], reduction="none")
    torch.testing.assert_close(losses, gpt2(rows, labels=rows, reduction="none")[:, :-1], rtol=1e-4, atol=1e-5)


def test_empty_documents(device):
    """Anywhere, they change nothing."""
    gpt2, ids = make_gpt2().eval().to(device), torch.arange(7, device=device)
    losses = [
        gpt2(ids, cu_seqlens=torch.tensor(cu, dtype=torch.int32, device=device), labels=ids, reduction="none")
        for cu in ([0, 3, 7], [0, 0, 3, 3, 7, 7, 7])
    ]
    assert torch.equal(*losses)
    assert (losses[0] == 0).nonzero().flatten().tolist() == [2, 6]


def test_a_token_sees_none_after_it(device):
    gpt2, batch = make_gpt2().eval().to(device), Batch(device=device)
    before = gpt2(**batch.packed)
    ids = batch.packed["input_ids"].clone()
    ids[8] = (ids[8] + 1) % TINY["vocab_size"]
    changed = (gpt2(**{**batch.packed, "input_ids": ids}) != before).any(-1).nonzero().flatten().tolist()
    assert changed == [8, 9, 10]


def test_defaults(device):
    """No mask: all tokens are real. No positions, no max_seqlen: from cu_seqlens."""
    gpt2, batch = make_gpt2().eval().to(device), Batch(device=device)
    ids, cu = batch.packed["input_ids"], batch.packed["cu_seqlens"]
    rows = ids[:22].view(2, 11)
    torch.testing.assert_close(gpt2(rows), gpt2(rows, attention_mask=torch.ones_like(rows)))
    positions = torch.cat([torch.arange(n) for n in LENGTHS]).to(device)
    torch.testing.assert_close(gpt2(ids, cu_seqlens=cu), gpt2(**batch.packed, positions=positions))
    hidden = gpt2.decode(**batch.packed)
    torch.testing.assert_close(F.linear(hidden, gpt2.word), gpt2(**batch.packed))


def test_training_coincides_with_transformers(device):
    """50 steps, dropout off: the losses of both models lie on one curve, and fall."""
    gpt2 = make_gpt2(**NO_DROPOUT).to(device)
    theirs = to_transformers(gpt2)
    batches = [Batch(seed, device) for seed in range(2)]

    def our_loss(step):
        return gpt2(**batches[step % 2].packed, labels=batches[step % 2].labels)

    def their_loss(step):
        inputs, _, labels = batches[step % 2].theirs()
        return theirs(**inputs, labels=labels).loss

    ours, eager = loss_curves([(gpt2, our_loss), (theirs, their_loss)])
    assert ours == pytest.approx(eager, rel=1e-4)
    assert ours[-1] < 0.5 * ours[0]


def test_dropout_is_a_function_of_seed_and_step(device):
    """Same (seed, step), same loss and gradients; another, others; none in evaluation."""
    gpt2, batch = make_gpt2().to(device), Batch(device=device)

    def run(*rng):
        gpt2.zero_grad()
        loss = gpt2(**batch.packed, labels=batch.labels, rng=torch.tensor(rng, device=device))
        loss.backward()
        return {"loss": loss.detach(), **gradients(gpt2)}

    first, again = run(1, 0), run(1, 0)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert first["loss"] != run(1, 1)["loss"]
    assert first["loss"] != run(2, 0)["loss"]
    gpt2.eval()
    assert run(1, 0)["loss"] == run(1, 1)["loss"]


def test_every_dropout_is_at_work(monkeypatch):
    """The embeddings, each attention and both branches of each layer drop, each at a site of its own."""
    from fastlm import ops

    sites = []
    for name in ("embedding", "attention", "layer_norm"):
        op = getattr(ops, name)

        def spy(*args, op=op, **options):
            if options["dropout_p"] > 0:
                sites.append(options.get("site", 0))
            return op(*args, **options)

        monkeypatch.setattr(ops, name, spy)
    batch = Batch()
    make_gpt2()(**batch.packed, labels=batch.labels)
    # 1, the first layer's addition, has nothing to add
    assert sites == [0, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("rng", [(3, 4), None], ids=["rng", "torch"])
def test_checkpointed_activations(rng, device):
    """The same bits, though each layer runs twice."""
    gpt2, batch, runs = make_gpt2().to(device), Batch(device=device), []
    gpt2.layers[0].register_forward_pre_hook(lambda *_: runs.append(1))
    rng = None if rng is None else torch.tensor(rng, device=device)
    results = []
    for again in (False, True):
        gpt2.checkpoint_activations = again
        gpt2.zero_grad()
        torch.manual_seed(5)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=rng is not None):
            loss = gpt2(**batch.packed, labels=batch.labels, rng=rng)
        loss.backward()
        results.append({"loss": loss.detach(), **gradients(gpt2)})
    assert len(runs) == 3
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    gpt2.eval()(**batch.packed, labels=batch.labels).backward()
    assert len(runs) == 4


@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointed"])
def test_compile(again, device):
    """One graph covers the training forward with dropout, and its backward gives eager's gradients."""
    gpt2, batch = make_gpt2(n_layer=1).to(device), Batch(device=device)
    gpt2.checkpoint_activations = again
    arguments = {**batch.packed, "labels": batch.labels, "rng": torch.tensor([1, 2], device=device)}
    want = gpt2(**arguments)
    want.backward()
    eager = gradients(gpt2)
    gpt2.zero_grad()
    loss = torch.compile(gpt2, fullgraph=True)(**arguments)
    loss.backward()
    torch.testing.assert_close(loss, want)
    for name, grad in gradients(gpt2).items():
        torch.testing.assert_close(grad, eager[name], rtol=1e-4, atol=1e-6, msg=name)


def test_initialisation():
    gpt2 = GPT2(GPT2Config(vocab_size=500, n_positions=64, n_embd=64, n_layer=2, n_head=4))
    for name, parameter in gpt2.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            std = 0.01 if name.endswith(("out.weight", "linear2.weight")) else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.1), name


# ---- checkpoints


def test_transformers_reads_ours(tmp_path):
    gpt2 = make_gpt2(activation_function="gelu").eval()
    gpt2.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs) is transformers.GPT2LMHeadModel
    assert not any(info.values()), info
    assert theirs.lm_head.weight is theirs.transformer.wte.weight
    assert same_weights(gpt2, theirs)
    inputs, real, _ = Batch().theirs()
    torch.testing.assert_close(gpt2(**inputs)[real], theirs(**inputs).logits[real], rtol=1e-4, atol=1e-5)
    back = GPT2.from_pretrained(tmp_path)
    assert back.config == gpt2.config
    assert same_state(gpt2, back)


@pytest.mark.parametrize("headless", [False, True], ids=["GPT2LMHeadModel", "GPT2Model"])
def test_reads_transformers(headless, tmp_path):
    """The head is the word table, so a model without one has all."""
    cls = transformers.GPT2Model if headless else transformers.GPT2LMHeadModel
    theirs = cls(transformers.GPT2Config(**TINY))
    theirs.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = GPT2.from_pretrained(tmp_path)
    assert ours.config == GPT2Config(**TINY)
    assert ours.layers[1].qkv.weight.equal((theirs if headless else theirs.transformer).h[1].attn.c_attn.weight.t())
    ours.save_pretrained(tmp_path / "again")
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "again")
    again = again.transformer if headless else again
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in theirs.state_dict().items())


def test_checkpoints_without_biases(tmp_path):
    """Transformers' model has zeros; ours reads them as none, or as biases to train; others' biases are refused."""
    gpt2 = make_gpt2(bias=False).eval()
    gpt2.save_pretrained(tmp_path)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert same_weights(gpt2, theirs)
    assert not any(p.any() for name, p in theirs.named_parameters() if name.endswith("bias"))
    inputs, real, _ = Batch().theirs()
    want = gpt2(**inputs)
    torch.testing.assert_close(want[real], theirs(**inputs).logits[real], rtol=1e-4, atol=1e-5)
    back = GPT2.from_pretrained(tmp_path)
    assert back.config == gpt2.config
    assert same_state(gpt2, back)
    trained = GPT2.from_pretrained(tmp_path, bias=True)
    assert trained.layers[0].mlp.linear1.bias.shape == (56,)
    torch.testing.assert_close(trained.eval()(**inputs), want)
    theirs.save_pretrained(tmp_path / "theirs")
    assert same_state(gpt2, GPT2.from_pretrained(tmp_path / "theirs", bias=False))
    make_gpt2().save_pretrained(tmp_path / "biased")
    with pytest.raises(
        ValueError, match=r"bias: expected True, since transformer\.h\.0\..*bias is not zero, got False"
    ):
        GPT2.from_pretrained(tmp_path / "biased", bias=False)


def test_reads_the_published_names(tmp_path):
    """No prefix, causal masks among the tensors, the head saved a second time."""
    gpt2 = make_gpt2()
    gpt2.save_pretrained(tmp_path)
    tensors = {
        name.removeprefix("transformer."): tensor for name, tensor in load_file(tmp_path / "model.safetensors").items()
    }
    tensors["h.0.attn.bias"], tensors["h.1.attn.masked_bias"] = torch.ones(1, 1, 24, 24), torch.tensor(-1e4)
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same_state(gpt2, GPT2.from_pretrained(tmp_path))


def test_leaves_another_head_out(tmp_path):
    transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**TINY)).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"left out, GPT2 has no place for: score\.weight"):
        GPT2.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"add_cross_attention": True}, "add_cross_attention: expected False.*got True"),
        ({"scale_attn_weights": False}, "scale_attn_weights: expected True"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: expected False"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings: expected True"),
        ({"activation_function": "relu"}, "activation_function: expected one of 'gelu'.*got 'relu'"),
        ({"n_inner": 60}, r"c_fc.weight: expected \(32, 60\), got \(32, 56\)"),
        ({"n_layer": 1}, "expected no tensor beyond config.json's architecture, got transformer.h.1"),
        ({"n_layer": 3}, r"expected every tensor but a head's, transformer.h.2.* missing"),
        ({"model_type": "bert"}, "expected model_type \"gpt2\".*got 'bert'"),
    ],
)
def test_checkpoint_errors(changes, message, tmp_path):
    import json

    make_gpt2().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=message):
        GPT2.from_pretrained(tmp_path)


# ---- errors of the configuration and the inputs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_embd": 0}, "n_embd: expected a positive integer, got 0"),
        ({"n_head": 5}, "n_head: expected a divisor of n_embd=32, got 5"),
        ({"n_inner": 0}, "n_inner: expected None or a positive integer, got 0"),
        ({"bias": 0}, "bias: expected True or False, got 0"),
        ({"attn_pdrop": 1.5}, r"attn_pdrop: expected a probability in \[0, 1\], got 1.5"),
        ({"layer_norm_epsilon": None}, "layer_norm_epsilon: expected a number that is not negative, got None"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        GPT2Config(**{**TINY, **changes})


IDS, CU = torch.ones(6, dtype=torch.long), torch.tensor([0, 2, 6], dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": IDS}, r"input_ids: expected \(T,\) with cu_seqlens.*got \(6,\)"),
        ({"input_ids": IDS.float(), "cu_seqlens": CU}, "input_ids: expected torch.int64 or torch.int32"),
        ({"input_ids": IDS.repeat(5)[None]}, "n_positions=24"),
        ({"input_ids": IDS, "cu_seqlens": CU[1:]}, "cu_seqlens_q: expected to start at 0"),
        ({"input_ids": IDS, "cu_seqlens": CU, "max_seqlen": 25}, "max_seqlen: expected at most n_positions=24"),
        ({"input_ids": IDS, "cu_seqlens": CU, "attention_mask": IDS}, "attention_mask: expected None"),
        ({"input_ids": IDS[None], "attention_mask": IDS}, r"attention_mask: expected shape \(1, 6\)"),
        ({"input_ids": IDS * 83, "cu_seqlens": CU}, "input_ids: expected ids in"),
        ({"input_ids": IDS, "cu_seqlens": CU, "labels": IDS[1:]}, r"labels: expected shape \(6,\), got \(5,\)"),
        ({"input_ids": IDS, "cu_seqlens": CU, "labels": IDS.int()}, "labels: expected torch.int64"),
        ({"input_ids": IDS, "cu_seqlens": CU, "labels": IDS * 83}, "target: expected class indices"),
        ({"input_ids": IDS, "cu_seqlens": CU, "shift_labels": IDS[1:]}, r"shift_labels: expected shape \(6,\)"),
        ({"input_ids": IDS, "cu_seqlens": CU, "labels": IDS, "shift_labels": IDS}, "shift_labels: expected None with"),
    ],
)
def test_input_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_gpt2()(**arguments)
