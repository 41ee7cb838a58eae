"""Where w is 1 the kernels take short cuts (csrc/cpu/kernels.inc, Note [Saturated blocks]) that must change no bit."""

from __future__ import annotations

import pytest
import torch
from cases import ALGORITHMS, BASE, OPTIONS, bits, make_params, needs_cpu_kernels, no_number, set_grads
from twins import step_both, with_twin

from maxva_kernels import MAdam

pytestmark = needs_cpu_kernels

COUNT = 9000  # two whole blocks of the largest kind, and a part
SPECIAL = (torch.nan, torch.inf, -torch.inf, 3e38, 1e-42, 0.0)
# A trust ratio and a clip look at all elements, and so at those in which the runs differ.
LOCAL = {
    name: {**option, "trust_ratio": False, "max_grad_norm": None}
    for name, option in OPTIONS.items()
    if name not in ("trust_ratio", "clip")
}
KINDS = [
    (torch.float32, None, {}),
    (torch.float64, None, {}),
    (torch.float16, None, {}),
    (torch.float32, torch.bfloat16, {}),
    (torch.bfloat16, torch.bfloat16, {}),
    (torch.bfloat16, None, {"master_weights": True}),
    (torch.bfloat16, torch.bfloat16, {"stochastic_rounding": True}),
]


def ran(algorithm, dtype, options, different):
    """Parameter and state after two steps from a state in which w is 1, but not at the places ``different``."""
    (param,) = make_params((COUNT,), dtype)
    optimizer = algorithm([param], **{**BASE, **options}, backend="cpu")
    set_grads([param], 0)
    optimizer.step()
    optimizer.state[param]["weight_sum"].fill_(1)
    optimizer.state[param]["weight_sum"][different] = 0.75
    for step in (1, 2):
        set_grads([param], step)
        param.grad[7 : 7 + len(SPECIAL)] = torch.tensor(SPECIAL, dtype=torch.float64).to(param.dtype)
        optimizer.step()
    return {"param": param.detach(), **optimizer.state[param]}


@pytest.mark.parametrize(("dtype", "state_dtype", "extra"), KINDS, ids=str)
@pytest.mark.parametrize("option", LOCAL)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_same_bits_in_any_company(algorithm, option, dtype, state_dtype, extra):
    """Guards the loop that has 1 in place of w: an element's step is the same in a block that is saturated, in one
    that is not, and in one that is but for its first or last element."""
    options = {**LOCAL[option], "state_dtype": state_dtype, **extra}
    everywhere = ran(algorithm, dtype, options, slice(0, 0))
    assert (everywhere["weight_sum"] == 1).all()
    for different in (slice(100, None, 300), slice(0, None, 512), slice(511, None, 512), slice(4095, None, 4096)):
        among = ran(algorithm, dtype, options, different)
        same = torch.ones(COUNT, dtype=torch.bool)
        same[different] = False
        assert (among["weight_sum"][~same] != 1).all()
        for name, value in everywhere.items():
            if name != "step":
                ours, theirs = (bits(no_number(name, each))[same] for each in (value, among[name]))
                assert torch.equal(ours, theirs), name


@pytest.mark.parametrize(("dtype", "state_dtype", "extra"), KINDS[:2] + KINDS[3:], ids=str)
def test_on_gpus(dtype, state_dtype, extra, simulated):
    """Guards the stores that are left out there: with w at 1 everywhere, nowhere, in parts of packets and of chunks."""
    params = make_params((8193, 700, 8, 33), dtype)
    pair = with_twin(MAdam(params, **BASE, backend=simulated.backend, state_dtype=state_dtype, **extra))
    step_both(pair)
    for optimizer in pair:
        for i, state in enumerate(optimizer.state.values()):
            w = state["weight_sum"]
            w[w.numel() // 3 :] = 1
            w[(w.numel() + i) // 2 :: 13 + i] = 0.75
    for step in (1, 2):
        step_both(pair, step)
