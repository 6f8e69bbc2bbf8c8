"""What a fine-tune says while it works and leaves at its end: progress, the adapter's files, the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch

from gemwright.model.lora import LoRA
from gemwright.plan.answer import TRAINER_BYTES
from gemwright.plan.history import Seen, remember
from gemwright.report import say, size
from gemwright.runs import RunFolder
from gemwright.train.memory import peak_rss_bytes
from gemwright.train.setup import Setup
from gemwright.weights.gguf_writer import write_gguf_lora
from gemwright.weights.model_file import ModelFile
from gemwright.weights.peft_files import write_peft_adapter

# A prediction further from the measured peak than this is said aloud.
PEAK_TOLERANCE = 0.05


@dataclass(frozen=True)
class Progress:
    """Where a fine-tune stands. `loss` in nats a labelled token; `tokens_per_s` counts every token, labelled or not.

    `waiting` is the share of the last step that the device waited for weights, `device_bytes` what PyTorch holds there.
    """

    phase: Literal["preparing", "training", "evaluating", "saving"]
    step: int
    steps: int
    loss: float
    lr: float
    tokens_per_s: float
    eta_s: float
    rss_bytes: int
    waiting: float = 0.0
    device_bytes: int = 0


@dataclass(frozen=True)
class Ending:
    """Why a fine-tune takes no further step: done (all steps, or early), stopped (it can go on), or failed."""

    state: Literal["done", "stopped", "failed"]
    reason: str
    is_memory: bool = False


@dataclass(frozen=True)
class TuneResult:
    """What a fine-tune left: `loss_first` of the first step, `loss_last` the mean of the last tenth of them.

    `adapter_gguf` is None with DoRA, which llama.cpp cannot express. `stopped` says what stopped it, if something did.
    """

    run: Path
    adapter: Path
    adapter_gguf: Path | None
    steps: int
    loss_first: float
    loss_last: float
    tokens_per_s: float
    peak_rss_bytes: int
    peak_device_bytes: int
    stopped: str | None = None

    def row(self) -> dict[str, Any]:
        """As JSON, without `stopped`, which the exit code and `summary.json` say."""
        row = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}
        return {key: value for key, value in row.items() if key != "stopped"}

    @classmethod
    def of_summary(cls, run: RunFolder, summary: Mapping[str, Any]) -> TuneResult:
        """The result of a finished run, wherever its folder is now."""
        known = {field.name: summary[field.name] for field in fields(cls) if field.name in summary}
        gguf = run.adapter_gguf if summary["adapter_gguf"] else None
        return cls(**(known | {"run": run.path, "adapter": run.adapter, "adapter_gguf": gguf}))


def remember_run(setup: Setup, file: ModelFile, steps_s: Sequence[float]) -> None:
    """Let the next plan on this machine know what came of this one."""
    plan = setup.arrangement
    if plan is None or len(steps_s) < 2:
        return
    device, size_name = torch.cuda.get_device_name(setup.device), file.spec.name
    host = file.bytes() + plan.host_bytes + TRAINER_BYTES
    remember(
        [
            Seen("device", device, size_name, plan.predicted_bytes, setup.peak_bytes()),
            Seen("host", device, size_name, host, peak_rss_bytes()),
            Seen("seconds", device, size_name, plan.step_s, sorted(steps_s)[len(steps_s) // 2]),
        ]
    )


def compare_peak(setup: Setup) -> None:
    """Say how the peak of the first step compares with the prediction, where that was wrong."""
    plan, peak = setup.arrangement, setup.peak_bytes()
    if plan is not None and abs(peak / plan.predicted_bytes - 1) > PEAK_TOLERANCE:
        say(f"predicted peak {size(plan.predicted_bytes)} of video memory, measured {size(peak)}")


def save_adapter(run: RunFolder, lora: LoRA, file: ModelFile) -> None:
    """Write the adapter as PEFT and llama.cpp know it (DoRA only PEFT), each whole or not at all."""
    base, name = str(file.path), f"gemma-3-{file.spec.name}"
    write_peft_adapter(
        run.adapter,
        file.spec,
        lora.rank,
        lora.alpha,
        lora.pairs(),
        base,
        lora.targets,
        rslora=lora.stabilised,
        magnitudes=lora.magnitudes(),
    )
    if not lora.dora:
        write_gguf_lora(run.adapter_gguf, file.spec, name, lora.scale * lora.rank, lora.pairs())
