"""Keys and values of the tokens that a decoder has read, so that the next token computes its own alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastlm import ops
from fastlm.models import _size
from fastlm.models._inputs import Sequences
from fastlm.models._model import Model


class Cache:
    """The keys and values of `rows` sequences that grow together, allocated once.

    k, v        (layers, capacity, length, H, D); the first `rows` of the capacity are in use
    lengths     (capacity,) int32, on the device: tokens of each row that k and v hold
    longest     at least the largest of them, on the host: nothing lies beyond it
    cross       k and v (T, H, D) of the encoder's result for each layer of a decoder with one; else ()
    source      how their T tokens divide into sequences
    origin      (capacity,) int64: the sequence of `source` that each row reads; it never falls from row to row

    `append` of a model fills it. Rows that are not in use, and what lies beyond a row's length, are never read.
    ValueError where it does not fit into memory.
    """

    def __init__(self, layers: int, capacity: int, length: int, heads: int, d: int, *, device, dtype) -> None:
        element = torch.empty((), dtype=dtype).element_size()
        need, there = 2 * layers * capacity * length * heads * d * element, _size.available(torch.device(device))
        if there is not None and need > there:
            raise ValueError(
                f"cache: expected keys and values that fit into the memory of {device}, got {need / 1e9:,.1f} GB for "
                f"{capacity} rows of {length} tokens, of the {there / 1e9:,.1f} GB that are free; choose fewer rows, "
                "beams or new tokens"
            )
        self.k = torch.empty(layers, capacity, length, heads, d, device=device, dtype=dtype)
        self.v = torch.empty_like(self.k)
        self.lengths = torch.zeros(capacity, dtype=torch.int32, device=device)
        self.rows, self.longest = 0, 0
        self.cross: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()
        self.source: Sequences | None = None
        self.origin = torch.arange(capacity, device=device)
        self._row = self._position = None  # of the tokens that are appended now
        self._step = False

    @property
    def capacity(self) -> int:
        return self.k.shape[1]

    def place(self, ids: torch.Tensor, cu_seqlens: torch.Tensor | None, max_seqlen: int | None) -> Sequences:
        """Makes room for the tokens `ids`, which `attend` then stores; `positions` are theirs.

        ids: packed (T,) with cu_seqlens (rows + 1,) and max_seqlen, the first tokens of every row, where the cache is
            empty; else (rows,), one more token of each row.
        """
        self._step = cu_seqlens is None
        if self._step:
            self._row = torch.arange(self.rows, device=ids.device)
            self._position = self.lengths[: self.rows].long()
            self.lengths[: self.rows] += 1
            self.longest = min(self.longest + 1, self.k.shape[2])
            return Sequences(ids, None, None, None)
        self.rows, self.longest = cu_seqlens.shape[0] - 1, max_seqlen
        given = Sequences(ids, cu_seqlens, max_seqlen, None)
        self.lengths[: self.rows] = given.lengths()
        token = torch.arange(ids.shape[0], device=ids.device)
        self._row = torch.searchsorted(cu_seqlens[1:], token, right=True)
        self._position = given.positions().long()
        return given

    @property
    def positions(self) -> torch.Tensor:
        """int64, like the ids of `place`: how many tokens of its row come before each."""
        return self._position

    def last(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, ...) of x (T, ...), which is like the ids of `place`: each row's last token."""
        return x if self._step else x[self.lengths[: self.rows].cumsum(0) - 1]

    def attend(self, layer: int, q, k, v, *, key_mask=None, **options) -> torch.Tensor:
        """ops.attention, causal, of the tokens of `place`, (T, H, D) each, with those before them in their rows."""
        self.k[layer][self._row, self._position] = k
        self.v[layer][self._row, self._position] = v
        if not self._step:
            return ops.attention(q, k, v, **options)
        k, v, lengths = self.k[layer, : self.rows], self.v[layer, : self.rows], self.lengths[: self.rows]
        return ops.attention(q[:, None], k, v, cache_seqlens=lengths, **options)[:, 0]

    def across(self) -> dict:
        """Arguments of ops.attention with queries (rows, H, D), one token a row, and keys of `cross`."""
        sequences = self.source.cu_seqlens.shape[0] - 1
        starts = torch.arange(sequences + 1, device=self.origin.device)
        return {
            "cu_seqlens_q": torch.searchsorted(self.origin[: self.rows], starts, out_int32=True),
            "max_seqlen_q": self.rows,
            "cu_seqlens_k": self.source.cu_seqlens,
            "max_seqlen_k": self.source.max_seqlen,
        }

    def reorder(self, index: torch.Tensor) -> None:
        """Row i becomes what row index[i] was. index: int64, (rows from now on,), at most `capacity`.

        With an encoder, origin[index] must not fall.
        """
        rows, used = index.shape[0], self.longest
        to = torch.arange(rows, device=index.device)
        if index.device.type == "cpu":  # elsewhere, knowing which rows stay where they are would stall
            to = to[index != to]
        source = index[to]
        for x in (self.k, self.v):
            for layer in x:
                layer[to, :used] = layer[source, :used]
        self.lengths[:rows] = self.lengths[index]
        self.origin[:rows] = self.origin[index]
        self.rows = rows


@contextmanager
def whole_weights(model: torch.nn.Module) -> Iterator[None]:
    """Every process has the whole weights in the block, where torch's fully_shard divided the model; else no change.

    Generation calls layers by themselves, as often as each process needs. `unshard` alone would not do: each layer's
    forward would free its weights again. All processes must enter. Afterwards all weights are divided, and forwards
    gather and free them as fully_shard sets it up: the root keeps its own until the backward.
    """
    sharded = [module for module in model.modules() if hasattr(module, "set_reshard_after_forward")]
    try:
        for module in sharded:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        yield
    finally:
        for module in sharded:
            module.set_reshard_after_forward(module is not model, recurse=False)
            module.reshard()


class Generative(Model):
    """A model that writes text, token by token. A subclass defines `new_cache` and `append`."""

    def new_cache(self, capacity: int, length: int) -> Cache:
        """An empty cache for that many rows, of at most `length` tokens each."""
        raise NotImplementedError

    def append(self, ids, cache: Cache, cu_seqlens=None, max_seqlen: int | None = None) -> torch.Tensor:
        """Logits (rows, vocab_size) of the token after each row, once `ids` were appended to the rows of the cache.

        ids: (rows,), one token a row; or the first tokens of every row, packed (T,) with cu_seqlens (rows + 1,), int32.
        """
        raise NotImplementedError

    def generate(self, input_ids, **settings):
        """`fastlm.generate.generate(self, input_ids, **settings)`."""
        import fastlm  # the floors above the models load at first use

        return fastlm.generate.generate(self, input_ids, **settings)
