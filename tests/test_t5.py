"""fastlm.models.T5 against transformers.T5ForConditionalGeneration, v1.0 and v1.1: results, gradients, checkpoints."""

import json
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
from transformers.models.t5.modeling_t5 import T5LayerNorm

from fastlm.models import T5, T5Config
from fastlm.testing.compare import ModelComparison

TINY = {
    "vocab_size": 83,
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 56,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
}
V10, V11 = {}, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
VERSIONS = pytest.mark.parametrize("version", [V10, V11], ids=["v1.0", "v1.1"])
LENGTHS, TARGETS = (11, 3, 26, 1), (5, 9, 2, 14)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make_t5(seed=0, **changes):
    return widen(T5(T5Config(**{**TINY, **changes})), seed)


class Batch:
    """The same documents and targets packed, padded left and padded right."""

    def __init__(self, seed=0, device="cpu"):
        generator = torch.Generator().manual_seed(seed)
        documents, labels = (
            [torch.randint(2, TINY["vocab_size"], (n,), generator=generator) for n in lengths]
            for lengths in (LENGTHS, TARGETS)
        )
        labels[1][4] = labels[3][0] = -100
        packed = {
            "input_ids": torch.cat(documents),
            "cu_seqlens": offsets(LENGTHS),
            "decoder_cu_seqlens": offsets(TARGETS),
            "labels": torch.cat(labels),
        }
        self.packed = {name: tensor.to(device) for name, tensor in packed.items()}
        self.packed |= {"max_seqlen": max(LENGTHS), "decoder_max_seqlen": max(TARGETS)}
        self.sides = {}
        for side, left in (("left", True), ("right", False)):
            inputs = {
                "input_ids": pad(documents, 7, left),
                "attention_mask": pad([torch.ones(n) for n in LENGTHS], 0, left),
                "decoder_attention_mask": pad([torch.ones(n) for n in TARGETS], 0, left),
                "labels": pad(labels, -100, left),
            }
            self.sides[side] = {name: tensor.to(device) for name, tensor in inputs.items()}


def without_loss(t5, inputs):
    """The same inputs, the target's given: logits."""
    start, labels = t5.config.decoder_start_token_id, inputs["labels"]
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    if "cu_seqlens" in inputs:
        rows = labels.split(TARGETS)
    elif "decoder_attention_mask" in inputs:
        rows = [row[real.bool()] for row, real in zip(labels, inputs["decoder_attention_mask"])]
    shifted = [torch.cat([row.new_tensor([start]), row[:-1]]) for row in rows]
    shifted = [row.masked_fill(row == -100, t5.config.pad_token_id) for row in shifted]
    if "cu_seqlens" in inputs:
        return {**inputs, "decoder_input_ids": torch.cat(shifted)}
    ids = torch.zeros_like(labels)
    ids[inputs["decoder_attention_mask"].bool()] = torch.cat(shifted)
    return {**inputs, "decoder_input_ids": ids}


def run_theirs(t5, batch, dtype):
    """Losses of the predicted tokens, logits of the real ones, gradients of the mean loss."""
    theirs = to_transformers(t5, dtype)
    inputs = batch.sides["right"]
    real = inputs["decoder_attention_mask"].bool()
    logits = theirs(**inputs).logits[real]
    labels = batch.packed["labels"]
    losses = F.cross_entropy(logits[labels != -100], labels[labels != -100], reduction="none")
    losses.mean().backward()
    return {"losses": losses.detach(), "logits": logits.detach(), **their_gradients(theirs, t5)}


def run_exact(t5, batch):
    """In float64, the norms too, whose variance Transformers takes in float32."""

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(T5LayerNorm, "forward", forward)
        return run_theirs(t5, batch, torch.float64)


def run_ours(t5, batch, dtype=None):
    t5.zero_grad()
    labels = batch.packed["labels"]
    with torch.autocast(labels.device.type, dtype=dtype, enabled=dtype is not None):
        losses = t5(**batch.packed, reduction="none")[labels != -100]
        logits = t5(**without_loss(t5, batch.packed))
        t5(**batch.packed).backward()
    return {"losses": losses.detach(), "logits": logits.detach(), **gradients(t5)}


