"""BERT pretraining (masked language model) with large batches, MAdam and others.

python bench/bert_pretrain.py                                  a small BERT, minutes on two CPU cores
python bench/bert_pretrain.py --corpus text/ --out runs/mine   on one's own text
python bench/bert_pretrain.py --resume runs/mine               go on where it stopped, with the same losses
torchrun --nproc-per-node 8 bench/bert_pretrain.py --model base --parallel ddp --corpus wikipedia/
                                                               the paper's recipe
"""

import json
import math
import shlex
import shutil
import sys
import time
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path
from typing import Any

try:
    import numpy as np
    import torch
    from bert import checkpoint, corpus, data, distributed, optimizers, report, schedule, settings, speed, tokenizer
    from bert.interrupt import StopRequest
    from bert.model import MaskedLanguageModel

    from maxva_kernels.recipe import PhasedLR
except ImportError as error:
    if error.name not in ("torch", "numpy", "transformers", "tokenizers", "matplotlib", "tqdm", "maxva_kernels"):
        raise
    sys.exit(f'bert_pretrain.py: {error.name} is not installed; in the repository: pip install ".[bench]"')

USER_ERRORS = (settings.SettingsError, corpus.CorpusError, checkpoint.CheckpointError)


class Diverged(Exception):
    """The loss or the gradient is not a number any more."""


def main(argv: list[str] | None = None) -> int:
    given = vars(settings.parser().parse_args(argv))
    engine = None
    try:
        saved = None
        if "resume" in given:
            saved = checkpoint.read(given["resume"])
            given = {**saved["arguments"], **given, "out": given["resume"]}
        s = settings.resolve(given)
        engine = distributed.Engine(s.parallel, s.device)
        return Run(s, given, saved, engine).run()
    except (*USER_ERRORS, Diverged) as error:
        if engine is None or engine.rank == 0 or isinstance(error, checkpoint.CheckpointError):
            print(f"bert_pretrain.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bert_pretrain.py: interrupted; what a run has saved so far stays", file=sys.stderr)
        return 130
    finally:
        if engine:
            engine.close()


