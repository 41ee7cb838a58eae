"""The CUDA and Triton backends on a real GPU: what the simulator cannot show (streams, graphs, waiting, launches, large
memory), and again that every variant gives the CPU's bits.

`bench/gpu_check.sh --rehearse` runs these tests without a GPU, by the stand-ins of bench/gpu_check/stand_ins.py; there
they check the tests and the host's code.
"""

from __future__ import annotations

import io
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cases import (
    ALGORITHMS,
    BASE,
    DTYPES,
    cannot_simulate,
    make_params,
    needs_cpu_kernels,
    params_of,
    set_grads,
    states,
)
from torch.nn import Parameter

from maxva_kernels import MAdam, functional
from maxva_kernels.backends import registry
from maxva_kernels.groups import arithmetic_dtype

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from gpu_check import machine as machines
from gpu_check import same_bits
from gpu_check.stage import Lacking

MACHINE = machines.find()
REAL = MACHINE is not None and MACHINE.real


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(MACHINE is None, reason="no GPU"), needs_cpu_kernels]

# Others at work on the same GPU would change what these see: its time, its memory, its launches.
alone = pytest.mark.alone

SHAPES = ((3, 5), 70, (2, 2, 2, 2), 0, 1, 1025)


@pytest.fixture(autouse=True, params=["cuda", "triton"] if REAL else ["cuda"])
def machine(request, monkeypatch):
    """The GPU, whose `backend` is the one to test."""
    MACHINE.backend = request.param
    if REAL:
        reason = registry.why_not(MACHINE.backend, MACHINE.device)
        if reason is not None:
            pytest.skip(reason)
        return MACHINE
    if reason := cannot_simulate(MACHINE.backend):
        pytest.skip(reason)
    MACHINE.start(simulate=True, patches=monkeypatch)
    return MACHINE


def few(values, rehearsed=2):
    """All of them on a GPU; in a rehearsal some."""
    return list(values) if REAL or MACHINE is None else list(values)[:rehearsed]


def twins(machine, algorithm=MAdam, dtype=torch.float32, sizes=SHAPES, **options):
    """The same optimizer twice: on the GPU, and by the CPU kernels."""
    return same_bits.twins(algorithm, machine.device, machine.backend, sizes, dtype, **options)


def step(optimizers, number, dtype=None):
    for optimizer in optimizers:
        set_grads(params_of(optimizer), number, dtype=dtype)
        optimizer.step()


def values(optimizer):
    """What a step may change, copied."""
    return {name: value.clone() for name, value in states(optimizer)}


def assert_same(ours, theirs):
    found = same_bits.differences(ours, theirs)
    assert not found, "\n".join(found[:10])


def assert_unchanged(optimizer, before):
    after = dict(states(optimizer))
    assert after.keys() == before.keys()
    assert [name for name, value in before.items() if not torch.equal(after[name], value)] == []


def trace(machine, function):
    try:
        return machine.trace(function)
    except Lacking as missing:
        pytest.skip(str(missing))


# --- the CPU's bits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", few(same_bits.KINDS), ids=lambda kind: "-".join(str(d).split(".")[-1] for d in kind))
@pytest.mark.parametrize("algorithm", few(ALGORITHMS, 1))
def test_option_table_gives_the_cpus_bits(algorithm, kind, machine):
    """Guards every kernel on this GPU's own code, the conversions, and each mode: all options, sizes around chunks."""
    options = few(same_bits.options_of(kind), 1)
    sizes = None if REAL else (0, 3, 33, 8200)
    found = [same_bits.check(algorithm, option, *kind, machine.device, machine.backend, sizes) for option in options]
    assert not any(found), "\n".join(itertools.chain(*found))


