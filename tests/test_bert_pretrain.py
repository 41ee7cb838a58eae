"""`bench/bert_pretrain.py` on a tiny model and a made-up language: it learns, resumes bit for bit, refuses clearly."""

import dataclasses
import json
import os
import random
import signal
import statistics
import sys
import time
import tracemalloc
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore

for _name in ("transformers", "tokenizers", "matplotlib", "tqdm"):
    pytest.importorskip(_name, reason=f'{_name} is not installed: pip install ".[bench]"')

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import bert_pretrain  # noqa: E402
import numpy as np  # noqa: E402
from bert import corpus, data, distributed, optimizers, schedule, settings, speed, tokenizer  # noqa: E402
from transformers import BertConfig, BertForMaskedLM  # noqa: E402

from maxva_kernels import LaMAdam, reference  # noqa: E402
from maxva_kernels.groups import Hyperparameters  # noqa: E402

TINY = "--layers 1 --hidden 32 --heads 2 --vocab 300 --seq-len 16 --batch 16 --micro-batch 8 --steps 12 --lr 1e-2"
TINY += " --eval-every 6 --checkpoint-every 5 --eval-sequences 5 --no-comparison"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Sentences of a fixed pattern, so that a masked word can be told from its neighbours."""
    words = random.Random(0)
    folder = tmp_path_factory.mktemp("text")
    nouns = ["cat", "dog", "house", "river", "stone", "cloud", "garden", "letter"]
    for number in range(60):
        lines = []
        for _ in range(30):
            a, b = words.choice(nouns), words.choice(nouns)
            lines.append(f"The {a} of the {b} is not the {b} of the {a}.")
        (folder / f"{number:02}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def train(text, tmp_path_factory):
    """Runs the script in this process: (exit code, log lines by step, directory)."""
    cache = tmp_path_factory.mktemp("cache")
    torch.set_num_threads(1)

    fixed = [*TINY.split(), "--corpus", str(text), "--cache", str(cache)]

    def run(out, *options):
        code = bert_pretrain.main([*fixed, "--out", str(out), *options])
        return code, losses(out), out

    run.cache, run.text = cache, text
    yield run
    torch.set_num_threads(os.cpu_count() or 1)


def losses(out):
    """What a run computed, without its timings."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] if out.exists() else []
    steps = [line["step"] for line in lines]
    assert steps == list(range(len(steps)))
    return [{k: v for k, v in line.items() if "second" not in k and k != "tokens_per_s"} for line in lines]


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """The run the others are compared with."""
    code, log, out = train(tmp_path_factory.mktemp("runs") / "whole", "--dropout", "0.1")
    assert code == 0
    return log, out


def test_loss_falls_and_the_report_is_written(whole):
    log, out = whole
    assert len(log) == 13
    assert log[12]["loss"] < 0.8 * log[1]["loss"]
    assert log[12]["heldout_loss"] < 0.8 * log[0]["heldout_loss"]
    assert {"step", "loss", "lr", "grad_norm"} <= log[1].keys()
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "checkpoint.pt").exists()
    assert not list(out.glob("*.new"))


@pytest.mark.parametrize("name", optimizers.NAMES)
def test_every_optimizer_trains_stops_and_resumes(name, train, tmp_path):
    options = ["--optimizer", name, "--weight-decay", "0.1"]
    code, straight, _ = train(tmp_path / "straight", *options)
    assert code == 0
    assert straight[12]["loss"] < straight[1]["loss"]
    code, first, out = train(tmp_path / "halves", *options, "--stop-after", "7")
    assert (code, len(first)) == (0, 8)
    assert bert_pretrain.main(["--resume", str(out)]) == 0
    assert losses(out) == straight


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_the_run_resumes_bit_for_bit(number, train, whole, tmp_path, monkeypatch, capsys):
    during(monkeypatch, 7, lambda: signal.raise_signal(number))
    code, log, out = train(tmp_path / "run", "--dropout", "0.1")
    assert (code, len(log)) == (128 + number, 8)  # the step under way was given up
    assert f"stopped after step 7 of 12; checkpoint saved. To go on: python {sys.argv[0]} --resume {out}" in (
        capsys.readouterr().out
    )
    monkeypatch.undo()
    assert bert_pretrain.main(["--resume", str(out)]) == 0
    assert losses(out) == whole[0]
    states = [torch.load(path / "checkpoint.pt") for path in (out, whole[1])]
    assert equal(states[0]["model"], states[1]["model"])
    assert equal(states[0]["optimizer"]["state"], states[1]["optimizer"]["state"])


