"""Span corruption (Raffel et al. 2020, arXiv:1910.10683, section 3.1.4): a pure function of seed, epoch and sample.

A piece of n tokens loses `noise` of them in `spans` spans, both functions of n (`layouts.Corruption.counts`):

    piece      t0 t1 t2 t3 t4 t5 t6 t7 t8
    encoder    t0 t1 <extra_id_0> t4 t5 t6 <extra_id_1> </s>
    decoder    <extra_id_0> t2 t3 <extra_id_1> t7 t8 </s>

The kept and the lost tokens are each cut into `spans` parts, at least one token long, every cut equally likely, and
the parts alternate, a kept one first. Where the cuts are: word r0 (of the lost tokens) and r1 (of the kept ones) of
Philox4x32-10(counter = (i, epoch, sample low 32, sample high 32), key(seed, SPAN_DOMAIN)) is the rank of a cut after
token i of the n - 1 that could be; the lowest ranks are the cuts, equal ones in the order of i.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch

from fastlm.data.batches import Batch
from fastlm.data.layouts import NO_NEXT, Corruption
from fastlm.data.packing import PADDING_SAMPLE, ragged
from fastlm.data.tokenizer import Tokenizer
from fastlm.philox import SPAN_DOMAIN, key, philox4x32


@dataclass(frozen=True)
class Pair:
    """Both sides of a batch of corrupted pieces; piece i of the encoder belongs to piece i of the decoder.

    input_ids (T,), labels (U,)        int64; a label of -100 is padding
    cu_seqlens, decoder_cu_seqlens     (sequences + 1,) int32, where the pieces start, then the total
    lengths, target_lengths            (pieces,) int64, of the pieces, without padding
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    cu_seqlens: torch.Tensor
    decoder_cu_seqlens: torch.Tensor
    lengths: np.ndarray
    target_lengths: np.ndarray


@dataclass(frozen=True)
class Chosen:
    """The tokens of a batch's pieces, padding aside, and which of them are taken out.

    ids, lost               (T,) int64, bool
    lengths, noise, spans   (pieces,) int64: tokens of a piece, how many it loses, and in how many spans
    """

    ids: np.ndarray
    lost: np.ndarray
    lengths: np.ndarray
    noise: np.ndarray
    spans: np.ndarray


def corrupt(batch: Batch, corruption: Corruption, tokenizer: Tokenizer, seed: int) -> Pair:
    """The batch of span rows `batch` after corruption: the padding in its rows is gone."""
    return _sides(choose(batch, corruption, seed), tokenizer)


def choose(batch: Batch, corruption: Corruption, seed: int) -> Chosen:
    """What `corrupt` takes out of the batch of span rows `batch`."""
    starts = batch.cu_seqlens[: batch.pieces + 1].numpy().astype(np.int64)
    first, lengths = starts[:-1], np.diff(starts)
    sample = batch.sample_ids.numpy()[first]
    epoch = batch.epochs.numpy()[first]
    real = sample != PADDING_SAMPLE
    first, lengths, sample, epoch = first[real], lengths[real], sample[real], epoch[real]
    ids = batch.input_ids.numpy()[ragged(first, lengths)]
    noise, spans = corruption.counts(lengths)
    lost = _lost(lengths, noise, spans, sample, epoch, seed)
    return Chosen(ids, lost, lengths, noise, spans)


def _lost(lengths, noise, spans, sample, epoch, seed: int) -> np.ndarray:
    """(T,) bool: whether each token is taken out."""
    i = ragged(np.zeros_like(lengths), lengths)
    low, high = sample & 0xFFFFFFFF, sample >> 32
    counter = i, *(np.repeat(part, lengths) for part in (epoch, low, high))
    words = philox4x32(*counter, *key(seed, SPAN_DOMAIN))
    kept = lengths - noise
    lost_parts, kept_parts = (
        _partition(total, spans, word, lengths) for total, word in ((noise, words[0]), (kept, words[1]))
    )
    # kept, lost, kept, lost ... of each piece; a piece of one token has no span and is one kept part
    parts = np.stack([kept_parts, lost_parts], 1).reshape(-1)
    return np.repeat(np.tile([False, True], len(kept_parts)), parts)