def test_operands_on_which_the_hardwares_approximation_decides(machine):
    """Guards the exceptions of csrc/cuda/refine.h, Note [Short chains]: one quotient and two roots, which are right on
    hardware whose approximations are better there than is promised."""
    options = {"lr": 1.0, "weight_decay": 0.0, "beta1": 0.0, "beta2_range": (0.5, 1.0), "amsgrad": True}
    pair = twins(machine, sizes=(1024, 1024), eps=16777215.0, eps_mode="adam", **options)
    for optimizer in pair:
        for param, grad in zip(params_of(optimizer), (0.25, 1.0), strict=True):
            param.data.zero_()
            param.grad = torch.full_like(param, grad)
        optimizer.step()
    assert params_of(pair[1])[0][0].item() == -1.4901162970204496e-08  # 2^-2 / (2^24 - 1), rounded
    assert_same(*pair)
    for optimizer in pair:
        for param, variance in zip(params_of(optimizer), (15635314.0, 33038996.0), strict=True):
            state = optimizer.state[param]
            for name, value in {"grad_mean": 0.0, "grad_var": variance, "weight_sum": 1.0}.items():
                state[name].fill_(value)
            param.grad.zero_()
        optimizer.step()
    roots = [optimizer.state[param]["max_denom"][0].item() for optimizer in pair for param in params_of(optimizer)]
    assert roots == 2 * [3954.151611328125, 5747.9560546875]
    assert_same(*pair)


def test_auto_takes_the_cuda_kernels(machine):
    """Guards the order of preference, and so what a user gets."""
    if registry.why_not("cuda", machine.device) is not None:
        pytest.skip("they cannot run")
    assert registry.select("auto", machine.device).NAME == "cuda"


def test_mixed_dtypes_and_modes_in_one_optimizer(machine):
    """Guards segments and groups: parameters of every dtype, gradients of several, each group in a mode of its own."""
    modes = [{}, {"amsgrad": True, "lr": 0.3}, {"decoupled_weight_decay": False, "maximize": True, "eps_mode": "adam"}]
    pair = []
    for device, backend in ((machine.device, machine.backend), ("cpu", "cpu")):
        groups = [
            {"params": [p for dtype in few(DTYPES, 1) for p in make_params((5, 70, 1025), dtype, device)], **mode}
            for mode in modes
        ]
        pair.append(MAdam(groups, **BASE, max_grad_norm=1.0, backend=backend))
    for number in range(3):
        for optimizer in pair:
            for i, param in enumerate(params_of(optimizer)):
                grad_dtype = (None, torch.bfloat16, torch.float32)[i % 3]
                set_grads([param], number * 100 + i, dtype=grad_dtype)
            params_of(optimizer)[number].grad = None
            optimizer.step()
        assert_same(*pair)


def test_layouts(machine):
    """Guards tensors that lie otherwise: channels last, transposed, with gaps, and beginning anywhere in a packet."""
    pair = []
    for device, backend in ((machine.device, machine.backend), ("cpu", "cpu")):
        base = [p.detach() for p in make_params(((2, 3, 4, 5), (7, 9), (6, 10), 4100, 4100), device=device)]
        tensors = [
            base[0].to(memory_format=torch.channels_last),
            base[1].t(),
            base[2][:, ::3],
            base[3][1:],
            base[4][3:],
        ]
        pair.append(MAdam([Parameter(tensor) for tensor in tensors], **BASE, backend=backend))
    for number in range(3):
        step(pair, number)
        assert_same(*pair)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_special_gradients(clip, machine):
    """Guards NaN, infinities, overflow and subnormals: the same bits as on the CPU, and none in the neighbours."""
    special = [0.5, torch.nan, torch.inf, -torch.inf, -0.5, 3e38, -1e25, 1e-30, 1e-45, 0.0, -0.0]
    pair = twins(machine, sizes=(len(special), 70), max_grad_norm=clip)
    for number in range(3):
        for optimizer in pair:
            first, second = params_of(optimizer)
            set_grads([first, second], number)
            first.grad.copy_(torch.tensor(special))
            optimizer.step()
        assert_same(*pair)
    assert clip or params_of(pair[0])[1].isfinite().all()


@pytest.mark.parametrize("dtype", few(DTYPES), ids=str)
def test_norm_gives_the_cpus_bits(dtype, machine):
    """Guards the order of additions over many tensors and chunks."""
    sizes = (0, 1, 1025, 16_383, 16_384, 16_385, 3_000_001, *range(2, 3000, 7)) if REAL else (0, 1, 1025, 16_385)
    grads = [param.detach() for param in make_params(sizes, dtype)]
    there = [grad.to(machine.device) for grad in grads]
    for _ in range(2):
        ours = functional.grad_norm(there, backend=machine.backend)
        assert ours.device.type == machine.device.type
        assert torch.equal(ours.cpu(), functional.grad_norm(grads, backend="cpu"))