def test_signal_in_the_last_micro_batch_keeps_the_step(train, tmp_path, monkeypatch):
    """Guards a step that is as good as done, and all steps of a run without accumulation."""
    during(monkeypatch, 7, lambda: signal.raise_signal(signal.SIGTERM))
    code, log, out = train(tmp_path / "run", "--micro-batch", "16")
    assert (code, len(log)) == (128 + signal.SIGTERM, 9)
    assert torch.load(out / "checkpoint.pt")["step"] == 8


def test_signal_in_the_first_step_is_told(train, tmp_path, monkeypatch, capsys):
    """Guards against advice to resume what has no checkpoint."""
    during(monkeypatch, 0, lambda: signal.raise_signal(signal.SIGTERM))
    code, log, out = train(tmp_path / "run")
    assert (code, len(log)) == (128 + signal.SIGTERM, 1)
    assert f"nothing is saved; delete {out} to begin again" in capsys.readouterr().out
    assert not (out / "checkpoint.pt").exists()


def test_crash_resumes_from_the_last_checkpoint(train, whole, tmp_path, monkeypatch):
    def crash():
        raise MemoryError

    during(monkeypatch, 8, crash)
    with pytest.raises(MemoryError):
        train(tmp_path / "run", "--dropout", "0.1")
    monkeypatch.undo()
    with (tmp_path / "run" / "log.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    assert bert_pretrain.main(["--resume", str(tmp_path / "run")]) == 0
    assert losses(tmp_path / "run") == whole[0]


def test_resume_with_other_settings_is_refused(train, whole, tmp_path, capsys):
    out = train(tmp_path / "run", "--stop-after", "3")[2]
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(f"Another text, paragraph {i}. " * 200 for i in range(60)))
    capsys.readouterr()
    assert bert_pretrain.main(["--resume", str(out), "--lr", "1e-3", "--hidden", "64"]) == 2
    message = capsys.readouterr().err
    assert "--lr: [0.01] then, [0.001] now" in message
    assert "--hidden: 32 then, 64 now" in message
    assert "--layers" not in message
    assert bert_pretrain.main(["--resume", str(out), "--corpus", str(other)]) == 2
    assert "text" in capsys.readouterr().err
    assert bert_pretrain.main(["--resume", str(tmp_path)]) == 2
    assert "no checkpoint.pt" in capsys.readouterr().err
    assert train(out)[0] == 2  # a new run in its place
    assert f"--resume {out}" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert bert_pretrain.main(["--resume", str(out), "--lr", "1e-2", "--stop-after", "4"]) == 0  # the same settings


def test_ranks_that_find_other_checkpoints_are_refused(train, tmp_path, monkeypatch, capsys):
    """Guards weeks of training from ranks that go on from different steps: a directory of each node's own, say."""
    out = train(tmp_path / "run", "--stop-after", "3")[2]
    first = distributed.Engine.first
    monkeypatch.setattr(distributed.Engine, "first", lambda self, work: 5 if (had := first(self, work)) == 3 else had)
    assert bert_pretrain.main(["--resume", str(out)]) == 2
    assert "rank 0 finds step 3 and rank 0 step 5" in capsys.readouterr().err


def test_resume_survives_a_lost_cache(train, whole, tmp_path):
    out = train(tmp_path / "run", "--dropout", "0.1", "--stop-after", "7")[2]
    assert bert_pretrain.main(["--resume", str(out), "--cache", str(tmp_path / "new")]) == 0
    assert losses(out) == whole[0]


