"""AdamW on a CPU: compared with torch's fused one and float64; state, skipped tensors, the norm of gradients."""

import copy
import math

import pytest
import torch
from training import corpus, small

from fastlm import _native
from fastlm.data import open_dataset, prepare
from fastlm.models import Bert
from fastlm.ops._low_weights import LowWeights, low_copy
from fastlm.run.checkpoint import load_newest, restore, save_checkpoint
from fastlm.tasks import make_model
from fastlm.tasks.masked_lm import MaskedLM
from fastlm.train import lamb
from fastlm.train import optimizer as optimizers
from fastlm.train.adamw import AdamW, total_norm
from fastlm.train.lamb import LAMB

# No element, one, around a vector and a block of 16384, several blocks.
SHAPES = ((0,), (0, 5), (), (1,), (15,), (17, 3), (16384,), (16385,), (3, 100, 211))
EPS = torch.finfo(torch.float32).eps


def weights(shapes=SHAPES, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes]


def set_gradients(parameters, step, *others):
    """The same gradients for all lists, of several magnitudes."""
    draw = torch.Generator().manual_seed(step)
    for i, p in enumerate(parameters):
        gradient = torch.randn(p.shape, generator=draw) * 10.0 ** -(i % 4)
        for parameter in (p, *(other[i] for other in others)):
            parameter.grad = torch.empty_like(parameter).copy_(gradient)


def groups(parameters):
    return [
        {"params": parameters[::2], "weight_decay": 0.1, "lr": 3e-3},
        {"params": parameters[1::2], "weight_decay": 0.0, "betas": (0.8, 0.99), "eps": 1e-6},
    ]


def tensors(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def state(optimizer):
    return [optimizer.state[p][key] for p in tensors(optimizer) for key in ("step", "exp_avg", "exp_avg_sq")]


def assert_close(ours, theirs, ulps, scale=None):
    """Within so many roundings of the largest element."""
    for a, b in zip(ours, theirs, strict=True):
        largest = b.detach().abs().max() if b.numel() else 1.0
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=float(ulps * EPS * largest))


@pytest.mark.parametrize("betas", [(0.9, 0.98), (0.0, 0.0), (0.3, 0.999), (0.99, 0.5)])
def test_steps_are_those_of_torchs_fused_and_of_float64(betas):
    ours, theirs, exact = weights(), weights(), [torch.nn.Parameter(p.detach().double()) for p in weights()]
    settings = {"lr": 1e-2, "betas": betas}
    optimizer = AdamW(groups(ours), **settings)
    fused = torch.optim.AdamW(groups(theirs), fused=True, **settings)
    float64 = torch.optim.AdamW(groups(exact), foreach=False, **settings)
    for step in range(30):
        set_gradients(ours, step, theirs, exact)
        scale = 2.0 ** (step % 3) * 1.3
        optimizer.grad_scale = fused.grad_scale = torch.tensor(scale)
        for p in exact:
            p.grad /= float(torch.tensor(scale))
        before = [p.grad.clone() for p in ours]
        optimizer.step()
        fused.step()
        float64.step()
        assert all(map(torch.equal, before, (p.grad for p in ours)))  # torch's are divided
    assert_close(state(optimizer), state(fused), 4)
    assert_close(ours, theirs, 16)
    for a, b, c in zip(ours, theirs, exact):
        if a.numel():
            error, bound = ((x.double() - c).abs().max().item() for x in (a, b))
            assert error <= 2 * bound + EPS * c.abs().max().item()


