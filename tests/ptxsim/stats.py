"""What a launch did: instructions, memory traffic, coverage."""

from __future__ import annotations

import numpy as np

from .syntax import Kernel


class Stats:
    """Counts of one launch."""

    def __init__(self, kernel: Kernel, grid: tuple[int, int, int], block: tuple[int, int, int]) -> None:
        self.kernel, self.grid, self.block = kernel, grid, block
        self.counts = np.zeros(len(kernel.instructions), np.int64)  # executions of each instruction, over all threads
        self.issues = 0  # steps of the simulator, each for many threads
        self.access: dict[tuple[str, str, int], int] = {}  # (space, "ld" | "st" | "atom", bytes) -> accesses
        self.buffer_bytes: dict[tuple[str, str], int] = {}  # (name of the buffer, "ld" | "st" | "atom") -> bytes
        self.sectors = {"ld": 0, "st": 0}  # of 32 bytes, with coalescing=True

    def add_access(self, space: str, kind: str, width: int, count: int) -> None:
        """Count accesses of width bytes."""
        key = (space, kind, width)
        self.access[key] = self.access.get(key, 0) + count

    def add_buffer_bytes(self, name: str, kind: str, nbytes: int) -> None:
        """Count bytes moved to or from a buffer."""
        key = (name, kind)
        self.buffer_bytes[key] = self.buffer_bytes.get(key, 0) + nbytes

    def bytes(self, kind: str, space: str = "global") -> int:
        """Bytes moved by "ld", "st" or "atom" in a state space, over all threads."""
        return sum(width * count for width, count in self.widths(kind, space).items())

    def widths(self, kind: str, space: str = "global") -> dict[int, int]:
        """{bytes of an access: number of accesses}."""
        return {width: n for (where, what, width), n in sorted(self.access.items()) if (where, what) == (space, kind)}

    def opcodes(self) -> dict[str, int]:
        """{instruction with its modifiers: executions}, the most frequent first."""
        result: dict[str, int] = {}
        for instruction, count in zip(self.kernel.instructions, self.counts, strict=True):
            key = ".".join([instruction.opcode, *instruction.modifiers])
            result[key] = result.get(key, 0) + int(count)
        return dict(sorted(result.items(), key=lambda item: -item[1]))

    @property
    def thread_instructions(self) -> int:
        """Executed instructions, over all threads."""
        return int(self.counts.sum())

    def uncovered(self) -> list[tuple[int, str]]:
        """The instructions that never ran: (line, text)."""
        # The last one is the end of the kernel, which the parser added.
        pairs = zip(self.kernel.instructions[:-1], self.counts[:-1], strict=True)
        return [(instruction.line, instruction.text) for instruction, count in pairs if count == 0]

    def report(self) -> str:
        """A summary to print."""
        lines = [
            f"{self.kernel.name} grid {self.grid} block {self.block}: "
            f"{self.thread_instructions} thread instructions, {self.issues} steps"
        ]
        for kind in ("ld", "st", "atom"):
            if self.bytes(kind):
                widths = ", ".join(f"{count} x {width}B" for width, count in self.widths(kind).items())
                sectors = f", {self.sectors[kind]} sectors" if self.sectors.get(kind) else ""
                lines.append(f"  global {kind}: {self.bytes(kind)} bytes ({widths}){sectors}")
        lines += [f"    {name}: {kind} {nbytes} bytes" for (name, kind), nbytes in sorted(self.buffer_bytes.items())]
        return "\n".join(lines)
