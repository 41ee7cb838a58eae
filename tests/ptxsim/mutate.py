"""Do the tests notice a wrong kernel? Change its PTX in one place at a time and run them.

    missed = survivors(ptx_text, "step", lambda module: check_step(module))

A mutant that is missed is either a hole in the check or changes nothing: read its line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from .errors import PTXError, Unsupported
from .module import Module
from .source import NAME, find_entry, parse_source, split
from .types import BITS


class Mutant(NamedTuple):
    """One changed module."""

    line: int
    original: str  # the line, without the space around it
    text: str  # of the whole module

    @property
    def changed(self) -> str:
        """What has become of the line."""
        return self.text.split("\n")[self.line - 1].strip()

    def __repr__(self) -> str:
        return f"<line {self.line}: {self.original} -> {self.changed or 'nothing'}>"


class _Statement(NamedTuple):
    guard: str  # "@%p1", "@!%p1" or nothing
    opcode: str
    modifiers: list[str]
    operands: list[str]
    loops: bool  # a branch back

    def __str__(self) -> str:
        head = ".".join([self.opcode, *self.modifiers])
        return f"{self.guard} {head} {', '.join(self.operands)};".strip()

    def type(self) -> str:
        return next((modifier for modifier in reversed(self.modifiers) if modifier in BITS), "")

    def having(self, opcode: str | None = None, without: tuple[str, ...] = (), **changes: object) -> _Statement:
        """With another opcode, or without some modifiers, or with other parts."""
        modifiers = [modifier for modifier in self.modifiers if modifier not in without]
        return self._replace(**{"opcode": opcode or self.opcode, "modifiers": modifiers, **changes})  # type: ignore[arg-type]


_NOTHING = ""
_Rule = Callable[[_Statement], Iterator["_Statement | str"]]

# A statement, behind braces and labels. Vector operands have braces as well, but never before the opcode.
_STATEMENT = re.compile(rf"((?:\s|[{{}}]|{NAME}:)*)([^;]*);")
_PARTS = re.compile(rf"(@!?\s*{NAME}\s+)?([a-z][\w]*)((?:\.[\w:]+)*)(.*)$", re.S)
_OTHER_CONDITION: dict[str, str] = {}
for _pair in ("lt le", "gt ge", "eq ne", "ltu leu", "gtu geu", "equ neu", "lo ls", "hi hs", "nan num"):
    _one, _other = _pair.split()
    _OTHER_CONDITION.update({_one: _other, _other: _one})
_OTHER_ROUNDING = {"rn": "rz", "rz": "rn", "rni": "rzi", "rzi": "rni", "rmi": "rpi", "rpi": "rmi"}
_OTHER_ATOMIC = {"add": "max", "max": "min", "min": "max", "inc": "add", "exch": "add"}
_VECTOR = re.compile(r"\{(.*)\}$", re.S)
_OFFSET = re.compile(r"\[\s*([^+\]]+?)\s*(?:\+\s*(-?\w+)\s*)?\]$")


def _other_arithmetic(statement: _Statement) -> Iterator[_Statement | str]:
    """Another operation on the same operands."""
    kind = statement.type()
    # Integer products name the half of them that they keep, float operations how they round.
    is_float = kind.startswith(("f", "bf"))
    if statement.opcode in ("add", "sub", "min", "max"):
        yield statement.having({"add": "sub", "sub": "add", "min": "max", "max": "min"}[statement.opcode])
    elif statement.opcode == "mul" and ("lo" in statement.modifiers or is_float):
        yield statement.having("add", without=("lo",))
    elif statement.opcode == "div" and is_float:
        yield statement.having("mul", without=("approx", "full"))
    elif statement.opcode == "div":
        yield statement.having("mul", modifiers=["lo", kind])
    elif statement.opcode == "sqrt":
        yield statement.having("abs", modifiers=[kind])
    elif statement.opcode in ("and", "or"):
        yield statement.having({"and": "or", "or": "and"}[statement.opcode])
    elif statement.opcode == "shl":
        yield statement.having("shr", modifiers=[f"u{BITS[kind]}"])
    elif statement.opcode == "shr":
        yield statement.having("shl", modifiers=[f"b{BITS[kind]}"])
    elif statement.opcode in ("abs", "neg") or (statement.opcode == "not" and kind != "pred"):
        yield statement.having("mov", modifiers=[f"b{BITS[kind]}"])
    elif statement.opcode in ("atom", "red"):
        for i, modifier in enumerate(statement.modifiers):
            if modifier in _OTHER_ATOMIC and not is_float:
                changed = [*statement.modifiers[:i], _OTHER_ATOMIC[modifier], *statement.modifiers[i + 1 :]]
                yield statement._replace(modifiers=changed)


def _lost_operand(statement: _Statement) -> Iterator[_Statement | str]:
    """A product without its addend, a wide product without its second factor."""
    if statement.opcode in ("fma", "mad"):
        yield statement.having("mul", operands=statement.operands[:3])
    elif statement.opcode == "mul" and "wide" in statement.modifiers:
        yield statement._replace(operands=[*statement.operands[:2], "1"])


def _swapped_operands(statement: _Statement) -> Iterator[_Statement | str]:
    """Operands in the wrong order, where it matters."""
    first, second, *rest = [*statement.operands[1:], "", ""]
    rest = [operand for operand in rest if operand]
    packs = statement.opcode == "cvt" and len(statement.operands) == 3
    if (statement.opcode in ("sub", "div", "rem", "selp", "copysign", "prmt") or packs) and first != second:
        yield statement._replace(operands=[statement.operands[0], second, first, *rest])
    elif statement.opcode == "fma" and second != rest[0]:
        yield statement._replace(operands=[statement.operands[0], first, rest[0], second])


def _swapped_elements(statement: _Statement) -> Iterator[_Statement | str]:
    """The first two elements of a vector the wrong way round."""
    for i, operand in enumerate(statement.operands if statement.opcode in ("ld", "st", "mov") else []):
        vector = _VECTOR.match(operand)
        items = split(vector[1]) if vector else []
        if len(items) > 1 and items[0] != items[1]:
            swapped = "{" + ", ".join([items[1], items[0], *items[2:]]) + "}"
            yield statement._replace(operands=[*statement.operands[:i], swapped, *statement.operands[i + 1 :]])


def _other_condition(statement: _Statement) -> Iterator[_Statement | str]:
    if statement.opcode in ("setp", "set") and statement.modifiers[0] in _OTHER_CONDITION:
        yield statement._replace(modifiers=[_OTHER_CONDITION[statement.modifiers[0]], *statement.modifiers[1:]])


def _dropped(statement: _Statement) -> Iterator[_Statement | str]:
    """No store, no atomic, no barrier."""
    # The result of an atomic that is gone would be undefined, but its register exists.
    if (
        statement.opcode in ("st", "red", "atom", "bar", "barrier")
        and "param" not in statement.modifiers
        and "warp" not in statement.modifiers
    ):
        yield _NOTHING


def _other_guard(statement: _Statement) -> Iterator[_Statement | str]:
    """The guard negated, or gone (which would make a loop endless)."""
    if statement.guard:
        negated = "!" in statement.guard
        yield statement._replace(
            guard=statement.guard.replace("!", "") if negated else statement.guard.replace("@", "@!", 1)
        )
        if not statement.loops:
            yield statement._replace(guard="")


def _other_immediate(statement: _Statement) -> Iterator[_Statement | str]:
    """A constant with one bit changed."""
    if statement.opcode in ("bar", "barrier", "shfl", "vote", "redux", "createpolicy", "cp", "bra"):
        return  # not data, and shfl has its own rule
    for i, operand in enumerate(statement.operands[1:], 1):
        changed = _change_number(operand)
        if changed is not None:
            yield statement._replace(operands=[*statement.operands[:i], changed, *statement.operands[i + 1 :]])


def _change_number(text: str) -> str | None:
    if float_bits := re.fullmatch(r"(0[fF]|0[dD])([0-9a-fA-F]+)", text):
        digits = len(float_bits[2])
        bits = int(float_bits[2], 16)
        fraction = {8: 23, 16: 52}[digits]
        exponent_ones = (1 << (4 * digits - 1 - fraction)) - 1
        if bits & ((1 << (4 * digits - 1)) - 1) == 0:
            bits = (exponent_ones >> 1) << fraction  # one instead of zero
        elif (bits >> fraction) & exponent_ones == exponent_ones:
            bits -= 1  # infinity becomes the largest number
        else:
            bits ^= 1 << (fraction - 1)
        return f"{float_bits[1]}{bits:0{digits}X}"
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)", text):
        return str(int(text, 0 if "x" in text.lower() else 10) ^ 1)
    return None


def _other_offset(statement: _Statement) -> Iterator[_Statement | str]:
    """The element behind the right one, or the vector."""
    if statement.opcode not in ("ld", "st", "atom", "red") or not statement.type():
        return
    elements = next((int(modifier[1:]) for modifier in statement.modifiers if modifier in ("v2", "v4", "v8")), 1)
    for i, operand in enumerate(statement.operands):
        if address := _OFFSET.match(operand):
            offset = int(address[2] or "0", 0) + elements * BITS[statement.type()] // 8
            yield statement._replace(
                operands=[*statement.operands[:i], f"[{address[1]}+{offset}]", *statement.operands[i + 1 :]]
            )


def _other_conversion(statement: _Statement) -> Iterator[_Statement | str]:
    """Another rounding, or an f16 that is taken for an integer."""
    if statement.opcode != "cvt":
        return
    if statement.modifiers == ["f32", "f16"]:
        yield statement._replace(modifiers=["rn", "f32", "u16"])
    to, from_ = [modifier for modifier in statement.modifiers if modifier in BITS][:2]
    for i, modifier in enumerate(statement.modifiers):
        if modifier not in _OTHER_ROUNDING:
            continue
        # The simulator has rz for values that were f32, or f64 on their way to anything but bf16.
        if modifier in ("rn", "rz") and (from_ not in ("f32", "f64") or (from_ == "f64" and to.startswith("bf"))):
            continue
        yield statement._replace(
            modifiers=[*statement.modifiers[:i], _OTHER_ROUNDING[modifier], *statement.modifiers[i + 1 :]]
        )


def _other_distance(statement: _Statement) -> Iterator[_Statement | str]:
    """A shuffle over half of the distance."""
    if statement.opcode == "shfl" and statement.operands[2].isdigit():
        distance = int(statement.operands[2]) // 2 or 3
        yield statement._replace(operands=[*statement.operands[:2], str(distance), *statement.operands[3:]])


_RULES: tuple[_Rule, ...] = (
    *(_other_arithmetic, _lost_operand, _swapped_operands, _swapped_elements, _other_condition, _dropped),
    *(_other_guard, _other_immediate, _other_offset, _other_conversion, _other_distance),
)


def mutants(ptx_text: str, entry_name: str) -> Iterator[Mutant]:
    """All mutants of one entry (as for `Module.entry`): (line number, original line, text of the mutated module).

    Lines keep their numbers. A mutant may loop forever: launch it with a small max_steps.
    """
    source = parse_source(ptx_text)
    body = source.entries[find_entry(source.entries, entry_name)]
    lines, clean = ptx_text.split("\n"), body.text.split("\n")
    labels = {
        label[1]: (number, label.start())
        for number, line in enumerate(clean)
        for label in re.finditer(rf"({NAME})\s*:(?!:)", line)
    }
    for number, without_comments in enumerate(clean):
        index = body.line - 1 + number
        line = lines[index]
        for found in _STATEMENT.finditer(without_comments):
            statement = _parse(found[2], labels, (number, found.start(2)))
            # The first line may begin with the head of the entry.
            at = line.find(found[0], found.start() if number else 0)
            if statement is None or at < 0:  # a declaration, or a statement with a comment in its middle
                continue
            for changed in (changed for rule in _RULES for changed in rule(statement)):
                new = f"{line[:at]}{found[1]}{changed}{line[at + len(found[0]) :]}"
                text = "\n".join([*lines[:index], new, *lines[index + 1 :]])
                yield Mutant(index + 1, line.strip(), text)


def _parse(text: str, labels: dict[str, tuple[int, int]], at: tuple[int, int]) -> _Statement | None:
    parts = _PARTS.match(text.strip())
    if not parts or text.strip().startswith("."):
        return None
    operands = split(parts[4])
    loops = parts[2] == "bra" and labels.get(operands[0], at) <= at
    return _Statement((parts[1] or "").strip(), parts[2], parts[3].split(".")[1:], operands, loops)


def survivors(ptx_text: str, entry_name: str, check: Callable[[Module], object]) -> list[Mutant]:
    """The mutants that a check accepts. It is given a Module, and rejects one with AssertionError or PTXError.

    Mutants that the simulator does not support are left out.
    """
    missed = []
    for mutant in mutants(ptx_text, entry_name):
        try:
            check(Module(mutant.text))
        except (AssertionError, PTXError, Unsupported):
            continue
        missed.append(mutant)
    return missed
