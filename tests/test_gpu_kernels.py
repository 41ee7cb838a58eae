"""The step kernels of the GPU backends, as nvcc and Triton compiled them, against the CPU's: the same bits for every
variant, option, order of blocks and architecture. Memory traffic is in test_gpu_traffic.py, sizes and limits in
test_gpu_limits.py, the norm in test_gpu_norm.py."""

from __future__ import annotations

import re

import pytest
import torch
from cases import (
    ALGORITHMS,
    BASE,
    BFLOAT16_OPTIONS,
    DTYPES,
    OPTIONS,
    SIZES,
    assert_same_bits,
    make_params,
    needs_cpu_kernels,
    set_grads,
)
from simulated import Simulation
from simulated_cuda import CSRC, bridge, constant, needs_compilers, step_entry
from twins import step_both, with_twin

from maxva_kernels import LaMAdam, MAdam
from maxva_kernels.launch import DTYPE_CODES, PACKED_GROUP
from maxva_kernels.tensor_table import NORM_COLUMNS, STEP_COLUMNS

pytestmark = needs_cpu_kernels

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Parameters and gradients as the kernels take them, and two pairs that the host converts.
KERNEL_PAIRS = [*((param, grad) for param in FLOATS for grad in FLOATS), (torch.float64, torch.float64)]
CONVERTED_PAIRS = [(torch.float32, torch.float64), (torch.float64, torch.bfloat16)]

VARIANTS = [(torch.float32, torch.float32, None, option) for option in OPTIONS]
VARIANTS += [(*pair, None, o) for pair in KERNEL_PAIRS[1:] + CONVERTED_PAIRS for o in ("base", "all")]
VARIANTS += [(torch.float32, torch.float32, torch.bfloat16, option) for option in OPTIONS]
VARIANTS += [(*pair, torch.bfloat16, "all") for pair in KERNEL_PAIRS[1:-1]]
BF16 = torch.bfloat16
VARIANTS += [(BF16, BF16, state_dtype, option) for state_dtype in (None, BF16) for option in BFLOAT16_OPTIONS]
VARIANTS += [(BF16, grad, None, option) for grad in (torch.float32, torch.float16) for option in BFLOAT16_OPTIONS]
VARIANTS += [(torch.float16, torch.float16, None, "master_weights")]


@pytest.mark.parametrize(("param_dtype", "grad_dtype", "state_dtype", "option"), VARIANTS, ids=lambda value: str(value))
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_variant_gives_the_cpus_bits(algorithm, param_dtype, grad_dtype, state_dtype, option, simulated):
    """Guards each instantiation of the kernel and each mode in it: a wrong formula, conversion, flag or coefficient,
    and random numbers of another element, step or tensor."""
    simulated.blocks = len(SIZES)  # together, which is faster
    options = {**BASE, **(OPTIONS | BFLOAT16_OPTIONS)[option], "state_dtype": state_dtype, "rounding_seed": -5}
    pair = with_twin(algorithm(make_params(dtype=param_dtype), backend=simulated.backend, **options))
    for step in range(3):
        step_both(pair, step, dtype=grad_dtype)
    if simulated.backend == "triton":
        return
    taken = param_dtype if torch.float64 in (param_dtype, grad_dtype) else grad_dtype
    state = state_dtype or (torch.float64 if param_dtype == torch.float64 else torch.float32)
    stepped = torch.float32 if (param_dtype, option) == (torch.float16, "master_weights") else param_dtype
    _, entry = step_entry(*(DTYPE_CODES[dtype] for dtype in (stepped, taken, state)), algorithm is LaMAdam)
    assert {launch.kernel for launch in simulated.launches if launch.kernel.startswith("step")} == {entry}


