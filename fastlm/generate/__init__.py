"""Text from GPT-2 and T5: `generate`, `stream` for its tokens as they come, and `fill_spans` for T5's sentinels."""

from fastlm.generate.api import Generated, generate, stream
from fastlm.generate.loop import Token
from fastlm.generate.settings import Settings
from fastlm.generate.spans import fill_spans

__all__ = ["Generated", "Settings", "Token", "fill_spans", "generate", "stream"]
