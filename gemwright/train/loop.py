"""A fine-tune from config to finished run folder, and from a checkpoint on."""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from gemwright.errors import DoesNotFit, GemwrightError, MachineError, needed
from gemwright.report import command, say
from gemwright.runs import RunFolder
from gemwright.train.background import in_background
from gemwright.train.batches import Row, labelled_shares, rows_of, steps
from gemwright.train.checkpoint import Checkpoint, Checkpoints, State, on_cpu
from gemwright.train.config import TrainConfig
from gemwright.train.inputs import Inputs, check_same, origin_of, read_inputs, say_versions, settings_of
from gemwright.train.memory import peak_rss_bytes, rss_bytes
from gemwright.train.observers import Observers
from gemwright.train.optimizer import Optimizer, learning_rate
from gemwright.train.results import Ending, Progress, TuneResult, compare_peak, remember_run, save_adapter
from gemwright.train.setup import Setup, arrangement_of, set_up, shrink, use_expandable_segments
from gemwright.train.step import StepLoss
from gemwright.train.stop import Stop
from gemwright.train.validate import validate

__all__ = ["Progress", "TuneResult", "resume", "tune"]

RECENT = 10
# Without --save-every: what a crash may cost.
SAVE_EVERY_S = 600.0
Report = Callable[[Progress], None]


def tune(config: TrainConfig, on_progress: Report | None = None) -> TuneResult:
    """Fine-tune and write the run folder: config, metrics, plot, checkpoints, the adapter as PEFT folder and as GGUF.

    Everything that can be wrong with the input is found before the folder is made. Ctrl-C, SIGTERM and the time limits
    end it after the step in progress with all saved (`stopped` in the result). Raises InputError for bad data, model or
    settings, DoesNotFit where the video memory is too small for the smallest arrangement, MachineError where the
    machine or the arithmetic fails.
    """
    report = on_progress or (lambda progress: None)
    report(Progress("preparing", 0, 0, math.nan, 0.0, 0.0, 0.0, rss_bytes()))
    stop = Stop(config.until, config.max_hours)
    inputs = read_inputs(config)
    use_expandable_segments()
    RunFolder.check_new(config.out)
    with _set_up(inputs, None) as setup:
        run = RunFolder.create(config.out, inputs.record | _planned(setup))
        try:
            base = in_background(lambda: _add_base_digest(run, inputs))
            training = Training(inputs, setup, run, report, stop, base.result)
            return training.run()
        finally:
            run.release()


def resume(
    path: Path, until: str | None = None, max_hours: float | None = None, on_progress: Report | None = None
) -> TuneResult:
    """Go on with the run in `path` from its newest complete checkpoint, as if it had never been interrupted.

    A finished run gives its result again; one without a checkpoint begins anew. Raises InputError where its model, data
    or settings are no longer what they were or another process is at work in it, else what `tune` raises.
    """
    report = on_progress or (lambda progress: None)
    run = RunFolder.open(path)
    run.claim()
    try:
        summary = run.summary()
        if summary is not None and summary["state"] == "done":
            say(f"{path}: this run is finished ({summary['steps']} steps)")
            return TuneResult.of_summary(run, summary)
        report(Progress("preparing", 0, 0, math.nan, 0.0, 0.0, 0.0, rss_bytes()))
        record = run.config()
        config = settings_of(record, path, until=until, max_hours=max_hours)
        stop = Stop(config.until, config.max_hours)
        inputs = read_inputs(config)
        inputs.record["base"]["sha256"] = inputs.file.sha256()
        now = origin_of(inputs.record)
        check_same(origin_of(record), now, inputs.record)
        say_versions(record, inputs.record)
        checkpoint = Checkpoints(run.checkpoints, config.keep).newest()
        if checkpoint is None:
            say(f"{path}: no complete checkpoint; training begins at its first step")
        else:
            check_same(checkpoint.origin, now, inputs.record)
        step = checkpoint.state.step if checkpoint else 0
        run.go_back_to(step)
        run.amend({"base": inputs.record["base"]})
        use_expandable_segments()
        with _set_up(inputs, checkpoint) as setup:
            training = Training(inputs, setup, run, report, stop, lambda: now)
            if checkpoint is not None:
                training.go_on_from(checkpoint)
            return training.run()
    finally:
        run.release()


@contextmanager
def _set_up(inputs: Inputs, checkpoint: Checkpoint | None) -> Iterator[Setup]:
    earlier = None if checkpoint is None or checkpoint.arrangement is None else arrangement_of(checkpoint.arrangement)
    labelled = labelled_shares(inputs.examples)
    setup = set_up(inputs.config, inputs.file, inputs.device, inputs.dtype, labelled, earlier)
    try:
        yield setup
    finally:
        setup.close()


