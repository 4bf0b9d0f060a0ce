"""The ops. Each page, fastlm/ops/<page>.py: the maths, a reference, the arguments, autograd, the public function.

The pages are found by their files; what a page's __all__ names stands here. DESIGN: a new op touches no list.
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

from fastlm.ops._labels import IGNORE_INDEX

__all__ = ["IGNORE_INDEX"]

for _page in pkgutil.iter_modules(__path__):
    if not _page.name.startswith("_"):
        _module = importlib.import_module(f"{__name__}.{_page.name}")
        # An op takes the place of the submodule of its name: `ops.gelu` is the function.
        globals().update({_name: getattr(_module, _name) for _name in _module.__all__})
        __all__ += _module.__all__
__all__.sort()

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...
