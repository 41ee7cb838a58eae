"""The tensors that optimizers are measured on: models' parameters, written as what they are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

Shapes = Sequence[tuple[int, ...]]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def bert_shapes(hidden: int, layers: int, vocabulary: int = 30522) -> list[tuple[int, ...]]:
    """The parameters of BERT for pretraining (Devlin et al., 2019), word embeddings tied to the decoder."""
    h, f = hidden, 4 * hidden
    embeddings = [(vocabulary, h), (512, h), (2, h), (h,), (h,)]
    layer = [(h, h), (h,)] * 4 + [(h,), (h,), (f, h), (f,), (h, f), (h,), (h,), (h,)]
    heads = [(h, h), (h,), (h, h), (h,), (h,), (h,), (vocabulary,), (2, h), (2,)]
    return embeddings + layer * layers + heads


def gpt2_shapes(hidden: int = 768, layers: int = 12, vocabulary: int = 50257) -> list[tuple[int, ...]]:
    """The parameters of GPT-2 (Radford et al., 2019), its head tied to the embeddings; weights lie (in, out)."""
    h, f = hidden, 4 * hidden
    attention = [(h,), (h,), (h, 3 * h), (3 * h,), (h, h), (h,)]
    feed_forward = [(h,), (h,), (h, f), (f,), (f, h), (h,)]
    return [(vocabulary, h), (1024, h)] + (attention + feed_forward) * layers + [(h,), (h,)]


def resnet50_shapes(classes: int = 1000) -> list[tuple[int, ...]]:
    """The parameters of ResNet-50 (He et al., 2015): convolutions without bias, each before a batch norm."""

    def convolution(inputs: int, outputs: int, size: int) -> list[tuple[int, ...]]:
        return [(outputs, inputs, size, size), (outputs,), (outputs,)]

    shapes, inputs = convolution(3, 64, 7), 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += convolution(inputs, width, 1) + convolution(width, width, 3) + convolution(width, 4 * width, 1)
            if block == 0:  # the shortcut changes the number of channels
                shapes += convolution(inputs, 4 * width, 1)
            inputs = 4 * width
    return [*shapes, (classes, inputs), (classes,)]


SHAPES: dict[str, Shapes] = {
    "100m": [(4_000_000,)] * 25,
    "one": [(100_000_000,)],
    "bert-base": bert_shapes(768, 12),
    "bert-large": bert_shapes(1024, 24),
    "gpt2": gpt2_shapes(),
    "resnet50": resnet50_shapes(),
    "10k": [(1024,)] * 10_000,
    "tiny": [(1,)] * 400,
}
TITLES = {
    "100m": "100 M parameters in 25 tensors",
    "one": "one tensor of 100 M",
    "bert-base": "BERT-Base",
    "bert-large": "BERT-Large",
    "gpt2": "GPT-2 (124 M)",
    "resnet50": "ResNet-50",
    "10k": "10,000 tensors of 1,024",
    "tiny": "400 tensors of one element",
}


def elements(shapes: Shapes) -> int:
    return sum(map(math.prod, shapes))
