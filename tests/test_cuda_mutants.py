"""Would the tests notice a wrong kernel? Step kernels with one instruction of their PTX changed, which a check must
refuse that looks at what the other tests look at: bits against the CPU's, how often each byte is read and written, and
in what widths.

When all were last tried, before there were trust ratios, it refused 1,529 of 1,700 mutants of the float32 kernel; 159
more are EQUIVALENT, and the last 12 change nothing either (another thread does what one is to do, a value that nobody
reads). Of the 3,057 of the bfloat16 kernel it refused 2,711; 331 and 15.
"""

from __future__ import annotations

import functools
import random
import re

import numpy as np
import pytest
import torch
from cases import BASE, bits, needs_cpu_kernels
from ptxsim import Module, PTXError
from ptxsim.mutate import Mutant, mutants
from simulated_cuda import SimulatedLauncher, module, needs_compilers, ptx, step_entry
from twins import at_offset

from maxva_kernels import gpu
from maxva_kernels.backends import cpu
from maxva_kernels.groups import Group, Hyperparameters, Scaling, TensorLists
from maxva_kernels.launch import DTYPE_CODES, PACKED_GROUP, StepLaunch, pack
from maxva_kernels.tensor_table import STEP_COLUMNS, make_step_table

pytestmark = [needs_compilers, needs_cpu_kernels, pytest.mark.simulated]

SAMPLE: int | None = 60  # mutants of each kernel that a run tries; None: all, which takes some 20 minutes
CAUGHT = 0.95
KERNELS = [(torch.float32, torch.float32, False), (torch.bfloat16, torch.bfloat16, True)]  # True: LaMAdam

CHUNK = 8192
LISTS = ("params", "grads", "exp_avgs", "grad_means", "grad_vars", "weight_sums", "max_denoms", "steps")
OPERANDS = LISTS[:-1]
STEPS = (0, 1, 6, 1000, 2**33 + 1)

# What flushes and conversions turn on. Drawn independently for each operand.
SPECIAL = (0.0, -0.0, 1.0, 2.0**-126, -(2.0**-126), 2.0**-149, 3e38, -1e-20, torch.inf, torch.nan)
WEIGHTS = (0.0, 1.0, 1 - 2.0**-14, 1 - 2.0**-15, 0.5, torch.nan)

# Where both sides of a comparison are equal, or as near as its mutants: values of the operands, in their order. With
# RANGE_TO_1, w stays what it is where the gradient's deviation is what it was before or less.
TINY = 2.0**-126
EDGES = [
    (0.0, 1.0, 0.0, 0.5, 0.25, 1 - 2.0**-14, 0.0),  # 1 - w is the saturation
    (0.0, 1.0, 0.0, 1.0, TINY, 0.5, 0.0),  # the variance is the smallest that is kept
    (0.0, 1.0, 0.0, 1.0, 1.25 * TINY, 0.5, 0.0),
    (0.0, TINY, 0.0, TINY, 0.0, 0.5, 0.0),  # so is the mean
    (0.0, -1.25 * TINY, 0.0, -1.25 * TINY, 0.0, 0.5, 0.0),
    (0.0, 0.0, 2 * TINY, 0.0, 0.0, 0.5, 0.0),  # and the momentum
    (0.0, 0.0, 2.5 * TINY, 0.0, 0.0, 0.5, 0.0),
    (0.0, 0.0, 0.0, 0.0, 0.0, 0.5, -0.0),  # the maximum is not exceeded
]
EACH = 8  # times in a row: the elements of a thread have code of their own, also where they lie 256 apart

