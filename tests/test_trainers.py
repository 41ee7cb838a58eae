"""Other people's training loops, as the README shows them: short real runs, stopped in the middle and resumed.

Each needs its trainer (`pip install ".[integrations]"`).
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
import os
from collections.abc import Iterator
from typing import Any

import engines
import pytest
import torch
from cases import ALGORITHMS
from torch import nn

from maxva_kernels import LaMAdam, MAdam

both_algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS)

ROWS, STEPS, STOP = 16, 8, 4  # two epochs; trainers that resume begin one


class Model(nn.Module):
    """Takes and gives what Hugging Face's trainer expects, too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        predicted = self.net(inputs).squeeze(-1)
        return {"loss": (predicted - labels).square().mean(), "predicted": predicted}


class Rows(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.inputs = torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"inputs": self.inputs[index], "labels": self.inputs[index].sum()}


def loader() -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(Rows(), batch_size=4)


def batches() -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    return enumerate(itertools.chain(loader(), loader()))


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, first: int = 0, last: int = STEPS, clip: float = math.inf
):
    """What every trainer should come to."""
    for step, batch in batches():
        if first <= step < last:
            optimizer.zero_grad()
            model(**batch)["loss"].backward()
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
    return model


def plain_run(algorithm: Any, clip: float = math.inf, **options: Any) -> nn.Module:
    model = Model()
    return train(model, algorithm(model.parameters(), **options), clip=clip)


def assert_same(model: nn.Module, expected: nn.Module) -> None:
    found, wanted = dict(model.named_parameters()), dict(expected.named_parameters())
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)
    assert not torch.equal(next(iter(found.values())), next(Model().parameters())), "nothing was trained"


# --- Hugging Face ---------------------------------------------------------------------------------------------------


class InOrder:
    """A mixin: the trainer shuffles by default."""

    def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)


@both_algorithms
@pytest.mark.parametrize("way", ["optimizers", "optimizer_cls_and_kwargs"])
def test_hugging_face_trainer(way, algorithm, tmp_path):
    """Guards both ways into the Trainer, its clip, its schedule, and a run that was stopped and resumed."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    options = {"lr": 0.05, "beta2_range": (0.5, 0.98)}

    class Trainer(InOrder, transformers.Trainer):
        pass

    def run(folder, steps, resume=False):
        model = Model()
        settings = transformers.TrainingArguments(
            output_dir=str(folder),
            max_steps=STEPS,
            per_device_train_batch_size=4,
            save_steps=STOP,
            max_grad_norm=0.1,
            lr_scheduler_type="constant",
            learning_rate=options["lr"],
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            logging_steps=1000,
        )
        given: dict[str, Any] = {}
        if way == "optimizers":
            optimizer = algorithm(model.parameters(), **options)
            given["optimizers"] = (optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0))
        else:
            given["optimizer_cls_and_kwargs"] = (algorithm, options)
        trainer = Trainer(model=model, args=settings, train_dataset=Rows(), **given)
        if steps < STEPS:
            trainer.add_callback(StopAt(steps))
        trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{STOP}") if resume else None)
        return model

    class StopAt(transformers.TrainerCallback):
        def __init__(self, step):
            self.step = step

        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step >= self.step

    run(tmp_path, STOP)
    assert_same(run(tmp_path, STEPS, resume=True), plain_run(algorithm, clip=0.1, **options))


# --- accelerate -----------------------------------------------------------------------------------------------------


@both_algorithms
def test_accelerate(algorithm, tmp_path):
    """Guards `prepare`, gradient accumulation, `clip_grad_norm_`, and `save_state` to `load_state`."""
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, GradientState

    def run(first, last, folder=None):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        accelerator = accelerate.Accelerator(cpu=True)
        model = Model()
        model, optimizer, data = accelerator.prepare(model, algorithm(model.parameters(), lr=0.05), loader())
        if folder and first:
            accelerator.load_state(str(folder))
        for step, batch in enumerate(itertools.chain(data, data)):
            if first <= step < last:
                optimizer.zero_grad()
                accelerator.backward(model(**batch)["loss"])
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
        if folder and not first:
            accelerator.save_state(str(folder))
        return accelerator.unwrap_model(model)

    run(0, STOP, tmp_path)
    assert_same(run(STOP, STEPS, tmp_path), plain_run(algorithm, clip=0.1, lr=0.05))


# --- Lightning ------------------------------------------------------------------------------------------------------


@both_algorithms
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning(precision, algorithm, tmp_path, caplog):
    """Guards `configure_optimizers` with a clip and a schedule, mixed precision, and `ckpt_path`.

    In mixed precision Lightning does not clip for an optimizer that takes a gradient scaler's part, so ours does.
    """
    mixed = precision != "32-true"
    lightning = pytest.importorskip("lightning")
    caplog.set_level(logging.ERROR, "lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Model()

        def training_step(self, batch, index):
            return self.model(**batch)["loss"]

        def configure_optimizers(self):
            optimizer = algorithm(self.model.parameters(), lr=0.05, max_grad_norm=0.1 if mixed else None)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def run(steps, checkpoint=None):
        module = Module()
        trainer = lightning.Trainer(
            max_epochs=steps // STOP,  # with max_steps, a resumed run begins with a batch of the epoch before
            accelerator="cpu",
            precision=precision,
            gradient_clip_val=None if mixed else 0.1,
            default_root_dir=str(tmp_path),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, loader(), ckpt_path=checkpoint)
        return trainer, module.model

    trainer, _ = run(STOP)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed = run(STEPS, str(tmp_path / "half.ckpt"))
    _, whole = run(STEPS)
    assert_same(resumed, whole)
    if not mixed:
        model = Model()
        optimizer = algorithm(model.parameters(), lr=0.05)
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = 0.05 / (1 + step)
            train(model, optimizer, step, step + 1, clip=0.1)
        assert_same(whole, model)


# --- timm -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "algorithm"), [("madam", MAdam), ("lamadam", LaMAdam)])
def test_timm_registry(name, algorithm):
    """Guards the registry's way to an optimizer: by name, with groups without decay, and options of its own."""
    factory = pytest.importorskip("timm.optim._optim_factory")  # the public names are without the registry
    factory.default_registry.register(factory.OptimInfo(name=name, opt_class=algorithm, has_betas=False))

    def build():
        model = Model()
        settings = {"lr": 0.05, "weight_decay": 0.1, "beta2_range": (0.5, 0.98), "max_grad_norm": 0.1}
        return model, factory.create_optimizer_v2(model, opt=name, **settings)

    model, optimizer = build()
    assert type(optimizer) is algorithm
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, 0.1]
    train(model, optimizer, 0, STOP)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, STOP)
    resumed, optimizer = build()
    resumed.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert_same(train(resumed, optimizer, STOP), model)


