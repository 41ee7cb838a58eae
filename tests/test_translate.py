"""`bench/translate.py` on a catalogue made here, in few steps: what is read, divided, learned and decoded."""

from __future__ import annotations

import dataclasses
import itertools
import random
import struct
import sys
import zipfile
from pathlib import Path

import pytest
import torch

for _name in ("tokenizers", "sacrebleu", "matplotlib", "pytorch_optimizer"):
    pytest.importorskip(_name, reason=f"{_name} is not installed")

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import translate  # noqa: E402
from compare import tuning  # noqa: E402
from experiments import check_end_to_end  # noqa: E402

GERMAN = [
    "der",
    "hund",
    "die",
    "katze",
    "das",
    "haus",
    "ein",
    "baum",
    "sieht",
    "findet",
    "sucht",
    "kennt",
    "heute",
    "morgen",
    "hier",
    "dort",
]
ENGLISH = [
    "the",
    "dog",
    "a",
    "cat",
    "this",
    "house",
    "one",
    "tree",
    "sees",
    "finds",
    "seeks",
    "knows",
    "today",
    "tomorrow",
    "here",
    "there",
]
TINY = translate.Setting("cpu", 4, 120, 300, 16, 1, 2, 0.1, tuning.Budget(rates=2, chosen_on=2, fresh=2), tested=20)


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sentences(count: int, words: int = 5) -> list[translate.Pair]:
    """Pairs that are translated word by word."""
    draw, found = random.Random(0), {}
    while len(found) < count:
        chosen = draw.choices(range(len(GERMAN)), k=words)
        found[" ".join(GERMAN[i] for i in chosen)] = " ".join(ENGLISH[i] for i in chosen)
    return list(found.items())


def catalogue(messages: dict[str, str]) -> bytes:
    """A .mo file: a header, the places of all messages, those of all translations, the texts."""
    header = {"": "Content-Type: text/plain; charset=UTF-8\nPlural-Forms: nplurals=2; plural=(n != 1);\n"}
    entries = sorted((key.encode(), value.encode()) for key, value in {**header, **messages}.items())
    texts = [key for key, _ in entries] + [value for _, value in entries]
    at, places = 28 + 8 * len(texts), b""
    for text in texts:
        places += struct.pack("<2I", len(text), at)
        at += len(text) + 1
    count = len(entries)
    head = struct.pack("<7I", 0x950412DE, 0, count, 28, 28 + 8 * count, 0, 0)
    return head + places + b"".join(text + b"\0" for text in texts)


def wheels(folder: Path, *messages: dict[str, str]) -> Path:
    for wheel, some in zip(translate.WHEELS, messages, strict=True):
        with zipfile.ZipFile(folder / wheel, "w") as archive:
            archive.writestr("program/locale/de/LC_MESSAGES/django.mo", catalogue(some))
            archive.writestr("program/locale/fr/LC_MESSAGES/django.mo", catalogue({"the cat sees": "le chat voit"}))
    return folder


def test_all_optimizers_end_to_end(tmp_path, monkeypatch, capsys):
    """Guards against a contender that does not run, one that sees other seeds, and runs lost or made twice."""
    texts = {english: german for german, english in sentences(80)}
    wheels(tmp_path, texts, {})
    monkeypatch.setitem(translate.SETTINGS, "cpu", TINY)
    command = ["--data", str(tmp_path)]
    out = tmp_path / "out"
    record = check_end_to_end(translate, "LaProp", "BLEU", TINY.budget, command, out, monkeypatch, capsys)
    assert record["pairs"] == 80
    assert record["optimizers"].keys() == {"AdamW", "LaProp", "MAdam", "LaMAdam"}


