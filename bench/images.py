"""Classifying images, as in the paper's Section 5.1 (Table 1): handwritten digits on a CPU, CIFAR-10 on a GPU.

    python bench/images.py [--setting cpu|gpu] [--data DIR] [--jobs N] [--out DIR]

On a CPU minutes, on a GPU hours (never run); the same again goes on after an interruption. On a CPU these are the 1,797
digits of 8 x 8 pixels that scikit-learn ships, 300 to train on, 1,497 to test, and a convolutional network with batch
norm in 600 steps of 32 images. On a GPU they are the 60,000 images of CIFAR-10, read from DIR (`~/.cache/maxva_bench`;
the page that has them is named where they are missing), 45,000 to train on, shifted by up to 4 pixels and mirrored at
random, 15,000 to test, and a ResNet-18 in bfloat16 (autocast) in 10,500 steps of 128.

For each seed they are divided anew. The learning rate falls by a cosine, decoupled weight decay is 5e-2 of matrices
(SGD: 5e-4 in the gradient). For each optimizer five learning rates, a factor of 2 apart, are tried on five seeds (one),
and while the best is at an edge one more beyond it, at most twice: the rate with the largest mean accuracy counts. With
it the network is trained on ten fresh seeds (five), which have other weights, other images to train on and another
order; all optimizers have the same. Printed are means and standard errors of the accuracy on those to test, and of the
difference from AdamW's on the same seeds.

Not controlled: betas, epsilons and decay are not tuned, the best rate is known to a factor of 2, and images that one
seed tests are among those that another trains on.
"""

from __future__ import annotations

import functools
import math
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compare import paired, tuning
from compare.contenders import package
from torch import Tensor, nn

from maxva_kernels import LaMAdam, MAdam
from maxva_kernels.recipe import param_groups_weight_decay

DECAY = 5e-2
CIFAR = "cifar-10-binary.tar.gz"
SHIFT = 4  # pixels, at most

Data = tuple[Tensor, Tensor]  # images [n, channels, rows, columns], of mean 0 and deviation 1, and what they show [n]


@dataclass(frozen=True)
class Setting:
    device: str
    images: str
    steps: int
    batch: int
    trained: int  # images; the others are tested
    budget: tuning.Budget


SETTINGS = {
    "cpu": Setting("cpu", "digits", 600, 32, 300, tuning.Budget(rates=5, chosen_on=5, fresh=10)),
    "gpu": Setting("cuda", "CIFAR-10", 10_500, 128, 45_000, tuning.Budget(rates=5, chosen_on=1, fresh=5)),
}


@dataclass(frozen=True)
class Contender(paired.Contender):
    decay: float = DECAY


CONTENDERS = {
    "SGD": Contender(lambda groups: torch.optim.SGD(groups, momentum=0.9), 0.1, 5e-4),
    "AdamW": Contender(torch.optim.AdamW, 4e-3),
    "LaProp": Contender(package("LaProp"), 4e-3),
    "AdaBelief": Contender(package("AdaBelief"), 4e-3),
    "MAdam": Contender(lambda groups: MAdam(groups, beta2_range=(0.5, 0.999)), 4e-3),
    "LaMAdam": Contender(lambda groups: LaMAdam(groups, beta2_range=(0.5, 0.999)), 4e-3),
}


