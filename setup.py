"""Builds the extension modules. The rest of the packaging is in pyproject.toml.

fastlm._cpu is always built, with any C++17 compiler. It is compiled with OpenMP but not linked to an OpenMP library. At
import its symbols resolve to the library that torch has loaded (fastlm/_native.py), so there is one pool of threads.

fastlm._cuda is built if nvcc is found (CUDA_HOME, else PATH). Settings of the build:
  FASTLM_CUDA=0             leaves CUDA out
  FASTLM_CUDA_ARCHS=90,100  architectures of the machine code, with PTX of the last one (default: 80,90,100)
The kernels of csrc/cuda/sm90 have machine code of sm_90a alone, whatever the architectures. It takes nvcc 12 or later.
The kernels do not know Python. Their objects, in build/temp.cuda, are compiled once for all Python versions.
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path


def check_requirements():
    """Exits if a build requirement is missing or too old. pip --no-build-isolation does not look at them."""
    (line,) = re.findall(r"^requires = \[(.*)\]", Path("pyproject.toml").read_text(encoding="utf-8"), re.M)
    for package, needed in re.findall(r'"([\w.-]+)>=([\d.]+)"', line):
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:
            found = ""
        if [int(part) for part in re.findall(r"\d+", found)[:2]] < [int(part) for part in needed.split(".")]:
            sys.exit(
                f"fastlm: building needs {package}>={needed}, found {found or 'none'}. Run `{sys.executable} -m pip "
                f"install {line.replace(',', '')}`, or build without --no-build-isolation."
            )


check_requirements()

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup
from setuptools.command.build import build
from setuptools.modified import newer_group

INCLUDES = ["csrc", "csrc/common"]
# fp contraction gives FMAs. Without errno and traps, sqrt and compares vectorise. NaN and infinity work as usual.
CXX_FLAGS = ["-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra"]


def sources(pattern):
    return sorted(path.as_posix() for path in Path("csrc").glob(pattern))


def headers(*folders):
    """Of these folders of csrc: a header of the CPU's kernels compiles no CUDA kernel again."""
    return [path for folder in folders for end in ("h", "cuh") for path in sources(f"{folder}/**/*.{end}")]


def find_nvcc():
    """The path of nvcc, or None and the reason."""
    if os.environ.get("FASTLM_CUDA") == "0":
        return None, "FASTLM_CUDA=0"
    if "CUDA_HOME" in os.environ:
        nvcc = Path(os.environ["CUDA_HOME"], "bin", "nvcc")
        return (str(nvcc), "") if nvcc.exists() else (None, f"CUDA_HOME is set, but {nvcc} does not exist")
    nvcc = shutil.which("nvcc")
    return nvcc, "" if nvcc else "nvcc is not on PATH; install the CUDA toolkit or set CUDA_HOME"


def nvcc_flags(sm90=False):
    """Of the kernels for all architectures, or of those in csrc/cuda/sm90."""
    archs = os.environ.get("FASTLM_CUDA_ARCHS", "80,90,100").split(",")
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    targets.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    if sm90:
        targets = ["-gencode=arch=compute_90a,code=sm_90a"]
    # The host symbols of kernels stay visible, as before CUDA 13: csrc/cuda/launch.h finds the names of kernels by
    # them.
    visible = ["-static-global-template-stub=false", "-device-entity-has-hidden-visibility=false"]
    version = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    release = int(re.search(r"release (\d+)", version).group(1))
    return [
        "-O3", "-std=c++17", "-lineinfo", "--threads=0", "-Xcompiler=-fPIC", *targets,
        *(visible if release >= 13 else []),
    ]  # fmt: skip


def cpu_extension():
    linux = sys.platform == "linux"
    return Pybind11Extension(
        "fastlm._cpu",
        [*sources("bindings_cpu/*.cpp"), *sources("cpu/*.cpp")],
        include_dirs=INCLUDES,
        depends=["setup.py", *headers("common", "bindings_cpu", "cpu")],
        # Apple's clang has no OpenMP: one thread there.
        extra_compile_args=CXX_FLAGS + (["-fopenmp"] if linux else []),
        extra_link_args=["-Wl,-z,now"] if linux else [],
        cxx_std=17,
    )


