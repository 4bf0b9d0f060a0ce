"""The table by which "auto" leaves its order of backends: what an entry describes, and that predictions come last."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastlm import _native, info, ops
from fastlm.ops import _preferences, _registry


@pytest.fixture
def planted(monkeypatch):
    """planted(*entries): the table of rms_norm on an sm_90 device where Triton and CUDA run."""
    monkeypatch.setattr(_registry, "_triton_installed", lambda: True)
    monkeypatch.setattr(_native, "missing_cuda", lambda: None)
    monkeypatch.setattr(_preferences, "_capability", lambda index: 90)

    def plant(*entries):
        monkeypatch.setitem(_registry._pages, "rms_norm", _registry._pages["rms_norm"])  # as it was, at the end
        _registry.page("fastlm.ops.layer_norm", "rms_norm", prefer=entries)

    return plant


def entry(backend, **described):
    return _preferences.Preference("cuda", backend, **{"why": "for a test", "sm": 90, **described})


def on_a_gpu(*shape, dtype=torch.bfloat16):
    with FakeTensorMode():
        return torch.empty(shape, dtype=dtype, device="cuda:0")


def test_a_predicted_entry_never_displaces_a_measured_one(planted):
    x = on_a_gpu(4, 1024)
    assert _registry.choose("rms_norm", "auto", x) == "triton"
    guess, fact = entry("cuda", kernel="fast", measured=False), entry("reference")
    planted(guess)
    assert (_registry.choose("rms_norm", "auto", x), _registry.kernel("rms_norm", "cuda", x)) == ("cuda", "fast")
    for both in ((guess, fact), (fact, guess)):
        planted(*both)
        assert _registry.choose("rms_norm", "auto", x) == "reference"
    planted(guess, entry("cuda", kernel="slow"))
    assert _registry.kernel("rms_norm", "cuda", x) == "slow"
    assert _registry.kernel("rms_norm", "triton", x) == ""
    lines = info.backends_table("cuda")
    assert "  rms_norm: auto is cuda's slow kernel for a test" in lines
    assert "  rms_norm: auto is cuda's fast kernel (predicted, not measured) for a test" in lines


@pytest.mark.parametrize(
    ("described", "chosen"),
    [
        ({"sm": 100}, False),
        ({"sm": None}, True),
        ({"dtypes": (torch.float32,)}, False),
        ({"dtypes": (torch.float16, torch.bfloat16)}, True),
        ({"shape": ((-1, 1024, 1024), (0, 1, None))}, True),
        ({"shape": ((-1, 1025, None),)}, False),
        ({"shape": ((-1, 1, 1023),)}, False),
        ({"shape": ((2, 1, None),)}, False),  # x has no such dimension
        ({"applies": lambda x, **features: x.shape[0] == 5}, False),
    ],
)
def test_an_entry_describes_inputs(planted, described, chosen):
    planted(entry("cuda", **described))
    assert _registry.choose("rms_norm", "auto", on_a_gpu(4, 1024)) == ("cuda" if chosen else "triton")


def test_an_entry_says_first_what_needs_neither_sizes_nor_a_device(planted, monkeypatch):
    """Of a fake tensor on a device that is not here: no query for it fails."""
    monkeypatch.undo()
    monkeypatch.setattr(_preferences, "_capability_of", _preferences._capability_of.__wrapped__)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not _preferences.describes(entry("cuda"), on_a_gpu(4, 1024), {})
    monkeypatch.setattr(_preferences, "_capability", lambda index: pytest.fail("a query"))
    assert not _preferences.describes(entry("cuda", applies=lambda x: False), on_a_gpu(4, 1024), {})
    assert not _preferences.describes(entry("cuda", dtypes=(torch.float16,)), on_a_gpu(4, 1024), {})


def test_an_entry_sets_no_bounds_on_symbolic_sizes(monkeypatch):
    """torch.compile makes one graph for all lengths, and torch.export takes a Dim; a size that is fixed is compared."""
    page, weight = _registry._pages["rms_norm"], torch.ones(32)
    graphs = []

    def remember(graph, inputs):
        graphs.append(any("fastlm" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    class Norm(torch.nn.Module):
        def forward(self, x):
            return ops.rms_norm(x, weight)

    for dimension, least, ours in ((0, 512, True), (1, 16, False)):
        chosen = _preferences.Preference("cpu", "reference", "for a test", shape=((dimension, least, None),))
        monkeypatch.setitem(_registry._pages, "rms_norm", page._replace(prefer=(chosen,)))
        torch._dynamo.reset()
        graphs.clear()
        compiled = torch.compile(Norm(), backend=remember)
        for length in (600, 300):
            x = torch.randn(length, 32)
            torch._dynamo.mark_dynamic(x, 0)
            compiled(x)
        assert graphs == [ours]
    monkeypatch.setitem(
        _registry._pages, "rms_norm", page._replace(prefer=(chosen._replace(shape=((0, 512, None), (1, 1, None))),))
    )
    lengths = {0: torch.export.Dim("length", min=2, max=4096)}
    exported = torch.export.export(Norm(), (torch.randn(600, 32),), dynamic_shapes=(lengths,))
    assert exported.module()(torch.randn(300, 32)).shape == (300, 32)


@pytest.mark.parametrize(
    ("columns", "dtype", "cluster"),
    [
        (262144, torch.bfloat16, True),  # Gemma 3
        (151936, torch.bfloat16, False),
        (128256, torch.float32, True),
        (50257, torch.float32, False),
        (458752, torch.float32, True),  # what eight blocks hold
        (458753, torch.float32, False),
    ],
)
def test_cuda_takes_a_cluster_for_rows_past_the_cache(planted, columns, dtype, cluster):
    """Of backend="cuda": "auto" stays with Triton's kernel, which has run on such a device."""
    x = on_a_gpu(8, columns, dtype=dtype)
    assert _registry.choose("cross_entropy", "auto", x) == "triton"
    assert _registry.kernel("cross_entropy", "cuda", x) == ("cluster" if cluster else "")
    for feature in ("softcap", "figures"):
        assert _registry.kernel("cross_entropy", "cuda", x, **{feature: True}) == ""
