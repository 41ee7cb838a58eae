"""The machine code of compiled kernels, read by cuobjdump, which the CUDA toolkit has and Triton brings along."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from simulated_cuda import CSRC, NVCC_FLAGS


@functools.cache
def cuobjdump() -> str | None:
    """The program, from the toolkit or from Triton."""
    if path := shutil.which("cuobjdump"):
        return path
    spec = importlib.util.find_spec("triton")
    for folder in spec.submodule_search_locations or () if spec else ():
        path = Path(folder, "backends", "nvidia", "bin", "cuobjdump")
        if path.is_file():
            return str(path)
    return None


needs_cuobjdump = pytest.mark.skipif(cuobjdump() is None, reason="cuobjdump is not installed")


@dataclass(frozen=True)
class Instruction:
    """One instruction, as cuobjdump prints it."""

    opcode: str
    text: str  # predicate and operands too
    control: int  # what tells the scheduler when it may be issued, the upper half of its encoding
    target: int | None  # the index that it may branch to,
    conditional: bool  # and whether it may not

    # The layout of the control bits, which NVIDIA does not document, is known since Volta.
    @property
    def stall(self) -> int:
        """Cycles until the warp's next instruction."""
        return self.control >> 41 & 15

    @property
    def opens_done(self) -> int | None:
        """The barrier, of six, that is closed until the result is there,"""
        return _barrier(self.control >> 46 & 7)

    @property
    def opens_read(self) -> int | None:
        """and the one until the operands have been read."""
        return _barrier(self.control >> 49 & 7)

    @property
    def waits(self) -> tuple[int, ...]:
        """The barriers that must be open."""
        return tuple(barrier for barrier in range(6) if self.control >> 52 + barrier & 1)


def _barrier(number: int) -> int | None:
    return None if number == 7 else number


@dataclass
class Code:
    """One kernel's machine code."""

    name: str
    registers: int
    stack: int
    instructions: list[Instruction]

    @functools.cached_property
    def opcodes(self) -> list[str]:
        return [each.opcode for each in self.instructions]

    def count(self, *patterns: str) -> int:
        return sum(bool(re.match(pattern, opcode)) for opcode in self.opcodes for pattern in patterns)

    @property
    def double(self) -> int:
        """How many instructions compute in float64 or convert from or to it."""
        arithmetic = (r"D(ADD|MUL|FMA|SETP|MNMX)", r"MUFU.*64H")
        return self.count(*arithmetic, r"F2F\.F(32\.F64|64\.F32)", r"I2F\.F64", r"F2I.*F64")

    @functools.cached_property
    def block_ends(self) -> dict[int, int]:
        """Where the blocks end, instructions that follow one another without a branch, by where they begin."""
        code = self.instructions
        ends = {i + 1 for i, each in enumerate(code) if each.target is not None or each.opcode == "EXIT"}
        bounds = sorted(ends | {each.target for each in code if each.target is not None} | {0, len(code)})
        return dict(itertools.pairwise(bounds))

    def block(self, begin: int) -> list[Instruction]:
        return self.instructions[begin : self.block_ends.get(begin, begin)]

    def after(self, begin: int) -> list[int]:
        """Where the blocks begin that may come after one."""
        last = self.block_ends[begin] - 1
        to = self.instructions[last].target
        if to is None:
            return [last + 1]
        return [last + 1, to] if self.instructions[last].conditional else [to]

    def ways(
        self, back: int, is_left_out: Callable[[int], bool], features: Sequence[str], longest: bool = False
    ) -> dict[tuple[int, ...], list[Instruction]]:
        """The shortest (or longest) ways through a loop, from where its last branch, at index ``back``, leads to, and
        not through blocks that are left out: one for each count of instructions in whose text the features, regular
        expressions, are found."""
        known: dict[int, dict[tuple[int, ...], list[Instruction]]] = {}

        def rest(begin: int) -> dict[tuple[int, ...], list[Instruction]]:
            if begin not in known:
                known[begin] = {}  # while it is looked for: who comes here again has gone in a circle
                its = self.block(begin)
                found = tuple(sum(bool(re.search(feature, each.text)) for each in its) for feature in features)
                best = {}
                if self.block_ends[begin] - 1 == back:  # where before compute capability 9.0 the loop is left by a call
                    best[found] = its
                elif not is_left_out(begin):
                    for way in map(rest, self.after(begin)):
                        for others, following in way.items():
                            counts = tuple(map(sum, zip(found, others, strict=True)))
                            turn = its + following
                            if counts not in best or (len(turn) > len(best[counts])) == longest:
                                best[counts] = turn
                known[begin] = best
            return known[begin]

        start = self.instructions[back].target
        assert start is not None
        return rest(start)

    def turns(
        self, *features: str, longest: bool = False, zeros: bool = False
    ) -> dict[tuple[int, ...], list[Instruction]]:
        """The shortest (or longest) turns of the CUDA step's loop (see `ways`), over all ways through it that touch
        whole packets only and nothing that is for the rare operands of divisions and roots, unless `zeros` lets zeros
        be among them, or for state that is a NaN.

        Rare operands are known by what the compiler puts beside its own divisions and roots: a check, or a call; zeros
        by a branch on a comparison with 0; and state that may be a NaN by the comparisons with itself, of at least two
        numbers in four lanes.
        """
        code = self.instructions
        wide = [i for i, opcode in enumerate(self.opcodes) if re.match(r"(LDG|STG).*\.128", opcode)]
        back = next(
            i for i, each in enumerate(code) if each.target is not None and i > wide[-1] and each.target <= wide[0]
        )  # the branch at the loop's end

        def asks_for_zero(begin: int) -> bool:
            *before, last = self.block(begin)
            predicate = re.search(r"P\d", last.text) if last.target is not None and last.conditional else None
            sets = [each.text for each in before if predicate and re.search(rf"[A-Z]\S* {predicate[0]},", each.text)]
            return bool(sets) and re.search(r"FSETP\.(NEU|EQ)\S* P\d, PT, \S+, RZ,", sets[-1]) is not None

        def is_left_out(begin: int) -> bool:
            its = [each.opcode for each in self.block(begin)]
            narrow = any(re.match(r"(LDG|STG)(?!.*\.128)", op) for op in its)
            of_root = sum(op.startswith("MUFU.RSQ") for op in its) == 1
            following = [each.opcode for next_one in self.after(begin) for each in self.block(next_one)]
            called = of_root and any(op.startswith("CALL") for op in following)
            asks_for_nan = sum(op.startswith("FSETP.NAN") for op in its) >= 8
            asks = asks_for_nan or (not zeros and asks_for_zero(begin))
            return narrow or called or asks or any(op.startswith(("FCHK", "CALL", "EXIT")) for op in its)

        return self.ways(back, is_left_out, features, longest)

    def triton_turns(self, *features: str) -> dict[tuple[int, ...], list[Instruction]]:
        """The shortest turns of the Triton step's loop (see `ways`) over blocks that are whole, without calls for the
        rare operands of divisions and roots."""
        code, opcodes = self.instructions, self.opcodes
        narrow = r"(LDG|STG)(?!.*\.(64|128))"

        def steps(i: int) -> bool:
            inside = opcodes[code[i].target or 0 : i]
            return any(op.startswith("MUFU") for op in inside) and any(op.startswith("STG") for op in inside)

        loops = [i for i, each in enumerate(code) if each.target is not None and each.target <= i and steps(i)]
        back = min(loops, key=lambda i: i - (code[i].target or 0))  # the innermost: around it is the chunks'

        def is_left_out(begin: int) -> bool:
            return any(re.match(rf"CALL|EXIT|{narrow}", each.opcode) for each in self.block(begin))

        return self.ways(back, is_left_out, features)

    def turn(self) -> tuple[int, int]:
        """The fewest and the most instructions of a turn, see `turns`."""
        (fewest,), (most,) = self.turns().values(), self.turns(longest=True).values()
        return len(fewest), len(most)

    @property
    def uses_local_memory(self) -> bool:
        return self.stack > 0 or self.count(r"LDL", r"STL") > 0


