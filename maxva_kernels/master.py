"""Master weights of bfloat16 parameters, kept as 16 bits beside them: csrc/master.h, where a note says why."""

from __future__ import annotations

import torch
from torch import Tensor

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
    bits = (param.detach().view(torch.int16).to(torch.int32) << 16) + master.detach().view(torch.int16)
    return bits.view(torch.float32)


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
    param = torch.where(is_nan, 0x7FC0, (bits.to(torch.int64) + 0x8000) >> 16).to(torch.int16)
    master = torch.where(is_nan, 0, bits).to(torch.int16)
    return param.view(torch.bfloat16), master.view(torch.bfloat16)
