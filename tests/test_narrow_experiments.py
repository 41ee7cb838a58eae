"""`bench/narrow_layouts.py` and `bench/narrow_params.py`: they simulate what they say, and run to the end."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

for _name in ("transformers", "tokenizers", "matplotlib", "tqdm", "pytorch_optimizer"):
    pytest.importorskip(_name, reason=f"{_name} is not installed")

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import narrow_layouts  # noqa: E402
import narrow_params  # noqa: E402
from compare.tuning import Runs  # noqa: E402

from maxva_kernels.groups import MOMENTS  # noqa: E402

UNSIGNED = ("grad_var", "weight_sum")


def moments(count):
    """As a step may leave them: m and u of either sign, magnitudes far apart, a few zeros, w up to 1."""
    random = torch.Generator().manual_seed(1)
    normal = functools.partial(torch.randn, count, generator=random)
    state = {name: normal() * 10 ** normal() for name in MOMENTS}
    state["grad_var"] = state["grad_var"].square()
    state["weight_sum"] = torch.rand(count, generator=random).clamp(min=1e-3)
    state["weight_sum"][:7] = 1
    for name in MOMENTS[:3]:
        state[name][::10] = 0
    return state


@pytest.mark.parametrize("name", narrow_layouts.LAYOUTS)
def test_layouts_are_right_on_average(name):
    """Guards against a code that is never reached, against one that is reached too often, and against a zero that
    does not stay."""
    layout, begin = narrow_layouts.LAYOUTS[name], moments(1000)
    random = torch.Generator().manual_seed(2)
    drawn = {moment: [] for moment in MOMENTS}
    for _ in range(400):
        state = {moment: value.clone() for moment, value in begin.items()}
        layout(state, random)
        for moment in MOMENTS:
            drawn[moment].append(state[moment].double())
    for moment, values in drawn.items():
        values, truth = torch.stack(values), begin[moment].double()
        assert all(len(column.unique()) <= 2 for column in values.T)
        # Six deviations of a mean of 400 draws, of those of which both numbers were drawn often enough to know them.
        # Rounding to float32, of scales too, is beside.
        share = (values == values.amax(0)).double().mean(0)
        often = (share > 0.05) & (share < 0.95)
        error = (values.mean(0) - truth).abs() - 1e-6 * truth.abs()
        assert often.double().mean() > 0.5, moment
        assert (error <= 6 * values.std(0) / 20)[often].all(), moment
        assert (values[:, truth == 0] == 0).all()
        assert moment not in UNSIGNED or (values >= 0).all()
    assert (torch.stack(drawn["weight_sum"])[:, :7] == 1).all()  # saturated it stays


def test_eight_bits_have_so_many_codes():
    """Guards against a layout that keeps more than its bits hold."""
    for codes in (narrow_layouts.EIGHT, narrow_layouts.SIGNED_EIGHT):
        random = torch.Generator().manual_seed(3)
        values = torch.cat([torch.ones(1), torch.rand(127 * 128 + 127, generator=random) ** 20]).view(-1, 128)
        values[:, 0] = 1  # the scale of each block
        assert 100 < len(codes(values, random).unique()) <= 256


def test_the_optimizer_keeps_its_state_in_the_layout():
    """Guards against a simulation that rounds a copy."""
    param = torch.nn.Parameter(torch.zeros(300))
    optimizer = narrow_layouts.Simulated([param], narrow_layouts.LAYOUTS["bfloat16"])
    for step in range(3):
        param.grad = torch.randn(300, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        for name in MOMENTS:
            value = optimizer.state[param][name]
            assert torch.equal(value.bfloat16().float(), value)
    assert all(optimizer.state[param][name].any() for name in MOMENTS)


def test_layouts_end_to_end(monkeypatch, tmp_path, capsys):
    """Guards against a table or a figure that fails where a run diverged, after all the runs."""

    count = []

    def made(wanted):
        count.append(len(wanted))
        for what, number, seed in wanted:
            diverged = what == ("eight",) and seed == 1
            yield (
                (what, number, seed),
                {"bias": -1e-3, "spread": 1e-2} if len(what) > 1 else {"validation": None if diverged else 4.5 + seed},
            )

    class Pool:
        def __enter__(self):
            return made

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(narrow_layouts, "in_processes", lambda train, jobs: Pool())
    monkeypatch.setattr(narrow_layouts.training, "Source", lambda *_: None)
    monkeypatch.setattr(
        narrow_layouts.training, "Text", lambda *_: SimpleNamespace(tokens=SimpleNamespace(tokenizer_hash="0"))
    )
    monkeypatch.setattr(sys, "argv", ["narrow_layouts.py", "--out", str(tmp_path)])
    narrow_layouts.main()
    found = json.loads((tmp_path / "narrow_layouts.json").read_text())["layouts"]
    assert found["eight"]["less_float32"] == [0, None, 0, 0, 0]
    assert found["w8"]["errors"]["0.999"]["sparse"] == {"bias": -1e-3, "spread": 1e-2}
    assert (tmp_path / "narrow_layouts.png").exists()
    assert "| bfloat16 | 8 | 0.1 % | 1 % |" in capsys.readouterr().out
    narrow_layouts.main()
    assert count == [len(narrow_layouts.ERRORS + narrow_layouts.TRAINED), 0]  # all were kept
    assert json.loads((tmp_path / "narrow_layouts.json").read_text())["layouts"] == found


def test_params_end_to_end(monkeypatch, tmp_path):
    """Guards against runs that are not kept: what is there is not made again."""
    made = []

    def bert(seed, *options):
        made.append((seed, *options))
        return {"held_out": 4.5, "last_100": 4.6, "losses": [5.0] * 50}

    monkeypatch.setattr(narrow_params, "bert", bert)
    monkeypatch.setattr(sys, "argv", ["narrow_params.py", "--out", str(tmp_path)])
    narrow_params.main()
    assert len(set(made)) == len(made) == len(narrow_params.VARIANTS) * len(narrow_params.SEEDS)
    assert (tmp_path / "narrow_params.png").exists()
    found = narrow_params.train(Runs(tmp_path / "narrow_params.jsonl"))
    assert len(made) == len(narrow_params.VARIANTS) * len(narrow_params.SEEDS)
    assert found == json.loads((tmp_path / "narrow_params.json").read_text())["bert"]
