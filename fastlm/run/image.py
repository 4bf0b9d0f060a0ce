"""A safetensors file in memory: tensors are copied into it, and it is written from there with next to no CPU time.

The steps of a run go on while a checkpoint is written, on the same cores, so what counts is the CPU time of a write.
Where the file system allows it, the page cache is passed by (O_DIRECT, from memory aligned to pages). The checksum is
XXH3, which takes a seventh of SHA-256's time. It finds damage; it is no protection against forgery.
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
import xxhash

# As safetensors names them: of parameters, and of what optimizers keep.
_DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
}
_BLOCK = 4096  # bytes: O_DIRECT wants addresses, offsets and lengths in multiples of a disk's block
_CHUNK = 1 << 24  # bytes of one write
DIRECT = getattr(os, "O_DIRECT", 0)  # not on macOS


class Image:
    """The bytes of a safetensors file, whose tensors are `tensors`, by name: views of them on the CPU.

    tensors: what is copied, from any device. Copies from a GPU go to pinned memory and have ended where the stream is
        synchronized.
    into: an earlier image. Where it holds tensors of the same names, shapes and dtypes, its memory is written over: new
        memory takes longer than the copy, since every page of it is a fault.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], into: Image | None = None):
        order = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # so that all are aligned
        header, end = {}, 0
        for name, tensor in order:
            start, end = end, end + tensor.numel() * tensor.element_size()
            header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % 64)
        self._head = struct.pack("<Q", len(text)) + text
        self.size = len(self._head) + end  # bytes of the file
        if into is not None and into._head == self._head:
            self._bytes, self.tensors = into._bytes, into.tensors
        else:
            self._bytes = _memory(-(-self.size // _BLOCK) * _BLOCK, any(t.is_cuda for t in tensors.values()))
            self._bytes[: len(self._head)] = torch.frombuffer(bytearray(self._head), dtype=torch.uint8)
            data = self._bytes[len(self._head) : self.size]
            self.tensors = {
                name: data[slice(*header[name]["data_offsets"])].view(tensor.dtype).view(tensor.shape)
                for name, tensor in order
            }
        for name, tensor in tensors.items():
            self.tensors[name].copy_(tensor, non_blocking=True)

    def write(self, path: Path) -> str:
        """Write the file, and return its checksum, as `file_checksum` takes it. OSError where it cannot be written."""
        data = memoryview(self._bytes.numpy())
        digest = xxhash.xxh3_128()
        file = _open_direct(path)
        try:
            for start in range(0, len(data), _CHUNK):
                chunk = data[start : start + _CHUNK]
                digest.update(chunk[: self.size - start])
                _write_at(file, chunk, start)
            os.ftruncate(file, self.size)
        finally:
            os.close(file)
        return digest.hexdigest()


def file_checksum(path: Path) -> str:
    """XXH3, 128 bits in hexadecimal, of a file. OSError where it cannot be read."""
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _memory(size: int, pinned: bool) -> torch.Tensor:
    """`size` bytes that begin at a page, 0 where they were never written."""
    if pinned:
        return torch.zeros(size, dtype=torch.uint8, pin_memory=True)
    pages = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


def _open_direct(path: Path) -> int:
    """A descriptor for writing that passes the page cache by, where the file system allows it (tmpfs may not)."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.open(path, flags, 0o666)


def _write_at(file: int, data: memoryview, offset: int) -> None:
    """Write all of `data`. After a short write the rest, which may begin inside a block, goes by the page cache."""
    while data:
        flags = fcntl.fcntl(file, fcntl.F_GETFL)
        try:
            written = os.pwrite(file, data, offset)
        except OSError as error:
            if error.errno != errno.EINVAL or not flags & DIRECT:
                raise
            written = 0
        data, offset = data[written:], offset + written
        if data:
            fcntl.fcntl(file, fcntl.F_SETFL, flags & ~DIRECT)
