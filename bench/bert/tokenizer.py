"""A WordPiece tokenizer trained on the corpus, and the corpus as token ids, both cached.

The trainer breaks ties by hash order, so that two trainings may differ in a handful of rare pieces. Hence the cache,
keyed by a hash of the corpus, and hence a run keeps its tokenizer beside its checkpoint and resumes with that one.
"""

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.trainers import WordPieceTrainer

from .corpus import CorpusError

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]  # their ids are 0 to 4
CLS, SEP, MASK = 2, 3, 4
HELD_OUT_EVERY = 20  # documents
MIN_DOCUMENTS = 2 * HELD_OUT_EVERY


@dataclass
class Tokens:
    """A corpus ready for training, by its files: ranks hand it round, and each maps the token ids itself."""

    train_file: Path
    held_out_file: Path
    tokenizer_file: Path
    vocab_size: int
    corpus_hash: str
    tokenizer_hash: str

    @cached_property
    def train(self) -> np.ndarray:
        return _map(self.train_file, self.vocab_size)

    @cached_property
    def held_out(self) -> np.ndarray:
        return _map(self.held_out_file, self.vocab_size)


def describe(corpus: Iterable[str]) -> tuple[str, int, int]:
    """Hash, documents and characters of a corpus; raises CorpusError where there is too little of it."""
    digest, documents, characters = hashlib.sha256(), 0, 0
    for document in corpus:
        digest.update(document.encode() + b"\0")
        documents += 1
        characters += len(document)
    if documents < MIN_DOCUMENTS:
        size = f"only {documents} documents, {characters:,} characters" if documents else "empty: no text in it"
        raise CorpusError(
            f"the corpus is {size}; {MIN_DOCUMENTS} documents are needed (files, or parts of some 8,000 characters), "
            f"so that one in {HELD_OUT_EVERY} can be held out: give more text with --corpus"
        )
    return digest.hexdigest()[:16], documents, characters


def prepare(corpus: Iterable[str], corpus_hash: str, vocab_size: int, cache: Path, kept: Path | None) -> Tokens:
    """Tokenizer and token ids, from the cache where they are there; `kept` is the tokenizer of the run resumed."""
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f"tokenizer-{corpus_hash}-{vocab_size}.json"
    if kept and kept.exists():
        path = kept
    elif not path.exists():
        _write(path, lambda file: _train(corpus, vocab_size).save(file))
    tokenizer_hash = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    files = [cache / f"{split}-{corpus_hash}-{tokenizer_hash}.ids" for split in ("train", "held-out")]
    if not all(file.exists() for file in files):
        _encode(corpus, Tokenizer.from_file(str(path)), files)
    size = Tokenizer.from_file(str(path)).get_vocab_size()
    return Tokens(files[0], files[1], path, size, corpus_hash, tokenizer_hash)


def _train(corpus: Iterable[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    trainer = WordPieceTrainer(
        vocab_size=vocab_size, min_frequency=2, limit_alphabet=1000, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def _encode(corpus: Iterable[str], tokenizer: Tokenizer, files: list[Path]) -> None:
    dtype = _dtype(tokenizer.get_vocab_size())
    temporary = [Path(f"{file}.{os.getpid()}") for file in files]
    with open(temporary[0], "wb") as train, open(temporary[1], "wb") as held_out:
        numbered = enumerate(corpus)
        while batch := list(itertools.islice(numbered, 1000)):
            encodings = tokenizer.encode_batch_fast([text for _, text in batch], add_special_tokens=False)
            for (number, _), encoding in zip(batch, encodings, strict=True):
                if encoding.ids:
                    file = held_out if number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 else train
                    file.write(np.array([*encoding.ids, SEP], dtype).tobytes())
    for source, target in zip(temporary, files, strict=True):
        os.replace(source, target)


def _map(file: Path, vocab_size: int) -> np.ndarray:
    return np.memmap(file, _dtype(vocab_size), mode="r")


def _dtype(vocab_size: int) -> type:
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def _write(path: Path, save: Callable[[str], None]) -> None:
    """Atomically, so that a run that is stopped leaves no half a file to the next one."""
    temporary = f"{path}.{os.getpid()}"
    save(temporary)
    os.replace(temporary, path)
