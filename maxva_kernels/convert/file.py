"""`python -m maxva_kernels convert IN OUT`: the optimizer state within a checkpoint file."""

from __future__ import annotations

import argparse
import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from . import formats
from .adam import from_adam
from .authors import from_authors, to_authors


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="IN", type=Path, help="an optimizer's state dict, or a checkpoint with one")
    parser.add_argument("target", metavar="OUT", type=Path, help="where the converted one is written")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists; it may be IN")
    adam = parser.add_argument_group("from torch's Adam or AdamW")
    bounds = ("LOWER", "UPPER")
    adam.add_argument(
        "--beta2-range", nargs=2, type=float, metavar=bounds, help="of beta; default: 0.5 and Adam's beta2"
    )
    adam.add_argument(
        "--decoupled-weight-decay",
        action=argparse.BooleanOptionalAction,
        help="whether the weight decay is AdamW's, where an old checkpoint does not say",
    )
    ours = parser.add_argument_group("from this package")
    ours.add_argument(
        "--fairseq", action="store_true", help="for the authors' fairseq code, whose LaMAdam's keys differ"
    )


def convert_file(arguments: argparse.Namespace) -> str:
    """Reads IN, converts the one optimizer state in it, and writes all to OUT, which appears whole or not at all.

    Args:
        arguments: what `add_arguments` asks for.

    Returns:
        What was done, for a person.

    Raises:
        ValueError: IN is no checkpoint, has no or several optimizer states, or that cannot be converted.
        OSError: a file cannot be read or written, or OUT exists.
    """
    source, target = arguments.source, arguments.target
    if os.path.lexists(target):
        if not arguments.overwrite:
            raise FileExistsError(f"{target} exists; pass --overwrite to replace it")
        if target.exists() and not target.is_file():
            raise FileExistsError(f"{target} is no file that could be replaced; name another")
    holder = [_load(source)]
    found = list(_optimizer_states(holder, 0, ""))
    if len(found) != 1:
        held = f"a {type(holder[0]).__name__}"
        if isinstance(holder[0], dict):
            held = f"the keys {sorted(map(str, holder[0]))}"
        several = f"several, at {', '.join(name for name, _, _ in found)}; use maxva_kernels.convert in Python on each"
        what = several if found else f"none: it has {held}"
        raise ValueError(
            f"{source} must hold one optimizer state, a dict with 'state' and 'param_groups'; it has {what}"
        )
    name, parent, key = found[0]
    try:
        parent[key], what = _convert(parent[key], arguments)
    except ValueError as error:
        raise ValueError(f"{source}{name}: {error}") from error
    except (AttributeError, LookupError, RuntimeError, TypeError) as error:
        words = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise ValueError(f"{source}{name} is not as an optimizer leaves it ({words})") from error
    _save(holder[0], target)
    return f"{source}{name}, {what}, written to {target}"


def _load(path: Path) -> Any:
    try:
        # argparse.Namespace: fairseq's checkpoints keep the command line as one.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # bytes that are no checkpoint fail in as many ways as there are instructions
        raise ValueError(
            f"{path} cannot be loaded as tensors and plain values; if you trust it and it holds other objects, load it "
            f"in Python and use maxva_kernels.convert ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
        ) from error


def _optimizer_states(parent: Any, key: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    """Every optimizer state dict at or below ``parent[key]``: its name, the dict or list that has it, and its key."""
    value = parent[key]
    if isinstance(value, dict) and {"state", "param_groups"} <= value.keys():
        yield name, parent, key
    elif isinstance(value, dict | list):
        for inner in value if isinstance(value, dict) else range(len(value)):
            yield from _optimizer_states(value, inner, f"{name}[{inner!r}]")


def _convert(state_dict: dict[str, Any], arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The converted dict, and from what into what."""
    source = formats.source_of(state_dict)
    of_adam = arguments.beta2_range is not None or arguments.decoupled_weight_decay is not None
    if of_adam and source is not formats.ADAM:
        raise ValueError(f"it is of {source.name}; --beta2-range and --decoupled-weight-decay are for Adam's")
    if arguments.fairseq and source is not formats.OURS:
        raise ValueError(f"it is of {source.name}; --fairseq is for what this package wrote")
    if source is formats.OURS:
        converted = to_authors(state_dict, fairseq=arguments.fairseq)
        target = f"the authors' {state_dict['param_groups'][0]['algorithm']}"
    else:
        if source is formats.ADAM:
            options = {name: getattr(arguments, name) for name in ("beta2_range", "decoupled_weight_decay")}
            converted = from_adam(state_dict, **options)
        else:
            converted = from_authors(state_dict)
        target = f"this package's {converted['param_groups'][0]['algorithm']}"
    return converted, f"of {source.name}, made {target}'s ({len(converted['state'])} parameters with state)"


def _save(checkpoint: Any, path: Path) -> None:
    """Writes beside ``path``, or beside what it is a link to, and renames: an interruption leaves what was there."""
    path = Path(os.path.realpath(path))
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
            partial = Path(file.name)
            try:
                torch.save(checkpoint, file)
                file.close()
                _give_rights(partial, path)
                partial.replace(path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
    except (OSError, RuntimeError) as error:  # torch's for a write that failed
        raise OSError(f"{path} cannot be written: {error}") from error


def _give_rights(partial: Path, path: Path) -> None:
    """Those of the file that is replaced, which may be private; of a new one the usual."""
    if path.exists():
        before = path.stat()
        with contextlib.suppress(PermissionError):
            os.chown(partial, before.st_uid, before.st_gid)
        mode = stat.S_IMODE(before.st_mode)
    else:
        mask = os.umask(0)
        os.umask(mask)
        mode = 0o666 & ~mask
    partial.chmod(mode)
