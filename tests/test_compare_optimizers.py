"""`bench/compare_optimizers.py` on a tiny model: it tunes by its rule, resumes, and measures what it says."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

for _name in ("transformers", "tokenizers", "matplotlib", "tqdm", "pytorch_optimizer"):
    pytest.importorskip(_name, reason=f"{_name} is not installed")

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import compare_optimizers  # noqa: E402
from compare import training, tuning  # noqa: E402
from compare.contenders import CONTENDERS  # noqa: E402

from maxva_kernels import LaMAdam, MAdam  # noqa: E402

# In so few steps one loss above the first, warm-up over, is a divergence. The tokenizer is another in each training of
# it, so no choice of seeds helps: losses must fall by more than they scatter, hence this batch and this warm-up.
TINY = training.Setting(
    layers=1, hidden=16, heads=2, vocab=200, length=8, batch=32, steps=12, micro_batch=32, held_out=8, warmup=0.25
)
LARGER = dataclasses.replace(TINY, batch=64)
NAMES = {"SGD", "Adam", "AdamW", "AMSGrad", "LaProp", "LAMB", "AdaBelief", "RAdam", "MAdam", "LaMAdam"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Text and cache, as options."""
    folder = tmp_path_factory.mktemp("text")
    nouns = ["cat", "dog", "house", "river"]
    for number in range(40):
        lines = [f"The {nouns[(number + i) % 4]} of room {number} is number {i}." for i in range(20)]
        (folder / f"{number}.txt").write_text("\n".join(lines))
    return ["--corpus", str(folder), "--cache", str(tmp_path_factory.mktemp("cache")), "--jobs", "1"]


def set_cases(monkeypatch, **cases):
    setting = compare_optimizers.Setting(cases, budget=tuning.Budget(rates=2, chosen_on=2, fresh=2))
    monkeypatch.setitem(compare_optimizers.SETTINGS, "cpu", setting)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    set_cases(monkeypatch, tiny=TINY)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def trained(monkeypatch):
    """The runs that were made: optimizer, rate, batch and seed of each."""
    made = []
    original = training.train

    def counted(setting, text, contender, lr, seed):
        run = original(setting, text, contender, lr, seed)
        made.append((next(name for name in CONTENDERS if CONTENDERS[name] is contender), lr, setting.batch, seed))
        return run

    monkeypatch.setattr(training, "train", counted)
    return made


def read(out, name="compare_optimizers"):
    record = json.loads((out / f"{name}.json").read_text())
    return {key: value for key, value in record.items() if key != "date"}


def test_all_optimizers_end_to_end(files, trained, tmp_path, monkeypatch, capsys):
    """Guards against a contender that does not run, and against one that gets other seeds or rates than its rule."""
    set_cases(monkeypatch, tiny=TINY, larger=LARGER)
    assert compare_optimizers.main([*files, "--out", str(tmp_path)]) == 0
    record = read(tmp_path)
    assert (tmp_path / "compare_optimizers.png").read_bytes().startswith(b"\x89PNG")
    batches = {each["case"]: each["setting"]["batch"] for each in record["cases"]}
    assert batches == {"tiny": TINY.batch, "larger": LARGER.batch}
    for each in record["cases"]:
        assert NAMES <= each["optimizers"].keys() == CONTENDERS.keys()
        for name, one in each["optimizers"].items():
            rates = [row["lr"] for row in one["by_rate"]]
            assert set(rates) >= set(tuning.grid(CONTENDERS[name].centre, 2)), name
            assert len(rates) <= 2 + tuning.EXTENSIONS
            fresh = [
                seed for n, lr, batch, seed in trained if (n, lr, batch) == (name, one["lr"], each["setting"]["batch"])
            ]
            assert sorted(fresh) == [0, 1, 2, 3], name
            assert {len(row["validation"]) for row in one["by_rate"]} == {2}, name
            assert len(one["validation"]) == len(one["minus_baseline"]) == len(one["steps_to_target"]) == 2
            ended = [loss for loss in one["validation"] if loss is not None]  # few steps of little text: some do not
            assert one["mean"] == (pytest.approx(sum(ended) / 2) if len(ended) == 2 else None), name
            if ended or name in ("AdamW", "MAdam", "LaMAdam"):
                assert one["curves"]["loss"], name
                assert min(one["curves"]["step_size"]) > 0, name
        theirs = each["optimizers"]["AdamW"]["validation"]
        for name, one in each["optimizers"].items():
            pairs = zip(one["validation"], theirs, strict=True)
            assert one["minus_baseline"] == [None if None in pair else pair[0] - pair[1] for pair in pairs], name
    assert record["runs"] == len(trained) == len(set(trained))
    assert "| LaMAdam |" in capsys.readouterr().out


