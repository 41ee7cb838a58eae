"""Run NVIDIA PTX kernels on the CPU: correctness tests without a GPU.

The simulator interprets the PTX that nvcc or Triton emits, so that a test exercises what the compiler produced
(vector widths, addressing, conversions, rounding, divergence, barriers) and not a second build of the same source.

    device = Device()
    x = device.buffer(np.arange(8, dtype=np.float32), "x")
    stats = Module(ptx_text).launch("scale", grid=1, block=32, args=[x, 8, 2.0], device=device)
    print(x.array, stats.report())

How it works
  * A register is an array with one raw unsigned integer for each thread. Several blocks run together as one wave,
    so that an instruction is a few numpy calls over tens of thousands of threads.
  * Threads are kept in groups by program counter, and the group with the smallest one runs first, which brings the
    threads of structured code together again. `bar.sync` and the `.sync` warp operations wait for the threads they
    name.
  * Global memory is the address space of this process, and a pointer in a kernel is a real address. `Device.buffer`
    copies an array into memory with guard zones around it; `Device.map` makes memory that exists, as of a torch
    tensor, accessible where it is. Every access is checked for bounds and for natural alignment (of the whole vector
    for v2 and v4) before it is done: nothing outside of the buffers can be touched. Shared and local memory and
    registers hold garbage at first.

What is checked: PTXError is raised, with the PTX line, the block and the thread, for
  * accesses that are out of bounds or misaligned, in every state space;
  * barriers that some threads of a block never reach, or reach at another place;
  * shfl, vote and redux whose mask names threads that have exited or omits the caller, and a shfl that reads a
    thread that does not take part;
  * launch limits and .reqntid, argument sizes, traps, failed device asserts;
  * with track=True, bytes read through ld.global.nc that the same launch wrote (and Buffer.reads and Buffer.writes
    count the accesses of each byte);
  * with racecheck=True, hazards in shared memory between warps within one barrier interval.

Floating point
  .rn add, sub, mul, fma, div, sqrt and rcp and the conversions are bit-exact IEEE, with .ftz and .sat as they say;
  NaN results of f16, bf16 and f32 arithmetic are canonical as on the hardware. The approximate instructions (ex2,
  lg2, sin, cos, tanh, rsqrt, and .approx and .full of div, sqrt and rcp) return the correctly rounded value, which
  real hardware does not always do; approx_ulp=k perturbs them by up to k units in the last place to test tolerance.
  Atomics are applied one after another in thread order; seed=n shuffles that order and the order of the blocks.

What it does not see: bugs of ptxas, missing fences (memory is sequentially consistent here), hazards between the
threads of one warp, occupancy, speed. The threads of a `.sync` warp operation must meet at one instruction, though
the hardware lets them differ. Waves run one after another: blocks that wait for each other need a max_lanes that
holds them all.

`ptxsim.mutate` changes a kernel in one place at a time, to see whether a test notices.

Not supported (raises Unsupported): indirect and recursive calls (others are inlined, and printf of the device prints
nothing), textures and surfaces, matrix instructions but ldmatrix, mbarrier, TMA and clusters, partial named
barriers, arithmetic that rounds otherwise than .rn, fp8. So is every modifier that the simulator does not know.
"""

from .errors import PTXError, Unsupported
from .memory import Buffer, Device
from .module import Module
from .stats import Stats

__all__ = ["Buffer", "Device", "Module", "PTXError", "Stats", "Unsupported"]
