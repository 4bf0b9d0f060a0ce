"""The ops. A page, fastlm/ops/<page>.py, has an op's maths, reference, arguments, autograd and public function.

This module imports every page that it finds and exports the names in its __all__. A new op needs no entry here.
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

from fastlm.ops import _compile_cache
from fastlm.ops._labels import IGNORE_INDEX

__all__ = ["IGNORE_INDEX"]

for _page in pkgutil.iter_modules(__path__):
    if not _page.name.startswith("_"):
        _module = importlib.import_module(f"{__name__}.{_page.name}")
        # An op replaces the submodule of the same name: `ops.gelu` is the function.
        globals().update({_name: getattr(_module, _name) for _name in _module.__all__})
        __all__ += _module.__all__
__all__.sort()
_compile_cache.tag()

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...