def test_resumes_without_repeating_a_run(files, trained, tmp_path, monkeypatch):
    """Guards against runs lost or done twice, and against a record that tells that it was interrupted."""
    options = [*files, "--only", "AdamW", "MAdam"]
    assert compare_optimizers.main([*options, "--out", str(tmp_path / "whole")]) == 0
    straight = list(trained)
    trained.clear()

    counted = training.train

    def interrupted(*args):
        if len(trained) == 5:  # of the 6 to 10 of AdamW, and as many of MAdam
            raise KeyboardInterrupt
        return counted(*args)

    monkeypatch.setattr(training, "train", interrupted)
    out = tmp_path / "parts"
    assert compare_optimizers.main([*options, "--out", str(out)]) == 130
    assert not (out / "compare_optimizers.json").exists()
    runs = out / "compare_optimizers.jsonl"
    lines = runs.read_text().splitlines()
    assert len(lines) == 5
    runs.write_text("\n".join(lines[:4]) + "\n" + lines[4][:40])  # torn by a crash
    lost = trained.pop()
    monkeypatch.setattr(training, "train", counted)
    assert compare_optimizers.main([*options, "--out", str(out)]) == 0
    assert trained[4] == lost
    assert trained == straight
    assert read(out) == read(tmp_path / "whole")
    assert compare_optimizers.main([*options, "--out", str(out)]) == 0
    assert len(trained) == len(straight)


def test_rates_beside_those_chosen(files, trained, tmp_path, monkeypatch, capsys):
    """Guards against an optimizer judged by its rate: others are trained on the same seeds, and change nothing else."""
    set_cases(monkeypatch, tiny=TINY, larger=LARGER)
    options = [*files, "--only", "AdamW", "MAdam", "--out", str(tmp_path)]
    assert compare_optimizers.main(options) == 0
    before, made = read(tmp_path)["cases"], len(trained)
    assert compare_optimizers.main([*options, "--also", "MAdam=0.5"]) == 0
    assert trained[made:] == [("MAdam", 0.5, batch, seed) for batch in (TINY.batch, LARGER.batch) for seed in (2, 3)]
    for each, its in zip(read(tmp_path)["cases"], before, strict=True):
        beside = each["optimizers"].pop("MAdam at 0.5")
        assert each == its
        assert beside["lr"] == 0.5
        assert len(beside["validation"]) == len(beside["minus_baseline"]) == 2
    assert "| MAdam at 0.5 | 0.5 |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--also SGD: not one of AdamW, MAdam"):
        compare_optimizers.main([*options, "--also", "SGD=0.5"])


def test_processes_and_settings_share_runs(files, trained, tmp_path, monkeypatch):
    """Guards against runs that depend on who makes them, and against a run of one setting made again for another."""
    options = [*files, "--only", "AdamW", "MAdam", "--out"]
    assert compare_optimizers.main([*options, str(tmp_path / "one")]) == 0
    monkeypatch.setitem(compare_optimizers.SETTINGS, "varied", compare_optimizers.SETTINGS["cpu"])
    assert compare_optimizers.main([*options, str(tmp_path / "two"), "--setting", "varied", "--jobs", "2"]) == 0
    assert read(tmp_path / "two", "compare_optimizers_varied") == read(tmp_path / "one")
    made = len(trained)
    assert compare_optimizers.main([*options, str(tmp_path / "two")]) == 0
    assert len(trained) == made


def test_other_settings_are_other_runs(files, trained, tmp_path, monkeypatch):
    """Guards against a run read where another was asked for: everything that decides a result is in its key."""
    options = [*files, "--only", "SGD", "--out", str(tmp_path)]
    assert compare_optimizers.main(options) == 0
    for change in ({"steps": 13}, {"hidden": 32}, {"held_out": 7}, {"warmup": 0.5}):
        before = len(trained)
        set_cases(monkeypatch, tiny=dataclasses.replace(TINY, **change))
        assert compare_optimizers.main(options) == 0
        assert len(trained) >= before + 6, change


