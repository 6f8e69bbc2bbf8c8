"""Packing and unpacking, bit for bit against `gguf.quants`."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from gemwright.weights.gguf_reader import open_gguf
from gemwright.weights.quants import PACKABLE, QTYPES, block_size, pack, row_bytes, unpack


def reference(raw: torch.Tensor, qtype: str) -> torch.Tensor:
    with np.errstate(all="ignore"):
        values = gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType[qtype])
    return torch.from_numpy(np.array(values))


def assert_same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal to the bit, signed zeros included; any NaN equals any NaN."""
    nan = theirs.isnan()
    assert torch.equal(ours.isnan(), nan)
    bits = torch.int32 if ours.dtype == torch.float32 else torch.int16
    assert torch.equal(ours.view(bits)[~nan], theirs.view(bits)[~nan])


def random_bytes(qtype: str, rows: int = 37, blocks: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(qtype))
    return torch.randint(0, 256, (rows, blocks * block_size(qtype)[1] * 4), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("qtype", QTYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unpacks_random_bytes_exactly(qtype: str, dtype: torch.dtype) -> None:
    raw = random_bytes(qtype)
    expected = reference(raw, qtype)
    assert_same_bits(unpack(raw, qtype, dtype), expected.to(dtype))
    out = torch.empty(expected.shape, dtype=dtype)
    assert unpack(raw, qtype, out=out) is out
    assert_same_bits(out, expected.to(dtype))


@pytest.mark.parametrize("qtype", QTYPES)
def test_more_than_one_chunk_and_odd_places(qtype: str) -> None:
    raw = random_bytes(qtype, rows=1300, blocks=8)
    assert_same_bits(unpack(raw[::2], qtype), reference(raw[::2].contiguous(), qtype))
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), raw[0]])[1:]  # data that no wider type is aligned with
    assert_same_bits(unpack(shifted, qtype), reference(raw[0].contiguous(), qtype))
    assert unpack(raw[:0], qtype).shape[0] == 0


@pytest.mark.parametrize("qtype", QTYPES)
def test_one_block_alone(qtype: str) -> None:
    raw = random_bytes(qtype)[:1, : block_size(qtype)[1]]
    assert_same_bits(unpack(raw, qtype), reference(raw, qtype))


def test_the_real_files_tensors(real_model: Path) -> None:
    seen: set[tuple[str, str]] = set()
    for tensor in open_gguf(real_model).tensors.values():
        key = (tensor.qtype, tensor.name.split(".")[-2])
        if key not in seen:
            seen.add(key)
            raw = tensor.data[:512] if tensor.data.ndim == 2 else tensor.data
            assert_same_bits(unpack(raw, tensor.qtype), reference(raw, tensor.qtype))
    assert {qtype for qtype, _ in seen} == {"F32", "Q5_0", "Q8_0", "Q4_K", "Q6_K"}


@pytest.mark.parametrize("qtype", PACKABLE)
def test_packs_the_same_bytes(qtype: str) -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(300, 1024, generator=generator) * torch.logspace(-6, 4, 300).view(-1, 1)
    values[3] = 0
    values[4, ::7] = values[4].abs().max()  # ties
    values[5, ::5] = -values[5].abs().max()
    theirs = gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType[qtype]).view(np.uint8)
    assert np.array_equal(pack(values, qtype).numpy(), theirs)


def test_refuses_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="cannot pack Q5_K"):
        pack(torch.zeros(1, 256), "Q5_K")
    with pytest.raises(ValueError, match="33 columns"):
        pack(torch.zeros(1, 33), "Q8_0")
    with pytest.raises(ValueError, match="contiguous"):
        unpack(torch.zeros(2, 34, dtype=torch.uint8), "Q8_0", out=torch.empty(32, 2).T)
    assert row_bytes(64, "Q4_0") == 36