def test_which_messages_are_read(tmp_path):
    """Guards against texts that are no translation, and against two that are the same but for what is not a word."""
    first = {
        "Open the _file": "Die Datei öff_nen",
        "menu\4Close the window": "Fenster schließen",  # in a context
        "Order %(_code)s was {_state}": "Bestellung %(_code)s ist {_state}",
        "order {0} was.": "Bestellung 7 %s IST",  # the same in both languages
        "Close the window!": "Das Fenster zumachen",  # in English
        "Shut the window": "fenster schließen",  # in German
        "%d day\0%d days": "%d Tag\0%d Tage",
        "not yet translated": "",
        "Gramps Web": "gramps web",
        "alone": "allein",
        "%s (%d)": "%s: %d",
        "very <b>important</b>": "sehr <b>wichtig</b>",
        "one\n two": "eins\n\nzwei",
        "many " * 31: "viele " * 31,
    }
    pairs = translate.read(wheels(tmp_path, first, {"One, two": "Eins und zwei", "three or four": "drei oder vier"}))
    assert set(pairs) == {
        ("Die Datei öffnen", "Open the file"),
        ("Das Fenster zumachen", "Close the window!"),
        ("fenster schließen", "Shut the window"),
        ("Bestellung %(_code)s ist {_state}", "Order %(_code)s was {_state}"),
        ("eins zwei", "one two"),
        ("drei oder vier", "three or four"),
    }


def test_pairs_are_divided(tmp_path):
    """Guards against pairs that are trained on and tested, and against the same division for every seed."""
    texts = {english: german for german, english in sentences(60)}
    shouted = {f"{english.upper()}!": f"{german.capitalize()} %s." for english, german in texts.items()}
    pairs = translate.read(wheels(tmp_path, texts, shouted))
    assert len(pairs) == 60
    found = [translate.divide(pairs, seed, TINY) for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2]
    for parts in found:
        assert [len(part) for part in parts] == [40, 20]
        for side in (0, 1):
            assert len({translate.bare(pair[side]) for part in parts for pair in part}) == 60


def test_vocabulary_gives_texts_back():
    """Guards against a text that cannot be cut or is not what it was, and against a vocabulary by chance."""
    pairs = sentences(50)
    tokenizers = [translate.vocabulary(pairs, 500) for _ in range(2)]
    assert tokenizers[0].to_str() == tokenizers[1].to_str()
    unseen = [("Größe: %(n)s €", "“Size”: %(n)s ☃"), pairs[0]]
    for pair, (german, english) in zip(unseen, translate.encode(tokenizers[0], unseen), strict=True):
        assert (german[-1], english[0], english[-1]) == (translate.END, translate.BEGIN, translate.END)
        assert tuple(tokenizers[0].decode(ids).strip() for ids in (german, english)) == pair
    assert len(german) <= 11  # at most two tokens for each of five words that were often seen


def test_batches_are_an_epoch():
    """Guards against pairs lost or met twice, batches too large, and the same order in every epoch."""
    ids = [([5] * (1 + i % 7), [translate.BEGIN, *[6] * (i % 9), 7 + i]) for i in range(100)]
    order = random.Random(0)
    epochs = [list(translate.batches(ids, TINY, order)) for _ in range(2)]
    lasts = [[target.max(1).values.tolist() for _, target in epoch] for epoch in epochs]
    assert lasts[0] != lasts[1]
    for epoch, last in zip(epochs, lasts, strict=True):
        assert sorted(itertools.chain.from_iterable(last)) == list(range(7, 107))
        assert all(target.numel() <= TINY.tokens and len(source) == len(target) for source, target in epoch)
        assert len(epoch) < 15
    alone = translate.batches([([5], [6] * 500)], TINY, order)
    assert [target.shape for _, target in alone] == [(1, 500)]