def flags_file(sm90=False):
    """A file that changes with nvcc's flags, so that another FASTLM_CUDA_ARCHS compiles the kernels again."""
    path, flags = Path("build/sm90/nvcc-flags" if sm90 else "build/nvcc-flags"), " ".join([NVCC, *nvcc_flags(sm90)])
    if not path.is_file() or path.read_text() != flags:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(flags)
    return str(path)


def cuda_extension():
    return Pybind11Extension(
        "fastlm._cuda",
        [*sources("bindings_cuda/*.cpp"), *sources("cuda/*.cu"), *sources("cuda/sm90/*.cu")],
        include_dirs=INCLUDES,
        depends=["setup.py", *headers("common", "bindings_cuda", "cuda"), flags_file(), flags_file(sm90=True)],
        extra_compile_args=CXX_FLAGS,
        cxx_std=17,
    )


class Build(build):
    """Empties build/lib* first, since a wheel takes all of it: an older build's _cuda, modules removed since."""

    def run(self):
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildExt(build_ext):
    """pybind11's build_ext with nvcc for .cu sources. It compiles only sources that changed, in parallel."""

    def finalize_options(self):
        super().finalize_options()
        if self.editable_mode:  # an editable install and `build_ext --inplace` share their objects
            defaults = build(self.distribution)
            defaults.ensure_finalized()
            self.build_lib, self.build_temp = defaults.build_lib, defaults.build_temp

    def build_extensions(self):
        compiler, cuda_temp = self.compiler, str(Path(self.build_temp).parent / "temp.cuda")
        compile_cxx = compiler._compile

        def compile_cuda(obj, src, *_):
            run([NVCC, "-c", *(f"-I{path}" for path in INCLUDES), *nvcc_flags("/sm90/" in src), src, "-o", obj])

        def compile_all(sources, output_dir=None, macros=None, include_dirs=None, debug=0, extra_preargs=None,
                        extra_postargs=None, depends=()):  # fmt: skip
            kernels = [source for source in sources if source.endswith(".cu")]
            cxx = [source for source in sources if source not in kernels]
            of_sm90 = [kernel for kernel in kernels if "/sm90/" in kernel]
            of_all = [kernel for kernel in kernels if kernel not in of_sm90]
            # The flags of nvcc are in a file of their own: a change of setup.py alone compiles no kernel.
            sm90_depends = [path for path in depends if path != "setup.py"]
            cuda_depends = [path for path in sm90_depends if "/sm90/" not in path]
            objects, jobs = [], []
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                for compile_one, group, temp, needs in (
                    (compile_cxx, cxx, output_dir, depends),
                    (compile_cuda, of_all, cuda_temp, cuda_depends),
                    (compile_cuda, of_sm90, cuda_temp, sm90_depends),
                ):
                    _, made, postargs, pp_opts, targets = compiler._setup_compile(
                        temp, macros, include_dirs, group, needs, extra_postargs
                    )
                    cc_args = compiler._get_cc_args(pp_opts, debug, extra_preargs)
                    objects += made
                    jobs += [
                        pool.submit(compile_one, obj, src, ext, cc_args, postargs, pp_opts)
                        for obj, (src, ext) in targets.items()
                        if newer_group([src, *needs], obj)
                    ]
                for job in jobs:
                    job.result()
            return objects

        def link(objects, output_filename, *args, **kwargs):
            # nvcc finds its static runtime in any layout of the toolkit.
            run([NVCC, "-shared", "-cudart=static", *objects, "-o", output_filename])
            print(f"fastlm: {output_filename}: {os.path.getsize(output_filename) / 1e6:.1f} MB", file=sys.stderr)

        compiler.src_extensions.append(".cu")
        compiler.compile = compile_all
        self.link_cuda = link
        super().build_extensions()

    def build_extension(self, extension):
        if extension.name == "fastlm._cuda":
            link_cxx, self.compiler.link_shared_object = self.compiler.link_shared_object, self.link_cuda
            super().build_extension(extension)
            self.compiler.link_shared_object = link_cxx
        else:
            super().build_extension(extension)


def run(command):
    print(" ".join(command), file=sys.stderr)
    subprocess.check_call(command)


NVCC, REASON = find_nvcc()
print(f"fastlm: building _cuda with {NVCC}" if NVCC else f"fastlm: _cuda is left out: {REASON}", file=sys.stderr)

setup(
    ext_modules=[cpu_extension()] + ([cuda_extension()] if NVCC else []),
    cmdclass={"build": Build, "build_ext": BuildExt},
)
