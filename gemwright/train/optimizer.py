"""AdamW over the flat adapter vector, with a schedule, clipping, and a guard against numbers that are none."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from gemwright.model.lora import LoRA

FLOOR = 0.1


def learning_rate(step: int, steps: int, peak: float, warmup: float, schedule: str = "cosine") -> float:
    """The rate of update `step` (from 0) of `steps`: a linear rise to `peak` over the share `warmup`, then `schedule`.

    `cosine` (half a period, Loshchilov and Hutter 2017, arXiv 1608.03983) and `linear` fall to a tenth; `constant`
    stays at `peak`.
    """
    rising = max(1, round(warmup * steps))
    if step < rising:
        return peak * (step + 1) / rising
    progress = min(1.0, (step - rising) / max(1, steps - rising))
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}[schedule]
    return peak * (FLOOR + (1 - FLOOR) * left)


class Optimizer:
    """Updates `lora.master` from `lora.grad`. Source: Loshchilov and Hutter 2019 (arXiv 1711.05101)."""

    def __init__(self, lora: LoRA, weight_decay: float, clip: float) -> None:
        self._lora, self._weight_decay, self._clip = lora, weight_decay, clip
        # Made here and not by the first update, so that no update has memory to run out of.
        self._state = {
            "step": torch.zeros((), dtype=torch.float32, device=lora.master.device),
            "exp_avg": torch.zeros_like(lora.master),
            "exp_avg_sq": torch.zeros_like(lora.master),
        }
        self._updates = 0
        self.skipped_in_a_row = 0

    def update(self, rate: float, loss: float) -> float:
        """Make one update, clear the gradient, and return its norm before clipping.

        Where loss or gradient is not finite nothing is changed and `skipped_in_a_row` grows.
        """
        lora = self._lora
        norm = float(torch.linalg.vector_norm(lora.grad))
        if math.isfinite(norm) and math.isfinite(loss):
            if norm > self._clip:
                lora.grad.mul_(self._clip / norm)
            self._adamw(rate)
            lora.refresh()
            self._updates += 1
            self.skipped_in_a_row = 0
        else:
            self.skipped_in_a_row += 1
        lora.grad.zero_()
        return norm

    def _adamw(self, rate: float) -> None:
        """PyTorch's fused update as a function: its optimizer object imports PyTorch's compiler, for seconds."""
        state = self._state
        adamw(
            [self._lora.master],
            [self._lora.grad],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            fused=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=rate,
            weight_decay=self._weight_decay,
            eps=1e-8,
            maximize=False,
        )

    @property
    def is_intact(self) -> bool:
        """Whether no update was broken off after it had begun to change something."""
        return int(self._state["step"]) == self._updates

    def tensors(self) -> dict[str, Tensor]:
        """All that updates depend on besides `lora.master`: the moments, their count, the skipped in a row."""
        return {**self._state, "skipped_in_a_row": torch.tensor(self.skipped_in_a_row)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` gave; the LoRA has the adapter of the same moment."""
        for name, tensor in self._state.items():
            tensor.copy_(tensors[name])
        self._updates = int(tensors["step"])
        self.skipped_in_a_row = int(tensors["skipped_in_a_row"])
