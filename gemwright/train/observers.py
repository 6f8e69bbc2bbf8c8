"""All that looks at a run while it goes on: about.json, plot, samples, the watch over step times, other logs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch

from gemwright.errors import GemwrightError
from gemwright.report import say
from gemwright.runs import RunFolder
from gemwright.train.about import add_session
from gemwright.train.inputs import Inputs
from gemwright.train.plot import Plots
from gemwright.train.samples import Samples, first_prompts
from gemwright.train.setup import Setup, budget_bytes
from gemwright.train.watch import Machine, Watch
from gemwright.train.writers import Writer, open_writers


class Observers:
    """Told of each step and evaluation by the row that was logged; none of them changes or ends a run."""

    def __init__(self, inputs: Inputs, setup: Setup, run: RunFolder, step: int, steps_planned: int) -> None:
        config, device = inputs.config, setup.device
        add_session(run, step, steps_planned)
        on_gpu = device.type == "cuda"
        self._plots = Plots(run, budget_bytes(config.vram, device) if on_gpu else None)
        self._watch = Watch(Machine(lambda: torch.cuda.mem_get_info(device)[0]).read if on_gpu else None)
        self._writers = open_writers(config, run, inputs.record, step)
        self._samples: Samples | None = None
        self._is_closed = False
        if inputs.validation:
            prompts = inputs.prompts or first_prompts(inputs.validation, inputs.tokenizer.decode, config.seq)
            self._samples = Samples(setup, run, prompts, inputs.tokenizer, config.seq)
            self._samples.look = lambda row: self._tell(lambda writer: writer.after_sample(row))

    def after_step(self, row: Mapping[str, Any]) -> None:
        """Pass a row of the metrics on."""
        self._plots.after_step(row)
        self._watch.after_step(row)
        self._tell(lambda writer: writer.after_step(row))

    def after_evaluation(self, row: Mapping[str, Any]) -> None:
        """Pass a row of the evaluations on."""
        self._plots.after_evaluation(row)
        self._tell(lambda writer: writer.after_evaluation(row))
        if self._samples is not None:
            self._samples.after_evaluation(row)

    def close(self) -> None:
        """Draw the last plot and write what waits; a second call does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        self._plots.finish()
        self._tell(lambda writer: writer.close())
        if self._samples is not None:
            with suppress(GemwrightError):  # its rows were said to wait for room
                self._samples.log.flush()

    def _tell(self, what: Callable[[Writer], None]) -> None:
        for writer in list(self._writers):
            try:
                what(writer)
            except (OSError, RuntimeError) as error:
                self._writers.remove(writer)
                say(f"{type(writer).__name__} failed ({error}); the run goes on without it")
