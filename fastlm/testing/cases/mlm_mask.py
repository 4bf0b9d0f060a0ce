"""mlm_mask."""

import torch

from fastlm import ops
from fastlm.testing.cases._case import OpCase, Variant


def _make_mlm_mask(generator, rows, cols, vocab=97, packed=0, epochs=0, words=0, special_mask=0):
    """Rows of ids between a special first and last one and padding; `packed` flattens them, one sample a row."""

    def flags(p):
        return torch.rand(rows, cols, generator=generator) < p

    ids = torch.randint(5, vocab, (rows, cols), generator=generator)
    ids[:, :1] = 1
    ids[:, cols - cols // 8 :] = 0
    inputs = {"input_ids": ids}
    if words:
        inputs["word_starts"] = flags(0.6)
    if special_mask:
        inputs["special_tokens_mask"] = flags(0.2)
    if epochs:
        inputs["epoch"] = torch.randint(2**32, (rows, cols) if epochs == 2 else (rows,), generator=generator)
    if packed:
        inputs["sample_ids"] = torch.randint(2**62, (rows, 1), generator=generator).expand(rows, cols)
        inputs["positions"] = torch.arange(cols).expand(rows, cols)
        inputs = {name: value.flatten() for name, value in inputs.items()}
    return inputs


_OPTIONS = {"mask_token_id": 4, "vocab_size": 97, "special_ids": (0, 1, 2, 3), "seed": -5}
_BERT = {**_OPTIONS, "vocab_size": 30522}

_IDS = torch.ones(2, 3, dtype=torch.int64)

MLM_MASK = OpCase(
    op="mlm_mask",
    function=ops.mlm_mask,
    reference=ops.mlm_mask_reference,
    make=_make_mlm_mask,
    gradients=(),
    tests=(
        Variant({"rows": 5, "cols": 33}, _OPTIONS),
        Variant({"rows": 0, "cols": 8}, _OPTIONS),
        Variant({"rows": 3, "cols": 0, "words": 1}, _OPTIONS),
        Variant({"rows": 0, "cols": 0, "packed": 1}, _OPTIONS),
        Variant({"rows": 3, "cols": 1}, {**_OPTIONS, "mlm_probability": 1.0, "random_replace_prob": 0.2}),
        Variant({"rows": 40, "cols": 301, "epochs": 1}, {**_OPTIONS, "mlm_probability": 0.5}),
        Variant({"rows": 40, "cols": 301, "packed": 1, "epochs": 2}, {**_OPTIONS, "capacity": 100}),
        Variant({"rows": 40, "cols": 301, "words": 1}, {**_OPTIONS, "mask_replace_prob": 0.1}),
        Variant({"rows": 20, "cols": 450, "packed": 1, "words": 1, "special_mask": 1}, _OPTIONS),
    ),
    benchmarks=(
        Variant({"rows": 256, "cols": 512, "vocab": 30522}, _BERT),
        Variant({"rows": 256, "cols": 512, "vocab": 30522, "packed": 1, "epochs": 2}, _BERT),
        Variant({"rows": 256, "cols": 512, "vocab": 30522, "words": 1}, _BERT),
    ),
    benchmarks_cuda=(
        Variant({"rows": 2048, "cols": 512, "vocab": 30522}, _BERT),
        Variant({"rows": 2048, "cols": 512, "vocab": 30522, "packed": 1, "epochs": 2}, _BERT),
        Variant({"rows": 2048, "cols": 512, "vocab": 30522, "words": 1}, _BERT),
    ),
    production=(
        Variant({"rows": 16, "cols": 512, "vocab": 30522}, _BERT),
        Variant({"rows": 16, "cols": 512, "vocab": 30522, "packed": 1, "epochs": 2}, _BERT),
        Variant({"rows": 16, "cols": 512, "vocab": 30522, "packed": 1, "epochs": 2, "words": 1}, _BERT),
    ),
    # input_ids, labels and what is given per token; index and targets are 15% of a token each
    bytes=lambda shape, options, itemsize, backward: (
        0
        if backward
        else shape["rows"]
        * shape["cols"]
        * (8 * (3 + 2 * shape.get("packed", 0) + (shape.get("epochs", 0) == 2)) + shape.get("words", 0))
    ),
    dtypes=(torch.float32,),
    accepted={"input_ids": _IDS, "mask_token_id": 3, "vocab_size": 9, "special_ids": (0,), "seed": 0},
    refused=(
        ({"input_ids": _IDS.float()}, "input_ids: expected torch.int64 or torch.int32"),
        ({"mask_token_id": 9}, "mask_token_id: "),
        ({"special_ids": range(9)}, "special_ids: all 9 ids"),
        ({"word_starts": _IDS}, "word_starts: expected torch.bool"),
        ({"mlm_probability": 1.5}, "mlm_probability: expected a probability in [0, 1], got 1.5"),
        ({"capacity": -1}, "capacity: "),
    ),
)
