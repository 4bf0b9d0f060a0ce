"""T5's relative position bias: the table, and the bucket of a distance.

Source: Raffel et al. 2020 (arXiv:1910.10683).
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RelativeBias:
    """T5's bias: a learned number for each head and bucket of relative positions, key minus query.

    table: (buckets, H), floating point; the kernel computes its gradient.
    bidirectional: keys after the query have half of the buckets (encoder); else they share bucket 0 (decoder).
    max_distance: every distance from here on is in the last bucket.
    """

    table: torch.Tensor
    bidirectional: bool = True
    max_distance: int = 128


def bucket_starts(buckets: int, bidirectional: bool, max_distance: int) -> tuple[int, ...]:
    """The smallest distance of each bucket of one direction. bucket(distance) is the number of starts <= it, less one.

    Each bucket of the first half has one distance; the others grow as powers. With n buckets and e = n div 2,
    bucket e + k starts where log(distance/e) / log(max_distance/e) · (n - e) reaches k. In integers that is
    distance^(n-e) >= e^(n-e-k) · max_distance^k, which no rounding affects. Transformers' float32 logarithm agrees.
    """
    return _bucket_starts(buckets // 2 if bidirectional else buckets, max_distance)


bucket_starts._dynamo_marked_constant = True  # torch.compile traces through functools.cache, with a warning


@functools.cache
def _bucket_starts(n: int, max_distance: int) -> tuple[int, ...]:
    e = n // 2
    starts = list(range(e))
    distance = e
    for k in range(n - e):
        while distance ** (n - e) < e ** (n - e - k) * max_distance**k:
            distance += 1
        starts.append(distance)
    return tuple(starts)


def relative_buckets(relative: torch.Tensor, buckets: int, bidirectional: bool, max_distance: int) -> torch.Tensor:
    """The bucket of each relative position (key minus query), int64."""
    distance = relative.abs() if bidirectional else (-relative).clamp(min=0)
    buckets = operator.index(buckets)  # not symbolic: a graph has as many comparisons as there are buckets
    starts = bucket_starts(buckets, bidirectional, max_distance)
    bucket = sum(((distance >= start).long() for start in starts[1:]), torch.zeros_like(distance))
    return bucket + (relative > 0) * (buckets // 2) if bidirectional else bucket
