"""embedding."""

import torch

from fastlm import ops
from fastlm.testing.cases._case import OpCase, Variant, draw_rng


def _make_embedding(generator, rows, seq, cols, vocab, places=0, types=0, norm=1, packed=0, offset=0):
    """(rows, seq) ids; `packed` flattens them and gives positions; `types` > 1 gives token types too.

    offset: the mean of each row of h, whose standard deviation is about 1e-5 of it.
    """

    def randn(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    def table(*size):
        return randn(*size) * (offset * 1e-5 if offset else 1.0)

    def ids(n):
        out = torch.randint(n, (rows, seq), generator=generator)
        return out.flatten() if packed else out

    return {
        "word": table(vocab, cols) + offset,
        "input_ids": ids(vocab),
        "position": table(places, cols) if places else None,
        "token_type": table(types, cols) if types else None,
        "positions": ids(places) if packed and places else None,
        "token_type_ids": ids(types) if types > 1 else None,
        "weight": randn(cols) if norm else None,
        "bias": randn(cols) if norm else None,
        "rng": draw_rng(generator),
    }


def _embedding_bytes(shape, options, itemsize, backward):
    """Distinct rows of the tables at most; backward also writes the dense gradients of the tables."""
    tokens, cols = shape["rows"] * shape["seq"], shape["cols"]
    tables = shape["vocab"] + shape.get("places", 0) + shape.get("types", 0)
    read = min(tokens, shape["vocab"]) + shape.get("places", 0) + shape.get("types", 0)
    return itemsize * cols * (tokens + read + (tables if backward else 0))


_BERT = {"cols": 768, "vocab": 30522, "places": 512, "types": 2}

_IDS, _X, _ROW = torch.ones(2, 3, dtype=torch.int64), torch.ones(4, 8), torch.ones(8)

EMBEDDING = OpCase(
    op="embedding",
    function=ops.embedding,
    reference=ops.embedding_reference,
    make=_make_embedding,
    gradients=("word", "position", "token_type", "weight", "bias"),
    tests=(
        Variant({"rows": 3, "seq": 7, "cols": 33, "vocab": 19, "places": 9, "types": 2}),
        Variant({"rows": 0, "seq": 7, "cols": 8, "vocab": 19, "places": 9}),
        Variant({"rows": 2, "seq": 0, "cols": 8, "vocab": 19, "places": 9, "packed": 1}),
        Variant({"rows": 2, "seq": 5, "cols": 1, "vocab": 4, "norm": 0}, {"padding_idx": -4}),
        Variant({"rows": 4, "seq": 50, "cols": 18, "vocab": 6, "types": 1}, {"padding_idx": 3, "eps": 1e-5}),
        Variant(
            {"rows": 4, "seq": 50, "cols": 768, "vocab": 40, "places": 60, "types": 2, "packed": 1},
            {"dropout_p": 0.1, "site": 5},
            float32=("weight", "bias"),
        ),
        Variant({"rows": 4, "seq": 9, "cols": 16, "vocab": 19, "offset": 100}),
        Variant(
            {"rows": 2, "seq": 9, "cols": 48, "vocab": 19, "places": 9, "types": 2, "offset": -1000}, {"eps": 1e-5}
        ),
        Variant({"rows": 2, "seq": 30, "cols": 1029, "vocab": 40, "places": 30, "norm": 0}, {"dropout_p": 0.5}),
    ),
    benchmarks=(
        Variant({"rows": 8, "seq": 512, **_BERT}),
        Variant({"rows": 8, "seq": 512, **_BERT}, {"dropout_p": 0.1}),
        Variant({"rows": 8, "seq": 512, **_BERT, "packed": 1}, {"dropout_p": 0.1}),
        Variant({"rows": 4, "seq": 256, "cols": 512, "vocab": 50257, "places": 1024, "norm": 0}, {"dropout_p": 0.1}),
    ),
    benchmarks_cuda=(
        Variant({"rows": 64, "seq": 512, **_BERT, "packed": 1}, {"dropout_p": 0.1}),
        Variant({"rows": 32, "seq": 1024, "cols": 768, "vocab": 50257, "places": 1024, "norm": 0}, {"dropout_p": 0.1}),
        Variant({"rows": 64, "seq": 512, **_BERT, "cols": 1024, "packed": 1}, {"dropout_p": 0.1}),
        Variant({"rows": 64, "seq": 512, "cols": 768, "vocab": 32128, "norm": 0}),  # T5-base
        Variant({"rows": 8, "seq": 4096, "cols": 4096, "vocab": 128256, "norm": 0}),  # a decoder
    ),
    production=(
        Variant({"rows": 2, "seq": 512, **_BERT, "packed": 1}, {"dropout_p": 0.1}, ("weight", "bias")),
        Variant({"rows": 2, "seq": 512, "cols": 768, "vocab": 50257, "places": 1024, "norm": 0}, {"dropout_p": 0.1}),
        Variant({"rows": 2, "seq": 512, "cols": 512, "vocab": 32128, "norm": 0}),  # T5
    ),
    bytes=_embedding_bytes,
    gradcheck=(Variant({"rows": 2, "seq": 3, "cols": 4, "vocab": 5, "places": 4, "types": 2}, {"dropout_p": 0.3}),),
    accepted={"input_ids": _IDS, "word": _X, "weight": _ROW, "bias": _ROW},
    refused=(
        ({"input_ids": _IDS.float()}, "input_ids: expected torch.int64 or torch.int32"),
        ({"word": _ROW}, "word: expected shape"),
        ({"position": _X[:2]}, "position: expected at least 3 rows"),
        ({"token_type_ids": _IDS}, "token_type_ids: given without its table"),
        ({"padding_idx": 4}, "padding_idx: expected an id of the 4 rows of word, got 4"),
    ),
)
