"""What is particular to the Triton kernels: Triton's interpreter, the machine code that it compiles, and its launches.

What they compute is tested with the other backends, on the simulator: test_gpu_kernels.py and the tables of cases.py.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import ALGORITHMS, BASE, make_params, needs_cpu_kernels, run
from sass import Code, needs_cuobjdump
from simulated_triton import (
    SimulatedTriton,
    constants_of,
    has_right_interpreter,
    install_triton,
    machine_code,
    needs_triton,
    triton_version,
)

from maxva_kernels import MAdam
from maxva_kernels.launch import PACKED_GROUP

pytestmark = needs_triton

DTYPES = ("float32", "bfloat16", "float16")
# Of parameter, gradient and state.
KINDS = [*((param, grad, "float32") for param in DTYPES for grad in DTYPES), ("float64", "float64", "float64")]
KINDS += [("float32", "float32", "bfloat16"), ("bfloat16", "bfloat16", "bfloat16")]

INTERPRETED = """
import sys
sys.path[:0] = [{tests!r}]
import torch
from cases import ALGORITHMS, BASE, OPTIONS, bits, make_params, set_grads, states
from maxva_kernels import gpu
from maxva_kernels.backends import triton as backend
from maxva_kernels.triton_kernels.launcher import TritonLauncher

class Interpreted(TritonLauncher):
    def run(self, kernel, chunks, device, arguments, constants):
        kernel[(max(1, min(chunks, 3)),)](*arguments, **constants)

launcher = Interpreted("cpu")
backend.why_not, backend._launcher = lambda device: None, lambda: launcher
gpu.current_stream, gpu.record_event, gpu.is_capturing = lambda device: 0, lambda device: None, lambda: False
float32 = torch.float32
kinds = [(dtype, {{}}) for dtype in (float32, torch.float64, torch.float16, torch.bfloat16)]
kinds += [(float32, {{"state_dtype": "bfloat16"}})]
kinds += [(torch.bfloat16, {{option: True}}) for option in ("master_weights", "stochastic_rounding")]
for algorithm in ALGORITHMS:
    for dtype, extra in kinds:
        for option in ("base",) if "state_dtype" in extra else ("base", "all"):  # a maximum is cut off, see below
            options = {{**BASE, **OPTIONS[option], **extra}}
            ours, theirs = (
                algorithm(make_params((0, 1, 7, 513, 9000), dtype), backend=name, **options)
                for name in ("triton", "cpu")
            )
            # The interpreter cuts float32 off to bfloat16 where a GPU rounds to nearest: then one step is enough.
            rounds_to_nearest = dtype == torch.bfloat16 and not extra
            for step in range(1 if rounds_to_nearest else 2):
                for optimizer in (ours, theirs):
                    set_grads(optimizer.param_groups[0]["params"], step)
                    optimizer.step()
            expected = dict(states(theirs))
            for name, value in states(ours):
                message = f"{{dtype}} {{extra}} {{option}} {{name}}"
                if name.startswith("params") and rounds_to_nearest:
                    torch.testing.assert_close(value, expected[name], rtol=2.0**-7, atol=0, msg=message)
                else:
                    assert torch.equal(bits(value), bits(expected[name])), message
"""


@needs_cpu_kernels
@pytest.mark.skipif(not has_right_interpreter(), reason="Triton's interpreter before 3.8 takes NaN as no GPU does")
def test_interpreter(tmp_path):
    """Guards the kernels' source apart from any compiler: Triton's own interpreter gives the CPU's bits."""
    script = INTERPRETED.format(tests=str(Path(__file__).parent))
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", "-c", script]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


def check_registers(code: Code, most: int, usual: bool, launch: object) -> None:
    """No local memory, and no more registers than that. The kernels are cut to what Triton 3.8 gives out; others may
    keep ten registers of a thread in local memory where it has more to keep than usual, and take more for float64."""
    cut_to_it = triton_version() == (3, 8)
    if usual or cut_to_it:
        assert not code.uses_local_memory, (launch, code.stack)
    assert code.stack <= 40, (launch, code.stack)
    assert code.registers <= (most if cut_to_it or code.double == 0 else max(most, 168)), launch


