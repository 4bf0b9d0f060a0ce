"""fastlm.patch: attention masks, packed rows, cross-attention, caches and generation."""

import copy
import warnings

import pytest
import torch
import transformers
from hf_models import FAMILIES, VOCABULARY, Batch, make, patched, run

import fastlm

pytestmark = pytest.mark.usefixtures("seeded")


def test_four_dimensional_masks_run_on_sdpa():
    """A mask of the user's, or packed position_ids: the same numbers as without fastlm, and a warning."""
    for name in ("gpt2", "llama", "t5-gated"):
        model, batch = make(name, attention="sdpa").eval(), Batch(name, lengths=(8, 8))
        ids = batch.inputs["input_ids"]
        mask = torch.rand(2, 1, 8, 8) < 0.5
        mask |= torch.eye(8, dtype=torch.bool)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if name == "t5-gated":
            theirs, ours = copy.deepcopy(model.encoder), model.encoder
            fastlm.patch(ours)
            with pytest.warns(UserWarning, match="runs on Transformers' sdpa"):
                got = ours(**inputs).last_hidden_state
            torch.testing.assert_close(got, theirs(**inputs).last_hidden_state, rtol=1e-4, atol=1e-4)
            floating = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
            with pytest.warns(UserWarning, match="sdpa"):
                got = ours(input_ids=ids, attention_mask=floating).last_hidden_state
            torch.testing.assert_close(got, theirs(**inputs).last_hidden_state, rtol=1e-4, atol=1e-4)
            continue
        ours = patched(model)
        with pytest.warns(UserWarning, match="neither padding .* nor causal"):
            got = ours(**inputs).logits
        torch.testing.assert_close(got, model(**inputs).logits, rtol=1e-4, atol=1e-4)
        packed = {"input_ids": ids[:1], "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]), "use_cache": False}
        with pytest.warns(UserWarning, match="cu_seq_lens_q"):
            got = ours(**packed).logits
        torch.testing.assert_close(got, model(**packed).logits, rtol=1e-4, atol=1e-4)


def packed_batch(rows, **options):
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True, **options)
    batch = collate([{"input_ids": row.tolist()} for row in rows])
    batch.pop("labels")
    return batch


def one_by_one(model, rows):
    return torch.cat([model(input_ids=row[None])[0][0] for row in rows])


@pytest.mark.parametrize("name", [*FAMILIES, "bert-causal"])
def test_packed_rows(name):
    """DataCollatorWithFlattening's arguments: the kernel's packed form, equal to each row by itself."""
    model = patched(make(name)).eval()
    model = model.encoder if name.startswith("t5") else model
    rows = [torch.randint(5, VOCABULARY, (n,)) for n in (5, 3, 8)]
    batch = packed_batch(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got, want = model(**batch)[0][0], one_by_one(model, rows)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        batch.pop("position_ids")
        torch.testing.assert_close(model(**batch)[0][0], want, rtol=1e-4, atol=1e-4)
        if not name.startswith("t5"):
            embeddings = model.get_input_embeddings()(batch.pop("input_ids"))
            torch.testing.assert_close(model(inputs_embeds=embeddings, **batch)[0][0], want, rtol=1e-4, atol=1e-4)
    batch["input_ids"] = torch.cat(rows)[None]
    with pytest.raises(ValueError, match="expected with one packed row, got a batch of 2"):
        model(**{**batch, "input_ids": batch["input_ids"].repeat(2, 1)})
    with pytest.raises(ValueError, match="max_length_k: expected with cu_seq_lens_q, got none"):
        model(**{name: value for name, value in batch.items() if name != "max_length_k"})


@pytest.mark.parametrize("padding", [0, 1])
def test_packed_rows_of_roberta(padding):
    """The model's positions begin at padding_idx + 1, the collator's at 0 or where it is told; gradients too."""
    model = make("roberta", pad_token_id=padding)
    ours = patched(model, fused_loss=True)
    rows = [torch.randint(5, VOCABULARY, (n,)) for n in (5, 3, 8)]
    labels = torch.cat(rows)[None]
    losses = [model(input_ids=row[None], labels=row[None]).loss * len(row) / 16 for row in rows]
    sum(losses).backward()
    for start in (0, padding + 1):
        ours.zero_grad()
        ours(**packed_batch(rows, position_ids_start=start), labels=labels).loss.backward()
        for (key, p), q in zip(model.named_parameters(), ours.parameters()):
            if p.grad is not None:
                torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-5, msg=key)
    ids = rows[0][None]
    positions = torch.tensor([[7, 8, 9, 3, 4]])
    want = model.eval()(input_ids=ids, position_ids=positions).logits
    got = ours.eval()(input_ids=ids, position_ids=positions).logits  # not packed: as they are given
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_packed_rows_in_t5s_decoder_are_refused():
    model = patched(make("t5-gated")).eval()
    batch = packed_batch([torch.randint(5, VOCABULARY, (n,)) for n in (5, 3)])
    with pytest.raises(ValueError, match="cu_seq_lens_q: expected for T5's encoder alone"):
        model(**batch, decoder_input_ids=batch["input_ids"])
    with pytest.raises(ValueError, match="output_attentions: expected False with cu_seq_lens_q"):
        model.encoder(**batch, output_attentions=True)


