"""The machine code of the CUDA kernels, as ptxas makes it for each architecture: what a GPU would execute."""

from __future__ import annotations

import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from sass import compile_kernels, needs_cuobjdump
from simulated_cuda import needs_nvcc

# What is compiled for which architecture: all for these, but of the kernels that round their state, which take long,
# those of two parameter dtypes (float16 differs from bfloat16 in a conversion).
SOURCES = ("step_float", "step_bfloat16", "step_half", "step_double", "grad_norm", "update_norm")
SOURCES += ("step_float_rounded", "step_bfloat16_rounded")
BUILDS = dict.fromkeys(("sm_80", "sm_90", "sm_100"), SOURCES)
# One machine language with one of the above, or older: for these the kernels that people use most.
BUILDS |= dict.fromkeys(("sm_75", "sm_86", "sm_89"), ("step_float", "step_bfloat16"))
BUILDS |= {"sm_120": ("step_float", "step_bfloat16", "step_float_rounded")}
KERNELS = {"step_double": 4, "grad_norm": 7 + 2, "update_norm": 4 + 2}  # of a source; of the others 12

# Of a thread. A multiprocessor has 65,536, for as many threads as csrc/cuda/step.cuh, Note [Blocks], asks for: 768
# where all is float32, 640 where all has 16 bits, else 512.
REGISTERS = {"step_kernel float32": 80, "step_kernel 16 bits": 96, "step_kernel": 128}
REGISTERS |= {"norm_chunks_kernel": 96, "norm_total_kernel": 64}
REGISTERS |= {"update_chunks_kernel float": 128, "update_chunks_kernel": 168, "update_total_kernel": 64}

# For one element, the most, by the types of parameter and state: where w is 1, and where it is not. An H200 copies
# 4.25 TB/s, and its 132 multiprocessors issue for 128 lanes at 1.755 GHz: 7 for each byte that an element moves.
INSTRUCTIONS = {
    ("float", "float"): (81, 121),  # of 250 and 305
    ("BFloat16", "float"): (90, 143),  # of 210 and 265
    ("Half", "float"): (80, 121),
    ("float", "BFloat16"): (96, 138),  # of 165 and 195
    ("BFloat16", "BFloat16"): (102, 158),  # of 125 and 155
}

pytestmark = [needs_nvcc, needs_cuobjdump]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """(architecture, kernel) for all kernels."""
    folder = tmp_path_factory.mktemp("sass")
    jobs = [(source, arch) for arch, sources in BUILDS.items() for source in sources]
    with ThreadPoolExecutor(2) as pool:
        codes = pool.map(lambda job: [(job[1], code) for code in compile_kernels(*job, folder)], jobs)
        return [pair for some in codes for pair in some]


def test_every_kernel_is_there(compiled):
    """Guards the parsing that the other tests rest on."""
    names = Counter(arch for arch, code in compiled)
    expected = {arch: sum(KERNELS.get(source, 12) for source in sources) for arch, sources in BUILDS.items()}
    assert names == expected
    assert all(len(code.opcodes) > 100 and code.count("EXIT") for _, code in compiled)


def test_no_local_memory(compiled):
    """Guards against spilled registers and arrays that the compiler could not keep in registers."""
    for arch, code in compiled:
        assert not code.uses_local_memory, (arch, code.name, code.stack)


def test_registers(compiled):
    """Guards the number of threads that a multiprocessor holds."""
    for arch, code in compiled:
        all_float = re.fullmatch(r"step_kernel<[01], float, float, float, float, false>", code.name)
        narrow = re.fullmatch(r"step_kernel<[01], float, BFloat16, (BFloat16|Half), BFloat16, false>", code.name)
        kind = " float32" if all_float else " 16 bits" if narrow else ""
        kind = " float" if re.fullmatch(r"update_chunks_kernel<[01], float>", code.name) else kind
        assert code.registers <= REGISTERS[code.name.split("<")[0] + kind], (arch, code.name, code.registers)


def test_updates_norm_asks_for_all_operands_at_once(compiled):
    """Guards against operands of 16 bits that are widened where they are loaded: each was waited for before the next
    was asked for, up to eight times in a turn."""
    for arch, code in compiled:
        if not re.fullmatch(r"update_chunks_kernel<[01], float>", code.name):
            continue
        loads, waits = [], []
        for begin in code.block_ends:
            under_way = set()
            for i, each in enumerate(code.block(begin), begin):
                if not under_way.isdisjoint(each.waits):
                    waits.append(i)
                if re.match(r"LDG.*[US]16", each.opcode):
                    under_way.add(each.opens_done)
                    loads.append(i)
        assert len(loads) >= 8 * 4  # operands, lanes
        assert not waits or max(loads) < min(waits), (arch, code.name, code.instructions[min(waits)].text)


