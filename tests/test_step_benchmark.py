"""bench/step.py: what it counts is right, what it compares does the same work, and a run ends with its files."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import step
from stepbench import case, contenders, entries, paper, shapes, timing
from stepbench.cpu import Cpu

from maxva_kernels import MAdam
from maxva_kernels.backends import registry

CPU = torch.device("cpu")
BACKEND = registry.select("auto", CPU).NAME
SMALL = [(3, 5), (17,), (1,)]
OTHERS = ("apex", "TransformerEngine", "bitsandbytes", "torchao", "flashoptim")


@pytest.fixture
def small(monkeypatch):
    """Sets of tensors, floors and a compiler that take no time; as large as they are, memory is what binds."""
    for name in shapes.SHAPES:
        monkeypatch.setitem(shapes.SHAPES, name, SMALL)
    monkeypatch.setattr(case, "MEMORY_BOUND", 1)
    monkeypatch.setattr(Cpu, "cache_bytes", lambda self: 100)  # of 16-bit or 32-bit tensors 4 or 2 copies
    monkeypatch.setitem(case.FLOOR_BYTES, "cpu", 1 << 12)
    monkeypatch.setattr(paper, "COMPILER", "eager")


@pytest.mark.parametrize(
    ("name", "parameters", "tensors"),
    [
        ("100m", 100_000_000, 25),
        ("one", 100_000_000, 1),
        ("bert-base", 110_106_428, 206),
        ("bert-large", 336_226_108, 398),
        ("gpt2", 124_439_808, 148),
        ("resnet50", 25_557_032, 161),
        ("10k", 10_240_000, 10_000),
        ("tiny", 400, 400),
    ],
)
def test_shapes_are_the_models(name, parameters, tensors):
    """Guards against a table that is headed by a model and measures another one."""
    assert shapes.elements(shapes.SHAPES[name]) == parameters
    assert len(shapes.SHAPES[name]) == tensors
    assert shapes.TITLES.keys() == shapes.SHAPES.keys()


@pytest.mark.parametrize("name", ["bert-base", "gpt2"])
def test_shapes_are_those_of_the_real_model(name):
    """Guards against a formula that has the right sum and the wrong tensors."""
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        if name == "gpt2":
            model = transformers.GPT2LMHeadModel(transformers.GPT2Config())
        else:
            model = transformers.BertForPreTraining(transformers.BertConfig())
    model.tie_weights()
    assert sorted(tuple(param.shape) for param in model.parameters()) == sorted(shapes.SHAPES[name])


# The operands of a step by hand: how many bytes of each parameter are read, and how many written.
EXPECTED = {
    ("float32", "AdamW", False, None): 4 + 4 + 8 + 4 + 8,
    ("float32", "MAdam", False, None): 4 + 4 + 16 + 4 + 16,
    ("float32", "MAdam", True, None): 4 + 4 + 20 + 4 + 20,
    ("float32", "AdamW", True, None): 4 + 4 + 12 + 4 + 12,
    ("float32", "MAdam", False, 1.0): 4 + 4 + 4 + 16 + 4 + 16,  # the gradient once more, for the norm
    ("float32", "AdamW", False, 1.0): 4 + (4 + 4) + 4 + 4 + 8 + 4 + 8,  # for the norm; scaled; stepped on
    ("bfloat16", "AdamW", False, None): 2 + 2 + 4 + 2 + 4,
    ("bfloat16", "MAdam", False, None): 2 + 2 + 16 + 2 + 16,
    ("float16", "MAdam", False, None): 2 + 2 + 16 + 2 + 16,
}


@pytest.mark.parametrize(("key", "expected"), EXPECTED.items(), ids=str)
def test_bytes(key, expected):
    """Guards the GB/s: bytes must be those of the operands, in their dtypes, with what the options add."""
    dtype, name, amsgrad, clip = key
    options = contenders.Options(amsgrad, clip)
    sets = [contenders.make_params([(10, 10)], shapes.DTYPES[dtype])]
    if name == "MAdam":
        contender = contenders.ours(name, MAdam, BACKEND, sets, options)
        compiled = paper._contender("lines", paper._update(options), sets, options)
        assert compiled.bytes == 100 * (expected + (2 * shapes.DTYPES[dtype].itemsize if clip else 0)), "clips outside"
    else:
        contender = contenders.torchs(contenders.ADAMW, sets, options)
    assert contender.bytes is None if BACKEND == "reference" and name == "MAdam" else contender.bytes == 100 * expected


@pytest.mark.skipif(BACKEND == "reference", reason="nobody counts the bytes of eager code")
def test_bytes_of_features():
    """Guards the same for what options add: a maximum, the norm's read, nothing, one more read of everything; and for
    what is saved."""
    sets = [contenders.make_params([(10, 10)], torch.float32)]
    more = {}
    for entry in entries.entries(sets, CPU, [BACKEND], contenders.PLAIN, features=True):
        if entry.name.startswith("MAdam, "):
            more[entry.name.removeprefix("MAdam, ")] = entry.make().bytes - 100 * 44
    less = {"bfloat16 state": -100 * 16, "saturated": -100 * 8, "bfloat16 state, saturated": -100 * 20}
    assert more == {"amsgrad": 100 * 8, "clip": 100 * 4, "statistics": 0, "trust ratio": 100 * 24} | less


@pytest.mark.skipif(BACKEND == "reference", reason="it reads w")
@pytest.mark.parametrize("state_dtype", [None, "bfloat16"])
def test_saturated_is_without_w(state_dtype):
    """Guards the lines of fewer bytes: w must be 1, and the kernels must know it and leave it alone."""
    made = []

    def algorithm(params, **settings):
        made.append(MAdam(params, **settings))
        return made[-1]

    sets = [contenders.make_params([(100, 100), (7,)], torch.float32) for _ in range(2)]
    options = contenders.Options(saturated=True, state_dtype=state_dtype)
    contender = contenders.ours("MAdam, saturated", algorithm, BACKEND, sets, options)
    weight_sums = [state["weight_sum"] for optimizer in made for state in optimizer.state.values()]
    assert len(weight_sums) == 4
    for w in weight_sums:
        assert (w == 1).all()
        w.data[-1] = 0.25  # which no counter tells
    for _ in range(4):
        contender.step()
    assert all((w[-1] == 0.25).all() for w in weight_sums)


def test_bytes_of_a_quantized_state():
    """Guards against counting an 8-bit state as the float32 that its wrapper says it is."""

    class Packed:  # as flashoptim's
        def __init__(self):
            self.codes, self.scales, self.bits = torch.zeros(64, dtype=torch.uint8), torch.zeros(2), 8

    class Wrapper(torch.Tensor):  # as torchao's
        @staticmethod
        def __new__(cls, codes):
            return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

        def __init__(self, codes):
            self.codes = codes

        def __tensor_flatten__(self):
            return ["codes"], []

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            raise NotImplementedError

    assert contenders.bytes_of(contenders.memory_of(Packed())) == 64 + 8
    assert contenders.bytes_of(contenders.memory_of(Wrapper(torch.zeros(64, dtype=torch.uint8)))) == 64
    assert contenders.bytes_of(contenders.memory_of(torch.zeros(3))) == 12
    assert contenders.bytes_of(contenders.memory_of(3)) == 0


@pytest.mark.parametrize("dtype", shapes.DTYPES)
@pytest.mark.parametrize(
    "options",
    [contenders.PLAIN, contenders.Options(amsgrad=True), contenders.Options(max_grad_norm=1.0, saturated=True)],
    ids=["plain", "amsgrad", "clipped and saturated"],
)
def test_contenders_do_the_work_on_every_copy(dtype, options, small):
    """Guards against a contender that steps on nothing, or on the first copy alone, or makes NaNs of float16."""
    sets = [contenders.make_params(SMALL, shapes.DTYPES[dtype]) for _ in range(3)]
    params = [param for each in sets for param in each]
    grads = [param.grad.clone() for param in params]
    listed = entries.entries(sets, CPU, [BACKEND], options, features=True)
    lacking: dict[str, str] = {}
    ran = []
    for entry in listed:
        for contender in entries.admit(entry, shapes.elements(SMALL), Cpu(), False, lacking):
            ran.append(contender.name)
            for turn in range(6):
                with torch.no_grad():
                    torch._foreach_zero_(params)
                contender.step()
                changed = [all(bool(param.all()) for param in each) for each in sets]
                untouched = [not any(bool(param.any()) for param in each) for each in sets]
                assert changed == [index == turn % 3 for index in range(3)], contender.name
                assert untouched == [index != turn % 3 for index in range(3)], contender.name
                assert all(bool(param.isfinite().all()) for param in params), contender.name
    if options.max_grad_norm is None:
        assert all(torch.equal(param.grad, grad) for param, grad in zip(params, grads, strict=True))
    assert {*ran, *lacking} == {entry.name for entry in listed}
    assert {*contenders.TORCHS, paper.COMPILED, paper.EAGER} < {*ran}
    assert sum("LaMAdam" in name for name in ran) == 1
    assert sum(name.startswith("MAdam") for name in ran) == (4 if BACKEND != "reference" else 3) + len(
        contenders.FEATURES
    )


def test_clipping_limits_every_contender(small, monkeypatch):
    """Guards against a contender that is timed as clipping and does not: the paper's lines must step as MAdam does.
    Gradients are clipped to the size of eps: to larger ones a constant factor makes hardly a difference."""
    monkeypatch.setitem(contenders.OPTIONS, "eps", 1e-2)
    options, after = contenders.Options(max_grad_norm=0.1), {}
    for make in (paper.eager, lambda *given: contenders.ours("MAdam", MAdam, "reference", *given)):
        torch.manual_seed(0)
        params = contenders.make_params(SMALL, torch.float32)
        for param in params:
            param.grad.mul_(1e6)
        contender = make([params], options)
        for _ in range(3):
            contender.step()
        after[contender.name] = params
    for ours, papers in zip(*after.values(), strict=True):
        torch.testing.assert_close(ours, papers, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "dtype", "cache", "copies"),
    [
        ("100m", "float32", 2**25, 1),  # 800 MB of parameters and gradients are beyond 4 x 32 MiB
        ("10k", "float32", 2**25, 2),  # 82 MB
        ("10k", "bfloat16", 2**25, 4),
        ("resnet50", "float32", 384 * 2**20, 8),
        ("tiny", "float32", 2**25, 1),  # the host's time
    ],
)
def test_copies_exceed_the_cache(name, dtype, cache, copies):
    """Guards against a bandwidth that is the cache's."""
    assert case.copies_of(name, dtype, cache) == copies