def test_cross_attention():
    """A BERT and a GPT-2 that look at an encoder, its padding on either side."""
    states, real = torch.randn(2, 5, 32), torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    for name, changes in (("bert-causal", {"add_cross_attention": True}), ("gpt2", {"add_cross_attention": True})):
        model, batch = make(name, **changes), Batch(name, lengths=(6, 6))
        batch.inputs |= {"encoder_hidden_states": states, "encoder_attention_mask": real}
        want, got = run(model, batch), run(patched(model, fused_loss=True), batch)
        for key in want:
            torch.testing.assert_close(got[key], want[key], rtol=1e-3, atol=1e-5, msg=key)


def test_a_decoder_made_an_encoder():
    """config.is_causal=False, Transformers' way to a bidirectional Llama."""
    model = make("llama", attention="sdpa").eval()
    model.config.is_causal = False
    ids = Batch("llama", lengths=(8, 8)).inputs["input_ids"]
    ours = patched(model)
    other = ids.clone()
    other[:, -1] = 5
    assert not torch.equal(ours(ids).logits[:, 0], ours(other).logits[:, 0])
    real = torch.ones_like(ids)
    real[0, 6:] = 0
    want = model(ids, attention_mask=real).logits
    torch.testing.assert_close(ours(ids, attention_mask=real).logits, want, rtol=1e-4, atol=1e-4)


