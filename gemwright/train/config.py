"""What a fine-tune is asked to do, checked as a whole before anything is loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from gemwright.errors import InputError
from gemwright.report import bytes_of
from gemwright.spec import LINEARS


class TrainConfig(BaseModel):
    """Settings of one supervised fine-tune with LoRA; InputError names the first that is impossible.

    `seq` is the most tokens of a packed row (a micro-batch); a step passes `tokens_per_step // seq` rows. `alpha` None
    means `rank`. Without `packing` a row holds one example. `lr` rises linearly over `warmup` (a share of all steps),
    then follows `schedule`. After `patience` updates in a row whose loss or gradient is not finite the run stops.
    `compute` "fp8" is for the products of the frozen weights alone. `graphs` allows steps to be replayed as CUDA graphs
    where that is faster. A checkpoint is written every `save_every` steps (None: by time). Every `eval_every` steps
    (None: at each epoch's end) the loss on `validation` or on `holdout` examples is measured, and after `stop_after` of
    them without a gain the run ends. `until` (HH:MM) and `max_hours` bound this process's work. At each evaluation the
    model continues `sample_prompts` (a file of one a line; None: prompts of the data). `trackio` is the project to log
    to.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: Path
    model: str | Path
    out: Path
    max_steps: int | None = Field(None, ge=1)
    epochs: float = Field(1.0, gt=0, allow_inf_nan=False)
    rank: int = Field(16, ge=1)
    alpha: float | None = Field(None, gt=0, allow_inf_nan=False)
    rslora: bool = False
    dora: bool = False
    targets: tuple[str, ...] = LINEARS
    dropout: float = Field(0.0, ge=0, lt=1)
    lr: float = Field(1e-3, gt=0, lt=1)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = Field(0.0, ge=0, lt=1)
    warmup: float = Field(0.05, ge=0, le=1)
    clip: float = Field(1.0, gt=0)
    patience: int = Field(5, ge=1)
    seq: int = Field(1024, ge=16)
    tokens_per_step: int = Field(1024, ge=16)
    train_on: Literal["all", "model", "last"] = "model"
    packing: bool = True
    seed: int = Field(0, ge=0, lt=2**31)
    precision: str = "auto"
    compute: Literal["bf16", "fp8"] = "bf16"
    recompute: Literal["auto", "always", "never"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    vram: int | None = Field(None, gt=0)
    residency: Literal["auto", "resident", "streamed"] = "auto"
    source: Literal["auto", "mapped", "pinned", "pageable"] = "auto"
    deterministic: bool = False
    graphs: bool = True
    threads: int | None = Field(None, ge=1)
    save_every: int | None = Field(None, ge=1)
    keep: int = Field(2, ge=1)
    validation: Path | None = None
    holdout: int | None = Field(None, ge=1)
    eval_every: int | None = Field(None, ge=1)
    stop_after: int | None = Field(None, ge=1)
    until: str | None = None
    max_hours: float | None = Field(None, gt=0, allow_inf_nan=False)
    sample_prompts: Path | None = None
    tensorboard: bool = False
    trackio: str | None = Field(None, min_length=1)

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0]).replace("_", "-")
            what = f"{first['input']!r} is not possible ({first['msg'].lower()})"
            raise InputError(what, where=f"--{name}", fix="See 'gemwright tune --help'.") from None
        if self.compute == "fp8" and self.dora:
            raise InputError("DoRA needs the weights' rows in bf16", where="--dora", fix="Leave --compute fp8 out.")
        if self.compute == "fp8" and self.precision == "fp32":
            raise InputError("fp8 products have bf16 around them", where="--compute", fix="Leave --precision out.")
        if self.validation and self.holdout:
            raise InputError("two validation sets", where="--holdout", fix="Give one of the two.")
        for name in ("eval_every", "stop_after", "sample_prompts"):
            if getattr(self, name) and not self.evaluates:
                flag = f"--{name.replace('_', '-')}"
                raise InputError("there is nothing to evaluate on", where=flag, fix="Give --validation or --holdout.")

    @field_validator("vram", mode="before")
    @classmethod
    def _bytes(cls, value: object) -> object:
        return bytes_of(value) if isinstance(value, str) else value

    @field_validator("until")
    @classmethod
    def _clock(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"([01]?\d|2[0-3]):[0-5]\d", value):
            raise ValueError("a time of day is written as 07:00")
        return value

    @field_validator("targets", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value

    @property
    def scaled_alpha(self) -> float:
        """LoRA's alpha."""
        return float(self.rank) if self.alpha is None else self.alpha

    @property
    def evaluates(self) -> bool:
        """Whether there is something to evaluate on."""
        return self.validation is not None or self.holdout is not None

    @property
    def rows_per_step(self) -> int:
        """Micro-batches of a step."""
        return max(1, self.tokens_per_step // self.seq)
