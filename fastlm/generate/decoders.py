"""Which decoder generates with a model."""

from __future__ import annotations

from fastlm.generate import cpu_decoder
from fastlm.generate.decoder import Decoder, PlainDecoder
from fastlm.models import GPT2, T5


def make_decoder(
    model: GPT2 | T5, prompts: list[int], new_tokens: int, copies: int = 1, weights: str | None = None
) -> Decoder:
    """A decoder with room for the prompts, of these lengths, and as many new tokens.

    copies: rows that each prompt may become, as of beams.
    weights: "float32", "bfloat16" or "int8": how the steps read those of a float32 model on a CPU
        (fastlm/generate/cpu_decoder.py). None: as they are. ValueError where the model cannot be read so.
    """
    # The last new token is never read. T5's prompt is the encoder's; its decoder begins with one token.
    length = (1 if isinstance(model, T5) else max(prompts)) + max(0, new_tokens - 1)
    if model.config.length is not None:
        length = min(length, model.config.longest[1])
    cache = model.new_cache(copies * len(prompts), length)
    if weights is None and cpu_decoder.missing(model):
        return PlainDecoder(model, cache)
    return cpu_decoder.CpuDecoder(model, cache, weights or "float32")
