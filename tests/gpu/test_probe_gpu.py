"""The measurements of `gemwright doctor` on a real card."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemwright.findings import NEEDED_27B_BYTES
from gemwright.kernels.probe import SHAPES, largest_pinned, measure
from gemwright.machine import inspect
from gemwright.model.pinned import can_lock
from gemwright.rigs import this_machine

pytestmark = pytest.mark.gpu


def test_a_card_gives_every_figure(tmp_path: Path) -> None:
    import torch

    machine = inspect(folder=tmp_path)
    probes = measure(machine, can_lock)
    assert probes.notes == () and probes.took_s < 60
    assert probes.gpu == torch.cuda.get_device_name() == machine.gpus[0].name
    one_way = (probes.link_to_gpu_bytes_s, probes.link_from_gpu_bytes_s)
    assert all(rate is not None and 1e9 < rate < 5e11 for rate in (*one_way, probes.link_pageable_bytes_s))
    assert probes.link_both_bytes_s is not None and probes.link_both_bytes_s > 0.9 * min(r for r in one_way if r)
    assert probes.gpu_memory_bytes_s is not None and probes.gpu_memory_bytes_s > max(r for r in one_way if r)
    assert len(probes.gpu_bf16_flops) == len(SHAPES) and min(probes.gpu_bf16_flops.values()) > 1e11
    assert probes.largest_pinned_bytes and probes.largest_pinned_bytes <= (probes.pinned_tried_bytes or 0)
    rig = this_machine(probes, machine)
    measured = ("gpu.bf16_flops", "gpu.memory_bytes_s", "gpu.link_bytes_s", "gpu.link_both_bytes_s", "gpu.vram_bytes")
    assert {rig.basis[name] for name in measured} == {"measured"}


def test_locked_memory_is_given_back() -> None:
    import psutil

    before = psutil.Process().memory_info().rss
    assert largest_pinned(1 << 30, can_lock)[0] in (1 << 28, 1 << 29, 1 << 30)
    assert psutil.Process().memory_info().rss - before < 1 << 28 < NEEDED_27B_BYTES