# A launch: for each group its options, and for each tensor of it a size and where operands begin, all of them at one
# offset, or those named elsewhere than the others. None: it has no gradient.
Groups = list[tuple[dict, list[tuple[int, "int | dict[str, int] | None"]]]]
L2_MAX = {"amsgrad": True, "decoupled_weight_decay": False, "eps_mode": "adam", "maximize": True}
FIXED_MAX = {"amsgrad": True, "weight_decay": 0.0, "beta1": 0.0, "beta2_range": (0.9, 0.9), "eps": 0.0}
RANGE_TO_1 = {"amsgrad": True, "beta2_range": (0.5, 1.0), "beta1": 0.5, "decoupled_weight_decay": False}
SMALL: Groups = [
    ({}, [(0, 0), (1, 1), (700, 0), (50, 3)]),
    (L2_MAX, [(21 + 2 * shift, shift) for shift in range(8)]),  # begins and ends at each place of a packet
    (FIXED_MAX, [(40, {name: 1}) for name in OPERANDS]),
    (RANGE_TO_1, [(len(EDGES) * EACH, 0), (2048, {"grads": 1})]),
]
LARGE: Groups = [
    ({"amsgrad": True}, [(CHUNK + 1, 0), (30, None), (CHUNK, 3)]),
    (FIXED_MAX, [(2100, {"grads": 1}), (CHUNK + 45, 3)]),
]
SCALED: Groups = [
    ({"maximize": True}, [(300, 0), (9, None), (1, 0)]),
    ({**L2_MAX, "lr": 0.3}, [(90, 1)]),
    ({**FIXED_MAX, "lr": 0.01}, [(0, None if i % 7 == 3 else 0) for i in range(1000)] + [(1, 0)]),
]
FEW: Groups = [({"maximize": True}, [(60, 0)]), (L2_MAX, [(9, 1)])]
FAR: Groups = [(L2_MAX, [(CHUNK + 45, 0)])]
# For these, of each tensor the count of its steps, its w, and of each chunk what its stamp is too much; None: 0.
ONES: Groups = [
    ({}, [(CHUNK + 45, 3), (60, 0), (30, 0), (90, 1)]),
    (L2_MAX, [(CHUNK + 45, 0), (50, 2), (40, 0), (21, 1)]),
]
STAMPS: list[tuple[int, float, tuple[int | None, ...]]] = [
    (0, 1.0, (0, -3)),  # as of a chunk without shift
    (15, 1.0, (None,)),  # is searched
    (6, 1.0, (8,)),  # for the next step
    (31, 0.5, (-8,)),  # for the last one; searched in vain
    (15, 1.0, (0, 1)),
    (2**33 + 1, 1.0, (0,)),
    (14, 0.5, (None,)),
    (16, 1.0, (None,)),  # would be searched one step earlier, or later
]
MANY: Groups = [({}, [(0, None if i % 5 == 3 else 0) for i in range(2100)])]


NO_SCALING = Scaling()


