"""Run by test_triton_philox.py in a separate process: `interpret` prints words as JSON, `compile ARCH...` prints PTX.

Triton reads TRITON_INTERPRET when a kernel is decorated, and takes a kernel's source from its file.
"""

import json
import sys

import torch
import triton
import triton.language as tl

from fastlm.kernels.philox import dropout_key, philox4x32


@triton.jit
def words_kernel(counters_ptr, keys_ptr, words_ptr, rng_ptr, site, call_key_ptr, N: tl.constexpr):
    """counters (4, N), keys (2, N) int64 -> words (4, N) int64; call_key (2,) int64 of the rng."""
    i = tl.arange(0, N)
    r0, r1, r2, r3 = philox4x32(
        tl.load(counters_ptr + i),
        tl.load(counters_ptr + N + i),
        tl.load(counters_ptr + 2 * N + i),
        tl.load(counters_ptr + 3 * N + i),
        tl.load(keys_ptr + i),
        tl.load(keys_ptr + N + i),
    )
    tl.store(words_ptr + i, r0.to(tl.int64))
    tl.store(words_ptr + N + i, r1.to(tl.int64))
    tl.store(words_ptr + 2 * N + i, r2.to(tl.int64))
    tl.store(words_ptr + 3 * N + i, r3.to(tl.int64))
    k0, k1 = dropout_key(rng_ptr, site)
    tl.store(call_key_ptr, k0.to(tl.int64))
    tl.store(call_key_ptr + 1, k1.to(tl.int64))


def interpret(counters, keys, rng, site):
    counters, keys, rng = torch.tensor(counters), torch.tensor(keys), torch.tensor(rng)
    words, call_key = torch.empty_like(counters), torch.empty_like(rng)
    words_kernel[(1,)](counters, keys, words, rng, site, call_key, N=counters.shape[1])
    return {"words": words.tolist(), "call_key": call_key.tolist()}


def compile_ptx(arch):
    pointers = ("counters_ptr", "keys_ptr", "words_ptr", "rng_ptr", "call_key_ptr")
    signature = {**dict.fromkeys(pointers, "*i64"), "site": "i32", "N": "constexpr"}
    source = triton.compiler.ASTSource(words_kernel, signature, constexprs={"N": 128})
    return triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", arch, 32)).asm["ptx"]


if __name__ == "__main__":
    if sys.argv[1] == "interpret":
        print(json.dumps(interpret(**json.load(sys.stdin))))
    else:
        for arch in sys.argv[2:]:
            print(compile_ptx(int(arch)))
