"""Global memory: what a kernel may touch, and that it cannot touch anything else."""

import ctypes

import numpy as np
import pytest

from ptxsim import Device, PTXError
from ptxsim.memory import GLOBAL_LIMIT, GUARD, WINDOW
from ptxsim.testing import assemble

LOAD_AND_STORE = (
    "ld.param.u64 %rd1, [p0]; ld.global.u32 %r1, [%rd1]; add.u32 %r1, %r1, 1; st.global.u32 [%rd1], %r1; ret;"
)


@pytest.fixture(scope="module")
def increment():
    """A kernel that adds one to the integer at its argument."""
    body = "ld.param.u64 %rd1, [p0]; ld.global.u32 %r1, [%rd1]; add.u32 %r1, %r1, 1; st.global.u32 [%rd1], %r1; ret;"
    return assemble(["u64"], body)


def test_buffer_is_real_memory_and_live():
    """The pointer is an address of this process, and the array shows what is there."""
    device = Device()
    buffer = device.buffer(np.arange(10, dtype=np.float32).reshape(2, 5), "x")
    assert buffer.ptr % 256 == 0
    assert buffer.array.shape == (2, 5)
    assert ctypes.c_float.from_address(buffer.ptr + 28).value == 7.0
    ctypes.c_float.from_address(buffer.ptr + 28).value = 70.0
    assert buffer.array[1, 2] == 70.0


def test_offset_moves_the_pointer_off_its_alignment():
    """Kernels have other paths for pointers that are not aligned: tests have to be able to make some."""
    device = Device()
    data = np.arange(10, dtype=np.float32)
    aligned_for_floats, odd = device.buffer(data, offset=4), device.buffer(data, offset=3)
    assert aligned_for_floats.ptr % 256 == 4
    assert (aligned_for_floats.array == data).all()
    assert odd.ptr % 256 == 3
    assert odd.array.tobytes() == data.tobytes()


def test_bytes_around_a_buffer_are_out_of_bounds(increment):
    """An access just outside is an error even where another buffer is allocated next."""
    device = Device()
    buffers = [device.zeros(4, np.uint32, f"b{i}") for i in range(20)]
    for buffer in buffers:
        for other in buffers:
            if other is not buffer:
                assert buffer.end + GUARD <= other.ptr or other.end + GUARD <= buffer.ptr
        increment.launch("k", 1, 1, [buffer.ptr + 12], device)
        for outside in (-GUARD, -4, 16, 16 + GUARD - 4):
            with pytest.raises(PTXError, match=rf"out-of-bounds ld of 4 bytes .*{buffer.name}: offset {outside} of 16"):
                increment.launch("k", 1, 1, [buffer.ptr + outside], device)
    assert all(buffer.array.tolist() == [0, 0, 0, 1] for buffer in buffers)


def test_map_makes_existing_memory_accessible_where_it_is(increment):
    """Host code that passes real addresses must work unchanged, and only on what was mapped."""
    device, memory = Device(), np.arange(8, dtype=np.uint32)
    address = memory.ctypes.data
    with pytest.raises(PTXError, match="no buffers exist"):
        increment.launch("k", 1, 1, [address], device)
    buffer = device.map(address + 4, 8, "middle")
    assert buffer.ptr == address + 4
    assert buffer.array.view(np.uint32).tolist() == [1, 2]
    increment.launch("k", 1, 1, [address + 8], device, track=True)
    assert memory.tolist() == [0, 1, 3, 3, 4, 5, 6, 7]
    assert buffer.reads.tolist() == buffer.writes.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    for outside in (address, address + 12):
        with pytest.raises(PTXError, match="out-of-bounds"):
            increment.launch("k", 1, 1, [outside], device)


def test_map_of_a_torch_tensor(increment):
    """The use it is made for: a pointer from data_ptr()."""
    torch = pytest.importorskip("torch")
    device, tensor, empty = Device(), torch.arange(1000, dtype=torch.int32), torch.empty(0)
    device.map(tensor.data_ptr(), tensor.nbytes, "tensor")
    device.map(empty.data_ptr(), empty.nbytes, "empty")
    increment.launch("k", 1, 1, [tensor.data_ptr() + 4 * 999], device)
    assert tensor[999] == 1000


def test_unmapped_memory_is_out_of_reach(increment):
    """A tensor that was freed must not stay accessible."""
    device, memory = Device(), np.zeros(4, np.uint32)
    buffer, other = device.map(memory.ctypes.data, 16, "gone"), device.zeros(4, np.uint32)
    increment.launch("k", 1, 1, [buffer], device)
    device.unmap(buffer)
    assert device.buffers == [other]
    with pytest.raises(PTXError, match="out-of-bounds"):
        increment.launch("k", 1, 1, [memory.ctypes.data], device)
    with pytest.raises(ValueError, match="not on this device"):
        device.unmap(buffer)
    device.map(memory.ctypes.data, 16, "back")
    increment.launch("k", 1, 1, [memory.ctypes.data], device)
    assert memory[0] == 2


