"""The random bits of dropout, in torch. Every kernel gives the same bits. The generator is in fastlm/philox.py.

rng is int64[2], (seed, step), on the device of the op; it is only read. `site` is the number of the dropout call site.
The key of one call is words r0, r1 of Philox(counter = (step low, step high, site, 0), key(seed, DROPOUT_DOMAIN)).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastlm import philox
from fastlm.ops._shapes import contiguous

_LOW32 = 0xFFFFFFFF


def draw_rng(rng: torch.Tensor | None, dropout_p: float, device: torch.device) -> torch.Tensor | None:
    """rng, contiguous. Without rng: two int64 from torch's generator of the device, or None if there is no dropout."""
    if rng is not None:
        return rng.contiguous()
    if dropout_p == 0.0:
        return None
    return torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=device)


def call_key(rng: torch.Tensor, site: int) -> tuple[torch.Tensor, torch.Tensor]:
    seed, step = rng[0], rng[1]
    k0, k1 = seed & _LOW32, ((seed >> 32) & _LOW32) ^ philox.DROPOUT_DOMAIN
    r0, r1, _, _ = philox.philox4x32(step & _LOW32, (step >> 32) & _LOW32, site, 0, k0, k1)
    return r0, r1


def keep_rows(rows: int, cols: int, p: float, rng: torch.Tensor, site: int) -> torch.Tensor:
    """Which elements of a (rows, cols) matrix stay, bool.

    counter = (column div 4, row low, row high, 0), word column mod 4; dropped where the word < floor(p·2^32).
    """
    k0, k1 = call_key(rng, site)
    quad = torch.arange((cols + 3) // 4, device=rng.device)[None, :]
    row = torch.arange(rows, device=rng.device)[:, None]
    words = philox.philox4x32(quad, row & _LOW32, row >> 32, 0, k0, k1)
    return torch.stack(words, -1).reshape(rows, 4 * quad.shape[1])[:, :cols] >= philox.threshold(p)


def row_scale(p: float) -> float:
    """The factor of a kept element in a row op: 1/(1-p); 0 for p = 1, where no element is kept."""
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0


class Dropout(NamedTuple):
    """One dropout call, as an argument of the kernels. Bits below `threshold` drop; the rest is times `scale`."""

    threshold: int
    scale: float
    rng: torch.Tensor | None
    site: int


NO_DROPOUT = Dropout(0, 1.0, None, 0)


def row_dropout(p: float, rng: torch.Tensor | None, site: int) -> Dropout:
    """Dropout of a row op: a 32-bit word per element, compared with floor(p·2^32)."""
    if p == 0.0:
        return NO_DROPOUT
    return Dropout(philox.threshold(p), row_scale(p), contiguous(rng), site)


def dropout_rows(x: torch.Tensor, p: float, rng: torch.Tensor | None, site: int) -> torch.Tensor:
    """Dropout of x (..., cols). The leading dimensions count as rows."""
    if p == 0.0:
        return x
    keep = keep_rows(x.numel() // max(1, x.shape[-1]), x.shape[-1], p, rng, site).view(x.shape)
    return torch.where(keep, x * row_scale(p), 0.0)


def attention_threshold(p: float) -> int:
    """t = round(256·p): attention drops if the byte is below t. ValueError for 0 < p < 1/256, too small for a byte."""
    if 0.0 < p < 1.0 / 256.0:
        raise ValueError(f"dropout_p: attention drops in steps of 1/256, so p is 0 or at least 1/256; got {p}")
    return int(256.0 * p + 0.5)


def attention_dropout(p: float, rng: torch.Tensor | None, site: int) -> Dropout:
    """Dropout of attention: a byte per element, compared with round(256·p)."""
    if p == 0.0:
        return NO_DROPOUT
    return Dropout(attention_threshold(p), attention_scale(p), contiguous(rng), site)


def keep_attention(
    batch: int, heads: int, queries: int, keys: int, p: float, rng: torch.Tensor, site: int
) -> torch.Tensor:
    """Which probabilities of (batch, heads, queries, keys) stay, bool.

    counter = (key div 16, query, sequence·heads + head, 0) gives sixteen bytes, little-endian, for sixteen keys;
    dropped where byte (key mod 16) < round(256 p).
    """
    k0, k1 = call_key(rng, site)
    device = rng.device
    # At least two blocks of keys: torch.compile makes a graph of its own for a dimension of one.
    block = torch.arange(keys // 16 + 2, device=device)
    query = torch.arange(queries, device=device)[:, None]
    head = torch.arange(batch * heads, device=device)[:, None, None]
    words = torch.stack(torch.broadcast_tensors(*philox.philox4x32(block, query, head, 0, k0, k1)), -1)
    shifts = torch.arange(0, 32, 8, device=device)
    data = ((words[..., None] >> shifts) & 0xFF).flatten(-3)[..., :keys]
    return (data >= attention_threshold(p)).view(batch, heads, queries, keys)


def attention_scale(p: float) -> float:
    """The factor of a kept probability: 256/(256-t)."""
    t = attention_threshold(p)
    return 256.0 / (256.0 - t) if t < 256 else 0.0