def test_more_tensors_and_groups_than_one_launch_takes(machine):
    """Guards the cut into several launches."""
    count, per_group = (3000, 40) if REAL else (70, 1)
    pair = []
    for device, backend in ((machine.device, machine.backend), ("cpu", "cpu")):
        params = make_params([1 + i % 5 for i in range(count)], device=device)
        groups = [{"params": params[i : i + per_group], "lr": 0.1 + i / count} for i in range(0, count, per_group)]
        pair.append(MAdam(groups, **BASE, max_grad_norm=1.0, backend=backend))
    for number in range(2):
        step(pair, number)
        assert_same(*pair)


def tiled(pattern, count):
    """So many elements that repeat a pattern."""
    tensor = torch.empty(count, dtype=pattern.dtype, device=pattern.device)
    whole = count // len(pattern) * len(pattern)
    tensor[:whole].view(-1, len(pattern)).copy_(pattern)
    tensor[whole:].copy_(pattern[: count - whole])
    return tensor


def is_tiled(tensor, pattern):
    """Whether it repeats the pattern, bit for bit."""
    integers = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    tensor, pattern = tensor.detach().view(integers), pattern.detach().to(tensor.device).view(integers)
    whole = len(tensor) // len(pattern) * len(pattern)
    rows = tensor[:whole].view(-1, len(pattern)).split(64)
    return all(bool((some == pattern).all()) for some in rows) and torch.equal(
        tensor[whole:], pattern[: len(tensor) - whole]
    )


