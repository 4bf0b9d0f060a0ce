"""Text from a model: `continue_tokens` for GPT-2, `fill_spans` for T5."""

from fastlm.generate.sampling import Sampling, continue_tokens, sample
from fastlm.generate.spans import fill_spans

__all__ = ["Sampling", "continue_tokens", "fill_spans", "sample"]