def test_groups_keep_their_own_modes(simulated):
    """Guards the look-up of a tensor's group: a launch with a group for each option, in every mode, and another for
    those with a trust ratio."""
    each = [{**BASE, **option, "lr": 0.1 + g / 7} for g, option in enumerate(OPTIONS.values())]
    groups = [{"params": make_params((5, 600), seed=g), **options} for g, options in enumerate(each)]
    for group in groups:
        group.pop("max_grad_norm", None)
    pair = with_twin(MAdam(groups, backend=simulated.backend))
    for step in range(3):
        step_both(pair, step)
    assert sum(launch.kernel.startswith("step") for launch in simulated.launches) == 2 * 3


SPECIAL = (0.5, torch.nan, torch.inf, -torch.inf, -0.5, 3e38, -1e25, 1e-30, 1e-45, 0.0, -0.0)


@pytest.mark.parametrize(
    ("dtype", "extra"),
    [
        *((dtype, {}) for dtype in DTYPES),
        (torch.float32, {"state_dtype": BF16}),
        *((BF16, {option: True}) for option in ("master_weights", "stochastic_rounding")),
    ],
    ids=str,
)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_special_values(algorithm, dtype, extra, simulated):
    """Guards the side that a NaN takes in each comparison, the flush of subnormals, signs of zero, and the rounding of
    what is no finite number."""
    values = torch.tensor(SPECIAL, dtype=torch.float64)
    params = [torch.nn.Parameter(torch.cat([torch.ones(len(values)), values, -values]).to(dtype)) for _ in range(2)]
    pair = with_twin(algorithm(params, backend=simulated.backend, **BASE, amsgrad=True, **extra))
    for step in range(4):
        for optimizer in pair:
            for i, param in enumerate(optimizer.param_groups[0]["params"]):
                turned = torch.cat([values, values.roll(step + i), values.roll(-1 - step)])
                param.grad = turned.to(dtype)
        for optimizer in pair:
            optimizer.step()
    step_both(pair, 4)