def _partition(total, parts, word, lengths) -> np.ndarray:
    """Lengths of the parts of each piece, (sum of max(parts, 1),): `total` tokens in `parts` parts, or in one.

    word: (T,) a random word for each token of the pieces, of which the first total - 1 are used.
    """
    parts, places = np.maximum(parts, 1), np.maximum(total - 1, 0)
    piece = np.repeat(np.arange(len(total)), places)
    rank = word[ragged(np.cumsum(lengths) - lengths, places)]
    order = np.lexsort((rank, piece))  # stable: equal words in the order of i
    cut = np.zeros(len(piece), bool)
    cut[order] = ragged(np.zeros_like(places), places) < np.repeat(parts - 1, places)
    # Part starts: token 0 of each piece, and the token after each cut.
    begins = np.cumsum(total) - total
    at = np.concatenate([begins, (np.repeat(begins, places) + ragged(np.ones_like(places), places))[cut]])
    owner = np.concatenate([np.arange(len(total)), piece[cut]])
    at = at[np.lexsort((at, owner))]  # by piece; the start of an empty piece is that of the next one
    return np.diff(at, append=total.sum())


def _sides(chosen: Chosen, tokenizer: Tokenizer) -> Pair:
    ids, lost, lengths, noise, spans = (getattr(chosen, of.name) for of in fields(chosen))
    piece = np.repeat(np.arange(len(lengths)), lengths)
    before = np.concatenate([[False], lost[:-1]])
    before[np.cumsum(lengths) - lengths] = False
    opens = lost & ~before  # the first token of each span
    span = np.cumsum(opens) - 1 - np.repeat(np.cumsum(spans) - spans, lengths)  # its number in the piece
    sentinels = np.array(tokenizer.sentinel_ids)[np.maximum(span, 0)]

    shown = ~lost | opens
    lengths_in, lengths_out = lengths - noise + spans + 1, noise + spans + 1
    encoder = np.full(lengths_in.sum(), tokenizer.eos_id, np.int64)
    encoder[np.arange(shown.sum()) + piece[shown]] = np.where(opens, sentinels, ids)[shown]
    decoder = np.full(lengths_out.sum(), tokenizer.eos_id, np.int64)
    place = np.arange(lost.sum()) + np.cumsum(opens)[lost] + piece[lost]
    decoder[place] = ids[lost]
    decoder[place[opens[lost]] - 1] = sentinels[opens]
    return Pair(
        torch.from_numpy(encoder),
        torch.from_numpy(decoder),
        _starts(lengths_in),
        _starts(lengths_out),
        lengths_in,
        lengths_out,
    )


def _starts(lengths: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))


def pad(pair: Pair, tokens: int, target_tokens: int, sequences: int, row: tuple[int, int], pad_id: int) -> Pair:
    """`pair` with shapes that do not depend on the batch: T = tokens, U = target_tokens, so many sequences.

    row   what no sequence is longer than, on either side; padding is divided accordingly
    """

    def side(ids, starts, total, longest, fill):
        out = torch.full((total,), fill, dtype=ids.dtype)
        out[: len(ids)] = ids
        padding = torch.arange(len(ids), total, longest, dtype=torch.int32)[1:]
        starts = torch.cat([starts, padding])
        assert len(starts) <= sequences + 1, "every row of padding has a place"
        return out, torch.cat([starts, torch.full((sequences + 1 - len(starts),), total, dtype=torch.int32)])

    input_ids, cu_seqlens = side(pair.input_ids, pair.cu_seqlens, tokens, row[0], pad_id)
    labels, decoder_cu_seqlens = side(pair.labels, pair.decoder_cu_seqlens, target_tokens, row[1], NO_NEXT)
    return Pair(input_ids, labels, cu_seqlens, decoder_cu_seqlens, pair.lengths, pair.target_lengths)
