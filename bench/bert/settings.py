"""What a run is: the command line, the recipes behind its defaults, and what a resumed run may not change."""

import argparse
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from maxva_kernels import recipe

from . import checkpoint, optimizers, schedule


class SettingsError(Exception):
    """A setting cannot be used; the message says which and what to do."""


# The recipe of the paper (arXiv 2006.11918, section 5.4) on the schedule of the repository it used (NVIDIA's BERT, LAMB
# defaults): peak rates of phase 2 are two thirds of phase 1's, decay is a square root, counted from the first step of
# the phase. Next-sentence prediction, which that repository also trains, is left out.
BASE: dict[str, Any] = {
    "layers": 12, "hidden": 768, "heads": 12, "vocab": 30522, "dropout": 0.1,
    "seq_len": [128, 512], "batch": [65536, 32768], "steps": [7038, 1563], "warmup": [0.2843, 0.128],
    "decay_power": 0.5, "micro_batch": [128, 32], "checkpoint_every": 100, "eval_every": 100,
}  # fmt: skip
SMALL: dict[str, Any] = {
    "layers": 2, "hidden": 128, "heads": 2, "vocab": 4096, "dropout": 0.0,
    "seq_len": [64], "batch": [64], "steps": [1000], "warmup": [0.1],
    "decay_power": 1.0, "micro_batch": [32], "checkpoint_every": 250, "eval_every": 250,
}  # fmt: skip
# The paper's best for MAdam and Adam, the repository's for LAMB; LaMAdam was not tried there.
BASE_LR = {name: [3.4e-3, 3.4e-3 * 2 / 3] for name in optimizers.NAMES}
BASE_LR |= {"adamw": [8e-4, 8e-4 * 2 / 3], "lamb": [6e-3, 4e-3]}
SMALL_LR = {name: [5e-3] for name in optimizers.NAMES} | {"lamb": [2e-2]}

# What decides the result. The rest (ranks, micro-batches, device, how often to save) moves it by rounding at most, but
# with dropout, whose masks are drawn by each rank for each micro-batch.
RESULT = (
    "model", "layers", "hidden", "heads", "vocab", "dropout", "corpus_hash", "tokenizer_hash", "mask_share",
    "optimizer", "seq_len", "batch", "steps", "lr", "warmup", "decay_power", "weight_decay", "beta2_range",
    "max_grad_norm", "state_dtype", "params", "seed", "amp",
)  # fmt: skip
ROUNDING = ("micro_batch", "parallel", "ranks", "device", "threads")
NOT_KEPT = ("resume", "out", "stop_after")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="bert_pretrain.py",
        description="Pretrain BERT (masked language model) with large batches. Without arguments: a small BERT with "
        "MAdam on the documentation of the installed packages, in minutes on two CPU cores.",
        epilog="On several devices: torchrun --nproc-per-node N bench/bert_pretrain.py --parallel ddp|fsdp2 ... "
        "Settings that take one value a phase repeat their last value.",
        argument_default=argparse.SUPPRESS,  # so that it shows what was given
    )
    group = top.add_argument_group("model")
    group.add_argument("--model", choices=("small", "base"), help="defaults of everything below (small)")
    group.add_argument("--layers", type=_count, help="transformer layers")
    group.add_argument("--hidden", type=_count, help="width; the inner layers are four times as wide")
    group.add_argument("--heads", type=_count, help="attention heads")
    group.add_argument("--vocab", type=_count, help="vocabulary of the WordPiece tokenizer, at most")
    group.add_argument("--dropout", type=_share, help="probability (base: 0.1, small: 0)")

    group = top.add_argument_group("text")
    group.add_argument("--corpus", nargs="+", metavar="PATH", help="UTF-8 files, or directories of .txt, .md and .rst")
    group.add_argument("--corpus-size", type=float, metavar="MB", help="text to take from the installation (6)")
    group.add_argument("--mask-share", type=_share, help="share of the tokens to predict (0.15)")
    group.add_argument("--cache", type=Path, metavar="DIR", help="tokenizers and token ids (~/.cache/maxva-kernels)")

    group = top.add_argument_group("recipe")
    group.add_argument("--optimizer", choices=optimizers.NAMES, help="madam; reference is MAdam in eager PyTorch")
    group.add_argument("--seq-len", nargs="+", type=_count, help="tokens a sequence, one value a phase")
    group.add_argument("--batch", nargs="+", type=_count, help="sequences a step, over all ranks, one value a phase")
    group.add_argument("--steps", nargs="+", type=_count, help="optimizer steps, one value a phase")
    group.add_argument("--lr", nargs="+", type=_number, help="peak learning rate, one value a phase")
    group.add_argument("--warmup", nargs="+", type=_share, help="share of the steps with rising rate, a phase each")
    group.add_argument("--decay-power", type=_number, help="power of the polynomial decay after it")
    group.add_argument("--weight-decay", type=_number, help="decoupled; not for biases and LayerNorm (0.1, LAMB 0.01)")
    group.add_argument("--beta2-range", nargs=2, type=float, help="MaxVA's bounds, Adam takes the upper (0.5 0.999)")
    names = tuple(optimizers.STATE_DTYPES)
    group.add_argument("--state-dtype", choices=names, help="of MAdam's and LaMAdam's state (float32)")
    names = tuple(optimizers.PARAMS)
    group.add_argument(
        "--params", choices=names, help="parameters, gradients and their sums over micro-batches (float32)"
    )
    group.add_argument("--max-grad-norm", type=_number, help="clip by the global norm; 0 for none (1)")
    group.add_argument("--seed", type=_whole, help="of weights, order, masks and dropout (0)")

    group = top.add_argument_group("machine")
    group.add_argument("--micro-batch", nargs="+", type=_count, help="sequences a rank holds at a time, a phase each")
    group.add_argument("--parallel", choices=("none", "ddp", "fsdp2"), help="needs torchrun (ddp under it, else none)")
    group.add_argument("--amp", choices=("bf16", "fp16", "none"), help="autocast (bf16 on CUDA, none on CPU)")
    group.add_argument("--device", choices=("cpu", "cuda"), help="(cuda where there is one)")
    group.add_argument("--deterministic", action="store_true", help="the same bits on CUDA on every run, slower")

    group = top.add_argument_group("output")
    group.add_argument("--out", type=Path, metavar="DIR", help="log, plot, checkpoint (runs/bert-MODEL-OPTIMIZER-N)")
    group.add_argument("--resume", type=Path, metavar="DIR", help="go on with the run in this directory")
    group.add_argument("--checkpoint-every", type=_count, metavar="STEPS", help="(small: 250, base: 100)")
    group.add_argument("--eval-every", type=_count, metavar="STEPS", help="held-out loss (small: 250, base: 100)")
    group.add_argument("--eval-sequences", type=_count, help="held-out sequences, at most (512)")
    group.add_argument("--stop-after", type=_count, metavar="STEPS", help="save and stop there, the schedule unchanged")
    group.add_argument("--no-comparison", action="store_true", help="skip timing the optimizers at the end")
    return top


