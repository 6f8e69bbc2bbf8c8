"""Every Triton kernel compiled to machine code, without a GPU, for each generation that has bf16.

The public functions run on meta tensors of the true largest shapes while their launches are noted, so that what is
compiled here is what a GPU would be given: dtypes, alignment, block sizes and warps are stated nowhere a second time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: it exists for Linux on x86-64")
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from gemwright.kernels import (
    fp8,
    triton_cross_entropy,
    triton_fp8,
    triton_geglu,
    triton_heads,
    triton_join,
    triton_norm,
    triton_ops,
    triton_unpack,
)
from gemwright.kernels.cross_entropy import Running

MODULES = (triton_cross_entropy, triton_fp8, triton_geglu, triton_heads, triton_join, triton_norm, triton_unpack)
SHARED_BYTES = 99 * 1024  # what a program may use on compute capability 8.6 and 8.9; the other generations have more
CAPABILITIES = (80, 86, 89, 90, 120)  # A100, RTX 30, RTX 40, H100, RTX 50
FP8_SINCE = 89
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.float8_e4m3fn: "*fp8e4nv",
}


@dataclass(frozen=True)
class Launch:
    """One kernel with the types, constants and alignments that a launch of it would be compiled for."""

    kernel: JITFunction
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[int, ...]
    warps: int


class Recorder:
    """Stands in for a kernel: notes a launch instead of making it."""

    def __init__(self, kernel: JITFunction, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Recorder:
        assert 0 < grid[0] < 2**31 and len(grid) == 1
        return self

    def __call__(self, *args: Any, num_warps: int, **constants: Any) -> None:
        signature, known, aligned = {}, dict(constants), []
        values = dict(zip(self.kernel.arg_names, args, strict=False)) | constants
        for index, parameter in enumerate(self.kernel.params):
            value = values[parameter.name]
            if parameter.is_constexpr or value is None:
                signature[parameter.name], known[parameter.name] = "constexpr", value
                continue
            is_tensor = isinstance(value, torch.Tensor)
            signature[parameter.name] = (
                TYPES[value.dtype] if is_tensor else "fp32" if isinstance(value, float) else "i32"
            )
            # A fresh tensor is aligned; so is whatever integer sixteen divides.
            if not parameter.do_not_specialize and (is_tensor or (isinstance(value, int) and value % 16 == 0)):
                aligned.append(index)
        self.launches.append(Launch(self.kernel, signature, known, tuple(aligned), num_warps))


def kernels() -> dict[str, tuple[Any, JITFunction]]:
    return {
        name: (module, value)
        for module in MODULES
        for name, value in vars(module).items()
        if name.endswith("_kernel") and isinstance(value, JITFunction)
    }


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def run_rows(width: int, mlp: int) -> None:
    """All that works on whole rows, at a model's width, with and without what is optional."""
    n, f32 = 8192, torch.float32
    x, weight, rstd, wide = (
        meta(n, width),
        meta(width, dtype=f32),
        meta(n, 1, dtype=f32),
        meta(n, width + 32)[:, :width],
    )
    triton_ops.rms_norm(x, weight, 1e-6, out=wide)
    triton_ops.rms_norm(x, weight, 1e-6, residual=x)
    triton_ops.norm_add_norm(x, x, weight, weight, 1e-6, out=wide)
    triton_ops.rms_norm_backward(meta(n, width, dtype=f32), x, rstd, weight)
    triton_ops.rms_norm_backward(x, x, rstd, weight, add=x, out=x)
    gate_up, pitched = meta(n, 2 * mlp), meta(n, mlp + 32)[:, :mlp]
    triton_ops.geglu(gate_up, pitched)
    triton_ops.geglu_backward(pitched, gate_up, None, gate_up, pitched)
    triton_ops.geglu_backward(pitched, gate_up, None, gate_up)