def test_phases_change_length_and_rate(train, tmp_path):
    options = "--seq-len 16 32 --batch 16 8 --steps 3 3 --lr 1e-2 4e-3 --warmup 0.34 0.34 --decay-power 0.5"
    code, log, _ = train(tmp_path / "run", *options.split())
    assert code == 0
    assert [line["lr"] for line in log[1:]] == pytest.approx([1e-2, 1e-2, 1e-2 * 0.5**0.5, 4e-3, 4e-3, 4e-3 * 0.5**0.5])


def test_bf16_stays_near_fp32(train, whole, tmp_path):
    code, log, _ = train(tmp_path / "run", "--amp", "bf16", "--dropout", "0.1")
    assert code == 0
    assert log[1]["loss"] == pytest.approx(whole[0][1]["loss"], rel=1e-2)


BAD_CORPORA = {
    "missing": (None, "no such file"),
    "empty": (b"", "empty"),
    "binary": (b"some text\n\0\1\2" * 100, "binary"),
    "latin-1": ("déjà vu\n".encode("latin-1") * 100, "not UTF-8"),
    "small": (b"Too little text to learn from.\n" * 50, "40 documents are needed"),
}


@pytest.mark.parametrize("case", BAD_CORPORA)
def test_bad_corpus(case, train, tmp_path, capsys):
    content, message = BAD_CORPORA[case]
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    assert train(tmp_path / "run", "--corpus", str(path))[0] == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(path) in error or "--corpus" in error
    assert not (tmp_path / "run").exists()


def test_directory_without_text_and_unreadable_file(train, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert train(tmp_path / "run", "--corpus", str(tmp_path / "empty"))[0] == 2
    assert "no .txt, .md or .rst file" in capsys.readouterr().err
    if os.geteuid() != 0:  # root reads everything
        (tmp_path / "secret.txt").write_text("text")
        (tmp_path / "secret.txt").chmod(0)
        assert train(tmp_path / "run", "--corpus", str(tmp_path / "secret.txt"))[0] == 2
        assert "cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--amp fp16 --device cpu", "use --amp bf16 or none"),
        ("--parallel ddp", "torchrun"),
        ("--hidden 30 --heads 4", "not a multiple"),
        ("--lr 1e-3 1e-4", "--steps 1"),
        ("--seq-len 4", "8 tokens"),
        ("--mask-share 0.9", "--mask-share"),
        ("--beta2-range 0.9 0.5", "--beta2-range 0.9 0.5: more than 0"),
        ("--beta2-range 0.5 1 --optimizer adamw", "for adamw and lamb below 1"),
    ],
)
def test_bad_options(options, message, train, tmp_path, capsys):
    assert train(tmp_path / "run", *options.split())[0] == 2
    assert message in capsys.readouterr().err


def test_diverged_run_says_what_to_do(train, tmp_path, monkeypatch, capsys):
    original = bert_pretrain.Run._forward
    monkeypatch.setattr(bert_pretrain.Run, "_forward", lambda self, batch: original(self, batch) * float("nan"))
    assert train(tmp_path / "run")[0] == 2
    assert "lower --lr" in capsys.readouterr().err


def test_overflowing_gradient_spares_the_checkpoint(train, tmp_path, monkeypatch, capsys):
    """Guards the last good checkpoint: a loss that is finite yet does not tell that the step made NaNs of weights."""
    original = bert_pretrain.Run._step

    def overflowing(self, number, request):
        if number == 9:
            embedding = next(self.model.parameters())
            embedding.register_hook(lambda grad: grad.index_fill(0, torch.tensor([1]), torch.inf))
        return original(self, number, request)

    monkeypatch.setattr(bert_pretrain.Run, "_step", overflowing)
    assert train(tmp_path / "run")[0] == 2
    assert "the gradient's norm inf at step 10" in capsys.readouterr().err
    saved = torch.load(tmp_path / "run" / "checkpoint.pt")
    assert saved["step"] == 5
    assert all(value.isfinite().all() for value in saved["model"].values())


