"""Executes PTX, what nvcc and Triton emit for sm_80, on a machine without a GPU. See docs/ptx.md.

run(ptx, entry, grid, block, args)      a launch over NumPy arrays or CPU tensors
compile_cuda, compile_triton            PTX of a .cu file or of a Triton kernel, cached
triton_on_ptx()                         kernel[grid](...) of any Triton kernel goes through `run`
"""

from ptx.compile import CompiledTriton, compile_cuda, compile_triton, nvcc
from ptx.decode import UnknownInstruction
from ptx.driver import Launches, cuda_on_ptx, triton_on_ptx
from ptx.launch import Finding, KernelFault, Report, load, run, uninitialised
from ptx.parse import PtxError, parse
from ptx.tensor_map import TensorMap, tensor_map

__all__ = [
    "CompiledTriton",
    "Finding",
    "KernelFault",
    "Launches",
    "PtxError",
    "Report",
    "TensorMap",
    "UnknownInstruction",
    "compile_cuda",
    "compile_triton",
    "cuda_on_ptx",
    "load",
    "nvcc",
    "parse",
    "run",
    "tensor_map",
    "triton_on_ptx",
    "uninitialised",
]
