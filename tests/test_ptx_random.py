"""Random C++ kernels: nvcc's code on the interpreter gives the results of the host compiler's code."""

import ctypes
import os
import subprocess
from pathlib import Path

import numpy as np
import ptx
import pytest
from ptx.random_kernels import ROW, source

SOURCES = Path(__file__).parent / "ptx" / "sources"
SEED, KERNELS, THREADS = 3, 14, 160
PARAMETERS = np.dtype(
    [("a", "i1"), ("b", "u2", 5), ("c", "i8"), ("d", "f4"), ("e", "u4", 4), ("f", "f8"), ("g", "i2", 3)], align=True
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """PTX, and a library of the same functions."""
    if ptx.nvcc() is None:
        pytest.skip("nvcc is not installed")
    text = source(SEED, KERNELS)
    path = tmp_path_factory.mktemp("random") / "kernels.cpp"
    path.write_text(text)
    library = path.with_suffix(".so")
    options = ["-std=c++17", "-O0", "-w", "-fPIC", "-shared", "-ffp-contract=off", "-fno-strict-aliasing"]
    command = [os.environ.get("CXX", "g++"), *options, f"-I{SOURCES}", str(path), "-o", str(library)]
    subprocess.run(command, check=True)
    return ptx.compile_cuda(text, includes=(str(SOURCES),)), ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def inputs():
    """Random bits, extreme bytes, small integers, ordinary floats; and the struct that is passed by value."""
    rng = np.random.default_rng(SEED)
    x = rng.integers(0, 256, (THREADS, ROW), dtype=np.uint8)
    x[:20] = rng.choice(np.array([0, 0, 0, 1, 127, 128, 255, 255], np.uint8), (20, ROW))
    x[20:60].view(np.int64)[:] = rng.integers(-20, 100, (40, ROW // 8))
    x[60:100].view(np.float32)[:] = 100 * rng.standard_normal((40, ROW // 4))
    b, e, g = rng.integers(0, 2**16, 5), rng.integers(0, 2**32, 4), rng.integers(-(2**15), 2**15, 3)
    return x, np.array((-3, b, -(2**40) - 5, 1.5, e, -77.125, g), PARAMETERS)


@pytest.mark.parametrize("k", range(KERNELS))
def test_random_kernel(compiled, inputs, k):
    text, host = compiled
    x, parameters = inputs
    want, got = np.zeros_like(x), np.zeros_like(x)
    addresses = (ctypes.c_void_p(array.ctypes.data) for array in (parameters, x, want))
    getattr(host, f"k{k}")(*addresses, ctypes.c_int(THREADS))
    ptx.run(text, f"k{k}", 2, 96, [parameters.tobytes(), x, got, THREADS])
    np.testing.assert_array_equal(got.view(np.uint64), want.view(np.uint64))
    assert len(np.unique(got, axis=0)) > 1
