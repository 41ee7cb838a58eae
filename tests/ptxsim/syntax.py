"""What a parsed kernel consists of: variables, registers, operands, instructions."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from .errors import Unsupported
from .types import TYPES


@dataclass
class Variable:
    """A declared variable: parameter, shared, local, const or global."""

    name: str
    space: str
    type: str
    align: int
    nbytes: int
    offset: int = 0  # in its state space; the address of a global variable, which each launch sets
    initial: bytes | None = None
    is_extern: bool = False


@dataclass
class Register:
    """A register of a kernel, by its index."""

    slot: int
    type: str


@dataclass
class Negated:
    """!p: the opposite of a predicate."""

    register: Register


@dataclass
class Immediate:
    """A literal: an int or a decimal float, or the bits of a 0f or 0d literal."""

    value: Any
    bits: int | None = None
    width: int = 0  # of the bits


@dataclass
class Symbol:
    """The address of a variable."""

    variable: Variable


@dataclass
class SpecialRegister:
    """%tid.x and the like, without the percent sign."""

    name: str


@dataclass
class Label:
    """A place to branch to, or the name of a function."""

    name: str


@dataclass
class Address:
    """[base + offset]"""

    base: Any
    offset: int


@dataclass
class Vector:
    """{a, b, ...}, or a|b."""

    items: list


class Kind(enum.Enum):
    """What the scheduler has to do for an instruction besides running it."""

    PLAIN = enum.auto()
    BRANCH = enum.auto()
    TABLE_BRANCH = enum.auto()
    BARRIER = enum.auto()  # waits for the threads of the block
    WARP = enum.auto()  # waits for the threads of the warp that its mask names
    EXIT = enum.auto()


@dataclass
class Instruction:
    """One instruction of a kernel."""

    opcode: str
    modifiers: list[str]
    operands: list
    guard: tuple[Register, bool] | None  # the predicate and whether it is negated
    line: int
    text: str
    scope: tuple[int, ...] = ()  # the braces around it, from the outside
    target: int = 0  # of a branch: the index of an instruction
    targets: list[int] = field(default_factory=list)  # of a table branch

    # Set when it is compiled.
    kind: Kind = Kind.PLAIN
    execute: Callable | None = None
    selector: Callable | None = None  # reads the index of a table branch
    members: Callable | None = None  # reads the mask of the threads that a warp operation names

    def has(self, *names: str) -> bool:
        """Whether it carries one of these modifiers."""
        return any(name in self.modifiers for name in names)

    def first_of(self, *names: str, default: str | None = None) -> str:
        """The first of its modifiers that is among the names."""
        found = next((modifier for modifier in self.modifiers if modifier in names), default)
        if found is None:
            raise Unsupported(f"none of the modifiers {', '.join(names)}")
        return found

    def type(self, index: int = -1) -> str:
        """The index-th type among its modifiers, by default the last."""
        types = [modifier for modifier in self.modifiers if modifier in TYPES]
        if not types:
            raise Unsupported("no type that is known")
        return types[index]


@dataclass
class Kernel:
    """One .entry: its parameters, variables, registers and instructions."""

    name: str
    parameters: list[Variable] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    register_types: list[str] = field(default_factory=list)
    variables: dict[str, Variable] = field(default_factory=dict)
    labels: dict[tuple[tuple[int, ...], str], int] = field(default_factory=dict)
    branch_tables: dict[str, list[str]] = field(default_factory=dict)
    required_block: tuple[int, int, int] | None = None
    maximum_block: tuple[int, int, int] | None = None
    shared_bytes: int = 0
    local_bytes: int = 0
    parameter_bytes: int = 0
    scopes: int = 0  # how many were opened
    compiled: bool = False

    def find_label(self, scope: tuple[int, ...], name: str) -> int:
        """The index of the instruction behind a label, seen from a scope."""
        for visible in enclosing(scope):
            if (visible, name) in self.labels:
                return self.labels[visible, name]
        raise Unsupported(f"label {name}")


def enclosing(scope: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """A scope and those around it, from the inside."""
    for depth in range(len(scope), -1, -1):
        yield scope[:depth]
