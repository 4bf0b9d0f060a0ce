"""fastlm: Transformer language models, trained on fused kernels.

`fastlm.ops` has the kernels, `fastlm.nn` drop-in modules on them, and `fastlm.models` whole models.
`fastlm.patch(model)` makes a Transformers model use them.
Submodules load at first use; importing fastlm imports neither triton nor transformers.
"""

import importlib

__version__ = "0.2.0"
_FUNCTIONS = {"patch": "fastlm.hf", "unpatch": "fastlm.hf"}
__all__ = ["__version__", "data", "generate", "hf", "models", "nn", "ops", "patch", "train", "unpatch"]


def __getattr__(name):
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    if name in __all__:
        return importlib.import_module(f"fastlm.{name}")
    raise AttributeError(f"module 'fastlm' has no attribute {name!r}")
