"""Random kernels in C++ that nvcc and the host's compiler both take; see sources/random_kernels.h.

Kernel k is `extern "C" k<k>(Parameters p, const void* in, void* out, int n)`: n threads, each of which reads ROW bytes
and writes ROW bytes. Everything in it is defined by C++ and exact, so that both must write the same.
"""

from __future__ import annotations

import random

SIGNED, UNSIGNED, REAL = ("i8", "i16", "i32", "i64"), ("u8", "u16", "u32", "u64"), ("f32", "f64")
INTEGERS = (*SIGNED, *UNSIGNED)
TYPES = (*INTEGERS, *REAL)
ROW = 128  # bytes
FIELDS, ARRAYS = ("a", "c", "d", "f"), {"b": 5, "e": 4, "g": 3}  # of Parameters; the arrays with their lengths


def bits_of(type_: str) -> int:
    return int(type_[1:])


class Writer:
    """Writes one kernel or function. `scope` holds (name, type) of what can be read, `variables` of what can be set.

    called: a function and the types of its parameters; a function calls none, and reads its parameters alone.
    """

    def __init__(self, seed: int, called: tuple[str, tuple[str, ...]] | None = None):
        self.random = random.Random(seed)
        self.called = called
        self.scope: list[tuple[str, str]] = []
        self.variables: list[tuple[str, str]] = []
        self.arrays: list[tuple[str, str, int]] = []
        self.lines: list[str] = []
        self.indent, self.names, self.loops = 1, 0, 0

    def name(self, prefix: str) -> str:
        self.names += 1
        return f"{prefix}{self.names}"

    def put(self, line: str) -> None:
        self.lines.append("  " * self.indent + line)

    # ---- expressions

    def literal(self, type_: str) -> str:
        if type_ in REAL:
            # None past 2^63, of which nvcc 13.0 takes std::ceil to be -2^63.
            value = self.random.choice(("0", "1", "-1", "0.5", "-3.25", "1e-30", "7e17", "1e-42", "255.5", "-65536"))
            return f"{type_}({value})"
        n = bits_of(type_)
        value = self.random.choice((0, 1, 2, 3, 7, 10, 100, 2 ** (n - 1) - 1, 2 ** (n - 1), self.random.getrandbits(n)))
        return f"{type_}({value}ull)"

    def leaf(self, type_: str) -> str:
        choice = self.random.random()
        if choice < 0.15 or not self.scope:
            return self.literal(type_)
        if self.called is None:
            return f"to<{type_}>({self.random.choice(self.scope)[0]})"
        if choice < 0.25:
            value = f"x_{type_}[{self.random.randrange(8 * ROW // bits_of(type_))}]"
            return f"number({value})" if type_ in REAL else value
        if choice < 0.35 and self.arrays:
            name, _, length = self.random.choice(self.arrays)
            return f"to<{type_}>({name}[{self.index(length)}])"
        if choice < 0.4:
            name, length = self.random.choice(list(ARRAYS.items()))
            return f"to<{type_}>(p.{name}[{self.index(length)}])"
        if choice < 0.45:
            name = self.random.choice(FIELDS)
            return f"to<{type_}>(p.{name})"
        same = [name for name, of in self.scope if of == type_]
        if same and self.random.random() < 0.5:
            return self.random.choice(same)
        return f"to<{type_}>({self.random.choice(self.scope)[0]})"

    def index(self, length: int) -> str:
        return f"u32({self.expression(self.random.choice(INTEGERS), 1)}) % {length}"

    def condition(self, depth: int) -> str:
        if depth > 0 and self.random.random() < 0.3:
            joint = self.random.choice(("&&", "||", "!=", "=="))
            return f"(({self.condition(depth - 1)}) {joint} ({self.condition(depth - 1)}))"
        type_ = self.random.choice(TYPES)
        relation = self.random.choice(("<", "<=", ">", ">=", "==", "!="))
        negation = self.random.choice(("", "!"))
        return f"{negation}({self.expression(type_, depth - 1)} {relation} {self.expression(type_, depth - 1)})"

    def expression(self, type_: str, depth: int) -> str:
        if depth <= 0:
            return self.leaf(type_)
        a, b, c = (self.expression(type_, depth - 1) for _ in range(3))
        choice = self.random.random()
        if choice < 0.12:
            return f"(({self.condition(depth - 1)}) ? {a} : {b})"
        if choice < 0.27:
            other = self.random.choice(TYPES)
            return f"to<{type_}>({self.expression(other, depth - 1)})"
        if choice < 0.3:
            return f"bits<{type_}>({self.expression(self.random.choice(TYPES), depth - 1)})"
        if choice < 0.36 and self.called:
            name, parameters = self.called
            return f"to<{type_}>({name}({', '.join(self.expression(of, depth - 1) for of in parameters)}))"
        if type_ in REAL:
            return self.random.choice(
                (
                    f"plus({a}, {b})",
                    f"times({a}, {b})",
                    f"over({a}, {b})",
                    f"root({a})",
                    f"fma_({a}, {b}, {c})",
                    f"-({a})",
                    f"std::fabs({a})",
                    f"({a} < {b} ? {a} : {b})",
                    f"std::floor({a})",
                    f"std::trunc({a})",
                    f"std::rint({a})",
                    f"std::ceil({a})",
                    f"std::copysign({a}, {b})",
                )
            )
        n = self.expression(self.random.choice(INTEGERS), depth - 1)
        bits = bits_of(type_)
        position = self.random.randrange(bits)
        length = self.random.randint(1, bits - position)
        divisor = self.random.choice((3, 7, 10, 100, 64, bits - 1))
        return self.random.choice(
            (
                f"add<{type_}>({a}, {b})",
                f"sub<{type_}>({a}, {b})",
                f"mul<{type_}>({a}, {b})",
                f"mad<{type_}>({a}, {b}, {c})",
                f"mulhi<{type_}>({a}, {b})",
                f"div<{type_}>({a}, {b})",
                f"rem<{type_}>({a}, {b})",
                f"div<{type_}>({a}, {divisor})",
                f"rem<{type_}>({a}, {divisor})",
                f"shl<{type_}>({a}, {n})",
                f"shr<{type_}>({a}, {n})",
                f"shl_all<{type_}>({a}, {n})",
                f"shr_all<{type_}>({a}, {n})",
                f"shr<{type_}>({a}, {position})",
                f"rotate<{type_}>({a}, {n})",
                f"rotate<{type_}>({a}, {position})",
                f"band<{type_}>({a}, {b})",
                f"bor<{type_}>({a}, {b})",
                f"bxor<{type_}>({a}, {b})",
                f"bnot<{type_}>({a})",
                f"merge<{type_}>({a}, {b}, {c})",
                f"field<{type_}>({a}, {position}, {length})",
                f"popcount<{type_}>({a})",
                f"leading<{type_}>({a})",
                f"reverse<{type_}>({a})",
                f"({a} < {b} ? {a} : {b})",
                f"({a} > {b} ? {a} : {b})",
            )
        )

    # ---- statements

    def declare(self, value: str, type_: str) -> None:
        name = self.name("v")
        self.put(f"{type_} {name} = {value};")
        self.variables.append((name, type_))
        self.scope.append((name, type_))

    def declare_array(self) -> None:
        name, type_, length = self.name("a"), self.random.choice(TYPES), self.random.randint(2, 9)
        self.put(f"{type_} {name}[{length}];")
        index = self.name("j")
        self.put(f"for (u32 {index} = 0; {index} < {length}; ++{index}) {name}[{index}] = to<{type_}>(")
        self.put(f"    add<u32>({self.expression('u32', 1)}, {index}));")
        self.arrays.append((name, type_, length))

    def assign(self) -> None:
        if self.arrays and self.random.random() < 0.3:
            name, type_, length = self.random.choice(self.arrays)
            self.put(f"{name}[{self.index(length)}] = {self.expression(type_, 2)};")
        else:
            name, type_ = self.random.choice(self.variables)
            self.put(f"{name} = {self.expression(type_, 2)};")

    def block(self, depth: int, statements: int) -> None:
        self.indent += 1
        for _ in range(statements):
            self.statement(depth)
        self.indent -= 1

    def statement(self, depth: int) -> None:
        choice = self.random.random()
        if depth == 0 or choice < 0.4:
            self.assign()
        elif choice < 0.6:
            self.put(f"if ({self.condition(2)}) {{")
            self.block(depth - 1, 2)
            if self.random.random() < 0.6:
                self.put("} else {")
                self.block(depth - 1, 2)
            self.put("}")
        elif choice < 0.68:
            cases = self.random.randint(3, 9)
            self.put(f"switch (u32({self.expression('u32', 2)}) % {cases + 1}) {{")
            for k in range(cases):
                self.put(f"  case {k}:")
                self.block(0, 1)
                if self.random.random() < 0.7:
                    self.put("    break;")
            self.put("}")
        elif choice < 0.75 and self.loops:
            self.put(f"if ({self.condition(1)}) {self.random.choice(('break', 'continue'))};")
        elif self.loops < 2:
            counter, bound = self.name("j"), self.random.choice((3, 6, 8))
            type_ = self.random.choice(("i32", "u32", "i64", "u8"))
            trips = f"u32({self.expression('u32', 2)}) % {bound}"
            if self.random.random() < 0.5:
                self.put(f"for ({type_} {counter} = 0, e = {type_}({trips}); {counter} < e; ++{counter}) {{")
            else:
                self.put(f"for ({type_} {counter} = {type_}({trips}); {counter} != 0; --{counter}) {{")
            self.scope.append((counter, type_))
            self.loops += 1
            self.block(depth - 1, 3)
            self.loops -= 1
            self.scope.remove((counter, type_))
            self.put("}")
        else:
            self.assign()