def run(*command: str) -> str:
    """A command's output."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def read(cubin: Path) -> list[Code]:
    """The kernels of a file that ptxas made, under their mangled names."""
    program = cuobjdump()
    assert program is not None
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", run(program, "-res-usage", str(cubin)))
    used = {name: (int(registers), int(stack)) for name, registers, stack in usage}
    codes = []
    for part in run(program, "-sass", str(cubin)).split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        # Operands end where older programs print what the scheduler is told: "&req={0} ?trans5".
        operands = r"([^;&?]*)[^;]*;"
        pattern = r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?\s*([A-Z][\w.]*)" + operands
        pattern += r"\s+/\* 0x\w+ \*/\s+/\* (0x\w+) \*/"
        lines = re.findall(pattern, body)
        place = {int(address, 16): i for i, (address, *_) in enumerate(lines)}
        instructions = []
        for _, predicate, opcode, operands, control in lines:
            branch = re.search(r"(0x[0-9a-f]+)\s*$", operands) if opcode.startswith("BRA") else None
            target = place[int(branch[1], 16)] if branch else None
            conditional = bool(predicate) or "," in operands or opcode != "BRA"  # BRA.DIV: where threads diverge
            text = f"{predicate}{opcode}{operands}"
            instructions.append(Instruction(opcode, text, int(control, 16), target, conditional))
        codes.append(Code(name.strip(), *used[name.strip()], instructions))
    return codes


def compile_kernels(source: str, arch: str, folder: Path) -> list[Code]:
    """The kernels of csrc/cuda/{source}.cu, under names like "step_kernel<0, float, float, BFloat16, float, false>"."""
    cubin = folder / f"{source}.{arch}.cubin"
    run("nvcc", *NVCC_FLAGS, f"-arch={arch}", "-cubin", str(CSRC / "cuda" / f"{source}.cu"), "-o", str(cubin))
    codes = read(cubin)
    for code, plain in zip(codes, run("c++filt", *(code.name for code in codes)).splitlines(), strict=True):
        plain = plain.replace("(maxva::Algorithm)", "").replace("maxva::", "")
        code.name = re.sub(r"^void cuda::|(?<=>)\(.*$", "", plain)
    return codes
