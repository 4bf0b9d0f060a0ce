"""From an op's arguments, a NamedTuple, to what torch wants: a schema, a flat list of values, and back.

    class Args(NamedTuple):
        x: torch.Tensor
        bias: torch.Tensor | None
        eps: float

A field may be a NamedTuple itself; its fields then stand in its place, so that a backward's arguments can hold all of
the forward's. This is the one place where arguments are taken by position.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, NewType, get_type_hints

import torch

SymInt = NewType("SymInt", int)  # an integer that torch.compile may keep symbolic, as a length

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
    """One value of a flattened NamedTuple. `path` leads to it: ("forward", "q")."""

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
    """How values of one NamedTuple type are taken apart and put together.

    fields      the flat fields, in order
    tensors     the places of those that are, or may be, tensors
    flatten(value)                 a flat tuple
    unflatten(flat)                the NamedTuple again
    split(value)                   (tensors, others), two tuples
    merge(tensors, others)         the NamedTuple again
    """

    def __init__(self, kind: type):
        self.kind, self.fields = kind, _fields(kind)
        self.tensors = tuple(i for i, field in enumerate(self.fields) if field.is_tensor)
        kinds: dict[str, object] = {
            "new": tuple.__new__
        }  # past the constructor, which is Python and takes twice as long
        inside = {field.path: i for i, field in enumerate(self.fields)}
        places = {i: f"t[{k}]" for k, i in enumerate(self.tensors)}
        places |= {i: f"o[{k}]" for k, i in enumerate(i for i in range(len(self.fields)) if i not in places)}
        value_of = ["v." + ".".join(field.path) for field in self.fields]

        def make(source):
            return eval(f"lambda {source}", kinds)

        # A NamedTuple without others inside is its own flat tuple.
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
        """The arguments as torch writes them; `written`: names of tensors that the op writes to."""
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
    """Source of `kind(...)`, each flat field as `value(path)` says; `kinds` gets the names that it uses."""
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
    """What a function returns, by its annotation, as torch writes it: a tensor, a NamedTuple of tensors, or None."""
    kind = get_type_hints(function)["return"]
    if kind is type(None):
        return "()"
    if kind is torch.Tensor:
        return "Tensor"
    return f"({', '.join(f'Tensor {field.name}' for field in layout(kind).fields)})"