@pytest.mark.parametrize(
    ("best_at", "tried", "is_edge"),
    [
        (2.0, [0.5, 1, 2, 4], False),
        (4.0, [0.5, 1, 2, 4, 8], False),  # the last of the grid: one more shows it the best
        (0.25, [0.125, 0.25, 0.5, 1, 2, 4], False),
        (64.0, [0.5, 1, 2, 4, 8, 16], True),  # not found, but no optimizer gets more than two
    ],
)
def test_grid_is_extended_where_the_best_is_at_its_edge(best_at, tried, is_edge):
    """Guards against a rule that stops at the edge, or that never stops."""
    asked = []

    def get(runs):  # seed 0 alone would choose a rate twice as large
        asked.extend(run[1:] for run in runs)
        return {run: {"validation": abs(math.log2(run[1] / best_at) - (0.6, -0.3, 0, 0)[run[2]])} for run in runs}

    tuned = tuning.tune(get, {"MAdam": 2.0}, tuning.Budget(rates=4, chosen_on=2, fresh=2))["MAdam"]
    for choosing in (0, 1):
        assert list(tuned.by_rate) == sorted(rate for rate, seed in asked if seed == choosing) == tried
    assert tuned.at_edge == is_edge
    assert tuned.lr == min(best_at, 16)
    assert [run for run in asked if run[1] > 1] == [(tuned.lr, 2), (tuned.lr, 3)]


def test_choice_and_largest_stable_rate_with_diverged_runs():
    """Guards against a diverged run that wins, and against a stable rate that only a diverged run has."""
    losses = {1.0: 5.0, 2.0: 4.0, 4.0: 4.5, 8.0: 5.9, 16.0: math.inf}
    assert tuning.best_rate(losses) == 2.0
    assert tuning.largest_stable(losses, 5.5) == 4.0
    assert tuning.largest_stable(losses, 4.0) is None
    assert tuning.best_rate({1.0: math.inf, 2.0: math.inf}) == 1.0  # all diverged: go down
    assert tuning.final({"validation": None}) == math.inf


def test_steps_to_target():
    """Guards against an off-by-one: steps are counted from 1, and the window must be full."""
    losses = [1.0, 9.0, 7.0, 3.0, 2.0]
    assert tuning.steps_to(losses, 4.9, 2) == 5
    assert tuning.steps_to(losses, 5.0, 2) == 2  # the mean of the first two
    assert tuning.steps_to(losses, 1.0, 2) is None


def test_divergence_rule():
    """Guards against an end by a spike during warm-up, and against none by a loss that stays high."""
    assert training.has_diverged([5.0, math.nan], 10, 2)
    assert training.has_diverged([5.0, math.inf], 10, 2)
    assert not training.has_diverged([5.0, 9.0, 9.0], 2, 2)  # the window reaches into the warm-up
    assert training.has_diverged([5.0, 4.0, 9.0, 9.0], 2, 2)
    assert not training.has_diverged([5.0, 9.0, 4.0, 5.5], 2, 2)


def test_diverged_run_is_recorded_as_unstable(files, tmp_path, monkeypatch):
    """Guards against a crash, or a mean of what did not end: SGD with rates that no model survives."""
    wild = training.Contender(CONTENDERS["SGD"].make, 1e30, decay=0.0)
    monkeypatch.setitem(CONTENDERS, "SGD", wild)
    assert compare_optimizers.main([*files, "--only", "SGD", "--out", str(tmp_path)]) == 0
    for each in read(tmp_path)["cases"]:
        one = each["optimizers"]["SGD"]
        assert all(row["validation"] == [None] * 2 and max(row["diverged_at"]) < TINY.steps for row in one["by_rate"])
        assert len(one["by_rate"]) == 2 + tuning.EXTENSIONS  # down from the lowest, in vain
        assert one["largest_stable_lr"] is None
        assert (one["mean"], one["validation"]) == (None, [None, None])
        assert each["target"] is None