def _planned(setup: Setup) -> dict[str, Any]:
    return {} if setup.arrangement is None else {"plan": setup.arrangement.summary()}


def _add_base_digest(run: RunFolder, inputs: Inputs) -> dict[str, Any]:
    """Hash the base model, beside the first steps as it may take long; what the run was started from."""
    try:
        inputs.record["base"]["sha256"] = inputs.file.sha256()
    except OSError as error:
        raise MachineError(f"cannot be read: {error.strerror or error}", where=inputs.file.path) from error
    with suppress(MachineError):  # a full disk; `_finish` writes it too
        run.amend({"base": inputs.record["base"]})
    return origin_of(inputs.record)


class Training:
    """A fine-tune at work. `state`, adapter and optimizer are what a checkpoint holds; the rest can be made again.

    `origin` waits until what the run was started from is known.
    """

    def __init__(
        self,
        inputs: Inputs,
        setup: Setup,
        run: RunFolder,
        report: Report,
        stop: Stop,
        origin: Callable[[], dict[str, Any]],
    ) -> None:
        self.inputs, self.config, self.setup, self.folder = inputs, inputs.config, setup, run
        self.report, self.stop, self._origin = report, stop, origin
        self.optimizer = Optimizer(setup.lora, self.config.weight_decay, self.config.clip)
        self.checkpoints = Checkpoints(run.checkpoints, self.config.keep)
        self.state = State()
        config = self.config
        first_epoch = rows_of(inputs.examples, config.seq, config.rows_per_step, config.seed, 0, config.packing)
        planned = math.ceil(config.epochs * math.ceil(len(first_epoch) / config.rows_per_step))
        self.total = self.config.max_steps or planned
        self._at = Progress("training", 0, self.total, math.nan, 0.0, 0.0, 0.0, rss_bytes())
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT)
        self._begun_s = self._saved_at_s = time.monotonic()
        self._saved_step, self._save_s, self._was_shrunk = 0, 0.0, False
        self._observers: Observers | None = None

    def go_on_from(self, checkpoint: Checkpoint) -> None:
        """Be where `checkpoint` was written."""
        self.state = checkpoint.state
        self.setup.lora.master.copy_(checkpoint.adapter["master"])
        self.setup.lora.refresh()
        self.optimizer.load(checkpoint.optimizer)
        self._saved_step, self._begun_s = self.state.step, time.monotonic() - self.state.used_s
        self._at = replace(self._at, step=self.state.step)

    def run(self) -> TuneResult:
        """Train to the end, or until stopped, and write what came of it."""
        try:
            with self.stop:
                self._observers = Observers(self.inputs, self.setup, self.folder, self.state.step, self.total)
                try:
                    return self._finish(self._until_ended())
                finally:
                    self._observers.close()
        except Exception as error:
            self._fail(error)
            raise

    def _until_ended(self) -> Ending:
        try:
            return self._steps()
        except DoesNotFit:  # the step that ran out of it, in what others left
            reason = "video memory ran out, and too little of it is left to go on"
        except (MemoryError, RuntimeError) as error:
            if not _ran_out(error):
                raise
            kind = "video memory" if isinstance(error, torch.OutOfMemoryError) else "memory"
            reason = f"{kind} ran out{' twice' if self._was_shrunk else ''}"
        # Only now, when the error no longer holds on to what the step had taken.
        return Ending("failed", reason, is_memory=True)

    def _steps(self) -> Ending:
        config, setup, state = self.config, self.setup, self.state
        todo = max(0, self.total - state.step)
        batches = itertools.islice(
            steps(self.inputs.examples, config.seq, config.rows_per_step, config.seed, state.step, config.packing), todo
        )
        epoch, packed = next(batches, (state.epoch, []))
        rows = setup.rows(packed)
        self.report(self._at)
        while (ended := self._ended()) is None:
            start = time.perf_counter()
            rate = learning_rate(state.step, self.total, config.lr, config.warmup, config.schedule)
            done = self._attempt(rows)
            if done is None:
                shrink(setup, config, self.inputs.file)
                rows = setup.rows(packed)
                say("video memory ran out: others took what was counted on; going on with less of it")
                done = needed(self._attempt(rows))
            passed = epoch
            epoch, packed = next(batches, (epoch, []))
            rows = setup.rows(packed)  # while the device still works on this step
            loss = done.loss
            norm = self.optimizer.update(rate, loss)
            step_s = time.perf_counter() - start
            if self._recent:  # a process's first step also fills what is kept
                state.tokens, state.seconds = state.tokens + done.tokens, state.seconds + step_s
            state.step, state.epoch = state.step + 1, passed
            state.losses.append(loss)
            self._log(done, loss, rate, norm, step_s)
        return ended

    def _attempt(self, rows: list[Row]) -> StepLoss | None:
        """A step's forward and backward, or None (and no gradient) where a GPU's memory ran out for the first time."""
        setup, seed = self.setup, self.config.seed + self.state.step
        try:
            return setup.forward_backward(rows, seed)
        except torch.OutOfMemoryError:
            if self._was_shrunk or setup.device.type == "cpu":
                raise
        self._was_shrunk = True
        setup.lora.grad.zero_()
        return None

    def _log(self, done: StepLoss, loss: float, rate: float, norm: float, step_s: float) -> None:
        """Record a step, for the metrics, whoever watches, and whoever was asked to look."""
        state, setup, recent = self.state, self.setup, self._recent
        waiting, is_first = setup.waited_s() / step_s, not recent
        recent.append((done.tokens, step_s))
        speed = sum(t for t, _ in recent) / sum(s for _, s in recent)
        held_bytes, ram_bytes = setup.held_bytes(), rss_bytes()
        row = {"step": state.step, "epoch": state.epoch, "loss": loss, "lr": rate, "grad_norm": norm}
        row |= {"tokens": done.tokens, "labelled": done.labelled, "step_s": step_s, "tokens_per_s": speed}
        row |= {"rss_bytes": ram_bytes, "device_bytes": held_bytes, "waiting": waiting}
        row |= {"checkpoint_s": self._save_s, "skipped": self.optimizer.skipped_in_a_row > 0}
        self._save_s = 0.0
        self.folder.log(row)
        needed(self._observers).after_step(row)
        eta_s = (self.total - state.step) * sum(s for _, s in recent) / len(recent)
        self._at = Progress(
            "training",
            state.step,
            self.total,
            loss,
            rate,
            speed,
            eta_s,
            ram_bytes,
            waiting,
            held_bytes,
        )
        self.report(self._at)
        if is_first:
            compare_peak(setup)

    def _ended(self) -> Ending | None:
        """What is due between two steps, evaluation and checkpoint, and then whether the run has come to its end."""
        state, config = self.state, self.config
        if self.optimizer.skipped_in_a_row >= config.patience:
            return Ending("failed", f"loss or gradient was not a number {config.patience} times in a row")
        is_best = self._evaluation_is_due() and self._evaluate()
        if is_best or self._checkpoint_is_due():
            self._save()
        if not self._evaluation_is_due():
            if state.step >= self.total:
                return Ending("done", f"{state.step} steps")
            if config.stop_after and state.worse >= config.stop_after:
                return Ending("done", f"no better for {state.worse} evaluations")
        if state.step and (reason := self.stop.reason):
            return Ending("stopped", reason)
        return None

    def _checkpoint_is_due(self) -> bool:
        """By steps each one that was asked for, by time none while another is being written."""
        if self.config.save_every:
            return self.state.step % self.config.save_every == 0
        return time.monotonic() - self._saved_at_s >= SAVE_EVERY_S and not self.checkpoints.is_writing

    def _evaluation_is_due(self) -> bool:
        state, every = self.state, self.config.eval_every
        if not self.inputs.validation or not state.step or state.evaluated_step == state.step:
            return False
        return state.step >= self.total or (state.step % every == 0 if every else state.epoch == int(state.epoch))

    def _evaluate(self) -> bool:
        """Measure the validation loss, unless stopped meanwhile; whether it is the best so far."""
        state, config = self.state, self.config
        self.report(replace(self._at, phase="evaluating"))
        # A step that is replayed holds its memory all the time: beside it no more than one micro-batch at once.
        at_once = self.setup.joined if self.setup.graphs else config.rows_per_step
        validation = self.inputs.validation or []
        found = validate(self.setup, validation, config.seq, at_once, lambda: self.stop.reason)
        if found is None:
            return False
        state.evaluated_step = state.step
        is_best = state.best_loss is None or found.loss < state.best_loss
        if is_best and math.isfinite(found.loss):
            state.best_step, state.best_loss, state.worse = state.step, found.loss, 0
        else:
            is_best, state.worse = False, state.worse + 1
        row = {"step": state.step, "epoch": state.epoch, "loss": found.loss, "labelled": found.labelled}
        row |= {"seconds": found.seconds, "best": is_best}
        self.folder.evaluations_log.add(row)
        say(f"step {state.step}: validation loss {found.loss:.4f}{' (best so far)' if is_best else ''}")
        needed(self._observers).after_evaluation(row)
        return is_best

    def _save(self) -> None:
        """Have a checkpoint written beside the training, after what is being written, unless this step's is there."""
        if self._saved_step == self.state.step:
            return
        start = time.perf_counter()
        self.checkpoints.settle()
        self.checkpoints.begin(self._checkpoint())
        self._saved_step, self._saved_at_s = self.state.step, time.monotonic()
        self._save_s += time.perf_counter() - start

    def _checkpoint(self) -> Callable[[], Checkpoint]:
        """A snapshot; the call of it waits for what is not known at once."""
        lora, plan = self.setup.lora, self.setup.arrangement
        self.state.used_s = self._used_s()
        state = replace(self.state, losses=list(self.state.losses))
        adapter, optimizer = on_cpu({"master": lora.master}), on_cpu(self.optimizer.tensors())
        arrangement = None if plan is None else asdict(plan)

        def make() -> Checkpoint:
            self.folder.sync()
            return Checkpoint(state, adapter, optimizer, self._origin(), arrangement)

        return make

    def _finish(self, ended: Ending) -> TuneResult:
        """Write the last checkpoint of a run that can go on, the adapter, the plot and the summary."""
        state, run, config = self.state, self.folder, self.config
        self.report(replace(self._at, phase="saving"))
        was_saved = self.checkpoints.settle() and self._saved_step == state.step
        if not state.losses:
            raise MachineError(
                f"{ended.reason} in the first step", fix="Close other programs, or use a smaller --vram."
            )
        if not self.optimizer.is_intact:  # an update was broken off: what was saved before it is what counts
            newest = max(self.checkpoints.steps(), default=0)
            raise self._failure(ended, f"what is saved is step {newest}")
        if not was_saved and (ended.state == "stopped" or ended.is_memory):
            self.checkpoints.finish(self._checkpoint())
        if ended.state == "done":
            self._restore_best()
        save_adapter(run, self.setup.lora, self.inputs.file)
        run.flush()
        self._origin()
        run.amend({"base": self.inputs.record["base"]})
        needed(self._observers).close()
        if ended.state == "failed":
            raise self._failure(ended, "what was trained until then is saved")
        remember_run(self.setup, self.inputs.file, [seconds for _, seconds in self._recent])
        last = state.losses[-max(1, len(state.losses) // 10) :]
        tokens, seconds = (state.tokens, state.seconds) if state.seconds else (self._recent or [(0, 1.0)])[0]
        result = TuneResult(
            run.path,
            run.adapter,
            None if config.dora else run.adapter_gguf,
            len(state.losses),
            state.losses[0],
            sum(last) / len(last),
            tokens / seconds,
            peak_rss_bytes(),
            self.setup.peak_bytes(),
            ended.reason if ended.state == "stopped" else None,
        )
        best = {"best_step": state.best_step or None, "best_loss": state.best_loss}
        run.end({"state": ended.state, "reason": ended.reason} | result.row() | best | {"seconds": self._used_s()})
        return result

    def _failure(self, ended: Ending, left: str) -> MachineError:
        fix = "Lower --lr or look for broken examples."
        if ended.is_memory:
            fix = f"Close other programs, then go on with: {command('gemwright', 'runs', 'resume', self.folder.path)}"
        return MachineError(f"{ended.reason}; {left}", where=self.folder.path, fix=fix)

    def _restore_best(self) -> None:
        """Put the adapter of the best evaluation in the place of the last one."""
        state, lora = self.state, self.setup.lora
        if state.best_step in (0, state.step):
            return
        best = self.checkpoints.read(state.best_step)
        if best is None:
            say(f"the best checkpoint, of step {state.best_step}, is lost: the adapter is the last one")
            return
        lora.master.copy_(best.adapter["master"])
        lora.refresh()
        say(f"the adapter is that of step {state.best_step}, whose validation loss {state.best_loss:.4f} is the best")

    def _used_s(self) -> float:
        return time.monotonic() - self._begun_s

    def _fail(self, error: Exception) -> None:
        """Leave word of a failure, where the disk still takes it."""
        with suppress(GemwrightError):
            self.checkpoints.settle()
            self.folder.end(
                {"state": "failed", "reason": str(error), "run": str(self.folder.path), "steps": self.state.step}
            )


def _ran_out(error: Exception) -> bool:
    """Whether memory is what was lacking; PyTorch has no class of its own for a CPU's."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)