@needs_cuobjdump
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("param", "grad", "state"), KINDS)
def test_machine_code_of_the_step(param, grad, state, capability):
    """Guards the speed: accesses of 16 bytes for all float32 and float64 operands (8 for those of 16 bits: a thread has
    four elements), no local memory, registers for four programs on a multiprocessor, no float64 but where asked for."""
    from maxva_kernels.triton_kernels.launcher import step_constants
    from maxva_kernels.triton_kernels.step import step_kernel

    features = ("laprop", "statistics", "amsgrad") + ("masters",) * (param == "bfloat16")
    for values in itertools.product((False, True), repeat=len(features)):
        launch = dict(zip(features, values, strict=True))
        constants = constants_of(step_constants, param, grad, state, **launch)
        code = machine_code(step_kernel, constants, capability)
        check_registers(code, 128, not any(launch[name] for name in features[1:]), launch)
        wide = [dtype for dtype in (param, grad) if dtype in ("float32", "float64")]
        moments = 0 if state == "bfloat16" else 4 + launch["amsgrad"]
        assert code.count(r"LDG\.E.*\.128") >= moments + len(wide)
        assert code.count(r"STG\.E.*\.128") >= moments + (param in wide)
        assert (code.double > 0) == (param == "float64")


@needs_cuobjdump
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("param", "grad", "state"), KINDS)
def test_machine_code_of_the_updates_norm(param, grad, state, capability):
    """Guards against spilled registers, against more than let a multiprocessor hold two programs (a count of elements
    in 64 bits took 80 of them), against narrow loads, and against float64 where it was not asked for."""
    from maxva_kernels.triton_kernels.launcher import update_constants
    from maxva_kernels.triton_kernels.update_norm import update_chunks_kernel

    features = ("laprop", "amsgrad") + ("masters",) * (param == "bfloat16")
    for values in itertools.product((False, True), repeat=len(features)):
        launch = dict(zip(features, values, strict=True))
        constants = constants_of(update_constants, param, grad, state, **launch)
        code = machine_code(update_chunks_kernel, constants, capability)
        usual = param != "float16" and not any(launch[name] for name in features[1:])
        check_registers(code, 255 if param == "float64" else 128, usual, launch)
        wide = [dtype for dtype in (param, grad) if dtype in ("float32", "float64")]
        moments = 0 if state == "bfloat16" else 4 + launch["amsgrad"]
        assert code.count(r"LDG\.E.*\.128") >= moments + len(wide)
        assert (code.double > 0) == (param == "float64")


@needs_cuobjdump
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("grad", DTYPES)
def test_machine_code_of_the_norm(grad, capability):
    """Guards the norm's loads, of 16 bytes each, all of a chunk's in one go."""
    import triton.language as tl
    from maxva_kernels.triton_kernels.grad_norm import norm_chunks_kernel

    constants = {"T": tl.float32, "GRAD": getattr(tl, grad), "CHUNK": SimulatedTriton.NORM_CHUNK}
    code = machine_code(norm_chunks_kernel, tuple(sorted(constants.items())), capability)
    assert not code.uses_local_memory
    bytes_of_a_thread = SimulatedTriton.NORM_CHUNK // 128 * getattr(torch, grad).itemsize
    assert code.count(r"LDG\.E.*\.128") >= bytes_of_a_thread // 16
    assert code.double == 0


@needs_cpu_kernels
@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_other_architectures(algorithm, capability, monkeypatch):
    """Guards code that depends on the architecture: Triton makes other PTX for each."""
    install_triton(SimulatedTriton(capability=capability), monkeypatch)
    for dtype in (torch.float32, torch.bfloat16):
        options = {**BASE, "amsgrad": True, "max_grad_norm": 1.0}
        ours, theirs = (
            run(algorithm(make_params((1, 700, 9000), dtype), backend=name, **options), last=2)
            for name in ("triton", "cpu")
        )
        for a, b in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
            assert torch.equal(a, b)