def test_run_that_saved_nothing_is_told(train, tmp_path, monkeypatch, capsys):
    """Guards against advice in a circle: to resume what has no checkpoint, and to save before there is one."""

    def crash():
        raise MemoryError

    during(monkeypatch, 2, crash)
    with pytest.raises(MemoryError):
        train(tmp_path / "run")
    monkeypatch.undo()
    assert train(tmp_path / "run")[0] == 2
    assert "holds a run that saved nothing yet: delete it" in capsys.readouterr().err


def test_other_dropout_masks_are_told(train, tmp_path, capsys):
    """Guards the note on what a resumed run shares with one that never stopped."""
    for dropout, said in (("0", "equal to not stopping up to rounding, not"), ("0.1", "and other dropout masks, not")):
        out = train(tmp_path / dropout, "--dropout", dropout, "--stop-after", "1")[2]
        capsys.readouterr()
        assert bert_pretrain.main(["--resume", str(out), "--micro-batch", "4", "--stop-after", "2"]) == 0
        printed = capsys.readouterr().out
        assert said in printed
        assert "--micro-batch: [8] then, [4] now" in printed


def test_micro_batches_are_those_of_the_phase(train, tmp_path, monkeypatch):
    """Guards the memory of the longer sequences: in training and in evaluation, which is without dropout, as many at a
    time as their phase says."""
    shapes = set()
    original = bert_pretrain.Run._forward

    def noted(self, batch):
        shapes.add((self.model.training, *batch[0].shape))
        return original(self, batch)

    monkeypatch.setattr(bert_pretrain.Run, "_forward", noted)
    options = "--seq-len 16 32 --batch 16 8 --steps 3 3 --micro-batch 4 2 --eval-every 3 --eval-sequences 8"
    assert train(tmp_path / "run", *options.split())[0] == 0
    assert shapes == {(True, 4, 16), (True, 2, 32), (False, 4, 16), (False, 2, 32)}


def by_hand(out, cache, name):
    """What `--optimizer NAME` trains in two phases, by Hugging Face's own loss, the paper's lines in float64 or torch's
    AdamW, and rates written out: loss, rate and norm of each step."""
    settings = json.loads((out / "settings.json").read_text())
    stream = np.memmap(cache / f"train-{settings['corpus_hash']}-{settings['tokenizer_hash']}.ids", np.uint16, "r")
    vocab = len(json.loads((out / "tokenizer.json").read_text())["model"]["vocab"])
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 128}
    dropout = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    model = BertForMaskedLM(BertConfig(vocab_size=vocab, max_position_embeddings=32, **sizes, **dropout))
    decays = {param: 0.0 if "bias" in key or "LayerNorm" in key else 0.3 for key, param in model.named_parameters()}
    groups = [{"params": [param], "weight_decay": decay} for param, decay in decays.items()]
    adamw = torch.optim.AdamW(groups, lr=1, betas=(0.9, 0.99))
    hyper = Hyperparameters(lr=1.0, beta1=0.9, beta2_range=(0.6, 0.99), eps=1e-8, weight_decay=0.0)
    states = {param: reference.PaperState(*[torch.zeros_like(param, dtype=torch.float64)] * 4) for param in decays}
    sample, count = 0, 0
    for length, batch, steps, peak, warmup in ((16, 16, 7, 1e-2, 2), (32, 8, 5, 4e-3, 1)):
        sequences = data.MaskedSequences(stream, length, vocab, 0)
        for k in range(steps):
            lr = peak * ((k + 1) / warmup if k < warmup else ((steps - k) / (steps - warmup)) ** 0.5)
            ids, at, labels = sequences.training(np.arange(sample, sample + batch))
            model.zero_grad()
            loss = model(input_ids=ids, labels=torch.full_like(ids, -100).scatter_(1, at, labels)).loss
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            sample, count = sample + batch, count + 1
            if name == "adamw":
                for group in adamw.param_groups:
                    group["lr"] = lr
                adamw.step()
            else:
                for param, decay in decays.items():
                    at_rate = dataclasses.replace(hyper, lr=lr, weight_decay=decay)
                    weight = param.detach().double()
                    grad = param.grad.double()
                    new, states[param], _ = reference.step(weight, grad, states[param], count, at_rate, laprop=False)
                    param.data.copy_(new)
            yield loss.item(), lr, norm.item()


