"""How many documents flash attention's backward takes at a time, and how images are joined to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gemwright.kernels import attend
from gemwright.kernels.attend import Blocked, Flash, Kept, WithImages, spans
from gemwright.kernels.attention import plan_blocks
from gemwright.layout import DOCUMENT_ROWS, document_room

CPU = torch.device("cpu")


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=400))
def test_spans_cover_all_documents_within_the_room(lengths: list[int]) -> None:
    tokens = sum(lengths)
    most = tokens + document_room(tokens)
    found = spans(lengths, most)
    assert [i for part in found for i in range(part.start, part.stop)] == list(range(len(lengths)))
    for part in found:
        own = lengths[part]
        assert own and (len(own) == 1 or sum(own) + DOCUMENT_ROWS * len(own) <= most)


def test_few_documents_go_together() -> None:
    assert spans([2048], 2048 + document_room(2048)) == [slice(0, 1)]
    assert len(spans([128] * 16, 2048 + document_room(2048))) == 1
    assert len(spans([4] * 600, 2400 + document_room(2400))) > 10


class DenseFlash(Flash):
    """What the GPU's operators promise of a row, in plain fp64: causal, a window, the log-sum-exp beside the output."""

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        document = torch.repeat_interleave(torch.arange(len(self._lengths)), torch.tensor(self._lengths))
        age = torch.arange(len(q))[:, None] - torch.arange(len(q))
        seen = (document[:, None] == document) & (age >= 0) & (age <= self._window.get("window_size_left", len(q)))
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        return torch.einsum("qhd,khd->hqk", q, k).masked_fill(~seen, -torch.inf)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Kept]:
        scores = self._scores(q, k)
        v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
        none = torch.empty(0)
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v), (scores.logsumexp(-1), none, none)

    def _backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, states: Any, bounds: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        groups = q.shape[1] // k.shape[1]
        p = (self._scores(q, k) - lse[:, :, None]).exp()
        dp = torch.einsum("qhd,khd->hqk", do, v.repeat_interleave(groups, 1))
        ds = p * (dp - (do * out).sum(-1).t()[:, :, None])
        dq = torch.einsum("hqk,khd->qhd", ds, k.repeat_interleave(groups, 1))
        dk, dv = torch.einsum("hqk,qhd->khd", ds, q), torch.einsum("hqk,qhd->khd", p, do)
        return dq, *(x.unflatten(1, (-1, groups)).sum(2) for x in (dk, dv))


@pytest.mark.parametrize("window", [None, 300, 64, 7])
@pytest.mark.parametrize("images", [[(0, 30)], [(3, 5), (5, 60), (100, 140), (141, 143)], [(70, 326)]], ids=str)
def test_images_join_flash_attention_as_if_it_knew_them(
    monkeypatch: pytest.MonkeyPatch, window: int | None, images: Sequence[tuple[int, int]]
) -> None:
    monkeypatch.setattr(attend, "Flash", DenseFlash)
    lengths = [65, 270, 12]
    draw = torch.Generator().manual_seed(0)
    q, k, v, do = (torch.randn(347, h, 8, generator=draw, dtype=torch.float64) for h in (4, 2, 2, 4))
    found = []
    for kind in (
        WithImages(DenseFlash(lengths, window, CPU), images, CPU),
        Blocked(plan_blocks(lengths, window, images=images)),
    ):
        out, kept = kind.forward(q, k, v)
        found.append((out, *kind.backward(do, q, k, v, out, kept)))
    for ours, dense in zip(*found, strict=True):
        torch.testing.assert_close(ours, dense.double(), rtol=1e-5, atol=1e-5)


def test_flash_attention_refuses_what_documents_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(ValueError, match="share"):
        attend.plan([3, 2], None, torch.device("cuda"), torch.bfloat16, pasts=[[], [0]])
