"""`bench/images.py` in few steps: all optimizers run, a rerun repeats nothing, and what is missing is named."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
import tarfile
from pathlib import Path

import pytest
import torch

for _name in ("sklearn", "matplotlib", "pytorch_optimizer"):
    pytest.importorskip(_name, reason=f"{_name} is not installed")

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import images  # noqa: E402
from compare import tuning  # noqa: E402
from experiments import check_end_to_end  # noqa: E402

TINY = dataclasses.replace(images.SETTINGS["cpu"], steps=6, budget=tuning.Budget(rates=2, chosen_on=2, fresh=2))


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_all_optimizers_end_to_end(tmp_path, monkeypatch, capsys):
    """Guards against a contender that does not run, one that sees other seeds, and runs lost or made twice."""
    monkeypatch.setitem(images.SETTINGS, "cpu", TINY)
    check_end_to_end(images, "AdamW", "accuracy", TINY.budget, [], tmp_path, monkeypatch, capsys)


def test_runs_of_many_processes(tmp_path, monkeypatch):
    """Guards against runs that depend on who makes them, or beside what, and against one lost by an interruption."""
    monkeypatch.setitem(images.SETTINGS, "cpu", TINY)
    records = {}
    for jobs in (1, 3):
        images.main(["--jobs", str(jobs), "--out", str(tmp_path / str(jobs))])
        records[jobs] = json.loads((tmp_path / str(jobs) / "images.json").read_text())["optimizers"]
    assert records[1] == records[3]

    def interrupted(self, settings, run):
        if len(self.done) == 5:
            raise KeyboardInterrupt
        return add(self, settings, run)

    add = tuning.Runs.add
    with monkeypatch.context() as patch:
        patch.setattr(tuning.Runs, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            images.main(["--jobs", "2", "--out", str(tmp_path / "parts")])
    assert len((tmp_path / "parts" / "images.jsonl").read_text().splitlines()) == 5
    images.main(["--jobs", "2", "--out", str(tmp_path / "parts")])
    assert json.loads((tmp_path / "parts" / "images.json").read_text())["optimizers"] == records[1]


def test_rates_beside_those_chosen(tmp_path, monkeypatch, capsys):
    """Guards against an optimizer judged by its rate: others are trained on the same seeds, and change nothing else."""
    monkeypatch.setitem(images.SETTINGS, "cpu", TINY)
    command = ["--jobs", "1", "--out", str(tmp_path)]
    images.main(command)
    record = json.loads((tmp_path / "images.json").read_text())["optimizers"]
    rates = [float(rate) for rate in record["MAdam"]["by_rate"]]
    other = next(rate for rate in rates if rate != record["MAdam"]["lr"])
    images.main([*command, "--also", f"MAdam={other}", f"AdamW={record['AdamW']['lr']}"])
    *found, beside, same = json.loads((tmp_path / "images.json").read_text())["optimizers"].items()
    assert dict(found) == record
    data = images.digits()
    runs = [images.train("MAdam", other, seed, TINY, data)["accuracy"] for seed in (2, 3)]
    assert (beside[0], beside[1]["lr"], beside[1]["accuracy"]) == (f"MAdam at {other:g}", other, runs)
    assert same[1]["minus_AdamW"] == [0, 0]
    assert f"| MAdam at {other:g} |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--also Adam: not one of SGD"):
        images.main([*command, "--also", "Adam=0.1"])
    with pytest.raises(SystemExit):
        images.main([*command, "--also", "AdamW"])
    assert "'AdamW' is not NAME=RATE" in capsys.readouterr().err


def test_images_are_divided():
    """Guards against images that are trained on and tested, and against the same division for every seed."""
    data = images.digits()
    assert data[0].shape == (1797, 1, 8, 8)
    assert data[0].mean().abs() < 1e-5
    settings = {steps: dataclasses.replace(TINY, steps=steps) for steps in (40, 200)}
    runs = [images.train("AdamW", 4e-3, seed, settings[40], data) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    shuffled = (data[0], data[1][torch.randperm(1797)])  # what cannot be learned: only what was seen could be known
    assert images.train("AdamW", 4e-3, 1, settings[200], shuffled)["accuracy"] < 20
    assert images.train("AdamW", 4e-3, 1, settings[200], data)["accuracy"] > 80


def test_setting_for_gpus(tmp_path):
    """Guards what only that setting has, in few steps on a CPU: how the archive is read, and the network."""
    values = torch.randint(256, (60, 3073), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    values[:, 0] %= 10
    with tarfile.open(tmp_path / images.CIFAR, "w:gz") as archive:
        for i, part in enumerate(values.split(10)):
            info = tarfile.TarInfo(f"cifar-10-batches-bin/data_batch_{i}.bin")
            info.size = part.numel()
            archive.addfile(info, io.BytesIO(part.numpy().tobytes()))
    data = images.cifar10(tmp_path)
    assert torch.equal(data[1], values[:, 0].long())
    pixels = values[:, 1:].view(60, 3, 32, 32).float()
    mean, deviation = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))
    torch.testing.assert_close(data[0] * deviation[:, None, None] + mean[:, None, None], pixels)
    setting = dataclasses.replace(images.SETTINGS["gpu"], device="cpu", steps=2, batch=4, trained=30)
    assert [len(part[0]) for part in images.divide(data, 1, setting)] == [30, 30]
    parameters = images.network(setting).parameters()
    assert sum(parameter.numel() for parameter in parameters) == 11_173_962  # ResNet-18 with a stem of 3 x 3
    run = images.train("MAdam", 1e-3, 1, setting, images.read(setting, tmp_path))
    assert run["loss"] > 0
    assert 0 <= run["accuracy"] <= 100


def test_images_move():
    """Guards against images that are shifted with their neighbours' pixels, or mirrored by half."""
    torch.manual_seed(0)
    one = torch.arange(1.0, 3 * 6 * 5 + 1).view(1, 3, 6, 5)
    padded = torch.nn.functional.pad(one, (4,) * 4)
    cuts = [padded[..., row : row + 6, column : column + 5] for row in range(9) for column in range(9)]
    expected = {tuple(cut.flatten().tolist()) for each in cuts for cut in (each, each.flip(3))}
    found = {tuple(image.flatten().tolist()) for image in images.moved(one.expand(4000, -1, -1, -1))}
    assert found == expected


def test_missing_package_is_named(monkeypatch):
    """Guards against a bare ImportError."""
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit, match=r"scikit-learn is not installed; .*pip install"):
        images.digits()


def test_missing_archive_is_named(tmp_path):
    """Guards against a bare FileNotFoundError after the network is made."""
    with pytest.raises(SystemExit, match=rf"no cifar-10-binary.tar.gz in {tmp_path}; .*https://"):
        images.cifar10(tmp_path)
