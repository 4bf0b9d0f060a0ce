"""Keeps torch's compile caches apart by version of the ops.

torch.compile stores compiled graphs on disk and finds a graph with its backward by the forward graph alone. It does not
see what the Python of an op decides when a graph is traced: the arguments of its backward, the shapes of its outputs
(fakes). After an upgrade of fastlm it would run a graph that calls the ops as they were before.
`torch.compiler.config.cache_key_tag` is a part of the keys of all these caches. A hash of the ops' sources is added to
it when fastlm.ops is imported.
"""

import hashlib
from pathlib import Path

import torch.compiler.config

_HERE = Path(__file__).parent


def version(directory: Path = _HERE) -> str:
    """A hash of the Python sources of the ops: names and contents."""
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*.py")):
        digest.update(path.relative_to(directory).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def tag() -> None:
    """Adds "fastlm-<version>" to the tag of torch's compile caches, behind what the user has set there."""
    config, own = torch.compiler.config, f"fastlm-{version()}"
    if own not in config.cache_key_tag:
        config.cache_key_tag = " ".join(filter(None, (config.cache_key_tag, own)))