@pytest.mark.parametrize("name", ["adamw", "madam"])
def test_run_is_what_it_says(name, train, tmp_path):
    """Guards what tests of runs against runs cannot see: decay, clipping, rates, the loss and its share of masks, which
    the optimizer must get as the command line has them."""
    options = "--seq-len 16 32 --batch 16 8 --micro-batch 4 2 --steps 7 5 --lr 1e-2 4e-3 --warmup 0.3 0.2"
    options += f" --decay-power 0.5 --weight-decay 0.3 --max-grad-norm 0.5 --beta2-range 0.6 0.99 --optimizer {name}"
    code, log, out = train(tmp_path / "run", *options.split())
    assert code == 0
    for line, (loss, lr, norm) in zip(log[1:], by_hand(out, train.cache, name), strict=True):
        assert line["lr"] == pytest.approx(lr, rel=1e-12)
        assert line["loss"] == pytest.approx(loss, rel=1e-5)
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_base_is_the_recipe_of_the_paper():
    """Guards weeks of GPUs: Section 5.4 and the schedule of the repository it used, written out."""
    s = settings.resolve({"model": "base", "device": "cpu"})
    assert (s.layers, s.hidden, s.heads, s.vocab, s.dropout, s.mask_share) == (12, 768, 12, 30522, 0.1, 0.15)
    assert (s.optimizer, s.weight_decay, s.beta2_range, s.max_grad_norm) == ("madam", 0.1, [0.5, 0.999], 1.0)
    assert (s.seq_len, s.batch, s.steps) == ([128, 512], [65536, 32768], [7038, 1563])
    first, second = settings.rates(s)
    assert (first.scale, first.warmup, first.power, first.from_peak) == (3.4e-3, 0.2843, 0.5, False)
    assert (second.scale, second.warmup, second.power, second.from_peak) == (3.4e-3 * 2 / 3, 0.128, 0.5, False)


def test_options_of_ours_reach_the_optimizer(train, tmp_path):
    """Guards a run of weeks in another precision than was asked for."""
    precision = ["--state-dtype", "bfloat16", "--params", "bfloat16-master"]
    saved = torch.load(train(tmp_path / "run", *precision, "--stop-after", "1")[2] / "checkpoint.pt")
    assert {value.dtype for value in saved["model"].values() if value.is_floating_point()} == {torch.bfloat16}
    for state in saved["optimizer"]["state"].values():
        assert "master" in state
        assert state["grad_var"].dtype == torch.bfloat16
    model = torch.nn.Linear(3, 3).bfloat16()
    given = {"lr": 1.0, "weight_decay": 0.1, "beta2_range": (0.6, 0.99), "max_grad_norm": 2.0}
    for params, (masters, stochastic) in {
        "bfloat16": (False, False),
        "bfloat16-stochastic": (False, True),
        "bfloat16-master": (True, False),
    }.items():
        optimizer = optimizers.build("lamadam", model, **given, state_dtype="bfloat16", params=params)
        assert type(optimizer) is LaMAdam
        assert optimizer.max_grad_norm == 2.0
        for group in optimizer.param_groups:
            assert (group["master_weights"], group["stochastic_rounding"]) == (masters, stochastic)
            assert (group["beta2_range"], group["state_dtype"]) == ((0.6, 0.99), "bfloat16")