def test_instructions_of_the_norm(compiled):
    """Guards the gradients' norm against becoming bound by instructions, as it was while each element was put to all
    three sums: an H200 has time for 14 an element of 16 bits, and of comparisons and integer instructions for 7."""
    for arch, code in compiled:
        if match := re.fullmatch(r"norm_chunks_kernel<float, (\w+)>", code.name):
            (turn,) = code.turns().values()
            elements = 4 * 16 // (4 if match[1] == "float" else 2)  # four packets
            assert 4 < len(turn) / elements <= 9, (arch, code.name, len(turn) / elements)


def test_accesses_are_128_bits_wide(compiled):
    """Guards against a body that the compiler cut in narrower loads or stores: each operand, once in each slice of
    the state, must be a 128-bit access, and all accesses must be to global memory by name."""
    for arch, code in compiled:
        assert code.count(r"LD\.", r"ST\.", r"LD$", r"ST$") == 0, f"{arch} {code.name}: generic accesses"
        if not code.name.startswith("step_kernel"):
            continue
        param, grad, of_state = re.findall(r"\w+", code.name.split("<")[1])[2:5]
        size = {"float": 4, "double": 8, "Half": 2, "BFloat16": 2}
        width = 16 // min(size[param], size[grad], size[of_state])
        state = 5 * width * size[of_state] // 16  # with AMSGrad
        in_out = width * size[param] // 16
        assert code.count(r"LDG\.E.*\.128") >= state + in_out + width * size[grad] // 16, (arch, code.name)
        assert code.count(r"STG\.E.*\.128") >= state + in_out, (arch, code.name)


def test_float64_only_where_it_is_asked_for(compiled):
    """Guards against a double constant or conversion, which consumer cards execute at 1/64 of the speed."""
    for arch, code in compiled:
        assert (code.double > 0) == ("double" in code.name), (arch, code.name, code.double)


def test_no_fused_multiply_add_of_ours(compiled):
    """Guards the same bits everywhere: -fmad=false must hold. What FFMA there is belongs to divisions and roots, whose
    sequences round correctly: at most 5 + 5 for each of a step's 4 reciprocals and square roots, and in their slow
    paths, which are shared."""
    for arch, code in compiled:
        if code.name.startswith("step_kernel") and "double" not in code.name:
            approximations = code.count(r"MUFU\.(RCP|RSQ)")
            assert code.count(r"FFMA") <= 6 * approximations + 12, (arch, code.name)


def longest_turn(code, param, state, **options):
    """Its instructions. Where all has 16 bits no step takes the ways that read masters and write none, or write what
    they have not read, each being a branch of its own: reading asks each element for a NaN, beside once for four of all
    results, and writing adds 0x8000 to it."""
    turns = code.turns(r"FSETP\.NAN", r"0x8000\b", longest=True, **options)
    if (param, state) == ("BFloat16", "BFloat16"):
        turns = {found: turn for found, turn in turns.items() if found in ((2, 0), (10, 8))}
        assert len(turns) == 2, (code.name, turns.keys())
    return max(map(len, turns.values()))


def test_instructions_for_an_element(compiled):
    """Guards the step against becoming bound by instructions, on the ways through its loop that steps take: with and
    without w at 1, over whole packets, and without what divisions and roots do for rare operands, but for zeros, which
    whole rows of an embedding may be."""
    checked = 0
    for arch, code in compiled:
        if match := re.fullmatch(r"step_kernel<[01], float, (\w+), (\w+), (\w+), false>", code.name):
            param, _, state = match.groups()
            elements = 16 // min({"float": 4, "Half": 2, "BFloat16": 2}[dtype] for dtype in match.groups())
            fewest, most = code.turn()[0] / elements, longest_turn(code, param, state) / elements
            at_1, otherwise = INSTRUCTIONS[param, state]
            assert 60 < fewest <= at_1, (arch, code.name, fewest)
            assert fewest + 15 < most <= otherwise, (arch, code.name, most)
            # Nine for each division and root of a zero; if the compiler's long way were theirs, there would be none.
            of_zeros = longest_turn(code, param, state, zeros=True) / elements
            assert most < of_zeros <= most + 5 * 9, (arch, code.name, of_zeros)
            checked += 1
    assert checked > 100
