"""PTX text to a Module: variables, functions, instructions with their scopes and source lines.

A Module knows the grammar and no instruction: what an opcode means is in decode.py.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field

SIZES = {
    name: size
    for size, names in (
        (1, "b8 u8 s8 pred"),
        (2, "b16 u16 s16 f16 bf16"),
        (4, "b32 u32 s32 f32 f16x2 bf16x2 u16x2 s16x2 tf32"),
        (8, "b64 u64 s64 f64"),
    )
    for name in names.split()
}


class PtxError(Exception):
    """PTX that cannot be executed: an unknown instruction, a malformed statement. Names the text and its line."""


@dataclass(frozen=True)
class Location:
    """A source line, and the line that it was inlined into in the end."""

    file: str
    line: int
    inlined_file: str = ""
    inlined_line: int = 0

    def __str__(self) -> str:
        text = f"{self.file}:{self.line}"
        return f"{text} (inlined at {self.inlined_file}:{self.inlined_line})" if self.inlined_file else text


@dataclass
class Variable:
    """A variable or a parameter. `bytes` is None for an extern array, whose size the launch gives."""

    name: str
    space: str
    type: str
    align: int
    bytes: int | None
    initial: str | None = None


@dataclass
class Scope:
    """What a pair of braces declares."""

    parent: Scope | None = None
    registers: dict[str, str] = field(default_factory=dict)  # name, or prefix of %r<n>, to type
    variables: dict[str, Variable] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)  # to the index of the instruction that follows
    tables: dict[str, list[str]] = field(default_factory=dict)  # .branchtargets

    def find(self, kind: str, name: str):
        scope = self
        while scope is not None:
            found = getattr(scope, kind).get(name)
            if found is not None:
                return scope, found
            scope = scope.parent
        return None, None


@dataclass
class Instruction:
    opcode: str
    guard: str | None  # "%p1" or "!%p1"
    operands: list[str]
    scope: Scope
    location: Location | None
    line: int  # of the PTX text

    @property
    def text(self) -> str:
        guard = f"@{self.guard} " if self.guard else ""
        return f"{guard}{self.opcode} {', '.join(self.operands)}".rstrip()


@dataclass
class Function:
    name: str
    is_entry: bool
    parameters: list[Variable]
    results: list[Variable]
    scope: Scope
    instructions: list[Instruction] = field(default_factory=list)
    required_threads: tuple[int, ...] | None = None
    cluster: tuple[int, ...] | None = None  # .reqnctapercluster
    defined: bool = False


@dataclass
class Module:
    functions: dict[str, Function] = field(default_factory=dict)
    scope: Scope = field(default_factory=Scope)
    files: dict[int, str] = field(default_factory=dict)
    target: str = ""


_COMMENT = re.compile(r'\.loc[^\n]*|"[^"\n]*"|//[^\n]*|/\*.*?\*/', re.S)
_STATEMENT = re.compile(r"(?:@(!?[%$\w]+)\s+)?([a-z_][\w.:]*)\s*([^;]*);")
_LABEL = re.compile(r"([$%A-Za-z_][\w$]*)\s*:(?!:)")
_LOC = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s+(\d+)([^\n]*)")
_INLINED = re.compile(r"inlined_at\s+(\d+)\s+(\d+)\s+(\d+)")
_COMMENT_PLACE = re.compile(r"([^\s\[\]@:]+):(\d+)(?::\d+)?")
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|\([^)]*\)|[^,\s](?:[^,\[{(]*[^,\s\[{(])?")
_FUNCTION = re.compile(r"((?:\.(?:visible|extern|weak|common)\s+)*)\.(entry|func)\b")
_VARIABLE = re.compile(
    r"((?:\.(?:visible|extern|weak|common)\s+)*)\.(global|const|shared|local|param)\b([^;=]*)(=[^;]*)?;"
)
_DIRECTIVE = re.compile(
    r"\.(reqntid|maxntid|minnctapersm|maxnreg|noreturn|pragma|maxclusterrank|explicitcluster|reqnctapercluster)\b"
    r"([^;{\n]*)"
)
_REGISTERS = re.compile(r"\.reg\s*\.(\w+)\s+([^;]*);")
_SKIPPED_LINE = re.compile(r"\.(?:version|address_size)\b[^\n]*")


def _without_comments(text: str) -> str:
    """Comments blanked, line numbers kept. The comment of a .loc stays: Triton writes there what was inlined where."""

    def blank(match):
        found = match.group()
        return found if found[0] in '."' else "\n" * found.count("\n") or " "

    return _COMMENT.sub(blank, text)


def split_operands(text: str) -> list[str]:
    return [" ".join(found.split()) for found in _OPERAND.findall(text)]


def _variable(space: str, words: str, initial: str | None = None, extern: bool = False) -> Variable:
    """From `.align 4 .b8 name[16]`; also `.u64 .ptr .global .align 1 name`."""
    type_, align = "", 0
    match = re.search(r"\.align\s+(\d+)", words)
    if match:
        align = int(match.group(1))
    vector = 1
    for word in re.findall(r"\.(\w+)", words):
        if word in SIZES and not type_:
            type_ = word
        elif word in ("v2", "v4"):
            vector = int(word[1])
    match = re.search(r"([%$\w]+)\s*((?:\[\s*\d*\s*\]\s*)*)$", words.strip())
    if not match or not type_:
        raise PtxError(f"cannot read the declaration .{space} {words.strip()}")
    size, count = SIZES[type_] * vector, 1
    for extent in re.findall(r"\[\s*(\d*)\s*\]", match.group(2)):
        if extent == "":
            if not extern and initial is None:
                raise PtxError(f"array without a size: .{space} {words.strip()}")
            count = None
            break
        count *= int(extent)
    if count is None and initial is not None:
        count = initial.count(",") + 1
    bytes_ = None if count is None else size * count
    return Variable(match.group(1), space, type_, max(align, size), bytes_, initial)


class _Parser:
    def __init__(self, text: str):
        self.text = _without_comments(text)
        self.position = 0
        self.module = Module()
        self.callers: dict[tuple[str, ...], tuple[str, int]] = {}  # of (file, line, column), as last said

    def line(self, position: int | None = None) -> int:
        return self.text.count("\n", 0, self.position if position is None else position) + 1

    def skip_space(self) -> bool:
        text, at, end = self.text, self.position, len(self.text)
        while at < end and text[at] in " \t\n\r":
            at += 1
        self.position = at
        return at < end

    def match(self, pattern: re.Pattern):
        found = pattern.match(self.text, self.position)
        if found:
            self.position = found.end()
        return found

    def balanced(self, opening: str, closing: str) -> str:
        """The text between the bracket here and its counterpart."""
        depth, start = 0, self.position
        for at in range(start, len(self.text)):
            if self.text[at] == opening:
                depth += 1
            elif self.text[at] == closing:
                depth -= 1
                if depth == 0:
                    self.position = at + 1
                    return self.text[start + 1 : at]
        raise PtxError(f"line {self.line()}: no {closing} for this {opening}")

    def parse(self) -> Module:
        text = self.text
        for number, name in re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text):
            self.module.files[int(number)] = name
        while self.skip_space():
            if found := self.match(_FUNCTION):
                self.function(found)
            elif found := self.match(_VARIABLE):
                variable = _variable(found[2], found[3], found[4] and found[4][1:].strip(), "extern" in found[1])
                self.module.scope.variables[variable.name] = variable
            elif found := self.match(re.compile(r"\.target\b([^\n]*)")):
                self.module.target = found[1].strip()
            elif self.match(_SKIPPED_LINE) or self.match(re.compile(r"\.file\b[^\n]*")):
                pass
            elif self.match(re.compile(r"\.section\s+[.\w]+\s*")):
                self.balanced("{", "}")
            elif self.match(re.compile(r"\.(pragma|alias)\b[^;]*;|;")):
                pass
            else:
                raise PtxError(f"line {self.line()}: cannot read {text[self.position : self.position + 60]!r}")
        return self.module

    def parameters(self) -> list[Variable]:
        inside = self.balanced("(", ")").strip()
        out = []
        for item in filter(None, (part.strip() for part in inside.split(","))):
            if item.startswith(".reg"):
                raise PtxError(f"line {self.line()}: parameters in registers are not supported: {item}")
            out.append(_variable("param", item.removeprefix(".param")))
        return out

    def function(self, found) -> None:
        is_entry = found[2] == "entry"
        self.skip_space()
        results = self.parameters() if self.text[self.position] == "(" else []
        self.skip_space()
        name = self.match(re.compile(r"[$%\w]+")).group()
        self.skip_space()
        parameters = self.parameters() if self.text[self.position] == "(" else []
        scope = Scope(self.module.scope)
        for variable in parameters + results:
            scope.variables[variable.name] = variable
        function = Function(name, is_entry, parameters, results, scope)
        while True:
            self.skip_space()
            if found := self.match(_DIRECTIVE):
                if found[1] == "reqntid":
                    function.required_threads = tuple(int(n) for n in found[2].split(","))
                elif found[1] == "reqnctapercluster":
                    function.cluster = tuple(int(n) for n in found[2].split(","))
            else:
                break
        if self.text[self.position] == ";":
            self.position += 1
            self.module.functions.setdefault(name, function)
            return
        if self.text[self.position] != "{":
            raise PtxError(f"line {self.line()}: cannot read {self.text[self.position : self.position + 60]!r}")
        self.position += 1
        self.body(function)
        function.defined = True
        self.module.functions[name] = function

    def location(self, found) -> Location:
        file, line, rest = self.module.files.get(int(found[1]), "?"), int(found[2]), found[4]
        inlined = ("", 0)
        if at := _INLINED.search(rest):  # nvcc says every call of a chain in a .loc of its own, the outermost first
            inlined = self.callers.get(at.groups()) or (self.module.files.get(int(at[1]), "?"), int(at[2]))
        elif "@[" in rest:
            places = _COMMENT_PLACE.findall(rest)
            inlined = (places[-1][0], int(places[-1][1]))
        self.callers[found.groups()[:3]] = inlined if inlined[0] else (file, line)
        return Location(file, line, *inlined)

    def body(self, function: Function) -> None:
        scope, depth, location, table = function.scope, 1, None, None
        text = self.text
        line, counted = self.line(), self.position
        operands: dict[str, list[str]] = {}
        while self.skip_space():
            line += text.count("\n", counted, self.position)
            counted = self.position
            first = text[self.position]
            if first == "{":
                scope, depth = Scope(scope), depth + 1
                self.position += 1
            elif first == "}":
                depth -= 1
                self.position += 1
                if depth == 0:
                    return
                scope = scope.parent
            elif first == ";":
                self.position += 1
            elif first == ".":
                if found := self.match(_LOC):
                    location = self.location(found)
                elif found := self.match(_REGISTERS):
                    if found[1] not in SIZES:
                        raise PtxError(f"line {line}: registers of type .{found[1]} are not supported")
                    for name in found[2].split(","):
                        scope.registers[name.strip().split("<")[0]] = found[1]
                elif found := self.match(_VARIABLE):
                    variable = _variable(found[2], found[3], found[4] and found[4][1:].strip(), "extern" in found[1])
                    scope.variables[variable.name] = variable
                elif found := self.match(re.compile(r"\.branchtargets\s+([^;]*);")):
                    scope.tables[table] = [name.strip() for name in found[1].split(",")]
                elif not self.match(re.compile(r"\.(?:pragma|callprototype|calltargets)\b[^;]*;")):
                    raise PtxError(f"line {line}: cannot read {text[self.position : self.position + 60]!r}")
            elif found := self.match(_LABEL):
                table = found[1]
                scope.labels[table] = len(function.instructions)
            elif found := self.match(_STATEMENT):
                words = operands.get(found[3])
                if words is None:
                    words = operands[found[3]] = split_operands(found[3])
                function.instructions.append(Instruction(found[2], found[1], words, scope, location, line))
            else:
                raise PtxError(f"line {line}: cannot read {text[self.position : self.position + 60]!r}")
        raise PtxError(f"function {function.name} does not end")


@functools.lru_cache(maxsize=64)
def parse(text: str) -> Module:
    """Reads a PTX module, once. Raises PtxError at what it cannot read."""
    return _Parser(text).parse()