def function(seed: int, name: str) -> tuple[tuple[str, ...], list[str]]:
    """A function that the compiler may not inline, and one that it calls: types of the parameters, lines."""
    writer = Writer(seed)
    result = writer.random.choice(TYPES)
    parameters = tuple(writer.random.choice(TYPES) for _ in range(writer.random.randint(1, 4)))
    writer.scope = [(f"q{k}", of) for k, of in enumerate(parameters)]
    arguments = ", ".join(f"{of} q{k}" for k, of in enumerate(parameters))
    lines = [f"CALLED Pair {name}_pair({arguments}) {{"]
    lines += [f"  return {{{', '.join(writer.expression(of, 2) for of in ('i64', 'u16', 'f32'))}}};", "}"]
    member = writer.random.choice(("first", "second", "third"))
    call = f"to<{result}>({name}_pair({', '.join(f'q{k}' for k in range(len(parameters)))}).{member})"
    combine = "plus" if result in REAL else f"add<{result}>"
    lines += [f"CALLED {result} {name}({arguments}) {{"]
    lines += [f"  return {combine}({writer.expression(result, 2)}, {call});", "}"]
    return parameters, lines


def kernel(seed: int, name: str) -> list[str]:
    parameters, lines = function(seed, f"{name}_f")
    writer = Writer(seed, (f"{name}_f", parameters))
    for _ in range(6):
        type_ = writer.random.choice(TYPES)
        writer.declare(writer.expression(type_, 1), type_)
    for _ in range(writer.random.randrange(3)):
        writer.declare_array()
    for _ in range(7):
        writer.statement(3)
    results = [variable for variable, _ in writer.variables]
    results += [f"{array}[{writer.index(length)}]" for array, _, length in writer.arrays]
    for k, result in enumerate(results):
        writer.put(f"memcpy(y + {8 * k}, &{result}, sizeof({result}));")
    views = [f"  const {of}* x_{of} = reinterpret_cast<const {of}*>(x);" for of in TYPES]
    body = [f"FN void {name}_body(const Parameters& p, const u8* x, u8* y) {{", *views, *writer.lines, "}"]
    entry = f"""#ifdef __CUDACC__
extern "C" __global__ void {name}(Parameters p, const u8* __restrict__ x, u8* __restrict__ y, int n) {{
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) {name}_body(p, x + {ROW} * i, y + {ROW} * i);
}}
#else
extern "C" void {name}(const Parameters* p, const u8* x, u8* y, int n) {{
  for (int i = 0; i < n; ++i) {name}_body(*p, x + {ROW} * i, y + {ROW} * i);
}}
#endif"""
    return [*lines, *body, entry, ""]


def source(seed: int, kernels: int) -> str:
    """A .cu file of kernels k0, k1, ..., which a C++ compiler takes as well."""
    lines = ['#include "random_kernels.h"', ""]
    for k in range(kernels):
        lines += kernel(1000 * seed + k, f"k{k}")
    return "\n".join(lines) + "\n"