def test_cache_and_memory_are_read():
    """Guards against sizes in the wrong unit, by which everything would be copied a thousand times, or nothing."""
    assert 2**18 <= Cpu().cache_bytes() <= 2**33
    assert Cpu().free_bytes() >= 2**28


def test_no_memory_for_a_contender_is_no_end(small, monkeypatch):
    """Guards against a run that the system kills for memory: a contender that does not fit is named instead."""
    free = iter([2**40] * 3)
    monkeypatch.setattr(Cpu, "free_bytes", lambda self: next(free, 0))
    done = case.run(case.Case("bert-large", backends=[BACKEND], rounds=1), Cpu())
    assert contenders.ADAMW in {line["name"] for line in done["results"]}
    assert "memory free" in done["lacking"][paper.EAGER]
    with pytest.raises(contenders.Missing, match="memory free"):
        case.run(case.Case("bert-large", backends=[BACKEND], rounds=1), Cpu())


def test_turns():
    """Guards the interleaving: one step of each in every round, the warm-up untimed, few of a slow one among others."""
    seen = []
    entered = [
        contenders.Contender("a", lambda: seen.append("a"), 1),
        contenders.Contender("b", lambda: seen.append("b"), 1),
        contenders.Contender("slow", lambda: seen.append("s"), 1, slow=True),
    ]
    results = timing.measure(entered, 4, warm=1)
    assert "".join(seen) == "abs" + "abs" + "ab" + "abs" + "ab"
    assert [len(result.ms) for result in results] == [4, 4, 2]
    assert [len(result.host_ms) for result in results] == [4, 4, 2]
    alone = timing.measure(entered[2:], 100, warm=0, least=3, seconds=0)
    assert len(alone[0].ms) == 3, "with no time left, the least"
    assert all(math.isclose(s, ms / 1e3) for s, ms in zip(alone[0].seconds, alone[0].ms, strict=True))


