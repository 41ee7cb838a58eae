"""The global gradient norm: its rule to the bit, its accuracy, and what would overflow or vanish when squared."""

from __future__ import annotations

import math
import time

import pytest
import torch
from cases import DTYPES, SIZES, backend_params, device_of, make_params, needs_cpu_kernels

from maxva_kernels import distributed, functional

LANES, CHUNK = 1024, 16 * 1024


def by_the_rule(chunks: list[torch.Tensor]) -> torch.Tensor:
    """csrc/norm.h for values of order 1, in plain torch: lanes in order, then pairwise."""

    def reduce(squares: torch.Tensor) -> torch.Tensor:
        lanes = torch.zeros(LANES, dtype=squares.dtype)
        for row in squares.split(LANES):
            lanes[: len(row)] += row
        while len(lanes) > 1:
            lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
        return lanes[0]

    return reduce(torch.stack([reduce(chunk * chunk) for chunk in chunks])).sqrt()


@pytest.mark.parametrize("backend", backend_params(oracle=False))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_follows_its_rule_bit_for_bit(dtype, backend):
    """The order of additions is part of the interface: backends agree only if each keeps to it."""
    values = [param.detach() for param in make_params((*SIZES, CHUNK - 1, CHUNK, 3 * CHUNK + 5), dtype=dtype)]
    norm = functional.grad_norm([value.to(device_of(backend)) for value in values], backend=backend).cpu()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    chunks = [chunk.to(wide) for value in values if value.numel() for chunk in value.split(CHUNK)]
    assert norm.dtype == wide
    assert torch.equal(norm, by_the_rule(chunks))


@pytest.mark.parametrize("backend", backend_params())
def test_norm_of_mixed_dtypes(backend):
    grads = [
        param.detach()
        for dtype in DTYPES
        for param in make_params((0, 5, 2000), dtype=dtype, device=device_of(backend))
    ]
    norm = functional.grad_norm(grads, backend=backend)
    exact = torch.cat([grad.double() for grad in grads]).norm()
    assert norm.dtype == torch.float64  # one of them is
    torch.testing.assert_close(norm, exact, rtol=1e-14, atol=0)
    norm = functional.grad_norm([grad for grad in grads if grad.dtype != torch.float64], backend=backend)
    exact = torch.cat([grad.double() for grad in grads if grad.dtype != torch.float64]).norm()
    # 16 additions in a lane, 10 + 10 in the two trees, one per chunk, each half a unit of rounding; the root halves it.
    torch.testing.assert_close(norm.double(), exact, rtol=40 * 2.0**-24 / 2, atol=0)


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-20, 1e-18, 1e-15, 5e-14, 1e13, 2e15, 1e18, 1e25, 1e36], ids=str)
def test_squares_neither_overflow_nor_vanish(scale, backend):
    """A plain fp32 sum of squares gives 0 or inf here, and a clip by it stops or explodes the run."""
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * scale
    for extra in ([], [1e-3], [1e3]):
        grads = torch.cat([values, torch.tensor(extra)])
        norm = functional.grad_norm([grads.to(device_of(backend))], backend=backend)
        torch.testing.assert_close(norm.cpu().double(), grads.double().norm(), rtol=3e-6, atol=0)


@needs_cpu_kernels
def test_tiny_gradients_cost_no_more_time():
    """Squares that nobody wants, of numbers too small for their sum, would be subnormal: such gradients once took eight
    to thirty times as long, by instruction set. Now twice, as any that have all three sums."""
    grads = {name: [torch.randn(1 << 20) * scale] for name, scale in (("usual", 1e-3), ("tiny", 1e-20))}
    times = {name: [] for name in grads}
    for _ in range(40):
        for name, listed in grads.items():
            start = time.perf_counter()
            functional.grad_norm(listed, backend="cpu")
            times[name].append(time.perf_counter() - start)
    assert min(times["tiny"]) <= 4 * min(times["usual"])  # of all turns the quickest: see test_accuracy.py


@pytest.mark.parametrize("backend", backend_params())
def test_special_values(backend):
    device = device_of(backend)
    for special, expected in ((math.inf, math.inf), (-math.inf, math.inf), (math.nan, math.nan)):
        for others in (0.0, 1e-30, 1.0, 1e30):
            grads = torch.tensor([others, special, others], device=device)
            norm = functional.grad_norm([grads], backend=backend).item()
            assert norm == expected or (math.isnan(norm) and math.isnan(expected)), (special, others)
    zeros = [torch.zeros(0, device=device), torch.zeros(3, device=device)]
    assert functional.grad_norm(zeros, backend=backend).item() == 0
    assert functional.grad_norm(zeros[:1], backend=backend).item() == 0
    assert functional.grad_norm([], backend=backend).item() == 0


@pytest.mark.parametrize("backend", backend_params())
def test_integers_are_refused_without_a_word_of_parameters(backend):
    """Guards against a message about `params`, of which a norm is given none."""
    grads = [torch.ones(3, device=device_of(backend)), torch.ones(3, dtype=torch.int64, device=device_of(backend))]
    with pytest.raises(RuntimeError, match=r"^maxva: grads\[1\] .* must be float32.*") as raised:
        functional.grad_norm(grads, backend=backend)
    assert "params" not in str(raised.value)


@pytest.mark.parametrize("backend", backend_params())
def test_layouts(backend):
    base = torch.randn(64, 96, device=device_of(backend))
    exact = base[:, ::3].double().norm()
    for grad in (base[:, ::3], base[:, ::3].t(), base[:, ::3].contiguous()):
        norm = functional.grad_norm([grad], backend=backend)
        torch.testing.assert_close(norm.double(), exact, rtol=3e-6, atol=0)
    expanded = torch.ones(1, device=base.device).expand(10, 10)
    assert functional.grad_norm([expanded], backend=backend).item() == 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", backend_params())
def test_norm_of_finite_gradients_is_finite(backend, dtype):
    """Guards against a step skipped, or stopped by a clip to 0, because the norm is beyond the largest number."""
    largest = torch.finfo(dtype).max
    for values in ([largest] * 3, [largest, -largest] + [1.0] * 5000, [largest]):
        grads = [torch.tensor(values, dtype=dtype, device=device_of(backend)), torch.ones(3, device=device_of(backend))]
        assert functional.grad_norm(grads, backend=backend).item() == largest
    grads[0][0] = math.inf
    assert functional.grad_norm(grads, backend=backend).item() == math.inf


@pytest.mark.parametrize(
    ("norms", "expected"),
    [
        ((3.0, 4.0), 5.0),
        ((0.0, 0.0), 0.0),
        ((3e200, 4e200), 5e200),
        ((3e-200, 4e-200), 5e-200),
        ((1.7e308, 1.7e308), torch.finfo(torch.float64).max),
        ((1.0, math.inf), math.inf),
        ((1.0, math.nan), math.nan),
        ((math.inf, math.nan), math.nan),
        ((5e-324, 0.0), 5e-324),
    ],
    ids=str,
)
def test_norms_of_devices_and_ranks_are_joined(norms, expected):
    """Guards the norm over several devices or ranks, of which a test has but one, at the ends of the range."""
    found = distributed.joined_norm(torch.tensor(norms, dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), equal_nan=True, rtol=1e-15, atol=0)
