"""`bench/images.py` in few steps: all optimizers run, a rerun repeats nothing, and what is missing is named."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

for _name in ("sklearn", "matplotlib", "pytorch_optimizer"):
    pytest.importorskip(_name, reason=f"{_name} is not installed")

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import images  # noqa: E402
from experiments import check_end_to_end  # noqa: E402


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_all_optimizers_end_to_end(tmp_path, monkeypatch, capsys):
    """Guards against a contender that does not run, one that sees other seeds, and runs lost or made twice."""
    compare = images.compare
    monkeypatch.setattr(images, "compare", lambda runs: compare(runs, steps=6, fresh=2))
    check_end_to_end(images, "AdamW", "accuracy", images.RATES, [], tmp_path, monkeypatch, capsys)


def test_images_are_divided():
    """Guards against images that are trained on and tested, and against the same division for every seed."""
    data = images.digits()
    assert data[0].shape == (1797, 1, 8, 8)
    assert data[0].mean().abs() < 1e-5
    runs = [images.train("AdamW", 4e-3, seed, 40, data) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    shuffled = (data[0], data[1][torch.randperm(1797)])  # what cannot be learned: only what was seen could be known
    assert images.train("AdamW", 4e-3, 1, 200, shuffled)["accuracy"] < 20
    assert images.train("AdamW", 4e-3, 1, 200, data)["accuracy"] > 80


def test_missing_package_is_named(monkeypatch):
    """Guards against a bare ImportError."""
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit, match=r"scikit-learn is not installed; .*pip install"):
        images.digits()