def compare(device, *, autocast=None, dtype=torch.float32, **changes):
    comparison = ModelComparison()
    for seed in range(3):
        t5, batch = make_t5(seed, dropout_rate=0.0, **changes).to(device, dtype), Batch(seed, device)
        ours = run_ours(t5, batch, autocast)
        exact = run_exact(t5, batch)
        with torch.autocast(device, dtype=autocast, enabled=autocast is not None):
            eager = run_theirs(t5, batch, dtype)
        for name in exact:
            comparison.add(name, ours[name], eager[name], exact[name])
    assert len(comparison.ours) == 2 + len(list(t5.parameters()))
    assert not comparison.failures(), "; ".join(comparison.failures())


@VERSIONS
def test_equals_transformers(version, device):
    """Losses, logits and every gradient: error against float64 at most four times that of Transformers' eager model."""
    compare(device, **version)


@VERSIONS
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "parameters"])
def test_equals_transformers_in_bfloat16(version, autocast, device):
    """The same bound in bfloat16: autocast over float32 parameters, and bfloat16 parameters."""
    compare(device, **version, **({"autocast": torch.bfloat16} if autocast else {"dtype": torch.bfloat16}))


def test_bfloat16_residual_stream(device):
    t5, batch, seen = make_t5(**V11).to(device), Batch(device=device), []
    for layer in (*t5.encoder.layers, *t5.decoder.layers):
        layer.register_forward_hook(lambda module, inputs, out: seen.append({t.dtype for t in (inputs[0], *out)}))
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = t5(**batch.packed)
    loss.backward()
    assert seen == [{torch.bfloat16}] * 5
    assert loss.dtype == torch.float32
    assert {grad.dtype for grad in gradients(t5).values()} == {torch.float32}


@VERSIONS
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_equals_packed(version, side, device):
    """Real tokens: the same logits, loss and gradients, whatever ids and labels stand in the padding."""
    t5, batch = make_t5(dropout_rate=0.0, **version).double().to(device), Batch(device=device)
    inputs = batch.sides[side]
    packed = run_ours(t5, batch)
    for noise in (False, True):
        if noise:
            inputs = dict(inputs)
            for name, mask in (("input_ids", "attention_mask"), ("labels", "decoder_attention_mask")):
                junk = torch.randint_like(inputs[name], TINY["vocab_size"])
                inputs[name] = torch.where(inputs[mask].bool(), inputs[name], junk)
        t5.zero_grad()
        loss = t5(**inputs)
        loss.backward()
        torch.testing.assert_close(loss.detach(), packed["losses"].mean())
        logits = t5(**without_loss(t5, inputs))[inputs["decoder_attention_mask"].bool()]
        torch.testing.assert_close(logits, packed["logits"])
        for name, grad in gradients(t5).items():
            torch.testing.assert_close(grad, packed[name], msg=name)


@VERSIONS
def test_left_padding_equals_transformers(version, device):
    """Positions are relative, so padding on the left changes nothing there either."""
    t5, batch = make_t5(**version).eval().to(device), Batch(device=device)
    inputs = without_loss(t5, batch.sides["left"])
    real = inputs["decoder_attention_mask"].bool()
    theirs = to_transformers(t5)(**inputs).logits
    torch.testing.assert_close(t5(**inputs)[real], theirs[real], rtol=1e-4, atol=1e-4)


def test_defaults(device):
    """No masks: all tokens are real, and right padding of the target needs none. No lengths: from cu_seqlens."""
    t5, batch = make_t5(**V11).eval().to(device), Batch(device=device)
    ids, labels = batch.packed["input_ids"][:22].view(2, 11), batch.packed["labels"][-14:].view(2, 7)
    ones = {"attention_mask": torch.ones_like(ids), "decoder_attention_mask": torch.ones_like(labels)}
    torch.testing.assert_close(t5(ids, labels=labels), t5(ids, labels=labels, **ones))
    right = batch.sides["right"]
    unmasked = {name: tensor for name, tensor in right.items() if name != "decoder_attention_mask"}
    torch.testing.assert_close(t5(**unmasked), t5(**right))
    lengths = {name: value for name, value in batch.packed.items() if "max_seqlen" not in name}
    torch.testing.assert_close(t5(**lengths), t5(**batch.packed))
    losses = t5(**batch.packed, reduction="none")
    torch.testing.assert_close(losses.sum(), t5(**batch.packed, reduction="sum"))
    encoded = t5.encode(ids)
    assert encoded.shape == (2, 11, TINY["d_model"])