def run_heads(heads: int, kv_heads: int, size: int) -> None:
    n, f32 = 8192, torch.float32
    qkv, weight, table = (
        meta(n, (heads + 2 * kv_heads) * size),
        meta(size, dtype=f32),
        (meta(n, 1, size // 2, dtype=f32),) * 2,
    )
    q, _, *rstd = triton_ops.norm_rope(qkv, weight, weight, table, heads, kv_heads, 1e-6)
    for dtype in (f32, torch.bfloat16):
        d = meta(n, kv_heads, size, dtype=dtype)
        triton_ops.norm_rope_backward(q, d, d, qkv, (rstd[0], rstd[1]), weight, weight, table, qkv)


def run_softmax(dtype: torch.dtype, width: int) -> None:
    running = Running(*(meta(4096, 1, dtype=torch.float32) for _ in range(4)))
    triton_ops.softmax_chunk(meta(4096, width, dtype=dtype), meta(4096, dtype=torch.int64), 0, running)


def run_unpack(qtype: str) -> None:
    rows, cols = 21504, 5376
    form = triton_unpack.FORMATS[qtype]
    raw = meta(rows, cols // form.values * form.size, dtype=torch.uint8)
    triton_unpack.unpack(raw, qtype, meta(rows, cols))
    triton_unpack.unpack(raw, qtype, meta(rows, cols + 64)[:, :cols])
    triton_unpack.unpack(raw, qtype, meta(rows, cols, dtype=torch.float32))
    triton_unpack.unpack(raw, qtype, fp8.new_rows(rows, cols, 48, raw)[:, :cols], meta(rows, dtype=torch.float32))


def run_fp8(rows: int, width: int, t: int) -> None:
    """A weight of `rows` x `width` with its adapters, both ways, and the rows that meet it."""
    n, f32 = 8192, torch.float32
    x, tail, gain = meta(n, width + t)[:, :width], meta(n, width + t)[:, width:], meta(1, dtype=f32)
    normal, turned = fp8.new_rows(rows, width, t, x), fp8.new_rows(width, rows, t, x)
    triton_fp8.quantise_rows(x, fp8.new_rows(n, width, t, x), meta(n, dtype=f32), None, tail, gain)
    back, factor = fp8.new_rows(n, rows, t, x), meta(rows, dtype=f32)
    triton_fp8.quantise_rows(meta(n, rows), back, meta(n, dtype=f32), factor, meta(n, t), gain)
    triton_fp8.quantise_rows(meta(n, rows), back, meta(n, dtype=f32), factor)
    triton_fp8.quantise_rows(meta(rows, width), normal[:, :width], factor, floor=gain)
    triton_fp8.join_tail(meta(rows, t), factor, normal[:, width:])
    triton_fp8.join_tail(meta(t, width).t(), None, turned[:, rows:])
    triton_fp8.turn(normal[:, :width], turned[:, :rows])


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    noted: list[Launch] = []
    for name, (module, kernel) in kernels().items():
        monkeypatch.setattr(module, name, Recorder(kernel, noted))
    for width, mlp in ((5376, 21504), (640, 2048)):  # one row a program, several rows a program
        run_rows(width, mlp)
    run_heads(32, 16, 128)
    run_heads(8, 4, 256)
    for dtype, width in ((torch.bfloat16, 16384), (torch.float32, 16384), (torch.bfloat16, 4096)):
        run_softmax(dtype, width)
    for qtype in triton_unpack.FORMATS:
        run_unpack(qtype)
    for rank in (3, 16, 128):
        master, table = meta(1 << 20, dtype=torch.float32), meta(7, 6, dtype=torch.int64)
        triton_join.join(master, table, 1.0, rank, 3 * rank + 5, 21_504)
    run_fp8(43008, 5376, 32)
    run_fp8(8192, 5376, 48)
    run_fp8(5376, 21504, 16)
    run_fp8(640, 2048, 8)
    monkeypatch.undo()
    yield noted


def test_every_kernel_is_launched_here(launches: list[Launch]) -> None:
    assert {launch.kernel.__name__ for launch in launches} == set(kernels())


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_launch_compiles(
    capability: int, launches: list[Launch], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for launch in launches:
        if "*fp8e4nv" in launch.signature.values() and capability < FP8_SINCE:
            continue
        attributes = {(index,): [["tt.divisibility", 16]] for index in launch.aligned}
        source = ASTSource(launch.kernel, launch.signature, launch.constants, attributes)
        built = triton.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": launch.warps})
        assert built.asm["cubin"] and built.metadata.shared <= SHARED_BYTES, launch
        assert built.metadata.num_warps == launch.warps
