"""The optimizers that are compared: ours by any backend, torch's AdamW, other packages'; and what memory allows.

A contender's step is all that it has to do for an update; with clipping it has the norm of all gradients to find as
well, the others' by `clip_grad_norm_`. A contender may have several sets of tensors, and each of its steps takes the
next one, so that none lies in the cache from the step before.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from gpu_check.table import COPY, UPDATE

from stepbench.shapes import Shapes

OPTIONS: dict[str, Any] = {"lr": 1e-4, "eps": 1e-8, "weight_decay": 0.01}
ADAMW = "AdamW (torch, fused)"  # what the others are compared with
TORCHS = {ADAMW: "fused", "AdamW (torch, foreach)": "foreach"}

Params = list[torch.nn.Parameter]
Make = Callable[[Params], torch.optim.Optimizer]


class Other(NamedTuple):
    """A fused AdamW of another package, and which of its arguments differ from torch's."""

    module: str
    cls: str
    extra: dict[str, Any] = {}  # noqa: RUF012
    quantized: bool = False  # keeps its state in 8 bits or so
    compiles: bool = False  # by torch.compile, which takes a minute for a model's shapes
    gpu_only: bool = False


OTHERS = {
    "AdamW (apex)": Other("apex.optimizers", "FusedAdam", {"adam_w_mode": True}, gpu_only=True),
    "AdamW (TransformerEngine)": Other(
        "transformer_engine.pytorch.optimizers", "FusedAdam", {"adam_w_mode": True}, gpu_only=True
    ),
    "AdamW (bitsandbytes, 32 bits)": Other("bitsandbytes.optim", "AdamW32bit"),
    "AdamW (bitsandbytes, 8 bits)": Other("bitsandbytes.optim", "AdamW8bit", quantized=True),
    "AdamW (torchao, 8 bits)": Other("torchao.optim", "AdamW8bit", quantized=True, compiles=True),
    "AdamW (torchao, float8)": Other("torchao.optim", "AdamWFp8", quantized=True, compiles=True),
    "AdamW (flashoptim)": Other("flashoptim", "FlashAdamW", quantized=True, gpu_only=True),
}


class Missing(Exception):
    """This contender cannot run here; the message says why."""


@dataclass(frozen=True)
class Options:
    """What is asked of every contender."""

    amsgrad: bool = False
    max_grad_norm: float | None = None
    saturated: bool = False  # MAdam's w is 1, as after some thousand steps
    trust_ratio: bool = False  # of MAdam
    collect_statistics: bool = False
    state_dtype: str | None = None


PLAIN = Options()
FEATURES: dict[str, dict[str, Any]] = {
    "amsgrad": {"amsgrad": True},
    "clip": {"max_grad_norm": 1.0},
    "statistics": {"collect_statistics": True},
    "trust ratio": {"trust_ratio": True},
    "saturated": {"saturated": True},
    "bfloat16 state": {"state_dtype": "bfloat16"},
    "bfloat16 state, saturated": {"state_dtype": "bfloat16", "saturated": True},
}


@dataclass
class Contender:
    name: str
    step: Callable[[], object]
    bytes: int | None  # moved by a step if every operand crosses the memory bus once each way it must; None: more
    slow: bool = False  # eager code: few steps are enough, and its temporaries may disturb the others
    tensors: int = 0  # bytes of all its tensors together
    sets: Sequence[Params] = field(default=(), repr=False)  # that its steps take in turns

    def release(self) -> None:
        """Gives its tensors back; what was said of it stays."""
        self.step, self.sets = lambda: None, ()


def make_params(shapes: Shapes, dtype: torch.dtype, device: str | torch.device = "cpu") -> Params:
    params = []
    for shape in shapes:
        param = torch.nn.Parameter(torch.randn(shape, device=device).to(dtype))
        grad = torch.randn(shape, device=device).mul_(1e-3)
        if dtype == torch.float16:  # AdamW's state is then float16 too, where small squares and eps are 0
            grad += grad.sign()
        param.grad = grad.to(dtype)
        params.append(param)
    return params


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def memory_of(value: Any) -> Iterator[torch.Tensor]:
    """The plain tensors that a state's entry keeps; a quantized one is a wrapper around several."""
    if isinstance(value, torch.Tensor):
        inner = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else []
        if not inner:
            yield value
        for name in inner:
            yield from memory_of(getattr(value, name))
    elif hasattr(value, "__dict__"):
        for attribute in vars(value).values():
            yield from memory_of(attribute)