def test_empty_documents(device):
    """Packed, either side of a pair may be empty: the target is then a language model's, or nothing."""
    t5, ids = make_t5().eval().to(device), torch.arange(7, device=device)

    def losses(source, cu, target, decoder_cu):
        cu, decoder_cu = (torch.tensor(c, dtype=torch.int32, device=device) for c in (cu, decoder_cu))
        arguments = {"cu_seqlens": cu, "decoder_cu_seqlens": decoder_cu, "labels": target, "reduction": "none"}
        return t5(source, **arguments)

    together = losses(ids, [0, 3, 3, 3, 7], ids[:6], [0, 2, 2, 5, 6])
    pieces = losses(ids[:3], [0, 3], ids[:2], [0, 2]), losses(ids[:0], [0, 0], ids[2:5], [0, 3])
    torch.testing.assert_close(together, torch.cat([*pieces, losses(ids[3:], [0, 4], ids[5:6], [0, 1])]))


@VERSIONS
def test_training_coincides_with_transformers(version, device):
    """50 steps, dropout off: the losses of both models lie on one curve, and fall."""
    t5 = make_t5(dropout_rate=0.0, initializer_factor=0.3, **version).to(device)
    theirs = to_transformers(t5)
    batches = [Batch(seed, device) for seed in range(2)]
    ours, eager = loss_curves(
        [
            (t5, lambda step: t5(**batches[step % 2].packed)),
            (theirs, lambda step: theirs(**batches[step % 2].sides["right"]).loss),
        ],
        lr=0.2 if version is V10 else 0.03,
    )
    assert ours == pytest.approx(eager, rel=1e-4)
    assert ours[-1] < 0.5 * ours[0]


@VERSIONS
def test_dropout_is_a_function_of_seed_and_step(version, device):
    """Same (seed, step), same loss and gradients; another, others; none in evaluation."""
    t5, batch = make_t5(**version).to(device), Batch(device=device)

    def run(*rng):
        t5.zero_grad()
        loss = t5(**batch.packed, rng=torch.tensor(rng, device=device))
        loss.backward()
        return {"loss": loss.detach(), **gradients(t5)}

    first, again = run(1, 0), run(1, 0)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert first["loss"] != run(1, 1)["loss"]
    assert first["loss"] != run(2, 0)["loss"]
    t5.eval()
    assert run(1, 0)["loss"] == run(1, 1)["loss"]


def test_every_dropout_is_at_work(monkeypatch):
    """Where Transformers has one, each at a site of its own; the first layers' additions have nothing to add."""
    from fastlm import ops

    sites = []
    for name in ("embedding", "attention", "rms_norm", "dropout"):
        op = getattr(ops, name)

        def spy(*args, op=op, **options):
            if options.get("dropout_p", 0) > 0 or op.__name__ == "dropout":
                sites.append(options["site"])
            return op(*args, **options)

        monkeypatch.setattr(ops, name, spy)
    make_t5()(**Batch().packed, rng=torch.tensor([1, 2]))
    encoder, decoder = 3 + 6 * 2, 3 + 6 * 3
    unused = {1, 3, 4, 9, 10, encoder + 1}  # additions to nothing, and in the encoder those of cross-attention
    assert sorted(sites) == [site for site in range(encoder + decoder) if site not in unused]