def test_step_size_is_that_of_adam_by_hand():
    """Guards against weight decay in the measure, and against a mean over tensors: eta |m^| / (sqrt(v^) + eps)."""
    eta, decay, eps = 0.01, 0.1, 0.5
    params = [torch.tensor([1.0, -2.0], dtype=torch.float64), torch.tensor([[4.0]], dtype=torch.float64)]
    groups = [{"params": params[:1], "weight_decay": decay}, {"params": params[1:], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=eta, betas=(0.9, 0.99), eps=eps)
    first, second = [1.0, -3.0, 0.5], [2.0, 1.0, -0.5]
    for grads in (first, second):
        params[0].grad = torch.tensor(grads[:2], dtype=torch.float64)
        params[1].grad = torch.tensor([grads[2:]], dtype=torch.float64)
        measured = training._measured_step(optimizer, separate=True)
    sizes = []
    for g1, g2 in zip(first, second, strict=True):
        m = (0.9 * 0.1 * g1 + 0.1 * g2) / (1 - 0.9**2)
        v = (0.99 * 0.01 * g1**2 + 0.01 * g2**2) / (1 - 0.99**2)
        sizes.append(eta * abs(m) / (math.sqrt(v) + eps))
    assert measured == pytest.approx(sum(sizes) / 3, rel=1e-9)


@pytest.mark.parametrize("algorithm", [MAdam, LaMAdam])
def test_step_size_is_the_one_of_the_statistics(algorithm):
    """Guards against two meanings of one number: MAdam's own mean_update is the same measure."""
    generator = torch.Generator().manual_seed(0)
    param = torch.randn(50, 20, generator=generator)
    optimizer = algorithm([param], lr=0.1, weight_decay=0.1, collect_statistics=True)
    for _ in range(3):
        param.grad = torch.randn(50, 20, generator=generator)
        measured = training._measured_step(optimizer, separate=True)
    assert measured == pytest.approx(optimizer.statistics().overall.mean_update, rel=1e-4)


def test_all_have_the_same_conditions(files, monkeypatch):
    """Guards what the page says is the same for every optimizer: gradients of norm 1 at most, a rate that rises and
    then falls by a square root, decay of matrices alone; and that the held-out text is not what was trained on."""
    torch.set_num_threads(1)
    norms, rates = [], []

    class Recording(torch.optim.SGD):
        def step(self):
            grads = [param.grad for group in self.param_groups for param in group["params"]]
            norms.append(torch.nn.utils.get_total_norm(grads).item())
            rates.append(self.param_groups[0]["lr"])
            assert [group["weight_decay"] for group in self.param_groups] == [0.25, 0.0]
            super().step()

    text = training.Text(TINY, training.Source([files[1]], 0, Path(files[3])))
    contender = training.Contender(lambda groups: Recording(groups, lr=1.0), 0.5, decay=0.25)
    assert training.CLIP == 1
    monkeypatch.setattr(training, "CLIP", 0.5)  # so small that gradients do not keep to it by themselves
    training.train(TINY, text, contender, 0.1, 0)
    assert norms == pytest.approx([0.5] * TINY.steps, rel=1e-4)
    warmup = TINY.steps // 4
    falling = [((TINY.steps - step) / (TINY.steps - warmup)) ** 0.5 for step in range(warmup, TINY.steps)]
    assert rates == pytest.approx([0.1 * k for k in [*((i + 1) / warmup for i in range(warmup)), *falling]])
    bodies = text.held_out.tokens
    assert np.array_equal(bodies.ravel(), text.tokens.held_out[: bodies.size])


def test_a_run_repeats(files):
    """Guards against order, weights or masks that depend on what ran before; and seeds differ."""
    torch.set_num_threads(1)
    text = training.Text(TINY, training.Source([files[1]], 0, Path(files[3])))
    runs = [training.train(TINY, text, CONTENDERS[name], 4e-3, seed) for name, seed in
            [("MAdam", 1), ("SGD", 1), ("MAdam", 1), ("MAdam", 2)]]  # fmt: skip
    losses = [run["losses"] for run in runs]
    assert losses[0] == losses[2]
    assert losses[0][0] == losses[1][0]  # the same weights and text for all optimizers of a seed
    assert losses[0][0] != losses[3][0]
