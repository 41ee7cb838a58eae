"""Sequences, their order and their masks, as pure functions of the seed and a sample's number in the run.

Nothing here has a state: sample 12,345 is the same sequence with the same masks whichever rank builds it, in whichever
micro-batch, before or after a resume. Every sequence is full ([CLS], text across document ends, [SEP]) and has the same
number of masked tokens, so the loss of a large batch is the sum over ranks and micro-batches divided by a number known
beforehand: it needs no counting across ranks, and no micro-batch or rank weighs more than another.
"""

import numpy as np
import torch

from .corpus import CorpusError
from .tokenizer import CLS, MASK, SEP, SPECIAL

HELD_OUT_SAMPLES = 1 << 62  # numbers of the held-out samples, far above those of training


class MaskedSequences:
    """Sequences of `length` tokens cut from a stream of token ids."""

    def __init__(self, tokens: np.ndarray, length: int, vocab_size: int, seed: int, mask_share: float = 0.15):
        self.body = length - 2
        self.count = len(tokens) // self.body
        if not self.count:
            raise CorpusError(f"too little text: not one sequence of {length} tokens; more --corpus, or less --seq-len")
        self.tokens = tokens[: self.count * self.body].reshape(self.count, self.body)
        self.masked = max(1, round(mask_share * self.body))
        self.vocab_size = vocab_size
        self.seed = seed
        self._order: tuple[int, np.ndarray] | None = None

    def training(self, samples: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The batch of the given sample numbers: every epoch takes all sequences in an order of its own."""
        rows = np.empty(len(samples), np.int64)
        for epoch in np.unique(samples // self.count):
            here = samples // self.count == epoch
            rows[here] = self._permutation(int(epoch))[samples[here] % self.count]
        return self._mask(rows, samples)

    def held_out(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The given sequences with the masks they always get."""
        return self._mask(rows, rows + HELD_OUT_SAMPLES)

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.count)
        return self._order[1]

    def _mask(self, rows: np.ndarray, samples: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token ids with masks applied, positions of the masked tokens, and what stood there (BERT's 80/10/10)."""
        text = self.tokens[rows].astype(np.int64)
        # [SEP] is drawn last. Documents are not empty, so half of the positions at least are not [SEP].
        chance = np.where(text == SEP, 2.0, _uniform(self.seed, samples, self.body, stream=0))
        at = np.sort(np.argpartition(chance, self.masked, axis=1)[:, : self.masked], axis=1)
        labels = np.take_along_axis(text, at, 1)
        kind = _uniform(self.seed, samples, self.masked, stream=1)
        word = len(SPECIAL) + _uniform(self.seed, samples, self.masked, stream=2) * (self.vocab_size - len(SPECIAL))
        shown = np.where(kind < 0.8, MASK, np.where(kind < 0.9, word.astype(np.int64), labels))
        np.put_along_axis(text, at, shown, 1)
        ids = np.pad(text, ((0, 0), (1, 1)), constant_values=((0, 0), (CLS, SEP)))
        return torch.from_numpy(ids), torch.from_numpy(at + 1), torch.from_numpy(labels)


def step_seed(seed: int, step: int, rank: int) -> int:
    """For what is random inside the model (dropout)."""
    return int(_hash(_hash(_hash(np.array([seed], np.uint64)) + np.uint64(step)) + np.uint64(rank))[0] >> np.uint64(1))


def unigram_loss(train: np.ndarray, held_out: MaskedSequences, rows: np.ndarray) -> float:
    """Loss of the best guess that ignores context, on the held-out masks: what a model must beat to have learned."""
    counts = np.ones(held_out.vocab_size)  # add-one smoothing
    for at in range(0, len(train), 1 << 20):  # bincount takes 8 bytes a token
        counts += np.bincount(train[at : at + (1 << 20)], minlength=held_out.vocab_size)
    return float(-np.log(counts / counts.sum())[held_out.held_out(rows)[2].numpy()].mean())


def _uniform(seed: int, samples: np.ndarray, columns: int, stream: int) -> np.ndarray:
    """Numbers in [0, 1) from a hash (splitmix64) of seed, sample, stream and column."""
    with np.errstate(over="ignore"):
        key = _hash(samples.astype(np.uint64) + _hash(np.array([4 * seed + stream], np.uint64)))
        return (_hash(key[:, None] + np.arange(columns, dtype=np.uint64)) >> np.uint64(11)) * 2.0**-53


def _hash(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