def test_any_strides_are_the_same_update():
    """A transposed weight, one that is not dense, and gradients and moments that lie otherwise than the weight."""
    base = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    plain = torch.nn.Parameter(base.clone())
    wide = torch.zeros(64, 96)
    wide[:, ::2] = base
    forms = [torch.nn.Parameter(x) for x in (base.t().contiguous().t(), wide[:, ::2], base.clone())]
    optimizers = [AdamW([p], lr=1e-2) for p in (plain, *forms)]
    for step in range(3):
        set_gradients([plain], step)
        for i, p in enumerate(forms):
            p.grad = plain.grad.clone() if i < 2 else plain.grad.t().contiguous().t()
        if step == 1:
            held = optimizers[3].state[forms[2]]
            held["exp_avg"] = held["exp_avg"].t().contiguous().t()
        for optimizer in optimizers:
            optimizer.step()
    for p, optimizer in zip(forms, optimizers[1:]):
        assert torch.equal(p, plain)
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[p][key], optimizers[0].state[plain][key])
    assert forms[0].stride() == (1, 64)
    assert (wide[:, 1::2] == 0).all()


def test_any_number_of_threads_gives_the_same_bits():
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            parameters = weights()
            optimizer = AdamW(groups(parameters))
            for step in range(2):
                set_gradients(parameters, step)
                norm = total_norm(p.grad for p in parameters)
                optimizer.step()
            found.append([norm, *parameters, *state(optimizer)])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [AdamW, LAMB])
def test_copies_in_bfloat16(make, dtype):
    """A step writes them with the bits of a cast; gradients in bfloat16 are those in float32."""
    ours, theirs = weights(), weights()
    optimizer, plain, low = make(groups(ours), lr=1e-2), make(groups(theirs), lr=1e-2), LowWeights(ours)
    optimizer.low_weights = low
    for step in range(3):
        set_gradients(ours, step)
        for p, q in zip(ours, theirs):
            gradient = p.grad.to(dtype)
            p.grad = None
            p.grad_dtype = None
            p.grad, q.grad = gradient, gradient.float()
        assert torch.equal(total_norm(p.grad for p in ours), total_norm(p.grad for p in theirs))
        with low.fresh(torch.bfloat16):
            copies = [low_copy(p, torch.bfloat16) for p in ours]
        optimizer.step()
        plain.step()
        assert all(map(torch.equal, ours, theirs))
        assert all(torch.equal(copy, p.bfloat16()) for copy, p in zip(copies, ours))
    with torch.no_grad():
        ours[-1].add_(1.0)  # not the optimizer's, which the next block sees
    with low.fresh(torch.bfloat16):
        assert all(torch.equal(copy, p.bfloat16()) for copy, p in zip(copies, ours))
    low.wrote(ours)
    version = ours[-1]._version
    ours[-1].data.mul_(2.0)  # what autograd does not count
    assert ours[-1]._version == version
    with low.fresh(torch.bfloat16):
        assert all(torch.equal(copy, p.bfloat16()) for copy, p in zip(copies, ours))


def test_a_change_of_a_weight_is_seen(monkeypatch):
    """Before copies are used again: by autograd's count, by a weight's place, and by eight elements of each."""
    casts, copy = [], torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, of: casts.append(len(to)) or copy(to, of))
    ours = weights(((64, 40), (5, 3), (7,)))
    low = LowWeights(ours)

    def begin():
        """The next step; how many copies it made anew."""
        casts.clear()
        with low.fresh(torch.bfloat16):
            copies = [low_copy(p, torch.bfloat16) for p in ours]
        assert all(torch.equal(copy, p.bfloat16()) for copy, p in zip(copies, ours))
        low.wrote(ours)
        return sum(casts)

    assert (begin(), begin()) == (0, 0)  # cast one by one, then as they are
    for p in ours:
        n = p.numel()
        for place in [i * max(1, n // 8) for i in range(min(n, 8))]:
            p.data.view(-1)[place] += 1.0
            assert begin() == len(ours)  # where one changed unseen, others may have
            assert begin() == 0
    ours[1].data = torch.randn(5, 3)
    assert begin() == 1
    with torch.no_grad():
        ours[2].mul_(2.0)
    assert begin() == 1
    assert begin() == 0


def test_lamb_in_two_passes_is_lamb(monkeypatch):
    """csrc/cpu/lamb.cpp beside plain torch; the same bits with any number of threads; a weight of 0; no gradient."""
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 0):
            torch.set_num_threads(count or 1)
            parameters = [*weights(), torch.nn.Parameter(torch.zeros(3, 4)), torch.nn.Parameter(torch.ones(2))]
            optimizer = LAMB(groups(parameters), lr=1e-2)
            optimizer.grad_scale = torch.tensor(1.3)
            if not count:
                monkeypatch.setattr(lamb, "takes", lambda parameters: False)
            for step in range(4):
                set_gradients(parameters[:-1], step)
                optimizer.step()
            assert parameters[-1].eq(1.0).all()
            found.append([*parameters[:-1], *(s for p in parameters[:-1] for s in optimizer.state[p].values())])
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, found[0], found[1]))
    assert_close(found[0], found[2], 16)