def test_report_is_of_the_run(train, tmp_path, monkeypatch, capsys):
    """Guards the figures that the README quotes: losses, share of the optimizer, its speed beside others'."""
    monkeypatch.setattr(speed, "compare", lambda *_: {"madam": 0.002, "reference": 0.1, "adamw": 0.001})
    fixed = TINY.replace("--no-comparison", "").split()
    out = tmp_path / "run"
    shared = ["--corpus", str(train.text), "--cache", str(train.cache), "--out", str(out)]
    assert bert_pretrain.main([*fixed, *shared]) == 0
    printed = capsys.readouterr().out
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    medians = [statistics.median(line[key] for line in lines[1:]) for key in ("optimizer_seconds", "seconds")]
    assert f"optimizer   {medians[0] / medians[1]:.1%} of the step's time" in printed
    assert f"loss        {lines[1]['loss']:.3f} at the first step, {lines[-1]['loss']:.3f} over the last" in printed
    assert f"held out    {lines[0]['heldout_loss']:.3f} before, {lines[-1]['heldout_loss']:.3f} after" in printed
    assert "on this model's tensors, medians (MAdam trained it)" in printed
    rows = {line.rpartition("  ")[0].rsplit(maxsplit=2)[0].strip(): line.split()[-3] for line in printed.splitlines()
            if line.endswith("x MAdam's")}  # fmt: skip
    assert rows == {"MAdam": "1.00", "MAdam, eager": "50.00", "torch AdamW(fused)": "0.50"}


def test_speed_of_shards_says_so():
    """Guards against a table of an eighth of the model that is taken for the whole."""
    heading = speed.table({"madam": 1.0}, Namespace(optimizer="madam", parallel="fsdp2")).splitlines()[0]
    assert "on rank 0's shards, without communication" in heading


def as_rank(rank, ports, runs):
    """One of two ranks: several runs, each in a process group of its own, as torchrun starts them. Some get a signal
    in step 7, on rank 1 alone."""
    torch.set_num_threads(1)
    for port, (options, signalled) in zip(ports, runs, strict=True):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        place |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
        os.environ.update({key: str(value) for key, value in place.items()})
        with pytest.MonkeyPatch.context() as patch:
            if signalled and rank == 1:
                during(patch, 7, lambda: signal.raise_signal(signal.SIGTERM))
            assert bert_pretrain.main(options) == (128 + signal.SIGTERM if signalled and rank == 1 else 0)


@pytest.fixture(scope="module")
def two_ranks(train, text, tmp_path_factory):
    """The same run alone, under DDP and FSDP2, begun alone to be finished under DDP and FSDP2, and stopped by a signal
    and resumed under either."""
    folder = tmp_path_factory.mktemp("ranks")
    options = ["--lr", "3e-3", "--micro-batch", "3"]
    alone = train(folder / "alone", *options)[1]
    runs = []
    for parallel in ("ddp", "fsdp2"):
        fixed = [*TINY.split(), *options, "--corpus", str(text), "--cache", str(train.cache), "--parallel", parallel]
        runs.append(([*fixed, "--out", str(folder / parallel)], False))
        train(folder / f"half-{parallel}", *options, "--stop-after", "7")
        runs.append((["--resume", str(folder / f"half-{parallel}"), "--parallel", parallel], False))
        runs.append(([*fixed, "--out", str(folder / f"stop-{parallel}")], True))
        runs.append((["--resume", str(folder / f"stop-{parallel}")], False))
    # The stores that the ranks meet at are ours and stay, as torchrun's do: a port looked up and let go may have become
    # another's when rank 0 wants it, and a store on rank 0 ends before rank 1 has left the group.
    stores = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in runs]
    ports = [store.port for store in stores]
    processes = torch.multiprocessing.spawn(as_rank, (ports, runs), nprocs=2, join=False)
    deadline = time.monotonic() + 120
    try:
        while not processes.join(timeout=1):
            assert time.monotonic() < deadline, "the two ranks hang"
    finally:
        for process in processes.processes:
            process.kill()
    return folder, alone


@pytest.mark.parametrize("run", ["ddp", "fsdp2", "half-ddp", "half-fsdp2", "stop-ddp", "stop-fsdp2"])
def test_two_ranks_compute_what_one_process_does(run, two_ranks):
    folder, alone = two_ranks
    log = losses(folder / run)
    assert len(log) == len(alone) == 13
    for here, there in zip(log, alone, strict=True):
        assert here.keys() == there.keys()
        for key in (key for key, value in there.items() if value is not None):
            # The gradient of the keys' bias is 0 but for rounding, which the first steps of Adam's kin blow up.
            bound = 3e-4 if key == "grad_norm" else 2e-5
            assert here[key] == pytest.approx(there[key], rel=bound), (key, here["step"])