def test_packed_groups_are_read_as_they_were_packed():
    """Guards the second description of a packed group, which stands in the launcher."""
    from maxva_kernels.triton_kernels import launcher

    assert launcher._PACKED_GROUP.format == PACKED_GROUP.format


def test_captured_copies_keep_memory_of_their_own():
    """Guards against replays that read freed memory, or what a later launch has copied over it: a graph's copies read
    their source at each replay."""
    launcher = SimulatedTriton()
    launcher._pinned = torch.zeros(5, dtype=torch.int64)
    begin = launcher._pinned.data_ptr()
    first, second = launcher._pinned_copy(torch.tensor([1, 2])), launcher._pinned_copy(torch.tensor([3, 4, 5]))
    assert (first.tolist(), second.tolist()) == ([1, 2], [3, 4, 5])
    assert [copy.data_ptr() for copy in (first, second)] == [begin, begin + 16]
    assert [copy.data_ptr() for copy in launcher._captured] == [begin, begin + 16]
    with pytest.raises(RuntimeError, match="no pinned memory is left"):
        launcher._pinned_copy(torch.tensor([6]))


def test_one_compilation_whatever_the_values():
    """Guards against a kernel that is compiled again because an address or a count happens to be 1, or a multiple of
    16, or small: all of them are int64 and nothing else is known of them."""
    from maxva_kernels.triton_kernels import grad_norm, step, update_norm

    kernels = [step.step_kernel, grad_norm.norm_chunks_kernel, grad_norm.norm_total_kernel]
    for kernel in (*kernels, update_norm.update_chunks_kernel, update_norm.update_total_kernel):
        for param in kernel.params:
            assert param.is_constexpr or (param.do_not_specialize and param.annotation_type == "i64"), param.name


def test_hyperparameters_beyond_float32():
    """Guards against an exception where C++ stores an infinity."""
    from maxva_kernels.triton_kernels.launcher import _hyperparameters

    packed = PACKED_GROUP.pack(0.1, 0, 0.9, 0.5, 0.999, 0.999, 1e300, 0.0, 1, 0, 0, 0)
    _, values = _hyperparameters(packed, 1.0, False)
    assert torch.frombuffer(bytearray(values), dtype=torch.float32)[1] == torch.inf


@pytest.mark.parametrize(("upper", "stall"), [(0.5, 2.0**-23), (0.9999, 2.0**-14), (1.0, 2.0**-14)])
def test_distance_at_which_w_becomes_1(upper, stall):
    """Guards against another than csrc/maxva.h's where beta2_range's upper bound is close to 1."""
    from maxva_kernels.triton_kernels.launcher import _hyperparameters

    packed = PACKED_GROUP.pack(0.1, 0, 0.9, 0.5, upper, 0.9, 1e-8, 0.0, 1, 0, 0, 0)
    _, values = _hyperparameters(packed, 1.0, False)
    assert torch.frombuffer(bytearray(values), dtype=torch.float32)[8] == stall


@pytest.mark.parametrize(
    ("missing", "advice"),
    [
        ("triton", "(No module named 'triton'); install it with: pip install triton"),
        ("maxva_kernels", "another folder"),
    ],
)
def test_where_triton_is_missing(missing, advice, monkeypatch):
    """Guards an error that says what to do: a source tree that hides the installed kernels wants no other Triton."""
    from maxva_kernels.backends import triton as backend

    error = ModuleNotFoundError(f"No module named '{missing}'", name=missing)
    monkeypatch.setattr(backend, "_import_error", lambda: error)
    with pytest.raises(RuntimeError, match=re.escape(advice)):
        MAdam(make_params((2,)), backend="triton")
