"""Products with a weight's rows: the same numbers by whichever library computes them."""

from __future__ import annotations

import platform

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemwright.host import Cpu
from gemwright.kernels import products
from gemwright.kernels.products import mkl_is_slow, product


@pytest.fixture(params=[False, True])
def onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch without oneDNN")
    monkeypatch.setattr(products, "mkl_is_slow", lambda: request.param)


def operands(rows: int, width: int, outputs: int, tail: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x is a part of wider rows, as an input beside its adapter's tail is."""
    draw = torch.Generator().manual_seed(rows * 1000 + width * 10 + outputs)
    x = torch.randn(rows, width + tail, generator=draw)[:, :width]
    return x, torch.randn(outputs, width, generator=draw)


@given(st.integers(1, 70), st.integers(1, 130), st.integers(1, 200), st.sampled_from([0, 1, 16]))
@settings(max_examples=60)
def test_equals_a_product_in_double(rows: int, width: int, outputs: int, tail: int) -> None:
    x, weight = operands(rows, width, outputs, tail)
    right = x.double() @ weight.double().t()
    for slow in (False, torch.backends.mkldnn.is_available()):
        with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
            patch.setattr(products, "mkl_is_slow", lambda slow=slow: slow)
            y = product(x, weight)
        assert y.dtype == torch.float32 and y.shape == right.shape
        assert float((y - right).norm()) <= 1e-5 * float(right.norm()) + 1e-6


@pytest.mark.usefixtures("onednn")
def test_fills_what_it_is_given() -> None:
    x, weight = operands(40, 64, 100, 16)
    out = torch.full((40, 120), torch.nan)[:, :100]
    assert product(x, weight, out) is out and torch.equal(out, product(x, weight))


@pytest.mark.usefixtures("onednn")
def test_bf16_stays_bf16() -> None:
    x, weight = (part.bfloat16() for part in operands(40, 64, 100, 0))
    assert torch.equal(product(x, weight), torch.mm(x, weight.t()))


@pytest.mark.parametrize(
    ("machine", "name", "slow"),
    [
        ("x86_64", "AMD EPYC 7763", True),
        ("AMD64", "AMD Ryzen 7 5800X 8-Core Processor", True),
        ("AMD64", "13th Gen Intel(R) Core(TM) i7-13700", False),
        ("x86_64", None, False),
        ("aarch64", "Neoverse-N1", False),
        ("arm64", "Apple M2", False),
    ],
)
def test_which_processors_mkl_is_slow_on(
    machine: str, name: str | None, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(products, "read_cpu", lambda *_: Cpu(name=name))
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    mkl_is_slow.cache_clear()
    try:
        assert mkl_is_slow() is slow
    finally:
        mkl_is_slow.cache_clear()