@alone
def test_more_than_2_to_the_31_elements(machine):
    """Guards against indices of 32 bits: every element of a bfloat16 parameter must be that of a small one's step."""
    count, period = (2**31 + 3 * 8192 + 5, 1_000_003) if REAL else (3 * 8192 + 5, 1003)
    needed = 20 * count + 4e9  # parameter and gradient of 2 bytes, four states of 4; a comparison's temporaries
    if machine.free_bytes() < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of free GPU memory, there are {machine.free_bytes() / 1e9:.0f}")
    (small,) = make_params((period,), torch.bfloat16)
    theirs = MAdam([small], **BASE, backend="cpu")
    large = Parameter(tiled(small.detach().to(machine.device), count))
    ours = MAdam([large], **BASE, backend=machine.backend)
    try:
        for number in range(2):
            set_grads([small], number)
            large.grad = None
            large.grad = tiled(small.grad.to(machine.device), count)
            ours.step()
            theirs.step()
        assert is_tiled(large, small)
        for name, value in ours.state[large].items():
            theirs_value = theirs.state[small][name]
            assert torch.equal(value.cpu(), theirs_value) if name == "step" else is_tiled(value, theirs_value), name
        # Among values of one magnitude the sum's order changes its last digits only.
        exact = large.grad.view(-1)[: count // period * period].view(-1, period)[0].double().square().sum()
        norm = functional.grad_norm([large.grad], backend=machine.backend).double() ** 2
        torch.testing.assert_close(norm / exact, norm.new_tensor(count / period), rtol=1e-2, atol=0)
    finally:
        del large, ours
        machine.free_bytes()  # gives it back


def test_checkpoint_moves_between_devices(machine):
    """Guards a run that goes on elsewhere: three steps on the GPU, two on the CPU, two on the GPU are seven."""
    ours, theirs = twins(machine, amsgrad=True, max_grad_norm=1.0)
    step([ours, theirs], 0)
    step([ours, theirs], 1)
    number = 2
    for device, backend in (("cpu", "cpu"), (machine.device, machine.backend)):
        saved = io.BytesIO()
        torch.save({"params": [p.detach() for p in params_of(ours)], "optimizer": ours.state_dict()}, saved)
        saved.seek(0)
        loaded = torch.load(saved, map_location="cpu")
        params = [Parameter(value.to(device)) for value in loaded["params"]]
        ours = MAdam(params, **BASE, amsgrad=True, max_grad_norm=1.0, backend=backend)
        ours.load_state_dict(loaded["optimizer"])
        for _ in range(2):
            step([ours, theirs], number)
            number += 1
        assert_same(ours, theirs)
    assert {value.device.type for _, value in states(ours)} == {machine.device.type}


def test_steps_inside_the_backward_pass(machine):
    """Guards steps by autograd's own thread, a table for each parameter."""
    both = []
    for device, backend in ((machine.device, machine.backend), ("cpu", "cpu")):
        params = make_params((5, 70, 1025), device=device)
        optimizers = {param: MAdam([param], **BASE, backend=backend) for param in params}

        def hook(param, optimizers=optimizers):
            optimizers[param].step()
            param.grad = None

        for param in params:
            param.register_post_accumulate_grad_hook(hook)
        for factor in (1.0, -0.5, 2.0):
            sum((param * param.detach() * factor).sum() for param in params).backward()
        both.append(list(optimizers.values()))
    for ours, theirs in zip(*both, strict=True):
        assert_same(ours, theirs)


# --- mixed precision -------------------------------------------------------------------------------------------------


def scaled_steps(optimizer, device, overflows):
    """Steps by GradScaler; gradients are `scale * number`, exact on every device. Gives the scales."""
    scaler = torch.amp.GradScaler(torch.device(device).type, init_scale=2.0**10, growth_interval=2)
    scales = []
    for number, overflow in enumerate(overflows):
        optimizer.zero_grad()
        factor = float("inf") if overflow else 0.5 + number
        losses = [(param * param.detach() * factor).sum() for param in params_of(optimizer)]
        scaler.scale(sum(losses)).backward()
        before = values(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if overflow and number:
            assert_unchanged(optimizer, before)
        scales.append(scaler.get_scale())
    return scales


@pytest.mark.parametrize("dtype", few((torch.float32, torch.float64), 1), ids=str)
@pytest.mark.parametrize("clip", [None, 1.0])
def test_grad_scaler_overflows_and_recovers(clip, dtype, machine):
    """Guards the scaler's protocol: with an overflow nothing moves, the scale halves, and training goes on."""
    ours, theirs = twins(machine, dtype=dtype, sizes=((3, 5), 70), max_grad_norm=clip)
    overflows = (False, False, True, False, False, True, True, False)
    scales = scaled_steps(ours, machine.device, overflows)
    assert scales == scaled_steps(theirs, "cpu", overflows)
    assert min(scales) < max(scales)
    assert_same(ours, theirs)
    assert {state["step"].item() for state in ours.state.values()} == {overflows.count(False)}


@pytest.mark.parametrize("flag", [1.0, 2.0])
def test_flag_of_several_devices(flag, machine):
    """Guards `found_inf`, which is a sum over devices: 2 stops a step as 1 does, 0 does not."""
    ours, theirs = twins(machine)
    step([ours, theirs], 0)
    before = values(ours)
    ours.grad_scale, ours.found_inf = (torch.tensor(value, device=machine.device) for value in (4.0, flag))
    step([ours], 1)
    assert_unchanged(ours, before)
    for optimizer, device in ((ours, machine.device), (theirs, "cpu")):
        optimizer.grad_scale, optimizer.found_inf = (torch.tensor(value, device=device) for value in (4.0, 0.0))
    step([ours, theirs], 2)
    assert_same(ours, theirs)


# --- no waiting, few launches ----------------------------------------------------------------------------------------


def test_the_watch_for_waiting_sees_it(machine):
    """The check of the next test itself."""
    with machine.no_waiting(), pytest.raises(RuntimeError):
        torch.ones(3, device=machine.device).sum().item()


@pytest.mark.parametrize(
    "options", [{}, {"max_grad_norm": 1.0, "amsgrad": True}, {"capturable": True}, {"skip_nonfinite": True}], ids=str
)
@pytest.mark.parametrize("dtype", few((torch.float32, torch.bfloat16, torch.float64), 1), ids=str)
def test_no_step_waits_for_the_device(dtype, options, machine):
    """Guards against a host that stands still: not in the first step, not in those after it, not with a scaler."""
    ours, theirs = twins(machine, dtype=dtype, sizes=((3, 5), 70), **options)
    scaler = torch.amp.GradScaler(machine.device.type, init_scale=2.0**10)
    scaler.scale(torch.ones((), device=machine.device))  # makes its tensors
    for number in range(4):
        for optimizer in (ours, theirs):
            set_grads(params_of(optimizer), number)
        with machine.no_waiting():
            ours.step()
        theirs.step()
    with machine.no_waiting():
        for param in params_of(ours):
            # torch's scaler cannot look through bfloat16 gradients on a GPU.
            grad = param.grad.to(arithmetic_dtype(param)) * 2.0**10
            param.grad = param.grad_dtype = None
            param.grad = grad
        scaler.step(ours)
        scaler.update()
    theirs.step()
    assert_same(ours, theirs)


def test_default_device_makes_no_difference(machine):
    """Guards against helpers made on the user's default device: a wait on a GPU, an error on others."""
    ours, theirs = twins(machine, max_grad_norm=1.0)
    for number in range(2):
        for optimizer in (ours, theirs):
            set_grads(params_of(optimizer), number)
        with torch.device(machine.device), machine.no_waiting():
            ours.step()
        theirs.step()
    assert_same(ours, theirs)


@alone
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=str)
def test_host_goes_on_while_the_device_is_busy(options, machine):
    """Guards against waits that torch does not know of: behind a second of other work two steps, the first among them,
    must be queued in less than half of one."""
    step(twins(machine, **options), 0)  # kernels are loaded, and the allocator has their memory
    ours, theirs = twins(machine, **options)
    for optimizer in (ours, theirs):
        set_grads(params_of(optimizer), 0)
    machine.delay(1)  # which measures the delay kernel
    machine.synchronize()
    machine.delay(1000)
    start = time.perf_counter()
    ours.step()
    ours.step()
    seconds = time.perf_counter() - start
    assert seconds < 0.5 or not REAL, seconds
    theirs.step()
    theirs.step()
    assert_same(ours, theirs)


def assert_launches(machine, seen, kernels):
    """These kernels, in this order, and nothing else; Triton's are each given their arguments by a copy."""
    names = [launch.name for launch in seen.launches if launch.kind == "kernel"]
    assert len(names) == len(kernels), seen.names()
    assert all(kernel in name for kernel, name in zip(kernels, names, strict=True)), seen.names()
    others = [launch.kind for launch in seen.launches if launch.kind != "kernel"]
    assert set(others) <= {"gpu_memcpy"}, seen.names()
    assert len(others) <= (len(kernels) if machine.backend == "triton" else 0), seen.names()
    assert not {"cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy"} & set(seen.calls), seen.calls


@alone
def test_one_launch_for_400_tensors(machine):
    """Guards against a launch for each tensor or group, and against any other kernel, copy or fill in a step."""
    params = make_params([16] * (400 if REAL else 30), device=machine.device)
    groups = [{"params": params[::2]}, {"params": params[1::2], "amsgrad": True}]
    optimizer = MAdam(groups, **BASE, backend=machine.backend)
    set_grads(params, 0)
    optimizer.step()
    assert_launches(machine, trace(machine, optimizer.step), ["step_kernel"])
    optimizer.max_grad_norm = 1.0
    optimizer.step()
    kernels = ["norm_chunks_kernel", "norm_total_kernel", "step_kernel"]
    assert_launches(machine, trace(machine, optimizer.step), kernels)


@alone
def test_first_step_launches_only_fills_and_few_copies(machine):
    """Guards against gradients or states copied: state is made by fills, the table travels once."""
    params = make_params([16] * (50 if REAL else 5), device=machine.device)
    optimizer = MAdam(params, **BASE, backend=machine.backend)
    set_grads(params, 0)
    seen = trace(machine, optimizer.step)
    assert sum("step_kernel" in name for name in seen.names()) == 1
    copies = [launch for launch in seen.launches if launch.kind == "gpu_memcpy"]
    assert len(copies) <= (2 if machine.backend == "triton" else 1), seen.names()
    assert not {"cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy"} & set(seen.calls), seen.calls


@alone
def test_no_memory_is_kept(machine):
    """Guards against memory that grows with the steps."""
    ours, _ = twins(machine, max_grad_norm=1.0)
    for number in range(3):
        step([ours], number)
    before = machine.allocated_bytes()
    for number in range(3, 30 if REAL else 5):
        step([ours], number)
    assert machine.allocated_bytes() == before


# --- streams ---------------------------------------------------------------------------------------------------------


@alone
@pytest.mark.parametrize("clip", [None, 1.0])
def test_step_is_on_the_current_stream(clip, machine):
    """Guards against launches on the default stream: behind a delay on a side stream nothing may have moved yet."""
    ours, theirs = twins(machine, max_grad_norm=clip)
    step([ours, theirs], 0)
    before = values(ours)
    for optimizer in (ours, theirs):
        set_grads(params_of(optimizer), 1)
    machine.synchronize()
    with machine.side_stream() as stream:
        machine.delay(500)
        ours.step()
    if REAL:
        after = {name: value.cpu() for name, value in states(ours)}  # read on the default stream
        assert not stream.query(), "the delay was too short to tell"
        assert [name for name, value in before.items() if not torch.equal(after[name], value.cpu())] == []
    machine.join(stream)
    theirs.step()
    assert_same(ours, theirs)


@alone
def test_step_follows_gradients_of_its_stream(machine):
    """Guards against a step that does not wait for what its own stream still computes."""
    ours, theirs = twins(machine, max_grad_norm=1.0)
    step([ours, theirs], 0)
    for optimizer in (ours, theirs):
        set_grads(params_of(optimizer), 1)
    with machine.side_stream() as stream:
        machine.delay(50)
        for param in params_of(ours):
            param.grad.mul_(2.0)
        ours.step()
        for param in params_of(ours):
            param.grad.zero_()
    machine.join(stream)
    for param in params_of(theirs):
        param.grad.mul_(2.0)
    theirs.step()
    assert_same(ours, theirs)


NORM_OF_TWO_STREAMS = """
import sys
import torch
from maxva_kernels import functional

backend = sys.argv[1]

def grads(sizes):
    return [torch.full((size,), 0.5, device="cuda") for size in sizes]

functional.grad_norm(grads((3, 20_000)), backend=backend)  # the kernels are loaded, which may wait for the device
ours = grads((5, 40_000, 7))
expected = functional.grad_norm([grad.cpu() for grad in ours], backend="cpu")
streams = [torch.cuda.Stream() for _ in range(2)]
torch.cuda.synchronize()
with torch.cuda.stream(streams[0]):
    torch.cuda._sleep(1_000_000_000)
    first = functional.grad_norm(ours, backend=backend)
with torch.cuda.stream(streams[1]):
    second = functional.grad_norm(ours, backend=backend)
if streams[0].query():
    raise SystemExit(77)  # the host was made to wait for the delay: nothing can be told
streams[1].synchronize()
assert torch.equal(second.cpu(), expected), (second, expected)
torch.cuda.synchronize()
assert torch.equal(first.cpu(), expected), (first, expected)
"""


@alone
@pytest.mark.skipif(not REAL, reason="needs streams")
def test_norms_of_equal_models_on_two_streams(tmp_path, machine):
    """Guards a table that is found by sizes alone: on another stream nothing says that its copy to the device is done.
    In a process of its own, since a wrong address ends all use of the GPU."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    command = [sys.executable, "-c", NORM_OF_TWO_STREAMS, machine.backend]
    environment = {**os.environ, "PYTHONPATH": path}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    if result.returncode == 77:
        pytest.skip("this driver has the host wait where the table is copied")
    assert result.returncode == 0, result.stderr[-3000:]


# --- CUDA graphs -----------------------------------------------------------------------------------------------------


def static_grads(optimizer, number):
    """Gradients of step `number` in the memory where the last ones were, as a graph needs them."""
    params = params_of(optimizer)
    kept = [param.grad for param in params]
    set_grads(params, number)
    for param, grad in zip(params, kept, strict=True):
        if grad is not None:
            grad.copy_(param.grad)
            param.grad = grad


def launcher_of(machine):
    return registry.select(machine.backend, machine.device)._launcher()


@pytest.fixture
def graphs(machine):
    if not launcher_of(machine).GRAPHS:
        pytest.skip("the driver is older than CUDA 13, and a step in a graph refused")


in_graphs = pytest.mark.usefixtures("graphs")


GRAPHED = [
    {},
    {"max_grad_norm": 1.0, "skip_nonfinite": True},
    {"amsgrad": True, "decoupled_weight_decay": False, "max_grad_norm": 0.5},
]


@in_graphs
@pytest.mark.parametrize("options", few(GRAPHED), ids=str)
@pytest.mark.parametrize("dtype", few((torch.float32, torch.bfloat16, torch.float64), 1), ids=str)
@pytest.mark.parametrize("algorithm", few(ALGORITHMS, 1))
def test_replays_are_steps(algorithm, dtype, options, machine):
    """Guards everything that a graph could keep from its capture: gradients, the step count, the norm, and a learning
    rate that a schedule moves between replays."""
    ours, theirs = twins(machine, algorithm, dtype, sizes=((3, 5), 70, 1025), capturable=True, **options)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7) for optimizer in (ours, theirs)]
    static_grads(ours, 0)
    machine.warm_up(ours.step, 2)
    set_grads(params_of(theirs), 0)
    for _ in range(2):
        theirs.step()
    assert_same(ours, theirs)
    replay = machine.capture(ours.step)
    assert_same(ours, theirs)  # a capture steps nothing
    for number in range(1, 5):
        static_grads(ours, number)
        replay()
        step([theirs], number)
        assert_same(ours, theirs)
        for schedule in schedules:
            schedule.step()
    rates = [optimizer.param_groups[0]["lr"] for optimizer in (ours, theirs)]
    assert rates[0].device.type == machine.device.type
    assert torch.equal(rates[0].cpu(), rates[1])
    step([ours, theirs], 5)  # and eagerly again
    assert_same(ours, theirs)


@in_graphs
def test_graph_of_a_whole_training_step(machine):
    """Guards the usual capture, of forward, backward and step together, against the same run without a graph."""

    def make():
        params = make_params((5, 70, 1025), device=machine.device)
        data = torch.zeros(1025, device=machine.device)
        optimizer = MAdam(params, **BASE, max_grad_norm=1.0, capturable=True, backend=machine.backend)

        def train():
            optimizer.zero_grad(set_to_none=True)
            a, b, c = params
            loss = (c * data).square().sum() + (b * data[:70]).sum() + (a * a * data[:5]).sum()
            loss.backward()
            optimizer.step()

        return optimizer, data, train

    graphed, their_data, train = make()
    eager, our_data, train_eagerly = make()
    machine.warm_up(train)
    for _ in range(3):
        train_eagerly()
    replay = machine.capture(train)
    for number in range(4):
        values = torch.randn(1025, generator=torch.Generator().manual_seed(number))
        their_data.copy_(values)
        our_data.copy_(values)
        replay()
        train_eagerly()
        assert_same(graphed, eager)


@in_graphs
def test_graph_with_a_scaler_flag(machine):
    """Guards a flag and a scale that were read at the capture."""
    ours, theirs = twins(machine, sizes=((3, 5), 70), capturable=True)
    flag, scale = torch.zeros((), device=machine.device), torch.ones((), device=machine.device)
    ours.found_inf, ours.grad_scale = flag, scale
    static_grads(ours, 0)
    machine.warm_up(ours.step, 1)
    step([theirs], 0)
    replay = machine.capture(ours.step)
    for number, (overflow, power) in enumerate([(0.0, 4.0), (2.0, 4.0), (0.0, 2.0)], 1):
        flag.fill_(overflow)
        scale.fill_(power)
        static_grads(ours, number)
        before = values(ours)
        replay()
        if overflow:
            assert_unchanged(ours, before)
            continue
        theirs.grad_scale = torch.tensor(power)
        step([theirs], number)
        assert_same(ours, theirs)


@in_graphs
def test_replays_respect_what_others_write(machine):
    """Guards float16 parameters that are written between replays against the masters in a graph, which no host looks
    at."""
    ours, theirs = twins(machine, MAdam, torch.float16, sizes=((3, 5), 70), capturable=True, master_weights=True)
    static_grads(ours, 0)
    machine.warm_up(ours.step, 1)
    step([theirs], 0)
    replay = machine.capture(ours.step)
    for number in range(1, 4):
        static_grads(ours, number)
        for optimizer in (ours, theirs):
            params_of(optimizer)[1].data[number::3] = 3.0
        replay()
        step([theirs], number)
        assert_same(ours, theirs)
        assert (params_of(ours)[1][number::3] > 2.5).all()


def in_a_capture(machine, optimizer, message):
    """A step in a capture must be refused, and leave optimizer and capture as they were."""
    before = values(optimizer)
    other = torch.zeros(3, device=machine.device)

    def attempt():
        other.add_(1.0)  # an empty graph would bring a warning
        with pytest.raises(RuntimeError, match=message):
            optimizer.step()

    replay = machine.capture(attempt)
    assert_unchanged(optimizer, before)
    if REAL:
        replay()
        assert other.tolist() == [1.0, 1.0, 1.0]
    optimizer.step()


def test_capture_needs_capturable(machine):
    """Guards against a graph that replays one learning rate for ever."""
    ours, _ = twins(machine)
    step([ours], 0)
    in_a_capture(machine, ours, "capturable=True")
    ours, _ = twins(machine, capturable=True)
    ours.param_groups[0]["lr"] = 0.125
    step([ours], 0)
    in_a_capture(machine, ours, "set to a number")


@in_graphs
@pytest.mark.parametrize("clip", [None, 1.0])
def test_new_tensors_in_a_capture_are_refused(clip, machine):
    """Guards against a copy from the host's memory in a graph, which would read it at every replay."""
    ours, _ = twins(machine, capturable=True, max_grad_norm=clip)
    step([ours], 0)
    param = params_of(ours)[1]
    param.data = param.data.clone()
    in_a_capture(machine, ours, "side stream before the capture")
    fresh, _ = twins(machine, capturable=True, max_grad_norm=clip, sizes=(11, 13))
    set_grads(params_of(fresh), 0)
    in_a_capture(machine, fresh, "side stream before the capture")


def test_graphs_need_a_driver_that_takes_the_arguments(machine, monkeypatch):
    """Guards against a crash in drivers that take less into a graph than a launch has."""
    ours, _ = twins(machine, capturable=True, max_grad_norm=1.0)
    step([ours], 0)
    monkeypatch.setattr(launcher_of(machine), "GRAPHS", False)
    in_a_capture(machine, ours, "update the driver")
    ours.max_grad_norm = None
    in_a_capture(machine, ours, "update the driver")


# --- several devices -------------------------------------------------------------------------------------------------

needs_two = pytest.mark.skipif(
    not REAL or torch.cuda.device_count() < 2, reason="needs two GPUs: streams, devices and copies between them"
)


@needs_two
@pytest.mark.parametrize("current", [0, 1])
def test_parameters_of_two_devices(current, machine):
    """Guards the switch of devices: one optimizer over both, whichever is the current one; the clip is by both."""
    devices = [torch.device("cuda", 0), torch.device("cuda", 1)]
    theirs = MAdam(make_params((5, 70, 1025, 33)), **BASE, backend="cpu")
    params = [Parameter(p.detach().to(devices[i % 2])) for i, p in enumerate(make_params((5, 70, 1025, 33)))]
    ours = MAdam(params, **BASE, backend=machine.backend)
    with torch.cuda.device(current):
        for number in range(3):
            step([ours, theirs], number)
        assert_same(ours, theirs)
        ours.max_grad_norm = 1e30  # measured, without effect
        step([ours, theirs], 3)
        ours.max_grad_norm = None
        ours.found_inf = torch.tensor(2.0, device=devices[0])
        before = values(ours)
        step([ours], 4)
        assert_unchanged(ours, before)
        assert torch.cuda.current_device() == current
    assert_same(ours, theirs)


@needs_two
def test_grad_scaler_with_two_devices(machine):
    """Guards the flag's sum: an overflow on one device stops both."""
    params = [Parameter(torch.ones(70, device=f"cuda:{index}")) for index in range(2)]
    ours = MAdam(params, **BASE, backend=machine.backend)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**4)
    for overflow in (False, True, False):
        ours.zero_grad()
        factor = float("inf") if overflow else 1.0
        loss = (params[0] * factor).sum().to("cuda:1") + params[1].sum()
        before = values(ours)
        scaler.scale(loss).backward()
        scaler.step(ours)
        scaler.update()
        if overflow:
            assert_unchanged(ours, before)
    assert {state["step"].item() for state in ours.state.values()} == {2}
