"""How long one optimizer step takes, beside AdamW, the eager reference and the floor that memory sets.

    python bench/step.py                        100 M parameters in 25 tensors, then 400 of one element (host time)
    python bench/step.py --shapes bert-base     a model's tensors; see --help

Contenders take turns, so a slow moment of a shared machine meets all of them; medians with the range in brackets. The
floor is bytes moved over the bandwidth of in-place updates measured in the same turns (a copy would pay for reading
what it overwrites, and is no ceiling). Eager code comes after them in turns of its own: its temporaries would leave the
others a cold machine; in one large tensor most of its time would be page faults. Not controlled: clock
frequency, other processes, huge pages, NUMA placement.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import torch

from maxva_kernels import LaMAdam, MAdam, _ops, reference
from maxva_kernels.groups import Hyperparameters

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPTIONS = {"lr": 1e-4, "eps": 1e-8, "weight_decay": 0.01}


def bert_shapes(hidden: int, layers: int, vocabulary: int = 30522) -> list[tuple[int, ...]]:
    """The parameters of BERT for pretraining (Devlin et al., 2019), word embeddings tied to the decoder."""
    h, f = hidden, 4 * hidden
    embeddings = [(vocabulary, h), (512, h), (2, h), (h,), (h,)]
    layer = [(h, h), (h,)] * 4 + [(h,), (h,), (f, h), (f,), (h, f), (h,), (h,), (h,)]
    heads = [(h, h), (h,), (h, h), (h,), (h,), (h,), (vocabulary,), (2, h), (2,)]
    return embeddings + layer * layers + heads


SHAPES: dict[str, list[tuple[int, ...]]] = {
    "100m": [(4_000_000,)] * 25,
    "one": [(100_000_000,)],
    "tiny": [(1,)] * 400,
    "bert-base": bert_shapes(768, 12),
    "bert-large": bert_shapes(1024, 24),
}


@dataclass
class Contender:
    name: str
    step: Callable[[], object]
    bytes: int  # moved by one step if every operand crosses the memory bus once each way it must


@dataclass
class Result:
    name: str
    seconds: list[float]
    bytes: int

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def make_params(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: str | torch.device = "cpu"
) -> list[torch.nn.Parameter]:
    params = []
    for shape in shapes:
        param = torch.nn.Parameter(torch.randn(shape, device=device).to(dtype))
        param.grad = torch.randn(shape, device=device).mul_(1e-3).to(dtype)
        params.append(param)
    return params


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def traffic(params: Sequence[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Bytes that a step moves, and bytes of all tensors: parameters and state are read and written, gradients read."""
    moments = [
        value
        for state in optimizer.state.values()
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and key != "step"
    ]
    written, read = bytes_of([*params, *moments]), bytes_of([param.grad for param in params if param.grad is not None])
    return 2 * written + read, written + read


def optimizer_contender(
    name: str, make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer], args: argparse.Namespace
) -> Contender:
    params = make_params(SHAPES[args.shapes], DTYPES[args.dtype])
    optimizer = make(params)
    optimizer.step()
    if args.saturated:
        for state in optimizer.state.values():
            if "weight_sum" in state:
                state["weight_sum"].fill_(1)
    return Contender(name, optimizer.step, traffic(params, optimizer)[0])


def eager_contender(args: argparse.Namespace) -> Contender:
    """The paper's lines in eager float32, keeping u~, v~, w: simple, and inaccurate in float32."""
    params = make_params(SHAPES[args.shapes], DTYPES[args.dtype])
    hyper = Hyperparameters(**OPTIONS, beta1=0.9, beta2_range=(0.5, 0.999))
    states = [reference.PaperState(*(torch.zeros(param.shape) for _ in range(4))) for param in params]
    count = 0

    @torch.no_grad()
    def step() -> None:
        nonlocal count
        count += 1
        for i, param in enumerate(params):
            theta, states[i], _ = reference.step(
                param.float(), param.grad.float(), states[i], count, hyper, laprop=False
            )
            param.copy_(theta)

    return Contender("paper, eager float32", step, 0)