@pytest.mark.parametrize("rng", [(3, 4), None], ids=["rng", "torch"])
def test_checkpointed_activations(rng, device):
    """The same bits, though each layer runs twice."""
    t5, batch, runs = make_t5(**V11).to(device), Batch(device=device), []
    for stack in (t5.encoder, t5.decoder):
        stack.layers[0].register_forward_pre_hook(lambda *_: runs.append(1))
    rng = None if rng is None else torch.tensor(rng, device=device)
    results = []
    for again in (False, True):
        t5.checkpoint_activations = again
        t5.zero_grad()
        torch.manual_seed(5)
        loss = t5(**batch.packed, rng=rng)
        loss.backward()
        results.append({"loss": loss.detach(), **gradients(t5)})
    assert len(runs) == 6
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@VERSIONS
def test_compile(version, device):
    """One graph covers the training forward with dropout, and its backward gives eager's gradients."""
    t5, batch = make_t5(num_layers=1, num_decoder_layers=1, **version).to(device), Batch(device=device)
    t5.checkpoint_activations = version is V11
    arguments = {**batch.packed, "rng": torch.tensor([1, 2], device=device)}
    want = t5(**arguments)
    want.backward()
    eager = gradients(t5)
    t5.zero_grad()
    loss = torch.compile(t5, fullgraph=True)(**arguments)
    loss.backward()
    torch.testing.assert_close(loss, want)
    for name, grad in gradients(t5).items():
        torch.testing.assert_close(grad, eager[name], rtol=1e-4, atol=1e-5, msg=name)


@VERSIONS
def test_initialisation(version):
    """Every kind of parameter starts as wide as in Transformers' model."""
    sizes = {**TINY, "vocab_size": 500, "d_model": 96, "d_kv": 16, "num_layers": 1, "num_decoder_layers": 1}
    ours = T5(T5Config(**{**sizes, **version}))
    theirs = transformers.T5ForConditionalGeneration(transformers.T5Config(**{**sizes, **version})).state_dict()
    for name, tensor in ours.export_tensors().items():
        if "layer_norm" in name:
            assert (tensor == 1).all(), name
        elif "relative" not in name:  # too few to tell
            assert tensor.std().item() == pytest.approx(theirs[name].std().item(), rel=0.1), name


# ---- checkpoints


UNSCALED = {"tie_word_embeddings": True, "scale_decoder_outputs": False}


@pytest.mark.parametrize("version", [V10, V11, UNSCALED], ids=["v1.0", "v1.1", "unscaled"])
def test_transformers_reads_ours(version, tmp_path):
    t5 = make_t5(**version).eval()
    t5.save_pretrained(tmp_path)
    theirs, info = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs) is transformers.T5ForConditionalGeneration
    assert not any(info.values()), info
    assert (theirs.lm_head.weight is theirs.shared.weight) == (t5.head is None)
    assert theirs.config.scale_decoder_outputs == t5.config.scale_decoder_outputs
    assert same_weights(t5, theirs)
    inputs = Batch().sides["right"]
    torch.testing.assert_close(t5(**inputs), theirs(**inputs).loss, rtol=1e-4, atol=1e-5)
    back = T5.from_pretrained(tmp_path)
    assert back.config == t5.config
    assert same_state(t5, back)


@pytest.mark.parametrize("headless", [False, True], ids=["T5ForConditionalGeneration", "T5Model"])
@VERSIONS
def test_reads_transformers(version, headless, tmp_path):
    """Transformers 5 ties the head of every T5, and scales where config.json, as it was once, said that it is tied."""
    cls = transformers.T5Model if headless else transformers.T5ForConditionalGeneration
    theirs = cls(transformers.T5Config(**TINY, **version, decoder_start_token_id=0))
    theirs.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = T5.from_pretrained(tmp_path).eval()
    assert ours.head is None
    assert ours.config.scale_decoder_outputs == (version is V10)
    ours.save_pretrained(tmp_path / "again")
    again = cls.from_pretrained(tmp_path / "again")
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in theirs.state_dict().items())
    if not headless:
        inputs = Batch().sides["right"]
        torch.testing.assert_close(ours(**inputs), theirs.eval()(**inputs).loss, rtol=1e-4, atol=1e-5)


def test_reads_the_published_form(tmp_path):
    """Tied tables saved under each name, and a table of the cross-attention that none reads."""
    t5 = make_t5()
    t5.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors["shared.weight"].clone()
    tensors["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.zeros(8, 4)
    save_file(tensors, tmp_path / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same_state(t5, T5.from_pretrained(tmp_path))


def edit_config(directory, **changes):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))