def resolve(given: dict[str, Any]) -> argparse.Namespace:
    """All settings, from those that were given."""
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    model, optimizer = given.get("model", "small"), given.get("optimizer", "madam")
    s: dict[str, Any] = {
        "model": model, "optimizer": optimizer, "corpus": None, "corpus_size": 6.0, "mask_share": 0.15,
        "weight_decay": 0.01 if optimizer == "lamb" else 0.1, "beta2_range": [0.5, 0.999], "max_grad_norm": 1.0,
        "state_dtype": "float32", "params": "float32", "seed": 0, "parallel": "ddp" if launched else "none",
        "out": None, "resume": None,
        "eval_sequences": 512, "stop_after": None, "no_comparison": False, "deterministic": False,
        "cache": Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "maxva-kernels",
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        **(BASE if model == "base" else SMALL),
        "lr": (BASE_LR if model == "base" else SMALL_LR)[optimizer],
    }  # fmt: skip
    phases = len(given.get("steps", s["steps"]))
    for name in ("seq_len", "batch", "lr", "warmup", "micro_batch"):
        values = given.get(name)
        if values and len(values) not in (1, phases):
            raise SettingsError(f"{_flag(name)} has {len(values)} values, --steps {phases}: give as many, or one")
        values = values or s[name]
        s[name] = [values[min(i, len(values) - 1)] for i in range(phases)]
    s.update({name: value for name, value in given.items() if name not in s or not isinstance(s[name], list)})
    s.update({name: given[name] for name in ("steps", "beta2_range") if name in given})
    s.setdefault("amp", "bf16" if s["device"] == "cuda" else "none")
    _check(s, launched)
    return argparse.Namespace(**s)