@pytest.mark.parametrize("state_dtype", [None, BF16], ids=str)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_result_shows_how_good_an_approximation_is(algorithm, state_dtype, simulate_cuda):
    """Guards the divisions and roots that begin with the hardware's approximations, which a simulator cannot know: with
    gradients of all magnitudes, so that some packets are for the short chains, some for the long ones."""
    simulated = simulate_cuda(approx_ulp=1, blocks=8)
    sizes = (512, 512, 2048)
    pair = with_twin(algorithm(make_params(sizes), backend=simulated.backend, **BASE, state_dtype=state_dtype))
    for step in range(3):
        for optimizer in pair:
            params = optimizer.param_groups[0]["params"]
            set_grads(params, step)
            params[1].grad *= 2.0**-50  # its squares are on both sides of the window's lower end
            params[2].grad *= 2.0 ** torch.randint(-60, 30, (2048,), generator=torch.Generator().manual_seed(step))
            optimizer.step()
        assert_same_bits(*pair)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_value_converts_as_on_the_cpu(dtype, simulate):
    """Guards the conversions: all values are loaded as parameter and as gradient, and what is stored meets ties,
    overflow and subnormals."""
    check_conversions(dtype, simulate(blocks=32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_value_converts_on_old_architectures(dtype, simulate_cuda):
    """Guards the conversions where they are emulated, for want of instructions."""
    check_conversions(dtype, simulate_cuda(arch="sm_75", blocks=32))


def check_conversions(dtype: torch.dtype, launcher: Simulation) -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    kept = with_twin(MAdam([torch.nn.Parameter(every.clone())], lr=0.0, backend=launcher.backend))
    step_both(kept)
    # Denominators of exactly 1, so that the parameter becomes the rounded gradient.
    exact = torch.cat([every.float() * factor for factor in (1, 1 + 2.0**-12, 1 + 2.0**-9, 1.001)])
    rounded = with_twin(
        MAdam([torch.zeros_like(exact, dtype=dtype)], lr=1.0, beta1=0.0, eps=1.0, backend=launcher.backend)
    )
    given = with_twin(
        MAdam([torch.zeros_like(every)], **BASE, backend=launcher.backend)
    )  # the state shows what was loaded
    for pair, grad in ((rounded, exact), (given, every)):
        for optimizer in pair:
            (param,) = optimizer.param_groups[0]["params"]
            param.grad_dtype = None
            param.grad = grad.clone()
            optimizer.step()
        assert_same_bits(*pair)


@pytest.mark.parametrize(
    "extra", [{}, {"state_dtype": BF16}, {"master_weights": True}, {"stochastic_rounding": True}], ids=str
)
@pytest.mark.parametrize("arch", ["sm_75", "sm_90", "sm_100"])
def test_other_architectures(arch, extra, simulate_cuda):
    """Guards code that depends on the architecture: nvcc makes other PTX for each."""
    launcher = simulate_cuda(arch=arch, blocks=len(SIZES))
    options = {**BASE, **OPTIONS["all"], **extra}
    pair = with_twin(LaMAdam(make_params(dtype=torch.bfloat16), backend=launcher.backend, **options))
    for step in range(3):
        step_both(pair, step)


@pytest.mark.parametrize("blocks", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("seed", [None, 1, 2, 3])
@pytest.mark.parametrize("together", [True, False])
def test_any_number_and_order_of_blocks(together, blocks, seed, simulate):
    """Guards the walk of blocks over chunks, and that steps are counted once, by whichever block ends last, when no
    other will read them: also where a block runs only once others have ended."""
    launcher = simulate(blocks=blocks, seed=seed)
    launcher.max_lanes = launcher.max_lanes if together else 1
    sizes = (8193, 0, 5, 1, 16385, 700)
    groups = [{"params": make_params(sizes[:3])}, {"params": make_params(sizes[3:]), "amsgrad": True, "beta1": 0.8}]
    pair = with_twin(MAdam(groups, backend=launcher.backend, **BASE))
    for step in range(2):
        step_both(pair, step)
    assert [int(state["step"]) for state in pair[0].state.values()] == [2] * len(sizes)
    assert all(launch.buffers["ticket"].array.view("u4") == 0 for launch in launcher.launches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_any_step_count(dtype, simulated):
    """Guards the bias correction, whose integer arithmetic has another source on the device, and a step count that is
    read with too few bits."""
    counts = (0, 1, 2, 999, 2**31 - 1, 2**31, 2**32 - 1, 2**53 + 1, 2**62)
    for beta1 in (0.0, 0.7, 0.999999, 1 - 2.0**-53):
        pair = with_twin(
            MAdam(make_params((3,) * len(counts), dtype), backend=simulated.backend, **{**BASE, "beta1": beta1})
        )
        step_both(pair)
        for optimizer in pair:
            for state, count in zip(optimizer.state.values(), counts, strict=True):
                state["step"].fill_(count)
        step_both(pair, 1)
        assert [int(state["step"]) for state in pair[0].state.values()] == [count + 1 for count in counts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("found_inf", [None, -0.0])
@pytest.mark.parametrize("grad_scale", [None, 1024.0, 3.0])
@pytest.mark.parametrize("max_grad_norm", [None, 0.5, 1e9, torch.inf])
def test_scaling(max_grad_norm, grad_scale, found_inf, dtype, simulated):
    """Guards the factor of the gradients, alone and in all combinations: scale, clip that bites or not, no overflow."""
    params = make_params((1, 700, 5), dtype=dtype)
    pair = with_twin(MAdam(params, backend=simulated.backend, **BASE, max_grad_norm=max_grad_norm))
    for optimizer in pair:
        for name, value in (("grad_scale", grad_scale), ("found_inf", found_inf)):
            setattr(optimizer, name, None if value is None else torch.tensor(value))
    for step in range(2):
        step_both(pair, step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("found_inf", [1.0, 2.0, 2.0**-20, -1.0, torch.inf, torch.nan])
def test_overflow_stops_the_step(found_inf, dtype, simulate):
    """Guards against a test for == 1, which the sum over devices is not, and against anything that is touched all the
    same: only the flag itself may be read."""
    launcher = simulate(track=True)
    pair = with_twin(LaMAdam(make_params((0, 1, 9000), dtype=dtype), backend=launcher.backend, **BASE, amsgrad=True))
    step_both(pair)
    before = {name: value.clone() for name, value in pair[0].state[pair[0].param_groups[0]["params"][2]].items()}
    for optimizer in pair:
        optimizer.found_inf = torch.tensor(found_inf)
    step_both(pair, 1)
    assert launcher.launches[-1].stats.buffer_bytes.keys() == {("found_inf", "ld")}
    for name, value in pair[0].state[pair[0].param_groups[0]["params"][2]].items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("special", [torch.nan, torch.inf, 0.0])
def test_clip_by_a_norm_that_is_no_number(special, simulated):
    """Guards the comparison of the clip: a NaN norm must make every parameter NaN, as in torch, and an infinite one
    must stop the others; a norm of 0 must not divide."""
    params = make_params((3, 700))
    pair = with_twin(MAdam(params, backend=simulated.backend, **BASE, max_grad_norm=1.0))
    step_both(pair)
    for optimizer in pair:
        for param in optimizer.param_groups[0]["params"]:
            param.grad.zero_() if special == 0 else param.grad[1:2].fill_(special)
        optimizer.step()
    step_both(pair, 1)
    if special != special:
        assert all(param.isnan().all() for param in params)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_learning_rate_on_the_device(dtype, simulated):
    """Guards the read of a learning rate by address: each group its own, in place of the number beside it."""
    step, wide = simulated.step, torch.float64 if dtype == torch.float64 else torch.float32

    def step_with_rates_in_memory(launch):
        packed, rates = [], []
        for lr, address, *others in PACKED_GROUP.iter_unpack(launch.groups):
            assert address == 0
            rates.append(torch.tensor(lr, dtype=wide))
            packed.append(PACKED_GROUP.pack(torch.nan, rates[-1].data_ptr(), *others))
        step(launch._replace(groups=b"".join(packed)))
        for g, rate in enumerate(rates):
            assert simulated.launches[-1].bytes_of("ld", f"lr{g}") >= rate.element_size()

    simulated.step = step_with_rates_in_memory
    groups = [
        {"params": make_params((3, 700), dtype=dtype, seed=g), "lr": 0.1 / (g + 1), "decoupled_weight_decay": g < 2}
        for g in range(3)
    ]
    pair = with_twin(MAdam(groups, backend=simulated.backend, **BASE))
    for step_number in range(2):
        step_both(pair, step_number)


def _fields(text: str, struct: str) -> list[str]:
    """The names of a C++ struct's fields."""
    body = re.search(rf"struct {struct} \{{(.*?)\n\}};", text, re.S)[1]
    declarations = re.findall(r"^\s*[\w:]+[\s*]+([\w, ]+);", body, re.M)
    return [name.strip() for names in declarations for name in names.split(",")]


@needs_compilers
def test_python_and_cpp_agree_on_the_structs():
    """Guards the tables against a field that is added, dropped or moved on one side only."""
    assert bridge()
    launch_h, arguments_h = ((CSRC / "cuda" / name).read_text() for name in ("launch.h", "arguments.h"))
    assert tuple(_fields(launch_h, "StepRow")) == STEP_COLUMNS
    assert tuple(_fields(launch_h, "NormRow")) == NORM_COLUMNS
    assert constant("step_row_bytes") == 8 * len(STEP_COLUMNS)
    assert constant("norm_row_bytes") == 8 * len(NORM_COLUMNS)
    assert constant("packed_group_bytes") == PACKED_GROUP.size == 8 * len(_fields(arguments_h, "PackedGroup"))


def test_python_and_cpp_agree_on_the_dtypes():
    """Guards the numbers that choose a kernel."""
    names = re.search(r"enum class DType : int \{ (.*) \}", (CSRC / "dtype.h").read_text())[1].split(", ")
    dtypes = {"kFloat": "float32", "kDouble": "float64", "kHalf": "float16", "kBFloat16": "bfloat16"}
    assert {getattr(torch, dtypes[name]): code for code, name in enumerate(names)} == DTYPE_CODES
