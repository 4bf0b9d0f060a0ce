"""AdamW and the gradients' norm on a CPU, against torch's and float64."""

import copy

import pytest
import torch

from fastlm import _native
from fastlm.train.adamw import AdamW, gradient_norm

# One block of the C++ is 16384 elements, a piece of its sums 2048.
SHAPES = [(3, 5), (1,), (0, 4), (130, 257), (2048,), (5, 16384), ()]
GROUPS = [{"lr": 3e-3, "weight_decay": 0.1}, {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.0}]


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def grouped(tensors):
    return [{"params": tensors[i::2], **group} for i, group in enumerate(GROUPS)]


def fill_gradients(tensors, step):
    generator = torch.Generator().manual_seed(100 + step)
    for p in tensors:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype) * 10.0 ** (step % 5 - 2)


def values(tensors, optimizer):
    return [x for p in tensors for x in (p.detach(), *optimizer.state[p].values())]


def test_is_adamw():
    """20 steps of two groups within float32's rounding of float64's, like torch's own."""
    runs = {}
    for name, make, dtype in (
        ("ours", AdamW, torch.float32),
        ("torch", torch.optim.AdamW, torch.float32),
        ("exact", torch.optim.AdamW, torch.float64),
    ):
        tensors = parameters(dtype)
        optimizer = make(grouped(tensors))
        for step in range(20):
            fill_gradients(tensors, step)
            optimizer.step()
        runs[name] = tensors, optimizer
    exact = values(*runs["exact"])
    off = {name: [(a - b).abs().max() for a, b in zip(values(*runs[name]), exact) if b.numel()] for name in runs}
    for ours, theirs, want in zip(off["ours"], off["torch"], (b for b in exact if b.numel())):
        assert ours <= 2 * theirs + 1e-6 * want.abs().max()


def test_gradients_are_divided_as_they_are_read():
    tensors, others = parameters(), parameters()
    ours, plain = AdamW(grouped(tensors)), AdamW(grouped(others))
    fill_gradients(tensors, 0)
    before = [p.grad.clone() for p in tensors]
    ours.grad_scale, ours.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    ours.step()
    assert all(map(torch.equal, before, (p.grad for p in tensors)))
    for p, gradient in zip(others, before):
        p.grad = gradient / 4.0
    plain.step()
    assert all(map(torch.equal, values(tensors, ours), values(others, plain)))


def test_found_inf_leaves_all_as_it_is():
    tensors = parameters()
    optimizer = AdamW(grouped(tensors))
    fill_gradients(tensors, 0)
    optimizer.step()
    before = [x.clone() for x in values(tensors, optimizer)]
    tensors[0].grad[0, 0] = torch.inf
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    optimizer.step()
    assert all(map(torch.equal, before, values(tensors, optimizer)))


def test_a_parameter_without_gradient_stays():
    tensors = parameters()
    optimizer = AdamW(grouped(tensors))
    fill_gradients(tensors, 0)
    tensors[3].grad = None
    before = tensors[3].detach().clone()
    optimizer.step()
    assert torch.equal(before, tensors[3])
    assert tensors[3] not in optimizer.state


@pytest.mark.parametrize("first", [AdamW, torch.optim.AdamW])
def test_state_goes_from_one_to_the_other(first):
    """torch's fused AdamW goes on from our state, and we from torch's."""
    fused = {} if first is AdamW else {"fused": True}
    tensors, others = parameters(), parameters()
    one = first(grouped(tensors), **fused)
    for step in range(3):
        fill_gradients(tensors, step)
        one.step()
    second = torch.optim.AdamW(grouped(others), fused=True) if first is AdamW else AdamW(grouped(others))
    second.load_state_dict(copy.deepcopy(one.state_dict()))
    for a, b in zip(tensors, others):
        b.data.copy_(a.data)
    for step in range(3, 6):
        for optimizer, given in ((one, tensors), (second, others)):
            fill_gradients(given, step)
            optimizer.step()
    for a, b in zip(values(tensors, one), values(others, second)):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("change", ["transposed", "bfloat16", "amsgrad", "maximize"])
def test_what_goes_torch_s_way(change, monkeypatch):
    """The bits of torch's fused AdamW."""
    options = {change: True} if change in ("amsgrad", "maximize") else {}
    results = []
    for make in (AdamW, lambda *args, **options: torch.optim.AdamW(*args, fused=True, **options)):
        tensors = parameters(torch.bfloat16 if change == "bfloat16" else torch.float32)
        if change == "transposed":
            tensors[0] = torch.nn.Parameter(tensors[0].detach().t())
        optimizer = make(tensors, lr=1e-2, **options)
        for step in range(3):
            fill_gradients(tensors, step)
            optimizer.step()
        results.append(values(tensors, optimizer))
    assert all(map(torch.equal, *results))


def test_a_closure_is_called():
    tensors = parameters()

    def closure():
        fill_gradients(tensors, 0)
        return torch.tensor(3.0)

    assert AdamW(tensors).step(closure) == 3.0


def test_norm():
    tensors = parameters()
    for step in range(5):
        fill_gradients(tensors, step)
        gradients = [p.grad for p in tensors]
        exact = sum(float(g.double().square().sum()) for g in gradients) ** 0.5
        norm = gradient_norm(gradients)
        assert norm.dtype == torch.float32
        assert norm == pytest.approx(exact, rel=2e-7)
    assert gradient_norm([]) == 0.0
    for value in (torch.inf, torch.nan):
        tensors[3].grad[7, 200] = value
        assert not torch.isfinite(gradient_norm(p.grad for p in tensors))


def test_norm_of_what_the_kernel_does_not_take():
    gradients = [torch.randn(6, 4).t(), torch.randn(7).bfloat16(), torch.randn(3, dtype=torch.float64)]
    assert gradient_norm(gradients) == pytest.approx(float(torch.nn.utils.get_total_norm(gradients)))


def test_threads_change_no_bit(monkeypatch):
    results = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(_native, "threads", lambda n=threads: n)
        tensors = parameters()
        optimizer = AdamW(grouped(tensors))
        fill_gradients(tensors, 0)
        norm = gradient_norm(p.grad for p in tensors)
        optimizer.step()
        results.append([norm, *values(tensors, optimizer)])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
