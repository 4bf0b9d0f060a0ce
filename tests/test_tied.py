"""A table shared by embedding and head: its gradient is the sum of both parts, if both are there."""

import pytest
import torch

from fastlm.models import GPT2, T5, Bert, BertConfig, GPT2Config, T5Config, bert, gpt2, t5

VOCABULARY, DOCUMENTS = 211, (70, 33)


def make(module):
    torch.manual_seed(0)
    small = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None}
    if module is bert:
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        return Bert(BertConfig(vocab_size=VOCABULARY, **sizes))
    if module is gpt2:
        return GPT2(GPT2Config(**small, n_positions=80, n_embd=32, n_layer=1, n_head=2))
    return T5(T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2))


def inputs(module):
    """Every third token is of one id, and id 0, BERT's padding, is there."""
    ids = torch.randint(1, VOCABULARY, (sum(DOCUMENTS),), generator=torch.Generator().manual_seed(1))
    ids[::3], ids[1] = 5, 0
    cu = torch.tensor([0, *torch.tensor(DOCUMENTS).cumsum(0)], dtype=torch.int32)
    packed = {"input_ids": ids, "cu_seqlens": cu, "rng": torch.tensor([1, 2])}
    if module is bert:
        return packed, {"targets": ids}
    packed |= {"decoder_cu_seqlens": cu} if module is t5 else {}
    return packed, {"labels": ids}


def loss(model, module, logits=False):
    packed, predicted = inputs(module)
    if not logits:
        return model(**packed, **predicted)
    packed |= {"decoder_input_ids": packed["input_ids"].flip(0)} if module is t5 else {}
    return model(**packed).square().mean()


def dense(word):
    return word, word, False


MODULES = pytest.mark.parametrize("module", [bert, gpt2, t5], ids=lambda module: module.__name__.rpartition(".")[2])


def word_of(model):
    return model.embeddings.word if isinstance(model, Bert) else model.word


@MODULES
@pytest.mark.parametrize("logits", [False, True], ids=["loss", "logits"])
def test_the_gradient_is_the_dense_one(module, logits, monkeypatch):
    model = make(module)
    word = word_of(model)
    value = loss(model, module, logits)
    (got,) = torch.autograd.grad(value, word, retain_graph=True)
    (again,) = torch.autograd.grad(value, word)
    monkeypatch.setattr(module, "tied", dense)
    (want,) = torch.autograd.grad(loss(model, module, logits), word)
    assert got.layout == torch.strided
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6 * float(want.abs().max()))
    assert torch.equal(got, again)
    assert got[5].any()


@MODULES
def test_gradients_add_up(module):
    """Two batches' in .grad, the second beside the first."""
    model = make(module)
    (once,) = torch.autograd.grad(loss(model, module), word_of(model))
    for _ in range(2):
        loss(model, module).backward()
    assert torch.equal(word_of(model).grad, once * 2)


@MODULES
def test_one_part_alone(module, monkeypatch):
    """A head that nothing is asked of, and an encoder that is frozen."""
    model = make(module)
    model.requires_grad_(False)
    word = word_of(model).requires_grad_()
    both = torch.autograd.grad(loss(model, module), word)[0]
    monkeypatch.setattr(module, "tied", lambda table: (table, table.detach(), False))
    embedded = torch.autograd.grad(loss(model, module), word)[0]
    monkeypatch.undo()
    tied = module.tied

    def detached(table):
        table, head, sparse = tied(table)
        return table, head.detach(), sparse

    monkeypatch.setattr(module, "tied", detached)
    alone = torch.autograd.grad(loss(model, module), word)[0]
    assert alone.layout == torch.strided
    torch.testing.assert_close(alone, embedded, rtol=1e-5, atol=1e-7)
    monkeypatch.setattr(module, "tied", lambda table: (tied(table)[0].detach(), tied(table)[1], False))
    head = torch.autograd.grad(loss(model, module), word)[0]
    torch.testing.assert_close(head + embedded, both, rtol=1e-5, atol=1e-7)


@MODULES
def test_where_it_is_dense(module):
    """Without gradients, and in other dtypes, whose rows would be rounded one by one, there is one table."""
    word = torch.nn.Parameter(torch.zeros(3, 2))
    assert module.tied(word)[2]
    for table in (word.detach(), word.bfloat16(), word.to("meta")):
        assert module.tied(table) == (table, table, False)
    with torch.no_grad():
        assert module.tied(word) == (word, word, False)


@MODULES
def test_the_gradient_under_autocast(module):
    """In bfloat16, where the table takes one of any dtype, it is the float32 one with every element rounded once."""
    model, found = make(module), []
    word = word_of(model)
    for dtype in (torch.float32, None):
        word.grad_dtype = dtype
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(model, module)
        value.backward()
        found.append(word.grad)
        word.grad = None
    assert [g.dtype for g in found] == [torch.float32, torch.bfloat16]
    assert found[0][5].any()
    torch.testing.assert_close(found[1].float(), found[0], rtol=2.0**-8, atol=1e-7)
