"""A wheel from the tree and one from the sdist: their contents, and that they work from another directory."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import fastlm
from fastlm.run.recipe import tomllib

pytest.importorskip("pybind11", reason="pybind11 and setuptools are needed to build a wheel")
ROOT = Path(__file__).parent.parent
FOLDERS = (".ci", "benchmarks", "csrc", "fastlm", "kernels", "tests")
FILES = (
    ".clang-format",
    ".pre-commit-config.yaml",
    "CHANGELOG.md",
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
# What an older build and an older version left behind: no wheel has them.
STALE = ("fastlm/_stale.so", "fastlm/removed.py")
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
    for name in ("nvcc-flags", "sm90/nvcc-flags"):  # a new one would be newer than the objects, and nvcc takes minutes
        if (ROOT / "build" / name).is_file():
            (tree / "build" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / "build" / name, tree / "build" / name)
    library = tree / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    for path in (tree / STALE[0], *(library / name for name in STALE)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
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
    wanted = {name for name in wanted if not name.startswith(("build/", "fastlm.egg-info/"))} - {*STALE}
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
    assert not {*STALE} & set(names)
    metadata = next(name for name in names if name.endswith("/METADATA"))
    assert "License-Expression: Apache-2.0" in zipfile.ZipFile(wheel).read(metadata).decode()


@pytest.mark.parametrize(
    ("package", "version", "needed"), [("setuptools", "65.5.0", "77"), ("pybind11", "2.9", "2.13")]
)
def test_an_old_build_requirement_is_named(package, version, needed, tmp_path):
    """pip --no-build-isolation builds with what is installed."""
    old = tmp_path / f"{package}-{version}.dist-info"
    old.mkdir()
    (old / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert f"building needs {package}>={needed}, found {version}. Run `" in done.stderr
    assert '-m pip install "setuptools>=77" "pybind11>=2.13"`' in done.stderr


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
    work = tmp_path / "work"
    work.mkdir()
    assert "layer_norm" in call(bin / "python", ROOT / ".ci" / "try_wheel.py", cwd=work)


def test_one_version():
    """In pyproject.toml, in the package, and as the newest of the changelog."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)[1]
    assert project["version"] == fastlm.__version__ == newest


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
    needed, users = (
        project["dependencies"],
        [line for name in ("hf", "tensorboard", "wandb", "data") for line in extras[name]],
    )
    required, optional = ({re.match(r"[\w.-]+", line)[0].lower() for line in lines} for lines in (needed, users))
    package = [path for folder in ("fastlm", "kernels") for path in (ROOT / folder).rglob("*.py")]
    found = {name for path in package for name in imported(path)} - set(sys.stdlib_module_names) - {"fastlm"}
    found -= {"tomllib"}  # of the standard library from 3.11 on
    found -= {"ctranslate2", "onnxruntime"}  # peers of generation, which run in an environment of their own
    assert found <= required | optional, "declare it in pyproject.toml"
    assert required <= found, "declared, and not used"