class Scenario:
    """A launch that can be repeated, and what must come of it."""

    def __init__(
        self,
        variant: tuple[torch.dtype, torch.dtype, bool],
        groups: Groups,
        scaling: Scaling = NO_SCALING,
        *,
        rates_by_address: bool = False,
        one_by_one: bool = False,
        skipped: int = 0,
        stamps: list[tuple[int, float, tuple[int | None, ...]]] | None = None,
    ) -> None:
        """one_by_one: the blocks. skipped: chunks before those of the (one) tensor. stamps: as STAMPS, or there are
        none."""
        self.scaling, self.one_by_one = scaling, one_by_one
        self.variant, (self.param_dtype, self.grad_dtype, self.laprop) = variant, variant
        self.generator = torch.Generator().manual_seed(0)
        self.groups = [
            Group(Hyperparameters(**{**BASE, **options}), self._tensors(tensors, options))
            for options, tensors in groups
        ]
        self.stamps = self.stamps_before = self.stamps_after = torch.zeros(0, dtype=torch.int32)
        self.reads_of_w: dict[str, list[tuple[int, int]]] = {}  # by buffer: (elements, how often each is read)
        if stamps is not None:
            self._stamp(stamps)
        everything = [t for group in self.groups for name in LISTS for t in getattr(group.tensors, name)]
        self.memory = [tensor for tensor in everything if tensor is not None and tensor.numel()]
        self.before = [tensor.clone() for tensor in self.memory]
        cpu.step(self.groups, self.laprop, scaling)
        self.after = [bits(tensor).clone() for tensor in self.memory]
        self.only: dict[str, tuple[int, int]] = {}
        self._make_arguments(rates_by_address, skipped)
        self.widths: list[dict[int, int]] = []
        self.check({})

    def _tensors(self, tensors: list, options: dict) -> TensorLists:
        lists = TensorLists()
        for i, (numel, offsets) in enumerate(tensors):
            for name in OPERANDS if "amsgrad" in options else OPERANDS[:-1]:
                dtype = {"params": self.param_dtype, "grads": self.grad_dtype}.get(name, torch.float32)
                value = self._edges(name, numel) if options is RANGE_TO_1 else self._draw(name, numel)
                at = offsets.get(name, 0) if isinstance(offsets, dict) else offsets or 0
                getattr(lists, name).append(at_offset(value.to(dtype), at))
            if offsets is None:
                lists.grads[-1] = None
            lists.steps.append(torch.tensor(STEPS[i % len(STEPS)]))
        return lists

    def _stamp(self, stamps: list[tuple[int, float, tuple[int | None, ...]]]) -> None:
        before, after = [], []
        lists = [group.tensors for group in self.groups]
        tensors = [pair for each in lists for pair in zip(each.weight_sums, each.steps, strict=True)]
        for i, ((weight_sum, step), (count, value, excesses)) in enumerate(zip(tensors, stamps, strict=True)):
            weight_sum.fill_(value)
            step.fill_(count)
            shift, reads = weight_sum.storage_offset(), []
            right = 8 * (count + 1) + shift
            for chunk, excess in enumerate(excesses):
                known, searched = excess == 0, excess != 0 and (count + 1) % 16 == 0
                before.append(0 if excess is None else right + excess)
                after.append(right + 8 if known or (searched and value == 1) else 0)
                begin, end = (max(0, (chunk + later) * CHUNK - shift) for later in (0, 1))
                reads.append((min(end, weight_sum.numel()) - begin, 0 if known else 1 + searched))
            self.reads_of_w[f"weight_sum{i}"] = reads
        self.stamps_before, self.stamps_after = (
            torch.tensor(each).to(torch.uint32).view(torch.int32) for each in (before, after)
        )
        self.stamps = self.stamps_before.clone()

    def _edges(self, name: str, numel: int) -> torch.Tensor:
        column = torch.tensor([edge[OPERANDS.index(name)] for edge in EDGES], dtype=torch.float64)
        return column.repeat_interleave(EACH).repeat(numel // (len(EDGES) * EACH))

    def _draw(self, name: str, numel: int) -> torch.Tensor:
        """Values of order 1, some of them special."""
        uniform, specials = name == "weight_sums", WEIGHTS if name == "weight_sums" else SPECIAL
        drawn = (torch.rand if uniform else torch.randn)(numel, generator=self.generator, dtype=torch.float64)
        which = torch.randint(0, 5 * len(specials), (numel,), generator=self.generator)
        for i, special in enumerate(specials):
            drawn[which == i] = special
        return drawn.abs() if name == "grad_vars" else drawn

    def _make_arguments(self, rates_by_address: bool, skipped: int) -> None:
        """What `SimulatedLauncher.step` is given."""
        self.table = make_step_table(self.groups, CHUNK, 2900, 64)
        ((_, state_dtype, segment, _),) = self.table.segments
        self.ticket = segment.memory[0][(segment.ticket - segment.rows) // 8]
        packed, _ = pack([group.hyper for group in self.groups], torch.float32, torch.device("cpu"))
        self.rates = torch.tensor([group.hyper.lr for group in self.groups])
        if rates_by_address:
            each = enumerate(PACKED_GROUP.iter_unpack(packed))
            packed = b"".join(PACKED_GROUP.pack(7.0, self.rates[g:].data_ptr(), *rest[2:]) for g, rest in each)
        all_grads = [grad for group in self.groups for grad in group.tensors.grads]
        grads = np.frombuffer(gpu._addresses(all_grads, self.grad_dtype, lambda: None), np.uint64).copy()
        if skipped:
            rows = segment.memory[0].numpy()
            for name, place in [*((n, STEP_COLUMNS.index(n)) for n in STEP_COLUMNS[:6]), ("grad", None)]:
                (tensor,) = getattr(self.groups[0].tensors, f"{name}s")
                self.only[f"{name}0"] = (tensor.data_ptr(), tensor.nbytes)
                before = skipped * CHUNK * tensor.element_size()
                if place is None:
                    grads[0] = (int(grads[0]) - before) % 2**64  # may lie below 0
                else:
                    rows[place] -= before
            rows[STEP_COLUMNS.index("numel")] += skipped * CHUNK
            rows[STEP_COLUMNS.index("first_chunk")] = -skipped
        ratios = self.scaling.trust_ratios
        if ratios is not None:  # as the kernel takes them; kept
            ratios = self.ratios = ratios.to(torch.float64 if self.param_dtype == torch.float64 else torch.float32)
        scalars = (self.scaling.grad_scale, self.scaling.found_inf, self.scaling.grad_norm)
        self.launch = StepLaunch(
            *(0, 0, *(DTYPE_CODES[d] for d in (self.param_dtype, self.grad_dtype, state_dtype)), self.laprop),
            *(segment.amsgrad, segment.masters),
            *(segment.rows, segment.chunk_rows, segment.chunks, segment.ticket, packed, grads.tobytes()),
            *(0 if scalar is None else scalar.data_ptr() for scalar in scalars),
            *(0 if ratios is None else ratios.data_ptr(), 0),  # no statistics
            *(self.stamps.data_ptr() if self.stamps.numel() else 0, 0, 0),  # no norms
            -1.0 if self.scaling.max_grad_norm is None else self.scaling.max_grad_norm,
        )

    def check(self, mutant: dict[str, Module]) -> None:
        """Raises AssertionError or PTXError unless the launch does what it should."""
        for tensor, value in zip(self.memory, self.before, strict=True):
            tensor.copy_(value)
        self.ticket.zero_()
        self.stamps.copy_(self.stamps_before)
        launcher = SimulatedLauncher(blocks=3, track=True)
        launcher.replace_module, launcher.only, launcher.max_steps = mutant, self.only, 100_000
        if self.one_by_one:
            launcher.max_lanes = 1
        launcher.step(self.launch)
        for tensor, value in zip(self.memory, self.after, strict=True):
            assert torch.equal(bits(tensor), value)
        assert torch.equal(self.stamps, self.stamps_after)
        (launch,) = launcher.launches
        widths = [launch.stats.widths(kind) for kind in ("ld", "st", "atom")]
        self.widths = self.widths or widths  # the first is the kernel as it is
        assert widths == self.widths
        runs = self.scaling.found_inf is None or self.scaling.found_inf == 0
        for name, buffer in launch.buffers.items():
            kind = name.rstrip("0123456789") + "s"
            if name in self.reads_of_w:
                elements, reads = zip(*self.reads_of_w[name], strict=True)
                expected = np.repeat(reads, np.array(elements) * 4)
                assert (buffer.reads == expected).all()
                assert (buffer.writes == (buffer.array.view(np.float32) != 1).repeat(4)).all()
            elif kind in OPERANDS:
                assert (buffer.reads == runs).all()
                assert (buffer.writes == (runs and kind != "grads")).all()
            elif kind == "tickets":
                assert (buffer.array == 0).all()
            elif kind not in ("steps", "saturations"):
                assert not buffer.writes.any()


@functools.cache
def scenarios(variant: tuple[torch.dtype, torch.dtype, bool]) -> list[Scenario]:
    """From the one that refuses most to the ones that few mutants reach."""
    scale, norm = torch.tensor(3.0), torch.tensor(5.0)
    return [
        Scenario(variant, FEW, Scaling(None, None, norm, 6.0)),  # no clip
        Scenario(variant, SMALL),
        Scenario(variant, SCALED, Scaling(scale, torch.tensor(0.0), norm, 0.7), rates_by_address=True, one_by_one=True),
        Scenario(variant, LARGE),
        Scenario(variant, ONES, stamps=STAMPS),
        Scenario(variant, FEW, Scaling(trust_ratios=torch.tensor([0.5, 3.0], dtype=torch.float64))),
        Scenario(variant, FEW, Scaling(None, torch.tensor(2.0), None, None)),  # nothing may happen
        Scenario(variant, FEW, Scaling(None, None, norm, 0.0)),  # a clip to nothing
        Scenario(variant, FEW, Scaling(scale, None, None, 0.0)),  # no norm, no clip
        Scenario(variant, FAR, skipped=2**20),
        Scenario(variant, MANY),  # nothing to do but to count
    ]


def entry_alone(variant: tuple[torch.dtype, torch.dtype, bool]) -> tuple[str, str, str]:
    """The source's name, its PTX without other kernels, which makes parsing cheap, and the kernel's name in it."""
    param_dtype, grad_dtype, laprop = variant
    source, name = step_entry(*(DTYPE_CODES[d] for d in (param_dtype, grad_dtype, torch.float32)), laprop)
    mangled = module(source)[1][name]
    head, *entries = re.split(r"(?=^\.visible \.entry)", ptx(source), flags=re.M)
    return source, head + next(text for text in entries if re.match(rf"\.visible \.entry {mangled}\b", text)), mangled


# Mutants that survive and change nothing: the instruction, what has become of it, and why that is the same.
EQUIVALENT = [
    (r"selp\.b32 .*, -1, ", r", -2, ", "any negative number says that an element is not there"),
    (r"setp\.lt\.s32 .*, 0;", r"le\.s32 .*, 0;|, 1;", "only a thread's first element can be the first of its chunk"),
    (r"setp\.lt\.s32 .*, %r\d+;", r"setp\.le", "a thread's first element is before the end: the loop has asked"),
    (r"setp\.[gl]t\.f32 .*, %f\d+;", r"setp\.[gl]e", "of two equal numbers it does not matter which is taken"),
    (r"mov\.b32\s+\{%rs\d+, %rs\d+\}, %r", r"mov\.b32 \{", "the other half of the pair is yet to be loaded"),
    (r"and\.b64 .*, 15;", r", 14;", "addresses of elements are even"),
]


def is_equivalent(mutant: Mutant) -> bool:
    pairs = ((re.search(before, mutant.original), re.search(after, mutant.changed)) for before, after, _ in EQUIVALENT)
    return any(all(pair) for pair in pairs)


def is_refused(variant: tuple[torch.dtype, torch.dtype, bool], source: str, text: str) -> bool:
    mutant = {source: Module(text)}
    try:
        for scenario in scenarios(variant):
            scenario.check(mutant)
    except (AssertionError, PTXError):
        return True
    return False


@pytest.mark.parametrize("variant", KERNELS, ids=str)
def test_mutants_are_caught(variant):
    """Guards the tests: what the check misses, they may miss as well."""
    source, text, name = entry_alone(variant)
    everyone = list(mutants(text, name))
    chosen = everyone if SAMPLE is None else random.Random(0).sample(everyone, SAMPLE)
    survivors = [mutant for mutant in chosen if not is_refused(variant, source, mutant.text)]
    missed = [mutant for mutant in survivors if not is_equivalent(mutant)]
    print(f"{len(chosen)} of {len(everyone)} mutants, {len(survivors)} survive, unexplained:", *missed, sep="\n")
    different = len(chosen) - len(survivors) + len(missed)
    assert len(missed) <= (1 - CAUGHT) * different, missed
    assert different >= 0.7 * len(chosen), survivors  # the list above must not explain everything