def test_overlapping_maps_are_refused():
    """Two tensors cannot share bytes: the counts of accesses would be ambiguous."""
    device, memory = Device(), np.zeros(64, np.uint8)
    start = memory.ctypes.data
    device.map(start + 16, 16, "first")
    for begin, nbytes in ((16, 16), (8, 9), (31, 1), (20, 4), (0, 64)):
        with pytest.raises(ValueError, match="overlaps"):
            device.map(start + begin, nbytes, "second")
    device.map(start, 16, "before")
    device.map(start + 32, 32, "behind")
    with pytest.raises(ValueError, match="overlaps"):
        device.map(device.zeros(4, np.uint8).ptr, 1, "in a buffer")


def test_empty_maps_give_access_to_nothing(increment):
    """Tensors without elements have any address, often null; they neither overlap nor hide others."""
    device, memory = Device(), np.zeros(8, np.uint32)
    whole = device.map(memory.ctypes.data, 32, "whole")
    empty = device.map(memory.ctypes.data + 16, 0, "inside")
    null = device.map(0, 0, "null")
    assert empty.array.size == null.array.size == 0
    increment.launch("k", 1, 1, [memory.ctypes.data + 16], device)
    device.unmap(whole)
    for address in (empty, null):
        with pytest.raises(PTXError, match="out-of-bounds"):
            increment.launch("k", 1, 1, [address], device)
    device.unmap(empty)


@pytest.mark.parametrize("address", [8, -8, GLOBAL_LIMIT - 4, GLOBAL_LIMIT, WINDOW["shared"], WINDOW["local"] + 64])
def test_maps_outside_of_the_address_space_are_refused(address):
    """Shared and local memory have generic addresses of their own, which no buffer can take."""
    with pytest.raises(ValueError, match="not in the address space"):
        Device().map(address, 8, "wild")
    with pytest.raises(ValueError, match="not in the address space"):
        Device().map(1 << 20, -1, "negative")


@pytest.mark.parametrize(
    "address", [0, 4, 1 << 47, GLOBAL_LIMIT, WINDOW["shared"], WINDOW["param"], (1 << 63) - 4, 1 << 63, (1 << 64) - 4]
)
@pytest.mark.parametrize("space", ["", ".global"])
def test_wild_addresses_are_errors_and_not_crashes(address, space):
    """The simulator shares its address space with the kernel: a wrong pointer must be found before it is used."""
    module = assemble(["u64"], f"ld.param.u64 %rd1, [p0]; ld{space}.u32 %r1, [%rd1]; st{space}.u32 [%rd1], %r1; ret;")
    for buffers in (0, 1, 2):
        device = Device()
        for _ in range(buffers):
            device.zeros(4, np.uint32)
        with pytest.raises(PTXError, match=r"out-of-bounds|no state space|read-only param"):
            module.launch("k", 1, 1, [address], device)


def test_one_wrong_thread_among_many_is_found():
    """Bounds are looked up for many threads together: none may slip through, and the message names the right one."""
    body = """ld.param.u64 %rd1, [p0]; ld.param.u64 %rd2, [p1]; mov.u32 %r1, %tid.x;
    setp.eq.u32 %p1, %r1, {thread}; selp.b64 %rd3, %rd2, %rd1, %p1; mul.wide.u32 %rd4, %r1, 4; add.s64 %rd3, %rd3, %rd4;
    @%p1 mov.u64 %rd3, %rd2; ld.global.u32 %r2, [%rd3]; ret;"""
    device = Device()
    many, single = device.zeros(256, np.uint32, "many"), device.zeros(1, np.uint32, "single")
    for thread in (0, 63, 64, 100, 255):
        module = assemble(["u64", "u64"], body.format(thread=thread))
        stats = module.launch("k", 1, 256, [many, single], device)
        assert stats.buffer_bytes == {("many", "ld"): 4 * 255, ("single", "ld"): 4}
        for wrong in (single.ptr + 4, many.ptr - 4, 0, many.end):
            with pytest.raises(PTXError, match=rf"out-of-bounds.*thread \({thread},0,0\)"):
                module.launch("k", 1, 256, [many, wrong], device)