def digits() -> Data:
    """scikit-learn's.

    Raises:
        SystemExit: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SystemExit(
            'images.py: scikit-learn is not installed; in the repository: pip install ".[bench]"'
        ) from error
    found = load_digits()
    return normalised(torch.tensor(found.images, dtype=torch.float32)[:, None]), torch.tensor(found.target)


def cifar10(folder: Path) -> Data:
    """Of the archive in ``folder``: a byte for what an image shows, then its red, green and blue pixels.

    Raises:
        SystemExit: it is not there.
    """
    path = folder.expanduser() / CIFAR
    if not path.exists():
        raise SystemExit(
            f"images.py: no {CIFAR} in {path.parent}; its authors have it at https://www.cs.toronto.edu/~kriz/cifar.html"
        )
    with tarfile.open(path) as archive:
        files = [archive.extractfile(name) for name in sorted(archive.getnames()) if name.endswith(".bin")]
        found = torch.frombuffer(bytearray().join(file.read() for file in files if file), dtype=torch.uint8)
    found = found.view(-1, 1 + 3 * 32 * 32)
    return normalised(found[:, 1:].reshape(-1, 3, 32, 32).float()), found[:, 0].long()


def normalised(images: Tensor) -> Tensor:
    return (images - images.mean((0, 2, 3), keepdim=True)) / images.std((0, 2, 3), keepdim=True)


def read(setting: Setting, folder: Path) -> Data:
    images, labels = digits() if setting.images == "digits" else cifar10(folder)
    return images.to(setting.device), labels.to(setting.device)


def block(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


class Residual(nn.Module):
    """Two convolutions beside a way past them."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.convolutions = nn.Sequential(*block(inputs, outputs, stride), *block(outputs, outputs)[:-1])
        past = [nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)]
        self.past = nn.Sequential(*(past if inputs != outputs else []))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.convolutions(x) + self.past(x))


def network(setting: Setting) -> nn.Module:
    if setting.images == "digits":
        return nn.Sequential(
            *block(1, 16), nn.MaxPool2d(2), *block(16, 32), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10)
        )
    layers = block(3, 64)
    for inputs, outputs, stride in ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)):
        layers += [Residual(inputs, outputs, stride), Residual(outputs, outputs, 1)]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)]
    return nn.Sequential(*layers).to(setting.device).to(memory_format=torch.channels_last)


def moved(images: Tensor) -> Tensor:
    """Each shifted, with zeros from beyond its edges, and mirrored, or not."""
    count, channels, rows, columns = images.shape
    at: dict[str, Any] = {"device": images.device}
    padded = nn.functional.pad(images, (SHIFT,) * 4)
    row, column = (
        torch.randint(2 * SHIFT + 1, (count, 1), **at) + torch.arange(size, **at) for size in (rows, columns)
    )
    column = torch.where(torch.rand(count, 1, **at) < 0.5, column, column.flip(1))
    one, channel = torch.arange(count, **at)[:, None, None, None], torch.arange(channels, **at)[:, None, None]
    return padded[one, channel, row[:, None, :, None], column[:, None, None, :]]


def divide(data: Data, seed: int, setting: Setting) -> list[Data]:
    """To train on, to test."""
    order = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(seed))
    sizes = [setting.trained, len(order) - setting.trained]
    return [(data[0][part], data[1][part]) for part in order.to(setting.device).split(sizes)]


def train(name: str, lr: float, seed: int, setting: Setting, data: Data) -> dict[str, Any]:
    """The accuracy in % on the images to test, and the loss, None if it is no finite number."""
    torch.manual_seed(seed)
    (images, labels), tested = divide(data, seed, setting)
    model, contender = network(setting), CONTENDERS[name]
    groups = param_groups_weight_decay(model, contender.decay)
    optimizer = contender.make([{**group, "lr": lr} for group in groups])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, setting.steps)
    in_colour = setting.images == "CIFAR-10"
    autocast = torch.autocast(setting.device, torch.bfloat16, enabled=in_colour)
    for _ in range(setting.steps):
        some = torch.randint(setting.trained, (setting.batch,)).to(setting.device)
        with autocast:
            logits = model(moved(images[some]) if in_colour else images[some])
        nn.functional.cross_entropy(logits.float(), labels[some]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()
    with torch.no_grad(), autocast:
        loss, right = judge(model, *tested)
    return {"accuracy": 100 * right, "loss": loss if math.isfinite(loss) else None}


def judge(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean loss, and the share that is told right."""
    logits = torch.cat([model(some).float() for some in images.split(1000)])
    return nn.functional.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).double().mean().item()


def main(argv: list[str] | None = None) -> None:
    args = paired.parse(__doc__, SETTINGS, argv)
    setting = SETTINGS[args.setting]
    training = functools.partial(train, setting=setting, data=read(setting, args.data))
    experiment = paired.Experiment("images", CONTENDERS, "AdamW", "accuracy", "%", "Accuracy on test images")
    paired.report(args, experiment, training, setting)


if __name__ == "__main__":
    main()
