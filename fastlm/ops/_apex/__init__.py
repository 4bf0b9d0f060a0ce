"""The backend "apex": NVIDIA apex's norms, plain torch functions, without a raw op.

"auto" never chooses it. apex is imported at the first call.
"""
