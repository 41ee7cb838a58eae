"""The text of a module, cut into declarations, entries and functions, and the parts of syntax that all share."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .errors import PTXError, Unsupported
from .syntax import Immediate, Kernel, Variable
from .types import BITS, NUMPY, TYPES

NAME = r"[A-Za-z_$%][\w$]*"
_FLOAT_BITS = r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}"
_INTEGER = r"0[xX][0-9a-fA-F]+U?|0[bB][01]+U?|\d+U?"
NUMBER = rf"-?(?:{_FLOAT_BITS}|\d+\.\d*(?:[eE][-+]?\d+)?|{_INTEGER})"

_NUMBER = re.compile(NUMBER)
_OCTAL = re.compile(r"0[0-7]+")
_BRACKET = re.compile(r"[(\[{]")
_STATEMENT_START = re.compile(r"[^\s;]")
_STATEMENT_END = re.compile(r"[;{]")
_BRACES_AND_STRINGS = re.compile(r'[{}]|"[^"]*"')

_STATE_SPACES = (".global", ".const", ".shared", ".local", ".param")


def split(text: str) -> list[str]:
    """Split at the commas that are not inside of brackets."""
    if not _BRACKET.search(text):
        parts = text.split(",")
    else:
        parts, depth, start = [], 0, 0
        for i, character in enumerate(text):
            if character in "([{":
                depth += 1
            elif character in ")]}":
                depth -= 1
            elif character == "," and depth == 0:
                parts.append(text[start:i])
                start = i + 1
        parts.append(text[start:])
    return [stripped for part in parts if (stripped := part.strip())]


def parse_number(text: str) -> Immediate | None:
    """A literal, or None where the text is none."""
    if not _NUMBER.fullmatch(text):
        return None
    negative, body = text.startswith("-"), text.lstrip("-")
    low = body.lower()
    if low[:2] in ("0f", "0d") and len(body) in (10, 18):
        width = 32 if low[1] == "f" else 64
        bits = int(body[2:], 16)
        return Immediate(None, bits ^ (1 << (width - 1)) if negative else bits, width)
    value: Any
    if "." in body:
        value = float(body)
    elif low.startswith(("0x", "0b")):
        value = int(body.rstrip("U"), 16 if low[1] == "x" else 2)
    else:
        digits = body.rstrip("U")
        value = int(digits, 8 if _OCTAL.fullmatch(digits) else 10)
    return Immediate(-value if negative else value)


def immediate_bytes(immediate: Immediate, type_name: str) -> bytes:
    """A literal in an initializer, as memory."""
    width = BITS[type_name] // 8
    if immediate.bits is not None:
        return immediate.bits.to_bytes(width, "little")
    if isinstance(immediate.value, float):
        return np.array([immediate.value], NUMPY[type_name]).tobytes()
    return (immediate.value & ((1 << 8 * width) - 1)).to_bytes(width, "little")


def align_up(offset: int, alignment: int) -> int:
    """The next multiple of an alignment."""
    return -(-offset // alignment) * alignment


@dataclass
class Body:
    """The text of an entry or of a function."""

    head: str
    text: str
    line: int  # where the text begins


@dataclass
class Function:
    """A .func: the declarations of what it returns and takes, and its body."""

    returns: list[str]
    parameters: list[str]
    body: Body


@dataclass
class Source:
    """The text of a module, cut into declarations, entries and functions."""

    version: str = ""
    target: str = ""
    variables: dict[str, Variable] = field(default_factory=dict)
    entries: dict[str, Body] = field(default_factory=dict)
    functions: dict[str, Function] = field(default_factory=dict)
    const_bytes: int = 0


def _without_comments(text: str) -> str:
    """Blank what does not matter and keep the line numbers."""
    text = re.sub(r"/\*.*?\*/", lambda comment: "\n" * comment[0].count("\n"), text, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"^[ \t]*(@@DWARF[^\n]*|\.(loc|file)\b[^\n]*)", "", text, flags=re.M)
    return re.sub(r"\.pragma\s[^;]*;", lambda pragma: "\n" * pragma[0].count("\n"), text)


def _closing_brace(text: str, opening: int) -> int:
    depth = 0
    for found in _BRACES_AND_STRINGS.finditer(text, opening):
        depth += (found[0] == "{") - (found[0] == "}")
        if depth == 0:
            return found.start()
    raise PTXError("unbalanced braces in PTX")


def parse_source(text: str) -> Source:
    """Cut the text of a module into its parts."""
    text = _without_comments(text)
    version, target = re.search(r"\.version\s+([\d.]+)", text), re.search(r"\.target\s+(\w+)", text)
    if not version or not target:
        raise PTXError("not PTX: .version or .target is missing")
    source = Source(version[1], target[1])
    text = re.sub(r"\.(version|target|address_size)\b[^\n]*", "", text)
    position = line_position = 0
    line = 1
    while (start := _STATEMENT_START.search(text, position)) and (end := _STATEMENT_END.search(text, start.start())):
        head = text[start.start() : end.start()]
        if head.startswith(".section"):  # debug information
            position = _closing_brace(text, end.start()) + 1
        elif not re.search(r"\.(entry|func)\b", head):  # a variable; its initializer may have braces
            position = text.index(";", end.start()) + 1
            declare(text[start.start() : position - 1], source.variables, source)
        elif end[0] == ";":  # a function without a body
            position = end.end()
        else:
            close = _closing_brace(text, end.start())
            line += text.count("\n", line_position, end.start())
            line_position = end.start()
            body = Body(head, text[end.end() : close], line)
            if entry := re.search(rf"\.entry\s+({NAME})", head):
                source.entries[entry[1]] = body
            elif function := re.search(rf"\.func\s*(?:\(([^)]*)\))?\s*({NAME})\s*(?:\(([^)]*)\))?", head):
                source.functions[function[2]] = Function(split(function[1] or ""), split(function[3] or ""), body)
            position = close + 1
    return source


def declare(text: str, table: dict[str, Any], source: Source, kernel: Kernel | None = None) -> None:
    """Add a declaration such as ".shared .align 4 .b8 name[128] = {...}" to a table of names."""
    parts = re.match(r"((?:\.[\w:]+(?:\s+\d+(?=\s))?\s*)+)\s*(.*)$", text.strip(), re.S)
    if not parts:
        return
    words, rest = parts[1].split(), parts[2]
    space = next((word[1:] for word in words if word in _STATE_SPACES), None)
    type_name = next((word[1:] for word in words if word[1:] in TYPES), None)
    if space is None or type_name is None:
        return
    element = BITS[type_name] // 8 * (2 if ".v2" in words else 4 if ".v4" in words else 1)
    align = int(words[words.index(".align") + 1]) if ".align" in words else element
    rest, _, initializer = rest.partition("=")
    for item in split(rest):
        found = re.match(NAME, item)
        if not found:
            raise PTXError(f"cannot parse the declaration {text!r}")
        sizes = [int(size or 0) for size in re.findall(r"\[\s*(\d*)\s*\]", item)]
        variable = Variable(found[0], space, type_name, align, element * math.prod(sizes))
        variable.is_extern = ".extern" in words
        if initializer:
            variable.initial = _initial_bytes(variable, initializer)
            variable.nbytes = len(variable.initial)
        if space == "const":
            variable.offset = align_up(source.const_bytes, align)
            source.const_bytes = variable.offset + variable.nbytes
        elif kernel is not None and space == "local":
            if variable.name in kernel.variables and table is kernel.variables:
                return  # of a function that is inlined more than once: its calls share it
            variable.offset = align_up(kernel.local_bytes, align)
            kernel.local_bytes = variable.offset + variable.nbytes
        table[variable.name] = variable


def _initial_bytes(variable: Variable, initializer: str) -> bytes:
    if re.search(r"[A-Za-z_$%]", _NUMBER.sub("", initializer)):
        raise Unsupported(f"initializer of {variable.name} uses an address")
    literals = [parse_number(literal) for literal in _NUMBER.findall(initializer)]
    raw = b"".join(immediate_bytes(literal, variable.type) for literal in literals if literal)
    return raw.ljust(variable.nbytes, b"\0")


def find_entry(names: Iterable[str], wanted: str | None) -> str:
    """The full name of an entry, from it or from a part that no other entry has; None for the only one."""
    names = list(names)
    if wanted in names:
        return wanted
    found = [name for name in names if wanted is None or wanted in name]
    if len(found) == 1:
        return found[0]
    what = "entries" if wanted is None else f"entries with {wanted!r} in their name"
    raise LookupError(f"{len(found)} {what} instead of one; there are: {', '.join(found or names)}")