def bandwidth_contender(args: argparse.Namespace) -> Contender:
    """In-place updates of six arrays, as many as a step reads."""
    size = max(1, sum(torch.Size(shape).numel() for shape in SHAPES[args.shapes]) // 6)
    arrays = [torch.ones(size) for _ in range(6)]
    return Contender("in-place update", lambda: torch._foreach_mul_(arrays, 1.0), 6 * size * 4 * 2)


def measure(contenders: list[Contender], rounds: int) -> list[Result]:
    results = [Result(contender.name, [], contender.bytes) for contender in contenders]
    for turn in range(rounds + 1):  # the first only warms up
        for contender, result in zip(contenders, results, strict=True):
            start = time.perf_counter()
            contender.step()
            if turn:
                result.seconds.append(time.perf_counter() - start)
    return results


def run(args: argparse.Namespace) -> dict[str, object]:
    fused = {"AdamW (torch, fused)": lambda params: torch.optim.AdamW(params, fused=True, **OPTIONS)}
    ours = {
        "MAdam": lambda params: MAdam(params, **OPTIONS),
        "LaMAdam": lambda params: LaMAdam(params, **OPTIONS),
    }
    contenders = [optimizer_contender(name, make, args) for name, make in {**fused, **ours}.items()]
    elements = sum(torch.Size(shape).numel() for shape in SHAPES[args.shapes])
    contenders.append(bandwidth_contender(args))
    results = measure(contenders, args.rounds)
    if args.reference:
        reference_backend = optimizer_contender(
            "reference backend", lambda params: MAdam(params, backend="reference", **OPTIONS), args
        )
        reference_backend.bytes = 0  # temporaries are most of what it moves
        results += measure([reference_backend], min(3, args.rounds))
        del reference_backend
        results += measure([eager_contender(args)], min(3, args.rounds))
    report(args, elements, results)
    return {
        "shapes": args.shapes,
        "dtype": args.dtype,
        "saturated": args.saturated,
        "elements": elements,
        "results": [asdict(result) for result in results],
    }


def report(args: argparse.Namespace, elements: int, results: list[Result]) -> None:
    by_name = {result.name: result for result in results}
    floor = by_name["in-place update"]
    bandwidth = floor.bytes / floor.median
    adamw = by_name["AdamW (torch, fused)"]
    count = len(SHAPES[args.shapes])
    print(
        f"\n{count} tensor{'s' * (count > 1)}, {elements:,} parameters, {args.dtype}" + ", saturated" * args.saturated
    )
    if elements > 1_000_000:
        print(f"in-place updates: {bandwidth / 1e9:.1f} GB/s")
    print(f"{'':24}{'ms':>10} {'[min, max]':>20} {'B/param':>8} {'GB/s':>7} {'of floor':>9} {'/ AdamW':>8}")
    for result in results:
        if result is floor:
            continue
        low, high = min(result.seconds) * 1e3, max(result.seconds) * 1e3
        line = f"{result.name:24}{result.median * 1e3:10.3f} {f'[{low:.3f}, {high:.3f}]':>20}"
        if result.bytes and elements > 1_000_000:
            rate = result.bytes / result.median
            line += f" {result.bytes / elements:8.0f} {rate / 1e9:7.1f} {rate / bandwidth:9.0%}"
        else:  # not bound by memory
            line += " " * 27
        print(f"{line} {result.median / adamw.median:8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=SHAPES, help="which tensors (default: 100m, then tiny)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of parameters and gradients")
    parser.add_argument("--saturated", action="store_true", help="set w to 1, as after some thousand steps")
    parser.add_argument("--rounds", type=int, help="steps timed of each contender (default: 9; tiny 300)")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--no-reference", dest="reference", action="store_false", help="leave the eager ones out")
    parser.add_argument("--json", help="write all timings to this file")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    record: dict[str, object] = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "kernels": _ops.cpu_capability() if _ops.load_error("_C") is None else _ops.load_error("_C"),
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
        "runs": [],
    }
    print(f"torch {record['torch']}, {record['threads']} threads, CPU kernels {record['kernels']}")
    for shapes in [args.shapes] if args.shapes else ["100m", "tiny"]:
        rounds = args.rounds or (300 if shapes == "tiny" else 9)
        own = argparse.Namespace(**{**vars(args), "shapes": shapes, "rounds": rounds})
        if shapes == "tiny":
            own.reference = False
        record["runs"].append(run(own))  # type: ignore[attr-defined]
    if args.json:
        with open(args.json, "w") as file:
            json.dump(record, file, indent=1)


if __name__ == "__main__":
    sys.exit(main())