class Run:
    """One training run, from its settings to its report."""

    def __init__(self, s: Namespace, given: dict[str, Any], saved: dict[str, Any] | None, engine: distributed.Engine):
        self.s, self.engine = s, engine
        self.begin = time.perf_counter()
        self.phases = settings.phases(s)
        self.total = sum(phase.steps for phase in self.phases)
        self.done = self.saved = saved["step"] if saved else 0
        self.out = engine.first(lambda: settings.output(s))
        self.say = print if engine.rank == 0 else lambda *_: None
        if s.deterministic:
            settings.make_deterministic()

        tokens = engine.first(self._prepare_text)
        s.corpus_hash, s.tokenizer_hash = tokens.corpus_hash, tokens.tokenizer_hash
        s.ranks, s.threads = engine.ranks, torch.get_num_threads()
        if saved:
            self._check_resume(saved)
        self.sequences = {length: self._sequences(tokens.train, tokens, length) for length in s.seq_len}
        self.held_out = {length: self._sequences(tokens.held_out, tokens, length) for length in s.seq_len}
        last = self.held_out[s.seq_len[-1]]
        self.unigram = engine.first(lambda: data.unigram_loss(tokens.train, last, self._held_out_rows(last)))

        torch.manual_seed(s.seed)
        bert = MaskedLanguageModel(tokens.vocab_size, s.layers, s.hidden, s.heads, max(s.seq_len), s.dropout)
        self.model = engine.wrap(bert if s.params == "float32" else bert.bfloat16())
        # Clipping inside the step saves a pass over the gradients.
        self.clips_inside = optimizers.clips(s.optimizer) and s.max_grad_norm > 0
        self.optimizer = optimizers.build(
            s.optimizer,
            self.model,
            lr=1.0,  # the schedule's unit
            weight_decay=s.weight_decay,
            beta2_range=tuple(s.beta2_range),
            max_grad_norm=s.max_grad_norm if self.clips_inside else None,
            state_dtype=s.state_dtype,
            params=s.params,
        )
        self.schedule = PhasedLR(self.optimizer, settings.rates(s))
        self.scaler = torch.amp.GradScaler(s.device, enabled=s.amp == "fp16")
        if saved:
            checkpoint.restore(saved, self.model, self.optimizer)
            self.scaler.load_state_dict(saved["scaler"])
            self.schedule.load_state_dict(saved["schedule"])

        self.arguments = settings.to_keep(given)
        if engine.rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            if not saved:
                shutil.copyfile(tokens.tokenizer_file, self.out / "tokenizer.json")
                (self.out / "settings.json").write_text(json.dumps(vars(s), indent=1, default=str) + "\n")
        self.log = report.Log(self.out / "log.jsonl", self.done) if engine.rank == 0 else None
        size = sum(p.numel() for p in self.model.parameters())
        self.say(
            f"model       {size / 1e6:.2f} M parameters, {s.layers} layers, width {s.hidden}\n"
            f"optimizer   {s.optimizer} on {engine.device}, ranks {engine.ranks}, parallel {s.parallel}, amp {s.amp}\n"
            f"unigram     {self.unigram:.3f} nats: the loss of guessing without context"
        )

    def _prepare_text(self) -> tokenizer.Tokens:
        s = self.s
        text = corpus.FileCorpus(s.corpus) if s.corpus else corpus.InstalledCorpus(s.corpus_size * 1e6)
        corpus_hash, documents, characters = tokenizer.describe(text)
        tokens = tokenizer.prepare(
            text, corpus_hash, s.vocab, Path(s.cache), self.out / "tokenizer.json" if s.resume else None
        )
        print(f"text        {documents:,} documents, {characters / 1e6:.2f} M characters, ", end="")
        print(f"{len(tokens.train) / 1e6:.2f} M tokens, {time.perf_counter() - self.begin:.0f} s", flush=True)
        return tokens

    def _sequences(self, stream: np.ndarray, tokens: tokenizer.Tokens, length: int) -> data.MaskedSequences:
        return data.MaskedSequences(stream, length, tokens.vocab_size, self.s.seed, self.s.mask_share)

    def _check_resume(self, saved: dict[str, Any]) -> None:
        if saved["step"] != (step := self.engine.first(lambda: saved["step"])):
            raise checkpoint.CheckpointError(
                f"--resume {self.out}: rank {self.engine.rank} finds step {saved['step']} and rank 0 step {step}; it "
                "must be one directory that all nodes share, and no run may be writing to it"
            )
        now = vars(self.s)
        if changed := settings.differences(saved["settings"], now, settings.RESULT):
            raise settings.SettingsError(
                f"{self.out} was started with other settings:\n  " + "\n  ".join(changed) + "\n"
                "Resume without them, or start a new run with another --out. Nothing has been changed."
            )
        if moved := settings.differences(saved["settings"], now, settings.ROUNDING):
            masks = " and other dropout masks" if self.s.dropout > 0 else ""
            self.say(f"note        equal to not stopping up to rounding{masks}, not bit for bit: " + "; ".join(moved))

    def run(self) -> int:
        end = min(self.total, self.s.stop_after or self.total)
        self.say(f"output      {self.out}, steps {self.done} to {end} of {self.total}")
        self.progress = report.Progress(self.total, self.done, quiet=self.engine.rank != 0)
        with StopRequest(one_process=self.engine.ranks == 1, say=self.progress.say) as request:
            if self.done == 0:
                self._write({"step": 0, "loss": None, "heldout_loss": self._held_out_loss(self.phases[0])})
            while self.done < end and not request.agreed:
                if line := self._step(self.done, request):
                    self.done += 1
                    if self.done % self.s.eval_every == 0 or self.done == self.total:
                        line["heldout_loss"] = self._held_out_loss(schedule.phase_of(self.done - 1, self.phases))
                        self.progress.say(f"step {self.done}: held-out loss {line['heldout_loss']:.3f}")
                    self._write(line)
                    self.progress.update(line)
                due = self.done % self.s.checkpoint_every == 0 or self.done == end or request.agreed
                if due and self.done > self.saved:
                    self._save()
            self.engine.barrier()  # torchrun ends all ranks after one that a signal ended; rank 0 has to have written
        self.progress.close()
        if self.done < self.total:
            launcher = "python" if self.s.parallel == "none" else f"torchrun --nproc-per-node {self.engine.ranks}"
            command = f"{launcher} {shlex.join([sys.argv[0], '--resume', str(self.out)])}"
            if self.saved:
                self.say(f"stopped after step {self.done} of {self.total}; checkpoint saved. To go on: {command}")
            else:
                self.say(f"stopped in the first step, so nothing is saved; delete {self.out} to begin again")
            return 128 + request.signal if request.signal else 0
        self._report()
        return 0

    def _step(self, number: int, request: StopRequest) -> dict[str, Any] | None:
        """One optimizer step: a large batch in micro-batches. Returns its line of the log; None if it was given up."""
        s, engine, start = self.s, self.engine, time.perf_counter()
        phase = schedule.phase_of(number, self.phases)
        sequences, micro = self.sequences[phase.seq_len], self._micro_batch(phase)
        lr = self.schedule.get_last_lr()[0]
        self.optimizer.zero_grad()  # here rather than at the end: the report uses the last gradients
        torch.manual_seed(data.step_seed(s.seed, number, engine.rank))  # dropout

        here = phase.batch // engine.ranks
        first = phase.first_sample + (number - phase.start) * phase.batch + engine.rank * here
        share = engine.ranks / (phase.batch * sequences.masked)  # the engines average over ranks
        loss = torch.zeros((), device=engine.device)
        for at in range(0, here, micro):
            if at and engine.any(bool(request.signal)):
                request.agreed = True
                return None
            batch = sequences.training(np.arange(first + at, first + min(at + micro, here)))
            with engine.accumulating(self.model, last=at + micro >= here):
                losses = self._forward(batch)
                self.scaler.scale(losses.sum() * share).backward()
            loss += losses.detach().sum()

        parameters = [*self.model.parameters()]
        if self.clips_inside:  # the log's norm is no part of the optimizer's time
            norm = distributed.total_norm([p.grad for p in parameters if p.grad is not None]) / self.scaler.get_scale()
        engine.synchronize()
        before = time.perf_counter()
        if not self.clips_inside:
            self.scaler.unscale_(self.optimizer)
            norm = distributed.clip(parameters, s.max_grad_norm or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        engine.synchronize()
        after = time.perf_counter()
        self.schedule.step()

        total, request.agreed = engine.sum(loss.item(), bool(request.signal))
        mean = total / (phase.batch * sequences.masked)
        # Of a gradient that is not finite only a scaler skips the step; the weights are lost then, not the checkpoint.
        if not math.isfinite(mean) or not (math.isfinite(norm) or self.scaler.is_enabled()):
            raise Diverged(
                f"the loss is {mean} and the gradient's norm {norm} at step {number + 1}: start a new run with a lower "
                f"--lr (it was {lr:.2g}) or a longer --warmup. {self.out} keeps its log and last checkpoint, if any."
            )
        seconds = time.perf_counter() - start
        return {
            "step": number + 1,
            "loss": mean,
            "lr": lr,
            "grad_norm": norm if math.isfinite(norm) else None,  # fp16 overflow: the step was skipped
            "tokens_per_s": phase.batch * phase.seq_len / seconds,
            "seconds": seconds,
            "optimizer_seconds": after - before,
        }

    def _micro_batch(self, phase: schedule.Phase) -> int:
        return self.s.micro_batch[self.phases.index(phase)]

    def _forward(self, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.s.amp)
        with torch.autocast(self.s.device, dtype) if dtype else nullcontext():
            return self.model(*(tensor.to(self.engine.device, non_blocking=True) for tensor in batch))

    def _held_out_rows(self, sequences: data.MaskedSequences) -> np.ndarray:
        return np.linspace(0, sequences.count - 1, min(sequences.count, self.s.eval_sequences)).astype(np.int64)

    @torch.no_grad()
    def _held_out_loss(self, phase: schedule.Phase) -> float:
        """Over the same sequences with the same masks every time; ranks take parts, padded to equal lengths."""
        sequences = self.held_out[phase.seq_len]
        rows, ranks, micro = self._held_out_rows(sequences), self.engine.ranks, self._micro_batch(phase)
        part = math.ceil(len(rows) / ranks)
        places = np.arange(part) + self.engine.rank * part
        self.model.eval()
        loss = 0.0
        for at in range(0, part, micro):
            place = places[at : at + micro]
            losses = self._forward(sequences.held_out(rows[np.minimum(place, len(rows) - 1)]))
            loss += losses[: int((place < len(rows)).sum())].sum().item()
        self.model.train()
        return self.engine.sum(loss)[0] / (len(rows) * sequences.masked)

    def _write(self, line: dict[str, Any]) -> None:
        if self.log:
            self.log.write(line)

    def _save(self) -> None:
        checkpoint.save(
            self.out,
            self.engine.rank == 0,
            self.model,
            self.optimizer,
            step=self.done,
            scaler=self.scaler.state_dict(),
            schedule=self.schedule.state_dict(),
            settings={name: getattr(self.s, name) for name in (*settings.RESULT, *settings.ROUNDING)},
            arguments=self.arguments,
        )
        self.saved = self.done

    def _report(self) -> None:
        if self.log:
            lines = report.read(self.log.path)
            title = f"BERT ({self.s.model}), {self.s.optimizer}"
            report.plot(lines, self.out / "loss.png", self.unigram, title)
            print(report.summary(lines, self.unigram))
            if not self.s.no_comparison:
                print(speed.table(speed.compare(self.model, self.engine, self.s), self.s))
            for name, what in (("log.jsonl", "log"), ("loss.png", "plot"), (checkpoint.NAME, "checkpoint")):
                print(f"{what:<11} {self.out / name}")
            print(f"finished in {time.perf_counter() - self.begin:.0f} s")
        self.engine.barrier()


if __name__ == "__main__":
    sys.exit(main())
