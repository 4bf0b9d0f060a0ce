"""A twin of the driver's cuTensorMapEncodeTiled, for launches on the interpreter."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch

_MAGIC = 0x70616D2D787470  # core/ops_bulk.cpp: TensorMap


@dataclass(frozen=True)
class TensorMap:
    """What a kernel's `const __grid_constant__ CUtensorMap` parameter takes in `run`. See `tensor_map`."""

    tensor: torch.Tensor
    box: tuple[int, ...]
    swizzle: int

    def encode(self, address: int) -> bytes:
        """128 bytes that the interpreter reads, for the tensor at this device address. The driver's own are secret."""
        size, rank = self.tensor.element_size(), self.tensor.dim()
        sizes, strides = self.tensor.shape[::-1], [n * size for n in self.tensor.stride()[::-1]]

        def five(values, filling):
            return (*values, *[filling] * (5 - rank))

        head = struct.pack("<QQII", _MAGIC, address, rank, size)
        return (
            head + struct.pack("<5Q5Q5II", *five(sizes, 1), *five(strides, 0), *five(self.box, 1), self.swizzle)
        ).ljust(128, b"\0")


def tensor_map(tensor: torch.Tensor, box: tuple[int, ...], swizzle: int = 0) -> TensorMap:
    """A map of a tensor of one to five dimensions for cp.async.bulk.tensor, with the limits of the driver's encoder.

    box: elements of a tile along each dimension, the contiguous one first, as the coordinates of a copy are. swizzle:
    bytes of a row of the pattern, 32, 64 or 128, or 0. Elements outside of the tensor are read as 0 and not written.
    ValueError for what the driver refuses (CUDA Driver API, "Tensor Map Object Management").
    """
    rank, size = tensor.dim(), tensor.element_size()
    if not 1 <= rank <= 5:
        raise ValueError(f"tensor: expected 1 to 5 dimensions, got {rank}")
    if tensor.stride(-1) != 1 or tensor.data_ptr() % 16:
        raise ValueError("tensor: expected a contiguous last dimension, and an address that is a multiple of 16")
    for k, stride in enumerate(tensor.stride()[:-1]):
        if stride * size % 16 or not 0 < stride * size < 2**40:
            raise ValueError(
                f"tensor: expected strides of a multiple of 16 bytes, got {stride * size} in dimension {k}"
            )
    if len(box) != rank or not all(1 <= n <= 256 for n in box):
        raise ValueError(f"box: expected {rank} sizes from 1 to 256, got {box}")
    if box[0] * size % 16:
        raise ValueError(f"box: expected rows of a multiple of 16 bytes, got {box[0] * size}")
    if swizzle not in (0, 32, 64, 128):
        raise ValueError(f"swizzle: expected 0, 32, 64 or 128 bytes, got {swizzle}")
    if swizzle and box[0] * size > swizzle:
        raise ValueError(f"box: expected rows of at most the {swizzle} bytes of the swizzle, got {box[0] * size}")
    return TensorMap(tensor, tuple(box), swizzle)
