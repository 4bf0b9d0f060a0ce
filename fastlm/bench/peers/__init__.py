"""What a user would run instead of an op: plain torch (`eager.py`), and one file per library.

PEERS is {op: {name: Peer}}, collected from each file's own PEERS; eager's come first, then the files by name. STEPS is
{name: Contender} likewise, for whole training steps, and OPTIMIZERS {optimizer: {name: OptimizerPeer}}. A new library
or a new op's peers need no entry in a list.
"""

import importlib
import pkgutil

from fastlm.bench.job import Contender
from fastlm.bench.peers._peer import OptimizerPeer, Peer, Unsupported


def _modules() -> list:
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    names.sort(key=lambda name: name != "eager")
    return [importlib.import_module(f"{__name__}.{name}") for name in names]


def _discover() -> tuple[dict[str, dict[str, Peer]], dict[str, Contender], dict[str, dict[str, OptimizerPeer]]]:
    peers: dict[str, dict[str, Peer]] = {}
    steps: dict[str, Contender] = {}
    optimizers: dict[str, dict[str, OptimizerPeer]] = {}
    for module in _modules():
        for op, named in module.PEERS.items():
            peers.setdefault(op, {}).update(named)
        steps.update(getattr(module, "STEPS", {}))
        for name, named in getattr(module, "OPTIMIZERS", {}).items():
            optimizers.setdefault(name, {}).update(named)
    return peers, steps, optimizers


PEERS, STEPS, OPTIMIZERS = _discover()

__all__ = ["OPTIMIZERS", "PEERS", "STEPS", "OptimizerPeer", "Peer", "Unsupported"]