def _check(s: dict[str, Any], launched: bool) -> None:
    if s["state_dtype"] != "float32" and not optimizers.clips(s["optimizer"]):
        raise SettingsError(f"--state-dtype {s['state_dtype']} is for MAdam and LaMAdam, not for {s['optimizer']}")
    if optimizers.PARAMS[s["params"]] and not optimizers.clips(s["optimizer"]):
        raise SettingsError(f"--params {s['params']} is for MAdam and LaMAdam, not for {s['optimizer']}")
    lower, upper = s["beta2_range"]
    if not 0 < lower <= upper <= 1 or (upper == 1 and s["optimizer"] in ("adamw", "lamb")):
        raise SettingsError(
            f"--beta2-range {lower} {upper}: more than 0, in rising order, and at most 1, for adamw and lamb below 1"
        )
    if s["hidden"] % s["heads"]:
        raise SettingsError(f"--hidden {s['hidden']} is not a multiple of --heads {s['heads']}")
    if min(s["seq_len"]) < 8:
        raise SettingsError(f"--seq-len {min(s['seq_len'])} is too short: 8 tokens at least")
    if s["vocab"] < 200:
        raise SettingsError(f"--vocab {s['vocab']} is too small: 200 at least, for the letters alone")
    if not 0 < s["mask_share"] <= 0.4:
        raise SettingsError(f"--mask-share {s['mask_share']}: more than 0, at most 0.4")
    if s["device"] == "cuda" and not torch.cuda.is_available():
        raise SettingsError("--device cuda: torch sees no CUDA device here; use --device cpu")
    if s["amp"] == "fp16" and s["device"] != "cuda":
        raise SettingsError("--amp fp16 scales the loss on CUDA devices only; on CPU use --amp bf16 or none")
    if s["parallel"] != "none" and not launched:
        raise SettingsError(f"--parallel {s['parallel']}: start it with torchrun --nproc-per-node N")
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if s["parallel"] == "none" and launched and ranks > 1:
        raise SettingsError("--parallel none under torchrun would train the same model on every rank; use ddp or fsdp2")
    for batch in s["batch"] if s["parallel"] != "none" else ():
        if batch % ranks:
            raise SettingsError(f"--batch {batch} cannot be shared by {ranks} ranks; make it a multiple of {ranks}")


def output(s: argparse.Namespace) -> Path:
    """The run's directory: that of the run resumed, the one given if it holds no run yet, or a new one."""
    if s.resume:
        return Path(s.resume)
    if s.out is None:
        names = (Path("runs", f"bert-{s.model}-{s.optimizer}-{number}") for number in range(1, 1 << 30))
        return next(path for path in names if not path.exists())
    out = Path(s.out)
    if out.exists() and (not out.is_dir() or (out / "log.jsonl").exists() or (out / checkpoint.NAME).exists()):
        if out.is_dir() and not (out / checkpoint.NAME).exists():
            raise SettingsError(f"--out {out} holds a run that saved nothing yet: delete it, or choose another --out")
        raise SettingsError(f"--out {out} holds a run already: --resume {out} to go on with it, or another --out")
    return out


def to_keep(given: dict[str, Any]) -> dict[str, Any]:
    """What was given on the command line, for the checkpoint: a run is resumed with it from any directory."""
    kept = {name: value for name, value in given.items() if name not in NOT_KEPT}
    if "corpus" in kept:
        kept["corpus"] = [str(Path(path).resolve()) for path in kept["corpus"]]
    if "cache" in kept:
        kept["cache"] = str(Path(kept["cache"]).resolve())
    return kept


def make_deterministic() -> None:
    """Only kernels that add in a fixed order (CPU kernels do anyway)."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def phases(s: argparse.Namespace) -> list[schedule.Phase]:
    return schedule.phases(s.seq_len, s.batch, s.steps)


def rates(s: argparse.Namespace) -> list[recipe.Phase]:
    """The learning rates of the phases, for an optimizer whose own is 1."""
    return [
        recipe.Phase(steps, warmup=warmup, power=s.decay_power, scale=lr, from_peak=s.model != "base")
        for steps, warmup, lr in zip(s.steps, s.warmup, s.lr, strict=True)
    ]


def differences(saved: dict[str, Any], now: dict[str, Any], names: Iterable[str]) -> list[str]:
    return [f"{_flag(n)}: {saved.get(n)} then, {now.get(n)} now" for n in names if saved.get(n) != now.get(n)]


def _flag(name: str) -> str:
    names = {"corpus_hash": "text (--corpus or installed packages)", "tokenizer_hash": "tokenizer"}
    names |= {"ranks": "ranks", "threads": "threads"}
    return names.get(name, "--" + name.replace("_", "-"))


def _count(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text}: at least 1")
    return value


def _whole(text: str) -> int:
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text}: at least 0")
    return value


def _number(text: str) -> float:
    if not 0 <= (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: a number, 0 or more")
    return value


def _share(text: str) -> float:
    if not 0 <= (value := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text}: from 0 to below 1")
    return value
