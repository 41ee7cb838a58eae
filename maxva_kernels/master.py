"""Master weights: of bfloat16 parameters kept as 16 bits beside them (csrc/master.h, where a note says why), of float16
parameters whole."""

from __future__ import annotations

import torch
from torch import Tensor

from . import layouts

__all__ = ["join_master", "split_master"]


def join_master(param: Tensor, master: Tensor) -> Tensor:
    """The master weight, float32, of a bfloat16 parameter and its optimizer state's ``master``.

    The latter, bfloat16 of the parameter's shape, is 16 bits that mean nothing as a number.

    Raises:
        ValueError: they have other dtypes or shapes.
    """
    if not param.dtype == master.dtype == torch.bfloat16 or param.shape != master.shape:
        raise ValueError(
            f"a bfloat16 parameter and a bfloat16 master of its shape make a weight, got {param.dtype} of shape "
            f"{list(param.shape)} and {master.dtype} of shape {list(master.shape)}"
        )
    bits = param.detach().view(torch.int16).to(torch.int32) << 16
    weight = (bits + master.detach().view(torch.int16)).view(torch.float32)
    return torch.where(weight.isnan(), bits.view(torch.float32), weight)


def split_master(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 weight as a bfloat16 parameter, to nearest with ties away from zero, and the ``master`` beside it, of
    which `join_master` makes the weight again.

    Raises:
        ValueError: it has another dtype.
    """
    if weight.dtype != torch.float32:
        raise ValueError(f"a float32 weight can be split, got {weight.dtype}")
    is_nan = weight.isnan()
    bits = weight.detach().view(torch.int32)
    param = torch.where(is_nan, 0x7FC0, (bits + 0x8000) >> 16).to(torch.int16)
    master = torch.where(is_nan, 0, bits).to(torch.int16)
    return param.view(torch.bfloat16), master.view(torch.bfloat16)


def why_unfit(param: Tensor, master: Tensor) -> str | None:
    """Why a float16 parameter cannot be stepped by this master weight, and what to do about it; None if it can."""
    if layouts.may_overlap(param):
        return "has elements that share memory (an expanded tensor?); use parameter.clone() or .contiguous()"
    is_dense = master.layout == torch.strided and not layouts.may_overlap(master)
    if not is_dense or master.dtype != torch.float32 or (master.shape, master.device) != (param.shape, param.device):
        return (
            f"has a state whose 'master' is {master.dtype} of shape {list(master.shape)} on {master.device}, but must "
            f"be torch.float32 of shape {list(param.shape)} on {param.device}, and dense; without it one is made"
        )
    return None


def renew_masters(params: list[Tensor], masters: list[Tensor]) -> None:
    """Sets float32 masters to their float16 parameters, in place, in those elements that something else has written.

    These are known by not being the master's rounding; what a counter of versions would tell, it would not tell of
    writes to `.data`, in compiled graphs, or in replays of captured ones. Bits are compared, so that a zero keeps its
    sign, and a master beyond float16's range is that of an infinity that nobody wrote.
    """
    for param, master in zip(params, masters, strict=True):
        is_rounding = master.to(param.dtype).view(torch.int16) == param.detach().view(torch.int16)
        torch.where(is_rounding, master, param.detach(), out=master)


def round_masters(params: list[Tensor], masters: list[Tensor]) -> None:
    """Sets float16 parameters to their masters, in place."""
    if params:
        torch._foreach_copy_(params, masters)
