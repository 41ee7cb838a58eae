"""Where in the text a step is, as a pure function of the step: nothing to save, nothing that can go out of step.

The learning rate of each phase is `maxva_kernels.recipe`'s.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """One stretch of training at one sequence length, as in BERT's recipes (short sequences first, then long)."""

    seq_len: int  # tokens
    batch: int  # sequences per optimizer step, over all ranks and micro-batches
    steps: int  # optimizer steps
    start: int = 0  # steps before this phase
    first_sample: int = 0  # sequences before this phase


def phases(seq_len: list[int], batch: list[int], steps: list[int]) -> list[Phase]:
    """The phases one after another, from settings with one value a phase."""
    result: list[Phase] = []
    start = sample = 0
    for values in zip(seq_len, batch, steps, strict=True):
        result.append(Phase(*values, start=start, first_sample=sample))
        start += result[-1].steps
        sample += result[-1].steps * result[-1].batch
    return result


def phase_of(step: int, phases: list[Phase]) -> Phase:
    return next(phase for phase in phases if step < phase.start + phase.steps)