def test_a_run_ends_with_its_files(small, tmp_path, capsys):
    """Guards the command: with tiny tensors, every default case, both files, and each package that is missing named."""
    pytest.importorskip("matplotlib")
    assert step.main(["--rounds", "2", "--out", str(tmp_path), "--json", str(tmp_path / "too.json")]) == 0
    record, printed = json.loads((tmp_path / "step.json").read_text()), capsys.readouterr().out
    assert record == json.loads((tmp_path / "too.json").read_text())
    assert (tmp_path / "step.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert record["torch"] == torch.__version__
    assert all([record["commit"], record["threads"], record["machine"]["processor"], record["machine"]["cores"]])
    assert [run["shapes"] for run in record["runs"]] == list(step.DEFAULT)
    for run in record["runs"]:
        results = {result["name"]: result for result in run["results"]}
        assert (run["dtype"], run["copies"], run["floor"]) == ("float32", 2, contenders.UPDATE)
        assert results[contenders.UPDATE]["share_of_floor"] == 1
        for name, result in results.items():
            assert result["min"] <= result["ms"] <= result["max"]
            assert len(result["turns"]) == 2, name
            assert name in printed or name == contenders.UPDATE
        assert (paper.COMPILED in results) == (not run["quick"])
        for other in OTHERS:
            names = [name for name in contenders.OTHERS if other in name]
            assert names
            assert all((name in results) != (name in run["lacking"]) for name in names)
            assert all(name in printed for name in names)
    floor = record["runs"][0]["results"][-1]
    adamw = record["runs"][0]["results"][0]
    rates = [result["bytes"] / result["ms"] for result in (adamw, floor)]
    assert math.isclose(adamw["share_of_floor"], rates[0] / rates[1])
    assert math.isclose(adamw["GB_per_s"], rates[0] / 1e6)


def test_without_matplotlib(small, tmp_path, monkeypatch, capsys):
    """Guards the timings of minutes against a figure that cannot be drawn at their end."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "gpu_check.figures", raising=False)
    assert step.main(["--shapes", "tiny", "--quick", "--rounds", "1", "--out", str(tmp_path)]) == 0
    assert "no figure" in capsys.readouterr().out
    assert json.loads((tmp_path / "step.json").read_text())["runs"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rounds", "0"], "at least 1"),
        (["--shapes", "bert"], "invalid choice"),
        *([] if torch.cuda.is_available() else [(["--backend", "cuda"], "cannot run")]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusals(arguments, said, capsys):
    """Guards against minutes of measuring something else than was asked for."""
    with pytest.raises(SystemExit):
        step.main(arguments)
    assert said in capsys.readouterr().err


def test_gpu_columns():
    """Guards the table of a GPU, which no test here can fill: host time, and kernels where the profiler saw them."""
    from stepbench import report

    line = {"name": "MAdam", "ms": 2.0, "min": 1.0, "max": 3.0, "of_adamw": 1.5, "bytes": 44e6}
    line |= {"bytes_per_parameter": 44.0, "GB_per_s": 22.0, "share_of_floor": 0.5, "in_cache": False}
    line |= {"host": [0.1, 0.2, 0.9], "kernels": 3}
    copy = {**line, "name": contenders.COPY, "GB_per_s": 44.0}
    run = {"title": "BERT", "dtype": "float32", "options": {"amsgrad": True, "max_grad_norm": None}, "device": "cuda"}
    run |= {"tensors": 1, "parameters": 10**6, "copies": 1, "memory_bound": True}
    run |= {"floor": contenders.COPY, "results": [line, copy], "lacking": {}}
    text = report.table(run)
    assert "BERT, float32, amsgrad: 1 tensor, 1,000,000 parameters\nfloor: copy on the device, 44.0 GB/s" in text
    assert " ".join(text.splitlines()[-1].split()) == "MAdam 2.000 [1.000, 3.000] 44 44.0 22.0 50% 1.50 0.200 3"