def traffic(params: Sequence[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Bytes that a step moves, and bytes of all tensors: parameters and state are read and written, gradients read."""
    moments = [
        tensor
        for state in optimizer.state.values()
        for key, value in state.items()
        if key != "step"
        for tensor in memory_of(value)
    ]
    written, read = bytes_of([*params, *moments]), bytes_of([param.grad for param in params if param.grad is not None])
    return 2 * written + read, written + read


def first_step(params: Params, step: Callable[[], object]) -> None:
    """The step that makes the state. Its gradients are the opposites of all that follow, which are always the same:
    else nothing would deviate from the mean, and a quotient of every coordinate be 0 by 0, which a GPU's kernels have a
    way of their own for."""
    grads = [param.grad for param in params if param.grad is not None]
    torch._foreach_neg_(grads)
    step()
    torch._foreach_neg_(grads)


def saturate(optimizer: torch.optim.Optimizer) -> int:
    """Has MAdam find that all its w are 1, as after some thousand steps; the bytes that a step then leaves alone."""
    weight_sums = []
    for state in optimizer.state.values():
        if "weight_sum" in state:
            weight_sums.append(state["weight_sum"].fill_(1))
            state["step"].fill_(15)  # the kernels of a GPU look in one step of 16
    optimizer.step()
    return 2 * bytes_of(weight_sums)


def clipping_bytes(params: Params) -> int:
    """Of `clip_grad_norm_`, which reads all gradients for the norm, then reads and writes them."""
    return 3 * bytes_of([param.grad for param in params if param.grad is not None])


def taking_turns(name: str, make: Make, sets: Sequence[Params], options: Options = PLAIN) -> Contender:
    """An optimizer for each set; clips by `clip_grad_norm_` where the optimizer does not by itself."""
    optimizers = [make(params) for params in sets]
    outside = None if hasattr(optimizers[0], "max_grad_norm") else options.max_grad_norm

    def stepper(params: Params, optimizer: Any) -> Callable[[], object]:
        if outside is None:
            return optimizer.step

        def clipped() -> None:
            torch.nn.utils.clip_grad_norm_(params, outside)
            optimizer.step()

        return clipped

    steps = [stepper(*pair) for pair in zip(sets, optimizers, strict=True)]
    for params, step in zip(sets, steps, strict=True):
        first_step(params, step)
    moved, tensors = traffic(sets[0], optimizers[0])
    if options.saturated:
        (saved, *_) = map(saturate, optimizers)
        moved -= saved
    if outside is not None:
        moved += clipping_bytes(sets[0])
    elif options.max_grad_norm is not None:  # for the norm
        moved += bytes_of([param.grad for param in sets[0] if param.grad is not None])
    if options.trust_ratio and hasattr(optimizers[0], "statistics"):
        moved += tensors  # for the norms
    turns = itertools.cycle(steps)
    return Contender(name, lambda: next(turns)(), moved, tensors=len(sets) * tensors, sets=sets)


def ours(name: str, algorithm: Any, backend: str, sets: Sequence[Params], options: Options = PLAIN) -> Contender:
    """MAdam or LaMAdam by one backend.

    Raises:
        Missing: the backend does not have that option.
    """
    settings = {name: value for name, value in asdict(options).items() if name != "saturated"}
    settings |= {"backend": backend, **OPTIONS}
    try:
        contender = taking_turns(name, lambda params: algorithm(params, **settings), sets, options)
    except NotImplementedError as error:
        raise Missing(str(error)) from error
    if backend == "reference":  # temporaries are most of what it moves
        contender.bytes, contender.slow = None, True
    return contender


def torchs(name: str, sets: Sequence[Params], options: Options = PLAIN) -> Contender:
    """torch.optim.AdamW, whose state has the parameters' dtype."""
    settings = {"amsgrad": options.amsgrad, TORCHS[name]: True, **OPTIONS}
    contender = taking_turns(name, lambda params: torch.optim.AdamW(params, **settings), sets, options)
    contender.slow = is_slow(name, sets[0][0].device)
    return contender


def is_slow(name: str, device: torch.device) -> bool:
    """A CPU's system maps the temporaries of foreach anew in each step."""
    return TORCHS[name] == "foreach" and device.type == "cpu"


def others(name: str, make_sets: Callable[[], Sequence[Params]], device: torch.device, options: Options) -> Contender:
    """A fused AdamW of another package.

    Raises:
        Missing: it cannot run here.
    """
    other = OTHERS[name]
    if options.amsgrad:
        raise Missing("not measured with AMSGrad")
    try:
        cls = getattr(importlib.import_module(other.module), other.cls)
    except ModuleNotFoundError as error:
        if other.module.partition(".")[0] == error.name:
            raise Missing("not installed" + other.gpu_only * (device.type == "cpu") * ", and for GPUs only") from None
        raise Missing(f"cannot be imported: {error}") from error
    except Exception as error:  # whatever a foreign package raises
        raise Missing(f"cannot be imported: {type(error).__name__}: {str(error)[:100]}") from error
    if other.gpu_only and device.type == "cpu":
        raise Missing("for GPUs only")
    try:
        return taking_turns(name, lambda params: cls(params, **OPTIONS, **other.extra), make_sets(), options)
    except Exception as error:
        raise Missing(f"{type(error).__name__}: {str(error)[:100]}") from error


def bandwidths(size: int, device: torch.device) -> list[Contender]:
    """What memory allows: a copy between two buffers of so many bytes, in-place updates of six with as much in all."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    arrays = [torch.ones(max(1, size // 12), device=device) for _ in range(6)]
    return [
        Contender(COPY, lambda: target.copy_(source), 2 * bytes_of([source]), tensors=2 * bytes_of([source])),
        Contender(UPDATE, lambda: torch._foreach_mul_(arrays, -1.0), 2 * bytes_of(arrays), tensors=bytes_of(arrays)),
    ]
