"""Model FLOPs utilisation: the matrix products that a step needs, over what the chip could have done in its time.

    MFU = 3 · (forward FLOPs of the matrix products on real tokens) / (seconds · peak)

3 for forward and backward. The head counts for the predicted tokens, attention for the pairs of tokens inside a piece.
Padding, recomputation and everything that is no matrix product count nothing. Source: Chowdhery et al. 2022
(arXiv:2204.02311), appendix B. The peak is the vendor's dense figure for the dtype; an unknown chip has no MFU.
"""

from __future__ import annotations

import torch

from fastlm.train.recipe import Recipe

# (name as the driver gives it, FLOP/s of dense bfloat16 with float32 accumulation, FLOP/s of float32); first match
# counts. Source: NVIDIA's data sheets.
_PEAKS = (
    ("B200", 2250e12, 75e12),
    ("H200", 989e12, 67e12),
    ("H100 PCIe", 756e12, 51e12),
    ("H100 NVL", 835e12, 60e12),
    ("H100", 989e12, 67e12),
    ("A100", 312e12, 19.5e12),
    ("A10G", 70e12, 35e12),
    ("L40S", 362e12, 91.6e12),
    ("L4", 121e12, 30.3e12),
    ("RTX 4090", 165.2e12, 82.6e12),
    ("RTX 3090", 71e12, 35.6e12),
)


def chip(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of the chip in `dtype`, or None where it is not known: a CPU, or float32 with torch's tf32 switched on."""
    if device.type != "cuda" or (dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32):
        return None
    name = chip(device)
    for known, bfloat16, float32 in _PEAKS:
        if known in name:
            return bfloat16 if dtype == torch.bfloat16 else float32
    return None


def recipe_flops(recipe: Recipe, vocab: int, tokens: int, pairs: int, predicted: int) -> float:
    """FLOPs of a step of `recipe`."""
    model = recipe.model
    return encoder_flops(
        tokens, pairs, predicted,
        layers=model.num_hidden_layers, hidden=model.hidden_size, intermediate=model.intermediate_size, vocab=vocab,
    )  # fmt: skip


def encoder_flops(
    tokens: int, pairs: int, predicted: int, *, layers: int, hidden: int, intermediate: int, vocab: int
) -> float:
    """FLOPs of forward and backward of BERT with its head on `predicted` tokens; `pairs` is Σ length² over pieces."""
    block = 2 * tokens * (4 * hidden * hidden + 2 * hidden * intermediate) + 4 * pairs * hidden
    head = 2 * predicted * (hidden * hidden + hidden * vocab)
    return 3.0 * (layers * block + head)