def test_samples_are_pure_functions_of_their_number():
    tokens = np.random.default_rng(0).integers(2, 300, 5000).astype(np.uint16)
    make = lambda seed: data.MaskedSequences(tokens, 32, 300, seed)  # noqa: E731
    samples = np.arange(100, 140)
    ids, at, labels = make(1).training(samples)
    for i in (0, 7, 39):
        for whole, single in zip((ids, at, labels), make(1).training(samples[i : i + 1]), strict=True):
            assert torch.equal(whole[i : i + 1], single)
    assert not torch.equal(ids, make(2).training(samples)[0])
    assert (labels != tokenizer.SEP).all()
    assert (at[:, 1:] > at[:, :-1]).all()
    ids, at, labels = make(1).training(np.arange(20000))
    shown = ids.take_along_dim(at, 1)
    assert (shown == tokenizer.MASK).float().mean() == pytest.approx(0.8, abs=0.01)
    assert (shown == labels).float().mean() == pytest.approx(0.1, abs=0.01)
    epoch = make(1)
    bodies = epoch._permutation(3)
    assert sorted(bodies) == list(range(epoch.count))  # every sequence once


def test_unigram_loss():
    """Guards the baseline of all figures, and memory: a corpus of 2 bytes a token is not to be had in 8 at once."""
    tokens = np.random.default_rng(0).integers(0, 300, 1 << 22).astype(np.uint16)
    held_out = data.MaskedSequences(tokens[:5000], 32, 300, 0)
    rows = np.arange(held_out.count)
    tracemalloc.start()
    loss = data.unigram_loss(tokens, held_out, rows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * tokens.nbytes
    share = (np.array([(tokens == token).sum() for token in range(300)]) + 1) / (len(tokens) + 300)
    assert loss == pytest.approx(-np.log(share[held_out.held_out(rows)[2].numpy()]).mean(), rel=1e-12)


def test_documents_end_between_words(tmp_path):
    """Guards words of a text without blank lines, or without lines, from being cut in two."""
    for gap in ("\n\n", "\n", " "):
        path = tmp_path / "text.txt"
        path.write_text(gap.join(f"word{i}x" for i in range(5000)))
        documents = list(corpus.FileCorpus([str(path)]))
        assert len(documents) > 5
        assert max(map(len, documents)) <= corpus.MAX_DOCUMENT
        assert [word for text in documents for word in text.split()] == [f"word{i}x" for i in range(5000)]


def test_schedule():
    first, second = schedule.phases([8, 16], [4, 2], [10, 5])
    assert (first.start, first.first_sample, second.start, second.first_sample) == (0, 0, 10, 40)
    assert schedule.phase_of(9, [first, second]) is first


def test_installed_corpus_is_the_same_every_time():
    documents = [list(corpus.InstalledCorpus(2e5)) for _ in range(2)]
    assert documents[0] == documents[1]
    assert sum(map(len, documents[0])) > 1e5
    assert max(map(len, documents[0])) <= corpus.MAX_DOCUMENT


def test_lamb_is_its_formula():
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(7, 3))
    optimizer = optimizers.Lamb([p], lr=0.1, weight_decay=0.01)
    x, m, v = p.detach().double(), torch.zeros(7, 3).double(), torch.zeros(7, 3).double()
    for t in range(1, 6):
        p.grad = torch.randn(7, 3)
        g = p.grad.double()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        r = m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-6) + 0.01 * x
        x = x - 0.1 * x.norm() / r.norm() * r
        optimizer.step()
    torch.testing.assert_close(p.detach().double(), x, rtol=1e-5, atol=1e-6)


def during(monkeypatch, step, action):
    """Do something in the middle of a step of training."""
    original = bert_pretrain.Run._step

    def patched(self, number, request):
        if number == step:
            action()
        return original(self, number, request)

    monkeypatch.setattr(bert_pretrain.Run, "_step", patched)


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
