"""kernels/philox.py gives the words of fastlm/philox.py in Triton's interpreter, and uses 32-bit arithmetic in PTX."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastlm import philox
from fastlm.ops import _random

pytest.importorskip("triton", reason="triton is not installed")
SCRIPT = Path(__file__).with_name("triton_philox.py")
LOW32 = 0xFFFFFFFF


def run(*args, interpret, stdin=""):
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent.parent), "TRITON_INTERPRET": str(int(interpret))}
    command = [sys.executable, str(SCRIPT), *args]
    done = subprocess.run(command, input=stdin, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_words_of_the_interpreter():
    """Random123's known answers, random counters, and counters past 32 bits, which are taken modulo 2^32."""
    zeros, ones = [0] * 4, [LOW32] * 4
    digits = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    counters = torch.randint(0, 2**32, (4, 16), generator=torch.Generator().manual_seed(0))
    keys = torch.randint(0, 2**32, (2, 16), generator=torch.Generator().manual_seed(1))
    for column, (counter, key) in enumerate([(zeros, zeros[:2]), (ones, ones[:2]), (digits, [0xA4093822, 0x299F31D0])]):
        counters[:, column], keys[:, column] = torch.tensor(counter), torch.tensor(key)
    wide = counters.clone()
    wide[:, 3:] += 5 << 32
    seed, step, site = -(2**62) - 12345, 2**40 + 7, 77

    request = {"counters": wide.tolist(), "keys": keys.tolist(), "rng": [seed, step], "site": site}
    got = json.loads(run("interpret", interpret=True, stdin=json.dumps(request)))

    words = torch.tensor(got["words"])
    assert words[:, 0].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert words[:, 1].tolist() == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert words[:, 2].tolist() == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]
    assert torch.equal(words, torch.stack(philox.philox4x32(*counters, *keys)))
    assert got["call_key"] == [int(k) for k in _random.call_key(torch.tensor([seed, step]), site)]


def test_ptx_multiplies_32_bits():
    """Ten rounds of two products of 32 bits by 32, and no 64-bit one, which would be Philox4x64's."""
    listings = run("compile", "80", "90", "100", interpret=False).split(".target sm_")[1:]
    assert [listing[:2] for listing in listings] == ["80", "90", "10"]
    for ptx in listings:
        assert ptx.count("mul.wide.u32") >= 2 * 20  # the words, and the key of a call
        assert "mul.hi.u64" not in ptx
        assert "mul.lo.s64" not in ptx
