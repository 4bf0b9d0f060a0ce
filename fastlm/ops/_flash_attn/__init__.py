"""The backend "flash_attn": the flash-attn library's attention, a plain torch function, without a raw op.

"auto" never chooses it. The library is imported at the first call.
"""
