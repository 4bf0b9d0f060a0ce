"""A wheel from the tree and one from the sdist: their contents, and that they work from another directory."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from training import corpus, set_options

from fastlm.run.recipe import tomllib

pytest.importorskip("pybind11", reason="pybind11 and setuptools are needed to build a wheel")
ROOT = Path(__file__).parent.parent
FOLDERS = (".ci", "benchmarks", "csrc", "fastlm", "kernels", "tests")
FILES = (
    ".clang-format",
    ".pre-commit-config.yaml",
    "CONTRIBUTING.md",
    "LICENSE",
    "LOG.md",
    "MANIFEST.in",
    "Makefile",
    "README.md",
    "constraints.txt",
    "pyproject.toml",
    "setup.py",
)
IGNORED = shutil.ignore_patterns("*.so", "__pycache__")
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
    for name in FILES:
        shutil.copy2(ROOT / name, tree)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=IGNORED)
    for objects in (ROOT / "build").glob("temp.*"):
        shutil.copytree(objects, tree / "build" / objects.name)
    if (ROOT / "build" / "nvcc-flags").is_file():  # a new one would be newer than the objects, and nvcc takes minutes
        shutil.copy2(ROOT / "build" / "nvcc-flags", tree / "build")
    return tree


@pytest.fixture(scope="module")
def sdist(tree, tmp_path_factory):
    out = tmp_path_factory.mktemp("sdist")
    hook = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"
    call(sys.executable, "-c", hook, out, cwd=tree, FASTLM_CUDA="0")
    return next(out.glob("*.tar.gz"))


@pytest.fixture(scope="module", params=["tree", pytest.param("sdist", marks=pytest.mark.long)])
def wheel(request, tmp_path_factory):
    """From the tree: with CUDA if nvcc is here. From the sdist: the portable CPU code, and no CUDA."""
    out = tmp_path_factory.mktemp("wheel")
    if request.param == "tree":
        return build_wheel(".", out, cwd=request.getfixturevalue("tree"))
    portable = {"FASTLM_CUDA": "0", "CPPFLAGS": "-DFASTLM_NO_CLONES"}
    return build_wheel(request.getfixturevalue("sdist"), out, cwd=out, **portable)


def test_sdist_is_a_tree_that_make_test_runs_in(sdist, tree):
    """Every file of the tree, whether a build, a lint, a benchmark or a test reads it."""
    with tarfile.open(sdist) as archive:
        assert not [member.name for member in archive if member.issym() or member.islnk()]
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    wanted = {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()}
    wanted = {name for name in wanted if not name.startswith(("build/", "fastlm.egg-info/"))}
    assert {name.split("/")[0] for name in wanted} == {*FILES, *FOLDERS}
    wanted |= {f"fastlm/kernels/{name}" for name in KERNELS}
    own = {name for name in names if name in ("PKG-INFO", "setup.cfg") or name.startswith("fastlm.egg-info/")}
    assert names - own == wanted


@pytest.mark.long
def test_an_unpacked_sdist_collects_every_test(sdist, tmp_path):
    """With the extension of this tree, since the wheel's tests build it from the sdist."""
    shutil.unpack_archive(sdist, tmp_path)
    (unpacked,) = tmp_path.iterdir()
    for extension in (ROOT / "fastlm").glob("_c*.so"):
        shutil.copy2(extension, unpacked / "fastlm")
    assert "no tests collected" not in call(sys.executable, "-m", "pytest", "--collect-only", "-q", cwd=unpacked)
    where = "import fastlm; print(fastlm.__file__)"
    assert call(sys.executable, "-c", where, cwd=unpacked).strip() == str(unpacked / "fastlm" / "__init__.py")


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
    """In a fresh environment that sees the packages of this one, but not its fastlm (a path file reads no other).

    Text to rows to a model to a filled mask, by the installed command.
    """
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
    text = corpus(tmp_path / "corpus.txt")
    rows = ("--tokenizer", "train:200", "--row-tokens", "32", "--documents", "line")
    call(bin / "fastlm", "prepare", "--data", text, "--out", "rows", *rows, cwd=tmp_path)
    steps = ("--max-steps", "3", "--device", "cpu", *set_options())
    call(bin / "fastlm", "pretrain", "bert-mini", "--data", "rows", "--out", "run", *steps, cwd=tmp_path)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 3
    filled = call(bin / "fastlm", "fill-mask", "--model", "run/hf", "--top", "3", "anna found [MASK].", cwd=tmp_path)
    assert len(filled.splitlines()) == 3


def imported(path):
    """Top-level names of everything that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


def test_what_is_imported_is_declared():
    """The wheel's test borrows the packages of this environment, so it would not miss one that is not declared."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    needed, users = project["dependencies"], [line for name in ("hf", "tensorboard", "wandb") for line in extras[name]]
    required, optional = ({re.match(r"[\w.-]+", line)[0].lower() for line in lines} for lines in (needed, users))
    package = [path for folder in ("fastlm", "kernels") for path in (ROOT / folder).rglob("*.py")]
    found = {name for path in package for name in imported(path)} - set(sys.stdlib_module_names) - {"fastlm"}
    found -= {"tomllib"}  # of the standard library from 3.11 on
    assert found <= required | optional, "declare it in pyproject.toml"
    assert required <= found, "declared, and not used"
