"""Compares fastlm's models with Transformers': the same weights, documents and gradients in both."""

import torch
import torch.nn.functional as F
import transformers

from fastlm.models import _checkpoint

CURVE = 50  # steps over which two models' losses are to coincide


def widen(model, seed=0):
    """Every parameter drawn wide, so that none hides behind its initial 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def to_transformers(model, dtype=torch.float32):
    """Transformers' model of the same architecture, eager attention, with the weights of `model`."""
    cls = getattr(transformers, model.architecture)
    theirs = cls(cls.config_class(**model.config.to_dict(), attn_implementation="eager"))
    tensors = model.export_tensors()
    if "lm_head.weight" in tensors:  # Transformers ties it whenever the tensors do not say otherwise
        theirs.lm_head.weight = torch.nn.Parameter(torch.empty_like(tensors["lm_head.weight"]))
    result = theirs.load_state_dict(tensors, strict=False)
    assert set(result.missing_keys) <= set(theirs.all_tied_weights_keys)
    assert not result.unexpected_keys
    named = dict(theirs.named_parameters(remove_duplicate=False))
    names = (name for parts in model.transformers_names(model.config).values() for name in parts)
    # A model without a head, as BertModel, has its parameters without the prefix "bert.".
    ours = {id(named[name if name in named else name.partition(".")[2]]) for name in names}
    for parameter in theirs.parameters():
        parameter.requires_grad_(id(parameter) in ours)  # a bias that ours lacks is a constant 0
    return theirs.to(next(model.parameters()).device, dtype).train(model.training)


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def their_gradients(theirs, model):
    """Transformers' gradients as ours: a key bias's, exactly zero, in one tensor with the query's and value's."""
    grads = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.grad is not None}
    grads, _ = model.canonical(grads, model.config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    state, missing = _checkpoint.import_tensors(grads, model.transformers_names(model.config), shapes)
    assert not missing
    return state


def same_weights(model, theirs):
    """Whether a model of Transformers holds our weights, and no others but copies of tied ones."""
    state, tensors = theirs.state_dict(), model.export_tensors()
    assert state.keys() - tensors.keys() <= set(theirs.all_tied_weights_keys)
    return all(torch.equal(tensor, state[name]) for name, tensor in tensors.items())


def same_state(one, other):
    return one.state_dict().keys() == other.state_dict().keys() and all(
        torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items()
    )


def pad(rows, value, left):
    """Rows of different lengths as one (B, S) tensor, padded on the left or the right."""
    longest = max(map(len, rows))
    return torch.stack([F.pad(r, (n, 0) if left else (0, n), value=value) for r in rows for n in [longest - len(r)]])


def offsets(lengths):
    """cu_seqlens, with the total repeated at the end as a trainer does."""
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist(), sum(lengths)], dtype=torch.int32)


def loss_curves(pairs, steps=CURVE, lr=0.1):
    """The losses of SGD with momentum, for each (model, loss of step)."""
    curves = []
    for model, loss_of in pairs:
        optimizer, losses = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9), []
        for step in range(steps):
            optimizer.zero_grad()
            loss = loss_of(step)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    return curves