# --- DeepSpeed ------------------------------------------------------------------------------------------------------


def train_with_deepspeed(algorithm: Any, stage: int, clip: float, inside: float | None, folder: str):
    """On one of several ranks, with a stop in the middle; the parameters in the end."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it compiles that for a minute
    deepspeed.init_distributed("gloo")

    def start():
        model = engines.make_model(torch.float32)
        optimizer = algorithm(model.parameters(), lr=0.01, max_grad_norm=inside)
        config = {
            "train_micro_batch_size_per_gpu": engines.ROWS // torch.distributed.get_world_size(),
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": clip,
        }
        return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]

    engine = start()
    for step in range(engines.STEPS):
        if step == 3:
            engine.save_checkpoint(folder)
            engine = start()
            engine.load_checkpoint(folder)
        engine.backward(engines.loss_of(engine, step, engines.my_rows()))
        engine.step()
    return [engines.whole(param) for param in engine.module.parameters()]


@both_algorithms
@pytest.mark.parametrize("stage", [1, 2], ids=["ZeRO-1", "ZeRO-2"])
def test_deepspeed(stage, algorithm, pools, tmp_path):
    """Guards DeepSpeed's partitions, its clip, and its checkpoints; float32, so equal up to the order of additions."""
    pytest.importorskip("deepspeed")
    options = {"lr": 0.01, "max_grad_norm": 0.1}
    expected = engines.run(algorithm.__name__, engines.alone, dtype=torch.float32, **options)[0]
    for params in pools(2)(train_with_deepspeed, algorithm, stage, 0.1, None, str(tmp_path)):
        torch.testing.assert_close(params, expected, rtol=1e-5, atol=1e-6)


def test_clip_inside_the_step_under_deepspeed_is_refused(pools, tmp_path):
    """Guards against a clip by the norm of one rank's part, of which the flat parameters tell nothing."""
    pytest.importorskip("deepspeed")
    with pytest.raises(RuntimeError, match=r"DeepSpeed's ZeRO .*use gradient_clipping"):
        pools(2)(train_with_deepspeed, MAdam, 1, 0.0, 0.1, str(tmp_path))
