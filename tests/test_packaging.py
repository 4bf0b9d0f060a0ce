"""A wheel from the tree and a wheel from the sdist: what is in them, and that they work from another directory."""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("pybind11", reason="pybind11 and setuptools are needed to build a wheel")
ROOT = Path(__file__).parent.parent
SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "LOG.md", "constraints.txt")
KERNELS = sorted(path.name for path in (ROOT / "kernels").glob("*.py"))


def call(*command, cwd, **environment):
    """Runs a command with nothing on the Python path; its output."""
    environment = {**os.environ, **environment}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


def build_wheel(source, out, cwd, **environment):
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    call(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", out, source, cwd=cwd, **environment)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the tree, with the objects that are compiled already, so that only what is stale is compiled again."""
    tree = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        shutil.copy2(ROOT / name, tree)
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("csrc", "fastlm", "kernels", "tests"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignore)
    for objects in (ROOT / "build").glob("temp.*"):
        shutil.copytree(objects, tree / "build" / objects.name)
    return tree


@pytest.fixture(scope="module")
def sdist(tree, tmp_path_factory):
    out = tmp_path_factory.mktemp("sdist")
    hook = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"
    call(sys.executable, "-c", hook, out, cwd=tree, FASTLM_CUDA="0")
    return next(out.glob("*.tar.gz"))


@pytest.fixture(scope="module", params=["tree", "sdist"])
def wheel(request, tmp_path_factory):
    """From the tree: with CUDA if nvcc is here. From the sdist: the portable CPU code, and no CUDA."""
    out = tmp_path_factory.mktemp("wheel")
    if request.param == "tree":
        return build_wheel(".", out, cwd=request.getfixturevalue("tree"))
    portable = {"FASTLM_CUDA": "0", "CPPFLAGS": "-DFASTLM_NO_CLONES"}
    return build_wheel(request.getfixturevalue("sdist"), out, cwd=out, **portable)


def test_sdist_holds_headers_and_kernels_once(sdist):
    with tarfile.open(sdist) as archive:
        assert not [member.name for member in archive if member.issym() or member.islnk()]
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert sorted(name for name in names if "kernels/" in name) == [f"fastlm/kernels/{name}" for name in KERNELS]
    for source in (ROOT / "csrc").rglob("*.*"):
        assert source.relative_to(ROOT).as_posix() in names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]


def test_wheel_holds_the_package_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"fastlm"}
    assert sorted(name for name in names if "kernels/" in name) == [f"fastlm/kernels/{name}" for name in KERNELS]
    package = [path.relative_to(ROOT).as_posix() for path in (ROOT / "fastlm").rglob("*") if path.is_file()]
    wanted = {name for name in package if name.endswith((".py", ".toml", "py.typed"))}
    assert wanted <= set(names)
    assert [name for name in names if name.endswith("licenses/LICENSE")]
    assert [name for name in names if name.startswith("fastlm/_cpu.")]
    metadata = next(name for name in names if name.endswith("/METADATA"))
    assert "License-Expression: Apache-2.0" in zipfile.ZipFile(wheel).read(metadata).decode()


CHECK = """
import importlib.util, sys, torch
import fastlm
from fastlm import ops
assert fastlm.__file__.startswith(sys.prefix), fastlm.__file__
x = torch.randn(3, 5, requires_grad=True)
ops.layer_norm(x, backend="cpu").sum().backward()
assert x.grad.shape == (3, 5)
spec = importlib.util.find_spec("kernels")  # free, or another package's
assert spec is None or not spec.origin.startswith(sys.prefix), spec
if importlib.util.find_spec("triton"):
    import fastlm.kernels.philox
"""


def test_wheel_works_from_another_directory(wheel, tmp_path):
    """In a fresh environment that sees the packages of this one, but not its fastlm (a path file reads no other)."""
    environment = tmp_path / "environment"
    venv.create(environment, symlinks=True)
    bin = environment / "bin"
    site = next(environment.glob("lib/python*/site-packages"))
    shared = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "shared.pth").write_text("\n".join(shared))
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", bin / "python")
    call(*pip, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    call(bin / "python", "-c", CHECK, cwd=tmp_path)
    info = call(bin / "fastlm", "info", cwd=tmp_path)
    assert str(site / "fastlm") in info
    assert "layer_norm" in info