def test_padding_and_what_follows_are_not_seen():
    """Guards against masks left out or the wrong way round."""
    torch.manual_seed(0)
    model = translate.Translator(TINY, 50).eval()
    source, target = torch.randint(3, 50, (2, 5)), torch.randint(3, 50, (2, 6))
    scores = model.decode(target, model.encode(source), source)
    longer = torch.cat([source, torch.zeros(2, 3, dtype=torch.long)], 1)
    torch.testing.assert_close(model.decode(target, model.encode(longer), longer), scores, rtol=1e-4, atol=1e-5)
    other = torch.cat([target[:, :4], 53 - target[:, 4:]], 1)
    changed = model.decode(other, model.encode(source), source)
    torch.testing.assert_close(changed[:, :4], scores[:, :4], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(changed[:, 4:], scores[:, 4:], atol=1e-3)
    padded = torch.cat([target, torch.zeros(2, 4, dtype=torch.long)], 1)
    torch.testing.assert_close(model.loss(source, padded), model.loss(source, target), rtol=1e-4, atol=1e-5)


def test_decoding_ends(monkeypatch):
    """Guards against texts that go on after their end, and against a model that never ends one."""
    model = translate.Translator(TINY, 50).eval()
    ends = torch.tensor([4, 2, 99])  # the text of which length ends where
    lengths = {}

    def decode(target, memory, source):
        lengths[target.shape[1]] = len(source)
        following = torch.where(target.shape[1] > ends[source[:, 0] - 3], translate.END, 10 + target.shape[1])
        return nn.functional.one_hot(following, 50)[:, None].expand(-1, target.shape[1], -1).float()

    from torch import nn

    monkeypatch.setattr(model, "decode", decode)
    monkeypatch.setattr(model, "scores", lambda hidden: hidden)
    found = model.translate(torch.tensor([[3, 7, 7], [4, 7, 0], [5, 7, 0]]))
    assert found == [[11, 12, 13, 14], [11, 12], list(range(11, 25))]  # twice two tokens and ten
    assert [lengths[i] for i in (1, 3, 4, 5, 6, 14)] == [3, 3, 2, 2, 1, 1]
    assert max(lengths) == 14


def test_few_pairs_are_learned(monkeypatch):
    """Guards against training or decoding that does not work, and against a run that is not its seed's."""
    pairs = sentences(40, words=4)
    monkeypatch.setattr(translate, "divide", lambda pairs, seed, setting: (pairs, pairs))
    setting = dataclasses.replace(TINY, width=48, steps=150, tokens=400, dropout=0.0)
    runs = [translate.train("LaMAdam", 8e-3, 1, setting, pairs) for _ in range(2)]
    assert runs[0] == runs[1]
    assert runs[0]["BLEU"] > 90
    shuffled = [(german, pairs[i - 7][1]) for i, (german, _) in enumerate(pairs)]
    monkeypatch.setattr(translate, "divide", lambda pairs, seed, setting: (shuffled, pairs))
    assert translate.train("LaMAdam", 8e-3, 1, setting, pairs)["BLEU"] < 20


def test_learning_rate_has_three_stages():
    """Guards against a schedule without a warm-up, or one that does not fall."""
    rates = [translate.stage(step, 200) for step in range(201)]
    assert rates[0] == 1 / 20
    assert rates[19:101] == [1.0] * 82
    assert rates[150] == pytest.approx(0.1)
    assert rates[200] == pytest.approx(0.01)
    assert [translate.stage(step, 1) for step in range(2)] == [1, 0.01]


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    """Guards against a bare FileNotFoundError or ImportError."""
    with pytest.raises(SystemExit) as error:
        translate.main(["--data", str(tmp_path)])
    command = f"pip download --no-deps --only-binary :all: --ignore-requires-python --dest {tmp_path} "
    assert str(error.value).endswith(f"{command}pretix==2026.8.0 gramps==6.0.8")
    (tmp_path / translate.WHEELS[0]).touch()
    with pytest.raises(SystemExit, match=r"no gramps-\S+ in .* gramps==6.0.8$"):
        translate.read(tmp_path)
    for module, call in (
        ("tokenizers", lambda: translate.vocabulary([], 300)),
        ("sacrebleu", lambda: translate.bleu([], [])),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(SystemExit, match=f"{module} is not installed; .*pip install"):
            call()