def test_a_parameter_without_a_gradient_stays():
    parameters = weights(((3,), (4,)))
    optimizer = AdamW(parameters)
    set_gradients(parameters, 0)
    parameters[0].grad = None
    before = parameters[0].detach().clone()
    optimizer.step()
    assert torch.equal(parameters[0], before)
    assert parameters[0] not in optimizer.state


def test_found_inf_leaves_everything():
    parameters = weights()
    optimizer = AdamW(parameters)
    for skipped_first in (True, False):
        set_gradients(parameters, 0)
        before = copy.deepcopy([parameters, optimizer.state_dict()])
        optimizer.found_inf = torch.ones(())
        optimizer.step()
        assert all(map(torch.equal, before[0], parameters))
        assert before[1]["state"].keys() == optimizer.state_dict()["state"].keys()
        if not skipped_first:
            old = [v for values in before[1]["state"].values() for v in values.values()]
            assert all(map(torch.equal, old, state(optimizer)))
        optimizer.found_inf = torch.zeros(())
        optimizer.step()
        assert {float(s) for s in state(optimizer)[::3]} == {1.0 if skipped_first else 2.0}


def test_grad_scaler():
    """torch's scaler drives it as it drives torch's: scaled gradients, and a step that is skipped."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    p, q = weights(((5,),)), weights(((5,),))
    for parameters, cls, extra in ((p, AdamW, {}), (q, torch.optim.AdamW, {"fused": True})):
        optimizer = cls(parameters, **extra)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for factor in (1.0, math.inf, 2.0):
            optimizer.zero_grad()
            scaler.scale((parameters[0].square() * factor).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        assert optimizer.state[parameters[0]]["step"] == 2
    assert_close(p, q, 2)


def test_a_closure_and_hooks_run_as_in_torch():
    (p,) = weights(((3,),))
    optimizer, seen = AdamW([p]), []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    assert seen == ["pre", "post"]


def test_backward_through_an_updated_weight_is_noticed():
    (p,) = weights(((3,),))
    optimizer = AdamW([p])
    loss = p.square().sum()
    set_gradients([p], 0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_backward_through_an_updated_copy_is_noticed():
    (p,) = weights(((3, 4),))
    optimizer, low = AdamW([p]), LowWeights([p])
    optimizer.low_weights = low
    x = torch.ones(2, 4, dtype=torch.bfloat16, requires_grad=True)
    with low.fresh(torch.bfloat16):
        y = x @ low_copy(p, torch.bfloat16).t()
    set_gradients([p], 0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("fused", [True, None])
def test_state_goes_to_torch_and_comes_from_it(fused):
    ours, theirs = weights(), weights()
    optimizer, other = AdamW(groups(ours)), torch.optim.AdamW(groups(theirs), fused=fused)
    assert optimizer.state_dict()["param_groups"][0].keys() == other.state_dict()["param_groups"][0].keys()
    for start, to, its, other_its in ((optimizer, other, ours, theirs), (other, optimizer, theirs, ours)):
        set_gradients(its, 0)
        start.step()
        for a, b in zip(its, other_its):
            b.data.copy_(a)
        to.load_state_dict(copy.deepcopy(start.state_dict()))
        assert all(map(torch.equal, state(start), state(to)))
        set_gradients(ours, 1, theirs)
        optimizer.step()
        other.step()
        assert_close(state(optimizer), state(other), 4)
        assert_close(ours, theirs, 4)


def test_a_checkpoint_of_torchs_optimizer_is_resumed(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 2))
    other = copy.deepcopy(model)
    fused = torch.optim.AdamW(model.parameters(), fused=True)
    set_gradients(list(model.parameters()), 0)
    fused.step()
    save_checkpoint(tmp_path, 1, model, fused, {}, keep=1)
    optimizer = AdamW(other.parameters())
    restore(load_newest(tmp_path)[0], other, optimizer)
    set_gradients(list(model.parameters()), 1, list(other.parameters()))
    fused.step()
    optimizer.step()
    assert {float(s) for s in state(optimizer)[::3]} == {2.0}
    assert_close(other.parameters(), model.parameters(), 4)


def test_bad_input():
    with pytest.raises(ValueError, match=r"params: expected dense torch.float32 on a cpu, got torch.bfloat16 .*fused"):
        AdamW([torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))])
    with pytest.raises(ValueError, match=r"params: .* on meta"):
        AdamW([torch.nn.Parameter(torch.zeros(2, device="meta"))])
    (p,) = weights(((3, 2),))
    optimizer = AdamW([p])
    with pytest.raises(ValueError, match=r"params: .*float64"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))]})
    assert len(optimizer.param_groups) == 1
    p.grad = torch.eye(3, 2).to_sparse()
    with pytest.raises(ValueError, match=r"grad: .*got torch.float32 torch.sparse_coo"):
        optimizer.step()
    set_gradients([p], 0)
    optimizer.step()
    for key, value, message in (
        ("exp_avg", torch.zeros(2, 3), r"exp_avg: expected shape \(3, 2\), got \(2, 3\); load the state of the same"),
        ("exp_avg_sq", torch.zeros(3, 2, dtype=torch.float64), "exp_avg_sq: .*torch.float64"),
        ("step", torch.zeros(1), r"step: expected shape \(\), got \(1,\)"),
    ):
        held = optimizer.state[p][key]
        optimizer.state[p][key] = value
        with pytest.raises(ValueError, match=message):
            optimizer.step()
        optimizer.state[p][key] = held
    amsgrad = torch.optim.AdamW(weights(((3, 2),)), amsgrad=True).state_dict()
    optimizer.load_state_dict(amsgrad)
    with pytest.raises(ValueError, match=r"amsgrad: expected False, got True; use torch.optim.AdamW"):
        optimizer.step()


def test_without_the_kernels_the_trainer_takes_torchs(monkeypatch):
    table, model = small().train, torch.nn.Linear(2, 2)
    assert type(optimizers.make_optimizer(model, table)) is AdamW
    assert type(optimizers.make_optimizer(copy.deepcopy(model).double(), table)) is torch.optim.AdamW
    monkeypatch.setattr(_native, "_cpu_error", ImportError("no module"))
    assert type(optimizers.make_optimizer(model, table)) is torch.optim.AdamW
    with pytest.raises(ValueError, match=r"AdamW: fastlm\._cpu is not built"):
        AdamW(model.parameters())


# ---- the norm


def test_norm():
    draw = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=draw) * 10.0 ** (i - 6) for i, shape in enumerate(SHAPES)]
    gradients += [torch.randn(50, 40, generator=draw).t(), torch.randn(30, 20, generator=draw)[:, ::2]]
    want = torch.cat([g.double().flatten() for g in gradients]).norm()
    assert abs(total_norm(gradients).item() - want.item()) <= 2 * EPS * want.item()
    assert total_norm([]) == 0
    assert total_norm([torch.zeros(0)]) == 0
    for value in (math.inf, -math.inf, math.nan):
        gradients[3][0] = value
        assert not total_norm(gradients).isfinite()
    half = [g.half() for g in gradients[4:]]  # torch takes what the kernels do not
    assert total_norm(half) == torch.nn.utils.get_total_norm(half)


# ---- the step


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    prepare(corpus(directory / "corpus.txt"), "train:200", directory / "rows", row_tokens=32, documents="line")
    return open_dataset(directory / "rows")


def mean_step(model, optimizer, micros, *, lr, grad_clip, dtype):
    """The step as a formula: each loss divided by the number of tokens before backward, clipped gradients."""
    predicted, total = sum(micro.counts.predicted for micro in micros), 0.0
    for micro in micros:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(**micro.inputs) / predicted
        loss.backward()
        total += loss.item()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return total, norm.item()


@pytest.mark.parametrize(("micro_tokens", "grad_clip"), [(256, 0.1), (64, 0.1), (64, 0.0), (64, 1e3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_mean_is_taken_by_the_optimizer(dtype, micro_tokens, grad_clip, data):
    """Gradients of the sum, divided as they are read, give the updates of the mean's gradients."""
    recipe = small(train__micro_batch_tokens=micro_tokens)
    objective = MaskedLM(recipe, data, torch.device("cpu"))
    ours, theirs = (make_model(recipe, data.tokenizer.vocab_size, data.tokenizer.pad_id) for _ in range(2))
    optimizer = optimizers.make_optimizer(ours, recipe.train)
    assert type(optimizer) is AdamW
    settings = {"lr": recipe.train.lr, "betas": (recipe.train.beta1, recipe.train.beta2), "eps": recipe.train.eps}
    split = [[p for p in theirs.parameters() if (p.dim() < 2) == small] for small in (False, True)]
    plain = torch.optim.AdamW(
        [{"params": p, "weight_decay": d} for p, d in zip(split, (recipe.train.weight_decay, 0.0))], **settings
    )
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for step in range(2):
        micros = [objective.micro(step, m) for m in range(recipe.micro_count)]
        arguments = {"lr": 1e-3, "grad_clip": grad_clip, "dtype": dtype}
        got = optimizers.train_step(ours, optimizer, micros, **arguments).tolist()
        assert got == pytest.approx(mean_step(theirs, plain, micros, **arguments), rel=tolerance)
        assert all(p.grad is None for p in ours.parameters())
    pairs = list(zip(ours.parameters(), theirs.parameters()))
    for key in ("exp_avg", "exp_avg_sq"):  # AdamW's weights alone would not tell gradients of another scale
        a = torch.cat([optimizer.state[p][key].flatten() for p, _ in pairs])
        b = torch.cat([plain.state[p][key].flatten() for _, p in pairs])
        assert (a - b).norm() <= tolerance * b.norm()
    off = torch.cat([(a - b).flatten() for a, b in pairs])
    assert off.square().mean().sqrt() <= 1e-2 * tolerance  # of a learning rate of 1e-3


def test_the_head_is_not_scaled(data, monkeypatch):
    """The gradient that reaches the fused cross-entropy is 1, for which its backward does nothing."""
    recipe, seen = small(), []
    objective = MaskedLM(recipe, data, torch.device("cpu"))
    model = make_model(recipe, data.tokenizer.vocab_size, data.tokenizer.pad_id)
    optimizer = optimizers.make_optimizer(model, recipe.train)
    forward = Bert.forward

    def watched(self, *args, **kwargs):
        loss = forward(self, *args, **kwargs)
        loss.register_hook(lambda dloss: seen.append(dloss.item()))
        return loss

    monkeypatch.setattr(Bert, "forward", watched)
    micros = [objective.micro(0, 0)]
    optimizers.train_step(model, optimizer, micros, lr=1e-3, grad_clip=1.0, dtype=torch.float32)
    assert seen == [1.0]