def test_vector_must_lie_in_one_buffer_as_a_whole():
    """The end of a vector may lie outside where its start does not."""
    module = assemble(["u64"], "ld.param.u64 %rd1, [p0]; ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd1]; ret;")
    device, memory = Device(), np.zeros(64, np.uint8)
    start = -(-memory.ctypes.data // 16) * 16
    device.map(start, 16, "first")
    device.map(start + 16, 15, "second")
    module.launch("k", 1, 1, [start], device)
    with pytest.raises(PTXError, match="out-of-bounds ld of 16 bytes"):
        module.launch("k", 1, 1, [start + 16], device)
    with pytest.raises(PTXError, match="out-of-bounds ld of 16 bytes"):  # from one into the other
        module.launch("k", 1, 1, [start + 8], device)


def test_misaligned_vector_is_found():
    """The hardware faults on a vector that is aligned for its elements only."""
    module = assemble(["u64"], "ld.param.u64 %rd1, [p0]; ld.global.v2.u32 {%r1, %r2}, [%rd1]; ret;")
    device = Device()
    buffer = device.zeros(8, np.uint32)
    module.launch("k", 1, 1, [buffer.ptr + 8], device)
    with pytest.raises(PTXError, match="misaligned ld of 8 bytes"):
        module.launch("k", 1, 1, [buffer.ptr + 4], device)


def test_thousands_of_buffers():
    """Multi-tensor kernels see models with thousands of tensors; each thread may hit another one."""
    device, memory = Device(), np.arange(6000, dtype=np.uint32)
    order = np.random.default_rng(0).permutation(3000)
    for i in order:  # every second element
        device.map(memory.ctypes.data + 8 * int(i), 4, f"t{i}")
    module = assemble(
        ["u64"],
        """ld.param.u64 %rd1, [p0]; mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x; mov.u32 %r3, %tid.x;
        mad.lo.s32 %r1, %r1, %r2, %r3; mul.wide.u32 %rd2, %r1, 8; add.s64 %rd1, %rd1, %rd2;
        ld.global.u32 %r4, [%rd1]; add.u32 %r4, %r4, 1; st.global.u32 [%rd1], %r4; ret;""",
    )
    stats = module.launch("k", 30, 100, [memory.ctypes.data], device)
    assert (memory[::2] == np.arange(0, 6000, 2) + 1).all()
    assert (memory[1::2] == np.arange(1, 6000, 2)).all()
    assert stats.buffer_bytes["t77", "st"] == 4
    with pytest.raises(PTXError, match=r"out-of-bounds.*nearest buffer t2999: offset 8 of 4"):
        module.launch("k", 31, 100, [memory.ctypes.data], device)
    for buffer in device.buffers:
        device.unmap(buffer)
    assert device.buffers == []


def test_counts_of_launches_add_up(increment):
    """Reads and writes are counted over tracked launches alone, each byte on its own."""
    device = Device()
    buffer = device.zeros(2, np.uint32)
    increment.launch("k", 3, 2, [buffer.ptr + 4], device)
    assert not buffer.reads.any()
    for _ in range(2):
        increment.launch("k", 3, 2, [buffer.ptr + 4], device, track=True)
    assert buffer.reads.tolist() == buffer.writes.tolist() == [0, 0, 0, 0, 12, 12, 12, 12]


def test_non_coherent_load_of_written_memory_is_found():
    """ld.global.nc may return what was there before the kernel began."""
    body = "ld.param.u64 %rd1, [p0]; ld.global.nc.u32 %r1, [%rd1]; st.global.u32 [%rd1+{offset}], %r1; ret;"
    same, other = assemble(["u64"], body.format(offset=0)), assemble(["u64"], body.format(offset=4))
    with pytest.raises(PTXError, match=r"ld.global.nc read 4 bytes of .*first at offset 0"):
        same.launch("k", 1, 1, [np.zeros(4, np.uint32)], track=True)
    other.launch("k", 1, 1, [np.zeros(4, np.uint32)], track=True)


def test_non_coherent_load_of_what_another_launch_wrote_is_fine(increment):
    """A kernel may read with ld.global.nc what an earlier or later one writes."""
    device = Device()
    buffer = device.zeros(4, np.uint32)
    reader = assemble(["u64"], "ld.param.u64 %rd1, [p0]; ld.global.nc.u32 %r1, [%rd1]; ret;")
    for module in (increment, reader, increment):
        module.launch("k", 1, 1, [buffer], device, track=True)


def test_coalescing_counts_sectors():
    """32 threads that read 4 bytes each take 4 sectors if they are neighbours, and 32 if they are far apart."""
    body = """ld.param.u64 %rd1, [p0]; mov.u32 %r1, %tid.x; mul.wide.u32 %rd2, %r1, {stride}; add.s64 %rd1, %rd1, %rd2;
    ld.global.u32 %r2, [%rd1]; ret;"""
    for stride, sectors in ((4, 4), (64, 32)):
        device = Device()
        buffer = device.zeros(32 * 64, np.uint8)
        stats = assemble(["u64"], body.format(stride=stride)).launch("k", 1, 32, [buffer], device, coalescing=True)
        assert stats.sectors == {"ld": sectors, "st": 0}
