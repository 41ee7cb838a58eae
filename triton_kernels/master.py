"""Master weights: csrc/master.h operation for operation; the note is there."""

import triton
import triton.language as tl


@triton.jit
def join_master(param, rest):
    """The master, float32, of a bfloat16 parameter and an int16 rest."""
    bits = param.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
    master = (bits + rest.to(tl.int32).to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)
    return tl.where(master == master, master, bits.to(tl.float32, bitcast=True))


@triton.jit
def split_master(master):
    """Parameter and rest."""
    bits = master.to(tl.uint32, bitcast=True)
    param = tl.where(master != master, 0x7FC0, (bits + 0x8000) >> 16).to(tl.uint16)
    rest = tl.where(master != master, 0, bits & 0xFFFF).to(tl.uint16)
    return param.to(tl.bfloat16, bitcast=True), rest.to(tl.int16, bitcast=True)
