"""Describes a NamedTuple of arguments to torch: derives the schema of an op, and converts to a flat tuple and back.

    class Args(NamedTuple):             Tensor x, Tensor? bias, float eps
        x: torch.Tensor
        bias: torch.Tensor | None
        eps: float

    class BackwardArgs(NamedTuple):     Tensor dy, Tensor x, Tensor? bias, float eps
        dy: torch.Tensor
        forward: Args

torch passes the arguments of an op one by one. The code of fastlm reads them as fields, by name. `Layout` converts
between the two. A field whose type is a NamedTuple is replaced by the fields of that type: the arguments of a backward
can contain those of the forward. Two fields of one op must not have the same name.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, NewType, get_type_hints

import torch

SymInt = NewType("SymInt", int)  # an integer that torch.compile may keep symbolic, such as a length

_SCHEMA = {
    torch.Tensor: "Tensor",
    torch.Tensor | None: "Tensor?",
    int: "int",
    SymInt: "SymInt",
    float: "float",
    bool: "bool",
    str: "str",
    list[int]: "int[]",
    list[bool]: "bool[]",
}


class Field(NamedTuple):
    """One value of a flattened NamedTuple. `path` is the names that lead to it: ("forward", "q")."""

    path: tuple[str, ...]
    kind: object

    @property
    def name(self) -> str:
        return self.path[-1]

    @property
    def is_tensor(self) -> bool:
        return self.kind in (torch.Tensor, torch.Tensor | None)


def _is_named_tuple(kind) -> bool:
    return isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")


def _fields(kind: type, path: tuple[str, ...] = ()) -> list[Field]:
    found = []
    for name, hint in get_type_hints(kind).items():
        where = (*path, name)
        found += _fields(hint, where) if _is_named_tuple(hint) else [Field(where, hint)]
    return found


class Layout:
    """Converts values of one NamedTuple type. The functions are generated once, since they run at every call.

    fields                     the flat fields, in order
    tensors                    the indices of the flat fields that are tensors or None
    flatten(value)             the NamedTuple as a flat tuple
    unflatten(flat)            the inverse
    split(value)               (tensors, others), two flat tuples, for torch's save_for_backward
    merge(tensors, others)     the inverse
    """

    def __init__(self, kind: type):
        self.kind, self.fields = kind, _fields(kind)
        self.tensors = tuple(i for i, field in enumerate(self.fields) if field.is_tensor)
        kinds: dict[str, object] = {
            "new": tuple.__new__
        }  # not the type's constructor, which is Python and takes twice as long
        inside = {field.path: i for i, field in enumerate(self.fields)}
        places = {i: f"t[{k}]" for k, i in enumerate(self.tensors)}
        places |= {i: f"o[{k}]" for k, i in enumerate(i for i in range(len(self.fields)) if i not in places)}
        value_of = ["v." + ".".join(field.path) for field in self.fields]

        def make(source):
            return eval(f"lambda {source}", kinds)

        # A NamedTuple that contains no other one is a flat tuple already.
        nested = any(len(field.path) > 1 for field in self.fields)
        self.flatten = make(f"v: ({_items(value_of)})") if nested else _itself
        self.unflatten = (
            make("f: " + _construct(kind, (), kinds, lambda path: f"f[{inside[path]}]"))
            if nested
            else functools.partial(tuple.__new__, kind)
        )
        tensors = [value_of[i] for i in self.tensors]
        others = [v for i, v in enumerate(value_of) if i not in self.tensors]
        self.split = make(f"v: (({_items(tensors)}), ({_items(others)}))")
        self.merge = make("t, o: " + _construct(kind, (), kinds, lambda path: places[inside[path]]))

    def schema(self, written: tuple[str, ...] = ()) -> str:
        """The arguments in the notation of a torch schema. written: the names of tensors that the op writes to."""
        names = [field.name for field in self.fields]
        twice = {name for name in names if names.count(name) > 1}
        assert not twice, f"{self.kind.__qualname__} has two fields named {', '.join(sorted(twice))}"
        return ", ".join(
            f"Tensor({chr(97 + written.index(field.name))}!) {field.name}"
            if field.name in written
            else f"{_SCHEMA[field.kind]} {field.name}"
            for field in self.fields
        )


def _itself(value: tuple) -> tuple:
    return value


def _items(sources: list[str]) -> str:
    return "".join(f"{source}, " for source in sources)


def _construct(kind: type, path: tuple[str, ...], kinds: dict[str, object], value) -> str:
    """Python source that makes a `kind`. value(path): the source of a flat field. Adds the names it uses to `kinds`."""
    name = f"K{len(kinds)}"
    kinds[name] = kind
    arguments = []
    for field, hint in get_type_hints(kind).items():
        where = (*path, field)
        arguments.append(_construct(hint, where, kinds, value) if _is_named_tuple(hint) else value(where))
    return f"new({name}, ({_items(arguments)}))"


@functools.cache
def layout(kind: type) -> Layout:
    return Layout(kind)


def returns(function) -> str:
    """The return type in torch's notation, from a function's annotation: a tensor, a NamedTuple of tensors, or None."""
    kind = get_type_hints(function)["return"]
    if kind is type(None):
        return "()"
    if kind is torch.Tensor:
        return "Tensor"
    return f"({', '.join(f'Tensor {field.name}' for field in layout(kind).fields)})"
