"""Changes the class of a module in place. The object and its parameters, buffers, hooks and name stay.

A replacement is a mixin below, put in front of the module's own class: `swap(module, Mixin)` sets module.__class__ to
type(name, (Mixin, type(module))), of the same name and module as before, since Transformers looks models up by both.
Such a class cannot be imported, so a pickle holds (Mixin, own class) and makes it again; deepcopy goes the same way.
"""

from __future__ import annotations

import functools
import inspect

import torch

from fastlm.hf.attention import register


class Patched:
    """The base of all mixins: how instances are copied and pickled."""

    parts: tuple[type, type]  # (mixin, the class it was put in front of)

    @classmethod
    def members(cls, base: type) -> dict:
        """Additional members of the class that is made of this mixin and `base`."""
        return {}

    def __reduce_ex__(self, protocol):
        _make, _arguments, *rest = super().__reduce_ex__(protocol)
        return _make_again, self.parts, *rest

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (super().extra_repr(), "fastlm")))


class SameSignature(Patched):
    """A mixin whose forward takes keywords alone. The class gets one with its own signature, which others inspect."""

    @classmethod
    def members(cls, base):
        parameters = list(inspect.signature(base.forward).parameters.values())[1:]
        names = [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD]

        @functools.wraps(base.forward)
        def forward(self, *args, **kwargs):
            if len(args) > len(names):
                raise TypeError(f"{base.__name__}.forward takes {len(names)} arguments, got {len(args)}")
            return cls.forward(self, **dict(zip(names, args)), **kwargs)

        return {"forward": forward}


def _make_again(mixin: type, base: type):
    register()  # a model may be unpickled where nothing has been patched
    cls = _class(mixin, base)
    return cls.__new__(cls)


@functools.cache
def _class(mixin: type, base: type) -> type:
    names = {"parts": (mixin, base), "__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (mixin, base), {**names, "__doc__": base.__doc__, **mixin.members(base)})


def swap(module: torch.nn.Module, mixin: type) -> None:
    module.__class__ = _class(mixin, type(module))


def class_before(module: torch.nn.Module) -> type:
    """The class before `swap`. ValueError if the class has been changed again since."""
    cls = type(module)
    if "parts" not in vars(cls):
        raise ValueError(
            f"model: expected its modules as fastlm.patch left them, got a {cls.__name__} whose class was changed "
            "again (fully_shard does that); unpatch before it"
        )
    return cls.parts[1]


def bare(module: torch.nn.Module | None, kind: type) -> bool:
    """Whether the module may be bypassed: it is exactly a `kind`, not a subclass or a wrapper, and has no hooks."""
    return type(module) is kind and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__  # accelerate's way to move and cast
    )
