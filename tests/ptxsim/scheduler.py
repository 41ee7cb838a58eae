"""Runs the threads of a wave to their end.

Threads are kept in groups by program counter (the index of their next instruction). The group with the smallest one
runs first, which brings the threads of structured code together again.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .access import forget_accesses
from .errors import PTXError
from .syntax import Instruction, Kind
from .types import WARP
from .wave import Wave

_PLAIN, _BRANCH, _WARP, _EXIT, _TABLE_BRANCH = Kind.PLAIN, Kind.BRANCH, Kind.WARP, Kind.EXIT, Kind.TABLE_BRANCH


class Scheduler:
    """The groups of threads of a wave."""

    def __init__(self, wave: Wave) -> None:
        self.wave = wave
        self.ready: dict[int, np.ndarray] = {0: wave.live.copy()}  # program counter -> mask
        self.blocked: set[int] = set()  # groups that wait for other threads of their warps to arrive
        # Program counter behind a barrier -> mask of those that wait at it, and the barrier.
        self.waiting: dict[int, tuple[np.ndarray, Instruction]] = {}
        self.steps = 0

    def run(self) -> None:
        """Run until all threads have exited."""
        while self.ready or self.waiting:
            runnable = [pc for pc in self.ready if pc not in self.blocked]
            if not runnable:
                self._deadlock()
            pc = min(runnable)
            self._run_group(pc, self.ready.pop(pc))
        self.wave.stats.issues += self.steps

    def _run_group(self, pc: int, mask: np.ndarray) -> None:
        """Run a group until its threads part, wait, or let another group go first."""
        wave, ready = self.wave, self.ready
        instructions, counts = wave.kernel.instructions, wave.stats.counts
        active: Any = np.flatnonzero(mask)  # the lanes of the group, None for all lanes
        count = active.size
        # Arithmetic may run on all lanes where the others have exited: that is faster than picking some.
        compute: Any = None if count == np.count_nonzero(wave.live) else active
        if count == wave.size:
            active = None
        alone = True
        while True:
            if not alone and pc in ready:  # join the group that is here
                self._push(pc, mask)
                return
            alone = False
            instruction = wave.current = instructions[pc]
            kind = instruction.kind
            self._count_step(active)
            taking, computing, taken = active, compute, count
            if instruction.guard is not None:
                passes = self._guard(instruction, active)
                taken = int(np.count_nonzero(passes))
                if taken != count:
                    taking = computing = np.flatnonzero(passes) if active is None else active[passes]
            if kind is _BRANCH:
                counts[pc] += count
                if taken == 0:
                    pc += 1
                    continue
                if taken < count:
                    branching = wave.mask(taking)
                    self._push(instruction.target, branching)
                    self._push(pc + 1, mask & ~branching)
                    return
                pc = instruction.target
                if self._must_yield(pc):
                    self._push(pc, mask)
                    return
                continue
            if taken == 0:
                pc += 1
                continue
            if kind is _PLAIN:
                counts[pc] += taken
                instruction.execute(wave, computing, taking)  # type: ignore[misc]
                pc += 1
                continue
            if kind is _WARP:
                if not self._members_present(instruction, taking):
                    ready[pc] = mask
                    self.blocked.add(pc)
                    return
                counts[pc] += taken
                instruction.execute(wave, computing, taking)  # type: ignore[misc]
                pc += 1
                continue
            counts[pc] += taken
            leaving = mask
            if taken < count:
                leaving = wave.mask(taking)
                self._push(pc + 1, mask & ~leaving)
            self._leave(instruction, pc, leaving)
            return

    def _count_step(self, active: Any) -> None:
        self.steps += 1
        if self.steps > self.wave.launch.options.max_steps:
            message = "max_steps exceeded (an endless loop, or blocks that wait for each other?)"
            self.wave.fail(message, self.wave.lanes(active)[0])

    def _guard(self, instruction: Instruction, active: Any) -> np.ndarray:
        """Which of the active lanes pass the guard of an instruction."""
        register, negated = instruction.guard  # type: ignore[misc]
        passes = self.wave.register(register.slot)
        if active is not None:
            passes = passes[active]
        return ~passes if negated else passes

    def _leave(self, instruction: Instruction, pc: int, mask: np.ndarray) -> None:
        """Threads exit, wait at a barrier, or branch by a table."""
        if instruction.kind is _EXIT:
            self.wave.live &= ~mask
            self.blocked.clear()  # those who wait for these threads look again
            self._release()
        elif instruction.kind is _TABLE_BRANCH:
            self._branch_by_table(instruction, mask)
        else:
            others = self.waiting.get(pc + 1)
            self.waiting[pc + 1] = (mask if others is None else others[0] | mask, instruction)
            self._release()

    def _branch_by_table(self, instruction: Instruction, mask: np.ndarray) -> None:
        lanes = np.flatnonzero(mask)
        index = np.broadcast_to(instruction.selector(self.wave, lanes), lanes.shape)  # type: ignore[misc]
        outside = index >= len(instruction.targets)
        if outside.any():
            self.wave.fail("brx.idx index out of range", lanes[np.argmax(outside)])
        for i, target in enumerate(instruction.targets):
            part = lanes[index == i]
            if part.size:
                self._push(target, self.wave.mask(part))

    def _push(self, pc: int, mask: np.ndarray) -> None:
        """Add threads to the group at a program counter."""
        if pc in self.ready:
            self.ready[pc] |= mask
            self.blocked.discard(pc)
        else:
            self.ready[pc] = mask.copy()

    def _must_yield(self, pc: int) -> bool:
        """Whether another group is to run before one that jumped here, or is here."""
        return any(other <= pc and other not in self.blocked for other in self.ready) or pc in self.ready

    def _release(self) -> None:
        """Let go every block whose live threads all wait at one barrier; threads that exited do not count."""
        if not self.waiting:
            return
        wave = self.wave
        live = wave.threads_per_block(wave.live)
        for pc, (mask, barrier) in list(self.waiting.items()):
            arrived = wave.threads_per_block(mask)
            complete = (arrived > 0) & (arrived == live)
            if not complete.any():
                continue
            going = mask & complete[wave.block_of_lane]
            wave.current = barrier
            lanes = np.flatnonzero(going)
            barrier.execute(wave, lanes, lanes)  # type: ignore[misc]
            if wave.launch.options.racecheck:
                forget_accesses(wave, np.flatnonzero(complete))
            staying = mask & ~going
            if staying.any():
                self.waiting[pc] = (staying, barrier)
            else:
                del self.waiting[pc]
            self._push(pc, going)

    def _members_present(self, instruction: Instruction, active: Any) -> bool:
        """Whether all threads that a .sync instruction names are here; otherwise it has to wait for more."""
        wave = self.wave
        lanes = wave.lanes(active)
        mask = instruction.members(wave, active)  # type: ignore[misc]
        named = np.broadcast_to(np.asarray(mask), lanes.shape).astype(np.uint64)
        if active is None and (named == 0xFFFFFFFF).all():
            return True
        itself = (named >> (lanes % WARP).astype(np.uint64)) & np.uint64(1)
        if not itself.all():
            wave.fail("the mask does not name the calling thread", lanes[np.argmin(itself)])
        warp = lanes // WARP
        missing = named & ~wave.warp_bits(wave.mask(active))[warp]
        if not missing.any():
            return True
        alive = wave.warp_bits(wave.live)[warp]
        gone = missing & ~alive
        if gone.any() and wave.launch.options.strict:
            wave.fail("the mask names threads that have exited or do not exist", lanes[np.argmax(gone != 0)])
        return not (missing & alive).any()

    def _deadlock(self) -> None:
        instructions = self.wave.kernel.instructions
        groups = list(self.waiting.values()) + [(mask, instructions[pc]) for pc, mask in self.ready.items()]
        places = [f"{np.count_nonzero(mask)} threads at PTX line {at.line}: {at.text}" for mask, at in groups]
        raise PTXError(
            f"{self.wave.kernel.name}: deadlock; threads of one block or warp wait at different places:\n  "
            + "\n  ".join(places)
        )
