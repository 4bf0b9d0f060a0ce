"""Model FLOPs utilisation: the matrix products that a step needs, over what the chip could have done in its time.

    MFU = 3 · (forward FLOPs of the matrix products on real tokens) / (seconds · peak)

3 for forward and backward. The head counts for the predicted tokens, attention for the pairs of tokens inside a piece,
of which a causal one sees half.
Padding, recomputation and everything that is no matrix product count nothing. Source: Chowdhery et al. 2022
(arXiv:2204.02311), appendix B. The peak is the vendor's dense figure for the dtype; an unknown chip has no MFU.
"""

from __future__ import annotations

import re

import torch

from fastlm.train.recipe import Recipe

# product -> FLOP/s of (dense bfloat16 with float32 accumulation, float32 outside the tensor cores); None where there is
# no such unit. Source: NVIDIA's data sheets and architecture white papers.
_PEAKS: dict[str, tuple[float | None, float]] = {
    "b200": (2250e12, 75e12),
    "h200": (989e12, 67e12),
    "h200 nvl": (835e12, 60e12),
    "h100 hbm3": (989e12, 67e12),  # as the driver calls the SXM module
    "h100 pcie": (756e12, 51e12),
    "h100 nvl": (835e12, 60e12),
    "a100 sxm4": (312e12, 19.5e12),
    "a100 pcie": (312e12, 19.5e12),
    "a10g": (70e12, 35e12),
    "l40s": (362e12, 91.6e12),
    "l40": (181e12, 90.5e12),
    "l4": (121e12, 30.3e12),
    "v100 sxm2": (None, 15.7e12),
    "v100 pcie": (None, 14e12),
    "t4": (None, 8.1e12),
    "rtx 6000 ada generation": (364e12, 91.1e12),
    "geforce rtx 4090": (165.2e12, 82.6e12),
    "geforce rtx 3090": (71e12, 35.6e12),
}


def chip(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def product(name: str) -> str:
    """A driver's name without vendor, brand and memory size: "NVIDIA A100-SXM4-80GB" is "a100 sxm4"."""
    words = re.split(r"[\s-]+", name.strip().lower())
    return " ".join(word for word in words if word not in ("nvidia", "tesla") and not re.fullmatch(r"\d+gb", word))


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of the chip in `dtype`, or None where it is not known: a CPU, or float32 with torch's tf32 switched on."""
    if device.type != "cuda" or (dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"):
        return None
    bfloat16, float32 = _PEAKS.get(product(chip(device)), (None, None))
    return bfloat16 if dtype == torch.bfloat16 else float32


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


def gpt2_flops(tokens: int, pairs: int, predicted: int, *, layers: int, hidden: int, inner: int, vocab: int) -> float:
    """FLOPs of forward and backward of GPT-2; `pairs` is Σ length² over pieces."""
    block = 2 * tokens * (4 * hidden * hidden + 2 * hidden * inner) + 2 * pairs * hidden
    return 3.0 * (layers * block + 2 * predicted * hidden * vocab)


def t5_flops(
    tokens: int, targets: int, pairs: int, target_pairs: int, cross_pairs: int, *, layers: int, decoder_layers: int,
    hidden: int, heads: int, inner: int, vocab: int, gated: bool,
) -> float:  # fmt: skip
    """FLOPs of forward and backward of T5, `targets` predicted from `tokens`.

    pairs, target_pairs: Σ length² over either side's pieces; cross_pairs: Σ length · target length. heads: the width of
    all heads together.
    """
    mlp = (3 if gated else 2) * hidden * inner
    encoder = 2 * tokens * (4 * hidden * heads + mlp) + 4 * pairs * heads
    decoder = 2 * targets * (6 * hidden * heads + mlp) + 2 * target_pairs * heads
    cross = 2 * tokens * 2 * hidden * heads + 4 * cross_pairs * heads
    return 3.0 * (layers * encoder + decoder_layers * (decoder + cross) + 2 * targets * hidden * vocab)
