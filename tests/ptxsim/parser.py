"""From the body of an entry to a kernel. Calls of functions with a body are inlined."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from .errors import PTXError, Unsupported
from .source import NAME, NUMBER, Body, Source, align_up, declare, parse_number, split
from .syntax import (
    Address,
    Immediate,
    Instruction,
    Kernel,
    Label,
    Negated,
    Register,
    SpecialRegister,
    Symbol,
    Variable,
    Vector,
)
from .types import TYPES, WARP

_GUARD = re.compile(rf"@(!?)\s*({NAME})\s+(.*)$")
_OPERANDS_FROM = re.compile(r"[\s{\[]")
_ADDRESS = re.compile(rf"({NAME}|{NUMBER})\s*(?:\+\s*(-?\s*(?:0[xX][0-9a-fA-F]+|\d+)))?\s*$")
_SYMBOL_PLUS = re.compile(rf"({NAME})\s*\+\s*(\d+)$")
_CALL = re.compile(rf"(?:\(([^)]*)\)\s*,\s*)?({NAME})\s*(?:,\s*\(([^)]*)\))?")
_REGISTERS = re.compile(rf"({NAME})(?:<(\d+)>)?$")
_SPACE = re.compile(r"\s*")
# A label, or a statement; braces inside of a statement are a vector operand.
_TOKEN = re.compile(rf"({NAME})\s*:(?!:)|([^;{{}}]*(?:\{{[^{{}}]*\}}[^;{{}}]*)*);", re.S)


def parse_kernel(source: Source, name: str) -> Kernel:
    """Parse an entry and the functions it calls."""
    return _KernelParser(source, name).parse()


class _KernelParser:
    """Parses the body of one entry."""

    def __init__(self, source: Source, name: str) -> None:
        self.source = source
        self.kernel = Kernel(name)

    def parse(self) -> Kernel:
        body = self.source.entries[self.kernel.name]
        head = re.search(rf"\.entry\s+{NAME}\s*(?:\((.*?)\))?([^()]*)$", body.head, re.S)
        if not head:
            raise PTXError(f"cannot parse {body.head!r}")
        for declaration in split(head[1] or ""):
            self._parameter(declaration)
        self.kernel.required_block = self._block_size("reqntid", head[2])
        self.kernel.maximum_block = self._block_size("maxntid", head[2])
        self._body(body, (), {}, ())
        self._append(Instruction("exit", [], [], None, body.line, "(end of kernel)"))
        self._find_branch_targets()
        self._place_shared_variables()
        return self.kernel

    def _append(self, instruction: Instruction) -> None:
        self.kernel.instructions.append(instruction)

    def _parameter(self, declaration: str) -> None:
        declaration = re.sub(r"\.ptr\b(\s*\.(global|const|shared|local))?(\s*\.align\s+\d+)?", "", declaration)
        table: dict[str, Variable] = {}
        declare(declaration, table, self.source, self.kernel)
        (variable,) = table.values()
        variable.offset = align_up(self.kernel.parameter_bytes, variable.align)
        self.kernel.parameter_bytes = variable.offset + variable.nbytes
        self.kernel.parameters.append(variable)
        self.kernel.variables[variable.name] = variable

    @staticmethod
    def _block_size(directive: str, head: str) -> tuple[int, int, int] | None:
        found = re.search(rf"\.{directive}\s+([\d,\s]+)", head)
        if not found:
            return None
        x, y, z = ([int(size) for size in found[1].replace(",", " ").split()] + [1, 1])[:3]
        return x, y, z

    # Statements

    def _body(self, body: Body, scope: tuple[int, ...], names: dict[str, Any], calls: tuple[str, ...]) -> None:
        """Append the instructions of a body.

        names maps the registers and variables in scope; calls are the functions being inlined around this body.
        """
        kernel, text = self.kernel, body.text
        scopes, tables = [scope], [names]
        position = line_position = 0
        line = body.line
        while True:
            # Here a brace opens or closes a scope; the braces of a vector operand are inside of a statement.
            position = _SPACE.match(text, position).end()  # type: ignore[union-attr]
            if position >= len(text):
                return
            if text[position] == "{":
                kernel.scopes += 1
                scopes.append((*scopes[-1], kernel.scopes))
                tables.append(dict(tables[-1]))
                position += 1
                continue
            if text[position] == "}":
                scopes.pop()
                tables.pop()
                position += 1
                continue
            token = _TOKEN.match(text, position)
            if not token:
                raise PTXError(f"cannot parse PTX near: {text[position : position + 80]!r}")
            line += text.count("\n", line_position, position)
            line_position, position = position, token.end()
            if token[1]:
                kernel.labels[scopes[-1], token[1]] = len(kernel.instructions)
                continue
            statement = " ".join(token[2].split())
            if statement.startswith("."):
                self._directive(statement, tables[-1])
            elif statement:
                self._instruction(statement, line, scopes[-1], tables[-1], scope, calls)

    def _directive(self, statement: str, names: dict[str, Any]) -> None:
        kernel = self.kernel
        if statement.startswith(".reg"):
            self._declare_registers(statement, names)
        elif statement.startswith(".branchtargets"):
            here = len(kernel.instructions)
            name = next(name for (_, name), index in reversed(kernel.labels.items()) if index == here)
            kernel.branch_tables[name] = split(statement.split(None, 1)[1])
        elif statement.startswith(".param"):  # arguments and results of calls; local memory is good enough
            declare(statement.replace(".param", ".local", 1), names, self.source, kernel)
        else:
            declare(statement, kernel.variables, self.source, kernel)

    def _declare_registers(self, statement: str, names: dict[str, Any]) -> None:
        parts = re.match(r"\.reg\s*((?:\.\w+\s*)+)\s*(.*)$", statement)
        words = parts[1].replace(".", " ").split() if parts else []
        type_name = next((word for word in words if word in TYPES), None)
        if parts is None or type_name is None:
            raise Unsupported(statement)
        types = self.kernel.register_types
        for item in split(parts[2]):
            found = _REGISTERS.match(item)
            if not found:
                raise PTXError(f"cannot parse {statement!r}")
            count = found[2]
            for name in [found[1]] if count is None else [f"{found[1]}{i}" for i in range(int(count))]:
                names[name] = Register(len(types), type_name)
                types.append(type_name)

    def _instruction(
        self,
        statement: str,
        line: int,
        scope: tuple[int, ...],
        names: dict[str, Any],
        function_scope: tuple[int, ...],
        calls: tuple[str, ...],
    ) -> None:
        guard, source = None, statement
        if guarded := _GUARD.match(statement):
            guard, source = (names[guarded[2]], bool(guarded[1])), guarded[3]
        cut = _OPERANDS_FROM.search(source)  # there may be no space, as in "ld.b32{%r1},[..]"
        head, tail = (source[: cut.start()], source[cut.start() :]) if cut else (source, "")
        opcode, *modifiers = head.split(".")
        if opcode == "ret" and calls:  # of an inlined function
            end = [Label("$end")]
            self._append(Instruction("bra", ["uni"], end, guard, line, statement, function_scope))
        elif opcode == "call":
            call = _CALL.match(tail.strip())
            if not call or call[2].startswith("%"):
                raise Unsupported(f"line {line}: {statement}")
            instruction = Instruction("call", modifiers, [Label(call[2])], guard, line, statement, scope)
            if call[2] in self.source.functions:
                self._inline(instruction, split(call[1] or "") + split(call[3] or ""), names, calls)
            else:
                self._append(instruction)
        else:
            operands = [self._operand(text, names) for text in split(tail)]
            self._append(Instruction(opcode, modifiers, operands, guard, line, statement, scope))

    def _inline(
        self, instruction: Instruction, given: list[str], names: dict[str, Any], calls: tuple[str, ...]
    ) -> None:
        """Expand a call: what the function returns and takes becomes the variables that the caller gives."""
        name = instruction.operands[0].name
        if name in calls:
            raise Unsupported(f"recursive call of {name}")
        if instruction.guard is not None:
            raise Unsupported(f"predicated call of {name}")
        function = self.source.functions[name]
        declarations = function.returns + function.parameters
        if len(declarations) != len(given):
            raise PTXError(f"line {instruction.line}: argument count of {name}")
        inner = {}
        for declaration, argument in zip(declarations, given, strict=True):
            inner[re.findall(NAME, re.sub(r"\.\w+", "", declaration))[-1]] = names[argument]
        self.kernel.scopes += 1
        scope = (self.kernel.scopes,)
        self._body(function.body, scope, inner, (*calls, name))
        self.kernel.labels[scope, "$end"] = len(self.kernel.instructions)

    # Operands

    def _operand(self, text: str, names: dict[str, Any]) -> Any:
        known = names.get(text)
        if known is not None:
            return Symbol(known) if isinstance(known, Variable) else known
        if text.startswith("{"):
            return Vector([self._operand(item, names) for item in split(text[1:-1])])
        if text.startswith("["):
            parts = _ADDRESS.match(text[1:-1].strip())
            if not parts:
                raise Unsupported(f"address {text}")
            return Address(self._operand(parts[1], names), int(parts[2].replace(" ", ""), 0) if parts[2] else 0)
        if "|" in text:
            return Vector([self._operand(item.strip(), names) for item in text.split("|")])
        if text == "_":
            return None
        if text.startswith("!") and text[1:].strip() in names:
            return Negated(names[text[1:].strip()])
        number = parse_number(text)
        if number is not None:
            return number
        variable = self._variable(text)
        if variable is not None:
            return Symbol(variable)
        parts = _SYMBOL_PLUS.match(text)
        if parts and self._variable(parts[1]) is not None:
            return Address(self._operand(parts[1], names), int(parts[2]))
        if text.startswith("%"):
            return SpecialRegister(text[1:])
        return Immediate(WARP) if text == "WARP_SZ" else Label(text)

    def _variable(self, name: str) -> Variable | None:
        variables = self.kernel.variables
        if name not in variables and name in self.source.variables:
            variable = self.source.variables[name]
            if variable.space != "shared":
                return variable
            variables[name] = dataclasses.replace(variable)  # its offset is another in each kernel that uses it
        return variables.get(name)

    def _find_branch_targets(self) -> None:
        kernel = self.kernel
        for instruction in kernel.instructions:
            if instruction.opcode == "bra":
                instruction.target = kernel.find_label(instruction.scope, instruction.operands[0].name)
            elif instruction.opcode == "brx":
                labels = kernel.branch_tables[instruction.operands[1].name]
                instruction.targets = [kernel.find_label(instruction.scope, label) for label in labels]

    def _place_shared_variables(self) -> None:
        """Give the shared variables their offsets: those with a size first, then the dynamic memory behind them."""
        shared = [variable for variable in self.kernel.variables.values() if variable.space == "shared"]
        top = 0
        for variable in shared:
            if not variable.is_extern:
                variable.offset = align_up(top, variable.align)
                top = variable.offset + variable.nbytes
        for variable in shared:
            if variable.is_extern:
                variable.offset = top = align_up(top, variable.align)
        self.kernel.shared_bytes = top
