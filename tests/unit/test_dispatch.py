"""The choice between plain PyTorch and Triton, with a fake in place of the device's answers."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator

import pytest
import torch

from gemwright import kernels
from gemwright.kernels import dispatch

NAMES = sorted(set(dispatch.__all__) - {"has_triton"})
DEVICE = torch.device("cuda", 0)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A device of compute capability 9.0 which answers what it is, and can do nothing."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Fake 1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    dispatch._twins.cache_clear()
    yield monkeypatch
    dispatch._twins.cache_clear()


def test_a_cpu_has_no_triton() -> None:
    assert not dispatch.has_triton(torch.device("cpu"))


def test_a_device_without_bf16_is_said_once(device: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    device.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert not dispatch.has_triton(DEVICE) and not dispatch.has_triton(DEVICE)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Fake 1 has no bf16 (compute capability 7.5)" in said


def test_a_device_without_triton_is_said_once(device: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    device.delattr(kernels, "triton_ops", raising=False)
    device.setitem(sys.modules, "gemwright.kernels.triton_ops", None)
    assert not dispatch.has_triton(DEVICE) and not dispatch.has_triton(DEVICE)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Fake 1 computes with plain PyTorch, slower, since Triton cannot be" in said


@pytest.mark.parametrize("name", NAMES)
def test_a_twin_has_the_signature_of_its_plain_form(name: str, device: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed: it exists for Linux on x86-64")
    assert dispatch.has_triton(DEVICE)
    twin = getattr(dispatch._twins(0), name)
    plain = getattr(dispatch, name)
    assert twin is not plain.__wrapped__
    ours, theirs = (
        [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()] for f in (twin, plain)
    )
    assert ours == theirs