def weights_equal(got, want, batch, name):
    """Every kind of weights that Transformers returns, and everything else; rows of padding are left out."""
    assert got.keys() == want.keys()
    kinds = [key for key in want if key.endswith("attentions")]
    assert kinds
    for key in kinds:
        assert len(got[key]) == len(want[key])
        if not want[key]:
            assert key == "cross_attentions"  # of a model without an encoder
            continue
        queries = torch.ones(len(batch.labels), want[key][0].shape[2], dtype=torch.bool)
        if want[key][0].shape[2] == batch.real.shape[1] and not (name.startswith("t5") and key != "encoder_attentions"):
            queries = batch.real
        for ours, theirs in zip(got[key], want[key]):
            rows = queries[:, None].expand(ours.shape[:3])
            torch.testing.assert_close(ours[rows], theirs[rows], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(batch.real_logits(got.logits), batch.real_logits(want.logits), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", [*FAMILIES, "bert-causal"])
def test_attention_weights(name, side):
    """output_attentions=True: what Transformers' eager path returns, by argument or configuration, and a warning."""
    if name == "distilbert" and side == "left":
        pytest.skip("distilbert takes no position_ids")
    model, batch = make(name).eval(), Batch(name, side=side)
    inputs = {**batch.inputs, "labels": batch.labels} if name.startswith("t5") else batch.inputs
    want = model(**inputs, output_attentions=True)
    ours = patched(model)
    with pytest.warns(UserWarning, match="output_attentions=True runs on Transformers' eager attention"):
        weights_equal(ours(**inputs, output_attentions=True), want, batch, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "attentions" not in ours(**inputs)  # and it does not stay
    model.config.output_attentions = True
    by_config = patched(model)
    if not name.startswith("t5"):  # its stacks have configurations of their own, as in Transformers
        with pytest.warns(UserWarning, match="output_attentions=True"):
            weights_equal(by_config(**inputs), want, batch, name)


def test_attention_weights_train_with_the_fused_loss():
    model, batch = make("bert"), Batch("bert")
    ours = patched(model, fused_loss=True)
    want = model(**batch.inputs, labels=batch.labels, output_attentions=True)
    with pytest.warns(UserWarning, match="output_attentions=True"):
        got = ours(**batch.inputs, labels=batch.labels, output_attentions=True)
    assert got.logits is None
    assert len(got.attentions) == len(want.attentions) == 2
    want.loss.backward()
    got.loss.backward()
    for (name, p), q in zip(model.named_parameters(), ours.parameters()):
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", ["gpt2", "t5-gated", "llama"])
def test_attention_weights_of_generated_tokens(name):
    """One query a step, with a cache."""
    model, batch = make(name).eval(), Batch(name, side="left", lengths=(5, 3, 8))
    batch.inputs.pop("position_ids", None)
    settings = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_attentions": True}
    want = model.generate(**batch.inputs, **settings)
    with pytest.warns(UserWarning, match="output_attentions=True"):
        got = patched(model).generate(**batch.inputs, **settings)
    assert torch.equal(got.sequences, want.sequences)
    key = "decoder_attentions" if name == "t5-gated" else "attentions"
    assert [[w.shape for w in step] for step in got[key]] == [[w.shape for w in step] for step in want[key]]
    for ours, theirs in zip(got[key][1:], want[key][1:], strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_t5_put_back_on_eager():
    model, batch = make("t5-gated").eval(), Batch("t5-gated")
    ours = patched(model)
    ours.set_attn_implementation("eager")
    inputs = {**batch.inputs, "labels": batch.labels, "output_attentions": True}
    with pytest.warns(UserWarning, match="output_attentions=True"):
        weights_equal(ours(**inputs), model(**inputs), batch, "t5-gated")


def test_refused():
    model = patched(make("llama"))
    ids = Batch("llama", lengths=(4, 4)).inputs["input_ids"]
    packed = {"cu_seq_lens_q": torch.tensor([0, 4]), "cu_seq_lens_k": torch.tensor([0, 4])}
    with pytest.raises(ValueError, match=r"output_attentions: expected False with cu_seq_lens_q"):
        model(ids[:1], output_attentions=True, max_length_q=4, max_length_k=4, **packed)
    t5 = make("t5")
    for part in (t5, t5.encoder, t5.decoder):  # Transformers 5.17 sets that of `t5` alone
        part.set_attn_implementation("fastlm")
    with pytest.raises(ValueError, match=r"position_bias: expected none.*use fastlm.patch"):
        t5(input_ids=ids, labels=ids)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["bert-causal", "gpt2", "t5-gated", "llama"])
def test_generate(name, cache, device):
    """The same tokens with a cache as the untouched model, greedily and by beams, from rows padded on the left."""
    model, batch = make(name).eval().to(device), Batch(name, side="left", lengths=(5, 3, 8), device=device)
    batch.inputs.pop("position_ids", None)
    ours = patched(model, fused_loss=True)
    settings = {"max_new_tokens": 9, "do_sample": False, "cache_implementation": cache if cache == "static" else None}
    for more in ({}, {"num_beams": 2}):
        if cache == "static" and (name == "bert-causal" or more):
            continue
        want = model.generate(**batch.inputs, **settings, **more)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="fastlm")
            got = ours.generate(**batch.inputs, **settings, **more)
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_prefill_in_pieces(name):
    """Several queries at a time on a dynamic and a static cache: the logits of one forward."""
    model = patched(make(name)).eval()
    ids = torch.randint(5, VOCABULARY, (2, 12))
    want = model(ids).logits
    static = transformers.StaticCache(config=model.config, max_cache_len=20)
    for cache in (transformers.DynamicCache(config=model.config), static):
        pieces = [model(piece, past_key_values=cache, use_cache=True).logits for piece in ids.split((5, 4, 1, 2), 1)]
        torch.testing.assert_close(torch.cat(pieces, 1), want, rtol=1e-4, atol=1e-4)