def test_what_the_tensors_say_cannot_be_changed(tmp_path):
    make_t5(**V11).save_pretrained(tmp_path)
    assert T5.from_pretrained(tmp_path, dropout_rate=0.25).config.dropout_rate == 0.25
    with pytest.raises(ValueError, match=r"tie_word_embeddings: expected False, as the tensors in .* are, got True"):
        T5.from_pretrained(tmp_path, tie_word_embeddings=True)


def test_a_head_that_is_missing(tmp_path):
    """v1.1 without its head: it starts anew."""
    make_t5(**V11).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match=r"the head starts anew, not in .*: lm_head\.weight"):
        t5 = T5.from_pretrained(tmp_path)
    assert torch.equal(t5.word, tensors["shared.weight"])
    assert t5.head.std().item() == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_encoder_decoder": False}, "is_encoder_decoder: expected True.*got False"),
        ({"feed_forward_proj": "gated-silu"}, "feed_forward_proj: expected one of 'relu', 'gated-gelu'.*'gated-silu'"),
        ({"num_layers": 3}, r"expected every tensor but a head's, encoder.block.2.* missing"),
        ({"num_decoder_layers": 2}, "expected no tensor beyond config.json's architecture, got decoder.block.2"),
        ({"d_kv": 8}, r"SelfAttention.q.weight: expected \(32, 32\), got \(48, 32\)"),
    ],
)
def test_checkpoint_errors(changes, message, tmp_path):
    make_t5().save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        T5.from_pretrained(tmp_path)


# ---- errors of the configuration and the inputs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 0}, "d_model: expected a positive integer, got 0"),
        ({"num_decoder_layers": -1}, "num_decoder_layers: expected None or a positive integer, got -1"),
        ({"relative_attention_num_buckets": 7}, "relative_attention_num_buckets: expected an even number.*got 7"),
        ({"relative_attention_max_distance": 4}, "relative_attention_max_distance: expected more than 4.*got 4"),
        ({"dropout_rate": 2.0}, "dropout_rate: expected a probability"),
        ({"decoder_start_token_id": 83}, "decoder_start_token_id: expected None or an id below vocab_size=83"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        T5Config(**{**TINY, **changes})


IDS, CU = torch.ones(6, dtype=torch.long), torch.tensor([0, 2, 6], dtype=torch.int32)
PACKED = {"input_ids": IDS, "cu_seqlens": CU, "decoder_cu_seqlens": CU, "labels": IDS}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": IDS[None]}, "decoder_input_ids: expected these or labels"),
        ({"input_ids": IDS, "labels": IDS[None]}, r"input_ids: expected \(T,\) with cu_seqlens, or \(B, S\), got"),
        ({**PACKED, "decoder_cu_seqlens": None}, r"labels: expected \(T,\) with decoder_cu_seqlens"),
        ({**PACKED, "decoder_cu_seqlens": CU.long()}, "decoder_cu_seqlens: expected torch.int32"),
        ({**PACKED, "decoder_cu_seqlens": CU[[0, 2]]}, "decoder_input_ids: expected as many sequences.* 2, got 1"),
        ({**PACKED, "decoder_cu_seqlens": CU[1:]}, "as many sequences"),
        ({**PACKED, "decoder_max_seqlen": 3}, "max_seqlen_q: expected at least"),
        ({**PACKED, "decoder_attention_mask": IDS}, "decoder_attention_mask: expected None with decoder_cu_seqlens"),
        ({**PACKED, "cu_seqlens": None, "input_ids": IDS.view(2, 3)}, "decoder_cu_seqlens: expected with cu_seqlens"),
        ({**PACKED, "labels": IDS * 83}, "labels: expected ids in"),
        ({**PACKED, "decoder_input_ids": IDS, "labels": IDS[:4]}, r"labels: expected shape \(6,\), got \(4,\)"),
        ({**PACKED, "decoder_input_ids": IDS * 83}, "decoder_input_ids: expected ids in"),
        ({**PACKED, "decoder_input_ids": IDS, "labels": IDS * 83}, "target: expected class indices"),
        ({"input_ids": IDS.view(2, 3), "labels": IDS.view(3, 2)}, "as many sequences as input_ids, 2, got 3"),
    ],
)
def test_input_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_t5()(**arguments)
