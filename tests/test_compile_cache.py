"""A graph that torch.compile stored for other sources of the ops is not used."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.compiler.config
from torch._dynamo.utils import counters

from fastlm import _native, ops
from fastlm.ops import _compile_cache

OPS = Path(ops.__file__).parent


@pytest.fixture
def changed(tmp_path):
    """The version of a copy of the ops in which gelu's page has one line more."""
    shutil.copytree(OPS, tmp_path / "ops")
    with open(tmp_path / "ops" / "gelu.py", "a") as page:
        page.write("# other\n")
    return _compile_cache.version(tmp_path / "ops")


def test_version_is_that_of_the_sources(changed, tmp_path):
    assert _compile_cache.version() == _compile_cache.version() != changed
    (tmp_path / "ops" / "gelu.py").write_bytes((OPS / "gelu.py").read_bytes())
    assert _compile_cache.version(tmp_path / "ops") == _compile_cache.version()
    (tmp_path / "ops" / "gelu.py").rename(tmp_path / "ops" / "gelu2.py")
    assert _compile_cache.version(tmp_path / "ops") != _compile_cache.version()


def test_importing_the_ops_has_set_the_tag():
    assert f"fastlm-{_compile_cache.version()}" in torch.compiler.config.cache_key_tag


def test_tag_keeps_what_the_user_has_set():
    own = f"fastlm-{_compile_cache.version()}"
    for before, after in (("", own), ("mine", f"mine {own}"), (f"mine {own}", f"mine {own}")):
        with torch.compiler.config.patch(cache_key_tag=before):
            _compile_cache.tag()
            assert torch.compiler.config.cache_key_tag == after


@pytest.mark.skipif(_native.missing_cpu() is not None, reason=str(_native.missing_cpu()))
def test_other_ops_compile_anew(changed, tmp_path, monkeypatch):
    """Forward and backward: the second compilation is found on disk, that of other ops is not."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    x = torch.linspace(-1, 1, 6).view(2, 3).requires_grad_()

    def hits_and_misses():
        torch._dynamo.reset()
        counters.clear()
        y = torch.compile(lambda x: ops.gelu(x, backend="cpu"), fullgraph=True)(x)
        y.sum().backward()
        found = counters["aot_autograd"]
        return found["autograd_cache_hit"], found["autograd_cache_miss"]

    assert hits_and_misses() == (0, 1)
    assert hits_and_misses() == (1, 0)
    tag = torch.compiler.config.cache_key_tag.replace(_compile_cache.version(), changed)
    with torch.compiler.config.patch(cache_key_tag=tag):
        assert hits_and_misses() == (0, 1)
