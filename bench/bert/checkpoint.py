"""Checkpoints: one file, the same whether one process, DDP or FSDP2 wrote it, replaced atomically.

Model and optimizer state are whole and named by parameter, so a run may continue on another number of ranks. There is
no random state in it: sequences, masks and dropout come from seeds of the step.
"""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

NAME = "checkpoint.pt"
FORMAT = 2


class CheckpointError(Exception):
    """There is no checkpoint that can be used; the message says why."""


def save(directory: Path, write: bool, model: nn.Module, optimizer: torch.optim.Optimizer, **rest: Any) -> None:
    """Every rank calls it, since shards are gathered; the rank with `write` writes."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    content = {
        "format": FORMAT,
        "model": get_model_state_dict(model, options=options),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
        **rest,
    }
    if write:
        path = directory / NAME
        temporary = f"{path}.new"
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def read(directory: Path) -> dict[str, Any]:
    """The checkpoint's content, tensors mapped from the file; every rank reads it."""
    path = directory / NAME
    if not path.is_file():
        raise CheckpointError(f"--resume {directory}: there is no {NAME} in it; a run saves its first one later")
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        raise CheckpointError(f"--resume {directory}: {NAME} cannot be read: {error}") from error
    if content.get("format") != FORMAT:
        raise CheckpointError(f"--resume {directory}: format {content.get('format')}; this script reads {FORMAT}")
    return content


def restore(content: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, content["model"], options=options)
    set_optimizer_state_dict(model, optimizer, content["optimizer"], options=options)
